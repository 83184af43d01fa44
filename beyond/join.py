"""Several files as one to pretrain on.

    python data.py join data/qm9.h5 data/druglike.h5 data/both.h5

The geometries of all, without labels. Each file is a split of its name; the id is the row.
"""

import shlex
from pathlib import Path

from formats.write import save
from harness.errors import InputError
from harness.files import sha256


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
    if len({Path(file.path).stem for file in files}) < len(files):
        raise InputError("two files have the same name, which names a split: rename one", code=2)
    paths = [file.path for file in files]
    attrs = {"name": " + ".join(file.name for file in files), "source": "\n".join(paths)}
    attrs["source_sha256"] = "\n".join(map(sha256, paths))
    attrs["command"] = shlex.join(["python", "data.py", "join", *(Path(p).name for p in (*paths, out))])
    for key in ("license", "attribution"):
        attrs[key] = "\n".join(f"{file.name}: {file.attrs.get(key, 'not stated')}" for file in files)
    save(Path(out), stream(files), attrs, {})
