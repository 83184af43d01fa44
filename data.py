"""Molecules of one HDF5 file -> splits -> batches that are a function of (seed, step).

    python data.py SOURCE RAW [RAW ...] OUT.h5 ["labels=NAME:UNIT,..."]    SOURCE and its RAW: below
    python data.py info FILE.h5                       what to know of a file before training on it
    python data.py sample FILE.h5 OUT.h5 num=2000 seed=1    join A.h5 B.h5 OUT.h5: one file to pretrain on
    python data.py rotors FILE.h5 [RAW] OUT.h5        the file with its rotatable bonds, for objective=frad
    python data.py molnet FILE.csv OUT.h5 "labels=NAME:UNIT,..."    conformers of its SMILES: beyond/molnet.py

    qm9       qm9pack-1.0.3-py3-none-any.whl | dsgdb9nsd.xyz.tar.bz2  [+ uncharacterized.txt]
    pcqm4mv2  pcqm4m-v2-train.sdf.tar.gz | pcqm4m-v2_xyz.zip
    md17 md22 rmd17   *.npz          sdf   *.sdf[.gz] (rdkit)          xyz   *.xyz, extended (ase)
Several RAW (not qm9, pcqm4mv2): the stem of each file becomes a named split. labels= reads further numbers, such as
"labels=logS:log mol/L,gap:eV": tags of an SDF, entries of an xyz comment, arrays of an npz with one number a frame.
"""

import os
import re
import signal
from pathlib import Path

import h5py
import numpy as np
import torch

from formats.schema import first_flaw, read_contents
from harness.errors import InputError, cli, explain
from harness.files import check_file

# ---------------------------------------------------------------- reading: one file, many processes, little memory


def file_state(path):
    status = os.stat(path)
    return status.st_ino, status.st_size, status.st_mtime_ns


