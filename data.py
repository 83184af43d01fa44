"""Molecules: raw files -> one HDF5 schema -> splits -> batches that are a function of (seed, step).

    python data.py SOURCE RAW [RAW ...] OUT.h5        SOURCE: qm9 pcqm4mv2 sdf md17 rmd17 md22 xyz
    python data.py info FILE.h5                       what to know of a file before training on it
    python data.py sample FILE.h5 OUT.h5 num=2000 seed=1

    qm9       qm9pack-1.0.3-py3-none-any.whl | dsgdb9nsd.xyz.tar.bz2 | gdb9.sdf gdb9.sdf.csv  [+ uncharacterized.txt]
    pcqm4mv2  pcqm4m-v2-train.sdf.tar.gz | pcqm4m-v2_xyz.zip
    md17 md22 rmd17   *.npz          sdf   *.sdf[.gz] (rdkit)          xyz   *.xyz, extended (ase)
Several RAW (not qm9, pcqm4mv2): the stem of each file becomes a named split.

Schema georecon/1. A atoms and M molecules, all end to end; root attrs schema, name, source, source_sha256,
length_unit, command and, where known, license and attribution:

    z             uint8 (A,)       atomic numbers
    pos           float32 (A, 3)   Å
    ptr           int64 (M+1,)     molecule m is atoms ptr[m]:ptr[m+1]
    id            int64 (M,)       the source's own index
    energy        float64 (M,)     attr unit
    forces        float32 (A, 3)   attr unit; -dE/dpos
    y/<name>      float64 (M,)     attr unit; one per property
    split/<name>  int64 (n,)       molecules of a split that the source brings along; all of QM9: train, val, test

Datasets are contiguous and uncompressed, so a batch is a few reads at known offsets of the file.
"""

import bz2
import csv
import ctypes
import gzip
import hashlib
import importlib
import io
import itertools
import lzma
import os
import re
import signal
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from array import array
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

SCHEMA = "georecon/1"
HAR2EV = 27.211386246  # eV per Hartree
# Below every bond there is (H-H 0.74 Å), also in hot molecular dynamics: two atoms this near are a broken file.
MIN_DISTANCE = 0.5  # Å
MAX_COORDINATE = 1e5  # Å; beyond it float32 does not hold a bond to a hundredth
SYMBOLS = """X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y
Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au
Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"""
ATOMIC_NUMBER = {symbol: z for z, symbol in enumerate(SYMBOLS.split())}
QM9_LABELS = (  # name and unit here, column in qm9pack, column in gdb9.sdf.csv; in the order of the xyz comment line
    ("A", "GHz", "RotA_GHz", "A"),
    ("B", "GHz", "RotB_GHz", "B"),
    ("C", "GHz", "RotC_GHz", "C"),
    ("mu", "D", "Dipole_debye", "mu"),
    ("alpha", "a0^3", "Polarizability_bohr3", "alpha"),
    ("homo", "eV", "HOMO_au", "homo"),
    ("lumo", "eV", "LUMO_au", "lumo"),
    ("gap", "eV", "HOMO_LUMO_gap_au", "gap"),
    ("r2", "a0^2", "R2_bohr2", "r2"),
    ("zpve", "eV", "ZPVE_au", "zpve"),
    ("U0", "eV", "InternalEnergy_0K_au", "u0"),
    ("U", "eV", "InternalEnergy_298K_au", "u298"),
    ("H", "eV", "Enthalphy_298K_au", "h298"),  # sic
    ("G", "eV", "GibbsFreeEnergy_298K_au", "g298"),
    ("Cv", "cal/mol/K", "Heatcapacity_Cv_cal_mol_K", "cv"),
)


# --- errors: a user's mistake is one line, not a traceback ---


class InputError(Exception):
    """A mistake of the user: one line saying what is wrong, where, and what to do; code 1 failure, 2 usage."""

    def __init__(self, message, code=1):
        message = str(message).rpartition("InputError: ")[2]  # a loader process puts its traceback before it
        super().__init__(message.strip().replace("\n", " "))
        self.code = code


def cli(main, usage=None, needed=0):
    """Run main(argv), print an InputError as one line `<script>.py: error: ...` and exit with its code.

    -h prints the usage instead; so do fewer arguments than needed, with exit code 2.
    """
    script = Path(sys.argv[0]).name
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as we live
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        if usage and ((asked := sys.argv[1:2] in (["-h"], ["--help"])) or len(sys.argv) <= needed):
            print(usage.strip(), file=sys.stdout if asked else sys.stderr, flush=True)
            sys.exit(0 if asked else 2)
        main(sys.argv[1:])
        sys.stdout.flush()
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        remedy = "in training accumulate=2 or more cuts a batch into parts, and resume=true goes on"
        print(f"{script}: error: out of memory: take smaller batches; {remedy}", file=sys.stderr)
        sys.exit(1)
    except UnicodeEncodeError as error:
        print(f"{script}: error: {error.object!r} cannot be written as UTF-8: rename that file", file=sys.stderr)
        sys.exit(1)
    except OSError as error:  # the output cannot be written: a full disk, a closed pipe
        where, cause = getattr(error, "filename", None) or "standard output", getattr(error, "strerror", None) or error
        print(f"{script}: error: {where}: {cause}", file=sys.stderr)
        mute()
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        sys.exit(130)


def mute():
    """Whatever is printed from now on is lost, instead of failing again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def check_file(path, remedy):
    """Refuse a file that cannot be opened for reading."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'a folder, not a file' if os.path.isdir(path) else 'no such file'}: {remedy}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it")


def sha256(path):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def coincident(pos, batch):
    """First molecule with two atoms closer than MIN_DISTANCE, or None: pos (N, 3), batch (N,) sorted."""
    later = np.searchsorted(batch, batch, side="right") - 1 - np.arange(len(batch))  # (N,) after i in its molecule
    i = np.repeat(np.arange(len(batch)), later)  # all pairs i < j of a molecule
    j = np.arange(len(i)) - np.repeat(np.cumsum(later) - later, later) + i + 1
    apart = pos[i] - pos[j]
    close = np.einsum("pk,pk->p", apart, apart) < MIN_DISTANCE**2
    return int(batch[i[close.argmax()]]) if close.any() else None


