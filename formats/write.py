"""Molecules -> one HDF5 file, whole or not at all; a random sample of a file; what to know of a file."""

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
from formats.sources import EV, SOURCES, SYMBOLS, credit, parse_labels, read_source, stem, with_labels
from harness.errors import InputError
from harness.files import check_file, check_new, sha256

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
        self.num_molecules += 1
        self.num_atoms += len(mol["z"])
        self.add(id=mol["id"], ptr=self.num_atoms, z=mol["z"], pos=mol["pos"], **mol["labels"])

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


def convert(source, raws, out, splits_of=None, labels=""):
    """python data.py SOURCE RAW [RAW ...] OUT.h5 [labels=NAME:UNIT,...]"""
    raws, out, asked = [Path(raw) for raw in raws], Path(out), parse_labels(labels)
    check_new(out, kinds=(".h5",))
    for raw in raws:
        check_file(raw, "the file to write is the last one" if raw.suffix == ".h5" else "download it first")
    if source == "pcqm4mv2" and len(raws) > 1:
        raise InputError(f"pcqm4mv2 takes one raw file, got {len(raws)}", code=2)
    if source != "qm9" and len({stem(raw) for raw in raws}) < len(raws):
        raise InputError("two raw files have the same name, which names their split: rename one", code=2)
    names = [raw.name for raw in raws]
    attrs = credit(source, raws) | {"source": "\n".join(names)}
    attrs["source_sha256"] = "\n".join(map(sha256, raws))
    attrs["command"] = shlex.join(["python", "data.py", source, *names, out.name, *labels.splitlines()])
    units = SOURCES[source][1] | {dataset: unit for dataset, (_, unit) in asked.items()}
    molecules = with_labels(read_source(source, raws), asked)
    save(out, molecules, attrs, units, splits_of if source == "qm9" else None)


def sample(molecules, out, num, seed):
    """python data.py sample FILE.h5 OUT.h5 num=2000 seed=1: molecules drawn without replacement, in the file's order"""
    if not 1 <= num <= len(molecules):
        raise InputError(f"num={num}: {molecules.path} has {len(molecules)} molecules", code=2)
    index = np.sort(np.random.default_rng(seed).permutation(len(molecules))[:num])
    units = {name if name in EV else f"y/{name}": unit for name, unit in molecules.units.items()}
    columns = {k: molecules.label(k.removeprefix("y/"))[index] for k in units if k != "forces"}
    splits = {name: np.isin(index, members) for name, members in molecules.splits.items()}
    forces, ids = "forces" in molecules.units, molecules.ids

    def stream():
        for k, m in enumerate(index):
            atoms = molecules.read([m], forces=forces)
            labels = {name: column[k] for name, column in columns.items()}
            labels |= {"forces": atoms["forces"].numpy()} if forces else {}
            split = [name for name, inside in splits.items() if inside[k]]
            yield {"id": ids[m], "z": atoms["z"].numpy(), "pos": atoms["pos"].numpy(), "labels": labels, "split": split}

    attrs = molecules.attrs | {"name": f"{molecules.name}, {num} of {len(molecules)} molecules, seed {seed}"}
    command = f"python data.py sample {Path(molecules.path).name} {Path(out).name} num={num} seed={seed}"
    attrs["command"] = f"{molecules.attrs.get('command', '')}\n{command}".strip()
    save(Path(out), stream(), attrs, units)


def info(m, chunk=10_000):
    """python data.py info FILE.h5: m is its Molecules."""
    elements, square, largest = np.zeros(119, dtype=np.int64), 0.0, 0.0
    near, nearest, closest, wrong = 0, np.inf, None, []
    for start in range(0, len(m), chunk):  # read refuses positions and elements that cannot be
        part = m.read(range(start, min(start + chunk, len(m))), forces="forces" in m.units)
        elements += np.bincount(part["z"], minlength=119)
        i, j = pairs(part["batch"].numpy())
        apart = (part["pos"][i] - part["pos"][j]).norm(dim=1).numpy()  # (P,)
        near += (apart < 5).sum()
        if len(apart) and apart.min() < nearest:
            nearest, closest = apart.min(), start + int(part["batch"][i[apart.argmin()]])
        if "forces" in m.units:
            square += part["forces"].double().square().sum().item()
            largest = np.maximum(largest, part["forces"].abs().max().item())  # keeps a nan
    atoms, size = np.diff(m.ptr), f"{len(m):,} molecules, {m.ptr[-1]:,} atoms, {os.path.getsize(m.path) / 1e6:.1f} MB"
    lines = [("name", m.name), ("size", size)]
    lines += [("atoms", f"{atoms.min()} to {atoms.max()} per molecule, mean {atoms.mean():.1f}")]
    lines += [("elements", ", ".join(f"{SYMBOLS.split()[z]} {elements[z]:,}" for z in np.flatnonzero(elements)))]
    lines += [("pairs", f"{near / len(m):.1f} per molecule within 5 Å")]
    far = " (far: are these bohr?)" * bool(nearest > 1.2)  # a bond with hydrogen is shorter
    lines += [("closest atoms", f"{nearest:.3f} Å in molecule {closest}{far}")] if closest is not None else []
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
