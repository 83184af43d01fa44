"""The rotatable bonds of the molecules of a file, and which atoms turn with each: what objective=frad needs.

    python data.py rotors FILE.h5 [RAW] OUT.h5        OUT.h5 is FILE.h5 and three more datasets
    RAW: *.sdf, *.sdf.gz or *.sdf.tar.gz with the bonds of these molecules, or qm9pack-1.0.3-py3-none-any.whl

    rotor/ptr       int64 (M+1,)   rotors of molecule m are rows ptr[m]:ptr[m+1]
    rotor/bond      uint16 (R, 2)  [j stays, k turns], atom numbers within the molecule
    rotor/fragment  uint16 (A,)    0 stays; f >= 1 hangs on rotor f - 1 of its molecule

Without the rotatable bonds a molecule falls into rigid fragments, which form a tree, or one tree for each part. The
root is the largest fragment, as it has to stay somewhere. Rotors are numbered breadth first, so the one that another
hangs on stands before it. The atoms that turn with rotor r are fragment r + 1 and all that descend from it.

Bonds come from RAW by the molecule's id, if its elements and geometry agree. Otherwise RDKit tells them from the
geometry, as those of a neutral molecule. It cannot always: then a molecule has no rotors, and is counted.
"""

import os
import re
import shutil
import tempfile
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np

from formats.schema import read_contents
from formats.sources import open_raw, parallel, qm9_rows, readable, sdf_blocks, tar_members
from harness.errors import FOREIGN, InputError, explain, need
from harness.files import check_file, check_new

# Frad's torsion_utils.py: a single bond, not in a ring, neither end terminal or on a triple bond. With hydrogens as
# atoms CH3, OH and NH2 turn, and so do amides.
ROTATABLE = "[!$(*#*)&!D1]-&!@[!$(*#*)&!D1]"
LONGEST = 1.3  # of the sum of covalent radii: a bond in RAW that is longer in the file is of another geometry
SAME = 1e-3  # Å, between RAW and the file: text has four digits

# ---------------------------------------------------------------- one molecule


@cache
def chemistry():
    """rdkit.Chem, the pattern of ROTATABLE, covalent radii (119,) in Å."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    table = Chem.GetPeriodicTable()
    return Chem, Chem.MolFromSmarts(ROTATABLE), np.array([table.GetRcovalent(z) for z in range(119)])


def elements(mol):
    return np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)


def bonds_fit(mol, z, pos):
    """Whether a molecule of RDKit has these elements in this order, and no bond that is too long in this geometry."""
    if mol is None or not np.array_equal(elements(mol), z):
        return False
    ends = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in mol.GetBonds()], dtype=np.int64).reshape(-1, 2)
    length = np.linalg.norm(pos[ends[:, 0]] - pos[ends[:, 1]], axis=1)  # (bonds,)
    return bool((length < LONGEST * chemistry()[2][z[ends]].sum(1)).all())


def from_smiles(smiles, z, pos):
    """Atoms of SMILES, then their hydrogens: QM9's order, but for 0.3 % of it."""
    Chem, *_ = chemistry()
    mol = Chem.MolFromSmiles(smiles)
    mol = Chem.AddHs(mol) if mol else None
    return mol if bonds_fit(mol, z, pos) else None


def from_sdf(block, z, pos):
    """Unsanitized, as the converter reads it."""
    mol = chemistry()[0].MolFromMolBlock(block, sanitize=False, removeHs=False, strictParsing=False)
    if not bonds_fit(mol, z, pos) or np.abs(mol.GetConformer().GetPositions() - pos).max() > SAME:
        return None
    return mol


def from_geometry(_, z, pos):
    """DetermineBonds: connect the dots, then the bond orders of a neutral molecule."""
    from rdkit.Chem import rdDetermineBonds

    Chem, *_ = chemistry()
    mol = Chem.RWMol()
    for number in z.tolist():
        atom = Chem.Atom(number)
        atom.SetNoImplicit(True)
        mol.AddAtom(atom)
    place = Chem.Conformer(len(z))
    place.SetPositions(pos)
    mol.AddConformer(place)
    try:
        rdDetermineBonds.DetermineBonds(mol, charge=0, embedChiral=False)
    except (ValueError, RuntimeError):  # no bond orders that fit, too strained, charged
        return None
    return mol


