"""Files as people really have them: units under any name, levels that mix, drawings, look-alikes of labels, weights."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from raw_files import convert, md17_npz
from tiny_run import ROOT, TINY

import data
import finetune
import lipschitz
from data import Molecules
from formats.sources import check_units, parse_labels
from formats.weights import read_encoder
from harness.errors import InputError
from model import EquivariantTransformer, ModelConfig

WATER = "O 0 0 0.119 0 0 0.3\nH 0 0.763 -0.477 0 0.1 -0.15\nH 0 -0.763 -0.477 0 -0.1 -0.15\n"
FORCES = "Properties=species:S:1:pos:R:3:forces:R:3"


def xyz(path, *comments, atoms=WATER):
    path.write_text("".join(f"{atoms.count(chr(10))}\n{comment}\n{atoms}" for comment in comments))
    return path


@pytest.mark.parametrize(
    "stated, words",
    [
        ("energy_units=kcal/mol", "its energy_units says kcal/mol"),
        ("e_unit=Hartree r_unit=Bohr", "its e_unit says Hartree"),
        ("length_unit=bohr", "its length_unit says bohr"),
        ("LengthUnits=nm", "its LengthUnits says nm"),
        ("Hartree", "its Hartree says hartree"),
        ("Eh", "its Eh says eh"),
        ("hartrees", "its hartrees says hartrees"),
        ('comment="in Hartrees and Bohrs"', "its comment says Hartrees"),
        ("positions{atomic_unit} cell{angstrom}", "says atomic_unit"),
        ('units="_JSON {\\"energy\\": \\"Hartree\\", \\"length\\": \\"Ang\\"}"', "its units says Hartree"),
        ('units=\'{"energy": "Hartree"}\'', "its units says Hartree"),
        ("units=\"{'energy': 'Ry', 'length': 'Ang'}\"", "its units says Ry"),
        ('energy_unit="kcal/mol"', "its energy_unit says kcal/mol"),
        ("Properties_unit=eV/Bohr", "its Properties_unit says eV/Bohr"),
        ('units="_JSON [\\"eV\\", \\"Bohr\\"]"', "its units says Bohr"),
    ],
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_unit_under_any_name_is_read(tmp_path, stated, words, labelled):
    comment = f"{FORCES} energy=-2076.0 {stated}" if labelled else stated
    atoms = WATER if labelled else "O 0 0 0.119\nH 0 0.763 -0.477\nH 0 -0.763 -0.477\n"
    with pytest.raises(InputError, match="frame 0") as error:
        convert("xyz", [xyz(tmp_path / "a.xyz", comment, atoms=atoms)], tmp_path / "a.h5")
    assert words in str(error.value) and "convert the numbers to eV" in str(error.value)


@pytest.mark.parametrize(
    "stated",
    [
        "energy_unit=eV r_unit=Ang",
        "units=eV/Angstrom time_unit=fs",
        'units="_JSON {\\"time\\": \\"fs\\", \\"energy\\": \\"eV\\", \\"momenta\\": \\"(eV*u)^0.5\\"}"',
        "positions{angstrom}",
        'units=\'{"energy": "eV", "length": "Ang"}\'',
        'units="energy: eV, forces: eV/A"',
        'units="eV, eV/Ang."',
        'forces_unit="eV A^-1"',
        "forces_unit=eV*angstrom-1 length_unit=Angs",
    ],
)
def test_units_that_fit_are_taken(tmp_path, stated):
    m = convert("xyz", [xyz(tmp_path / "a.xyz", f"{FORCES} energy=-2076.0 {stated}")], tmp_path / "a.h5")
    assert m.label("energy").tolist() == [-2076.0] and m.units["forces"] == "eV/angstrom"


def test_lengths_that_are_no_angstrom_leave_no_molecule(tmp_path):
    """In nm, without labels and unsaid: bonds of 0.1 are no bonds."""
    path = xyz(tmp_path / "a.xyz", "water", atoms="O 0 0 0.0119\nH 0 0.0763 -0.0477\nH 0 -0.0763 -0.0477\n")
    with pytest.raises(InputError, match=r"no molecule that can be used \(two atoms closer than 0.5 Å: 1\)"):
        convert("xyz", [path], tmp_path / "a.h5")


def test_bohr_is_told(tmp_path, capsys):
    atoms = "O 0 0 0.225\nH 0 1.442 -0.901\nH 0 -1.442 -0.901\n"
    convert("xyz", [xyz(tmp_path / "a.xyz", "water", atoms=atoms)], tmp_path / "a.h5")
    assert "no two atoms closer than 1.2 Å: are these bohr? (1 molecules)" in capsys.readouterr().out
    convert("xyz", [xyz(tmp_path / "b.xyz", "water", atoms=WATER)], tmp_path / "b.h5")
    assert "are these bohr" not in capsys.readouterr().out


@pytest.mark.parametrize("factor, unit", [(1 / 627.5095, "hartree"), (1 / 23.0605, "eV"), (4.184, "kJ/mol"), (1, "")])
def test_an_energy_of_all_electrons_tells_its_unit(tmp_path, capsys, factor, unit):
    """Half the sum of Z^2.4, in hartree: no other unit is within a factor of four of it."""
    energy = factor * np.array([-47937.2, -47938.1, -47936.0, -47937.9])
    convert("md17", [md17_npz(tmp_path / "md17_a.npz", E=energy)], tmp_path / "a.h5")
    said = capsys.readouterr().out
    told = f"an energy like that of all electrons in {unit}: is it in kcal/mol? (4 molecules)"
    assert told in said if unit else "electrons" not in said


def test_other_energies_are_of_no_unit(tmp_path, capsys):
    """Of a tight-binding method without core electrons, and of atomisation."""
    for raw in (ROOT / "data/ethanol_100.xyz", xyz(tmp_path / "a.xyz", f"{FORCES} energy=-9.5")):
        convert("xyz", [raw], tmp_path / f"{raw.stem}.h5")
        assert "electrons" not in capsys.readouterr().out


def test_a_placeholder_among_energies_is_told(tmp_path, capsys):
    frames = [f"{FORCES} energy={-2076.0 - 0.01 * k if k % 10 else 0.0}" for k in range(20)]
    convert("xyz", [xyz(tmp_path / "a.xyz", *frames)], tmp_path / "a.h5")
    assert "an energy far from all others: a placeholder? (2 molecules)" in capsys.readouterr().out


def test_levels_do_not_mix_between_files_either(tmp_path):
    first, second = xyz(tmp_path / "a.xyz", "REF_energy=-2076.0"), xyz(tmp_path / "b.xyz", "energy=-138.0")
    with pytest.raises(InputError, match="b.xyz: frame 0 has labels under REF_ and others without it"):
        convert("xyz", [first, second], tmp_path / "a.h5")


@pytest.mark.parametrize("cell", ['lattice="9 0 0 0 9 0 0 0 9"', 'cell="9 9 9"', "CELL(abcABC): 9.8 9.8 9.8 90 90 90"])
def test_a_cell_under_another_name(tmp_path, cell):
    with pytest.raises(InputError, match="periodic: not a molecule: 1"):
        convert("xyz", [xyz(tmp_path / "a.xyz", f"{FORCES} energy=-2076.0 {cell}")], tmp_path / "a.h5")


@pytest.mark.parametrize("packer", ["gzip", "bz2", "lzma"])
def test_a_packed_file_names_its_split_as_the_plain_one(tmp_path, packer):
    open_ = importlib.import_module(packer).open
    raws = [tmp_path / f"{name}.xyz.{ {'gzip': 'gz', 'lzma': 'xz'}.get(packer, packer) }" for name in ("some", "more")]
    for raw in raws:
        with open_(raw, "wt") as file:
            file.write(xyz(tmp_path / "a.xyz", "water").read_text())
    assert [*convert("xyz", raws, tmp_path / "a.h5").splits] == ["more", "some"]


@pytest.mark.parametrize("name", ["8", "O1"])
def test_atoms_without_a_symbol(tmp_path, name):
    path = xyz(tmp_path / "a.xyz", "water", atoms=f"{name} 0 0 0.119\nH 0 0.763 -0.477\nH 0 -0.763 -0.477\n")
    with pytest.raises(InputError, match=f"name atoms by symbols such as O: it lacks the key '{name}'"):
        convert("xyz", [path], tmp_path / "a.h5")


@pytest.mark.parametrize(
    "said, refused",
    [
        *(("kcal/mol", False), ("kcal mol-1", False), ("kcal mol^-1 A^-1", False)),
        *(("Hartree", True), ("eV", True), ("kJ/mol", True), ("kcal mol^-1 bohr^-1", True)),
    ],
)
@pytest.mark.parametrize("shape", [(), (1,)])
def test_units_of_an_npz_whatever_the_key(tmp_path, said, refused, shape):
    raw = md17_npz(tmp_path / "md17_a.npz", Energy_Unit=np.full(shape, said), r_unit="Ang")
    if not refused:
        assert len(convert("md17", [raw], tmp_path / "a.h5")) == 4
        return
    with pytest.raises(InputError, match=re.escape(f"its Energy_Unit says {said}")):
        convert("md17", [raw], tmp_path / "a.h5")


def test_a_lattice_is_no_molecule(tmp_path):
    with pytest.raises(InputError, match="has a lattice: periodic"):
        convert("md17", [md17_npz(tmp_path / "md17_a.npz", lattice=np.eye(3))], tmp_path / "a.h5")


def test_a_molecule_that_says_it_is_not_periodic(tmp_path):
    assert len(convert("md17", [md17_npz(tmp_path / "md17_a.npz", pbc=np.zeros(3, bool))], tmp_path / "a.h5")) == 4


@pytest.mark.parametrize(
    "name, units, wrong",
    [
        ("Solubility (log mol/L)", ["log mol/L"], "mol/L"),
        ("S [log(mol/L)]", ["log(mol/L)"], "M"),
        ("log(S)", ["log mol/L", "1"], ""),
        ("E(HOMO)", ["eV"], ""),
        ("gap (eV)", ["eV"], "meV"),
    ],
)
def test_a_name_that_states_a_unit(name, units, wrong):
    for unit in units:
        assert parse_labels(f"labels={name}:{unit}") == {f"y/{name.replace('/', '_')}": (name, unit)}
    if wrong:
        with pytest.raises(InputError, match="write that as its unit"):
            parse_labels(f"labels={name}:{wrong}")


def test_a_unit_is_judged_by_its_quantity():
    check_units({"units": {"stress": "GPa", "forces": "eV/Ang"}, "temperature_unit": "K", "name": "bohr"}, "eV", "x")
    with pytest.raises(InputError, match="x: its units says mH/a0"):
        check_units({"units": {"forces": "mH/a0"}}, "eV", "x")


def test_frames_of_one_file_are_of_one_level(tmp_path):
    both = "Properties=species:S:1:pos:R:3:REF_forces:R:3 REF_energy=-2076.0"
    plain = f"{FORCES} energy=-14.1"
    for comments in ((both, plain), (plain, both)):
        with pytest.raises(InputError, match="frame 1 has labels under REF_ and others without"):
            convert("xyz", [xyz(tmp_path / "a.xyz", *comments)], tmp_path / "a.h5")
    assert convert("xyz", [xyz(tmp_path / "a.xyz", both, both)], tmp_path / "a.h5").label("energy")[0] == -2076.0


def test_look_alikes_of_labels_are_named(tmp_path, capsys):
    convert("xyz", [xyz(tmp_path / "a.xyz", f"{FORCES} TotEnergy=-2076.0")], tmp_path / "a.h5")
    assert "not read: TotEnergy (1 molecules)" in capsys.readouterr().out
    singular = "Properties=species:S:1:pos:R:3:force:R:3 energy=-2076.0"
    assert list(convert("xyz", [xyz(tmp_path / "b.xyz", singular)], tmp_path / "b.h5").units) == ["energy"]
    assert "not read: force (1 molecules)" in capsys.readouterr().out
    convert("md17", [md17_npz(tmp_path / "md17_a.npz", dipole=np.zeros((4, 3)))], tmp_path / "c.h5")
    assert "not read: dipole (4 molecules)" in capsys.readouterr().out


def sdf(title, rows, mark="", symbols="OHH", tags=""):
    lines = "".join(f"{x:10.4f}{y:10.4f}{z:10.4f} {s:<3} 0  0\n" for s, (x, y, z) in zip(symbols, rows))
    head = f"{title}\n  program 0000000000{mark}\n\n{len(rows):3d}  0  0  0  0  0  0  0  0  0999 V2000\n"
    return f"{head}{lines}M  END\n{tags}$$$$\n"


FLAT = [(0, 0.117, 0), (0.757, -0.469, 0), (-0.757, -0.469, 0)]
BENT = [(0, 0, 0.117), (0, 0.757, -0.469), (0, -0.757, -0.469)]


def test_flat_drawings_are_no_geometries(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    path.write_text(
        sdf("1", FLAT) + sdf("2", FLAT, "3D") + sdf("3", FLAT, "2D") + sdf("4", BENT).replace("V2000", "v2000")
    )
    assert convert("sdf", [path], tmp_path / "a.h5").ids.tolist() == [2, 4]
    assert "2: flat and not marked 3D: a drawing, no geometry (id 1, 3)" in capsys.readouterr().out


def test_tags_that_are_not_read_are_named(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    path.write_text(sdf("1", BENT, "3D", tags="> <homo>\n-0.25\n\n>  <name>\nwater\n\n"))
    convert("sdf", [path], tmp_path / "a.h5")
    said = capsys.readouterr().out
    assert "not read: homo (1 molecules)" in said and "not read: name" not in said


# ---------------------------------------------------------------- labels=, NaN, lone atoms


def convert_with(source, raw, out, labels):
    """As the command line does, a word at a time -> Molecules."""
    data.main([source, str(raw), str(out), *f"labels={labels}".split()])
    return Molecules(out)


def test_tags_of_an_sdf_become_labels(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    tags = ["> <logS>\n-0.77\n\n> <gap>  (1)\n0.31\n\n", "> <logS>\nn/a\n\n> <gap>\n-1.5E-2\n\n", "> <gap>\n1\n2\n\n"]
    path.write_text("".join(sdf(str(k), BENT, "3D", tags=text) for k, text in enumerate(tags)))
    m = convert_with("sdf", path, tmp_path / "a.h5", "logS:log mol/L,gap:eV")
    assert m.units == {"gap": "eV", "logS": "log mol/L"}
    np.testing.assert_array_equal(m.label("logS"), [-0.77, np.nan, np.nan])
    np.testing.assert_array_equal(m.label("gap"), [0.31, -0.015, np.nan])  # two lines are no number
    said = capsys.readouterr().out
    assert "logS unknown (2 molecules)" in said and "gap unknown (1 molecules)" in said and "not read" not in said
    assert "labels=logS:log mol/L,gap:eV" in m.attrs["command"]
    data.main(["info", m.path])
    told = capsys.readouterr().out
    assert re.search(r"gap +eV +0\.1475 +0\.1625 +-0\.015 +0\.31  \(1 unknown\)", told), told
    few = tmp_path / "few.h5"
    data.main(["sample", m.path, str(few), "num=2", "seed=0"])
    index = np.sort(np.random.default_rng(0).permutation(3)[:2])
    np.testing.assert_array_equal(Molecules(few).label("logS"), m.label("logS")[index])


def test_entries_of_an_xyz_and_arrays_of_an_npz_become_labels(tmp_path, capsys):
    comments = [f"{FORCES} energy=-2076.0 gap={gap} state=S0" for gap in ("0.5", "T", "none", '"1 2"')]
    m = convert_with("xyz", xyz(tmp_path / "a.xyz", *comments), tmp_path / "a.h5", "gap:eV")
    np.testing.assert_array_equal(m.label("gap"), [0.5, np.nan, np.nan, np.nan])
    assert "gap unknown (3 molecules)" in capsys.readouterr().out and m.label("energy").tolist() == 4 * [-2076.0]
    arrays = {"gap": np.array([[1.0], [np.nan], [3], [4]]), "S/T": np.arange(4), "dipole": np.zeros((4, 3))}
    raw = md17_npz(tmp_path / "md17_a.npz", **arrays, notes=np.array({"a": 1}, dtype=object))
    m = convert_with("md17", raw, tmp_path / "b.h5", "gap:kcal/mol,S/T:1")
    np.testing.assert_array_equal(m.label("gap"), [1, np.nan, 3, 4])
    assert m.label("S_T").tolist() == [0, 1, 2, 3] and "not read: dipole (4" in capsys.readouterr().out


def test_tags_with_units_in_their_names_and_fortran_numbers(tmp_path, capsys):
    tags = "> <E (eV/mol)>\r\n -1.0D+01 \r\n\r\n> 25 <a:b> (1)\r\n7.5\r\n\r\n> <comma>\r\n0,31\r\n\r\n"
    path = tmp_path / "a.sdf"
    path.write_bytes((sdf("1", BENT, "3D").replace("\n", "\r\n").replace("$$$$", f"{tags}$$$$")).encode())
    m = convert_with("sdf", path, tmp_path / "a.h5", "E (eV/mol):eV/mol,a:b:1")
    assert m.units == {"E (eV_mol)": "eV/mol", "a:b": "1"}
    assert m.label("E (eV_mol)").tolist() == [-10.0] and m.label("a:b").tolist() == [7.5]
    assert "not read: comma (1 molecules)" in capsys.readouterr().out


def test_infinity_is_no_label(tmp_path, capsys):
    m = convert_with("xyz", xyz(tmp_path / "a.xyz", "gap=0.5", "gap=inf"), tmp_path / "a.h5", "gap:eV")
    assert m.label("gap").tolist() == [0.5] and "1: a label that is not finite (id 1)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "labels, words",
    [
        ("ga:eV", "no number is named ga; there are: gap, homo"),
        ("name:1", "no number is named name"),
        *[
            (wrong, "write labels=NAME:UNIT")
            for wrong in ("gap", "", "gap:", ":eV", "gap:eV,gap:eV", "gap:eV,", "a/b:1,a_b:1")
        ],
        ("energy:eV", "energy is a dataset of its own"),
        ("gap:eV,forces:eV/A", "forces is a dataset of its own"),
    ],
)
def test_labels_that_are_not_there_or_malformed_are_refused(tmp_path, labels, words):
    path, out = tmp_path / "a.sdf", tmp_path / "a.h5"
    path.write_text(sdf("1", BENT, "3D", tags="> <gap>\n0.3\n\n> <homo>\n-0.2\n\n> <name>\nwater\n\n"))
    with pytest.raises(InputError, match=re.escape(words)) as error:
        convert_with("sdf", path, out, labels)
    assert error.value.code == 2 and not out.exists()


def test_the_force_on_a_lone_atom_is_zero(tmp_path, capsys):
    water = f"3\n{FORCES} energy=-2076.0\n{WATER}"
    atom = "1\nProperties=species:S:1:pos:R:3 energy=-13.6\nH 0 0 0\n"
    for name, text in {"first": atom + water + atom, "last": water + atom + atom}.items():
        (tmp_path / f"{name}.xyz").write_text(text)
        m = convert("xyz", [tmp_path / f"{name}.xyz"], tmp_path / f"{name}.h5")
        lone = np.flatnonzero(np.diff(m.ptr) == 1)
        assert not m.read(lone, forces=True)["forces"].any() and m.label("energy")[lone].tolist() == [-13.6, -13.6]
        assert "force on a lone atom set to 0 (2 molecules)" in capsys.readouterr().out
    (tmp_path / "none.xyz").write_text(atom + water.replace(FORCES, FORCES.replace("forces", "momenta")))
    assert list(convert("xyz", [tmp_path / "none.xyz"], tmp_path / "none.h5").units) == ["energy"]
    (tmp_path / "two.xyz").write_text(water + atom.replace("1\n", "2\n", 1) + "H 0 0 0.74\n")
    with pytest.raises(InputError, match="has energy, those before it energy and forces"):
        convert("xyz", [tmp_path / "two.xyz"], tmp_path / "two.h5")


def test_a_geometry_that_stands_twice_is_told(tmp_path, capsys):
    """In one file or in two, whatever their labels. Moved by 1e-4, or of other elements, it is another one."""
    water = f"3\n{FORCES} energy=-2076.0\n{WATER}"
    moved, sulphide = water.replace("0.119", "0.1191"), water.replace("O ", "S ", 1)
    assert moved != water != sulphide
    for name, text in {"a": water + moved + sulphide, "b": water.replace("-2076.0", "-2075.0") + moved}.items():
        (tmp_path / f"{name}.xyz").write_text(text)
    convert("xyz", [tmp_path / "a.xyz"], tmp_path / "a.h5")
    assert "one before" not in capsys.readouterr().out
    convert("xyz", [tmp_path / "a.xyz", tmp_path / "b.xyz"], tmp_path / "ab.h5")
    assert "elements and positions as one before: splits may part them (2 molecules)" in capsys.readouterr().out


def v3000(rows, mark=""):
    atoms = "".join(f"M  V30 {k} {s} {x} {y} {z} 0\n" for k, (s, (x, y, z)) in enumerate(zip("OHH", rows), 1))
    head = f"water\n  program 0000000000{mark}\n\n  0  0  0     0  0            999 V3000\n"
    counts = "M  V30 BEGIN CTAB\nM  V30 COUNTS 3 0 0 0 0\nM  V30 BEGIN ATOM\n"
    return f"{head}{counts}{atoms}M  V30 END ATOM\nM  V30 END CTAB\nM  END\n$$$$\n"


def test_drawings_and_geometries_in_v3000(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    path.write_text(v3000(FLAT) + v3000(BENT) + v3000(FLAT, "3D") + v3000(FLAT, "2D"))
    m = convert("sdf", [path], tmp_path / "a.h5")
    assert m.ids.tolist() == [1, 2] and m.read([0])["pos"].numpy() == pytest.approx(np.array(BENT))
    assert "2: flat and not marked 3D: a drawing, no geometry (id 0, 3)" in capsys.readouterr().out


# ---------------------------------------------------------------- checkpoints of others


SMALL = ModelConfig(embedding_dimension=16, num_layers=2, num_rbf=16, num_heads=4)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model._orig_mod.representation_model."])
def test_prefixes_of_wrappers_are_taken_off(tmp_path, prefix):
    encoder = EquivariantTransformer(SMALL)
    torch.save({f"{prefix}{key}": value for key, value in encoder.state_dict().items()}, tmp_path / "a.pt")
    found, rest = read_encoder(tmp_path / "a.pt", SMALL)
    assert all(torch.equal(value, found.state_dict()[key]) for key, value in encoder.state_dict().items()) and not rest


@pytest.fixture
def two_networks(tmp_path):
    """A file of two networks -> its path, and the weights of each by what names it."""
    weights = {name: EquivariantTransformer(SMALL).state_dict() for name in ("model", "ema_model")}
    owners = {"model": "model.representation_model.", "ema_model": "ema_model.module.representation_model."}
    whole = {f"{owner}{k}": v for name, owner in owners.items() for k, v in weights[name].items()}
    torch.save({"state_dict": whole | {"model.output_model.weight": torch.ones(2)}}, tmp_path / "two.pt")
    return tmp_path / "two.pt", weights


def same_weights(found, wanted):
    return all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_two_networks_in_one_file_are_named(two_networks):
    path, weights = two_networks
    with pytest.raises(InputError, match="several networks: name one with init_key=, there are ema_model, model"):
        read_encoder(path, SMALL)
    with pytest.raises(InputError, match="no network 'ema': name one with init_key=, there are ema_model, model"):
        read_encoder(path, SMALL, "ema")
    for key in ("model", "ema_model", "ema_model.", "ema_model.module", "ema_model.representation_model"):
        found, _ = read_encoder(path, SMALL, key)
        assert same_weights(found.state_dict(), weights[key.split(".")[0]]), key


def test_a_key_for_one_network_must_name_it(tmp_path):
    weights = EquivariantTransformer(SMALL).state_dict()
    for prefix, key in (("model.module.", "model"), ("net._orig_mod.", "net"), ("", ".")):
        torch.save({f"{prefix}{name}": value for name, value in weights.items()}, tmp_path / "a.pt")
        for given in ("", key):
            assert same_weights(read_encoder(tmp_path / "a.pt", SMALL, given)[0].state_dict(), weights)
        with pytest.raises(InputError, match=f"no network 'student': .* there are {re.escape(key)}"):
            read_encoder(tmp_path / "a.pt", SMALL, "student")


def test_networks_that_differ_by_a_wrapper_alone_are_not_mixed(tmp_path):
    first, second = (EquivariantTransformer(SMALL).state_dict() for _ in range(2))
    torch.save(first | {f"module.{key}": value for key, value in second.items()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="several networks of one name but for a wrapper's"):
        read_encoder(tmp_path / "a.pt", SMALL)


def test_a_run_takes_the_network_asked_for_and_resumes_with_it(two_networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path, weights = two_networks
    sizes = [f"model.{key}={value}" for key, value in TINY["model"].items()]
    run = [str(ROOT / "data/qm9_demo.h5"), "target=gap", f"init_from={path}", "init_key=ema_model", "keep_steps=0"]
    fine_tune(*run, "out_dir=run")
    start = torch.load("run/step_0.pt", weights_only=True)["state_dict"]
    assert same_weights(start, {f"model.encoder.{key}": value for key, value in weights["ema_model"].items()})
    with pytest.raises(InputError, match="its init_key is ema_model, now model"):
        fine_tune(*run, "out_dir=run", "resume=true", "max_steps=4", "init_key=model")
    fine_tune(*run, "out_dir=run", "resume=true", "max_steps=4", "lr_cosine_length=40000")
    with pytest.raises(InputError, match="init_key names a network in init_from, which is not set") as error:
        fine_tune(str(ROOT / "data/qm9_demo.h5"), "target=gap", "init_key=model", "out_dir=no")
    assert error.value.code == 2 and not Path("no").exists()
    torch.save(weights["ema_model"], "one.pt")
    measured = ["num_molecules=3", "iterations=3", f"data={ROOT / 'data/qm9_demo.h5'}", *sizes]
    lipschitz.main([str(path), "init_key=ema_model", "out_dir=a", *measured])
    lipschitz.main(["one.pt", "out_dir=b", *measured])
    first, second = (json.loads(Path(f"{name}/lipschitz.json").read_text())["checkpoints"] for name in "ab")
    assert list(first.values()) == list(second.values())


def test_what_is_unexpected_is_named_before_what_is_missing(tmp_path):
    weights = EquivariantTransformer(SMALL).state_dict()
    torch.save({f"gnn.{key.replace('embedding.', 'emb.')}": value for key, value in weights.items()}, tmp_path / "a.pt")
    with pytest.raises(InputError, match="not of this encoder: gnn.* unexpected"):
        read_encoder(tmp_path / "a.pt", SMALL)


# ---------------------------------------------------------------- training on such files


def energies_of_several_sizes(path, unlabelled=False):
    rng, text = np.random.default_rng(0), ""
    for k in range(60):
        rows = [("O", (0, 0, 0.119)), ("H", (0, 0.763, -0.477)), ("H", (0, -0.763, -0.477))][: 2 + k % 2]
        energy = -2040.0 - 13.6 * (len(rows) - 1) + rng.normal(0, 0.1)
        atoms = "".join(f"{s} {x} {y + rng.normal(0, 0.02):.4f} {z}\n" for s, (x, y, z) in rows)
        text += f"{len(rows)}\nenergy={energy}\n{atoms}"
    path.write_text(text)
    return convert("xyz", [path], path.with_suffix(".h5")).path


def fine_tune(data, *settings):
    sizes = ["train_size=40", "val_size=10", "test_size=10", "batch_size=8", "max_steps=3", "val_every=3"]
    model = [f"model.{key}={value}" for key, value in TINY["model"].items()]
    finetune.main([str(ROOT / "configs/demo_gap.yaml"), f"data={data}", "target=energy", *sizes, *model, *settings])


def test_energies_without_forces_get_references_and_it_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = energies_of_several_sizes(tmp_path / "a.xyz")
    capsys.readouterr()
    fine_tune(data, "out_dir=out/fit")
    assert "eV, after fitted atom references" in capsys.readouterr().out
    fine_tune(data, "out_dir=out/none", "references=none")
    assert "eV, no atom references; energy grows with the molecule: try references=fit" in capsys.readouterr().out
    fitted, plain = (
        json.loads(Path(f"out/{name}/metrics.json").read_text())["test"]["test"] for name in ("fit", "none")
    )
    assert fitted["energy_mae"] < 500 < plain["energy_mae"]  # meV


def unknown_gaps(path, index, value=np.nan, **splits):
    shutil.copy(ROOT / "data/qm9_demo.h5", path)
    with h5py.File(path, "r+") as file:
        for m in index:
            file["y/gap"][m] = value
        for name, members in splits.items():
            file[f"split/{name}"] = np.array(members)
    return path


@pytest.mark.parametrize("kind", ["freeze_encoder=true", "freeze_encoder=false"])
def test_molecules_whose_label_is_unknown_are_left_out(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    parts = {"a": range(60), "b": range(60, 80), "c": range(80, 100)}
    path = unknown_gaps(tmp_path / "a.h5", [3, 4, 5, 85, 500], **parts)
    splits = ["train_split=a", "val_split=b", "test_split=c", "train_size=0", "val_size=0", "test_size=0"]
    fine_tune(path, "target=gap", *splits, kind, "out_dir=named")
    said = capsys.readouterr().out
    assert "left out: 3 of a, 1 of c: gap unknown\n" in said
    known = np.delete(Molecules(path).label("gap")[:60], [3, 4, 5])
    assert f"gap: mean {known.mean():.6g}, scale {known.std():.4g} eV" in said
    metrics = json.loads(Path("named/metrics.json").read_text())
    assert metrics["molecules"] == {"train": 57, "val": 20, "c": 19} and metrics["test"]["c"]["gap_mae"] > 0
    fine_tune(path, "target=gap", "train_size=1000", "test_size=0", kind, "out_dir=drawn")
    assert "left out: 5 of all: gap unknown\n" in capsys.readouterr().out
    assert json.loads(Path("drawn/metrics.json").read_text())["molecules"] == {"train": 1000, "val": 10, "test": 985}
    fine_tune(path, "target=lumo", kind, "out_dir=other")  # a label without unknowns: every molecule counts
    assert "left out" not in capsys.readouterr().out


def test_labels_that_are_infinite_or_all_unknown_stop_a_run(tmp_path):
    path = unknown_gaps(tmp_path / "inf.h5", [7], np.inf)
    with pytest.raises(InputError, match="gap is not finite everywhere"):
        fine_tune(path, "target=gap", "train_size=0", f"out_dir={tmp_path}/a")
    path = unknown_gaps(tmp_path / "nan.h5", range(2000))
    with pytest.raises(InputError, match="has 0 molecules for these, gap known") as error:
        fine_tune(path, "target=gap", f"out_dir={tmp_path}/a")
    assert error.value.code == 2 and not (tmp_path / "a").exists()


def test_home_and_variables_in_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    energies_of_several_sizes(tmp_path / "a.xyz")
    fine_tune("~/a.h5", "out_dir=$RUNS/one")
    assert (tmp_path / "runs/one/metrics.json").exists() and not Path("~").exists() and not Path("$RUNS").exists()


def test_a_longer_run_may_have_a_longer_schedule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = energies_of_several_sizes(tmp_path / "a.xyz")
    fine_tune(data, "out_dir=out/a", "lr_cosine_length=3")
    with pytest.raises(InputError, match="set max_steps, lr_cosine_length higher"):
        fine_tune(data, "out_dir=out/a", "lr_cosine_length=3", "resume=true")
    fine_tune(data, "out_dir=out/a", "lr_cosine_length=6", "max_steps=6", "resume=true")


SPAWN = "import sys, torch; torch.multiprocessing.set_start_method('spawn'); from {0} import cli, main; cli(main)"


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_a_signal_to_the_whole_group_ends_the_run_after_its_step(tmp_path, stage, workers, method):
    """As `timeout` and queues send it: loader processes get it, too."""
    config = {"pretrain": "demo", "finetune": "demo_gap"}[stage]
    program = [str(ROOT / f"{stage}.py")] if method == "fork" else ["-c", SPAWN.format(stage)]
    command = [sys.executable, *program, str(ROOT / f"configs/{config}.yaml"), "max_steps=100000"]
    command += [f"data={ROOT / 'data/qm9_demo.h5'}", f"num_workers={workers}", "log_every=1", "save_every=100000"]
    command += ["val_every=100000", "out_dir=run", *(f"model.{key}={value}" for key, value in TINY["model"].items())]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True, **pipes)
    log = tmp_path / "run/log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_bytes().count(b'"train"') > 3):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    err = process.communicate(timeout=120)[1]
    assert process.returncode == 128 + signal.SIGTERM and len(err.strip().splitlines()) == 1, err
    assert "stopped by SIGTERM after step" in err and (tmp_path / "run/last.pt").exists()


# ---------------------------------------------------------------- further ways to say a unit, tags, nested checkpoints


@pytest.mark.parametrize(
    ("stated", "unit"),
    [
        ("length=bohr", "bohr"),
        ("distance=nm", "nm"),
        ("uom=kJ/mol", "kJ/mol"),
        ("einheit=Hartree", "Hartree"),
        ('info=_JSON{"energy_unit":"Hartree"}', "Hartree"),
        ('metadata=_JSON{"units":{"energy":"Hartree"}}', "Hartree"),
        ("geometry (Bohr)", "Bohr"),
        ("energy_in=kcal/mol", "kcal/mol"),
    ],
)
def test_a_unit_is_seen_wherever_the_comment_says_it(stated, unit, tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(f"1\nProperties=species:S:1:pos:R:3 energy=-1.0 {stated}\nAr 0 0 0\n")
    with pytest.raises(InputError, match=f"frame 0: its .* says {unit}: convert the numbers to eV"):
        data.main(["xyz", str(path), str(tmp_path / "out.h5")])
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize("stated", ["name=bohr", "config_type=hartree-fock", "method=Hartree-Fock", "charge=1"])
def test_a_word_that_is_no_unit_is_let_through(stated, tmp_path):
    path = tmp_path / "a.xyz"
    path.write_text(f"1\nProperties=species:S:1:pos:R:3 energy=-1.0 {stated}\nAr 0 0 0\n")
    data.main(["xyz", str(path), str(tmp_path / "out.h5")])
    assert Molecules(tmp_path / "out.h5").label("energy") == -1.0


def sdf_with(tags, smiles="CO"):
    Chem = pytest.importorskip("rdkit.Chem")
    from rdkit.Chem import AllChem

    mol = Chem.AddHs(Chem.MolFromSmiles(smiles))
    AllChem.EmbedMolecule(mol, randomSeed=1)
    return Chem.MolToMolBlock(mol) + "".join(f">  <{name}>\n{value}\n\n" for name, value in tags) + "$$$$\n"


def test_a_tag_that_is_given_twice_is_unknown_and_said(tmp_path, capsys):
    path = tmp_path / "a.sdf"
    path.write_text(sdf_with([("t", 1.0), ("t", 2.0)]) + sdf_with([("t", 3.0)]))
    data.main(["sdf", str(path), str(tmp_path / "out.h5"), "labels=t:eV"])
    assert np.array_equal(Molecules(tmp_path / "out.h5").label("t"), [np.nan, 3.0], equal_nan=True)
    assert "not read: t, given more than once (1 molecules)" in capsys.readouterr().out


@pytest.mark.parametrize("labels", ["labels=.:eV", "labels=..:eV", "labels=t:" + "e" * 300])
def test_a_label_that_cannot_be_a_name_is_refused(labels, tmp_path):
    path = tmp_path / "a.sdf"
    path.write_text(sdf_with([(".", 1.0), ("t", 2.0)]))
    with pytest.raises(InputError, match="write labels=NAME:UNIT") as error:
        data.main(["sdf", str(path), str(tmp_path / "out.h5"), labels])
    assert error.value.code == 2 and len(str(error.value)) < 400


def test_a_unit_in_the_name_of_a_tag_must_be_the_one_asked_for(tmp_path):
    path = tmp_path / "a.sdf"
    path.write_text(sdf_with([("t [kcal/mol]", 1.0)]))
    with pytest.raises(InputError, match="says kcal/mol: write that as its unit"):
        data.main(["sdf", str(path), str(tmp_path / "out.h5"), "labels=t [kcal/mol]:eV"])
    data.main(["sdf", str(path), str(tmp_path / "out.h5"), "labels=t [kcal/mol]:kcal/mol"])
    assert Molecules(tmp_path / "out.h5").units == {"t [kcal_mol]": "kcal/mol"}


@pytest.mark.parametrize("titles", [("methanol", "methanol", "methanol"), ("", "", ""), ("conf_1", "conf_2", "a")])
def test_conformers_of_one_molecule_are_told(tmp_path, capsys, titles):
    path = tmp_path / "a.sdf"
    blocks = sdf_with([]), sdf_with([]), sdf_with([], "CCO")
    path.write_text("".join(title + block for title, block in zip(titles, blocks, strict=True)))
    data.main(["sdf", str(path), str(tmp_path / "out.h5")])
    assert "conformers? A random split parts them (1 molecules)" in capsys.readouterr().out


def test_an_ion_is_told(tmp_path, capsys):
    path, words = tmp_path / "a.sdf", "charged: neither the file nor the network keeps the charge (1 molecules)"
    path.write_text(sdf_with([], "CC(=O)[O-]") + sdf_with([]))
    data.main(["sdf", str(path), str(tmp_path / "out.h5")])
    assert words in capsys.readouterr().out
    convert("xyz", [xyz(tmp_path / "a.xyz", "charge=-1", "total_charge=0", "q", atoms="H 0 0 0\n")], tmp_path / "a.h5")
    assert words in capsys.readouterr().out


def test_a_geometry_without_its_hydrogens_is_said(tmp_path, capsys):
    Chem = pytest.importorskip("rdkit.Chem")
    path = tmp_path / "a.sdf"
    bare = Chem.RemoveHs(Chem.MolFromMolBlock(sdf_with([]).partition("$$$$")[0], removeHs=False))
    path.write_text(Chem.MolToMolBlock(bare) + "$$$$\n" + sdf_with([]))
    data.main(["sdf", str(path), str(tmp_path / "out.h5")])
    assert "an atom with a free valence: are hydrogens left out? (1 molecules)" in capsys.readouterr().out


def test_a_geometry_with_polar_hydrogens_alone_is_said(tmp_path, capsys):
    """As docking programs write it."""
    Chem = pytest.importorskip("rdkit.Chem")
    mol = Chem.RWMol(Chem.MolFromMolBlock(sdf_with([], "CC(=O)NC").partition("$$$$")[0], removeHs=False))
    carbons = [a for a in mol.GetAtoms() if a.GetAtomicNum() == 1 and a.GetNeighbors()[0].GetAtomicNum() == 6]
    for number in sorted((atom.GetIdx() for atom in carbons), reverse=True):
        mol.RemoveAtom(number)
    assert sum(atom.GetAtomicNum() == 1 for atom in mol.GetAtoms()) == 1
    path = tmp_path / "a.sdf"
    path.write_text(Chem.MolToMolBlock(mol) + "$$$$\n")
    data.main(["sdf", str(path), str(tmp_path / "out.h5")])
    assert "an atom with a free valence: are hydrogens left out? (1 molecules)" in capsys.readouterr().out


def test_state_dicts_inside_a_checkpoint_are_found(tmp_path):
    weights = EquivariantTransformer(SMALL).state_dict()
    torch.save({"epoch": 3, "model_state_dict": weights, "optimizer": {"lr": 1.0}}, tmp_path / "a.pt")
    encoder, _ = read_encoder(tmp_path / "a.pt", SMALL)
    assert torch.equal(encoder.embedding.weight, weights["embedding.weight"])
    other = {key: value + 1 if "weight" in key else value for key, value in weights.items()}
    torch.save({"student": weights, "teacher": other}, tmp_path / "b.pt")
    with pytest.raises(InputError, match="several networks.*student, teacher"):
        read_encoder(tmp_path / "b.pt", SMALL)
    encoder, _ = read_encoder(tmp_path / "b.pt", SMALL, "teacher")
    assert torch.equal(encoder.embedding.weight, other["embedding.weight"])
