"""The ASE calculator: the same numbers as predict, forces that are the slope, one molecule after another."""

import os
import subprocess
import sys
from pathlib import Path

import ase
import ase.io
import numpy as np
import pytest
from ase.md.verlet import VelocityVerlet

import finetune
from harness.errors import InputError
from tools import predict
from tools.calculator import GeoReconCalculator

ROOT = Path(__file__).parent.parent
ETHANOL = ROOT / "data/ethanol_100.xyz"
MODEL = {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4, "vector_cutoff": "true"}


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    out = tmp_path_factory.mktemp("calculator") / "run"
    sizes = [f"model.{key}={value}" for key, value in MODEL.items()]
    steps = ["max_steps=30", "lr_cosine_length=30", "lr_warmup_steps=5", "val_every=30", "train_size=200"]
    data = [f"data={ROOT / 'data/ethanol_demo.h5'}", "val_size=20", "test_size=20"]
    finetune.main([str(ROOT / "configs/demo_forces.yaml"), f"out_dir={out}", *data, *steps, *sizes, "init_from="])
    return out / "best.pt"


@pytest.fixture
def ethanol(best):
    atoms = ase.io.read(ETHANOL, index=0)
    atoms = ase.Atoms(atoms.numbers, atoms.positions)
    atoms.calc = GeoReconCalculator(best)
    return atoms


def test_the_numbers_are_those_of_predict(ethanol, best, tmp_path):
    predict.main([str(best), str(ETHANOL), str(tmp_path / "out.xyz")])
    predicted = ase.io.read(tmp_path / "out.xyz", index=0)
    assert ethanol.get_potential_energy() == pytest.approx(predicted.get_potential_energy(), abs=1e-6)
    assert np.allclose(ethanol.get_forces(), predicted.get_forces(), atol=1e-5)


def test_forces_are_minus_the_slope_of_the_energy(ethanol):
    ethanol.calc.model.double()
    forces = ethanol.get_forces()
    assert np.abs(forces).max() > 1e-3
    for atom, axis in ((0, 0), (3, 2)):
        energies = []
        for step in (1e-4, -1e-4):
            ethanol.positions[atom, axis] += step
            energies.append(ethanol.get_potential_energy())
            ethanol.positions[atom, axis] -= step
        assert forces[atom, axis] == pytest.approx(-(energies[0] - energies[1]) / 2e-4, abs=1e-6)


@pytest.mark.slow
def test_compiled_equals_uncompiled(ethanol, best):
    """On ethanol, on ethanol drawn out beyond the cutoff, and on half of it: other shapes, other pairs."""
    compiled = GeoReconCalculator(best, compile=True)
    for atoms in (ethanol, ethanol[:5]):
        for stretched in (1.0, 2.5):
            one, two = (
                ase.Atoms(atoms.numbers, stretched * atoms.positions, calculator=c) for c in (ethanol.calc, compiled)
            )
            assert one.get_potential_energy() == pytest.approx(two.get_potential_energy(), rel=1e-6)
            assert np.allclose(one.get_forces(), two.get_forces(), atol=1e-5)


def test_another_molecule_has_its_own_forces(ethanol, best):
    ethanol.get_forces()
    water = ase.Atoms("OH2", [[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]], calculator=ethanol.calc)
    alone = water.copy()
    alone.calc = GeoReconCalculator(best)
    with pytest.warns(match="OH2: an unknown constant is in its energy"):
        assert np.allclose(water.get_forces(), alone.get_forces())


def test_what_it_cannot_do_is_said(ethanol, tmp_path):
    for atoms, words in (
        (ase.Atoms("NH", [[0, 0, 0], [0, 0, 1]]), "element 7"),
        (ase.Atoms("H", cell=[5] * 3, pbc=True), "periodic"),
    ):
        atoms.calc = ethanol.calc
        with pytest.raises(InputError, match=words):
            atoms.get_potential_energy()
    for z in (float("nan"), 1e-3):
        with pytest.raises(InputError, match="the molecule has"):
            ase.Atoms("CH", [[0, 0, 0], [0, 0, z]], calculator=ethanol.calc).get_forces()
    with pytest.raises(InputError, match="best.pt"):
        GeoReconCalculator(tmp_path / "nothing/best.pt")


def test_total_energy_is_conserved(ethanol):
    """0.05 ps from rest: what leaks is small against what moves between kinetic and potential energy."""
    ethanol.positions *= 1.03  # stretched, so that it moves
    record = []
    dynamics = VelocityVerlet(ethanol, 0.5 * ase.units.fs)
    dynamics.attach(lambda: record.append((ethanol.get_total_energy(), ethanol.get_kinetic_energy())))
    dynamics.run(100)
    total, kinetic = np.array(record).T
    assert np.ptp(total) < 0.05 * np.ptp(kinetic) and np.ptp(kinetic) > 0.05


def test_equal_shapes_from_step_to_step_give_the_same_forces(ethanol):
    """What compiled code is given on CUDA: the pairs, brought up to a multiple by others."""
    ethanol.positions *= 2.0  # not all pairs lie within the cutoff
    expected = ethanol.get_forces()
    model = ethanol.calc.model
    shapes = set()

    def gradient(pos, z, batch, num_molecules, edge_index):
        shapes.add(edge_index.shape[1])
        return model.gradient(pos, z, batch, num_molecules, edge_index)

    model.compiled, model.multiple = gradient, 32
    ethanol.calc.reset()
    assert np.allclose(ethanol.get_forces(), expected, atol=1e-5)
    assert shapes == {32}


def test_a_missing_ase_is_one_line(tmp_path):
    (tmp_path / "ase.py").write_text("raise ImportError")
    command = [sys.executable, "-c", "import tools.calculator"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("harness.errors.InputError: the calculator needs the package ase")
