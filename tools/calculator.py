"""An ASE calculator over a fine-tuned checkpoint: energy in eV, forces in eV/angstrom.

    from tools.calculator import GeoReconCalculator
    atoms.calc = GeoReconCalculator("out/demo_forces/best.pt")     for any dynamics or optimiser

    python -m tools.calculator best.pt START.xyz OUT.png [ps=2] [temperature=300]

relaxes the first molecule of START.xyz, heats it to temperature (K), runs it at constant energy
for ps, reports the drift of the total energy and draws it.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from finetune import load_property_model
from formats.schema import flaw
from formats.sources import read_xyz, readable
from harness.compiled import fill_up
from harness.errors import InputError, cli, explain, need
from harness.files import check_file, check_new, write_whole
from harness.ranks import tune_cpu
from harness.settings import read_arguments
from model import radius_graph, setting
from tools.predict import IN_EV, predict_molecule

try:
    ase = need("ase.calculators.calculator", "the calculator")
except InputError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"calculator.py: error: {error}")

SKIN = 1.0  # angstrom; pairs up to cutoff + SKIN are kept until an atom has moved by SKIN / 2


class GeoReconCalculator(ase.Calculator):
    """Energy (eV) and forces (eV/angstrom) of one molecule without periodic images.

    InputError: the checkpoint predicts something else. compile=True: by torch.compile, some minutes
    at the first call, then about 1.8 times as fast on one CPU core.
    """

    implemented_properties = ("energy", "free_energy", "forces")

    def __init__(self, checkpoint, device="cpu", compile=False):
        super().__init__()
        with explain(f"device = {device}", RuntimeError, AssertionError):  # unknown or not there
            model, self.about = load_property_model(checkpoint, device)
        if self.about["target"] != "energy_forces" or self.about["unit"] not in IN_EV:
            predicted = f"{checkpoint} predicts {self.about['target']} in {self.about['unit']}"
            raise InputError(f"{predicted}, not energies and forces in {' or '.join(IN_EV)}")
        self.model, self.device, self.cutoff = model, device, model.encoder.config.cutoff_upper
        if compile:
            self.model.compile_derivative(torch.device(device))
        self.listed = None  # z, pos when the list was made, pairs within cutoff + SKIN

    def pairs(self, z, pos):
        """edge_index (2, P) within the cutoff, from the list of pairs within cutoff + SKIN.

        The list is made again once an atom has moved far enough. Compiled code takes all of it,
        since its shape seldom changes; pairs beyond the cutoff have no weight.
        """
        outdated = self.listed is None or not torch.equal(self.listed[0], z)
        if outdated or (pos - self.listed[1]).square().sum(1).max() > (SKIN / 2) ** 2:
            j, i = every = radius_graph(pos, torch.zeros_like(z), math.inf)
            near = (pos[i] - pos[j]).square().sum(1) < (self.cutoff + SKIN) ** 2
            self.listed = z, pos, every[:, fill_up(near, self.model.multiple)]
        j, i = listed = self.listed[2]
        if self.model.compiled:
            return listed
        return listed[:, (pos[i] - pos[j]).square().sum(1) < self.cutoff**2]

    def calculate(self, atoms=None, properties=("energy",), system_changes=ase.all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise InputError("a periodic system: this calculator knows isolated molecules only")
        if cause := flaw(self.atoms.numbers, self.atoms.positions, {}):
            raise InputError(f"the molecule has {cause}")
        z = torch.as_tensor(self.atoms.numbers, device=self.device).long()
        pos = torch.as_tensor(self.atoms.positions, device=self.device)
        energy, forces = predict_molecule(self.model, self.about, z, pos, self.pairs(z, pos))
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}


def constant_energy(atoms, ps, temperature, timestep=0.5, seed=1):
    """Relax, heat to temperature (K), run at constant energy by timestep (fs): -> ps, eV, K."""
    units, optimize = need("ase.units", "dynamics"), need("ase.optimize", "dynamics")
    verlet = need("ase.md.verlet", "dynamics")
    optimize.FIRE(atoms, logfile=None).run(fmax=0.05, steps=500)
    # momenta of twice the temperature: half of it becomes potential energy; their sum is zero
    masses = atoms.get_masses()[:, None]
    spread = np.sqrt(masses * units.kB * 2 * temperature)
    momenta = np.random.default_rng(seed).standard_normal((len(atoms), 3)) * spread
    atoms.set_momenta(momenta - masses * momenta.sum(0) / masses.sum())
    dynamics = verlet.VelocityVerlet(atoms, timestep * units.fs)
    record = []
    for step in range(round(1000 * ps / timestep) + 1):
        if step:
            dynamics.run(1)
        record.append((atoms.get_total_energy(), atoms.get_temperature()))
    return np.arange(len(record)) * timestep / 1000, *np.array(record).T


@dataclass(frozen=True)
class DynamicsConfig:
    ps: float = setting(2.0, low=0.001, below=1e6)  # of dynamics at constant energy
    temperature: float = setting(300.0, low=0, below=1e5)  # K


def main(arguments):
    files, config = read_arguments(DynamicsConfig, arguments)
    if len(files) != 3:
        raise InputError("usage: python -m tools.calculator best.pt START.xyz OUT.png [ps=2]", code=2)
    checkpoint, start, out = files
    check_new(out, kinds=(".png", ".svg"))
    check_file(start, "give an xyz of the molecule")
    plt = need("matplotlib.pyplot", "drawing")
    tune_cpu()
    with readable(start):
        first = next(read_xyz(Path(start), labelled=False), None)
    if first is None or "skip" in first:
        raise InputError(f"{start}: {first['skip'] if first else 'no molecules inside'}")
    atoms = need("ase", "dynamics").Atoms(first["z"], first["pos"])
    atoms.calc = GeoReconCalculator(checkpoint)
    began = time.perf_counter()
    times, energies, temperatures = constant_energy(atoms, config.ps, config.temperature)
    seconds, steps = time.perf_counter() - began, len(times) - 1
    per_atom = 1000 * (energies - energies[0]) / len(atoms)  # meV
    drift, offset = np.polyfit(times, per_atom, 1)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6, 4.5), layout="constrained")
    top.plot(times, per_atom, color="black", lw=0.7)
    top.plot(times, drift * times + offset, "--", color="tab:red", lw=1)
    top.set(ylabel="total energy, meV/atom", title=f"drift {drift:.4f} meV per atom and ps")
    bottom.plot(times, temperatures, color="black", lw=0.7)
    bottom.set(xlabel="time, ps", ylabel="temperature, K")
    kind, unit = Path(out).suffix[1:], "meV per atom"
    write_whole(Path(out), lambda path: figure.savefig(path, dpi=120, format=kind))
    print(f"drift {drift:.5f} {unit} and ps, fluctuation {per_atom.std():.5f} {unit} (rms)")
    print(f"mean temperature {temperatures.mean():.0f} K, {steps:,} steps in {seconds:.0f} s")


if __name__ == "__main__":
    cli(main, __doc__, needed=3)
