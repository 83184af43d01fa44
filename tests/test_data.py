"""data.py: every raw format to the schema and back, units, refusals, and an order made of (seed, step)."""

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from data import HAR2EV, InputError, Molecules, StepBatches, epoch_order, split_indices

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "qm9_demo.h5"

# The first molecules of QM9: 15 numbers of the comment line; atoms with charges; a frequency and the SMILES.
QM9 = {
    1: (
        "157.7118 157.70997 157.70699 0. 13.21 -0.3877 0.1171 0.5048 35.3641 0.044749 "
        "-40.47893 -40.476062 -40.475117 -40.498597 6.469",
        "C -0.0126981359 1.0858041578 0.0080009958 -0.535689\n"
        "H 0.002150416 -0.0060313176 0.0019761204 0.133921\n"
        "H 1.0117308433 1.4637511618 0.0002765748 0.133922\n"
        "H -0.540815069 1.4475266138 -0.8766437152 0.133923\n"
        "H -0.5238136345 1.4379326443 0.9063972942 0.133923\n",
        "1341.307\nC C",
    ),
    2: (
        "293.60975 293.54111 191.39397 1.6256 9.46 -0.257 0.0829 0.3399 26.1563 0.034358 "
        "-56.525887 -56.523026 -56.522082 -56.544961 6.316",
        "N -0.0404260543 1.0241077531 0.0625637998 -0.707143\n"
        "H 0.0172574639 0.0125452063 -0.0273771593 0.235712\n"
        "H 0.9157893661 1.3587451948 -0.0287577581 0.235712\n"
        "H -0.5202777357 1.3435321258 -0.7755426124 0.23572\n",
        "1103.8733\nN N",
    ),
    3: (
        "799.58812 437.90386 282.94545 1.8511 6.31 -0.2928 0.0687 0.3615 19.0002 0.021375 "
        "-76.404702 -76.401867 -76.400922 -76.422349 6.002",
        "O -0.0343604951 0.9775395708 7.6015923*^-3 -0.589706\n"  # exponents as the archive has them
        "H 0.0647664923 0.0205721989 1.5346341*^-3 0.294853\n"
        "H 0.8717903737 1.3007924048 6.931336*^-4 0.294853\n",
        "1671.4222\nO O",
    ),
}
# Methane in the units of this project: energies from Hartree, the rest as published.
METHANE = {"A": 157.7118, "B": 157.70997, "C": 157.70699, "mu": 0.0, "alpha": 13.21, "r2": 35.3641, "Cv": 6.469}
METHANE |= {"homo": -10.549854, "lumo": 3.186453, "gap": 13.736308, "zpve": 1.217682}
METHANE |= {"U0": -1101.487799, "U": -1101.409757, "H": -1101.384042, "G": -1102.022965}
UNITS = {name: "eV" for name in ("homo", "lumo", "gap", "zpve", "U0", "U", "H", "G")}
UNITS |= {"A": "GHz", "B": "GHz", "C": "GHz", "mu": "D", "alpha": "a0^3", "r2": "a0^2", "Cv": "cal/mol/K"}
WATER = np.array([[0.0, 0.0, 0.1173], [0.0, 0.7572, -0.4692], [0.0, -0.7572, -0.4692]])  # Å


def tar(path, members):
    with tarfile.open(path, "w" + {".bz2": ":bz2", ".gz": ":gz"}.get(path.suffix, "")) as archive:
        for name, text in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


def qm9_xyz(key):
    """An entry of the archive: tabs, a blank at the end of the comment line, lines after the atoms."""
    values, atoms, tail = (text.replace(" ", "\t") for text in QM9[key])
    return f"{atoms.count(chr(10))}\ngdb {key}\t{values}\t\n{atoms}{tail}\t\nInChI\tInChI\n"


def qm9_tar(folder, name="dsgdb9nsd.xyz.tar.bz2"):
    return tar(folder / name, {f"dsgdb9nsd_{key:06d}.xyz": qm9_xyz(key) for key in QM9})


