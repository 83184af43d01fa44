"""formats/ and data.py's commands: every raw format to the schema and back, units, refusals."""

import ast
import gzip
import importlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from raw_files import (
    METHANE,
    UNITS,
    WATER,
    convert,
    extxyz,
    md17_npz,
    qm9_numbers,
    qm9_tar,
    qm9_wheel,
    qm9_xyz,
    sdf_block,
    tar,
    water_frames,
)

import data
from data import Molecules
from formats.sources import ATOMIC_NUMBER, HAR2EV
from formats.write import write_h5
from harness.errors import InputError, cli
from harness.files import sha256

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "qm9_demo.h5"


def run(*words, cwd=ROOT):
    return subprocess.run(
        [sys.executable, str(ROOT / "data.py"), *map(str, words)], capture_output=True, text=True, cwd=cwd
    )


def refused(match, source, raws, out, code=1):
    """The conversion ends in an InputError of one line, and leaves nothing behind."""
    before = sorted(os.listdir(out.parent))
    with pytest.raises(InputError, match=match) as caught:
        convert(source, raws, out)
    assert "\n" not in str(caught.value) and caught.value.code == code
    assert sorted(os.listdir(out.parent)) == before


@pytest.mark.parametrize("kind", ["wheel", "bz2", "gz", "tar"])
def test_qm9_formats_give_known_values(tmp_path, kind, capsys):
    raws = {
        "wheel": lambda: [qm9_wheel(tmp_path)],
        "bz2": lambda: [qm9_tar(tmp_path)],
        "gz": lambda: [qm9_tar(tmp_path, "dsgdb9nsd.xyz.tar.gz")],
        "tar": lambda: [qm9_tar(tmp_path, "dsgdb9nsd.xyz.tar")],
    }[kind]()
    m = convert("qm9", raws, tmp_path / "qm9.h5")
    assert m.ids.tolist() == [1, 2, 3] and m.ptr.tolist() == [0, 5, 9, 12] and m.units == UNITS
    for name, value in METHANE.items():
        assert m.label(name)[0] == pytest.approx(value, rel=1e-6, abs=1e-12), name
    np.testing.assert_allclose(m.label("gap"), m.label("lumo") - m.label("homo"), atol=1e-4 * HAR2EV)
    batch = m.read([2])
    assert batch["z"].tolist() == [8, 1, 1]
    digits = 1e-7
    water = np.array([row[1:] for row in qm9_numbers(3)[1]], dtype=np.float64)
    np.testing.assert_allclose(batch["pos"], water, atol=digits)
    assert batch["pos"][0, 2].item() == pytest.approx(0.0076015923, abs=digits)  # the *^ of the archive
    assert "skipped 0" in capsys.readouterr().out
    assert "Ramakrishnan" in m.attrs["attribution"] and m.attrs["source_sha256"].split()[0] == sha256(raws[0])


@pytest.mark.parametrize("kind", ["wheel", "bz2"])
def test_uncharacterized_molecules_are_dropped_and_reported(tmp_path, kind, capsys):
    listed = tmp_path / "uncharacterized.txt"
    listed.write_text(
        "The molecules that failed\n=====\n  Index  GDB-17  B3LYP\n-----\n      2   N   N.H  0.5\n-----\n"
    )
    raws = {
        "wheel": lambda: [qm9_wheel(tmp_path)],
        "bz2": lambda: [qm9_tar(tmp_path)],
    }
    m = convert("qm9", [listed, *raws[kind]()], tmp_path / "qm9.h5")
    assert m.ids.tolist() == [1, 3] and m.label("Cv").tolist() == [6.469, 6.002]
    assert "1: on the list of uncharacterized molecules (id 2)" in capsys.readouterr().out


