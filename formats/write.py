"""Molecules -> one HDF5 file, whole or not at all; what to know of a file."""

import os
import shlex
import tempfile
from array import array
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from formats.schema import SCHEMA, flaw, pairs, read_contents
from formats.sources import HAR2EV, SOURCES, SYMBOLS, credit, parse_labels, read_source, stem, with_labels
from harness.errors import InputError
from harness.files import check_file, check_new, sha256

HARTREE = {"hartree": 1.0, "eV": HAR2EV, "kcal/mol": 627.5095, "kJ/mol": 2625.5}
DTYPES = {"z": "uint8", "pos": "float32", "forces": "float32", "id": "int64", "ptr": "int64"}


def as_stored(mol):
    """A molecule with the file's types, or {id, skip: why not}; too large for float32 is inf, a flaw."""
    if "skip" in mol:
        return mol
    with np.errstate(over="ignore"):
        labels = {k: np.asarray(v, "float32") if k == "forces" else v for k, v in mol["labels"].items()}
        mol = mol | {"pos": np.asarray(mol["pos"], "float32"), "labels": labels}
    why = flaw(mol["z"], mol["pos"], labels) if abs(mol["id"]) < 2**63 else "an id beyond 64 bits"
    return {"id": mol["id"], "skip": why} if why else mol


class Columns:
    """Collects the datasets of a file, each in a file of its own, so that memory does not grow."""

    def __init__(self, folder, stack):
        self.folder, self.stack, self.parts, self.splits, self.labels = folder, stack, {}, {}, None
        self.num_molecules = self.num_atoms = 0
        self.geometries = array("q")  # of each molecule a hash of its elements and positions
        self.sizes = array("d")  # of each energy: its ratio to sum Z^2.4 / 2, which all electrons have in hartree
        self.nearest = np.inf  # Å, of the atoms of the first molecules
        self.add(ptr=0)

    def add(self, **values):
        """Write values (n, ...) to the ends of datasets, by name."""
        for name, value in values.items():
            if name not in self.parts:
                part = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115
                self.parts[name] = self.stack.enter_context(part)
            self.parts[name].write(np.asarray(value, DTYPES.get(name, "float64")).tobytes())

    def append(self, mol, source):
        """Take a molecule; all must have the labels of the first."""
        names = sorted(mol["labels"])
        self.labels = names if self.labels is None else self.labels
        if names != self.labels:
            have, before = (" and ".join(some) or "no labels" for some in (names, self.labels))
            which = f"molecule {mol['id']} of {' '.join(mol.get('split', ())) or source}"
            raise InputError(f"{which} has {have}, those before it {before}: convert them apart")
        for name in mol.get("split", ()):
            self.splits.setdefault(name, array("q")).append(self.num_molecules)
        self.geometries.append(hash((np.uint8(mol["z"]).tobytes(), mol["pos"].tobytes())))
        if "energy" in names:
            self.sizes.append(-2 * mol["labels"]["energy"] / (mol["z"].astype(float) ** 2.4).sum())
        if len(mol["z"]) > 1 and self.num_molecules < 100:
            i, j = pairs(np.zeros(len(mol["z"])))
            self.nearest = min(self.nearest, np.linalg.norm(mol["pos"][i] - mol["pos"][j], axis=1).min())
        self.num_molecules += 1
        self.num_atoms += len(mol["z"])
        self.add(id=mol["id"], ptr=self.num_atoms, z=mol["z"], pos=mol["pos"], **mol["labels"])

    def suspicions(self, unit):
        """{note: count} of likely mistakes; unit: of the energies."""
        size = np.array(self.sizes or [0.0]) / 1.025  # Thomas-Fermi's energy, which is 2.5 % off
        low, middle, high = np.quantile(size, (0.25, 0.5, 0.75))
        far = (np.abs(size - middle) > 100 * (high - low)) & (high > low)
        found = {"an energy far from all others: a placeholder?": far.sum()}
        for other in HARTREE if unit in HARTREE else ():
            if other != unit and 0.95 < middle / HARTREE[other] < 1.05:
                found[f"an energy like that of all electrons in {other}: is it in {unit}?"] = len(size)
        bohr = 1.2 < self.nearest < np.inf  # a bond with hydrogen is shorter
        return found | {"no two atoms closer than 1.2 Å: are these bohr?": bohr * min(100, self.num_molecules)}

    def assemble(self, path, attrs, units, rows=1 << 20):
        """Write the file, a million rows at a time."""
        with h5py.File(path, "w") as file:
            file.attrs.update({"schema": SCHEMA, "length_unit": "angstrom"} | attrs)
            for name, part in self.parts.items():
                dtype = np.dtype((DTYPES.get(name, "float64"), (3,) * (name in ("pos", "forces"))))  # of a row
                num = part.tell() // dtype.itemsize
                dataset = file.create_dataset(name, (num, *dtype.shape), dtype.base)
                part.seek(0)
                for start in range(0, num, rows):
                    dataset[start : start + rows] = np.frombuffer(part.read(rows * dtype.itemsize), dtype)
            for name, values in self.splits.items():
                file[f"split/{name}"] = np.asarray(values, dtype="int64")
            for name in self.labels:
                file[name].attrs["unit"] = units[name]