def qm9_numbers(key):
    """15 texts, and the atoms as (symbol, x, y, z)."""
    values, atoms, _ = QM9[key]
    return values.split(), [line.split()[:4] for line in atoms.replace("*^", "e").splitlines()]


def qm9_wheel(folder):
    columns = ["XYZ_file", "Index", "Elements", "XYZ_Ang", *(column for *_, column, _ in data.QM9_LABELS)]
    path = folder / "qm9pack-1.0.3-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for part, keys in (("1", [1, 2]), ("2", [3])):
            rows = [",".join(columns)]
            for key in keys:
                values, atoms = qm9_numbers(key)
                elements = ",".join(f"'{symbol}'" for symbol, *_ in atoms)
                xyz = ",".join(f"[{','.join(p)}]" for _, *p in atoms)
                rows.append(f'"dsgdb9nsd_{key:06d}.xyz",{key},"[{elements}]","[{xyz}]",{",".join(values)}')
            wheel.writestr(f"qm9pack/data/qm9_part{part}.csv", "\n".join(rows) + "\n")
        wheel.writestr("qm9pack/data/qm9_polarizability.csv", "XYZ_file,A_xx\n")
    return path


def sdf_block(title, atoms, dimension="3D"):
    head = f"{title}\n  -OEChem-0323182324{dimension}\n\n{len(atoms):3d}  0  0     0  0  0  0  0  0999 V2000\n"
    rows = [f"{float(x):10.4f}{float(y):10.4f}{float(z):10.4f} {s:<3} 0  0  0  0  0\n" for s, x, y, z in atoms]
    return head + "".join(rows) + "M  END\n$$$$\n"


def qm9_sdf(folder):
    names = ["A", "B", "C", "mu", "alpha", "homo", "lumo", "gap", "r2", "zpve", "u0", "u298", "h298", "g298", "cv"]
    rows = [",".join(["mol_id", *names, "u0_atom"])]
    rows += [",".join([f"gdb_{key}", *qm9_numbers(key)[0], "-1.0"]) for key in QM9]
    (folder / "gdb9.sdf.csv").write_text("\n".join(rows) + "\n")
    (folder / "gdb9.sdf").write_text("".join(sdf_block(f"gdb_{key}", qm9_numbers(key)[1]) for key in QM9))
    return [folder / "gdb9.sdf", folder / "gdb9.sdf.csv"]


def water_frames(num=4, seed=0):
    """num hot waters with labels of real size -> z, pos, energy, forces in kcal/mol and kcal/mol/Å."""
    rng = np.random.default_rng(seed)
    pos = WATER + rng.normal(0, 0.03, (num, 3, 3))
    return np.array([8, 1, 1], dtype=np.uint8), pos, -47937.25 + rng.normal(0, 1, num), rng.normal(0, 20, (num, 3, 3))


def md17_npz(path, **changes):
    z, pos, energy, forces = water_frames()
    np.savez(path, **({"z": z, "R": pos, "E": energy[:, None], "F": forces, "name": "water"} | changes))
    return path


def extxyz(path, num=3, energy="energy", forces="forces", seed=0, extra='pbc="F F F"'):
    _, pos, e, f = water_frames(num, seed)
    text = ""
    for k in range(num):
        text += f"3\nProperties=species:S:1:pos:R:3:{forces}:R:3 {energy}={e[k] / 23.06:.8f} {extra}\n"
        rows = np.concatenate([pos[k], f[k] / 23.06], axis=1)
        text += "".join(f"{s} " + " ".join(f"{v:.8f}" for v in row) + "\n" for s, row in zip("OHH", rows))
    path.write_text(text)
    return path


def convert(source, raws, out):
    data.convert(source, [str(raw) for raw in raws], str(out))
    return Molecules(out)


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


# --- QM9 ---