def rotors(mol):
    """A molecule of RDKit -> bond (R, 2), fragment (n,), both uint16; the bonds alone count."""
    Chem, rotatable, _ = chemistry()
    Chem.FastFindRings(mol)
    turning = {frozenset(ends) for ends in mol.GetSubstructMatches(rotatable, maxMatches=1_000_000)}
    rigid, turns = ([[] for _ in range(mol.GetNumAtoms())] for _ in range(2))  # neighbours of each atom
    for bond in mol.GetBonds():
        i, j = bond.GetBeginAtomIdx(), bond.GetEndAtomIdx()
        lists = turns if {i, j} in turning else rigid
        lists[i].append(j)
        lists[j].append(i)

    def piece(atom):
        """All atoms that rigid bonds join to this one, in order."""
        reached, todo = {atom}, [atom]
        while todo:
            new = set(rigid[todo.pop()]) - reached
            reached |= new
            todo += new
        return sorted(reached)

    pieces = {tuple(piece(atom)) for atom in range(len(rigid))}
    bonds, fragment = [], np.full(len(rigid), -1)
    for root in sorted(pieces, key=lambda atoms: (-len(atoms), atoms[0])):  # the largest of each part comes first
        todo = [] if fragment[root[0]] >= 0 else [root]
        fragment[list(root)] = np.maximum(fragment[list(root)], 0)
        while todo:
            for j in todo.pop(0):
                for k in sorted(turns[j]):
                    if fragment[k] < 0:
                        bonds.append((j, k))
                        todo.append(piece(k))
                        fragment[todo[-1]] = len(bonds)
    return np.array(bonds, dtype=np.uint16).reshape(-1, 2), fragment.astype(np.uint16)


def search(items, bonds_of):
    """[(m, RAW's text, z, pos)] -> [(m, its rotors, or None without bonds)]."""
    found = ((m, bonds_of(text, z, pos)) for m, text, z, pos in items)
    return [(m, None if mol is None else rotors(mol)) for m, mol in found]


# ---------------------------------------------------------------- all molecules of a file


def sdf_texts(raw):
    """(id, block) of an SDF under both ids that a converter may have given it: its place, the number in its title."""
    with open_raw(raw) as file:
        files = (part for name, part in tar_members(raw) if name.endswith(".sdf")) if ".tar" in raw.suffixes else [file]
        for place, block in enumerate(block for part in files for block in sdf_blocks(part)):
            title = re.search(r"(?<!\d)\d{1,18}$", block.partition("\n")[0].strip())  # 17, gdb_17
            for key in {place, int(title[0]) if title else place}:
                yield key, block


def texts(raw):
    """-> (id, text) of each molecule of RAW, how to make bonds of it, what it is called."""
    if raw.suffix == ".whl":
        rows = qm9_rows(raw, ("Index", "SMILES"))
        return ((int(row["Index"]), row["SMILES"]) for row in rows), from_smiles, "SMILES"
    if not {".sdf", ".tar"} & set(raw.suffixes):
        raise InputError(f"{raw}: bonds are read from .sdf, .sdf.gz, .sdf.tar.gz or qm9pack-*.whl", code=2)
    return sdf_texts(raw), from_sdf, "SDF"