def write_h5(out, molecules, attrs, units, splits_of=None):
    """Stream molecules into a new file of the schema -> molecules, atoms, {cause: (count, first ids)}, {note: count}.

    splits_of(number of molecules) -> {name: indices} gives the file splits that its source does not bring along.
    """
    skipped, notes = {}, Counter()
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder, ExitStack() as stack:
        columns = Columns(folder, stack)
        for mol in map(as_stored, molecules):
            if cause := mol.get("skip"):
                count, first = skipped.get(cause, (0, []))
                skipped[cause] = count + 1, first + [mol["id"]] if count < 5 else first
            else:
                columns.append(mol, attrs["source"])
                notes.update(mol.get("notes", ()))
                notes.update(f"{k[2:]} unknown" for k, v in mol["labels"].items() if k[:2] == "y/" and np.isnan(v))
        if columns.num_molecules == 0:
            why = "; ".join(f"{cause}: {count}" for cause, (count, _) in skipped.items()) or "the source is empty"
            raise InputError(f"{attrs['source']}: no molecule that can be used ({why})")
        columns.splits |= splits_of(columns.num_molecules) if splits_of else {}
        columns.assemble(f"{folder}/out.h5", attrs, units)
        os.replace(f"{folder}/out.h5", out)
    notes |= columns.suspicions(units.get("energy"))
    if again := columns.num_molecules - len(np.unique(columns.geometries)):
        notes["the same elements and positions as one before: splits may part them"] = again
    return columns.num_molecules, columns.num_atoms, skipped, notes


def save(out, molecules, attrs, units, splits_of=None):
    """write_h5 with a progress bar on a terminal, and a report of what was written and skipped."""
    check_new(out, kinds=(".h5",))
    try:
        stream = tqdm(molecules, unit=" molecules", disable=None)
        written, atoms, skipped, notes = write_h5(out, stream, attrs, units, splits_of)
    except OSError as error:  # reading has its own errors by now
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    print(f"{out}: {written:,} molecules, {atoms:,} atoms, {out.stat().st_size / 1e6:.1f} MB")
    labels = read_contents(out).units
    print("  labels: " + (", ".join(f"{name} [{unit}]" for name, unit in labels.items()) or "none, geometries only"))
    for note, count in sorted(notes.items()):
        print(f"  {note} ({count:,} molecules)")
    print(f"  skipped {sum(count for count, _ in skipped.values()):,}")
    for cause, (count, first) in sorted(skipped.items()):
        print(f"    {count:,}: {cause} (id {', '.join(map(str, first))}{', ...' if count > len(first) else ''})")