@pytest.mark.parametrize("kind", ["wheel", "bz2", "gz", "tar", "sdf"])
def test_qm9_formats_give_known_values(tmp_path, kind, capsys):
    raws = {
        "wheel": lambda: [qm9_wheel(tmp_path)],
        "bz2": lambda: [qm9_tar(tmp_path)],
        "gz": lambda: [qm9_tar(tmp_path, "dsgdb9nsd.xyz.tar.gz")],
        "tar": lambda: [qm9_tar(tmp_path, "dsgdb9nsd.xyz.tar")],
        "sdf": lambda: qm9_sdf(tmp_path),
    }[kind]()
    m = convert("qm9", raws, tmp_path / "qm9.h5")
    assert m.ids.tolist() == [1, 2, 3] and m.ptr.tolist() == [0, 5, 9, 12] and m.units == UNITS
    for name, value in METHANE.items():
        assert m.label(name)[0] == pytest.approx(value, rel=1e-6, abs=1e-12), name
    np.testing.assert_allclose(m.label("gap"), m.label("lumo") - m.label("homo"), atol=1e-4 * HAR2EV)
    batch = m.read([2])
    assert batch["z"].tolist() == [8, 1, 1]
    digits = 1e-7 if kind != "sdf" else 5.1e-5  # SDF has four decimals
    water = np.array([row[1:] for row in qm9_numbers(3)[1]], dtype=np.float64)
    np.testing.assert_allclose(batch["pos"], water, atol=digits)
    assert batch["pos"][0, 2].item() == pytest.approx(0.0076015923, abs=digits)  # the *^ of the archive
    assert "skipped 0" in capsys.readouterr().out
    assert "Ramakrishnan" in m.attrs["attribution"] and m.attrs["source_sha256"].split()[0] == data.sha256(raws[0])


@pytest.mark.parametrize("kind", ["wheel", "bz2", "sdf"])
def test_uncharacterized_molecules_are_dropped_and_reported(tmp_path, kind, capsys):
    listed = tmp_path / "uncharacterized.txt"
    listed.write_text(
        "The molecules that failed\n=====\n  Index  GDB-17  B3LYP\n-----\n      2   N   N.H  0.5\n-----\n"
    )
    raws = {
        "wheel": lambda: [qm9_wheel(tmp_path)],
        "bz2": lambda: [qm9_tar(tmp_path)],
        "sdf": lambda: qm9_sdf(tmp_path),
    }
    m = convert("qm9", [listed, *raws[kind]()], tmp_path / "qm9.h5")
    assert m.ids.tolist() == [1, 3] and m.label("Cv").tolist() == [6.469, 6.002]
    assert "1: on the list of uncharacterized molecules (id 2)" in capsys.readouterr().out


def test_qm9_refusals(tmp_path):
    out = tmp_path / "qm9.h5"
    wheel, archive, (sdf, table) = qm9_wheel(tmp_path), qm9_tar(tmp_path), qm9_sdf(tmp_path)
    refused("qm9 takes", "qm9", [sdf], out, code=2)
    refused("qm9 takes", "qm9", [wheel, archive], out, code=2)
    empty_list = tmp_path / "uncharacterized.txt"
    empty_list.write_text("no numbers here\n")
    refused("no line starts with the number", "qm9", [archive, empty_list], out)
    text = table.read_text()
    table.write_text(text.rsplit("gdb_3", 1)[0])
    refused("do not belong together: gdb_3 here is the end there", "qm9", [sdf, table], out)
    table.write_text(text.replace("gdb_2", "gdb_7"))
    refused("do not belong together: gdb_2 here is gdb_7 there", "qm9", [sdf, table], out)
    table.write_text(text.replace("homo", "HOMO"))
    refused("no column homo", "qm9", [sdf, table], out)
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as file:
        file.writestr("numpy/__init__.py", "")
    refused("is it the wheel of qm9pack", "qm9", [other], out)
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


