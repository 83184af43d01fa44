"""Molecules from SMILES: a csv of MoleculeNet or of your own, conformers and a scaffold split.

    python data.py molnet FILE.csv OUT.h5 "labels=NAME:UNIT,..." [smiles=COLUMN] [conformers=1] [seed=0]
    FILE.csv: a header, a column of SMILES, columns of numbers; also .tsv, with semicolons, .gz
    smiles=: without it the column of that name, or the only one with SMILES in its name

RDKit embeds each molecule (ETKDGv3) and relaxes it (MMFF94; UFF where that lacks parameters). The
result depends on seed and RDKit's version alone. Conformer k has the seed `seed + k`, so that the
first of ten is that of a file with one. With conformers=N a molecule is up to N neighbouring rows
with the same id, and the file has the attribute conformers.

The id is the row of the csv: the first below the header is 0. The splits train, val and test are
80, 10 and 10 % of the molecules. Molecules with the same scaffold are in the same split.
"""

import codecs
import csv
import io
import re
import shlex
from array import array
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

import h5py
import numpy as np
from tqdm import tqdm

from beyond.rotors import unbroken
from formats.sources import NUMBER, numbers, open_raw, parallel, parse_labels, readable, stem, with_labels
from formats.write import save
from harness.errors import InputError, explain, need, one_line
from harness.files import check_file, check_new, sha256

USAGE = "python data.py molnet FILE.csv OUT.h5 labels=NAME:UNIT,... [smiles=NAME] [conformers=1] [seed=0]"
KEYS = "smiles labels conformers seed"
KEY = re.compile(rf"(?:^|\s)({KEYS.replace(' ', '|')})=")
# columns, also as `Standard Units`, that say for each row what its numbers are
OF_ROWS = {"unit", "units", "relation", "standard unit", "standard units"}
OF_ROWS |= {"standard type", "standard relation"}
SPLITS = ("train", "val", "test")
NO_SPLIT = "none, a part would be empty; give finetune.py train_size, val_size or test_size"
STEPS = 2000  # of the force field. After RDKit's 200 two of three drug-like molecules still move
MAX_ATOMS = 400  # Uni-Mol's limit, too. A chain of 300 takes two minutes


# ---------------------------------------------------------------- the table


def table(path):
    """Rows of a csv as lists of texts, the header first. Blank lines are no rows.

    A quote that is not closed would make one cell of all that follows, so a cell of several rows
    is refused.
    """
    with readable(path):
        with open_raw(path) as file:
            head = file.read(1 << 16)
        wide = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)  # Excel's "Unicode text"
        if b"\0" in head and not wide:
            raise InputError(f"{path}: not a text file: export the table as csv")
        encoding = "utf-16" if wide else "utf-8-sig"
        lines = head.decode(encoding, "replace").splitlines()
        first = re.sub('"[^"]*"', "", next(filter(str.strip, lines), ""))
        with io.TextIOWrapper(open_raw(path), encoding, "replace", newline="") as file:
            delimiter = max(",;\t", key=first.count)
            lines = csv.reader(file, delimiter=delimiter, strict=True)
            try:
                for row in lines:
                    if any("\n" in cell and delimiter in cell for cell in row):
                        raise csv.Error(f"a cell with a line break and a {delimiter!r} inside")
                    if row:
                        yield [cell.strip() for cell in row]
            except csv.Error as error:
                told = f"{path}: line {lines.line_num}: {error}"
                raise InputError(f"{told}: is a quote open before it? Remove it") from None