class Molecules:
    """Read-only view of one georecon/1 file; may be pickled, forked and shared by any number of workers.

    ptr (M+1,) int64 · ids (M,) int64 · units {label: unit} · splits {name: (n,) int64} · attrs {root attributes}
    """

    def __init__(self, path, inputs=None):
        if not path:
            raise InputError("data is not set: name an HDF5 file made by data.py", code=2)
        self.path = str(path)
        self._raw = self._file = self.inputs = None  # opened on first use, in each process
        check_file(path, "convert one with `python data.py SOURCE RAW OUT.h5`")
        self._state = file_state(self.path)
        self.ptr, self.units, self.splits, self.attrs, self.places = read_contents(self.path)
        self.name = str(self.attrs.get("name", Path(self.path).stem))
        self.at_once = max(1, 10**7 // int(np.diff(self.ptr).max()) ** 2)  # a look grows as atoms^2
        self.inputs = inputs(self) if inputs else None  # reads further arrays for an objective of beyond/

    def __len__(self):
        return len(self.ptr) - 1

    def __getstate__(self):
        return self.__dict__ | {"_raw": None, "_file": None}  # open files stay behind

    def split(self, name, label=""):
        """Indices of a named split, or of all molecules if name is "", whose labels "a,b" are all known."""
        if name and name not in self.splits:
            has = ", ".join(self.splits) or "none"
            raise InputError(f"split = {name}: {self.path} has no such split, it has {has}", code=2)
        index = self.splits[name] if name else np.arange(len(self))
        known = [self.label(one) for one in label.split(",") if f"y/{one}" in self.places]
        return index[~np.isnan(known).any(0)[index]] if known else index

    @property
    def ids(self):
        """(M,) int64, the source's own index of each molecule."""
        return self._column("id")

    def label(self, name):
        """A label of every molecule, "energy" or a property such as "gap" -> (M,) float64 in units[name]."""
        if name not in self.units or name == "forces":
            known = ", ".join(n for n in self.units if n != "forces") or "none"
            raise InputError(f"{self.path}: no label {name!r}; the file has: {known}", code=2)
        return self._column(name if name == "energy" else f"y/{name}")

    def _column(self, name):
        with self._damage(name), h5py.File(self.path, "r") as file:
            return file[name][:]

    def _damage(self, name):
        # what HDF5 raises, for example over a compressed piece that does not unpack
        return explain(f"{self.path}: dataset {name} is damaged, convert it again", OSError, RuntimeError)

    def check_elements(self, index, max_z):
        """Refuse, before hours of work, molecules with an element that max_z leaves out."""
        z = self._atoms("z", np.uint8, [(0, int(self.ptr[-1]))])
        highest = np.maximum.reduceat(z, self.ptr[:-1])[index].max()
        if max_z <= highest <= 118:  # reading refuses what is no element
            raise InputError(f"{self.path} holds atomic number {highest}, model.max_z = {max_z}: set it higher")

    def read(self, index, forces=False):
        """Molecules in the order of index (B,) -> dict of z (N,) int64, pos (N, 3) Å, batch (N,), forces (N, 3)."""
        index = np.asarray(index, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"{self.path}: molecules are 0 to {len(self) - 1}, asked for {index.min()}..{index.max()}")
        if forces and "forces" not in self.units:
            raise InputError(f"{self.path}: the file has no forces")
        # runs of atoms [(first, last + 1)]: neighbours in the file are one read
        first, last = np.diff(index, prepend=-2) != 1, np.diff(index, append=-2) != 1
        runs = list(zip(self.ptr[index[first]].tolist(), self.ptr[index[last] + 1].tolist()))
        z = self._atoms("z", np.uint8, runs)
        vectors = {name: self._atoms(name, np.float32, runs).reshape(-1, 3) for name in ("pos", "forces")[: 1 + forces]}
        batch = np.repeat(np.arange(len(index)), self.ptr[index + 1] - self.ptr[index])
        if bad := first_flaw(z, batch=batch, **vectors):
            raise InputError(f"{self.path}: molecule {index[bad[0]]} has {bad[1]}")
        arrays = {"z": z.astype(np.int64), "batch": batch, **vectors}
        more = {"inputs": self.inputs(index)} if self.inputs else {}
        return {name: torch.from_numpy(value) for name, value in arrays.items()} | more

    def composition(self, index, max_z, forces=False):
        """Atoms of each element in molecules index (M,) -> (M, max_z) float64; refuses damage, of forces, too."""
        counts = np.zeros((len(index), max_z))
        for first in range(0, len(index), self.at_once):
            part = self.read(index[first : first + self.at_once], forces)
            np.add.at(counts, (first + part["batch"].numpy(), part["z"].numpy()), 1)
        return counts

    def _atoms(self, name, dtype, runs):
        """Rows start:stop of a per-atom dataset, run after run -> flat array."""
        if not runs:
            return np.empty(0, dtype)
        if self.places[name] is None:
            if self._file is None or self._file[0] != os.getpid():  # an HDF5 handle must not cross a fork
                self._file = os.getpid(), h5py.File(self.path, "r")
            with self._damage(name):
                return np.concatenate([self._file[1][name][start:stop] for start, stop in runs]).ravel()
        if self._raw is None:
            self._raw = open(self.path, "rb", buffering=0)  # noqa: SIM115
            if file_state(self._raw.fileno()) != self._state:  # the places noted are those of the old file
                raise InputError(f"{self.path}: was replaced while in use: start again")
        raw, offset, row = self._raw.fileno(), self.places[name], np.dtype(dtype).itemsize * (1 if name == "z" else 3)
        with self._damage(name):  # pread: pages of a memory map would count for this process
            data = bytearray().join(os.pread(raw, (b - a) * row, offset + a * row) for a, b in runs)
        if len(data) != row * sum(b - a for a, b in runs):
            raise InputError(f"{self.path}: dataset {name} ends early: the file was cut off while in use")
        return np.frombuffer(data, dtype)


# ---------------------------------------------------------------- order and noise: functions of keys, nothing to store


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


def qm9_splits(num):
    """The field's split of QM9 by default_rng(1), 110,000 / 10,000 / 10,831 molecules, for a file of all of it."""
    if num != 130_831:
        print(f"  no splits: QM9's are of the 130,831 molecules that are not uncharacterized, these are {num:,}")
        return {}
    return dict(zip(("train", "val", "test"), split_indices(num, [110_000, 10_000, None]), strict=True))


def choose(molecules, split, size, name, label=""):
    """Draw size molecules (0: all) of a split, the same for every seed. name is the setting that gave size."""
    index = molecules.split(split, label)
    if max(size, 1) > len(index):
        where = f"{split or molecules.path}{label and f', {label} known'}"
        raise InputError(f"{name} = {size}: there are {len(index)} in {where}", code=2)
    return index[split_indices(len(index), [size or len(index), None])[0]]


def standard_normal(num, *key, extra=0):
    """Standard normal numbers (num, 3 + extra) float32 of the integers in key. The first 3 do not depend on extra."""
    flat = np.random.default_rng(key).standard_normal(num * (3 + extra), dtype=np.float32)
    return torch.from_numpy(np.hstack([flat[: 3 * num].reshape(num, 3), flat[3 * num :].reshape(num, extra)]))


def normal_of_each(molecules, index, *key, extra=0):
    """standard_normal for each of the molecules index. A molecule's depend only on key and its own index."""
    sizes = np.diff(molecules.ptr)
    return torch.cat([standard_normal(int(sizes[m]), *key, int(m), extra=extra) for m in index])


class StepBatches(torch.utils.data.Dataset):
    """What one rank needs for an optimizer step, by the number of the step: a list of `accumulate` parts.

    Each part is Molecules.read's dict plus index (b,) int64, num_molecules, and its place in the global batch, so that
    noise can be drawn for the global batch and sliced: first_atom, global_atoms. An incomplete last batch is dropped.
    Use as DataLoader(StepBatches(...), batch_size=None, sampler=range(start, stop), num_workers=k).
    """

    def __init__(self, molecules, index, batch_size, seed, rank=0, world=1, accumulate=1, forces=False):
        self.molecules, self.index, self.forces = molecules, np.asarray(index, np.int64), forces
        self.batch_size, self.seed, self.rank, self.world, self.accumulate = batch_size, seed, rank, world, accumulate
        if batch_size < 1 or batch_size % (parts := world * accumulate):
            raise InputError(f"batch_size {batch_size} must be a multiple of ranks x accumulate = {parts}", code=2)
        if batch_size > len(self.index):
            raise InputError(f"batch_size {batch_size} is more than the {len(index)} molecules", code=2)
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


# ---------------------------------------------------------------- commands


def main(argv):
    from beyond import join, molnet, rotors  # training does not need them
    from formats.sources import SOURCES
    from formats.write import convert, info

    usage = f"usage: python data.py SOURCE RAW [RAW ...] OUT.h5 [labels=NAME:UNIT,...] (SOURCE: {' '.join(SOURCES)}), "
    usage += "info FILE.h5, sample FILE.h5 OUT.h5 num=2000 seed=1, join A.h5 B.h5 OUT.h5, rotors, molnet; see --help"
    end = next((k for k, word in enumerate(argv) if word.startswith("labels=")), len(argv))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as Ctrl-C does
    match argv:
        case ["info", path]:
            info(Molecules(path))
        case ["sample", path, out, *keys] if m := re.fullmatch(r"num=(\d{1,9}) seed=(\d{1,9})", " ".join(sorted(keys))):
            join.sample(Molecules(path), out, int(m[1]), int(m[2]))
        case ["join", *paths, out] if len(paths) > 1:
            join.join([Molecules(path) for path in paths], out)
        case ["rotors", path, *raw, out] if len(raw) < 2:
            rotors.add_rotors(path, out, *raw)
        case ["molnet", path, out, *keys]:
            molnet.from_csv(path, out, *keys)
        case [source, *_] if source in SOURCES and end > 2:  # labels= may have lost its quotes
            convert(source, argv[1 : end - 1], argv[end - 1], qm9_splits, " ".join(argv[end:]))
        case _:
            raise InputError(usage, code=2)


if __name__ == "__main__":
    cli(main, __doc__)