def texts(item):
    """Attributes of a file or dataset that are strings; on other types in a damaged file HDF5 itself may crash."""
    is_text = {name: isinstance(item.attrs.get_id(name).get_type(), h5py.h5t.TypeStringID) for name in item.attrs}
    return {name: item.attrs[name] for name in item.attrs if is_text[name]}


def file_state(path):
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


# --- reading: one file, many processes, no growth of memory ---


class Molecules:
    """Read-only view of one georecon/1 file; may be pickled, forked and shared by any number of workers.

    ptr (M+1,) int64 · ids (M,) int64 · units {label: unit} · splits {name: (n,) int64} · attrs {root attributes}
    """

    def __init__(self, path):
        self.path = str(path)
        self._raw = self._file = None  # opened on first use, in each process
        check_file(path, "convert one with `python data.py SOURCE RAW OUT.h5`")
        try:
            with h5py.File(self.path, "r") as file:
                self._state = file_state(self.path)
                self.attrs = texts(file)
                for key, wanted in (("schema", SCHEMA), ("length_unit", "angstrom")):
                    if (found := str(self.attrs.get(key))) != wanted:
                        raise InputError(f"{self.path}: attribute {key} is {found}, not {wanted}: convert with data.py")
                self._check(file)
        except (OSError, RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{self.path}: not a whole HDF5 file ({error}): convert it again") from error
        self.name = str(self.attrs.get("name", Path(self.path).stem))

    def _check(self, file):
        """Hold every dataset against the schema, and note where in the file it lies."""
        self.ptr = self._dataset(file, "ptr", "int64", (None,))[:]
        num_molecules = len(self.ptr) - 1
        if num_molecules < 1 or self.ptr[0] != 0 or (self.ptr[1:] <= self.ptr[:-1]).any():
            raise InputError(f"{self.path}: ptr must start at 0 and rise with every molecule: convert it again")
        num_atoms = int(self.ptr[-1])
        expected = {"z": ("uint8", (num_atoms,)), "pos": ("float32", (num_atoms, 3)), "id": ("int64", (num_molecules,))}
        if "energy" in file:
            expected["energy"] = ("float64", (num_molecules,))
        if "forces" in file:
            expected["forces"] = ("float32", (num_atoms, 3))
        if taken := {"energy", "forces"} & set(file.get("y", ())):
            raise InputError(f"{self.path}: dataset y/{min(taken)}: the name belongs to the one without y/: rename it")
        expected |= {f"y/{name}": ("float64", (num_molecules,)) for name in file.get("y", ())}
        self.units, self._layout = {}, {}
        for name, (dtype, shape) in expected.items():
            dataset = self._dataset(file, name, dtype, shape)
            if name not in ("z", "pos", "id"):
                unit = texts(dataset).get("unit")
                if not isinstance(unit, str) or not unit:
                    raise InputError(f"{self.path}: dataset {name} has no attribute unit: convert it again")
                self.units[name.removeprefix("y/")] = unit
            # The place of a plain dataset in the file; None (read through h5py) if chunked, compressed or shifted.
            plain = dataset.chunks is None and not dataset.external and file.userblock_size == 0
            self._layout[name] = dataset.id.get_offset() if plain and hasattr(os, "pread") else None
        energy = self.units.get("energy")
        if (of_forces := self.units.get("forces")) and energy and of_forces != f"{energy}/angstrom":
            raise InputError(f"{self.path}: energy is in {energy}, forces in {of_forces}: they must be its derivative")
        self.splits = {n: self._dataset(file, f"split/{n}", "int64", (None,))[:] for n in file.get("split", ())}
        for name, index in self.splits.items():
            if len(index) == 0 or index.min() < 0 or index.max() >= num_molecules or len(np.unique(index)) < len(index):
                raise InputError(f"{self.path}: split/{name} is empty, or names molecules twice or that are not there")

    def _dataset(self, file, name, dtype, shape):
        dataset = file.get(name)
        if not isinstance(dataset, h5py.Dataset):
            raise InputError(f"{self.path}: dataset {name} is missing: convert it again with data.py")
        if dataset.file.filename != file.filename or dataset.is_virtual:
            raise InputError(f"{self.path}: dataset {name} lies in another file: copy it into this one")
        fits = len(shape) == dataset.ndim and all(n in (None, m) for n, m in zip(shape, dataset.shape))
        if dataset.dtype != np.dtype(dtype) or not fits:
            wanted = f"{dtype} {str(shape).replace('None', 'n')}"
            raise InputError(f"{self.path}: dataset {name} is {dataset.dtype} {dataset.shape}, expected {wanted}")
        return dataset

    def __len__(self):
        return len(self.ptr) - 1

    def __getstate__(self):
        return self.__dict__ | {"_raw": None, "_file": None}  # open files stay behind

    @property
    def ids(self):
        """(M,) int64, the source's own index of each molecule."""
        return self._column("id")

    def label(self, name):
        """A label of every molecule, "energy" or a property such as "gap" -> (M,) float64 in units[name]."""
        if name not in self.units or name == "forces":
            known = ", ".join(n for n in self.units if n != "forces") or "none"
            raise InputError(f"{self.path}: no label {name!r}; the file has: {known}")
        return self._column(name if name == "energy" else f"y/{name}")

    def _column(self, name):
        with self._damage(name), h5py.File(self.path, "r") as file:
            return file[name][:]

    @contextmanager
    def _damage(self, name):
        try:
            yield
        except (OSError, RuntimeError) as error:  # HDF5's, such as of a compressed piece that does not unpack
            raise InputError(f"{self.path}: dataset {name} is damaged ({error}): convert it again") from error

    def sha256(self):
        return sha256(self.path)

    def read(self, index, forces=False):
        """Molecules in the order of index (B,) -> dict of z (N,) int64, pos (N, 3) Å, batch (N,), forces (N, 3)."""
        index = np.asarray(index, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"{self.path}: molecules are 0 to {len(self) - 1}, asked for {index.min()}..{index.max()}")
        start, stop = self.ptr[index], self.ptr[index + 1]
        # Neighbours in the file are one read: a run starts and ends where index does not go on by 1.
        starts, stops = start[np.diff(index, prepend=-2) != 1], stop[np.diff(index, append=-2) != 1]
        runs = list(zip(starts.tolist(), stops.tolist()))
        z, pos = self._atoms("z", np.uint8, runs), self._atoms("pos", np.float32, runs).reshape(-1, 3)
        batch = np.repeat(np.arange(len(index)), stop - start)
        bad = (z == 0) | (z > 118) | ~(np.abs(pos) < MAX_COORDINATE).all(axis=1)
        if bad.any():
            which = f"{self.path}: molecule {index[batch[bad.argmax()]]}"
            raise InputError(f"{which} has an atom that is not finite or far away, or an atomic number beyond 1..118")
        if (molecule := coincident(pos, batch)) is not None:
            raise InputError(f"{self.path}: molecule {index[molecule]} has atoms that coincide")
        arrays = {"z": z.astype(np.int64), "pos": pos, "batch": batch}
        if forces:
            if "forces" not in self.units:
                raise InputError(f"{self.path}: the file has no forces")
            arrays["forces"] = self._atoms("forces", np.float32, runs).reshape(-1, 3)
            bad = ~np.isfinite(arrays["forces"]).all(axis=1)
            if bad.any():
                raise InputError(f"{self.path}: molecule {index[batch[bad.argmax()]]} has a force that is not finite")
        return {name: torch.from_numpy(value) for name, value in arrays.items()}

    def _atoms(self, name, dtype, runs):
        """Rows start:stop of a per-atom dataset, run after run -> flat array."""
        if not runs:
            return np.empty(0, dtype)
        if self._layout[name] is None:
            if self._file is None or self._file[0] != os.getpid():  # an HDF5 handle must not cross a fork
                self._file = os.getpid(), h5py.File(self.path, "r")
            with self._damage(name):
                return np.concatenate([self._file[1][name][start:stop] for start, stop in runs]).ravel()
        # pread, not a memory map: touched pages then count for the system's cache, not for this process.
        if self._raw is None:
            self._raw = open(self.path, "rb", buffering=0)  # noqa: SIM115
            if file_state(self._raw.fileno()) != self._state:  # the places noted are those of the old file
                raise InputError(f"{self.path}: was replaced while in use: start again")
        raw, offset, row = self._raw.fileno(), self._layout[name], np.dtype(dtype).itemsize * (1 if name == "z" else 3)
        data = bytearray().join([os.pread(raw, (b - a) * row, offset + a * row) for a, b in runs])
        if len(data) != row * sum(b - a for a, b in runs):
            raise InputError(f"{self.path}: dataset {name} ends early: the file was cut off while in use")
        return np.frombuffer(data, dtype)


# --- order: a function of (seed, step), nothing to store ---


def epoch_order(num, seed, epoch):
    """Order of num items in an epoch -> (num,) int64 permutation."""
    return np.random.default_rng([seed, epoch]).permutation(num)


def split_indices(num, sizes, seed=1):
    """Random disjoint parts of range(num), e.g. QM9's sizes (110_000, 10_000, None); None takes the rest."""
    fixed = sum(size or 0 for size in sizes)
    if fixed > num or sum(size is None for size in sizes) > 1:
        raise InputError(f"cannot split {num} molecules into parts of {list(sizes)}")
    sizes = [num - fixed if size is None else size for size in sizes]
    order = np.random.default_rng(seed).permutation(num)
    return [order[stop - size : stop] for size, stop in zip(sizes, np.cumsum(sizes))]


class StepBatches(torch.utils.data.Dataset):
    """What one rank needs for an optimizer step, by the number of the step: a list of `accumulate` parts.

    Each part is Molecules.read's dict plus index (b,) int64, num_molecules, and its place in the global batch, so that
    noise can be drawn for the global batch and sliced: first_atom, global_atoms. An incomplete last batch is dropped.
    Use as DataLoader(StepBatches(...), batch_size=None, sampler=range(start, stop), num_workers=k).
    """

    def __init__(self, molecules, index, batch_size, seed, rank=0, world=1, accumulate=1, forces=False):
        self.forces = forces
        self.molecules, self.index = molecules, np.asarray(index, dtype=np.int64)
        self.batch_size, self.seed, self.rank, self.world, self.accumulate = batch_size, seed, rank, world, accumulate
        if batch_size < 1 or batch_size % (world * accumulate):
            message = f"batch_size {batch_size} must be a multiple of ranks x accumulate = {world} x {accumulate}"
            raise InputError(message, code=2)
        if batch_size > len(self.index):
            message = f"batch_size {batch_size} is more than the {len(self.index)} molecules to choose from"
            raise InputError(message, code=2)
        self.steps_per_epoch = len(self.index) // batch_size
        self._epoch = self._order = None

    def chosen(self, step):
        """Indices of the molecules of the global batch (batch_size,), the same on every rank."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self.index[epoch_order(len(self.index), self.seed, epoch)]
        return self._order[place * self.batch_size : (place + 1) * self.batch_size]

    def __getitem__(self, step):
        whole = self.chosen(step)
        first_atom = np.concatenate([[0], np.cumsum(self.molecules.ptr[whole + 1] - self.molecules.ptr[whole])])
        size = self.batch_size // (self.world * self.accumulate)
        parts = []
        for start in range(self.rank * self.accumulate * size, (self.rank + 1) * self.accumulate * size, size):
            part = self.molecules.read(whole[start : start + size], self.forces)
            part |= {"index": torch.tensor(whole[start : start + size]), "num_molecules": size}
            part |= {"first_atom": int(first_atom[start]), "global_atoms": int(first_atom[-1])}
            parts.append(part)
        return parts


# --- writing: a stream of molecules -> one file, whole or not at all ---
#
# A molecule on its way is a dict: id, z (n,), pos (n, 3) Å, labels {dataset: value}, split (names); one that cannot be
# used is {id, skip: cause}.


def distances(pos):
    """pos (n, 3) -> (n, n), inf on the diagonal; float64, for coordinates may lie far from the origin."""
    pos = pos - pos.mean(axis=0, dtype=np.float64)
    square = (pos * pos).sum(axis=1)
    squares = square[:, None] + square - 2 * (pos @ pos.T)  # (n, n)
    np.fill_diagonal(squares, np.inf)
    return np.sqrt(squares.clip(min=0))


def flaw(z, pos, labels):
    """Why a molecule must not be trained on, or ""; z (n,) int, pos (n, 3) float32 Å."""
    if len(z) == 0:
        return "no atoms"
    if pos.shape != (len(z), 3) or labels.get("forces", pos).shape != pos.shape:
        return "numbers of elements, coordinates and forces that differ"
    if z.min() < 1 or z.max() > 118:
        return "an element that does not exist"
    if not (np.abs(pos) < MAX_COORDINATE).all():
        return f"a coordinate that is not finite, or beyond {MAX_COORDINATE:.0f} Å"
    if distances(pos).min() < MIN_DISTANCE:
        return f"two atoms closer than {MIN_DISTANCE} Å"
    if not all(np.isfinite(value).all() for value in labels.values()):
        return "a label that is not finite"
    return ""


def write_h5(out, molecules, attrs, units, parts):
    """Stream molecules into a new file of the schema -> (molecules, atoms, {cause: (count, first ids)}) written.

    parts {split: size} are drawn at random from a file of more molecules than their sizes sum up to; None: the rest.
    """
    per_molecule = {"id": array("q"), "ptr": array("q", [0])}  # 8 bytes a molecule and label: these fit in memory
    splits, skipped, labels = {}, {}, None
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder, ExitStack() as stack:
        per_atom = {name: stack.enter_context(open(f"{folder}/{name}", "w+b")) for name in ("z", "pos", "forces")}
        for mol in molecules:
            cause = mol.get("skip") or ("" if abs(mol["id"]) < 2**63 else "an id beyond 64 bits")
            if not cause:
                with np.errstate(over="ignore"):  # too large for float32 is inf, which flaw finds
                    mol["pos"] = np.ascontiguousarray(mol["pos"], dtype=np.float32)
                    if "forces" in mol["labels"]:
                        mol["labels"]["forces"] = np.ascontiguousarray(mol["labels"]["forces"], dtype=np.float32)
                cause = flaw(mol["z"], mol["pos"], mol["labels"])
            if cause:
                count, first = skipped.get(cause, (0, []))
                skipped[cause] = count + 1, first + [mol["id"]] if count < 5 else first
                continue
            if labels is None:
                labels = sorted(mol["labels"])
                per_molecule |= {name: array("d") for name in labels if name != "forces"}
            if sorted(mol["labels"]) != labels:
                have, before = (" and ".join(names) or "no labels" for names in (sorted(mol["labels"]), labels))
                which = f"molecule {mol['id']} of {' '.join(mol.get('split', ())) or attrs['source']}"
                raise InputError(f"{which} has {have}, those before it {before}: convert them apart")
            for name in mol.get("split", ()):
                splits.setdefault(name, array("q")).append(len(per_molecule["id"]))
            per_molecule["id"].append(mol["id"])
            per_molecule["ptr"].append(per_molecule["ptr"][-1] + len(mol["z"]))
            per_atom["z"].write(mol["z"].astype(np.uint8).tobytes())
            per_atom["pos"].write(mol["pos"].tobytes())
            for name, value in mol["labels"].items():
                if name == "forces":
                    per_atom["forces"].write(value.tobytes())
                else:
                    per_molecule[name].append(value)
        num_molecules, num_atoms = len(per_molecule["id"]), per_molecule["ptr"][-1]
        if num_molecules == 0:
            why = "; ".join(f"{cause}: {count}" for cause, (count, _) in skipped.items()) or "the source is empty"
            raise InputError(f"{attrs['source']}: no molecule that can be used ({why})")
        if num_molecules > sum(size or 0 for size in parts.values()):
            splits |= zip(parts, split_indices(num_molecules, parts.values()))
        if "forces" not in labels:
            del per_atom["forces"]
        with h5py.File(f"{folder}/out.h5", "w") as file:
            file.attrs.update({"schema": SCHEMA, "length_unit": "angstrom"} | attrs)
            for name, part in per_atom.items():
                shape, dtype = ((num_atoms,), "uint8") if name == "z" else ((num_atoms, 3), "float32")
                copy_part(part, file.create_dataset(name, shape, dtype))
            for name, values in per_molecule.items():
                file[name] = np.frombuffer(values, dtype="float64" if values.typecode == "d" else "int64")
            for name, values in splits.items():
                file[f"split/{name}"] = np.asarray(values, dtype="int64")
            for name in labels:
                file[name].attrs["unit"] = units[name]
        os.replace(f"{folder}/out.h5", out)
    return num_molecules, num_atoms, skipped


def copy_part(part, dataset, rows=1 << 20):
    """Fill a dataset from a raw temporary file, a million rows at a time."""
    part.seek(0)
    row = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
    for start in range(0, len(dataset), rows):
        piece = np.frombuffer(part.read(rows * row), dataset.dtype)
        dataset[start : start + rows] = piece.reshape(-1, *dataset.shape[1:])


# --- raw files: containers ---


@contextmanager
def readable(*paths):
    """Whatever goes wrong while reading raw files becomes one line that names them."""
    wrong = (EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError)
    try:
        yield
    except (*wrong, csv.Error, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile) as error:
        names, cause = " ".join(map(str, paths)), f"{type(error).__name__}: {error}"
        raise InputError(f"{names}: damaged, cut off or not the right kind of file ({cause})") from error


def need(module, purpose):
    """Import an optional package, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise InputError(f"{purpose} needs the package {package}: pip install {package}") from error


def open_raw(path):
    """Open a plain, .gz, .bz2 or .xz file for reading bytes; the first bytes tell which."""
    with open(path, "rb") as file:
        magic = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    return next((opener for key, opener in openers.items() if magic.startswith(key)), open)(path, "rb")


def tar_members(path):
    """(name, file object) of each file of a tar archive, in one pass."""
    with open_raw(path) as file, tarfile.open(fileobj=file, mode="r|") as tar:
        for member in tar:
            if member.isfile():
                yield member.name, tar.extractfile(member)
        # tarfile takes a cut-off or broken header for the end; a whole archive ends in blocks of zeros, and only there.
        ended = tar.fileobj.tell() - tar.offset == tarfile.BLOCKSIZE
        if not ended or any(piece.strip(b"\0") for piece in iter(lambda: tar.fileobj.read(1 << 20), b"")):
            raise EOFError("the archive ends early")


def sdf_blocks(file):
    """Molecules of an SDF byte stream, as text from the title line on, without the closing $$$$."""
    tail = b"\n"  # each block then starts with the line end of the one before
    while piece := file.read(1 << 20):
        *blocks, tail = (tail + piece).split(b"\n$$$$")
        for block in blocks:
            yield block.partition(b"\n")[2].decode(errors="replace").replace("\r\n", "\n")
    if tail.strip():
        raise EOFError("the last molecule has no closing $$$$")


def worker_signals():
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)  # the parent gets it too, and ends its pool in order
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: do not outlive a parent that was killed