# --- PCQM4Mv2 and SDF ---


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
    blocks[300] = blocks[300].replace("V2000", "V9000")
    blocks[301] = sdf_block("", molecules[301], dimension="2D")
    blocks[302] = blocks[302].replace("\n", "\r\n")
    archive = tar(tmp_path / "pcqm4m-v2-train.sdf.tar.gz", {"pcqm4m-v2-train.sdf": "".join(blocks)})
    m = convert("pcqm4mv2", [archive], tmp_path / "pcqm.h5")
    expected = [k for k in range(700) if k not in (300, 301)]
    assert m.ids.tolist() == expected and m.units == {} and m.splits == {}
    batch = m.read(range(len(m)))
    atoms = [atom for k in expected for atom in molecules[k]]
    assert batch["z"].tolist() == [data.ATOMIC_NUMBER[s] for s, *_ in atoms] and 1 in batch["z"]
    np.testing.assert_allclose(batch["pos"], np.array([p for _, *p in atoms]), atol=6e-5)
    said = capsys.readouterr().out
    assert "1: RDKit cannot read it (id 300)" in said and "1: drawn in 2D: no geometry (id 301)" in said


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


# --- molecular dynamics ---


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
        extxyz(tmp_path / "train_300K.xyz", 3),
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


# --- command line ---


def test_command_line_converts_samples_and_tells(tmp_path):
    done = run("qm9", qm9_wheel(tmp_path), tmp_path / "qm9.h5")
    assert done.returncode == 0 and "3 molecules, 12 atoms" in done.stdout and done.stderr == ""
    done = run("info", tmp_path / "qm9.h5")
    for words in (
        "H 9, C 1, N 1, O 1",
        "3 to 5 per molecule",
        "U0             eV",
        "CC0 1.0",
        "closest atoms  0.962 Å in molecule 2",
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
        (["md17", out, tmp_path / "p.h5"], 2, "the file to write is the last one"),
        (["md17", tmp_path / "none.npz", out], 1, "no such file"),
        (["md17", tmp_path, out], 1, "a folder, not a file"),
        (["md17", npz, tmp_path / "no" / "o.h5"], 1, "no such folder"),
        (["md17", npz, npz, out], 2, "two raw files have the same name"),
        (["pcqm4mv2", npz, npz, out], 2, "takes one raw file"),
        (["info", npz], 1, "not a whole HDF5 file"),
        (["info", tmp_path], 1, "a folder, not a file"),
    ]:
        monkeypatch.setattr(sys, "argv", ["data.py", *map(str, words)])
        with pytest.raises(SystemExit) as exit_:
            data.cli(data.main)
        said = capsys.readouterr()
        assert exit_.value.code == code and says in said.err and said.out == "", said
        assert said.err.startswith("data.py: error: ") and said.err.count("\n") == 1
    done = run("md17", out, npz)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert sorted(os.listdir(tmp_path)) == ["a.npz"]


def test_usage_is_printed_where_it_is_asked_for_and_where_arguments_are_missing(monkeypatch, capsys):
    def main(arguments):
        print(arguments)

    for words, code, out, err in [
        (["-h"], 0, "how\n", ""),
        (["--help", "a", "b"], 0, "how\n", ""),
        ([], 2, "", "how\n"),
        (["a"], 2, "", "how\n"),
        (["a", "b"], 0, "['a', 'b']\n", ""),
    ]:
        monkeypatch.setattr(sys, "argv", ["x.py", *words])
        try:
            data.cli(main, "\nhow\n", needed=2)
            left = 0
        except SystemExit as exit_:
            left = exit_.code
        said = capsys.readouterr()
        assert (left, said.out, said.err) == (code, out, err)


def test_existing_file_is_never_overwritten(tmp_path):
    out = tmp_path / "o.h5"
    out.write_text("precious")
    refused("exists: remove it or choose another name", "md17", [md17_npz(tmp_path / "a.npz")], out)
    assert out.read_text() == "precious"


