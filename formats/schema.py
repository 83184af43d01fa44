"""The HDF5 schema georecon/1, and what a molecule must be to be trained on.

A atoms and M molecules, all end to end. Root attributes: schema, name, source, source_sha256, length_unit, command
and, where known, license and attribution.

    z             uint8 (A,)       atomic numbers
    pos           float32 (A, 3)   Å
    ptr           int64 (M+1,)     molecule m is atoms ptr[m]:ptr[m+1]
    id            int64 (M,)       the source's own index
    energy        float64 (M,)     attribute unit
    forces        float32 (A, 3)   attribute unit; -dE/dpos
    y/<name>      float64 (M,)     attribute unit; one per property; NaN: unknown
    split/<name>  int64 (n,)       molecules of a split that the source brings along; all of QM9: train, val, test
    rotor/...                      rotatable bonds, where `python data.py rotors` added them: beyond/rotors.py
"""

import os
from typing import NamedTuple

import h5py
import numpy as np

from harness.errors import FOREIGN, InputError, explain

SCHEMA = "georecon/1"
# Every bond is longer (H-H 0.74 Å), even in hot molecular dynamics. Two atoms this close mean a broken file.
MIN_DISTANCE = 0.5  # Å
MAX_COORDINATE = 1e5  # Å; beyond it float32 does not hold a bond to a hundredth


class Contents(NamedTuple):
    """What is known of a file once it is held against the schema."""

    ptr: np.ndarray  # (M+1,) int64
    units: dict  # {label: unit}
    splits: dict  # {name: (n,) int64}
    attrs: dict  # root attributes
    places: dict  # {dataset: offset in the file}; None: chunked, compressed or shifted, to be read through h5py


def texts(item):
    """Attributes of a file or dataset that are strings; on other types in a damaged file HDF5 itself may crash."""
    is_text = {name: isinstance(item.attrs.get_id(name).get_type(), h5py.h5t.TypeStringID) for name in item.attrs}
    return {name: item.attrs[name] for name in item.attrs if is_text[name]}


def read_contents(path):
    """Check every dataset of a file against the schema -> Contents. An InputError names what does not fit."""
    with explain(f"{path}: not a whole HDF5 file, convert it again", *FOREIGN), h5py.File(path, "r") as file:
        attrs = texts(file)
        for key, wanted in (("schema", SCHEMA), ("length_unit", "angstrom")):
            if (found := str(attrs.get(key))) != wanted:
                raise InputError(f"{path}: attribute {key} is {found}, not {wanted}: convert with data.py")
        ptr = open_dataset(file, "ptr", "int64", (None,))[:]
        num_molecules = len(ptr) - 1
        if num_molecules < 1 or ptr[0] != 0 or (ptr[1:] <= ptr[:-1]).any():
            raise InputError(f"{path}: ptr must start at 0 and rise with every molecule: convert it again")
        units, places = read_units(file, num_molecules, int(ptr[-1]))
        splits = {name: open_dataset(file, f"split/{name}", "int64", (None,))[:] for name in file.get("split", ())}
    energy, forces = units.get("energy"), units.get("forces")
    if energy and forces and forces != f"{energy}/angstrom":
        raise InputError(f"{path}: energy is in {energy}, forces in {forces}: they must be its derivative")
    for name, index in splits.items():
        if len(index) == 0 or index.min() < 0 or index.max() >= num_molecules or len(np.unique(index)) < len(index):
            raise InputError(f"{path}: split/{name} is empty, or names molecules twice or that are not there")
    return Contents(ptr, units, splits, attrs, places)