def parallel(function, items, chunk=256):
    """Results of function(list of items) -> list, over all cores; in order, with few chunks in flight at a time."""
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, chunk)), [])
    first = next(chunks, [])
    if len(first) < chunk:
        yield from function(first)
        return
    workers = os.cpu_count() or 1
    with ProcessPoolExecutor(workers, initializer=worker_signals) as pool:
        pending = deque()
        for piece in itertools.chain([first], chunks):
            pending.append(pool.submit(function, piece))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


# --- raw files: one molecule ---


def number(text):
    """A float as Python or Mathematica write it: 1.5e-6, 1.5*^-6."""
    return float(text.replace("*^", "e"))


def xyz_atoms(rows):
    """Rows [symbol, x, y, z, ...] -> z (n,) int64, pos (n, 3) float64; an unknown symbol is 0."""
    z = np.array([ATOMIC_NUMBER.get(row[0], 0) for row in rows], dtype=np.int64)
    return z, np.array([[number(text) for text in row[1:4]] for row in rows]).reshape(-1, 3)


def parse_xyz(items):
    """[(id, text of an xyz file)] -> molecules; a comment line after the number of atoms may be missing or empty."""
    molecules = []
    for key, text in items:
        try:
            rows = [line.split() for line in text.decode().strip().splitlines()]
            first = len(rows) - int(rows[0][0])
            atom_first = len(rows[1]) == 4 and rows[1][0] in ATOMIC_NUMBER  # where the comment would be
            if first not in (1, 2) or first == 2 and atom_first:
                raise ValueError("more or fewer atoms than the first line says")
            z, pos = xyz_atoms(rows[first:])
            molecules.append({"id": key, "z": z, "pos": pos, "labels": {}})
        except (ValueError, IndexError):
            molecules.append({"id": key, "skip": "not readable as xyz"})
    return molecules


