"""data.py: reading one file, splits, an order made of (seed, step), batches for ranks and workers."""

import os
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from raw_files import UNITS, WATER, convert, md17_npz, water_frames
from torch.utils.data import DataLoader

import data
from data import Molecules, StepBatches, epoch_order, qm9_splits, split_indices
from formats.sources import HAR2EV
from formats.write import info
from harness.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "qm9_demo.h5"


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
    assert plain.places["pos"] is not None and packed.places["pos"] is None
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
        info(Molecules(rewritten(good.path, tmp_path / "bad.h5", energy=energy)))
    with pytest.raises(InputError, match="two atoms closer than"):
        info(Molecules(rewritten(good.path, tmp_path / "bad.h5", pos=np.zeros((12, 3), dtype=np.float32))))


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


def test_only_the_whole_of_qm9_has_its_splits(capsys):
    assert {name: len(index) for name, index in qm9_splits(130_831).items()} == {
        "train": 110_000,
        "val": 10_000,
        "test": 10_831,
    }
    assert qm9_splits(133_885) == {} and "130,831 molecules that are not uncharacterized" in capsys.readouterr().out


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