def find_columns(path, smiles, names):
    """Places of the column of SMILES and of those called names, and which of them stand twice.

    A name that stands twice is the first such column, as pandas reads it. QM8 has its four PBE0
    columns twice, with two basis sets; the literature takes the first.
    """
    header = next(table(path), [])
    if not header:
        raise InputError(f"{path}: no header, a first row of names", code=2)
    there = ", ".join(header[:40]) + ", ..." * (len(header) > 40)
    if not names:
        raise InputError(f"{path}: which numbers? labels=NAME:UNIT,... of its columns: {there}", code=2)
    if not smiles:
        alike = {name for name in header if name.lower() == "smiles"}
        alike = alike or {name for name in header if "smiles" in name.lower()}
        if len(alike) > 1:
            told = f"{path}: which column has the SMILES, {' or '.join(sorted(alike))}?"
            raise InputError(f"{told} Call it smiles, or name it with smiles= of data.py", code=2)
        smiles = min(alike, default="smiles")
    for name in (smiles, *names):
        if name not in header:
            end = ". Its letters are not UTF-8: save it as such" * ("\ufffd" in there)
            raise InputError(f"{path}: no column {name!r}; there are: {there}{end}", code=2)
    counts = {name: header.count(name) for name in (smiles, *names)}
    twice = [f"column {name} stands {n} times: the first was read" for name, n in counts.items() if n > 1]
    return len(header), header.index(smiles), {name: header.index(name) for name in names}, twice


def check_kinds(path, columns, asked):
    """-> notes; refuses a table whose column says that numbers are bounds, or of several units."""
    (width, smiles, labels), header, notes = columns, next(table(path)), []
    kinds = [name.lower().replace("_", " ") for name in header]
    for place, (name, kind) in enumerate(zip(header, kinds)):
        if kind not in OF_ROWS or f"standard {kind}" in kinds and "value" not in labels:  # ChEMBL's API has both
            continue
        rows = read_rows(path, width, smiles, labels | {name: place})
        known = [cells for *_, cells in rows if any(NUMBER.fullmatch(cells.get(n, "")) for n in labels)]
        said = {cells[name].strip("' ") for cells in known} - {""}
        told = f"column {name} has {', '.join(sorted(said)[:5])}"
        if "relation" in kind and said - {"="}:
            raise InputError(f"{path}: {told}: a bound is no label, keep the rows that have =")
        if len(said) > 1:
            raise InputError(f"{path}: {told}: bring all rows to one, or keep those of one")
        notes += [told] if "unit" in kind and said - {unit for _, unit in asked.values()} else []
    return notes


def read_rows(path, width, smiles, places):
    """(row, SMILES, {name: cell}) of each row; no SMILES (None) if it has more or fewer cells."""
    rows = table(path)
    next(rows)
    for key, row in enumerate(rows):
        whole = len(row) == width
        yield key, row[smiles] if whole else None, {name: row[k] for name, k in places.items()} if whole else {}


# ---------------------------------------------------------------- scaffolds


def parse(smiles):
    """-> (mol, ""), or (None, why it cannot be used)."""
    from rdkit import Chem, RDLogger

    RDLogger.DisableLog("rdApp.*")
    if smiles is None:
        return None, "more or fewer cells than the header"
    if not smiles:
        return None, "no SMILES"
    mol = Chem.MolFromSmiles(smiles)
    if mol is None:
        return None, "RDKit cannot read the SMILES"
    z = elements(mol)
    if (z == 0).any():
        return None, "an atom without an element, such as *"
    # QM7 has four, see shifted()
    return (mol, "") if (z > 1).any() else (None, "no atom but hydrogen")


def scaffolds(items):
    """[(row, SMILES, cells)] -> [(row, molecule, chiral Murcko scaffold, cells)]; None: no use.

    A molecule is its canonical SMILES without isotopes and atom maps, which no network sees.
    """
    from rdkit import Chem
    from rdkit.Chem.Scaffolds import MurckoScaffold

    found = []
    for key, smiles, cells in items:
        mol, _ = parse(smiles)
        for atom in mol.GetAtoms() if mol else ():
            atom.SetIsotope(0)
            atom.SetAtomMapNum(0)
        try:
            mol = mol and Chem.RemoveHs(mol)  # what was deuterium
            scaffold = mol and MurckoScaffold.MurckoScaffoldSmiles(mol=mol, includeChirality=True)
        except (RuntimeError, ValueError):
            scaffold = smiles  # RDKit finds none: a group of its own
        found.append((key, mol and Chem.MolToSmiles(mol), scaffold, cells))
    return found