def parse_sdf(items):
    """[(id, SDF block)] -> molecules, hydrogens kept."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    molecules = []
    for key, block in items:
        lines = block.split("\n", 2)
        # Unsanitized: charges and valences are no matter here, and RDKit's opinion of them would cost molecules.
        mol = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False)
        if mol is None:
            molecules.append({"id": key, "skip": "RDKit cannot read it"})
        elif len(lines) > 1 and lines[1][20:22] == "2D":
            molecules.append({"id": key, "skip": "drawn in 2D: no geometry"})
        else:
            z = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
            pos = mol.GetConformer().GetPositions() if len(z) else np.zeros((0, 3))
            molecules.append({"id": key, "z": z, "pos": pos, "labels": {}})
    return molecules


# --- raw files: data sets ---


def qm9_labels(values):
    """The 15 numbers of QM9's comment line (Hartree) -> {y/<name>: value in the unit of QM9_LABELS}."""
    pairs = zip(QM9_LABELS, values, strict=True)
    return {f"y/{name}": value * (HAR2EV if unit == "eV" else 1) for (name, unit, *_), value in pairs}


def table(file, columns, path):
    """Rows of a csv file as dicts, once it is known to have the columns."""
    rows = csv.DictReader(file)
    if missing := [column for column in columns if column not in (rows.fieldnames or ())]:
        raise InputError(f"{path}: no column {', '.join(missing)}: is it the right file?")
    return rows


