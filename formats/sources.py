"""Raw files of each source -> molecules, one after another.

A molecule on its way is a dict: id, z (n,), pos (n, 3) Å, labels {dataset: value}, split (names), tags {name: number}
for labels= to choose from, notes (texts) to count and print. One that cannot be used is {id, skip: cause}.
"""

import bz2
import csv
import gzip
import io
import itertools
import lzma
import math
import os
import re
import tarfile
import zipfile
import zlib
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np

from harness.errors import FOREIGN, InputError, explain, need
from harness.ranks import follow_parent

HAR2EV = 27.211386246  # eV per Hartree
SYMBOLS = """X H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Y
Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au
Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"""
NUMBER = re.compile(r"\s*[-+]?((\d+\.?\d*|\.\d+)((e|d|\*\^)[-+]?\d+)?|inf|infinity)\s*", re.I)
SDF_TAG = re.compile(r"^>[^<\n]*<\s*(.+?)\s*>[^>\n]*\n((?:[^>\n].*\n?)*)", re.M)  # name, value
CHARGED = "charged: neither the file nor the network keeps the charge"
ATOMIC_NUMBER = {symbol: z for z, symbol in enumerate(SYMBOLS.split())}
# name and unit here, column in qm9pack (sic); in the order of the xyz comment line
QM9_LABELS = """A GHz RotA_GHz, B GHz RotB_GHz, C GHz RotC_GHz, mu D Dipole_debye,
alpha a0^3 Polarizability_bohr3, homo eV HOMO_au, lumo eV LUMO_au, gap eV HOMO_LUMO_gap_au,
r2 a0^2 R2_bohr2, zpve eV ZPVE_au, U0 eV InternalEnergy_0K_au, U eV InternalEnergy_298K_au,
H eV Enthalphy_298K_au, G eV GibbsFreeEnergy_298K_au, Cv cal/mol/K Heatcapacity_Cv_cal_mol_K"""
QM9_LABELS = [label.split() for label in QM9_LABELS.split(",")]


# ---------------------------------------------------------------- containers


def readable(*paths):
    """Turn any error while reading raw files into one line that names them."""
    kinds = (*FOREIGN, csv.Error, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile)
    return explain(f"{' '.join(map(str, paths))}: damaged, cut off or not the right kind of file", *kinds)


def open_raw(path):
    """Open a plain, .gz, .bz2 or .xz file for reading bytes; the first bytes tell which."""
    with open(path, "rb") as file:
        magic = file.read(6)
    openers = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}
    return next((opener for k, opener in openers.items() if magic.startswith(k)), open)(path, "rb")


def files_in(path):
    """(name, file object) of each file of a tar archive, in one pass; of another file itself."""
    if ".tar" not in path.suffixes:
        with open_raw(path) as file:
            yield path.name, file
        return
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


def parallel(function, items, chunk=256):
    """Results of function(list of items) -> list, over all cores; in order, with few chunks in flight at a time."""
    items = iter(items)
    chunks = iter(lambda: list(itertools.islice(items, chunk)), [])
    first = next(chunks, [])
    if len(first) < chunk:
        yield from function(first)
        return
    with ProcessPoolExecutor(initializer=follow_parent) as pool:
        pending = deque()
        for piece in itertools.chain([first], chunks):
            pending.append(pool.submit(function, piece))
            if len(pending) > 2 * os.cpu_count():
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


# ---------------------------------------------------------------- one molecule


def number(text):
    """A float as Python, Mathematica or Fortran write it: 1.5e-6, 1.5*^-6, 1.5D-6."""
    return float(re.sub(r"\*\^|[dD]", "e", text))


def numbers(said):
    """{name: value} -> {name: float} of values that are one number; True and arrays are none."""
    return {name: number(str(v)) for name, v in said.items() if NUMBER.fullmatch(str(v))}


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