def test_interrupt_leaves_nothing_behind(tmp_path):
    def stream():
        yield {"id": 0, "z": np.array([8, 1, 1]), "pos": WATER, "labels": {}}
        assert any(name.startswith(".o.h5.") for name in os.listdir(tmp_path))  # it was being written
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_h5(tmp_path / "o.h5", stream(), {"source": "x"}, {}, {})
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


# --- reading ---


def test_demo_file():
    m = Molecules(DEMO)
    assert len(m) == 2000 and len(m.units) == 15 and m.units == UNITS and DEMO.stat().st_size < 2e6
    assert "140022" in m.attrs["attribution"] and "qm9pack 1.0.3" in m.attrs["attribution"]
    assert "CC0" in m.attrs["license"] and "MIT" in m.attrs["license"] and "num=2000 seed=" in m.attrs["command"]
    batch = m.read(range(2000))
    assert sorted(set(batch["z"].tolist())) == [1, 6, 7, 8, 9] and len(batch["z"]) == m.ptr[-1]
    assert len(set(m.ids.tolist())) == 2000 and (np.diff(m.ids) > 0).all()
    for name in m.units:
        assert np.isfinite(m.label(name)).all()
    np.testing.assert_allclose(m.label("gap"), m.label("lumo") - m.label("homo"), atol=1.01e-4 * HAR2EV)
    assert m.sha256() == data.sha256(DEMO) and len(m.sha256()) == 64
    data.main(["info", str(DEMO)])


def rewritten(path, out, **changes):
    """Copy a file of the schema, with datasets replaced by (array, dict of attributes, keywords of create_dataset)."""
    with h5py.File(path) as source, h5py.File(out, "w") as file:
        file.attrs.update(changes.pop("attrs", dict(source.attrs)))
        names = []
        source.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        for name in names:
            values, attrs = source[name][:], dict(source[name].attrs)
            keywords = changes.get("keywords", {})
            if name in changes:
                values = changes[name]
            if values is not None:
                file.create_dataset(name, data=values, **keywords).attrs.update(changes.get(f"{name}@", attrs))
    return out


def test_read_follows_the_index_in_any_order_and_with_repeats(tmp_path):
    m = Molecules(DEMO)
    with h5py.File(DEMO) as file:
        z, pos, ptr = file["z"][:], file["pos"][:], file["ptr"][:]
    index = [5, 6, 7, 1999, 0, 0, 3, 2, 1]
    batch = m.read(index)
    rows = np.concatenate([np.arange(ptr[k], ptr[k + 1]) for k in index])
    assert batch["z"].dtype == batch["batch"].dtype == torch.int64 and batch["pos"].dtype == torch.float32
    assert batch["z"].tolist() == z[rows].tolist() and np.array_equal(batch["pos"], pos[rows])
    assert batch["batch"].tolist() == np.repeat(np.arange(len(index)), np.diff(ptr)[index]).tolist()
    assert torch.equal(m.read(torch.tensor(index))["pos"], batch["pos"]) and len(m.read([])["z"]) == 0
    batch["pos"] += 1  # the batch is the caller's own
    assert np.array_equal(m.read(index)["pos"], pos[rows])
    for bad in ([2000], [-1]):
        with pytest.raises(IndexError):
            m.read(bad)