def read_qm9_wheel(raw):
    columns = [column for *_, column, _ in QM9_LABELS]
    with zipfile.ZipFile(raw) as wheel:
        members = sorted(name for name in wheel.namelist() if re.search(r"qm9_part\d+\.csv$", name))
        if not members:
            raise InputError(f"{raw}: no qm9_part*.csv inside: is it the wheel of qm9pack 1.0.3?")
        for member in members:
            with io.TextIOWrapper(wheel.open(member), newline="") as file:
                for row in table(file, ["Index", "Elements", "XYZ_Ang", *columns], f"{raw}/{member}"):
                    symbols = re.findall("[A-Za-z]+", row["Elements"])  # ['C','H', ...] and [[x,y,z],[x,y,z], ...]
                    triples = row["XYZ_Ang"].strip("[]").split("],[")
                    z, pos = xyz_atoms([[s, *triple.split(",")] for s, triple in zip(symbols, triples, strict=True)])
                    labels = qm9_labels([number(row[column]) for column in columns])
                    yield {"id": int(row["Index"]), "z": z, "pos": pos, "labels": labels}


def read_qm9_tar(raw):
    for name, file in tar_members(raw):
        if name.endswith(".xyz"):
            lines = file.read().decode().splitlines()
            try:
                num, (tag, key, *values) = int(lines[0]), lines[1].split()
                if tag != "gdb" or len(lines) != num + 5:  # frequencies, SMILES and InChI follow the atoms
                    raise ValueError("no `gdb` line, or another number of atoms than the first line says")
                z, pos = xyz_atoms([line.split() for line in lines[2 : num + 2]])
                labels = qm9_labels([number(text) for text in values])
            except (ValueError, IndexError) as error:
                raise InputError(f"{raw}: {name} is not an xyz file of QM9 ({error})") from error
            yield {"id": int(key), "z": z, "pos": pos, "labels": labels}


