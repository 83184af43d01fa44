"""beyond/molnet.py: a csv of SMILES becomes a file with conformers and a split; what is refused of it."""

import gzip
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from tiny_run import ROOT

import data
import finetune
from data import Molecules
from harness.errors import InputError

Chem = pytest.importorskip("rdkit.Chem")

from beyond import molnet  # noqa: E402
from beyond.molnet import scaffolds, split_scaffolds  # noqa: E402

FREESOLV = """smiles,expt
CN(C)C(=O)c1ccc(cc1)OC,-11.01
CS(=O)(=O)Cl,-4.87
CC(C)C=C,1.83
CCc1cnccn1,-5.45
CCCCCCCO,-4.21
Cc1cc(cc(c1)O)C,-6.27
"""
QM8_NAMES = [f"{kind}-{level}" for level in ("CC2", "PBE0", "PBE0", "CAM") for kind in ("E1", "E2", "f1", "f2")]
AMMONIA = [0.26521952, 0.35008064, 0.06701544, 0.03004918, 0.26838581, 0.3491057, 0.04076087, 0.03164115]
AMMONIA += [9.1, 9.2, 9.3, 9.4, 0.25385331, 0.33448133, 0.0575, 0.0238]  # of the second PBE0 we have no figures
WATER = [0.28653735, 0.363579, 0.03775532, 0, 0.29137731, 0.36209064, 0.01950336, 1e-8]
WATER += [9.1, 9.2, 9.3, 9.4, 0.27851946, 0.35007407, 0.0333, 0]
QM7 = """smiles,target
C([H])([H])([H])[H],-417.96
[H],-1327.09
[HH].[HH],-1438.35
[H]C#C[H],-404.88
"""
EXPT = "labels=expt:kcal/mol"


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """convert(text or bytes of a csv, *words after OUT.h5, name=...) -> its Molecules, what was printed."""
    monkeypatch.chdir(tmp_path)
    count = iter(range(100))

    def convert(content, *words, name="mine.csv"):
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        out = f"{next(count)}.h5"
        data.main(["molnet", name, out, *words])
        return Molecules(out), capsys.readouterr().out

    return convert


@pytest.fixture
def refused(convert, tmp_path):
    """refused(...) as convert -> the one line and its exit code; nothing is left behind."""

    def refused(content, *words, name="mine.csv"):
        with pytest.raises(InputError) as caught:
            convert(content, *words, name=name)
        assert [path.name for path in tmp_path.iterdir()] == [name]
        return str(caught.value), caught.value.code

    return refused


def atoms(molecules, m):
    part = molecules.read([m])
    return part["z"].tolist(), part["pos"].double().numpy()


def rows(*cells, head="smiles,y"):
    return "\n".join([head, *cells]) + "\n"


# --- what is in the file ---


def test_numbers_units_hydrogens_and_rows_are_those_of_the_csv(convert):
    m, said = convert(FREESOLV, EXPT)
    assert m.label("expt").tolist() == [-11.01, -4.87, 1.83, -5.45, -4.21, -6.27]
    assert m.units == {"expt": "kcal/mol"} and m.ids.tolist() == [0, 1, 2, 3, 4, 5]
    z, pos = atoms(m, 2)  # CC(C)C=C
    assert z == [6] * 5 + [1] * 10
    assert np.linalg.norm(pos[3] - pos[4]) == pytest.approx(1.33, abs=0.02)  # the double bond
    assert np.linalg.norm(pos[0] - pos[1]) == pytest.approx(1.53, abs=0.02)
    assert "6 molecules" in said and "skipped 0" in said
    assert m.attrs["name"] == "mine" and m.attrs["source"] == "mine.csv"
    assert "labels=expt:kcal/mol conformers=1 seed=0  # RDKit 20" in m.attrs["command"]


def test_the_same_seed_gives_the_same_bits_and_another_does_not(convert):
    first, again, other = (convert(FREESOLV, EXPT, seed)[0] for seed in ("seed=0", "seed=0", "seed=7"))
    same = [np.array_equal(atoms(first, m)[1], atoms(again, m)[1]) for m in range(6)]
    changed = [not np.array_equal(atoms(first, m)[1], atoms(other, m)[1]) for m in range(6)]
    assert all(same) and all(changed)