def made_of(paths, *command):
    """Attributes: of what a file is made, and how."""
    if len({stem(path) for path in paths}) < len(paths):
        raise InputError("two files have the same name, which names the split: rename one", code=2)
    sources = {"source": "\n".join(path.name for path in paths), "source_sha256": "\n".join(map(sha256, paths))}
    return sources | {"command": shlex.join(["python", "data.py", *command])}


def convert(source, raws, out, splits_of=None, labels=""):
    """python data.py SOURCE RAW [RAW ...] OUT.h5 [labels=NAME:UNIT,...]"""
    raws, out, asked = [Path(raw) for raw in raws], Path(out), parse_labels(labels)
    check_new(out, kinds=(".h5",))
    for raw in raws:
        check_file(raw, "the file to write is the last one" if raw.suffix == ".h5" else "download it first")
    if source == "pcqm4mv2" and len(raws) > 1:
        raise InputError(f"pcqm4mv2 takes one raw file, got {len(raws)}", code=2)
    attrs = credit(source, raws) | made_of(raws, source, *(raw.name for raw in raws), out.name, *labels.splitlines())
    units = SOURCES[source][1] | {dataset: unit for dataset, (_, unit) in asked.items()}
    molecules = with_labels(read_source(source, raws), asked)
    save(out, molecules, attrs, units, splits_of if source == "qm9" else None)


def info(m):
    """python data.py info FILE.h5: m is its Molecules."""
    elements, square, largest, wrong = np.zeros(119, dtype=np.int64), 0.0, 0.0, []
    for start in range(0, len(m), m.at_once):  # read refuses positions and elements that cannot be
        part = m.read(range(start, min(start + m.at_once, len(m))), forces="forces" in m.units)
        elements += np.bincount(part["z"], minlength=119)
        if "forces" in m.units:
            square += part["forces"].double().square().sum().item()
            largest = np.maximum(largest, part["forces"].abs().max().item())  # keeps a nan
    atoms, size = np.diff(m.ptr), f"{len(m):,} molecules, {m.ptr[-1]:,} atoms, {os.path.getsize(m.path) / 1e6:.1f} MB"
    lines = [("name", m.name), ("size", size)]
    lines += [("atoms", f"{atoms.min()} to {atoms.max()} per molecule, mean {atoms.mean():.1f}")]
    lines += [("elements", ", ".join(f"{SYMBOLS.split()[z]} {elements[z]:,}" for z in np.flatnonzero(elements)))]
    lines += [("splits", ", ".join(f"{name} {len(index):,}" for name, index in m.splits.items()) or "none")]
    for key in ("source", "source_sha256", "command", "license", "attribution"):
        lines += [(key, line) for line in str(m.attrs.get(key, "not stated")).split("\n")]
    head = f"{'unit':17} {'mean':>15} {'std':>12} {'min':>15} {'max':>15}"
    lines += [("sha256", sha256(m.path)), ("", ""), ("label", head if m.units else "none")]
    for name, unit in m.units.items():
        if name == "forces":
            stats = f"{'':15} {(square / m.ptr[-1] / 3) ** 0.5:12.6g} {'':15} {largest:15.9g}  (rms, largest component)"
        else:
            v = m.label(name)
            unknown = np.isnan(v) & (name != "energy")
            wrong += [] if np.isfinite(v[~unknown]).all() else [name]
            v = v if unknown.all() else v[~unknown]
            stats = f"{v.mean():15.9g} {v.std():12.6g} {v.min():15.9g} {v.max():15.9g}"
            stats += f"  ({unknown.sum():,} unknown)" if unknown.any() else ""
        lines += [(name, f"{unit:17} {stats}")]
    print("\n".join(f"{key:14} {text}".rstrip() for key, text in lines))
    if wrong:
        raise InputError(f"{m.path}: {', '.join(wrong)} is not finite everywhere: convert it again with data.py")