def read_qm9_sdf(properties, sdf):
    columns = [column for *_, column in QM9_LABELS]
    with open_raw(sdf) as file, open(properties, newline="") as rows:
        pairs = itertools.zip_longest(sdf_blocks(file), table(rows, ["mol_id", *columns], properties))
        for block, row in pairs:
            lines = block.split("\n") if block else ["the end"]
            title = lines[0].strip()
            if not row or title != row["mol_id"]:
                there = row["mol_id"] if row else "the end"
                raise InputError(f"{sdf} and {properties} do not belong together: {title} here is {there} there")
            atoms = lines[4 : 4 + int(lines[3][:3])]  # V2000: three columns of ten characters, then the symbol
            z, pos = xyz_atoms([(line[31:34].strip(), line[:10], line[10:20], line[20:30]) for line in atoms])
            labels = qm9_labels([number(row[column]) for column in columns])
            yield {"id": int(title.removeprefix("gdb_")), "z": z, "pos": pos, "labels": labels}


def read_uncharacterized(path):
    """The molecules to leave out: every line of the list that starts with a number."""
    words = [line.split() for line in path.read_text().splitlines()]
    ids = {int(first) for first, *_ in filter(None, words) if first.isdigit()}
    if not ids:
        raise InputError(f"{path}: no line starts with the number of a molecule: is it uncharacterized.txt?")
    return ids


def read_qm9(*raws):
    """The wheel of qm9pack, the archive of xyz files, or SDF and csv; and, if given, the list of those to leave out."""
    dropped = set().union(*(read_uncharacterized(raw) for raw in raws if raw.suffix == ".txt"))
    rest = sorted((raw for raw in raws if raw.suffix != ".txt"), key=lambda raw: raw.suffix)
    kinds = [raw.suffix for raw in rest]
    if kinds == [".whl"]:
        molecules = read_qm9_wheel(*rest)
    elif kinds == [".csv", ".sdf"]:
        molecules = read_qm9_sdf(*rest)
    elif len(rest) == 1 and ".tar" in rest[0].suffixes:
        molecules = read_qm9_tar(*rest)
    else:
        takes = "qm9 takes qm9pack-*.whl, dsgdb9nsd.xyz.tar.bz2, or gdb9.sdf with gdb9.sdf.csv"
        got = " ".join(raw.name for raw in raws)
        raise InputError(f"{takes}, and beside it uncharacterized.txt if you have it; got {got}", code=2)
    for mol in molecules:
        yield {"id": mol["id"], "skip": "on the list of uncharacterized molecules"} if mol["id"] in dropped else mol


def read_pcqm4mv2(raw):
    """The SDF in its tar.gz (id: place in the file, OGB's index) or the zip of xyz files (id: name of the file)."""
    if raw.suffix == ".zip":
        with zipfile.ZipFile(raw) as archive:
            names = [(Path(name).stem, name) for name in archive.namelist() if name.endswith(".xyz")]
            for k, (stem, _) in enumerate(names):
                if not stem.isdecimal():
                    yield {"id": k, "skip": "the file's name is no number"}
            names = sorted((int(stem), name) for stem, name in names if stem.isdecimal())
            yield from parallel(parse_xyz, ((key, archive.read(name)) for key, name in names))
        return
    need("rdkit.Chem", "reading SDF")
    if ".tar" not in raw.suffixes:  # unpacked by hand
        with open_raw(raw) as file:
            yield from parallel(parse_sdf, enumerate(sdf_blocks(file)))
        return
    for name, file in tar_members(raw):
        if name.endswith(".sdf"):
            yield from parallel(parse_sdf, enumerate(sdf_blocks(file)))


def read_sdf(raw):
    """A plain or compressed SDF; id: the title line where it is a number, else the place in the file."""
    need("rdkit.Chem", "reading SDF")
    with open_raw(raw) as file:
        titled = ((block.partition("\n")[0].strip(), k, block) for k, block in enumerate(sdf_blocks(file)))
        yield from parallel(parse_sdf, ((int(t) if re.fullmatch(r"\d{1,18}", t) else k, b) for t, k, b in titled))


KCAL = {"energy": "kcal/mol", "forces": "kcal/mol/angstrom"}
EV = {"energy": "eV", "forces": "eV/angstrom"}
NPZ_UNITS = {"e_unit": ("kcal/mol", "kcal mol-1", "kcal mol^-1"), "r_unit": ("ang", "angstrom", "å", "a")}


def read_npz(raw, keys, index=None):
    """Frames of one molecule; keys of z (n,), pos (T, n, 3), energy (T,) or (T, 1), forces (T, n, 3), and ids (T,)."""
    if not zipfile.is_zipfile(raw):
        raise InputError(f"{raw}: not an npz file, or cut off")
    with np.load(raw, allow_pickle=False) as arrays:
        if missing := [key for key in (*keys, index) if key and key not in arrays]:
            raise InputError(f"{raw}: no {', '.join(missing)} among its arrays {', '.join(arrays)}: wrong SOURCE?")
        for key, known in NPZ_UNITS.items():  # where the file says them
            if key in arrays and (said := str(arrays[key].astype(str))).lower() not in known:
                raise InputError(f"{raw}: its {key} is {said}, expected {known[0]}: convert the numbers first")
        z, pos, energy, forces = (arrays[key] for key in keys)
        ids = arrays[index] if index else np.arange(len(pos))
    shapes = z.ndim == 1 and pos.shape == forces.shape == (len(ids), len(z), 3)
    if not shapes or energy.shape not in ((len(ids),), (len(ids), 1)):
        said = ", ".join(f"{key} {a.shape}" for key, a in zip(keys, (z, pos, energy, forces)))
        raise InputError(f"{raw}: shapes that do not fit each other: {said}")
    if z.dtype.kind not in "iu" or any(values.dtype.kind not in "iuf" for values in (pos, energy, forces, ids)):
        raise InputError(f"{raw}: atomic numbers must be integers, and all else numbers")
    with np.errstate(invalid="ignore"):
        if (ids != ids.astype(np.int64)).any():
            raise InputError(f"{raw}: {index} must be whole numbers")
    for key, frame, e, f in zip(ids, pos, energy.reshape(-1), forces):
        yield {"id": int(key), "z": z.astype(np.int64), "pos": frame, "labels": {"energy": float(e), "forces": f}}