def test_processes_give_what_one_gives(convert):
    """More rows than one process takes at a time."""
    many = "smiles,expt\n" + "CO,1\nCN,2\nCCl,3\nC=O,4\n" * 5
    m, _ = convert(many, EXPT)
    assert m.ids.tolist() == list(range(20))
    assert m.label("expt").tolist() == [1.0, 2.0, 3.0, 4.0] * 5
    assert all(np.array_equal(atoms(m, k)[1], atoms(m, k % 4)[1]) for k in range(20))


def test_a_column_that_stands_twice_is_the_first(convert):
    names = list(dict.fromkeys(QM8_NAMES))  # 12
    cells = ["[H]N([H])[H]", *AMMONIA], ["[H]O[H]", *WATER]
    text = rows(*(",".join(map(str, row)) for row in cells), head=",".join(["smiles", *QM8_NAMES]))
    m, said = convert(text, "labels=" + ",".join(f"{name}:{'Ha' if name[0] == 'E' else 1}" for name in names))
    assert [m.label(name)[0] for name in names] == AMMONIA[:8] + AMMONIA[12:]
    assert m.label("E2-PBE0")[1] == 0.36209064
    assert m.units["E1-PBE0"] == "Ha" and m.units["f2-CAM"] == "1"
    assert "column f1-PBE0 stands 2 times: the first was read (2 molecules)" in said


def test_hydrogen_alone_is_dropped_and_named(convert):
    m, said = convert(QM7, "labels=target:kcal/mol")
    assert m.ids.tolist() == [0, 3] and m.label("target").tolist() == [-417.96, -404.88]
    assert atoms(m, 0)[0] == [6, 1, 1, 1, 1]
    assert "2: no atom but hydrogen (id 1 [H], 2 [HH].[HH])" in said


def test_what_cannot_be_used_is_counted_by_cause_and_named(convert):
    bad = ["CCO,1", "c1cc,2", "C(C,3", ",4", "*C,5", "CC,6,7", "CC", "C1#CC1,8", "CC12C3N4C3C1C42,9"]
    m, said = convert(rows(*bad, "C" * 140 + ",10"), "labels=y:eV")
    assert m.ids.tolist() == [0]
    assert "2: RDKit cannot read the SMILES (id 1 c1cc, 2 C(C)" in said
    assert "1: no SMILES (id 3)" in said
    assert "1: an atom without an element, such as * (id 4 *C)" in said
    assert "2: more or fewer cells than the header (id 5, 6)" in said
    assert "1: RDKit finds no conformer (id 7 C1#CC1)" in said
    assert "1: the force field tears a bond apart (id 8 CC12C3N4C3C1C42)" in said
    assert f"1: more than 400 atoms (id 9 {'C' * 60})" in said
    assert "skipped 9" in said


def test_an_atom_without_parameters_keeps_its_embedded_place(convert):
    """UFF gives it no forces, says that it converged, and its neighbours drift away."""
    m, said = convert(rows("O=C1N([Se]c2ccccc12)c3ccccc3,1", "C[Ge](C)C,2"), "labels=y:eV")
    pos = m.read([0])["pos"]
    assert 1.6 < (pos - pos[3]).norm(dim=1).sort().values[1] < 2.1
    assert "no force field has parameters: as embedded, not relaxed (1 molecules)" in said
    assert "MMFF94 lacks parameters: relaxed by UFF (1 molecules)" in said


def test_a_force_field_that_is_cut_off_is_told(convert, monkeypatch):
    monkeypatch.setattr(molnet, "STEPS", 2)
    assert "MMFF94, not at its minimum after 2 steps (1 molecules)" in convert(rows("CCCCO,1"), "labels=y:eV")[1]


def test_labels_of_other_molecules_are_told(convert):
    said = convert(QM7 + "[HH].[HH],1\n[HH].[HH],2\n[H]C([H])=O,3\n", "labels=target:kcal/mol")[1]
    assert "from row 3 on the labels are those of other molecules, as in MoleculeNet's QM7" in said
    assert "other molecules" not in convert(QM7, "labels=target:kcal/mol")[1]


def test_a_number_that_is_not_there_is_unknown(convert):
    m, said = convert(rows("C,1.5", "CC,", "CCC,n/a", "CCCC,nan", "CCO,>3", "CCN,-2e-1"), "labels=y:eV")
    assert np.array_equal(m.label("y"), [1.5, np.nan, np.nan, np.nan, np.nan, -0.2], equal_nan=True)
    assert "y unknown (4 molecules)" in said