def parse_sdf(items, titled):
    """[(id, SDF block)] -> molecules with hydrogens; titled: a title that is a number is the id."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    molecules, bonds = [], b""
    for key, block in items:
        title, before = block.partition("\n")[0].strip(), bonds
        key = int(title) if titled and re.fullmatch(r"\d{1,18}", title) else key
        # Unsanitized: charges and valences do not matter here, and RDKit's opinion of them would cost molecules.
        mol = Chem.MolFromMolBlock(block, sanitize=False, removeHs=False, strictParsing=False)
        if mol is None:
            molecules.append({"id": key, "skip": "not readable by RDKit"})
        elif mol.GetNumAtoms() > 1 and not mol.GetConformer().Is3D():
            molecules.append({"id": key, "skip": "flat and not marked 3D: a drawing, no geometry"})
        else:
            z = np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)
            pos = mol.GetConformer().GetPositions() if len(z) else np.zeros((0, 3))
            tags = SDF_TAG.findall(block)
            said = {name: text for name, text in tags if sum(name == other for other, _ in tags) == 1}
            notes = {f"not read: {name}" for name, text in said.items() if re.match(r"\s*[-+.\d]", text)}
            notes |= {f"not read: {name}, given more than once" for name in dict(tags).keys() - said.keys()}
            mol.UpdatePropertyCache(strict=False)
            free = any(atom.GetNumImplicitHs() for atom in mol.GetAtoms())
            notes |= {"an atom with a free valence: are hydrogens left out?"} if free else set()
            notes |= {CHARGED} if Chem.GetFormalCharge(mol) else set()
            bonds = z.tobytes() + Chem.GetAdjacencyMatrix(mol).tobytes()
            again = bonds == before and len(z) > 3
            notes |= {"atoms and bonds of the one before: conformers? A random split parts them"} if again else set()
            molecules.append({"id": key, "z": z, "pos": pos, "labels": {}, "tags": numbers(said), "notes": notes})
    return molecules


# ---------------------------------------------------------------- data sets


def qm9_labels(values):
    """The 15 numbers of QM9's comment line (Hartree) -> {y/<name>: value}, units of QM9_LABELS"""
    pairs = zip(QM9_LABELS, values, strict=True)
    return {f"y/{name}": v * (HAR2EV if unit == "eV" else 1) for (name, unit, _), v in pairs}


def qm9_rows(raw, columns):
    """Rows of the tables in qm9pack's wheel, {column: text}; these columns must be there."""
    with zipfile.ZipFile(raw) as wheel:
        members = sorted(name for name in wheel.namelist() if re.search(r"qm9_part\d+\.csv$", name))
        for member in members:
            with io.TextIOWrapper(wheel.open(member), newline="") as file:
                rows = csv.DictReader(file)
                if missing := {*columns} - set(rows.fieldnames or ()):
                    raise InputError(f"{raw}/{member}: no column {', '.join(sorted(missing))}: is it the right file?")
                yield from rows


def read_qm9_wheel(raw):
    columns = [column for *_, column in QM9_LABELS]
    for row in qm9_rows(raw, ("Index", "Elements", "XYZ_Ang", *columns)):
        symbols = re.findall("[A-Za-z]+", row["Elements"])  # ['C', ...] and [[x, y, z], ...]
        triples = row["XYZ_Ang"].strip("[]").split("],[")
        z, pos = xyz_atoms([[s, *triple.split(",")] for s, triple in zip(symbols, triples, strict=True)])
        labels = qm9_labels([number(row[column]) for column in columns])
        yield {"id": int(row["Index"]), "z": z, "pos": pos, "labels": labels}


def read_qm9_tar(raw):
    for name, file in files_in(raw):
        if name.endswith(".xyz"):
            lines = file.read().decode().splitlines()
            with explain(f"{raw}: {name} is not an xyz file of QM9", ValueError, IndexError):
                num, (tag, key, *values) = int(lines[0]), lines[1].split()
                if tag != "gdb" or len(lines) != num + 5:  # frequencies, SMILES and InChI follow the atoms
                    raise ValueError("no `gdb` line, or another number of atoms than the first line says")
                z, pos = xyz_atoms([line.split() for line in lines[2 : num + 2]])
                labels = qm9_labels([number(text) for text in values])
            yield {"id": int(key), "z": z, "pos": pos, "labels": labels}