def test_qm9_refusals(tmp_path):
    out = tmp_path / "qm9.h5"
    wheel, archive, sdf = qm9_wheel(tmp_path), qm9_tar(tmp_path), tmp_path / "gdb9.sdf"
    sdf.write_text(sdf_block("gdb_1", qm9_numbers(1)[1]))
    refused("qm9 takes", "qm9", [sdf], out, code=2)
    refused("qm9 takes", "qm9", [wheel, archive], out, code=2)
    empty_list = tmp_path / "uncharacterized.txt"
    empty_list.write_text("no numbers here\n")
    refused("no line starts with the number", "qm9", [archive, empty_list], out)
    renamed = tmp_path / "renamed.whl"
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(renamed, "w") as file:
        for name in whole.namelist():
            file.writestr(name, whole.read(name).replace(b"HOMO_au", b"homo_au"))
    refused("no column HOMO_au", "qm9", [renamed], out)
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("numpy/__init__.py", "")
    refused("no molecules inside", "qm9", [other], out)
    wrong = tar(tmp_path / "wrong.tar.gz", {"a.xyz": "1\ncomment\nH 0 0 0\n"})
    refused("a.xyz is not an xyz file of QM9", "qm9", [wrong], out)
    fewer = tar(tmp_path / "fewer.tar", {"a.xyz": qm9_xyz(1).replace("\t6.469", "")})
    refused("a.xyz is not an xyz file of QM9", "qm9", [fewer], out)
    refused("no molecules inside", "qm9", [tar(tmp_path / "empty.tar", {"readme.txt": "nothing"})], out)


@pytest.mark.parametrize("name", ["a.tar.bz2", "a.tar.gz"])
@pytest.mark.parametrize("keep", [0, 0.3, 0.6, 0.99])
def test_cut_off_compressed_archives_are_refused(tmp_path, name, keep):
    path = qm9_tar(tmp_path, name)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    refused("damaged, cut off or not the right kind", "qm9", [path], tmp_path / "qm9.h5")


def test_cut_off_or_damaged_plain_archives_are_refused(tmp_path):
    """Also where the cut falls between two members or in a header, which tarfile alone takes for the end."""
    path = qm9_tar(tmp_path, "a.tar")
    whole = path.read_bytes()
    second = whole.index(b"dsgdb9nsd_000002.xyz")  # where its header begins
    end = whole.index(b"dsgdb9nsd_000003.xyz") + 1024  # one block of header, one of text
    assert second == 1024 and not whole[end:].strip(b"\0")
    for keep in (0, 100, 512, second, second + 100, second + 512, second + 600, end):
        path.write_bytes(whole[:keep])
        refused("damaged, cut off or not the right kind", "qm9", [path], tmp_path / "qm9.h5")
    path.write_bytes(whole[:second] + b"?" * 512 + whole[second + 512 :])
    refused("damaged, cut off or not the right kind", "qm9", [path], tmp_path / "qm9.h5")


def many_atoms(num):
    """num slightly different waters, ammonias and methanes -> [(symbol, x, y, z)] each."""
    rng = np.random.default_rng(0)
    for k in range(num):
        shift = rng.normal(0, 3, 3)
        yield [(s, *(np.array(p, dtype=float) + shift)) for s, *p in qm9_numbers(1 + k % 3)[1]]


def test_pcqm4mv2_sdf_keeps_hydrogens_and_order_over_worker_processes(tmp_path, capsys):
    pytest.importorskip("rdkit")
    molecules = list(many_atoms(700))  # more than two chunks: this goes through the pool
    blocks = [sdf_block("", atoms) for atoms in molecules]
    blocks[300] = blocks[300].replace("  0  0     0", " 99  0     0")  # bonds that are not there
    blocks[301] = sdf_block("", [(s, x, y, 0) for s, x, y, _ in molecules[301]], dimension="2D")
    blocks[302] = blocks[302].replace("\n", "\r\n")
    archive = tar(tmp_path / "pcqm4m-v2-train.sdf.tar.gz", {"pcqm4m-v2-train.sdf": "".join(blocks)})
    m = convert("pcqm4mv2", [archive], tmp_path / "pcqm.h5")
    expected = [k for k in range(700) if k not in (300, 301)]
    assert m.ids.tolist() == expected and m.units == {} and m.splits == {}
    batch = m.read(range(len(m)))
    atoms = [atom for k in expected for atom in molecules[k]]
    assert batch["z"].tolist() == [ATOMIC_NUMBER[s] for s, *_ in atoms] and 1 in batch["z"]
    np.testing.assert_allclose(batch["pos"], np.array([p for _, *p in atoms]), atol=6e-5)
    said = capsys.readouterr().out
    assert "1: not readable by RDKit (id 300)" in said
    assert "1: flat and not marked 3D: a drawing, no geometry (id 301)" in said