def shifted(path, columns):
    """A note if this is MoleculeNet's QM7.

    Four of its SMILES are no molecule and have no label. So the labels from the first on belong to the
    molecule two rows below, and in the end to that four rows below.
    """
    hydrogens = [(key, smiles) for key, smiles, _ in read_rows(path, *columns) if smiles in ("[H]", "[HH].[HH]")]
    if [smiles for _, smiles in hydrogens] != ["[H]", "[HH].[HH]", "[HH].[HH]", "[HH].[HH]"]:
        return []
    told = f"from row {hydrogens[0][0] + 2} on the labels are those of other molecules, as in MoleculeNet's QM7"
    return [f"{told}: beyond/README.md says how to repair the csv"]


def split_scaffolds(groups):
    """{scaffold: [row]} -> {row: split}: the largest groups first, each whole where it still fits.

    PAPER-SILENT: the split of GEM, thought to be Uni-Mol's: 80, 10 and 10 %, with chirality.
    """
    num, split = sum(map(len, groups.values())), {}
    size = dict.fromkeys(SPLITS, 0)
    for rows in sorted(groups.values(), key=lambda rows: (len(rows), rows[0]), reverse=True):
        fits_train = 10 * (size["train"] + len(rows)) <= 8 * num
        fits_val = 10 * (size["train"] + size["val"] + len(rows)) <= 9 * num
        name = "train" if fits_train else "val" if fits_val else "test"
        size[name] += len(rows)
        split |= dict.fromkeys(rows, name)
    return split if all(size.values()) else {}


def survey(path, columns, asked):
    """Look through the table before hours of work -> {row: split}, notes. {}: a part would be empty."""
    groups, values = {}, {name: array("d") for name in columns[2]}
    whole = set()  # of each row: has it as many cells as the header?
    first, again = {}, ""  # the first row of each molecule; an example of a later one
    number, texts = Counter(), {}  # of cells that are no numbers, and the first of each column
    rows = tqdm(read_rows(path, *columns), unit=" rows", desc="scaffolds", disable=None)
    for key, molecule, scaffold, cells in parallel(scaffolds, rows):
        if scaffold is not None:
            groups.setdefault(scaffold, array("q")).append(key)
            if first.setdefault(molecule, key) != key:
                again = again or f"row {first[molecule]} in row {key}"
        whole.add(bool(cells))
        for name, cell in cells.items():
            values[name].extend(numbers({name: cell}).values())
            if not cell or NUMBER.fullmatch(cell):
                continue
            number[name] += 1
            texts.setdefault(name, f"such as {cell[:40]!r} in row {key}")
            if re.fullmatch(r"[-+−]?[\d.,]*\d[\d.,]*(e[-+−]?\d+)?", cell, re.I):
                told = f"{path}: row {key}: {name} is {cell!r}"
                raise InputError(f"{told}: write numbers with a decimal point and no other mark")
    if whole == {False}:
        told = f"{path}: no row has as many cells as the header, {columns[0]}"
        raise InputError(f"{told}: does a comma end each row?")
    for name, unit in asked.values():
        known = np.array(values[name])
        known = known[np.isfinite(known)]
        if len(known) == 0:
            found = f", but text {texts[name]}" if name in texts else ""
            raise InputError(f"{path}: column {name} has no number{found}", code=2)
        # DeepChem's freesolv.csv.gz is so: what a model learns of it has no unit that anyone knows
        if unit != "1" and len(known) > 9 and abs(known.mean()) < 0.02 and abs(known.std() - 1) < 0.02:
            told = f"{path}: {name} has mean {known.mean():.3f} and standard deviation {known.std():.3f}"
            told += f": standardised, so not in {unit}"
            raise InputError(f"{told}. Take the raw values, or write {name}:1")
    notes = [f"{name}: {n} of its cells are no numbers, {texts[name]}" for name, n in number.items()]
    for name, known in values.items():
        low, high = np.nanquantile(known, (0.25, 0.75))
        if high > low and (far := [one for one in known if abs(one - low) > 100 * (high - low)]):
            notes.append(
                f"{name}: {len(far)} of its numbers lie far from all others, such as {far[0]:g}: placeholders?"
            )
    if again:
        repeats = sum(map(len, groups.values())) - len(first)
        notes.append(f"{repeats} rows have a molecule that stood before, such as that of {again}")
    return split_scaffolds(groups), notes