def read_qm9(*raws):
    """The wheel of qm9pack or the archive of xyz files and, if given, the list of molecules to leave out."""
    lists = [raw for raw in raws if raw.suffix == ".txt"]  # molecules to leave out: lines that start with a number
    dropped = {int(n) for raw in lists for n in re.findall(r"^\s*(\d+)(?!\S)", raw.read_text(), re.M)}
    if lists and not dropped:
        raise InputError(f"{lists[0]}: no line starts with the number of a molecule: is it uncharacterized.txt?")
    rest = [raw for raw in raws if raw.suffix != ".txt"]
    if [raw.suffix for raw in rest] == [".whl"]:
        molecules = read_qm9_wheel(*rest)
    elif len(rest) == 1 and ".tar" in rest[0].suffixes:
        molecules = read_qm9_tar(*rest)
    else:
        takes = "qm9 takes qm9pack-*.whl or dsgdb9nsd.xyz.tar.bz2, and beside it uncharacterized.txt if you have it"
        raise InputError(f"{takes}; got {' '.join(raw.name for raw in raws)}", code=2)
    for mol in molecules:
        yield {"id": mol["id"], "skip": "on the list of uncharacterized molecules"} if mol["id"] in dropped else mol


def read_pcqm4mv2(raw):
    """The SDF or its tar.gz (id: place in the file, OGB's index), or the zip of xyz files (id: name)."""
    if raw.suffix != ".zip":
        yield from read_sdf(raw, titled=False)
        return
    with zipfile.ZipFile(raw) as archive:
        names = [(Path(name).stem, name) for name in archive.namelist() if name.endswith(".xyz")]
        strange = {"skip": "the file's name is no number"}
        yield from (strange | {"id": k} for k, (stem, _) in enumerate(names) if not stem.isdecimal())
        names = sorted((int(stem), name) for stem, name in names if stem.isdecimal())
        yield from parallel(parse_xyz, ((key, archive.read(name)) for key, name in names))


def read_sdf(raw, titled=True):
    """An SDF, compressed or in a tar, too; id: a title that is a number, else the place in it."""
    need("rdkit.Chem", "reading SDF")
    files = (file for name, file in files_in(raw) if name.endswith(".sdf") or ".tar" not in raw.suffixes)
    blocks = (block for file in files for block in sdf_blocks(file))
    yield from parallel(partial(parse_sdf, titled=titled), enumerate(blocks))


KCAL = {"energy": "kcal/mol", "forces": "kcal/mol/angstrom"}
EV = {"energy": "eV", "forces": "eV/angstrom"}
LABEL = re.compile(r"energ|force|gradient|dipole|gap|homo|lumo|^[ef]$", re.I)  # names that look like labels
# quantities that are not read; units that stand alone as a word of a comment line; units in a text, SPOKEN
NOT_READ = re.compile("time|temp|mass|charge|stress|press|virial|dipole|moment|veloc|step|predicted")
LONE_UNITS = re.compile(r"hartrees?|eh|e_h|ha|bohrs?|kcal|kcal/mol|kj|kj/mol|ry|rydberg|mev|au|a\.u\.|nm|pm", re.I)
NAME = re.compile("name|title|config|method|theory", re.I)  # a molecule may be called bohr
CELL = re.compile(r"(lattice|cell)(\(abc.*)?", re.I)  # under other names than ase's
SPOKEN = re.compile(r"(?<![\w-])(hartrees?|bohrs?|kcal/mol|kcal|kj/mol|kj|rydberg|mev|nm|a\.u\.)(?![\w-])", re.I)