def test_parts_of_a_salt_stay_apart(convert):
    m, said = convert(rows("CC(=O)[O-].[Na+],1", "O.O.O.CCO,2", "CCO,3"), "labels=y:eV")
    for k, sizes in ((0, (4, 1)), (1, (1, 1, 1, 3))):
        z, pos = atoms(m, k)
        heavy = [pos[a] for a in range(len(z)) if z[a] > 1]
        parts = np.split(np.array(heavy), np.cumsum(sizes)[:-1])
        near = [np.linalg.norm(a[:, None] - b, axis=-1).min() for a in parts for b in parts if a is not b]
        assert 2.0 < min(near) < 4.5
    assert "more than one part: a salt or a hydrate (2 molecules)" in said


def test_without_parameters_of_mmff_it_is_uff(convert):
    m, said = convert(rows("B(O)(O)c1ccccc1,1", "CCO,2"), "labels=y:eV")
    assert len(m) == 2 and "MMFF94 lacks parameters: relaxed by UFF (1 molecules)" in said


# --- conformers ---


def test_conformers_are_neighbours_with_the_id_of_their_row(convert):
    text = rows("CCCCO,1", "CCCCN,2", "[H][H],3", "CCCCF,4")
    one, _ = convert(text, "labels=y:eV", "seed=3")
    three, said = convert(text, "labels=y:eV", "conformers=3", "seed=3")
    assert three.ids.tolist() == [0, 0, 0, 1, 1, 1, 3, 3, 3]
    assert three.label("y").tolist() == [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 4.0, 4.0, 4.0]
    assert "same id" in three.attrs["conformers"] and "conformers" not in one.attrs
    assert "3 rows of the csv, 3.0 conformers of each" in said
    for m in range(3):
        z, pos = atoms(three, 3 * m)
        assert np.array_equal(pos, atoms(one, m)[1])  # the first of three is the one
        shapes = [np.linalg.norm(p[:, None] - p, axis=-1) for p in (atoms(three, 3 * m + k)[1] for k in range(3))]
        assert all(np.abs(shapes[0] - shape).max() > 0.3 for shape in shapes[1:])


def test_conformers_of_a_molecule_are_in_one_split(convert):
    phenyls = (f"{'C' * n}c1ccccc1,{n}" for n in range(1, 9))
    m, said = convert(rows("C1CC1,9", *phenyls, "C1CCC1,10"), "labels=y:eV", "conformers=2")
    held = {name: m.ids[index].tolist() for name, index in m.splits.items()}
    twice = [row for row in range(1, 9) for _ in range(2)]
    assert held == {"train": twice, "val": [9, 9], "test": [0, 0]}  # of equal groups the last comes first
    assert "split by scaffold: train 8, val 1, test 1" in said


# --- the split ---


def published(groups):
    """GEM's rule, as published, on floats."""
    num, parts = sum(map(len, groups.values())), ([], [], [])
    order = sorted(groups.items(), key=lambda item: (len(item[1]), item[1][0]), reverse=True)
    for _, group in order:
        if len(parts[0]) + len(group) > 0.8 * num:
            part = parts[2] if len(parts[0]) + len(parts[1]) + len(group) > (0.8 + 0.1) * num else parts[1]
        else:
            part = parts[0]
        part += group
    return {row: name for name, part in zip(("train", "val", "test"), parts) for row in part}


def test_split_is_the_published_rule():
    for seed in range(50):
        random = np.random.default_rng(seed)
        groups = {}
        for row in range(random.integers(20, 400)):
            groups.setdefault(str(int(random.exponential(15))), []).append(row)
        assert split_scaffolds(groups) == published(groups)


def test_split_tells_scaffolds_apart_by_their_chirality():
    """Mirror images with the stereocentre in the scaffold are two; with it in a side chain they are one."""
    pairs = ["c1ccccc1[C@H]2CCCO2", "c1ccccc1[C@@H]2CCCO2", "C[C@H](O)Cc1ccccc1", "C[C@@H](O)Cc1ccccc1"]
    found = [scaffold for _, _, scaffold, _ in scaffolds([(k, smiles, {}) for k, smiles in enumerate(pairs)])]
    assert found[0] != found[1] and found[2] == found[3] == "c1ccccc1"