def test_compressed_files_read_the_same(tmp_path):
    plain = convert("md17", [md17_npz(tmp_path / "md17_a.npz")], tmp_path / "plain.h5")
    packed = Molecules(rewritten(plain.path, tmp_path / "packed.h5", keywords={"compression": "gzip", "chunks": True}))
    assert plain._layout["pos"] is not None and packed._layout["pos"] is None
    for index in ([0, 1, 2, 3], [3, 0, 1, 1], []):
        a, b = plain.read(index, forces=True), packed.read(index, forces=True)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    again = pickle.loads(pickle.dumps(packed))
    assert torch.equal(again.read([2])["pos"], plain.read([2])["pos"])


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"attrs": {"schema": "other/1"}}, "schema is other/1, not georecon/1"),
        ({"attrs": {"schema": "georecon/1", "length_unit": "bohr"}}, "length_unit is bohr"),
        ({"z": None}, "dataset z is missing"),
        ({"id": None}, "dataset id is missing"),
        ({"z": np.ones(12, dtype=np.int64)}, r"dataset z is int64 \(12,\), expected uint8"),
        ({"pos": np.zeros((11, 3), dtype=np.float32)}, r"expected float32 \(12, 3\)"),
        ({"pos": np.zeros((12, 3))}, "dataset pos is float64"),
        ({"ptr": np.array([0, 3, 3, 9, 12])}, "ptr must start at 0"),
        ({"ptr": np.array([1, 3, 6, 9, 12])}, "ptr must start at 0"),
        ({"ptr": np.array([0])}, "ptr must start at 0"),
        ({"energy": np.zeros(3)}, r"expected float64 \(4,\)"),
        ({"energy@": {}}, "dataset energy has no attribute unit"),
        ({"split/a": np.array([0, 4])}, "names molecules twice or that are not there"),
        ({"split/a": np.array([-1])}, "names molecules twice or that are not there"),
    ],
)
def test_files_that_break_the_schema_are_refused_at_the_door(tmp_path, changes, match):
    raws = [
        md17_npz(tmp_path / f"{name}.npz", R=water_frames()[1][:2], E=np.zeros(2), F=np.ones((2, 3, 3)))
        for name in "ab"
    ]
    good = convert("md17", raws, tmp_path / "good.h5")
    assert len(Molecules(rewritten(good.path, tmp_path / "same.h5"))) == 4
    with pytest.raises(InputError, match=match) as caught:
        Molecules(rewritten(good.path, tmp_path / "bad.h5", **changes))
    assert "bad.h5" in str(caught.value) and "\n" not in str(caught.value)


def test_broken_content_is_refused_when_read(tmp_path):
    good = convert("md17", [md17_npz(tmp_path / "md17_a.npz")], tmp_path / "good.h5")
    pos, z, energy = np.zeros((12, 3), dtype=np.float32), np.tile(np.uint8([8, 1, 1]), 4), np.zeros(4)
    pos[:] = np.tile(WATER, (4, 1))
    pos[7], z[10], energy[1] = np.nan, 0, np.nan
    for changes, first in (({"pos": pos}, 2), ({"z": z}, 3)):
        m = Molecules(rewritten(good.path, tmp_path / "bad.h5", **changes))
        m.read([0, 1])
        with pytest.raises(InputError, match=f"molecule {first} has"):
            m.read([1, 3, 2])
    with pytest.raises(InputError, match="energy is not finite everywhere"):
        data.info(rewritten(good.path, tmp_path / "bad.h5", energy=energy))
    with pytest.raises(InputError, match="atoms that coincide"):
        data.info(rewritten(good.path, tmp_path / "bad.h5", pos=np.zeros((12, 3), dtype=np.float32)))


def test_cut_off_h5_and_unknown_labels(tmp_path):
    m = Molecules(DEMO)
    with pytest.raises(InputError, match="no label 'homo_lumo'; the file has: A, B, C"):
        m.label("homo_lumo")
    with pytest.raises(InputError, match="no forces"):
        m.read([0], forces=True)
    (tmp_path / "cut.h5").write_bytes(DEMO.read_bytes()[:400_000])
    with pytest.raises(InputError, match="not a whole HDF5 file"):
        Molecules(tmp_path / "cut.h5")
    with pytest.raises(InputError, match="no such file: convert one"):
        Molecules(tmp_path / "none.h5")