class Found:
    """What was found so far, in arrays as long as the file; ways counts the molecules by the origin of their bonds."""

    def __init__(self, file, z):
        self.pos, self.z, self.ptr, self.ids = file["pos"], z, file["ptr"][:], file["id"][:]
        self.bond, self.fragment = np.zeros((len(z), 2), np.uint16), np.zeros(len(z), np.uint16)  # bond: from ptr[m] on
        self.number = np.full(len(self.ids), -1)  # rotors of each molecule; -1: its bonds are not known
        self.ways = Counter()

    def atoms(self, m):
        """-> z (n,) int64, pos (n, 3) float64."""
        mine = slice(self.ptr[m], self.ptr[m + 1])
        return self.z[mine].astype(np.int64), self.pos[mine].astype(np.float64)

    def fill(self, way, bonds_of, pairs):
        """Find the rotors of molecules m by their texts: pairs (m, text)."""
        items = ((m, text, *self.atoms(m)) for m, text in pairs)
        for m, rotors_of in parallel(partial(search, bonds_of=bonds_of), items):
            if rotors_of and self.number[m] < 0:
                bond, fragment = rotors_of
                self.number[m], start = len(bond), self.ptr[m]
                self.bond[start : start + len(bond)] = bond
                self.fragment[start : start + len(fragment)] = fragment
                self.ways[way] += 1

    def rest(self):
        return ((m, None) for m in np.flatnonzero(self.number < 0).tolist())

    def columns(self):
        """-> the three datasets."""
        number = np.maximum(self.number, 0)
        ptr = np.concatenate([[0], np.cumsum(number)])
        rows = np.arange(ptr[-1]) + np.repeat(self.ptr[:-1] - ptr[:-1], number)
        return {"rotor/ptr": ptr, "rotor/bond": self.bond[rows], "rotor/fragment": self.fragment}


def first_frame(_, z, pos, mol):
    return mol if bonds_fit(mol, z, pos) else None


def find_all(path, raw):
    """Every molecule by the first way that knows its bonds -> Found."""
    with explain(f"{path}: damaged, convert it again", *FOREIGN), h5py.File(path, "r") as file:
        if "rotor" in file:
            raise InputError(f"{path} has rotors already: take the file that it was made from")
        z = file["z"][:]
        if not (z == 1).any():
            raise InputError(f"{path} has no hydrogen: rotors are found with all atoms there")
        found = Found(file, z)
        if raw:
            stream, bonds_of, way = texts(raw)
            place = dict(zip(found.ids.tolist(), range(len(found.ids))))
            with readable(raw):
                found.fill(f"the {way} of {raw.name}", bonds_of, ((place[k], t) for k, t in stream if k in place))
            if not found.ways:
                raise InputError(f"{raw}: none of its molecules is in {path}, by id, elements and geometry")
        sizes = np.diff(found.ptr)
        if (sizes == sizes[0]).all() and (z.reshape(-1, sizes[0]) == z[: sizes[0]]).all():  # frames of a trajectory
            frame = partial(first_frame, mol=from_geometry(None, *found.atoms(0)))
            found.fill("the geometry of the first", frame, found.rest())
        found.fill("their own geometry", from_geometry, found.rest())
    return found


def add_rotors(path, out, raw=None):
    """python data.py rotors FILE.h5 [RAW] OUT.h5: OUT.h5 is FILE.h5 with rotors."""
    path, out, raw = Path(path), Path(out), Path(raw) if raw else None
    begun = time.perf_counter()
    check_new(out, kinds=(".h5",))
    check_file(path, "convert one with `python data.py SOURCE RAW OUT.h5`")
    if raw:
        check_file(raw, "download it first")
    need("rdkit.Chem", "finding rotors")
    attrs = read_contents(path).attrs
    found = find_all(path, raw)
    columns = found.columns()
    command = " ".join(["python data.py rotors", path.name, *([raw.name] if raw else []), out.name])
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            shutil.copyfile(path, f"{folder}/out.h5")
            with h5py.File(f"{folder}/out.h5", "r+") as file:
                file.attrs["command"] = f"{attrs.get('command', '')}\n{command}".strip()
                for name, values in columns.items():
                    file[name] = values
            os.replace(f"{folder}/out.h5", out)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    turning, unknown = (found.number > 0).sum(), found.ids[found.number < 0]
    print(f"{out}: {len(columns['rotor/bond']):,} rotors, in {time.perf_counter() - begun:.1f} s")
    print(f"  {turning:,} of {len(found.ids):,} molecules have one or more, at most {found.number.max()}")
    for way, count in found.ways.items():
        print(f"  bonds of {count:,} from {way}")
    first = f" (id {', '.join(map(str, unknown[:5]))}{', ...' if len(unknown) > 5 else ''})" if len(unknown) else ""
    print(f"  bonds of {len(unknown):,} not known, so no rotors{first}")
