"""Files as people really have them: units under any name, levels that mix, drawings, look-alikes of labels, weights."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_files import convert, md17_npz
from tiny_run import ROOT, TINY

import finetune
from formats.sources import check_units
from formats.weights import read_encoder
from harness.errors import InputError
from model import EquivariantTransformer, ModelConfig

WATER = "O 0 0 0.119 0 0 0.3\nH 0 0.763 -0.477 0 0.1 -0.15\nH 0 -0.763 -0.477 0 -0.1 -0.15\n"
FORCES = "Properties=species:S:1:pos:R:3:forces:R:3"


def xyz(path, *comments, atoms=WATER):
    path.write_text("".join(f"{atoms.count(chr(10))}\n{comment}\n{atoms}" for comment in comments))
    return path


@pytest.mark.parametrize(
    "stated, words",
    [
        ("energy_units=kcal/mol", "its energy_units says kcal/mol"),
        ("e_unit=Hartree r_unit=Bohr", "its e_unit says Hartree"),
        ("length_unit=bohr", "its length_unit says bohr"),
        ("LengthUnits=nm", "its LengthUnits says nm"),
        ("Hartree", "its Hartree says hartree"),
        ("positions{atomic_unit} cell{angstrom}", "says atomic_unit"),
        ('units="_JSON {\\"energy\\": \\"Hartree\\", \\"length\\": \\"Ang\\"}"', "its units says Hartree"),
        ('units="_JSON [\\"eV\\", \\"Bohr\\"]"', "its units says Bohr"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_unit_under_any_name_is_read(tmp_path, stated, words, labelled):
    comment = f"{FORCES} energy=-2076.0 {stated}" if labelled else stated
    atoms = WATER if labelled else "O 0 0 0.119\nH 0 0.763 -0.477\nH 0 -0.763 -0.477\n"
    with pytest.raises(InputError, match="frame 0") as error:
        convert("xyz", [xyz(tmp_path / "a.xyz", comment, atoms=atoms)], tmp_path / "a.h5")
    assert words in str(error.value) and "convert the numbers to eV" in str(error.value)


@pytest.mark.parametrize(
    "stated",
    [
        "energy_unit=eV r_unit=Ang",
        "units=eV/Angstrom time_unit=fs",
        'units="_JSON {\\"time\\": \\"fs\\", \\"energy\\": \\"eV\\", \\"momenta\\": \\"(eV*u)^0.5\\"}"',
        "positions{angstrom}",
    ],
)
def test_units_that_fit_are_taken(tmp_path, stated):
    m = convert("xyz", [xyz(tmp_path / "a.xyz", f"{FORCES} energy=-2076.0 {stated}")], tmp_path / "a.h5")
    assert m.label("energy").tolist() == [-2076.0] and m.units["forces"] == "eV/angstrom"


@pytest.mark.parametrize(
    "said, refused", [("kcal/mol", False), ("kcal mol-1", False), ("Hartree", True), ("eV", True), ("kJ/mol", True)]
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_units_of_an_npz_whatever_the_key(tmp_path, said, refused, shape):
    raw = md17_npz(tmp_path / "md17_a.npz", Energy_Unit=np.full(shape, said), r_unit="Ang")
    if not refused:
        assert len(convert("md17", [raw], tmp_path / "a.h5")) == 4
        return
    with pytest.raises(InputError, match=f"its Energy_Unit says {said}"):
        convert("md17", [raw], tmp_path / "a.h5")


def test_a_lattice_is_no_molecule(tmp_path):
    with pytest.raises(InputError, match="has a lattice: periodic"):
        convert("md17", [md17_npz(tmp_path / "md17_a.npz", lattice=np.eye(3))], tmp_path / "a.h5")


def test_a_unit_is_judged_by_its_quantity():
    check_units({"units": {"stress": "GPa", "forces": "eV/Ang"}, "temperature_unit": "K", "name": "bohr"}, "eV", "x")
    with pytest.raises(InputError, match="x: its units says mH/a0"):
        check_units({"units": {"forces": "mH/a0"}}, "eV", "x")


def test_frames_of_one_file_are_of_one_level(tmp_path):
    both = "Properties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=-2076.0"
    plain = f"{FORCES} energy=-14.1"
    for comments in ((both, plain), (plain, both)):
        with pytest.raises(InputError, match="frame 1 has labels under REF_ and others without"):
            convert("xyz", [xyz(tmp_path / "a.xyz", *comments)], tmp_path / "a.h5")
    assert convert("xyz", [xyz(tmp_path / "a.xyz", both, both)], tmp_path / "a.h5").label("energy")[0] == -2076.0


def test_look_alikes_of_labels_are_named(tmp_path, capsys):
    convert("xyz", [xyz(tmp_path / "a.xyz", f"{FORCES} TotEnergy=-2076.0")], tmp_path / "a.h5")
    assert "not read: TotEnergy (1 molecules)" in capsys.readouterr().out
    singular = "Properties=species:S:1:pos:R:3:force:R:3 energy=-2076.0"
    assert list(convert("xyz", [xyz(tmp_path / "b.xyz", singular)], tmp_path / "b.h5").units) == ["energy"]
    assert "not read: force (1 molecules)" in capsys.readouterr().out
    convert("md17", [md17_npz(tmp_path / "md17_a.npz", dipole=np.zeros((4, 3)))], tmp_path / "c.h5")
    assert "not read: dipole (4 molecules)" in capsys.readouterr().out


def sdf(title, rows, mark="", symbols="OHH", tags=""):
    lines = "".join(f"{x:10.4f}{y:10.4f}{z:10.4f} {s:<3} 0  0\n" for s, (x, y, z) in zip(symbols, rows))
    head = f"{title}\n  program 0000000000{mark}\n\n{len(rows):3d}  0  0  0  0  0  0  0  0  0999 V2000\n"
    return f"{head}{lines}M  END\n{tags}$$$$\n"


FLAT = [(0, 0.117, 0), (0.757, -0.469, 0), (-0.757, -0.469, 0)]
BENT = [(0, 0, 0.117), (0, 0.757, -0.469), (0, -0.757, -0.469)]


def test_flat_drawings_are_no_geometries(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    path.write_text(
        sdf("1", FLAT) + sdf("2", FLAT, "3D") + sdf("3", FLAT, "2D") + sdf("4", BENT).replace("V2000", "v2000")
    )
    assert convert("sdf", [path], tmp_path / "a.h5").ids.tolist() == [2, 4]
    assert "2: flat and not marked 3D: a drawing, no geometry (id 1, 3)" in capsys.readouterr().out


def test_tags_that_are_not_read_are_named(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    path.write_text(sdf("1", BENT, "3D", tags="> <homo>\n-0.25\n\n>  <name>\nwater\n\n"))
    convert("sdf", [path], tmp_path / "a.h5")
    said = capsys.readouterr().out
    assert "not read: tag homo (1 molecules)" in said and "tag name" not in said


# ---------------------------------------------------------------- checkpoints of others


SMALL = ModelConfig(embedding_dimension=16, num_layers=2, num_rbf=16, num_heads=4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.representation_model."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    encoder = EquivariantTransformer(SMALL)
    torch.save({f"{prefix}{key}": value for key, value in encoder.state_dict().items()}, tmp_path / "a.pt")
    found, rest = read_encoder(tmp_path / "a.pt", SMALL)
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in encoder.state_dict().items()) and not rest


def test_two_networks_in_one_file_are_named(tmp_path):
    weights = EquivariantTransformer(SMALL).state_dict()
    owners = ("model.", "ema_model.module.")
    torch.save({f"{o}representation_model.{k}": v for o in owners for k, v in weights.items()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="several networks, under 'ema_model.', 'model.'"):
        read_encoder(tmp_path / "a.pt", SMALL)


def test_what_is_unexpected_is_named_before_what_is_missing(tmp_path):
    torch.save(
        {f"gnn.{key}": value for key, value in EquivariantTransformer(SMALL).state_dict().items()}, tmp_path / "a.pt"
    )
    with pytest.raises(InputError, match="not of this encoder: gnn.* unexpected"):
        read_encoder(tmp_path / "a.pt", SMALL)


# ---------------------------------------------------------------- training on such files


def energies_of_several_sizes(path, unlabelled=False):
    rng, text = np.random.default_rng(0), ""
    for k in range(60):
        rows = [("O", (0, 0, 0.119)), ("H", (0, 0.763, -0.477)), ("H", (0, -0.763, -0.477))][: 2 + k % 2]
        energy = -2040.0 - 13.6 * (len(rows) - 1) + rng.normal(0, 0.1)
        atoms = "".join(f"{s} {x} {y + rng.normal(0, 0.02):.4f} {z}\n" for s, (x, y, z) in rows)
        text += f"{len(rows)}\nenergy={energy}\n{atoms}"
    path.write_text(text)
    return convert("xyz", [path], path.with_suffix(".h5")).path


def fine_tune(data, *settings):
    sizes = ["train_size=40", "val_size=10", "test_size=10", "batch_size=8", "max_steps=3", "val_every=3"]
    model = [f"model.{key}={value}" for key, value in TINY["model"].items()]
    finetune.main([str(ROOT / "configs/demo_gap.yaml"), f"data={data}", "target=energy", *sizes, *model, *settings])


def test_energies_without_forces_get_references_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = energies_of_several_sizes(tmp_path / "a.xyz")
    capsys.readouterr()
    fine_tune(data, "out_dir=out/fit")
    assert "eV, after fitted atom references" in capsys.readouterr().out
    fine_tune(data, "out_dir=out/none", "references=none")
    assert "eV, no atom references; it grows with the molecule: try references=fit" in capsys.readouterr().out
    fitted, plain = (
        json.loads(Path(f"out/{name}/metrics.json").read_text())["test"]["test"] for name in ("fit", "none")
    )
    assert fitted["energy_mae"] < 500 < plain["energy_mae"]  # meV


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    energies_of_several_sizes(tmp_path / "a.xyz")
    fine_tune("~/a.h5", "out_dir=$RUNS/one")
    assert (tmp_path / "runs/one/metrics.json").exists() and not Path("~").exists() and not Path("$RUNS").exists()


def test_a_longer_run_may_have_a_longer_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = energies_of_several_sizes(tmp_path / "a.xyz")
    fine_tune(data, "out_dir=out/a", "lr_cosine_length=3")
    with pytest.raises(InputError, match="set max_steps and lr_cosine_length higher"):
        fine_tune(data, "out_dir=out/a", "lr_cosine_length=3", "resume=true")
    fine_tune(data, "out_dir=out/a", "lr_cosine_length=6", "max_steps=6", "resume=true")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_signal_to_the_whole_group_ends_the_run_after_its_step(tmp_path, stage, workers):
    """As `timeout` and queues send it: loader processes get it, too."""
    config = {"pretrain": "demo", "finetune": "demo_gap"}[stage]
    command = [sys.executable, str(ROOT / f"{stage}.py"), str(ROOT / f"configs/{config}.yaml"), "max_steps=100000"]
    command += [f"data={ROOT / 'data/qm9_demo.h5'}", f"num_workers={workers}", "log_every=1", "save_every=100000"]
    command += ["val_every=100000", "out_dir=run", *(f"model.{key}={value}" for key, value in TINY["model"].items())]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b'"train"') > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM and len(err.strip().splitlines()) == 1, err
    assert "stopped by SIGTERM after step" in err and (tmp_path / "run/last.pt").exists()