def test_pcqm4mv2_xyz_is_sorted_by_number_and_reads_both_headers(tmp_path, capsys):
    path = tmp_path / "pcqm4m-v2_xyz.zip"
    rows = {
        key: "".join("{} {:.6f} {:.6f} {:.6f}\n".format(*atom) for atom in atoms)
        for key, atoms in enumerate(many_atoms(12))
    }
    with zipfile.ZipFile(path, "w") as archive:
        for key in reversed(rows):
            num = rows[key].count("\n")
            header = [f"{num}\n", f"{num}\n\n", f"{num}\nwater or so\n"][key // 3 % 3]
            archive.writestr(f"pcqm4m-v2_xyz/0000{key % 2}/{key}.xyz", header + rows[key])
        archive.writestr("pcqm4m-v2_xyz/00000/12.xyz", "3\n\nO 0 0 0\nH 0 0 1\n")
        archive.writestr("pcqm4m-v2_xyz/00000/13.xyz", "1\n\nQq 0 0 0\n")
        archive.writestr("pcqm4m-v2_xyz/00000/14.xyz", "1\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
        archive.writestr("pcqm4m-v2_xyz/readme.xyz", "not a molecule\n")
    m = convert("pcqm4mv2", [path], tmp_path / "pcqm.h5")
    assert m.ids.tolist() == list(range(12))
    np.testing.assert_allclose(m.read([7])["pos"], np.array([p for _, *p in list(many_atoms(12))[7]]), atol=1e-6)
    said = capsys.readouterr().out
    assert "2: not readable as xyz (id 12, 14)" in said and "1: an element that does not exist (id 13)" in said


def test_sdf_ids_are_titles_where_they_are_numbers(tmp_path):
    pytest.importorskip("rdkit")
    path = tmp_path / "drugs.sdf.gz"
    names = ["20212894", "aspirin", "10019354"]
    path.write_bytes(gzip.compress("".join(map(sdf_block, names, many_atoms(3))).encode()))
    m = convert("sdf", [path], tmp_path / "drugs.h5")
    assert m.ids.tolist() == [20212894, 1, 10019354] and m.name == "drugs"


def test_sdfs_of_a_tar_are_counted_as_one(tmp_path):
    """And the blanks in a tag are not of its name."""
    pytest.importorskip("rdkit")
    blocks = [sdf_block("", atoms).replace("M  END\n", "M  END\n> < logS >\n-2.5\n\n") for atoms in many_atoms(4)]
    parts = {"a.sdf": "".join(blocks[:2]), "readme.txt": "", "b.sdf": "".join(blocks[2:])}
    raw, out = str(tar(tmp_path / "two.tar.gz", parts)), str(tmp_path / "two.h5")
    data.main(["sdf", raw, out, "labels=logS:log mol/L"])
    assert Molecules(out).ids.tolist() == [0, 1, 2, 3] and Molecules(out).label("logS").tolist() == [-2.5] * 4


def test_a_large_molecule_is_read_in_small_pieces(tmp_path, monkeypatch, capsys):
    """What is looked at grows with the square of a molecule: all frames of MD22 at once would take gigabytes."""
    z, pos = np.full(1000, 6), 1.5 * np.stack(np.unravel_index(np.arange(1000), (10, 10, 10)), axis=1)
    frames = ({"id": k, "z": z, "pos": pos, "labels": {}} for k in range(25))
    write_h5(tmp_path / "a.h5", frames, {"source": "test"}, {})
    m, read, sizes = Molecules(tmp_path / "a.h5"), Molecules.read, []

    def counted(self, index, forces=False):
        sizes.append(len(index))
        return read(self, index, forces)

    monkeypatch.setattr(Molecules, "read", counted)
    assert m.composition(np.arange(25), 7)[:, 6].tolist() == [1000.0] * 25
    data.main(["info", str(tmp_path / "a.h5")])
    assert sizes == [10, 10, 5] * 2 and "C 25,000" in capsys.readouterr().out


def test_cut_off_or_empty_sdf_and_zip_are_refused(tmp_path):
    pytest.importorskip("rdkit")
    out, path = tmp_path / "out.h5", tmp_path / "a.sdf"
    whole = "".join(map(sdf_block, "abc", many_atoms(3)))
    path.write_text(whole[:-60])
    refused("no closing", "sdf", [path], out)
    path.write_text("")
    refused("no molecules inside", "sdf", [path], out)
    packed = tmp_path / "a.sdf.gz"
    packed.write_bytes(gzip.compress(whole.encode())[:-40])
    refused("damaged, cut off", "sdf", [packed], out)
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/1.xyz", "3\n\nO 0 0 0\nH 0 0 1\nH 0 1 0\n")
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    refused("damaged, cut off", "pcqm4mv2", [path], out)
    damaged = bytearray(whole)
    damaged[40] ^= 0xFF
    path.write_bytes(damaged)
    refused("damaged, cut off", "pcqm4mv2", [path], out)


def test_md17_and_md22(tmp_path):
    z, pos, energy, forces = water_frames()
    m = convert("md17", [md17_npz(tmp_path / "md17_water.npz")], tmp_path / "water.h5")
    assert m.units == {"energy": "kcal/mol", "forces": "kcal/mol/angstrom"} and m.ids.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(m.label("energy"), energy)  # float64 to the last bit
    batch = m.read([3, 1], forces=True)
    np.testing.assert_array_equal(batch["forces"], np.concatenate([forces[3], forces[1]]).astype(np.float32))
    np.testing.assert_array_equal(batch["pos"], np.concatenate([pos[3], pos[1]]).astype(np.float32))
    assert batch["batch"].tolist() == [0, 0, 0, 1, 1, 1] and "Chmiela" in m.attrs["attribution"]
    raws = [
        md17_npz(tmp_path / "md22_water.npz", E=energy),
        md17_npz(tmp_path / "md22_wet.npz", R=pos + 50, z=z.astype(int)),
    ]
    m = convert("md22", raws, tmp_path / "md22.h5")
    assert {name: index.tolist() for name, index in m.splits.items()} == {
        "md22_water": [0, 1, 2, 3],
        "md22_wet": [4, 5, 6, 7],
    }


def test_rmd17_ids_are_the_old_indices(tmp_path):
    z, pos, energy, forces = water_frames()
    arrays = {"nuclear_charges": z, "coords": pos, "energies": energy, "forces": forces, "old_energies": energy + 1}
    old = np.array([179251, 52093, 153431, 7])
    np.savez(tmp_path / "rmd17_water.npz", **arrays, old_indices=old)
    m = convert("rmd17", [tmp_path / "rmd17_water.npz"], tmp_path / "r.h5")
    assert m.ids.tolist() == old.tolist() and m.label("energy").tolist() == energy.tolist()
    refused("no z, R, E, F among its arrays nuclear_charges", "md17", [tmp_path / "rmd17_water.npz"], tmp_path / "o.h5")


def test_unusable_frames_are_skipped_by_cause(tmp_path, capsys):
    z, pos, energy, forces = water_frames(8)
    pos[1, 0, 0], energy[2], forces[3, 0, 0], pos[4, 2], pos[5] = np.nan, np.nan, np.inf, pos[4, 1] + 0.1, 1e39
    m = convert("md17", [md17_npz(tmp_path / "a.npz", R=pos, E=energy, F=forces)], tmp_path / "a.h5")
    assert m.ids.tolist() == [0, 6, 7] and len(m.read(range(3))["z"]) == 9
    said = capsys.readouterr().out
    for line in (
        "skipped 5",
        "2: a coordinate that is not finite, or beyond 100000 Å (id 1, 5)",
        "2: a label that is not finite (id 2, 3)",
    ):
        assert line in said
    assert "1: two atoms closer than 0.5 Å (id 4)" in said


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"R": np.zeros((4, 2, 3))}, "shapes that do not fit"),
        ({"E": np.zeros(3)}, "shapes that do not fit"),
        ({"F": np.zeros((4, 3))}, "shapes that do not fit"),
        ({"z": np.array([8.0, 1.0, 1.0])}, "atomic numbers must be integers"),
        ({"E": np.array(["a"] * 4)}, "all else numbers"),
        ({"R": np.zeros((0, 3, 3)), "E": np.zeros(0), "F": np.zeros((0, 3, 3))}, "no molecules inside"),
        ({"R": np.zeros((4, 3, 3))}, r"no molecule that can be used \(two atoms closer than 0.5 Å: 4\)"),
        ({"z": np.array([8, 0, 1])}, r"no molecule that can be used \(an element"),
        ({"E": np.array([None] * 4)}, "damaged, cut off or not the right kind"),
    ],
)
def test_npz_refusals(tmp_path, changes, match):
    refused(match, "md17", [md17_npz(tmp_path / "a.npz", **changes)], tmp_path / "a.h5")