def xyz_labels(key, atoms):
    """Energy and forces of frame `key`; a ValueError where it is not clear what they are."""
    known = {k.removeprefix("REF_"): v for k, v in (atoms.info | atoms.arrays).items() if k.startswith("REF_")}
    plain = dict(atoms.calc.results if atoms.calc else {})
    found = {name: value for name, value in (plain | known).items() if name in EV}
    if len(found.keys() & known.keys()) == 1 and len(found) == 2:
        raise ValueError(f"frame {key} has energy or forces under REF_, the other without: are they of one level?")
    said = [str(atoms.info[name]) for name in ("unit", "units", "energy_unit") if name in atoms.info]
    if found and (strange := [unit for unit in said if unit.lower() not in ("ev", "ev/angstrom")]):
        raise ValueError(f"frame {key} is in {strange[0]}, expected eV: convert the numbers first")
    if isinstance(found.get("energy"), (bool, np.bool_)):
        raise ValueError(f"the energy of frame {key} is {found['energy']}")
    return {name: float(v) if name == "energy" else np.asarray(v, dtype=np.float64) for name, v in found.items()}


def read_xyz(raw, labelled=True):
    """Extended xyz, eV and eV/Å; labels under REF_energy or energy and REF_forces or forces, both optional."""
    ase = need("ase.io", "reading extended xyz")
    with io.TextIOWrapper(open_raw(raw)) as file:
        for key, atoms in enumerate(ase.iread(file, index=":", format="extxyz")):
            if atoms.pbc.any():
                yield {"id": key, "skip": "periodic: not a molecule"}
                continue
            labels = xyz_labels(key, atoms) if labelled else {}
            yield {"id": key, "z": atoms.numbers, "pos": atoms.positions, "labels": labels}
        if any(line.strip() for line in file):  # ase stops at a blank line
            raise ValueError("a blank line between molecules: remove it")


read_md17 = partial(read_npz, keys=("z", "R", "E", "F"))
read_rmd17 = partial(read_npz, keys=("nuclear_charges", "coords", "energies", "forces"), index="old_indices")
SOURCES = {  # reader of one raw file (qm9: of all of them), units of its labels
    "qm9": (read_qm9, {f"y/{name}": unit for name, unit, *_ in QM9_LABELS}),
    "pcqm4mv2": (read_pcqm4mv2, {}),
    "sdf": (read_sdf, {}),
    "md17": (read_md17, KCAL),
    "rmd17": (read_rmd17, KCAL),
    "md22": (read_md17, KCAL),
    "xyz": (read_xyz, EV),
}
QM9_SPLIT = {"train": 110_000, "val": 10_000, "test": None}  # of 130,831 the field's 110,000, 10,000 and 10,831
CREDIT = {  # name, license, attribution
    "qm9": ("QM9", "CC0 1.0", "R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld, Sci. Data 1, 140022 (2014)"),
    "pcqm4mv2": ("PCQM4Mv2", "CC BY 4.0", "W. Hu et al., OGB-LSC, arXiv:2103.09430 (2021), from PubChemQC"),
    "md17": ("MD17", "not stated", "S. Chmiela et al., Sci. Adv. 3, e1603015 (2017)"),
    "rmd17": ("rMD17", "CC0 1.0", "A. S. Christensen, O. A. von Lilienfeld, MLST 1, 045018 (2020)"),
    "md22": ("MD22", "not stated", "S. Chmiela et al., Sci. Adv. 9, eadf0873 (2023)"),
}


# --- commands ---


def stem(path):
    """md17_aspirin.npz -> md17_aspirin, DFT.sdf.gz -> DFT."""
    return Path(path.name.removesuffix(".gz")).stem


def read_source(source, raws):
    """Every molecule of the raw files, in order; several files become named splits."""
    for group in [raws] if source == "qm9" else [[raw] for raw in raws]:
        molecule = None
        with readable(*group):
            for molecule in SOURCES[source][0](*group):
                yield molecule | {"split": (stem(group[0]),)} if len(group) < len(raws) else molecule
        if molecule is None:
            raise InputError(f"{' '.join(map(str, group))}: no molecules inside: is it the right file, and whole?")


def credit(source, raws):
    """Name, license and attribution, but only for files that bear the name of the set they come from."""
    stems = " ".join(stem(raw) for raw in raws)
    if source not in CREDIT or ("md" in source and not all(raw.name.startswith(source) for raw in raws)):
        return {"name": stems}
    name, license_, attribution = CREDIT[source]
    if raws[0].suffix == ".whl":
        license_, attribution = f"{license_} (qm9pack: MIT)", f"{attribution}; via {' '.join(stems.split('-')[:2])}"
    name = f"{name}: {stems}" if "md" in source else name
    return {"name": name, "license": license_, "attribution": attribution}


def check_out(out, *kinds):
    """Refuse a file that cannot or must not be written, before hours of work."""
    if out.suffix not in kinds:
        raise InputError(f"the file to write must end in {' or '.join(kinds)}, got {out}", code=2)
    if os.path.lexists(out):
        raise InputError(f"{out} exists: remove it or choose another name")
    if not out.parent.is_dir():
        raise InputError(f"{out.parent}: no such folder to write {out.name} in: create it first")
    try:
        tempfile.TemporaryFile(dir=out.parent).close()
    except OSError as error:
        raise InputError(f"{out.parent}: {out.name} cannot be written there ({error.strerror})") from None


def save(out, molecules, attrs, units, parts):
    """write_h5 with a progress bar on a terminal, and a report of what was written and skipped."""
    begun = time.perf_counter()
    try:
        written, atoms, skipped = write_h5(out, tqdm(molecules, unit=" molecules", disable=None), attrs, units, parts)
    except OSError as error:  # reading has its own errors by now
        raise InputError(f"{out}: cannot be written ({error.strerror or error})") from error
    seconds, size = time.perf_counter() - begun, out.stat().st_size / 1e6
    print(f"{out}: {written:,} molecules, {atoms:,} atoms, {size:.1f} MB, in {seconds:.1f} s")
    labels = Molecules(out).units
    print("  labels: " + (", ".join(f"{name} [{unit}]" for name, unit in labels.items()) or "none, geometries only"))
    print(f"  skipped {sum(count for count, _ in skipped.values()):,}")
    for cause, (count, first) in sorted(skipped.items()):
        print(f"    {count:,}: {cause} (id {', '.join(map(str, first))}{', ...' if count > len(first) else ''})")


