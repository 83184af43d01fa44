"""The rotatable bonds of a file's molecules, and which atoms turn with each, for objective=frad.

    python data.py rotors FILE.h5 [RAW] OUT.h5        OUT.h5 is FILE.h5 and three more datasets
    RAW: *.sdf, *.sdf.gz or *.sdf.tar.gz with their bonds, or qm9pack-1.0.3-py3-none-any.whl

    rotor/ptr       int64 (M+1,)   rotors of molecule m are rows ptr[m]:ptr[m+1]
    rotor/bond      uint16 (R, 2)  [j stays, k turns], atom numbers within the molecule
    rotor/fragment  uint16 (A,)    0 stays; f >= 1 hangs on rotor f - 1 of its molecule

Bonds come from RAW by the molecule's id, if its elements and geometry agree. Otherwise RDKit tells
them from the geometry, as those of a neutral molecule. It cannot always: then a molecule has no
rotors, and is counted.
"""

import os
import re
import shutil
import tempfile
import time
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np

from formats.schema import read_contents
from formats.sources import files_in, parallel, qm9_rows, readable, sdf_blocks
from harness.errors import FOREIGN, InputError, explain, need
from harness.files import check_file, check_new

# Frad's torsion_utils.py: a single bond, not in a ring, neither end terminal or on a triple bond.
# Hydrogens are atoms: CH3, OH and NH2 turn. So do amides.
ROTATABLE = "[!$(*#*)&!D1]-&!@[!$(*#*)&!D1]"
LONGEST = 1.3  # of the sum of covalent radii; a longer bond is none in this geometry
SAME = 1e-3  # Å, between the positions of RAW and of the file: an SDF has four digits


# ------------------------------------------- bonds: text, z (n,), pos (n, 3) -> mol, or None


@cache
def chemistry():
    """rdkit.Chem, the pattern of ROTATABLE, covalent radii (119,) in Å."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    table = Chem.GetPeriodicTable()
    return Chem, Chem.MolFromSmarts(ROTATABLE), np.array([table.GetRcovalent(z) for z in range(119)])


def unbroken(mol, z, pos):
    """Is no bond of mol too long in this geometry, z (n,), pos (n, 3)?"""
    i, j = np.array([(b.GetBeginAtomIdx(), b.GetEndAtomIdx()) for b in mol.GetBonds()], np.int64).reshape(-1, 2).T
    radius = chemistry()[2][z]  # (n,)
    return (np.linalg.norm(pos[i] - pos[j], axis=1) < LONGEST * (radius[i] + radius[j])).all()


def fitting(_, z, pos, mol):
    """mol, if it has these elements in this order and no bond too long in this geometry."""
    same = mol is not None and [atom.GetAtomicNum() for atom in mol.GetAtoms()] == z.tolist()
    return mol if same and unbroken(mol, z, pos) else None


def from_smiles(smiles, z, pos):
    """QM9: the atoms of SMILES, then their hydrogens, have the file's order but for 0.3 %."""
    Chem, *_ = chemistry()
    mol = Chem.MolFromSmiles(smiles)
    return fitting(None, z, pos, mol and Chem.AddHs(mol))


def from_sdf(block, z, pos):
    """Unsanitized, as the converter reads it."""
    mol = chemistry()[0].MolFromMolBlock(block, sanitize=False, removeHs=False, strictParsing=False)
    mol = fitting(None, z, pos, mol)
    return mol if mol and np.abs(mol.GetConformer().GetPositions() - pos).max() < SAME else None


def from_geometry(_, z, pos):
    """RDKit connects the dots, then finds the bond orders of a neutral molecule.

    Against the bonds of QM9's SMILES it fails for 4.5 % of the molecules, strained cages, and
    agrees on the rest. Of 7,449 drug-like ones in an SDF it gives 2 % other rotors: sulfur and
    phosphorus get double bonds that they lack.
    """
    from rdkit.Chem import rdDetermineBonds

    Chem, *_ = chemistry()
    mol, place = Chem.RWMol(), Chem.Conformer(len(z))
    for number in z.tolist():
        mol.AddAtom(Chem.Atom(number))
    place.SetPositions(pos)
    mol.AddConformer(place)
    try:
        rdDetermineBonds.DetermineBonds(mol, charge=0, embedChiral=False)
    except (ValueError, RuntimeError):
        return None
    return mol


# ---------------------------------------------------------------- rotors


def rotors(mol):
    """A molecule of RDKit, whose bonds alone count -> bond (R, 2), fragment (n,), both uint16.

    Without the rotatable bonds it falls into rigid pieces. They form a tree, or one for each part
    of the molecule. Which piece is the root is free: it is the largest. Rotors are numbered breadth
    first, so that the one that a rotor hangs on has a lower number.
    """
    Chem, rotatable, _ = chemistry()
    Chem.FastFindRings(mol)
    rigid, across = Chem.RWMol(mol), {}
    for i, j in mol.GetSubstructMatches(rotatable, maxMatches=1_000_000):
        rigid.RemoveBond(i, j)
        across.setdefault(i, []).append(j)
        across.setdefault(j, []).append(i)
    pieces = sorted(map(sorted, Chem.GetMolFrags(rigid)), key=lambda piece: (-len(piece), piece[0]))
    piece_of = {atom: piece for piece in pieces for atom in piece}
    bond, fragment = [], {}
    for root in pieces:  # the largest of each part comes first, the others are then reached from it
        todo = [] if root[0] in fragment else [root]
        fragment = dict.fromkeys(todo[0], 0) | fragment if todo else fragment
        for piece in todo:  # which grows
            for j in piece:
                for k in sorted(across.get(j, ())):
                    if k not in fragment:
                        bond.append((j, k))
                        todo.append(piece_of[k])
                        fragment |= dict.fromkeys(piece_of[k], len(bond))
    return np.array(bond, np.uint16).reshape(-1, 2), np.array([fragment[a] for a in range(len(fragment))], np.uint16)


