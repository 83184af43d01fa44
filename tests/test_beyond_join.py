"""beyond/join.py: one file with the molecules of several, in their order."""

from pathlib import Path

import numpy as np
import pytest

import data
from data import Molecules
from harness.errors import InputError

DATA = Path(__file__).parent.parent / "data"


def test_all_molecules_in_order(tmp_path):
    paths = [DATA / "ethanol_demo.h5", DATA / "qm9_demo.h5"]
    data.main(["join", *map(str, paths), str(tmp_path / "both.h5")])
    both, parts = Molecules(tmp_path / "both.h5"), [Molecules(path) for path in paths]
    first = len(parts[0])
    assert len(both) == first + 2000 and both.units == {} and both.ids.tolist() == list(range(len(both)))
    assert both.splits["ethanol_demo"].tolist() == list(range(first))
    assert both.splits["qm9_demo"].tolist() == list(range(first, len(both)))
    assert "CC0" in both.attrs["license"] and len(both.attrs["source_sha256"].split()) == 2
    assert both.attrs["source"].split("\n") == ["ethanol_demo.h5", "qm9_demo.h5"]  # no folders of this machine
    for start, part in zip((0, first), parts, strict=True):
        mine, theirs = both.read(range(start, start + len(part))), part.read(range(len(part)))
        assert all(np.array_equal(mine[name], theirs[name]) for name in ("z", "pos", "batch"))


@pytest.mark.parametrize(
    "names, said, code",
    [
        (["qm9_demo.h5", "out.h5"], "usage", 2),
        (["qm9_demo.h5", "qm9_demo.h5", "out.h5"], "same name", 2),
        (["qm9_demo.h5", "nowhere.h5", "out.h5"], "nowhere.h5: no such file", 1),
        (["qm9_demo.h5", "ethanol_demo.h5", "out.npz"], "must end in .h5", 2),
    ],
)
def test_what_cannot_be_joined_is_one_line(tmp_path, monkeypatch, names, said, code):
    monkeypatch.chdir(tmp_path)
    paths = [str(DATA / name) if (DATA / name).exists() else name for name in names]
    with pytest.raises(InputError, match=said) as caught:
        data.main(["join", *paths])
    assert caught.value.code == code and not list(tmp_path.iterdir())