def test_without_three_parts_there_is_no_split(convert):
    m, said = convert(rows("CCO,1", "CCN,2", "CCC,3"), "labels=y:eV")
    assert m.splits == {} and "split by scaffold: none, a part would be empty; give finetune.py train_size" in said


# --- files as people have them ---


PLAIN = rows("CCO,1.5", "c1ccccc1,-2")


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (b"\xef\xbb\xbf" + PLAIN.encode(), "bom.csv"),
        (PLAIN.replace("\n", "\r\n").encode(), "windows.csv"),
        (PLAIN.replace("\n", "\r").encode(), "mac.csv"),
        (PLAIN.replace(",", ";").encode(), "semicolon.csv"),
        (PLAIN.replace(",", "\t").encode(), "tab.tsv"),
        (PLAIN.encode("utf-16"), "excel.csv"),
        (gzip.compress(PLAIN.encode()), "packed.csv.gz"),
        (b'"smiles","y"\n"CCO","1.5"\n"c1ccccc1","-2"\n', "quoted.csv"),
        (b'name,"a;b;c",y,SMILES\n"2-methyl, x",,1.5,CCO\n\n"say ""hi""",\xe9,-2, c1ccccc1 \n\n', "more.csv"),
        (b"\n\n" + PLAIN.encode(), "blank.csv"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_ways_to_write_a_table(convert, content, name):
    plain, _ = convert(PLAIN, "labels=y:eV", name="plain.csv")
    m, _ = convert(content, "labels=y:eV", name=name)
    assert m.ids.tolist() == [0, 1] and m.label("y").tolist() == [1.5, -2.0]
    assert all(np.array_equal(atoms(m, k)[1], atoms(plain, k)[1]) for k in range(2))


def test_another_column_of_smiles_and_lost_quotes(convert):
    m, _ = convert(rows("x,CCO,1", head="smiles,canonical,log S"), "smiles=canonical", "labels=log", "S:log", "mol/L")
    assert m.units == {"log S": "log mol/L"} and atoms(m, 0)[0].count(6) == 2


def test_the_only_column_with_smiles_in_its_name_and_the_log_of_a_unit(convert):
    text = rows("x,CCO,1", "x,CC,<5", "x,OCC,2", head="id,Canonical_SMILES,S (M)")
    m, out = convert(text, "labels=S (M):log M")
    assert m.units == {"S (M)": "log M"} and atoms(m, 0)[0].count(6) == 2
    assert "S (M): 1 of its cells are no numbers, such as '<5' in row 1" in out
    assert "1 rows have a molecule that stood before, such as that of row 0 in row 2" in out


def test_isotopes_and_atom_maps_make_no_scaffold_of_their_own():
    toluenes = ["c1ccccc1C", "[cH:1]1[cH:2][cH:3][cH:4][cH:5]c1C", "[13cH]1ccccc1C", "[2H]c1ccccc1C"]
    found = scaffolds([(0, smiles, {}) for smiles in toluenes])
    assert found == [(0, "Cc1ccccc1", "c1ccccc1", {})] * 4


def test_a_bound_without_a_number_a_stated_unit_and_a_placeholder(convert):
    """As ChEMBL exports it: where the relation is no `=`, pChEMBL has no value."""
    lines = [f"{'C' * (k + 2)},{5 + k / 10},'=',nM" for k in range(12)]
    text = rows(*lines, "OCO,,'>',nM", "OCCO,-999,'=',nM", head="smiles,p,Standard Relation,Standard Units")
    m, said = convert(text, "labels=p:log M")
    assert len(m) == 14 and np.isnan(m.label("p")).sum() == 1
    assert "column Standard Units has nM" in said
    assert "p: 1 of its numbers lie far from all others, such as -999: placeholders?" in said


def test_of_two_units_that_of_the_label_counts(convert, refused):
    """ChEMBL's web client gives each row as it was published and as it was brought to one unit."""
    lines = [f"{'C' * (k + 2)},{k % 2 and 0.1 or 100},{'uM' if k % 2 else 'nM'},{100 + k},nM" for k in range(12)]
    text = rows(*lines, head="smiles,value,units,standard_value,standard_units")
    assert "column units has nM, uM" in refused(text, "labels=value:nM")[0]
    assert len(convert(text, "labels=standard_value:nM")[0]) == 12


# --- what is refused ---


def test_a_standardised_label_is_refused(refused, convert):
    values = np.random.default_rng(0).normal(size=12)
    values = (values - values.mean()) / values.std()
    text = rows(*(f"{'C' * (k + 1)},{value}" for k, value in enumerate(values)), head="smiles,expt")
    said, code = refused(text, EXPT)
    assert code == 1 and "expt has mean" in said and "standardised, so not in kcal/mol" in said
    assert len(convert(text, "labels=expt:1")[0]) == 12


@pytest.mark.parametrize(
    ("content", "words", "code", "said"),
    [
        (FREESOLV, ["labels=exp:kcal/mol"], 2, "mine.csv: no column 'exp'; there are: smiles, expt"),
        (FREESOLV, [EXPT, "smiles=SMILE"], 2, "no column 'SMILE'; there are: smiles, expt"),
        (FREESOLV.replace("smiles", "mol"), [EXPT], 2, "no column 'smiles'; there are: mol, expt"),
        (FREESOLV, [], 2, "which numbers? labels=NAME:UNIT,... of its columns: smiles, expt"),
        (FREESOLV, ["targets=expt"], 2, "'targets=expt' is no key, usage: python data.py"),
        (FREESOLV, ["labels=expt"], 2, "write labels=NAME:UNIT"),
        (FREESOLV, [EXPT, "conformers=0"], 2, "conformers is 1 to 999, seed a number from 0"),
        (FREESOLV, [EXPT, "seed=x"], 2, "conformers is 1 to 999, seed a number from 0"),
        (FREESOLV, [EXPT, "conformer=3"], 2, "'conformer=3' is no key, usage: python data.py"),
        (FREESOLV, [EXPT, "Conformers=3"], 2, "'Conformers=3' is no key"),
        (FREESOLV, [EXPT, "conformers", "3"], 2, "'conformers' is no key"),
        (FREESOLV, ["labels=expt:kcal/mol smile=smiles"], 2, "write labels=NAME:UNIT"),
        (FREESOLV, [EXPT, EXPT], 2, "usage: python data.py molnet"),
        (FREESOLV, ["expt", EXPT], 2, "usage: python data.py molnet"),
        (FREESOLV, ["labels=smiles:1"], 2, "column smiles has no number"),
        (rows("C;1,5", "CC;2", head="smiles;y"), ["labels=y:eV"], 1, "row 0: y is '1,5': write numbers with a decimal"),
        (rows("[H][H],1", "xx,2"), ["labels=y:eV"], 1, "no molecule that can be used (no atom but hydrogen: 1; RDKit"),
        (rows("C,C,1", head="SMILES,smiles,y"), ["labels=y:1"], 2, "the SMILES, SMILES or smiles?"),
        (rows("C,5 %", "CC,6 %"), ["labels=y:1"], 2, "y has no number, but text such as '5 %' in row 0"),
        (rows("C,1,", "CC,2,"), ["labels=y:1"], 1, "as the header, 2: does a comma end each row?"),
        (rows('C,"1', "CC,2"), ["labels=y:1"], 1, "line 3: unexpected end of data: is a quote open"),
        ("smiles,höhe\nC,1\n".encode("latin-1"), ["labels=höhe:m"], 2, "letters are not UTF-8"),
        (rows("C,1,nM", "CC,2,uM", head="smiles,y,Units"), ["labels=y:nM"], 1, "Units has nM, uM"),
        (
            rows("C,1,>", "CC,2,=", head="smiles,y,Standard Relation"),
            ["labels=y:nM"],
            1,
            "Standard Relation has =, >: a bound is no",
        ),
        (rows("C,1,Ki", "CC,2,IC50", head="smiles,y,Standard Type"), ["labels=y:nM"], 1, "Standard Type has IC50, Ki"),
        (FREESOLV.replace("expt", "S (M)"), ["labels=S (M):mM"], 2, "the name S (M) says M"),
        ("", ["labels=y:eV"], 2, "no header, a first row of names"),
        ("smiles,y\n", ["labels=y:eV"], 2, "column y has no number"),
        (b"PK\3\4\0\0\0", ["labels=y:eV"], 1, "not a text file: export the table as csv"),
        (gzip.compress(FREESOLV.encode())[:-20], [EXPT], 1, "damaged, cut off or not the right kind of file"),
        (rows('"' + "C" * 200_000, "CC,1"), ["labels=y:eV"], 1, "field larger than field limit"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\n" not in value else "",
)
def test_one_clear_line(refused, content, words, code, said):
    line, found = refused(content, *words)
    assert said in line and "\n" not in line and found == code


def test_files_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        (["no.csv", "o.h5", EXPT], "no.csv: no such file"),
        (["no.csv", EXPT], "must end in .h5"),
        (["no.csv", "deep/o.h5", EXPT], "no such folder"),
    ):
        with pytest.raises(InputError, match=said):
            data.main(["molnet", *arguments])
    assert list(tmp_path.iterdir()) == []


def test_rdkit_is_asked_for(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert refused(FREESOLV, EXPT) == ("making conformers needs the package rdkit: pip install rdkit", 1)


def test_a_lost_process_is_one_line(refused, monkeypatch):
    def lost(function, items, chunk=256):
        if chunk < 256:  # conformers, not scaffolds
            raise BrokenProcessPool("terminated abruptly")
        yield from function(list(items))

    monkeypatch.setattr(molnet, "parallel", lost)
    assert refused(FREESOLV, EXPT) == ("mine.csv: a process was lost over a molecule: terminated abruptly", 1)


# --- the whole chain ---


@pytest.mark.parametrize("name", ["freesolv", "lipo", "qm7", "qm8", "qm9"])
def test_each_config_runs_on_a_file_of_its_layout(convert, tmp_path, name):
    """Conformers too: the error of a molecule is that of the mean over them."""
    config = f"{ROOT}/configs/molnet_{name}.yaml"
    targets = yaml.safe_load(Path(config).read_text())["target"].split(",")
    values = ",".join(f"{{0}}.{k}" for k in range(len(targets)))  # 2.0, 2.1, ...
    cyclopropanes = ((f"{'C' * n}C1CC1{end}", n) for n in (0, 1, 2, 3) for end in ("", "O"))
    table = [f"{smiles},{values.format(n)}" for smiles, n in (*cyclopropanes, ("C1CCC1O", 4), ("C1CCCC1O", 5))]
    text = rows(*table, head=f"smiles,{','.join(targets)}")
    m, _ = convert(text, f"labels={','.join(f'{target}:kcal/mol' for target in targets)}", "conformers=2")
    small = ["model.embedding_dimension=16", "model.num_layers=1", "model.num_rbf=8", "batch_size=4", "max_steps=2"]
    finetune.main([config, f"data={m.path}", "out_dir=out", "log_every=1", *small])
    metrics = yaml.safe_load((tmp_path / "out/metrics.json").read_text())
    assert metrics["molecules"] == {"train": 16, "val": 2, "test": 2}  # rows: two of each molecule
    found = metrics["test"]["test"]

    model = finetune.load_property_model(tmp_path / "out/best.pt")[0]
    part = m.read(m.splits["test"])
    y = model.restore(model(part["z"], part["pos"], part["batch"], 2)[0], part["z"], part["batch"])
    for place, target in enumerate(targets):
        assert metrics["units"][f"{target}_rmse"] == "kcal/mol"
        assert found[f"{target}_mae"] == pytest.approx(found[f"{target}_rmse"])  # one molecule
        label = m.label(target)[m.splits["test"][0]]
        assert found[f"{target}_mae"] == pytest.approx(abs(y.view(2, -1)[:, place].mean().item() - label), rel=1e-4)


def test_conformers_of_a_molecule_are_not_drawn_apart(convert):
    m, _ = convert(rows("CCCCO,1", "CCCCN,2", "CCCCF,3"), "labels=y:eV", "conformers=2")
    config = finetune.FinetuneConfig(data=m.path, target="y", val_size=1, test_size=1)
    with pytest.raises(InputError, match="share molecules"):
        finetune.split_data(config, m)


def test_metric_chooses_the_error_that_chooses_the_weights():
    about = {"forces": False, "name": "y", "names": ["y"], "std": np.array([0.5]), "scale": np.array([2.0])}
    found, labels = {"y_mae": 1.0, "y_rmse": 2.0}, SimpleNamespace(**about)
    by = [finetune.score(found, labels, finetune.FinetuneConfig(**keys)) for keys in ({}, {"metric": "rmse"})]
    assert by == [1.0, 2.0]
