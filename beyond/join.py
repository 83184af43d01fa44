"""Files from files: several as one to pretrain on, or a random sample of one.

    python data.py join data/qm9.h5 data/druglike.h5 data/both.h5
    python data.py sample data/qm9.h5 data/few.h5 num=2000 seed=1

join takes the geometries of all, without labels. Each file is a split of its name, and the id is
the row.
"""

from pathlib import Path

import numpy as np

from formats.sources import EV
from formats.write import made_of, save
from harness.errors import InputError


def stream(files):
    """The molecules of files [data.Molecules], as formats.write.write_h5 takes them."""
    number = 0
    for file in files:
        for m in range(len(file)):
            atoms = file.read([m])
            mol = {"id": number, "z": atoms["z"].numpy(), "pos": atoms["pos"].numpy()}
            yield mol | {"labels": {}, "split": (Path(file.path).stem,)}
            number += 1


def join(files, out):
    """python data.py join A.h5 B.h5 [...] OUT.h5: files are data.Molecules."""
    paths = [Path(file.path) for file in files]
    attrs = made_of(paths, "join", *(path.name for path in (*paths, Path(out))))
    attrs["name"] = " + ".join(file.name for file in files)
    for key in ("license", "attribution"):
        attrs[key] = "\n".join(f"{file.name}: {file.attrs.get(key, 'not stated')}" for file in files)
    save(Path(out), stream(files), attrs, {})


def sample(molecules, out, num, seed):
    """python data.py sample FILE.h5 OUT.h5 num=2000 seed=1

    Molecules are drawn without replacement, and stay in the file's order.
    """
    if not 1 <= num <= len(molecules):
        raise InputError(f"num={num}: {molecules.path} has {len(molecules)} molecules", code=2)
    index = np.sort(np.random.default_rng(seed).permutation(len(molecules))[:num])
    units = {name if name in EV else f"y/{name}": unit for name, unit in molecules.units.items()}
    columns = {k: molecules.label(k.removeprefix("y/"))[index] for k in units if k != "forces"}
    splits = {name: np.isin(index, members) for name, members in molecules.splits.items()}
    forces, ids = "forces" in molecules.units, molecules.ids

    def stream():
        for k, m in enumerate(index):
            atoms = molecules.read([m], forces=forces)
            labels = {name: column[k] for name, column in columns.items()}
            labels |= {"forces": atoms["forces"].numpy()} if forces else {}
            split = [name for name, inside in splits.items() if inside[k]]
            mol = {"id": ids[m], "z": atoms["z"].numpy(), "pos": atoms["pos"].numpy()}
            yield mol | {"labels": labels, "split": split}

    name = f"{molecules.name}, {num} of {len(molecules)} molecules, seed {seed}"
    attrs = molecules.attrs | {"name": name}
    files = f"{Path(molecules.path).name} {Path(out).name}"
    command = f"python data.py sample {files} num={num} seed={seed}"
    attrs["command"] = f"{molecules.attrs.get('command', '')}\n{command}".strip()
    save(Path(out), stream(), attrs, units)