def check_units(stated, energy, where):
    """Refuse other units than energy and angstrom, under whatever key: stated {key: value}."""
    claims = {key: value for key, value in stated.items() if "unit" in key.lower()}
    claims |= {key: key.lower() for key in stated if LONE_UNITS.fullmatch(key)}
    claims |= {key: m[1] for key in stated if (m := re.fullmatch(r"(?:positions|cell)(\w+)", key))}  # i-PI, without {}
    texts = {key: f"{key} {value}" for key, value in stated.items() if key not in claims and not NAME.search(key)}
    claims |= {key: ",".join(units) for key, text in texts.items() if (units := SPOKEN.findall(text))}
    for key, value in claims.items():
        said = re.sub(r"[][{}\"']", "", str(np.ravel(value).tolist()))  # one or several
        for name, _, text in (entry.rpartition(":") for entry in re.split("[,;]", said)):
            unit = re.sub(r"(mol|angstrom|ang|å|a)\^?-1", r"/\1", re.sub(r"[\s*]+", "", str(text).lower()))
            unit = re.sub(r"(^|/)(angstroms?|ångströms?|angs?t?\.?|å|a)$", r"\1angstrom", unit)
            fits = unit in (energy.lower(), "angstrom", f"{energy.lower()}/angstrom")
            if not fits and not NOT_READ.search(f"{key} {name}".lower()):
                told = f"{where}: its {key} says {text.strip()}"
                raise InputError(f"{told}: convert the numbers to {energy} and angstrom first")


def read_npz(raw, keys, index=None):
    """Frames of one molecule; keys of z (n,), pos (T, n, 3), energy (T,) or (T, 1), forces (T, n, 3), and ids (T,)."""
    if not zipfile.is_zipfile(raw):
        raise InputError(f"{raw}: not an npz file, or cut off")
    with np.load(raw, allow_pickle=False) as arrays:
        if missing := [key for key in (*keys, index) if key and key not in arrays]:
            raise InputError(f"{raw}: no {', '.join(missing)} among its arrays {', '.join(arrays)}: wrong SOURCE?")
        check_units({key: arrays[key].astype(str) for key in arrays if "unit" in key.lower()}, "kcal/mol", raw)
        if periodic := {key for key in arrays if key.lower() in ("lattice", "cell", "pbc") and arrays[key].any()}:
            raise InputError(f"{raw}: has a {min(periodic)}: periodic systems are no molecules")
        notes = {f"not read: {key}" for key in arrays if LABEL.search(key) and key not in keys}
        z, pos, energy, forces = (arrays[key] for key in keys)
        ids = arrays[index] if index else np.arange(len(pos))
        columns, one_each = {}, ((len(ids),), (len(ids), 1))
        for key in set(arrays) - {*keys}:
            with suppress(ValueError):  # of objects
                columns[key] = arrays[key]
    check_units({k: a.astype(str) for k, a in columns.items() if a.dtype.kind in "US"}, "kcal/mol", raw)
    columns = {k: a.ravel() for k, a in columns.items() if a.shape in one_each and a.dtype.kind in "iuf"}
    shapes = z.ndim == 1 and pos.shape == forces.shape == (len(ids), len(z), 3)
    if not shapes or energy.shape not in one_each:
        said = ", ".join(f"{key} {a.shape}" for key, a in zip(keys, (z, pos, energy, forces)))
        raise InputError(f"{raw}: shapes that do not fit each other: {said}")
    if z.dtype.kind not in "iu" or any(values.dtype.kind not in "iuf" for values in (pos, energy, forces, ids)):
        raise InputError(f"{raw}: atomic numbers must be integers, and all else numbers")
    if not (np.abs(ids) < 2**63).all() or (ids % 1).any():
        raise InputError(f"{raw}: {index} must be whole numbers")
    for k, key in enumerate(ids):
        tags = {name: float(a[k]) for name, a in columns.items() if not np.isnan(a[k])}
        mol = {"id": int(key), "z": z.astype(np.int64), "pos": pos[k], "notes": notes, "tags": tags}
        yield mol | {"labels": {"energy": float(energy.flat[k]), "forces": forces[k]}}


