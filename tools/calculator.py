"""An ASE calculator over a fine-tuned checkpoint, in eV and eV/angstrom."""

import warnings

import torch

from finetune import load_property_model
from formats.schema import flaw
from harness.errors import InputError, explain, need
from tools.predict import IN_EV, offset, predict_molecule

ase = need("ase.calculators.calculator", "the calculator")


class GeoReconCalculator(ase.Calculator):
    """Energy (eV) and forces (eV/angstrom) of one molecule without periodic images.

    InputError: the checkpoint predicts something else. compile=True: by torch.compile, a minute or
    more at the first call, then about twice as fast on one CPU core.
    """

    implemented_properties = ("energy", "free_energy", "forces")

    def __init__(self, checkpoint, device="cpu", compile=False):
        super().__init__()
        with explain(f"device = {device}", RuntimeError, AssertionError):  # unknown or not there
            model, self.about = load_property_model(checkpoint, device)
        if self.about["target"] != "energy_forces" or self.about["unit"] not in IN_EV:
            predicted = f"{checkpoint} predicts {self.about['target']} in {self.about['unit']}"
            raise InputError(f"{predicted}, not energies and forces in {' or '.join(IN_EV)}")
        self.model, self.device = model, device
        if compile:
            self.model.compile_derivative(torch.device(device))

    def calculate(self, atoms=None, properties=("energy",), system_changes=ase.all_changes):
        super().calculate(atoms, properties, system_changes)
        if self.atoms.pbc.any():
            raise InputError("a periodic system: this calculator knows isolated molecules only")
        if cause := flaw(self.atoms.numbers, self.atoms.positions, {}):
            raise InputError(f"the molecule has {cause}")
        z = torch.as_tensor(self.atoms.numbers, device=self.device).long()
        pos = torch.as_tensor(self.atoms.positions, device=self.device)
        energy, forces = predict_molecule(self.model, self.about, z, pos)
        if "numbers" in system_changes and (remark := offset(self.about, self.atoms.numbers)):
            warnings.warn(f"{self.atoms.symbols}: {remark}", stacklevel=2)
        self.results = {"energy": energy, "free_energy": energy, "forces": forces}