def read_units(file, num_molecules, num_atoms):
    """-> {label: unit}, {dataset: its place in the file} of all datasets of atoms and labels."""
    expected = {"z": ("uint8", (num_atoms,)), "pos": ("float32", (num_atoms, 3)), "id": ("int64", (num_molecules,))}
    labels = {"energy": ("float64", (num_molecules,)), "forces": ("float32", (num_atoms, 3))}
    expected |= {name: like for name, like in labels.items() if name in file}
    properties = file.get("y", ())
    if taken := {"energy", "forces"} & set(properties):
        raise InputError(f"{file.filename}: dataset y/{min(taken)} has the name of the one without y/: rename it")
    expected |= {f"y/{name}": ("float64", (num_molecules,)) for name in properties}
    units, places = {}, {}
    for name, (dtype, shape) in expected.items():
        dataset = open_dataset(file, name, dtype, shape)
        if name not in ("z", "pos", "id"):
            unit = texts(dataset).get("unit")
            if not isinstance(unit, str) or not unit:
                raise InputError(f"{file.filename}: dataset {name} has no attribute unit: convert it again")
            units[name.removeprefix("y/")] = unit
        plain = dataset.chunks is None and not dataset.external and file.userblock_size == 0
        places[name] = dataset.id.get_offset() if plain and hasattr(os, "pread") else None
    return units, places


def open_dataset(file, name, dtype, shape):
    """A dataset of this file, of that type and shape, where None stands for any length."""
    path, dataset = file.filename, file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise InputError(f"{path}: dataset {name} is missing: convert it again with data.py")
    if dataset.file.filename != path or dataset.is_virtual:
        raise InputError(f"{path}: dataset {name} lies in another file: copy it into this one")
    fits = len(shape) == dataset.ndim and all(n in (None, m) for n, m in zip(shape, dataset.shape))
    if dataset.dtype != np.dtype(dtype) or not fits:
        wanted = f"{dtype} {str(shape).replace('None', 'n')}"
        raise InputError(f"{path}: dataset {name} is {dataset.dtype} {dataset.shape}, expected {wanted}")
    return dataset


# ---------------------------------------------------------------- a molecule


def pairs(batch):
    """All pairs of atoms of one molecule, batch (N,) sorted: i (P,), j (P,) with i < j."""
    atom = np.arange(len(batch))
    num_later = np.searchsorted(batch, batch, side="right") - 1 - atom  # (N,) atoms after i in its molecule
    i = np.repeat(atom, num_later)
    j = np.arange(len(i)) - np.repeat(np.cumsum(num_later) - num_later, num_later) + i + 1
    return i, j


def first_flaw(z, pos, batch, **labels):
    """-> the first molecule that must not be trained on and why, or None.

    z (N,) int, pos (N, 3) float32 Å, batch (N,) sorted, labels (N, ...) of the atoms.
    """
    bad_atoms = {
        "an element that does not exist": (z < 1) | (z > 118),
        f"a coordinate that is not finite, or beyond {MAX_COORDINATE:.0f} Å": ~(np.abs(pos) < MAX_COORDINATE).all(1),
        **{f"{name} that are not finite": ~np.isfinite(value).all(1) for name, value in labels.items()},
    }
    for why, bad in bad_atoms.items():
        if bad.any():
            return int(batch[bad.argmax()]), why
    i, j = pairs(batch)
    close = np.linalg.norm(pos[i] - pos[j], axis=1) < MIN_DISTANCE  # (P,)
    return (int(batch[i[close.argmax()]]), f"two atoms closer than {MIN_DISTANCE} Å") if close.any() else None


def flaw(z, pos, labels):
    """Why a molecule must not be trained on, or "": z (n,) int, pos (n, 3) float32 Å, labels {dataset: value}."""
    if len(z) == 0:
        return "no atoms"
    if pos.shape != (len(z), 3) or labels.get("forces", pos).shape != pos.shape:
        return "numbers of elements, coordinates and forces that differ"
    if found := first_flaw(z, pos, np.zeros(len(z), dtype=np.int64)):
        return found[1]
    known = (v for name, v in labels.items() if not (name.startswith("y/") and np.isnan(v)))
    return "" if all(np.isfinite(v).all() for v in known) else "a label that is not finite"