def xyz_labels(where, atoms, levels, forces):
    """-> labels, notes and tags of the frame where; an InputError if labels are not clear.

    levels: the set of those that the frames so far had, REF_ or plain; a data set is of one. forces: has it any.
    """
    stated, plain = atoms.info | atoms.arrays, dict(atoms.calc.results if atoms.calc else {})
    known = {k.removeprefix("REF_"): v for k, v in stated.items() if k in ("REF_energy", "REF_forces")}
    found = {name: value for name, value in (plain | known).items() if name in EV}
    levels |= {"REF_"} if known else {"plain"} if found else set()
    if len(levels) > 1 or known and known.keys() != found.keys():
        raise InputError(f"{where} has labels under REF_ and others without it: are they of one level? Keep one")
    if isinstance(found.get("energy"), (bool, np.bool_)):
        raise InputError(f"{where}: its energy is {found['energy']}")
    labels = {name: float(v) if name == "energy" else np.asarray(v, dtype=np.float64) for name, v in found.items()}
    read = {f"REF_{name}" for name in EV} if known else EV.keys()
    notes = {f"not read: {name}" for name in stated | plain if LABEL.search(name) and name not in read}
    if forces and len(atoms) == 1 and labels.keys() == {"energy"}:
        labels["forces"] = np.zeros((1, 3))
        notes |= {"force on a lone atom set to 0"}
    tags = numbers({name: v for name, v in (atoms.info | plain).items() if not np.ndim(v)})
    notes |= {CHARGED for name, value in tags.items() if re.fullmatch("(total_?)?charge", name, re.I) and value}
    return {"labels": labels, "notes": notes, "tags": tags}


def read_xyz(raw, levels=None):
    """Extended xyz, eV and eV/Å; labels are optional. levels: as in xyz_labels, None: labels are not read."""
    ase = need("ase.io", "reading extended xyz")
    with open_raw(raw) as file:
        forces = levels is not None and any(re.search(rb":(REF_)?forces:R:3", line) for line in file)
    with io.TextIOWrapper(open_raw(raw)) as file, explain(f"{raw}: name atoms by symbols such as O", KeyError):
        for key, atoms in enumerate(ase.iread(file, index=":", format="extxyz")):
            if atoms.pbc.any() or any(map(CELL.fullmatch, atoms.info)):
                yield {"id": key, "skip": "periodic: not a molecule"}
                continue
            check_units(atoms.info, "eV", where := f"{raw}: frame {key}")
            labels = xyz_labels(where, atoms, levels, forces) if levels is not None else {"labels": {}}
            yield {"id": key, "z": atoms.numbers, "pos": atoms.positions, "atoms": atoms} | labels
        if any(line.strip() for line in file):  # ase stops at a blank line
            raise ValueError("a blank line between molecules: remove it")


SOURCES = {  # reader of one raw file (qm9: of all of them), units of its labels
    "qm9": (read_qm9, {f"y/{name}": unit for name, unit, *_ in QM9_LABELS}),
    "pcqm4mv2": (read_pcqm4mv2, {}),
    "sdf": (read_sdf, {}),
    "md17": (partial(read_npz, keys="zREF"), KCAL),
    "rmd17": (partial(read_npz, keys=("nuclear_charges", "coords", "energies", "forces"), index="old_indices"), KCAL),
    "md22": (partial(read_npz, keys="zREF"), KCAL),
    "xyz": (read_xyz, EV),
}
CREDIT = {  # name, license, attribution
    "qm9": ("QM9", "CC0 1.0", "R. Ramakrishnan, P. O. Dral, M. Rupp, O. A. von Lilienfeld, Sci. Data 1, 140022 (2014)"),
    "pcqm4mv2": ("PCQM4Mv2", "CC BY 4.0", "W. Hu et al., OGB-LSC, arXiv:2103.09430 (2021), from PubChemQC"),
    "md17": ("MD17", "not stated", "S. Chmiela et al., Sci. Adv. 3, e1603015 (2017)"),
    "rmd17": ("rMD17", "CC0 1.0", "A. S. Christensen, O. A. von Lilienfeld, MLST 1, 045018 (2020)"),
    "md22": ("MD22", "not stated", "S. Chmiela et al., Sci. Adv. 9, eadf0873 (2023)"),
}