def test_broken_npz_is_refused(tmp_path):
    path, out = md17_npz(tmp_path / "a.npz"), tmp_path / "out.h5"
    whole = path.read_bytes()
    for content in (b"", b"PK", whole[: len(whole) // 2], b"1 2 3\n"):
        path.write_bytes(content)
        refused("not an npz file, or cut off", "md17", [path], out)
    damaged = bytearray(whole)
    damaged[whole.index(water_frames()[1].tobytes()) + 70] ^= 0xFF
    path.write_bytes(damaged)
    refused("damaged, cut off", "md17", [path], out)
    np.savez(path)
    refused("not an npz file|no z, R, E, F", "md17", [path], out)


def test_extended_xyz_files_become_splits(tmp_path):
    pytest.importorskip("ase")
    raws = [
        extxyz(tmp_path / "train_300K.xyz", 3, "REF_energy", "REF_forces"),
        extxyz(tmp_path / "test_300K.xyz", 2, "REF_energy", "REF_forces", seed=1),
    ]
    m = convert("xyz", raws, tmp_path / "3bpa.h5")
    assert {name: index.tolist() for name, index in m.splits.items()} == {"train_300K": [0, 1, 2], "test_300K": [3, 4]}
    assert m.units == {"energy": "eV", "forces": "eV/angstrom"} and m.ids.tolist() == [0, 1, 2, 0, 1]
    _, pos, energy, forces = water_frames(2, seed=1)
    np.testing.assert_allclose(m.label("energy")[3:], energy / 23.06, rtol=1e-10)
    batch = m.read(m.splits["test_300K"], forces=True)
    np.testing.assert_allclose(batch["forces"], (forces / 23.06).reshape(-1, 3), atol=1e-6)
    np.testing.assert_allclose(batch["pos"], pos.reshape(-1, 3), atol=1e-6)


def test_xyz_without_labels_and_with_cells(tmp_path, capsys):
    pytest.importorskip("ase")
    path = tmp_path / "plain.xyz"
    path.write_text("3\nwater\n" + "".join("{} {} {} {}\n".format(s, *p) for s, p in zip("OHH", WATER)))
    assert convert("xyz", [path], tmp_path / "plain.h5").units == {}
    assert "none, geometries only" in capsys.readouterr().out
    crystal = extxyz(tmp_path / "b.xyz", extra='Lattice="5 0 0 0 5 0 0 0 5" pbc="T T T"')
    refused("periodic: not a molecule: 3", "xyz", [crystal], tmp_path / "b.h5")
    both = [path, extxyz(tmp_path / "c.xyz")]
    refused(
        "0 of c has energy and forces, those before it no labels: convert them apart", "xyz", both, tmp_path / "b.h5"
    )
    for content in ("", "hello\n", "3\nwater\nO 0 0 0\n", "3\n\nO 0 0 0\nH 0 0 1\nH 0 x 0\n"):
        path.write_text(content)
        refused("damaged, cut off|no molecules inside", "xyz", [path], tmp_path / "b.h5")


def test_command_line_converts_samples_and_tells(tmp_path):
    done = run("qm9", qm9_wheel(tmp_path), tmp_path / "qm9.h5")
    assert done.returncode == 0 and "3 molecules, 12 atoms" in done.stdout and done.stderr == ""
    done = run("info", tmp_path / "qm9.h5")
    for words in (
        "H 9, C 1, N 1, O 1",
        "3 to 5 per molecule",
        "U0             eV",
        "CC0 1.0",
    ):
        assert words in done.stdout
    assert "command        python data.py qm9 qm9pack-1.0.3-py3-none-any.whl qm9.h5" in done.stdout
    outs = [tmp_path / "a.h5", tmp_path / "b" / "a.h5"]
    outs[1].parent.mkdir()
    for out in outs:
        data.main(["sample", str(tmp_path / "qm9.h5"), str(out), "seed=3", "num=2"])
    assert outs[0].read_bytes() == outs[1].read_bytes()  # to the byte
    small, whole = Molecules(outs[0]), Molecules(tmp_path / "qm9.h5")
    rows = [whole.ids.tolist().index(key) for key in small.ids]
    assert len(small) == 2 and rows == sorted(rows) and small.units == whole.units
    assert torch.equal(small.read([0, 1])["pos"], whole.read(rows)["pos"])
    assert small.label("U0").tolist() == whole.label("U0")[rows].tolist()
    assert small.attrs["command"].split("\n")[1] == "python data.py sample qm9.h5 a.h5 num=2 seed=3"


def test_sample_keeps_forces_and_splits(tmp_path):
    raws = [md17_npz(tmp_path / "md17_a.npz"), md17_npz(tmp_path / "md17_b.npz", E=np.arange(4.0))]
    whole = convert("md17", raws, tmp_path / "md.h5")
    data.main(["sample", whole.path, str(tmp_path / "few.h5"), "num=5", "seed=1"])
    few = Molecules(tmp_path / "few.h5")
    rows = np.sort(np.random.default_rng(1).permutation(8)[:5])
    assert few.units == whole.units and few.label("energy").tolist() == whole.label("energy")[rows].tolist()
    assert torch.equal(few.read(range(5), forces=True)["forces"], whole.read(rows, forces=True)["forces"])
    assert few.splits["md17_b"].tolist() == np.flatnonzero(rows >= 4).tolist()


def test_mistakes_on_the_command_line_are_one_line(tmp_path, monkeypatch, capsys):
    npz, out = md17_npz(tmp_path / "a.npz"), tmp_path / "o.h5"
    for words, code, says in [
        ([], 2, "usage: python data.py SOURCE RAW"),
        (["md71", npz, out], 2, "usage"),
        (["md17", npz], 2, "usage"),
        (["sample", DEMO, out, "num=ten", "seed=0"], 2, "usage"),
        (["sample", DEMO, out, "num=2001", "seed=0"], 2, "has 2000 molecules"),
        (["sample", DEMO, out, "num=0", "seed=0"], 2, "has 2000 molecules"),
        (["md17", out, npz], 2, "must end in .h5"),
        (["md17", out, tmp_path / "p.h5"], 1, "the file to write is the last one"),
        (["md17", tmp_path / "none.npz", out], 1, "no such file"),
        (["md17", tmp_path, out], 1, "a folder, not a file"),
        (["md17", npz, tmp_path / "no" / "o.h5"], 1, "no such folder"),
        (["md17", npz, npz, out], 2, "two files have the same name"),
        (["pcqm4mv2", npz, npz, out], 2, "takes one raw file"),
        (["info", npz], 1, "not a whole HDF5 file"),
        (["info", tmp_path], 1, "a folder, not a file"),
    ]:
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            cli(data.main)
        said = capsys.readouterr()
        assert exit_.value.code == code and says in said.err and said.out == "", said
        assert said.err.startswith("data.py: error: ") and said.err.count("\n") == 1
    done = run("md17", out, npz)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.npz"]


def test_existing_file_is_never_overwritten(tmp_path):
    out = tmp_path / "o.h5"
    out.write_text("precious")
    refused("exists: remove it, or choose another name", "md17", [md17_npz(tmp_path / "a.npz")], out)
    assert out.read_text() == "precious"


def test_interrupt_leaves_nothing_behind(tmp_path):
    def stream():
        yield {"id": 0, "z": np.array([8, 1, 1]), "pos": WATER, "labels": {}}
        assert any(name.startswith(".o.h5.") for name in os.listdir(tmp_path))  # it was being written
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_h5(tmp_path / "o.h5", stream(), {"source": "x"}, {})
    assert os.listdir(tmp_path) == []


def test_missing_package_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "rdkit", None)
    monkeypatch.delitem(sys.modules, "rdkit.Chem", raising=False)
    path = tmp_path / "a.sdf"
    path.write_text(sdf_block("a", qm9_numbers(1)[1]))
    refused("pip install rdkit", "sdf", [path], tmp_path / "a.h5")
    monkeypatch.setitem(sys.modules, "ase", None)
    monkeypatch.delitem(sys.modules, "ase.io", raising=False)
    refused("pip install ase", "xyz", [extxyz(tmp_path / "a.xyz")], tmp_path / "a.h5")


def test_the_program_of_the_demo_frames_imports_what_is_there():
    """It needs tblite, so it is not run here."""
    tree = ast.parse((Path(data.__file__).parent / "data/make_ethanol.py").read_text(encoding="utf-8"))
    names = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in names if node.module.split(".")[0] in ("formats", "harness")]
    assert ours
    for node in ours:
        assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)