# ---------------------------------------------------------------- conformers


def elements(mol):
    return np.array([atom.GetAtomicNum() for atom in mol.GetAtoms()], dtype=np.int64)  # (n,)


def gather(mol):
    """Put the parts of a salt or a hydrate in a row, 3 Å apart. RDKit leaves them in one place."""
    from rdkit import Chem

    parts = [list(part) for part in Chem.GetMolFrags(mol)]
    if len(parts) == 1:
        return
    place, start = mol.GetConformer(), 0.0
    pos = place.GetPositions()
    for part in parts:
        own = pos[part] - pos[part].mean(0)
        pos[part] = own + [start - own[:, 0].min(), 0, 0]
        start = pos[part][:, 0].max() + 3
    place.SetPositions(pos)


def relax(mol):
    """Relax the one conformer of mol in place -> a note, or ""."""
    from rdkit.Chem import rdForceFieldHelpers as force_fields

    # the parts of a salt must feel each other
    keys = {"maxIters": STEPS, "ignoreInterfragInteractions": False}
    moving = f", not at its minimum after {STEPS} steps"
    if (left := force_fields.MMFFOptimizeMolecule(mol, **keys)) >= 0:
        return f"MMFF94{moving}" if left else ""
    # an atom without parameters would get no forces, and UFF would say all the same that it is done
    if not force_fields.UFFHasAllMoleculeParams(mol):
        return "no force field has parameters: as embedded, not relaxed"
    return f"MMFF94 lacks parameters: relaxed by UFF{moving * force_fields.UFFOptimizeMolecule(mol, **keys)}"


def embed(mol, seed):
    """A copy of mol, which has its hydrogens, with a conformer -> copy, note; or None, why not.

    DEVIATION: Uni-Mol gives a molecule that does not embed flat coordinates. Here it is left out.
    """
    from rdkit.Chem import Mol
    from rdkit.Chem import rdDistGeom as geometry

    settings, mol = geometry.ETKDGv3(), Mol(mol)
    settings.randomSeed = seed
    found = geometry.EmbedMolecule(mol, settings)
    if found < 0:  # large rings and cages
        settings.useRandomCoords = True
        found = geometry.EmbedMolecule(mol, settings)
    if found < 0:
        return None, "RDKit finds no conformer"
    gather(mol)
    note = relax(mol)
    sound = unbroken(mol, elements(mol), mol.GetConformer().GetPositions())
    return (mol, note) if sound else (None, "the force field tears a bond apart")


def conformers(items, num, seed):
    """[(row, SMILES, cells)] -> molecules, up to num of each row, or one that says why not."""
    from rdkit import Chem

    molecules = []
    for key, smiles, cells in items:
        mol, why = parse(smiles)
        try:
            whole = mol and Chem.AddHs(mol)
            why = f"more than {MAX_ATOMS} atoms" if mol and whole.GetNumAtoms() > MAX_ATOMS else why
            tries = [(None, why)] if why else [embed(whole, seed + k) for k in range(num)]
        except (RuntimeError, ValueError) as error:
            tries = [(None, f"RDKit fails: {one_line(error)[:80]}")]
        good = [(mol, note) for mol, note in tries if mol]
        if not good:
            name = f"{key} {(smiles or '')[:60]}".strip()
            molecules.append({"id": name, "skip": tries[0][1], "tags": numbers(cells)})
        for mol, note in good:
            notes = {note, "more than one part: a salt or a hydrate" if "." in smiles else ""}
            notes |= {"fewer conformers than asked for" if len(good) < num else ""}
            found = {"id": key, "z": elements(mol), "pos": mol.GetConformer().GetPositions(), "smiles": smiles}
            molecules.append(found | {"tags": numbers(cells), "notes": notes - {""}})
    return molecules