def stem(path):
    """md17_aspirin.npz -> md17_aspirin, DFT.sdf.gz -> DFT."""
    return Path(re.sub(r"\.(gz|bz2|xz)$", "", path.name)).stem


def parse_labels(text):
    """labels=NAME:UNIT,NAME:UNIT -> {dataset: (name, unit)}; a slash in a name would part it in HDF5."""
    entries = [entry.rpartition(":") for entry in text.removeprefix("labels=").split(",") if text]
    pairs = [(name.strip(), unit.strip()) for name, _, unit in entries]
    asked = {f"y/{name.replace('/', '_')}": (name, unit) for name, unit in pairs}
    sound = [n.strip(".") and u and (n + u).isprintable() and len(n + u) < 200 and "=" not in u for n, u in pairs]
    if len(asked) < len(pairs) or not all(sound):
        raise InputError(f"{text[:200]!r}: write labels=NAME:UNIT,NAME:UNIT, each name once", code=2)
    both = [(n, {u, re.sub(r"^(?:log|ln)\w*(?: (.+)|\((.+)\))$", r"\1\2", u)}) for n, u in pairs]  # log mol/L, mol/L
    if told := [f"{n} says {m[1]}" for n, u in both if (m := re.search(r"(?:\[|\B\()(.+)[\])]$", n)) and m[1] not in u]:
        raise InputError(f"{text}: the name {told[0]}: write that as its unit", code=2)
    if taken := asked.keys() & {f"y/{name}" for name in EV}:
        raise InputError(f"{text}: {min(taken)[2:]} is a dataset of its own: name it otherwise", code=2)
    return asked


def with_labels(molecules, asked):
    """Molecules with the tags asked for as labels, NaN where there is none; a name that none has is refused."""
    there, read = set(), {f"not read: {name}" for name, _ in asked.values()}
    for mol in molecules:
        tags, labels = mol.get("tags", {}), mol.get("labels", {})
        there |= tags.keys()
        labels |= {dataset: tags.get(name, math.nan) for dataset, (name, _) in asked.items()}
        yield mol | {"labels": labels, "notes": {*mol.get("notes", ())} - read}
    if missing := [name for name, _ in asked.values() if name not in there]:
        known = ", ".join(sorted(there - {"energy", "REF_energy"})) or "none"
        raise InputError(f"labels: no number is named {missing[0]}; there are: {known}", code=2)


def read_source(source, raws):
    """Every molecule of the raw files, in order; several files become named splits."""
    read, levels = SOURCES[source][0], {"levels": set()} if source == "xyz" else {}
    for group in [raws] if source == "qm9" else [[raw] for raw in raws]:
        molecule = None
        with readable(*group):
            for molecule in read(*group, **levels):
                yield molecule | {"split": (stem(group[0]),)} if len(group) < len(raws) else molecule
        if molecule is None:
            raise InputError(f"{' '.join(map(str, group))}: no molecules inside: is it the right file, and whole?")


def credit(source, raws):
    """Name, license and attribution of a set, for files that still have its name."""
    stems = " ".join(stem(raw) for raw in raws)
    if source not in CREDIT or ("md" in source and not all(raw.name.startswith(source) for raw in raws)):
        return {"name": stems}
    name, license_, attribution = CREDIT[source]
    if raws[0].suffix == ".whl":
        license_, attribution = f"{license_} (qm9pack: MIT)", f"{attribution}; via {' '.join(stems.split('-')[:2])}"
    return {"name": f"{name}: {stems}" if "md" in source else name, "license": license_, "attribution": attribution}
