"""An ASE calculator over a fine-tuned checkpoint: energy in eV, forces in eV/angstrom, any ASE dynamics or optimiser.

    from calculator import GeoReconCalculator
    atoms.calc = GeoReconCalculator("out/demo_forces/best.pt")

    python calculator.py best.pt START.xyz OUT.png [ps=2] [temperature=300]

relaxes the first molecule of START.xyz, heats it to temperature (K), runs it at constant energy for ps, reports and
draws the drift of the total energy.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch

from data import InputError, check_file, check_out, cli, flaw, need, read_xyz, readable
from finetune import IN_EV, load_property_model, predict_molecule
from model import radius_graph
from pretrain import tune_cpu, write_atomically

try:
    ase = need("ase.calculators.calculator", "the calculator")
except InputError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"calculator.py: error: {error}")

SKIN = 1.0  # angstrom; pairs up to cutoff + SKIN are kept until an atom has moved by SKIN / 2


class GeoReconCalculator(ase.Calculator):
    """Energy (eV) and forces (eV/angstrom) of one molecule, no periodic images. InputError: not a checkpoint for it.

    compile=True: by torch.compile, some minutes at the first call, then about 1.8 times as fast on one CPU core.
    """

    implemented_properties = ("energy", "forces")

    def __init__(self, checkpoint, device="cpu", compile=False):
        super().__init__()
        model, self.about = load_property_model(checkpoint)
        if self.about["target"] != "energy_forces" or self.about["unit"] not in IN_EV:
            predicts = f"{self.about['target']} in {self.about['unit']}"
            raise InputError(f"{checkpoint} predicts {predicts}, not energies and forces in {' or '.join(IN_EV)}")
        try:
            model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch's, of a device that it does not know or cannot reach
            raise InputError(f"device = {device}: {str(error).partition('. ')[0]}") from None
        self.model, self.device, self.cutoff = model, device, model.encoder.config.cutoff_upper
        if compile:
            self.model.compile_derivative(torch.device(device))
        self.listed = None  # z, pos when the list was made, pairs within cutoff + SKIN

    def pairs(self, z, pos):
        """edge_index (2, P) within the cutoff, from the list of those within cutoff + SKIN while that holds.

        Compiled code takes the whole list, which seldom changes its shape; pairs beyond the cutoff have no weight.
        """
        moved = self.listed is None or not torch.equal(self.listed[0], z)
        if moved or (pos - self.listed[1]).square().sum(1).max() > (SKIN / 2) ** 2:
            edge_index = radius_graph(pos, torch.zeros_like(z), self.cutoff + SKIN, multiple=self.model.multiple)
            self.listed = z, pos, edge_index
        j, i = near = self.listed[2]
        return near if self.model.compiled else near[:, (pos[i] - pos[j]).square().sum(1) < self.cutoff**2]

    def calculate(self, atoms=None, properties=("energy", "forces"), system_changes=ase.all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise InputError("a periodic system: this calculator knows isolated molecules only")
        if cause := flaw(self.atoms.numbers, self.atoms.positions, {}):
            raise InputError(f"the molecule has {cause}")
        z = torch.as_tensor(self.atoms.numbers, device=self.device).long()
        pos = torch.as_tensor(self.atoms.positions, device=self.device)
        energy, forces = predict_molecule(self.model, self.about, z, pos, self.pairs(z, pos))
        self.results = {"energy": energy, "forces": forces}


def constant_energy(atoms, ps, temperature, timestep=0.5, seed=1):
    """Relax, heat to temperature (K), run at constant energy in timesteps (fs): -> ps, total energies (eV), K."""
    units, optimize = need("ase.units", "dynamics"), need("ase.optimize", "dynamics")
    verlet = need("ase.md.verlet", "dynamics")
    optimize.FIRE(atoms, logfile=None).run(fmax=0.05, steps=500)
    # momenta of twice the temperature, of which half becomes potential energy; none of the molecule as a whole
    masses = atoms.get_masses()[:, None]
    momenta = np.random.default_rng(seed).standard_normal((len(atoms), 3)) * np.sqrt(
        masses * units.kB * 2 * temperature
    )
    atoms.set_momenta(momenta - masses * momenta.sum(0) / masses.sum())
    dynamics = verlet.VelocityVerlet(atoms, timestep * units.fs)
    record = []
    for step in range(round(1000 * ps / timestep) + 1):
        if step:
            dynamics.run(1)
        record.append((step * timestep / 1000, atoms.get_total_energy(), atoms.get_temperature()))
    return np.array(record).T


def main(arguments):
    checkpoint, start, out, *options = arguments
    settings = {"ps": 2.0, "temperature": 300.0}
    for option in options:
        key, _, value = option.partition("=")
        try:
            if key not in settings:
                raise ValueError
            settings[key] = float(value)
        except ValueError:
            raise InputError(f"argument {option!r}: ps=2 or temperature=300", code=2) from None
    if not (0.001 <= settings["ps"] <= 1e6 and 0 <= settings["temperature"] <= 1e5):
        raise InputError("ps must be from 0.001 to 1e6, and temperature from 0 to 1e5", code=2)
    check_out(Path(out), ".png", ".svg")
    check_file(start, "give an xyz of the molecule")
    plt = need("matplotlib.pyplot", "drawing")
    tune_cpu()
    with readable(Path(start)):
        first = next(read_xyz(Path(start), labelled=False), None)
    if first is None or "skip" in first:
        raise InputError(f"{start}: {first['skip'] if first else 'no molecules inside'}")
    atoms = need("ase", "dynamics").Atoms(first["z"], first["pos"])
    atoms.calc = GeoReconCalculator(checkpoint)
    began = time.perf_counter()
    times, energies, temperatures = constant_energy(atoms, **settings)
    per_atom = 1000 * (energies - energies[0]) / len(atoms)  # meV
    drift, offset = np.polyfit(times, per_atom, 1)
    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6, 4.5), layout="constrained")
    top.plot(times, per_atom, color="black", lw=0.7)
    top.plot(times, drift * times + offset, "--", color="tab:red", lw=1)
    top.set(ylabel="total energy, meV/atom", title=f"drift {drift:.4f} meV per atom and ps")
    bottom.plot(times, temperatures, color="black", lw=0.7)
    bottom.set(xlabel="time, ps", ylabel="temperature, K")
    write_atomically(Path(out), lambda path: figure.savefig(path, dpi=120, format=Path(out).suffix[1:]))
    print(f"drift {drift:.5f} meV per atom and ps, fluctuation {per_atom.std():.5f} meV per atom (rms)")
    print(
        f"mean temperature {temperatures.mean():.0f} K, {len(times) - 1:,} steps in {time.perf_counter() - began:.0f} s"
    )


if __name__ == "__main__":
    cli(main, __doc__, needed=3)