def convert(source, raws, out):
    """python data.py SOURCE RAW [RAW ...] OUT.h5"""
    raws, out = [Path(raw) for raw in raws], Path(out)
    check_out(out, ".h5")
    for raw in raws:
        if raw.suffix == ".h5":
            raise InputError(f"{raw} stands before {out}: the file to write is the last one", code=2)
        check_file(raw, "download it first")
    if source == "pcqm4mv2" and len(raws) > 1:
        raise InputError(f"pcqm4mv2 takes one raw file, got {len(raws)}", code=2)
    if source != "qm9" and len({stem(raw) for raw in raws}) < len(raws):
        raise InputError("two raw files have the same name, which names their split: rename one", code=2)
    names = [raw.name for raw in raws]
    attrs = credit(source, raws) | {
        "source": "\n".join(names),
        "source_sha256": "\n".join(sha256(raw) for raw in raws),
        "command": f"python data.py {source} {' '.join(names)} {out.name}",
    }
    save(out, read_source(source, raws), attrs, SOURCES[source][1], QM9_SPLIT if source == "qm9" else {})


def sample(path, out, num, seed):
    """python data.py sample FILE.h5 OUT.h5 num=2000 seed=1: molecules drawn without replacement, in the file's order"""
    molecules, out = Molecules(path), Path(out)
    check_out(out, ".h5")
    if not 1 <= num <= len(molecules):
        raise InputError(f"num={num}: {path} has {len(molecules)} molecules", code=2)
    index = np.sort(np.random.default_rng(seed).permutation(len(molecules))[:num])
    names = [name for name in molecules.units if name != "forces"]
    columns = {name if name == "energy" else f"y/{name}": molecules.label(name)[index] for name in names}
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
    command = f"python data.py sample {Path(path).name} {out.name} num={num} seed={seed}"
    attrs["command"] = f"{molecules.attrs.get('command', '')}\n{command}".strip()
    units = {name if name in EV else f"y/{name}": unit for name, unit in molecules.units.items()}
    save(out, stream(), attrs, units, {})


def info(path, sampled=10_000):
    """python data.py info FILE.h5"""
    m = Molecules(path)
    atoms, elements, square, largest = np.diff(m.ptr), np.zeros(119, dtype=np.int64), 0.0, 0.0
    for start in range(0, len(m), sampled):  # all atoms: read refuses positions and elements that cannot be
        part = m.read(range(start, min(start + sampled, len(m))), forces="forces" in m.units)
        elements += np.bincount(part["z"], minlength=119)
        if "forces" in m.units:
            square += part["forces"].double().square().sum().item()
            largest = np.maximum(largest, part["forces"].abs().max().item())  # keeps a nan
    chosen = np.unique(np.linspace(0, len(m) - 1, min(len(m), sampled)).astype(np.int64))
    which = "all molecules" if len(chosen) == len(m) else f"{len(chosen):,} evenly spaced molecules"
    tables = (distances(m.read([k])["pos"].numpy()) for k in chosen)
    nearest, pairs = np.array([(table.min(), (table < 5).sum() / 2) for table in tables]).T
    wrong = [] if nearest.min() >= MIN_DISTANCE else [f"molecule {chosen[nearest.argmin()]} has atoms that coincide"]
    size = f"{len(m):,} molecules, {m.ptr[-1]:,} atoms, {os.path.getsize(path) / 1e6:.1f} MB"
    lines = [("name", m.name), ("size", size)]
    lines += [("atoms", f"{atoms.min()} to {atoms.max()} per molecule, mean {atoms.mean():.1f}")]
    lines += [("elements", ", ".join(f"{SYMBOLS.split()[z]} {elements[z]:,}" for z in np.flatnonzero(elements)))]
    lines += [("pairs", f"{pairs.mean():.1f} per molecule within 5 Å ({which})")]
    if np.isfinite(nearest.min()):
        lines += [("closest atoms", f"{nearest.min():.3f} Å in molecule {chosen[nearest.argmin()]} ({which})")]
    lines += [("splits", ", ".join(f"{name} {len(index):,}" for name, index in m.splits.items()) or "none")]
    for key in ("source", "source_sha256", "command", "license", "attribution"):
        lines += [(key, line) for line in str(m.attrs.get(key, "not stated")).split("\n")]
    lines += [("sha256", m.sha256()), ("", "")]
    head = f"{'unit':17} {'mean':>15} {'std':>12} {'min':>15} {'max':>15}"
    lines += [("label", head if m.units else "none")]
    for name, unit in m.units.items():
        if name == "forces":
            rms = np.sqrt(square / (3 * m.ptr[-1]))
            stats = f"{'':15} {rms:12.6g} {'':15} {largest:15.9g}  (rms, largest component)"
        else:
            v = m.label(name)
            stats = f"{v.mean():15.9g} {v.std():12.6g} {v.min():15.9g} {v.max():15.9g}"
        lines += [(name, f"{unit:17} {stats}")]
        wrong += [f"{name} is not finite everywhere"] if "nan" in stats or "inf" in stats else []
    print("\n".join(f"{key:14} {text}".rstrip() for key, text in lines))
    if wrong:
        raise InputError(f"{path}: not fit for training: {'; '.join(wrong)}: convert it again with data.py")


def main(argv):
    usage = f"usage: python data.py SOURCE RAW [RAW ...] OUT.h5 (SOURCE: {' '.join(SOURCES)}), or info FILE.h5, or "
    usage += "sample FILE.h5 OUT.h5 num=2000 seed=1; --help says more"
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # being stopped cleans up as Ctrl-C does
    match argv:
        case ["info", path]:
            info(path)
        case ["sample", path, out, *keys] if m := re.fullmatch(r"num=(\d{1,9}) seed=(\d{1,9})", " ".join(sorted(keys))):
            sample(path, out, int(m[1]), int(m[2]))
        case [source, *raws, out] if source in SOURCES and raws:
            convert(source, raws, out)
        case _:
            raise InputError(usage, code=2)


if __name__ == "__main__":
    cli(main, __doc__)
