"""Small raw files of every source, as the converters meet them."""

import io
import tarfile
import zipfile

import numpy as np

from data import Molecules, qm9_splits
from formats import write
from formats.sources import QM9_LABELS

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
    columns = ["XYZ_file", "Index", "Elements", "XYZ_Ang", *(column for *_, column in QM9_LABELS)]
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
    """Convert raw files as data.py does -> Molecules."""
    write.convert(source, [str(raw) for raw in raws], str(out), qm9_splits)
    return Molecules(out)
