"""What a fine-tuned model says of your molecules: energies and forces, or a property.

    python -m tools.predict out/demo_forces/best.pt IN.xyz OUT.xyz
    python -m tools.predict best.pt IN.sdf OUT.xyz       also IN.csv with SMILES; RDKit embeds them

OUT.xyz is extended xyz: energies in eV and forces in eV/angstrom, or the property beside its unit.
From an SDF or a csv a molecule keeps its id, the row or the place, and `given_<property>`.
"""

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from finetune import load_property_model
from formats.schema import flaw
from formats.sources import read_sdf, read_xyz, readable
from harness.errors import InputError, cli, explain, need
from harness.files import check_file, check_new, write_whole
from harness.ranks import tune_cpu

IN_EV = {"eV": 1.0, "kcal/mol": 0.0433641153}
TAKEN = {"id", "unit", "predicted_unit", "pbc", "Lattice", "Properties"}  # by extended xyz
TAKEN |= {"stress", "virial", "free_energy", "dipole", "magmom", "dielectric_tensor"}


def untrained(about, z):
    """Why a model must say nothing of the elements z (n,): it was trained on none such; else ""."""
    strange = set(z.tolist()) - set(about["elements"])
    return f"the model was trained on no molecule with element {min(strange)}" if strange else ""


def offset(about, z):
    """A remark on the elements z (n,), if their references could not be fitted to such a composition; else ""."""
    if not (span := np.array(about.get("span", []))).size:  # (r, max_z)
        return ""
    counts = np.bincount(z.tolist(), minlength=span.shape[1])
    inside = np.abs(counts - counts @ span.T @ span).max() < 1e-3
    return "" if inside else "an unknown constant is in its energy: training had no such composition"


def predict_molecule(model, about, z, pos):
    """One molecule, z (n,) and pos (n, 3) on the model's device -> value, forces (n, 3) or None.

    An energy is in eV and forces in eV/angstrom, float64; any other property is in its unit,
    several are a list. InputError: an element that the model was not trained on.
    """
    if why := untrained(about, z):
        raise InputError(why)
    forces, batch = about["target"] == "energy_forces", torch.zeros_like(z)
    centred = (pos - pos.mean(0)).to(next(model.parameters()).dtype)
    with explain("the radius graph", ValueError):
        y, f = model(z, centred, batch, 1, forces)
    value = model.restore(y, z, batch)[0].tolist()
    if about["name"] != "energy":
        return value, None
    scale = IN_EV[about["unit"]]
    return value * scale, (f.double() * model.std).cpu().numpy() * scale if forces else None


def read_molecules(source):
    """Molecules {id, z, pos, tags} of an xyz, an SDF or a csv of SMILES; refuses a broken one."""
    check_file(source, "give an extended xyz, an SDF or a csv")
    from beyond.molnet import read_smiles  # here, since nothing else of this file needs it

    readers = {".sdf": read_sdf, ".csv": read_smiles, ".tsv": read_smiles}
    read = readers.get(Path(re.sub(r"\.(gz|bz2|xz)$", "", source.lower())).suffix, read_xyz)
    with readable(source):
        molecules = list(read(Path(source)))
    for mol in molecules:
        if cause := mol.get("skip") or flaw(mol["z"], mol["pos"], {}):
            verb = "is" if "skip" in mol else "has"
            raise InputError(f"{source}: molecule {mol['id']} {verb} {cause}")
    if not molecules:
        raise InputError(f"{source}: no molecules inside")
    notes = Counter(note for mol in molecules for note in mol.get("notes", ()) if "not read" not in note)
    for note, number in notes.items():
        print(f"  {note} ({number} molecules)")
    return molecules


def predict(checkpoint, source, out):
    """Read the molecules of source, predict each, write them with what was predicted to out."""
    ase, ase_io = need("ase", "writing xyz"), need("ase.io", "writing xyz")
    single_point = need("ase.calculators.singlepoint", "writing xyz")
    model, about = load_property_model(checkpoint)
    check_new(out, kinds=(".xyz", ".extxyz"))
    if about["name"] == "energy" and about["unit"] not in IN_EV:
        raise InputError(f"{checkpoint}: energies in {about['unit']}; known are {', '.join(IN_EV)}")
    molecules = read_molecules(source)
    keys = {name: name for name in about["name"].split(",")}
    unfit = [name for name in keys if name in TAKEN or re.search(r"[^\w .()/-]", name)]
    keys |= {name: f"predicted{place or ''}" for place, name in enumerate(unfit)}
    written = []
    for mol in molecules:
        where = f"{source}: molecule {mol['id']}"
        if why := untrained(about, mol["z"]):
            print(f"  left out: {where}: {why}")
            continue
        z, pos = torch.from_numpy(mol["z"]).long(), torch.from_numpy(mol["pos"])
        if remark := offset(about, mol["z"]):
            print(f"  {where}: {remark}")
        with explain(where, InputError):
            value, forces = predict_molecule(model, about, z, pos)
        known = {name: tag for name, tag in mol.get("tags", {}).items() if name in keys}
        atoms = mol.get("atoms") or ase.Atoms(mol["z"], mol["pos"], info={"id": mol["id"]} | known)
        for name in [name for name in keys if name in atoms.info]:
            atoms.info[f"given_{keys[name]}"] = atoms.info.pop(name)
        for name, given in (atoms.calc.results if atoms.calc else {}).items():
            (atoms.arrays if np.ndim(given) == 2 else atoms.info)[f"given_{name}"] = given
        atoms.calc = None
        if about["name"] != "energy":
            units = zip(keys.values(), about["unit"].split(","), strict=True)
            unit = about["unit"] if len(keys) == 1 else ", ".join(f"{key} {unit}" for key, unit in units)
            values = np.atleast_1d(value).tolist()
            atoms.info |= dict(zip(keys.values(), values, strict=True)) | {"predicted_unit": unit}
        else:
            atoms.calc = single_point.SinglePointCalculator(atoms, energy=value, forces=forces)  # None: left out
        written.append(atoms)
    if not written:
        raise InputError(f"{source}: no molecule is left: {why}")
    write_whole(Path(out), lambda path: ase_io.write(str(path), written, format="extxyz"))
    kind = f"{about['name']} and forces" if about["target"] == "energy_forces" else about["name"]
    print(f"{out}: {kind} of {len(written)} molecules")


def main(arguments):
    if len(arguments) != 3:
        raise InputError("usage: python -m tools.predict best.pt IN.xyz OUT.xyz (or IN.sdf, IN.csv)", code=2)
    tune_cpu()
    predict(*arguments)


if __name__ == "__main__":
    cli(main, __doc__, needed=3)