def search(items, bonds_of):
    """[(m, text, z, pos)] -> [(m, its rotors, or None where the bonds are not known)]."""
    mols = [(m, bonds_of(text, z, pos)) for m, text, z, pos in items]
    return [(m, mol and rotors(mol)) for m, mol in mols]


# ---------------------------------------------------------------- all molecules of a file


def sdf_texts(raw):
    """(id, block) under both ids a converter may give: its place, the number ending its title."""
    files = (part for name, part in files_in(raw) if name.endswith(".sdf") or ".tar" not in raw.suffixes)
    for place, block in enumerate(block for part in files for block in sdf_blocks(part)):
        title = re.search(r"(?<!\d)\d{1,18}$", block.partition("\n")[0].strip())  # 17, gdb_17
        for key in {place, int(title[0]) if title else place}:
            yield key, block


def texts(raw):
    """(id, text) of each molecule of RAW, what makes bonds of a text, and the name of the texts."""
    if raw.suffix == ".whl":
        rows = qm9_rows(raw, ("Index", "SMILES"))
        return ((int(row["Index"]), row["SMILES"]) for row in rows), from_smiles, "SMILES"
    if {".sdf", ".tar"} & set(raw.suffixes):
        return sdf_texts(raw), from_sdf, "SDF"
    raise InputError(f"{raw}: bonds are read from .sdf(.gz), .sdf.tar.gz or qm9pack-*.whl", code=2)


def find_all(file, raw):
    """The datasets of an open file, the number of rotors (M,), -1: unknown, {origin of bonds: count}."""
    z, ptr, ids = (file[name][:] for name in ("z", "ptr", "id"))
    bond, fragment = np.zeros((len(z), 2), np.uint16), np.zeros(len(z), np.uint16)  # bond: molecule m's from ptr[m] on
    number, origins, sizes = np.full(len(ids), -1), {}, np.diff(ptr)

    def atoms(m):
        return z[ptr[m] : ptr[m + 1]], file["pos"][ptr[m] : ptr[m + 1]].astype(np.float64)

    def fill(origin, bonds_of, pairs):
        items = ((m, text, *atoms(m)) for m, text in pairs)
        for m, found in parallel(partial(search, bonds_of=bonds_of), items):
            if found and number[m] < 0:
                number[m], origins[origin] = len(found[0]), origins.get(origin, 0) + 1
                bond[ptr[m] : ptr[m] + number[m]], fragment[ptr[m] : ptr[m + 1]] = found

    def rest():
        return [(m, None) for m in np.flatnonzero(number < 0).tolist()]

    if raw:
        (stream, bonds_of, kind), place = texts(raw), dict(zip(ids.tolist(), range(len(ids))))
        with readable(raw):
            fill(f"the {kind} of {raw.name}", bonds_of, ((place[key], text) for key, text in stream if key in place))
        if not origins:
            raise InputError(f"{raw}: none of its molecules is in {file.filename}, by id, elements and geometry")
    if (sizes == sizes[0]).all() and (z.reshape(-1, sizes[0]) == z[: sizes[0]]).all():  # a trajectory
        fill("the geometry of the first", partial(fitting, mol=from_geometry(None, *atoms(0))), rest())
    fill("their own geometry", from_geometry, rest())
    known = np.maximum(number, 0)
    first = np.concatenate([[0], np.cumsum(known)])  # (M+1,)
    rows = np.arange(first[-1]) + np.repeat(ptr[:-1] - first[:-1], known)  # (R,)
    return {"rotor/ptr": first, "rotor/bond": bond[rows], "rotor/fragment": fragment}, number, origins


def add_rotors(path, out, raw=None):
    """python data.py rotors FILE.h5 [RAW] OUT.h5"""
    path, out, raw, begun = Path(path), Path(out), raw and Path(raw), time.perf_counter()
    check_new(out, kinds=(".h5",))
    check_file(path, "convert one with `python data.py SOURCE RAW OUT.h5`")
    if raw:
        check_file(raw, "download it first")
    need("rdkit.Chem", "finding rotors")
    attrs = read_contents(path).attrs
    with explain(f"{path}: damaged, convert it again", *FOREIGN), h5py.File(path, "r") as file:
        if "rotor" in file:
            raise InputError(f"{path} has rotors already: take the file that it was made from")
        if not (file["z"][:] == 1).any():
            raise InputError(f"{path} has no hydrogen: rotors are found where all atoms are there")
        ids, (columns, number, origins) = file["id"][:], find_all(file, raw)
    command = ["python data.py rotors", path.name, *([raw.name] if raw else []), out.name]
    try:
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
            shutil.copyfile(path, f"{folder}/out.h5")
            with h5py.File(f"{folder}/out.h5", "r+") as file:
                file.attrs["command"] = f"{attrs.get('command', '')}\n{' '.join(command)}".strip()
                for name, values in columns.items():
                    file[name] = values
            os.replace(f"{folder}/out.h5", out)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{out}: cannot be written ({getattr(error, 'strerror', None) or error})") from error
    print(f"{out}: {len(columns['rotor/bond']):,} rotors, in {time.perf_counter() - begun:.1f} s")
    print(f"  {(number > 0).sum():,} of {len(ids):,} molecules have some, at most {number.max()}")
    for origin, count in origins.items():
        print(f"  bonds of {count:,} from {origin}")
    unknown = ids[number < 0].tolist()
    some = f", so no rotors (id {', '.join(map(str, unknown[:5]))}{', ...' * (len(unknown) > 5)})" if unknown else ""
    print(f"  bonds of {len(unknown):,} not known{some}")