def test_a_file_replaced_while_in_use_is_refused(tmp_path):
    path = Path(rewritten(DEMO, tmp_path / "a.h5"))
    m = Molecules(path)
    os.replace(rewritten(DEMO, tmp_path / "b.h5", attrs=dict(Molecules(DEMO).attrs) | {"note": "x" * 3000}), path)
    with pytest.raises(InputError, match="was replaced while in use"):
        m.read([0])


# --- order ---


def test_epoch_order_is_a_function_of_seed_and_epoch():
    order = epoch_order(1000, 7, 3)
    assert sorted(order.tolist()) == list(range(1000))
    assert np.array_equal(
        order, np.random.default_rng([7, 3]).permutation(1000)
    )  # a run stopped today resumes tomorrow
    assert not np.array_equal(order, epoch_order(1000, 7, 4)) and not np.array_equal(order, epoch_order(1000, 3, 7))


def test_split_indices():
    parts = split_indices(130_831, [110_000, 10_000, None])
    assert [len(part) for part in parts] == [110_000, 10_000, 10_831]
    assert np.array_equal(np.concatenate(parts), np.random.default_rng(1).permutation(130_831))
    assert [len(part) for part in split_indices(10, [3, None, 2], seed=5)] == [3, 5, 2]
    for sizes in ([8, 5], [None, None]):
        with pytest.raises(InputError):
            split_indices(10, sizes)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 3), (2, 3)])
def test_an_epoch_is_covered_once_over_ranks_and_parts(world, accumulate):
    m, chosen = Molecules(DEMO), np.arange(100, 205)  # 105 molecules in batches of 12: 8 steps, 9 left out
    ranks = [StepBatches(m, chosen, 12, seed=4, rank=rank, world=world, accumulate=accumulate) for rank in range(world)]
    assert ranks[0].steps_per_epoch == 8
    seen = {}
    for step in range(16):
        whole = [part for rank in ranks for part in rank[step]]
        assert len(whole) == world * accumulate
        assert all(part["num_molecules"] == 12 // len(whole) for part in whole)
        index = torch.cat([part["index"] for part in whole])
        seen.setdefault(step // 8, []).extend(index.tolist())
        reference = m.read(index)  # the global batch, the same however it is cut
        for name in ("z", "pos"):
            assert torch.equal(torch.cat([part[name] for part in whole]), reference[name])
        for part in whole:
            first, num = part["first_atom"], len(part["z"])
            assert part["global_atoms"] == len(reference["z"]) and part["batch"].max() == part["num_molecules"] - 1
            assert torch.equal(reference["pos"][first : first + num], part["pos"])
        alone = StepBatches(m, chosen, 12, seed=4)[step][0]
        assert torch.equal(alone["index"], index) and torch.equal(alone["pos"], reference["pos"])
    for epoch, ids in seen.items():
        assert len(ids) == len(set(ids)) == 96 and set(ids) <= set(chosen.tolist())
        assert ids == chosen[epoch_order(105, 4, epoch)][:96].tolist()
    assert seen[0] != seen[1]


def test_step_batches_refusals():
    m = Molecules(DEMO)
    with pytest.raises(InputError, match="multiple of ranks") as caught:
        StepBatches(m, range(100), 10, seed=0, world=2, accumulate=2)
    assert caught.value.code == 2
    with pytest.raises(InputError, match="more than the 100 molecules"):
        StepBatches(m, range(100), 200, seed=0)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_steps_asked_for(context):
    batches = StepBatches(Molecules(DEMO), np.arange(2000), 20, seed=0, accumulate=2)
    expected = [batches[step] for step in range(98, 103)]  # the parent has the file open, and an epoch ends here
    loader = DataLoader(batches, None, sampler=range(98, 103), num_workers=2, multiprocessing_context=context)
    for parts, wanted in zip(loader, expected, strict=True):
        for part, other in zip(parts, wanted, strict=True):
            assert part.keys() == other.keys() and part["first_atom"] == other["first_atom"]
            assert all(torch.equal(part[name], other[name]) for name in ("z", "pos", "batch", "index"))