def read_smiles(path):
    """Molecules of a csv's SMILES, a conformer each, with its numbers as tags, for tools/."""
    need("rdkit", "making conformers")
    header = next(table(path), [])
    *columns, twice = find_columns(path, "", header)
    for note in dict.fromkeys(twice):
        print(f"  {note}")
    texts = Counter()

    def rows():
        for key, smiles, cells in read_rows(path, *columns):
            texts.update(name for name, cell in cells.items() if cell and not NUMBER.fullmatch(cell))
            yield key, smiles, cells

    for mol in parallel(partial(conformers, num=1, seed=0), rows(), chunk=16):
        if "skip" in mol:
            print(f"  left out: row {mol['id']}: {mol['skip']}")
        else:
            yield mol
    del texts[header[columns[1]]]
    for name, count in texts.items():
        print(f"  {name}: {count} of its cells are no numbers")


# ---------------------------------------------------------------- the command


def parse_keys(words):
    """Words after OUT.h5, in any order and perhaps without their quotes -> {key: text}."""
    keylike = [word for word in words if re.match(r"\w+=", word) or word.lower() in KEYS.split()]
    if strange := [word for word in keylike if not KEY.match(word)]:
        raise InputError(f"{strange[0]!r} is no key, usage: {USAGE}", code=2)
    first, *rest = KEY.split(" ".join(words))
    keys = dict(zip(rest[::2], map(str.strip, rest[1::2])))
    keys = {"smiles": "", "labels": "", "conformers": "1", "seed": "0"} | keys
    if not re.fullmatch(r"[1-9]\d{0,2}", keys["conformers"]) or not re.fullmatch(r"\d{1,9}", keys["seed"]):
        raise InputError("conformers is 1 to 999, seed a number from 0", code=2)
    if first.strip() or len(rest) // 2 > len({*rest[::2]}):
        raise InputError(f"usage: {USAGE}", code=2)
    return keys


def from_csv(path, out, *words):
    """python data.py molnet FILE.csv OUT.h5 "labels=NAME:UNIT,..." [smiles=smiles] [conformers=1] [seed=0]"""
    keys, path, out = parse_keys(words), Path(path), Path(out)
    asked = parse_labels(keys["labels"])
    check_new(out, kinds=(".h5",))
    check_file(path, "give a csv with a header")
    rdkit = need("rdkit", "making conformers")
    *columns, twice = find_columns(path, keys["smiles"], [name for name, _ in asked.values()])
    kinds = check_kinds(path, columns, asked)
    lost = partial(explain, f"{path}: a process was lost over a molecule", BrokenProcessPool)
    with lost():
        split, notes = survey(path, columns, asked)
    notes += kinds + shifted(path, columns)
    num, seed = int(keys["conformers"]), int(keys["seed"])
    told = {key: text for key, text in keys.items() if text}
    command = ["python", "data.py", "molnet", path.name, out.name, *(f"{k}={v}" for k, v in told.items())]
    attrs = {"name": stem(path), "source": path.name, "source_sha256": sha256(path)}
    attrs["command"] = f"{shlex.join(command)}  # RDKit {rdkit.__version__}"
    if num > 1:
        attrs["conformers"] = f"up to {num} neighbouring rows with the same id are one molecule"

    def stream():
        with lost():
            for mol in parallel(partial(conformers, num=num, seed=seed), read_rows(path, *columns), chunk=16):
                place = (split[mol["id"]],) if mol["id"] in split else ()
                yield mol | {"split": place, "notes": {*mol.get("notes", ()), *twice}}

    save(out, with_labels(stream(), asked), attrs, {dataset: unit for dataset, (_, unit) in asked.items()})
    with h5py.File(out, "r") as file:
        ids = file["id"][:]
        sizes = {name: len(np.unique(ids[file[f"split/{name}"][:]])) for name in SPLITS if f"split/{name}" in file}
    if num > 1:
        rows = len(np.unique(ids))
        print(f"  {rows:,} rows of the csv, {len(ids) / rows:.1f} conformers of each")
    for note in notes:
        print(f"  {note}")
    shown = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    print(f"  split by scaffold: {shown or NO_SPLIT}")
