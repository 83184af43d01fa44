"""Stage 2: physics of a trained model, labels, splits, learning, where the encoder comes from, resuming."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch
import yaml

import finetune
import pretrain
from data import Molecules
from finetune import FinetuneConfig, Finetuning, Labels, PropertyModel, learning_rate, load_property_model, split_data
from formats.write import write_h5
from harness import compiled
from harness.errors import InputError
from harness.files import sha256
from harness.settings import load_config, read_yaml
from model import EquivariantTransformer, ModelConfig, load_encoder, radius_graph

ROOT = Path(__file__).parent.parent
QM9, ETHANOL = ROOT / "data/qm9_demo.h5", ROOT / "data/ethanol_demo.h5"
MODEL = {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4, "vector_cutoff": True}
COMMON = {
    "lr": 1e-3,
    "lr_warmup_steps": 2,
    "lr_cosine_length": 20,
    "max_steps": 3,
    "log_every": 1,
    "val_every": 5,
    "save_every": 7,
    "deterministic": torch.cuda.is_available(),  # on the CPU it always is
    "model": MODEL,
}
GAP = {**COMMON, "data": str(QM9), "target": "gap", "train_size": 100, "val_size": 30, "test_size": 30}
GAP |= {"batch_size": 8}
FORCES = {**COMMON, "data": str(ETHANOL), "target": "energy_forces", "train_size": 100, "val_size": 20}
FORCES |= {"test_size": 20, "batch_size": 4}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """gap.yaml and forces.yaml, runs of a second, in a folder of their own that is the working directory."""
    monkeypatch.chdir(tmp_path)
    for name, settings in (("gap", GAP), ("forces", FORCES)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def start(name, *settings, out=None):
    """Run finetune.py in this process -> the folder of the run."""
    out = out or f"out/{name}"
    finetune.main([f"{name}.yaml", f"out_dir={out}", *settings])
    return Path(out)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder of a run that has learnt something of ethanol's forces."""
    folder = tmp_path_factory.mktemp("trained")
    settings = {**FORCES, "train_size": 800, "max_steps": 100, "batch_size": 8, "lr": 1e-2, "lr_warmup_steps": 10}
    settings |= {"lr_cosine_length": 100, "val_every": 50, "log_every": 50, "energy_weight": 0.05}
    (folder / "forces.yaml").write_text(yaml.safe_dump(settings))
    finetune.main([str(folder / "forces.yaml"), f"out_dir={folder / 'run'}"])
    return folder / "run"


@pytest.fixture
def best(trained):
    return load_property_model(trained / "best.pt")[0].double()


def ethanol(index=0):
    part = Molecules(ETHANOL).read([index], forces=True)
    return part["z"], part["pos"].double()


def one(model, z, pos):
    """Energy and forces of one molecule, standardised."""
    y, forces = model(z, pos, torch.zeros_like(z), 1, forces=True)
    return y[0], forces


def read_log(folder, split="train"):
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def tensors(path):
    """Every tensor of a checkpoint by its place in it."""

    def walk(content, place):
        for key, value in content.items() if isinstance(content, dict) else ():
            if isinstance(value, torch.Tensor):
                yield f"{place}/{key}", value
            else:
                yield from walk(value, f"{place}/{key}")

    return dict(walk(torch.load(path, "cpu", weights_only=True), ""))


def same_bits(a, b):
    a, b = tensors(a), tensors(b)
    return len(a) > 20 and a.keys() == b.keys() and all(torch.equal(value, b[key]) for key, value in a.items())


def fails(arguments, message, code=None):
    with pytest.raises(InputError) as error:
        finetune.main([str(argument) for argument in arguments])
    assert message in str(error.value) and "\n" not in str(error.value)
    assert code in (None, error.value.code)


def config_of(**settings):
    return FinetuneConfig(**{**GAP, "model": ModelConfig(**MODEL), **settings})


# ---------------------------------------------------------------- physics of a trained model


def test_forces_are_learnt(trained):
    found = json.loads((trained / "metrics.json").read_text())
    parts = split_data(load_config(FinetuneConfig, [str(trained / "config.yaml")]), Molecules(ETHANOL))
    zero = Molecules(ETHANOL).read(parts[2]["test"], forces=True)["forces"].abs().mean().item()
    assert found["test"]["test"]["forces_mae"] < 0.6 * zero
    assert found["val"]["forces_mae"] < 0.6 * read_log(trained, "val")[0]["forces_mae"]
    assert found["units"]["forces_mae"] == "eV/angstrom" and found["units"]["energy_mae"] == "eV"


@pytest.mark.parametrize("sign", [1, -1])
def test_energy_is_invariant_and_forces_turn_along(best, sign):
    z, pos = ethanol()
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    turn = turn * turn.det() * sign  # a rotation, or one with a reflection
    order = torch.tensor([3, 0, 8, 1, 7, 2, 6, 4, 5])
    y, forces = one(best, z, pos)
    turned, turned_forces = one(best, z[order], pos[order] @ turn.T + torch.tensor([1.0, -2.0, 3.0]))
    assert turned.item() == pytest.approx(y.item(), rel=1e-10)
    assert forces.abs().max() > 0.1
    torch.testing.assert_close(turned_forces, forces[order] @ turn.T, rtol=1e-9, atol=1e-9)
    assert forces.sum(0).abs().max() < 1e-10


def test_forces_are_minus_the_slope_of_the_energy(best):
    z, pos = ethanol(5)
    forces, h = one(best, z, pos)[1], 2e-5
    shifts = h * torch.eye(27, dtype=torch.float64).view(27, 9, 3)
    many = torch.cat([(pos + shifts).reshape(-1, 3), (pos - shifts).reshape(-1, 3)])
    y, _ = best(z.repeat(54), many, torch.arange(54).repeat_interleave(9), 54)
    slope = (y[:27] - y[27:]).view(9, 3) / (2 * h)
    torch.testing.assert_close(forces, -slope, rtol=1e-6, atol=1e-6)


def test_energy_has_no_step_where_an_atom_crosses_the_cutoff(best):
    z, pos = ethanol()
    away = pos[8] - pos[:8].mean(0)
    away = away / away.norm()
    far = (pos[:8] - pos[8]).norm(dim=1).argmax()
    low, high = 0.0, 5.0  # how far to move atom 8 until it is 5 angstrom from the farthest
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if (pos[8] + middle * away - pos[far]).norm() > 5 else (middle, high)

    def step(model):
        moved = [pos.clone() for _ in range(2)]
        for k, way in enumerate((low - 1e-8, low + 1e-8)):
            moved[k][8] += way * away
        return abs(one(model, z, moved[0])[0] - one(model, z, moved[1])[0]).item()

    without = EquivariantTransformer(replace(best.encoder.config, vector_cutoff=False)).double()
    without.load_state_dict(best.encoder.state_dict())
    smooth = step(best)
    best.encoder = without
    assert smooth < 1e-6 and step(best) > 100 * smooth


def test_a_mixed_batch_equals_one_at_a_time(tiny):
    model = load_property_model(start("gap") / "best.pt")[0].double()
    molecules, index = Molecules(QM9), [0, 700, 1500, 1999]
    part = molecules.read(index)
    assert len(set(part["batch"].bincount().tolist())) > 1
    together = model(part["z"], part["pos"].double(), part["batch"], 4)[0]
    singles = [molecules.read([k]) for k in index]
    alone = torch.cat([model(p["z"], p["pos"].double(), p["batch"], 1)[0] for p in singles])
    torch.testing.assert_close(together, alone, rtol=1e-10, atol=1e-10)
    restored = model.restore(together, part["z"], part["batch"])
    assert abs(restored.mean() - molecules.label("gap").mean()) < 3


# ---------------------------------------------------------------- learning, losses


def changed_copy(path, name, change, source=QM9):
    shutil.copy(source, path)
    with h5py.File(path, "r+") as file:
        file[name][...] = change(file[name][...])
    return path


def test_real_labels_are_learnt_and_shuffled_ones_are_not(tiny):
    shuffled = changed_copy(tiny / "shuffled.h5", "y/gap", np.random.default_rng(1).permutation)
    settings = ["train_size=1600", "val_size=200", "test_size=200", "batch_size=32", "max_steps=120", "lr=5e-3"]
    settings += ["lr_cosine_length=120", "lr_warmup_steps=10", "val_every=40", "log_every=40"]
    found = {}
    for name, data in (("real", QM9), ("shuffled", shuffled)):
        folder = start("gap", *settings, f"data={data}", out=f"out/{name}")
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["units"]["gap_mae"] == "meV"
        train, _, tests = split_data(load_config(FinetuneConfig, [f"{folder}/config.yaml"]), Molecules(data))
        y = Molecules(data).label("gap")
        constant = 1000 * np.abs(y[tests["test"]] - np.median(y[train])).mean()
        found[name] = metrics["test"]["test"]["gap_mae"] / constant
    assert found["shuffled"] > 0.93 and found["real"] < 0.8 * found["shuffled"], found


def test_metrics_are_the_errors_of_best_pt(tiny):
    folder = start("forces")
    molecules, (model, about) = Molecules(ETHANOL), load_property_model(folder / "best.pt")
    metrics = json.loads((folder / "metrics.json").read_text())
    train, val, tests = split_data(load_config(FinetuneConfig, ["forces.yaml"]), molecules)
    part = molecules.read(tests["test"], forces=True)
    y, forces = model(part["z"], part["pos"], part["batch"], 20, forces=True)
    error = model.restore(y, part["z"], part["batch"]) - torch.from_numpy(molecules.label("energy")[tests["test"]])
    force_error = forces.double() * model.std - part["forces"]
    found = metrics["test"]["test"]
    assert found["energy_mae"] == pytest.approx(error.abs().mean().item(), rel=1e-6)
    assert found["energy_rmse"] == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)
    assert found["energy_per_atom_mae"] == pytest.approx(found["energy_mae"] / 9)
    assert found["forces_mae"] == pytest.approx(force_error.abs().mean().item(), rel=1e-5)
    assert found["forces_rmse"] == pytest.approx(force_error.square().mean().sqrt().item(), rel=1e-5)
    y = molecules.label("energy")  # of one molecule: its fitted reference is the mean
    constant = {name: np.abs(y[part] - np.median(y[train])).mean() for name, part in {"val": val, **tests}.items()}
    assert found["energy_mae_constant"] == pytest.approx(constant["test"], rel=1e-6)
    assert metrics["val"].pop("energy_mae_constant") == pytest.approx(constant["val"], rel=1e-6)
    assert about["val"] == metrics["val"] and about["step"] == metrics["best_step"]
    names = {"config.yaml", "log.jsonl", "last.pt", "best.pt", "metrics.json", ".lock"}
    assert {path.name for path in folder.iterdir()} == names


def test_what_trains_the_network_is_upstreams_smoothed_loss():
    """Upstream: L_E <- 0.05 L_E + 0.95 (past L_E, without gradient), then 0.2 L_E + 0.8 L_F."""
    weights = {"energy_weight": 0.2, "force_weight": 0.8, "ema_alpha_y": 0.05, "ema_alpha_dy": 1.0}
    config = config_of(target="energy_forces", data=str(ETHANOL), **weights)
    torch.manual_seed(0)
    model = PropertyModel(EquivariantTransformer(config.model), "scalar", "sum", [0.0] * 100).double()
    part = Molecules(ETHANOL).read([1, 2, 3], forces=True)
    z, pos, batch, y = part["z"], part["pos"].double(), part["batch"], torch.randn(3, dtype=torch.float64)
    forces, gradients = part["forces"].double(), []
    ours = Finetuning(model, config)(z, pos, batch, y, forces, None, 1.0, 1.0)["loss"]
    predicted, predicted_forces = model(z, pos, batch, 3, forces=True)
    past = torch.tensor(7.0, requires_grad=True)
    smoothed = 0.05 * (predicted - y).square().mean() + 0.95 * past.detach()
    upstream = 0.2 * smoothed + 0.8 * (predicted_forces - forces).square().mean()
    trained = [p for p in model.parameters() if p.requires_grad]
    for loss in (ours, upstream):
        gradients.append(torch.autograd.grad(loss, trained, allow_unused=True))
    assert upstream.item() == pytest.approx(ours.item() + 0.2 * 0.95 * 7)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_the_denoising_pass_trains_its_head(tiny):
    folder = start("forces", "position_noise_scale=0.05", "denoising_weight=0.5", "max_steps=30", "val_every=30")
    losses = [record["loss_noise"] for record in read_log(folder)]
    assert np.mean(losses[-5:]) < np.mean(losses[:3]) and 0.2 < losses[0] < 5
    record = read_log(folder)[0]
    energy, forces = record["loss_energy"], record["loss_forces"]
    assert record["loss"] == pytest.approx(energy + forces + 0.5 * record["loss_noise"], rel=1e-5)
    head = {key: value for key, value in tensors(folder / "last.pt").items() if "noise_head" in key}
    start("forces", "position_noise_scale=0.05", "denoising_weight=0.5", "max_steps=1", out="out/one")
    first = tensors("out/one/last.pt")
    assert head and any(not torch.equal(value, first[key]) for key, value in head.items())
    assert not any("noise_head" in key for key in tensors(folder / "best.pt"))
    start("forces", "denoising_weight=0.5", out="out/none")
    assert "loss_noise" not in read_log("out/none")[0]


def test_learning_rate_of_cosine_warmup_is_torchs():
    config = config_of(lr=1e-3, lr_min=1e-5, lr_warmup_steps=4, lr_cosine_length=10)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 10, T_mult=2, eta_min=1e-5)
    for step in range(75):
        if step >= 4:
            assert learning_rate(step, config) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), step
        optimizer.step()
        theirs.step()
    assert [learning_rate(step, config) for step in range(4)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3])
    cosine = replace(config, lr_schedule="cosine")
    assert learning_rate(10, cosine) == learning_rate(40, cosine) == pytest.approx(1e-5)


# ---------------------------------------------------------------- labels and splits


def labels_of(config, path=QM9, train=None):
    molecules = Molecules(path)
    return Labels(config, molecules, split_data(config, molecules)[0] if train is None else train, {}, 100)


def standardisation(labels):
    return [*labels.references.flat, *labels.mean, *labels.std]


@pytest.mark.parametrize("target", ["U0", "gap", "mu", "energy_forces"])
def test_standardisation_is_the_training_molecules_alone(tmp_path, target):
    source = ETHANOL if target == "energy_forces" else QM9
    config = config_of(target=target, data=str(source))
    column = "energy" if target == "energy_forces" else f"y/{target}"
    train, val, tests = split_data(config, Molecules(source))

    def shift(index):
        def change(values):
            values[index] += 10 * np.random.default_rng(0).random(len(index))
            return values

        return change

    before = standardisation(labels_of(config, source))
    rest = np.setdiff1d(np.arange(len(Molecules(source))), train)
    others = changed_copy(tmp_path / "others.h5", column, shift(rest), source)
    assert {*val, *tests["test"]} <= set(rest) and standardisation(labels_of(config, others)) == before
    mine = changed_copy(tmp_path / "mine.h5", column, shift(train), source)
    assert standardisation(labels_of(config, mine)) != before


def test_references_are_least_squares_and_labels_come_back(tmp_path):
    config, molecules = config_of(target="U0", train_size=1500), Molecules(QM9)
    train = split_data(config, molecules)[0]
    labels = labels_of(config)
    counts = np.stack([np.bincount(molecules.read([k])["z"], minlength=100) for k in train[:1500]])
    fitted = np.linalg.lstsq(counts.astype(float), molecules.label("U0")[train], rcond=None)[0]
    assert labels.references[:, 0] == pytest.approx(fitted, rel=1e-6, abs=1e-6)
    assert labels.elements == [1, 6, 7, 8, 9] and np.abs(labels.references[[0, 2, 10]]).max() < 1e-9
    index = np.arange(300)
    part = molecules.read(index)
    encoder = EquivariantTransformer(config.model)
    constants = map(np.squeeze, (labels.references, labels.mean, labels.std))
    model = PropertyModel(encoder, "scalar", "sum", *constants)
    y = labels.standardised(part, index)
    assert y.dtype == torch.float32 and y.abs().max() < 20
    restored = model.restore(y, part["z"], part["batch"]).numpy()
    np.testing.assert_allclose(restored, molecules.label("U0")[:300], rtol=1e-9)
    mine = labels.standardised(molecules.read(train), train).double()
    assert abs(mine.mean()) < 1e-5 and mine.std(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_references_may_be_none():
    config, molecules = config_of(target="U0"), Molecules(QM9)
    train = split_data(config, molecules)[0]
    plain = labels_of(replace(config, references="none"))
    assert not plain.references.any() and plain.mean == pytest.approx(molecules.label("U0")[train].mean(), rel=1e-12)
    assert not labels_of(config_of(target="gap")).references.any()


def test_several_labels_are_standardised_each_for_itself():
    several = labels_of(config_of(target="U0,Cv"))
    for place, target in enumerate(("U0", "Cv")):
        alone = labels_of(config_of(target=target))
        np.testing.assert_allclose(several.references[:, [place]], alone.references, rtol=1e-9, atol=1e-9)
        assert several.std[place] == pytest.approx(alone.std[0], rel=1e-9)
        part = Molecules(QM9).read(range(50))
        y, one = several.standardised(part, np.arange(50)), alone.standardised(part, np.arange(50))
        torch.testing.assert_close(y[:, place], one, rtol=1e-5, atol=1e-5)
    assert several.unit_of("U0_mae") == "meV" and several.unit_of("Cv_rmse") == "cal/mol/K"
    mixed = labels_of(config_of(target="U0,gap"))  # for the gap they make no sense
    np.testing.assert_array_equal(mixed.references[:, [0]], several.references[:, [0]])
    assert not mixed.references[:, 1].any() and "after fitted atom references; gap: mean" in mixed.remark


def test_a_molecule_counts_if_all_its_labels_are_known(tmp_path):
    def forget(index):
        def change(values):
            values[index] = np.nan
            return values

        return change

    one = changed_copy(tmp_path / "one.h5", "y/gap", forget([3, 5]))
    both = Molecules(changed_copy(tmp_path / "both.h5", "y/mu", forget([5, 8]), one))
    assert sorted({*range(2000)} - {*both.split("", "gap,mu")}) == [3, 5, 8]
    assert sorted({*range(2000)} - {*both.split("", "mu")}) == [5, 8] and len(both.split("", "homo,lumo")) == 2000


@pytest.mark.parametrize("head", ["scalar", "pooler"])
def test_several_targets(tiny, head):
    """Each has its error, as from best.pt by hand; the mean of error / std chooses best.pt."""
    folder = start("gap", "target=homo,mu,lumo", f"head={head}", "max_steps=20")
    metrics = json.loads((folder / "metrics.json").read_text())
    model, about = load_property_model(folder / "best.pt")
    assert about["name"] == "homo,mu,lumo" and about["unit"] == "eV,D,eV" and about["head"] == head
    molecules, config = Molecules(QM9), load_config(FinetuneConfig, [str(folder / "config.yaml")])
    index = split_data(config, molecules)[2]["test"]
    part = molecules.read(index)
    y = model.restore(model(part["z"], part["pos"], part["batch"], 30)[0], part["z"], part["batch"]).numpy()
    found = metrics["test"]["test"]
    for place, (name, scale) in enumerate({"homo": 1000, "mu": 1, "lumo": 1000}.items()):
        error = scale * np.abs(y[:, place] - molecules.label(name)[index]).mean()
        assert found[f"{name}_mae"] == pytest.approx(error, rel=1e-4)
    assert found["targets_mae"] == pytest.approx(np.mean([found[f"{n}_mae"] for n in ("homo", "mu", "lumo")]))
    std = dict(zip(("homo", "mu", "lumo"), (model.std * torch.tensor([1000.0, 1, 1000])).tolist(), strict=True))
    validated = [sum(found[f"{name}_mae"] / std[name] for name in std) for found in read_log(folder, "val")]
    assert metrics["best_step"] == 5 * np.argmin(validated) > 0
    units = {name: metrics["units"][f"{name}_mae"] for name in ("homo", "mu", "targets")}
    assert units == {"homo": "meV", "mu": "D", "targets": "mean over units"}
    assert labels_of(replace(config, target="homo,lumo")).unit_of("targets_mae") == "meV"


def test_the_pooler_takes_off_the_mean_of_a_length_too():
    assert labels_of(config_of(target="mu")).mean == 0
    assert labels_of(config_of(target="mu", head="pooler")).mean > 1


def with_splits(path):
    """A copy of the demo with splits a (1,000), b (600), c (400) and `all`."""
    shutil.copy(QM9, path)
    with h5py.File(path, "r+") as file:
        order = np.random.default_rng(0).permutation(2000)
        for name, index in {"a": order[:1000], "b": order[1000:1600], "c": order[1600:], "all": order}.items():
            file[f"split/{name}"] = np.sort(index)
    return Molecules(path), order


def test_split_data(tmp_path):
    molecules, order = with_splits(tmp_path / "splits.h5")
    a, b, c = set(order[:1000]), set(order[1000:1600]), set(order[1600:])
    config = config_of()
    train, val, tests = split_data(config, molecules)
    assert (len(train), len(val), [*tests], len(tests["test"])) == (100, 30, ["test"], 30)
    assert len({*train, *val, *tests["test"]}) == 160
    other = split_data(replace(config, seed=7), molecules)
    assert np.array_equal(train, other[0]) and np.array_equal(val, other[1])
    assert len(split_data(replace(config, test_size=0), molecules)[2]["test"]) == 1870

    named = config_of(train_split="a", val_split="b", test_split="c", train_size=0, val_size=0, test_size=0)
    train, val, tests = split_data(named, molecules)
    assert (set(train), set(val), set(tests["c"])) == (a, b, c)
    train, val, tests = split_data(replace(named, train_size=9, val_size=8, test_size=7), molecules)
    assert (len(train), len(val), len(tests["c"])) == (9, 8, 7)
    assert set(train) < a and set(val) < b and set(tests["c"]) < c
    train, val, tests = split_data(replace(named, val_split="", val_size=50, test_split="b,c"), molecules)
    assert {*train, *val} == a and len(val) == 50 and not {*train} & {*val}
    assert [*tests] == ["b", "c"] and set(tests["b"]) == b and set(tests["c"]) == c
    train, val, tests = split_data(replace(named, test_split="", val_split="a", val_size=100, test_size=50), molecules)
    assert {*train, *val, *tests["test"]} == a and (len(train), len(val)) == (850, 100)


def test_isolated_atoms_train(tmp_path):
    """In a test set their offset of eV would be all of the error."""
    z, pos = np.array([8, 1, 1]), np.array([[0, 0, 0.12], [0, 0.76, -0.48], [0, -0.76, -0.48]])
    water = [{"z": z, "pos": pos * (1 + k / 1000), "labels": {"energy": -2076.0 - k}} for k in range(20)]
    atoms = [{"z": z[k : k + 1], "pos": pos[:1] * 0, "labels": {"energy": -13.6 * z[k] ** 2}} for k in (0, 1)]
    molecules = [mol | {"id": k} for k, mol in enumerate([*atoms, *water])]
    write_h5(tmp_path / "a.h5", molecules, {"source": "test"}, {"energy": "eV"})
    config = config_of(target="energy", train_size=0, val_size=8, test_size=8)
    train, val, tests = split_data(config, Molecules(tmp_path / "a.h5"))
    assert {0, 1} < {*train} and len(train) == 6 and len({*train, *val, *tests["test"]}) == 22


def test_a_test_split_named_val_is_not_taken_for_the_validation_set(tmp_path):
    path = tmp_path / "splits.h5"
    molecules, order = with_splits(path)
    with h5py.File(path, "r+") as file:
        file["split/val"] = file["split/b"][...]
    molecules = Molecules(path)
    config = config_of(train_split="a", test_split="val", test_size=0, train_size=0, val_size=30)
    train, val, tests = split_data(config, molecules)
    assert not {"train", "val"} & tests.keys() and {*train, *val} == set(order[:1000])
    assert [set(index) for index in tests.values()] == [set(order[1000:1600])]


BAD_SPLITS = [
    ({"train_size": 0, "val_size": 0}, "train_size and val_size are 0"),
    ({"train_size": 0, "test_size": 0}, "train_size and test_size are 0"),
    ({"val_size": 1900}, "2000 molecules for these"),
    ({"train_size": 0, "val_size": 1000, "test_size": 1000}, "2000 molecules for these"),
    ({"train_split": "a", "val_split": "b", "val_size": 601}, "there are 600 in b"),
    ({"train_split": "all", "val_split": "b", "train_size": 1970}, "share molecules"),
    ({"train_split": "a", "test_split": "all", "train_size": 0}, "share molecules"),
    ({"train_split": "a", "test_split": "d"}, "no such split"),
]


@pytest.mark.parametrize("settings, message", BAD_SPLITS)
def test_a_split_that_cannot_be(tmp_path, settings, message):
    molecules, _ = with_splits(tmp_path / "splits.h5")
    with pytest.raises(InputError) as error:
        split_data(config_of(**settings), molecules)
    assert message in str(error.value) and "\n" not in str(error.value) and error.value.code == 2


def test_a_test_set_without_a_known_label_is_refused(tmp_path):
    with_splits(tmp_path / "splits.h5")
    with h5py.File(tmp_path / "splits.h5", "r+") as file:
        file["y/gap"][file["split/c"][:]] = np.nan
    with pytest.raises(InputError, match="test_size = 0: there are 0 in c, gap known"):
        split_data(
            config_of(train_split="a", val_split="b", test_split="c", test_size=0), Molecules(tmp_path / "splits.h5")
        )


# ---------------------------------------------------------------- where the encoder comes from


@pytest.fixture
def encoders(tiny):
    """The same weights in the files that a user may have, and what they hold."""
    settings = {"data": str(QM9), "val_size": 30, "batch_size": 8, "max_steps": 1, "model": MODEL}
    Path("first.yaml").write_text(yaml.safe_dump(settings))
    pretrain.main(["first.yaml"])
    weights = load_encoder("out/first/encoder.pt").state_dict()
    theirs = {f"representation_model.{key}": value for key, value in weights.items()}
    theirs |= {"representation_model.distance.loop_proxy": torch.zeros(1), "noise_model.a": torch.zeros(2)}
    torch.save(theirs, "theirs.pt")
    torch.save({"state_dict": {f"model.{key}": value for key, value in theirs.items()}}, "lightning.pt")
    return ["out/first/encoder.pt", "out/first/last.pt", "theirs.pt", "lightning.pt"], weights


def test_init_from_takes_the_encoder_and_the_head_is_the_seeds(encoders, capsys):
    paths, weights = encoders
    settings = ["lr=0", "lr_min=0", "max_steps=1"]
    heads = [tensors(start("gap", *settings, out="out/scratch") / "last.pt")]
    assert not torch.equal(heads[0]["/state_dict/model.encoder.embedding.weight"], weights["embedding.weight"])
    for k, path in enumerate(paths):
        heads.append(tensors(start("gap", *settings, f"init_from={path}", out=f"out/{k}") / "last.pt"))
        for key, value in weights.items():
            assert torch.equal(heads[-1][f"/state_dict/model.encoder.{key}"], value), (path, key)
    fresh = [key for key in heads[0] if key.startswith("/state_dict/model.head")]
    assert len(fresh) > 5 and all(torch.equal(head[key], heads[0][key]) for head in heads for key in fresh)
    start("gap", "seed=2", *settings, out="out/seed")
    assert not all(torch.equal(tensors("out/seed/last.pt")[key], heads[0][key]) for key in fresh)
    metrics = json.loads(Path("out/0/metrics.json").read_text())
    assert metrics["init_sha256"] and metrics["init_from"] == paths[0]
    # our own files bring their architecture along, and a best.pt or last.pt of this stage will do
    capsys.readouterr()
    start("gap", "model.num_layers=1", *settings, "init_from=out/0/best.pt", out="out/again")
    assert "model, by the file: num_layers=2\n" in capsys.readouterr().out
    start("gap", *settings, "init_from=out/0/last.pt", out="out/again2")
    assert same_bits("out/again/best.pt", "out/0/best.pt") and same_bits("out/again2/best.pt", "out/0/best.pt")


def test_resuming_does_not_read_init_from_again(encoders):
    """It may be another file by then: the encoder is in last.pt, and metrics.json names the one that was read."""
    settings = ["init_from=encoder.pt", "ema_decay=0.5"]
    for out in ("whole", "parts"):
        Path("encoder.pt").write_bytes(Path("out/first/encoder.pt").read_bytes())
        start("gap", *settings, f"max_steps={4 if out == 'whole' else 2}", out=f"out/{out}")
        Path("encoder.pt").unlink()
    start("gap", *settings, "max_steps=4", "resume=true", out="out/parts")
    whole, parts = (json.loads(Path(f"out/{out}/metrics.json").read_text()) for out in ("whole", "parts"))
    assert same_bits("out/whole/last.pt", "out/parts/last.pt") and whole["test"] == parts["test"]
    assert whole["init_sha256"] == parts["init_sha256"] == sha256("out/first/encoder.pt")


def test_weights_that_cannot_be_loaded_are_one_line(encoders):
    fails(["gap.yaml", "init_from=theirs.pt", "model.num_layers=3"], "not of this encoder")
    fails(["gap.yaml", "init_from=theirs.pt", "model.embedding_dimension=32"], "not of this encoder")
    fails(["gap.yaml", "init_from=nowhere.pt"], "nowhere.pt")
    Path("cut.pt").write_bytes(Path("theirs.pt").read_bytes()[:-1000])
    Path("text.pt").write_text("weights")
    torch.save({"state_dict": {}, "hyper_parameters": Path("/")}, "pickle.pt")  # a class: pickle would run its code
    torch.save([1, 2], "list.pt")
    torch.save({"schema": "georecon/2", "state_dict": {}}, "schema.pt")
    torch.save({"a": 1}, "other.pt")
    for name in ("cut", "text", "pickle", "list", "schema", "other"):
        fails(["gap.yaml", f"init_from={name}.pt"], f"{name}.pt")
    assert not Path("out/gap").exists()


# ---------------------------------------------------------------- heads of mu and r2, the probe


@pytest.mark.parametrize("target, head", [("mu", "dipole"), ("r2", "extent")])
def test_mu_and_r2_have_heads_of_their_own(tiny, target, head):
    model, about = load_property_model(start("gap", f"target={target}") / "best.pt")
    model = model.double()
    assert about["head"] == head and model.mean == 0 and not model.references.any() and model.std > 0
    part = Molecules(QM9).read([3, 900])
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    pos = part["pos"].double()
    y = model(part["z"], pos, part["batch"], 2)[0]
    turned = model(part["z"], pos @ turn.T + 2, part["batch"], 2)[0]
    assert y.abs().min() > 1e-6
    torch.testing.assert_close(y, turned, rtol=1e-9, atol=1e-12)
    plain = load_property_model(start("gap", f"target={target}", "head=scalar", out="out/plain") / "best.pt")
    assert plain[1]["head"] == "scalar"
    fails(["gap.yaml", f"target={target}", "references=fit", "out_dir=out/fit"], f"head={head} is for one target")


def test_the_probe_trains_one_linear_layer(tiny, monkeypatch):
    seen, make = [], finetune.make_encoder

    def keep(*arguments):
        encoder, line = make(*arguments)
        seen.append((encoder, {key: value.clone() for key, value in encoder.state_dict().items()}))
        return encoder, line

    monkeypatch.setattr(finetune, "make_encoder", keep)
    settings = ["freeze_encoder=true", "train_size=1000", "max_steps=300", "lr=3e-3", "lr_cosine_length=300"]
    folder = start("gap", *settings, "val_every=100", "batch_size=64", "test_size=200", "val_size=200")
    (encoder, before), *_ = seen
    assert all(torch.equal(value.cpu(), before[key]) for key, value in encoder.state_dict().items())
    metrics = json.loads((folder / "metrics.json").read_text())
    for found in (metrics["val"], metrics["test"]["test"]):
        assert set(found) == {"gap_mae", "gap_mae_ridge", "gap_mae_constant"}
        assert found["gap_mae_ridge"] < 0.9 * found["gap_mae_constant"] and found["gap_mae"] < found["gap_mae_constant"]
    train, _, tests = split_data(load_config(FinetuneConfig, [f"{folder}/config.yaml"]), Molecules(QM9))
    y = Molecules(QM9).label("gap")
    constant = 1000 * np.abs(y[tests["test"]] - np.median(y[train])).mean()
    assert metrics["test"]["test"]["gap_mae_constant"] == pytest.approx(constant, rel=1e-3)
    assert len(read_log(folder, "val")) == 4


def test_a_probe_of_several_labels_fits_each_as_alone_in_closed_form(tiny):
    settings = ["freeze_encoder=true", "train_size=1000", "test_size=200", "val_size=200", "max_steps=20"]
    several = json.loads((start("gap", "target=gap,U0,mu", *settings) / "metrics.json").read_text())
    assert several["parameters"] == 3 * 17 and several["units"]["U0_mae_ridge"] == "meV"
    for target in ("gap", "U0", "mu"):
        folder = start("gap", f"target={target}", *settings, out=f"out/alone_{target}")
        alone = json.loads((folder / "metrics.json").read_text())
        for found, one in ((several["val"], alone["val"]), (several["test"]["test"], alone["test"]["test"])):
            assert found[f"{target}_mae_ridge"] == pytest.approx(one[f"{target}_mae_ridge"], rel=1e-6)


def test_a_probe_of_a_label_with_a_mean_has_an_intercept(tiny):
    settings = ["target=mu", "freeze_encoder=true", "train_size=1000", "test_size=200", "val_size=200", "max_steps=20"]
    found = json.loads((start("gap", *settings) / "metrics.json").read_text())["test"]["test"]
    assert found["mu_mae_ridge"] < found["mu_mae_constant"]


def test_molecules_with_an_element_that_training_did_not_see_are_left_out(tiny):
    """MoleculeNet's Lipophilicity has its only selenium in the validation set."""
    config = load_config(FinetuneConfig, ["gap.yaml"])
    molecules = Molecules(QM9)
    only_h_c = np.array([m for m in range(200) if set(molecules.read([m])["z"].tolist()) <= {1, 6}])
    labels = Labels(config, molecules, only_h_c, {"val": np.arange(200)}, 100)
    assert labels.others["val"].tolist() == only_h_c.tolist() and len(labels.constant["val"]) == len(only_h_c)
    told = f"left out, with an element that no training molecule has: {200 - len(only_h_c)} of val (the first has id"
    assert told in labels.remark
    others = np.setdiff1d(np.arange(200), only_h_c)
    with pytest.raises(InputError, match=rf"no training molecule has: {len(others)} of test \(.*\), and no others"):
        Labels(config, molecules, only_h_c, {"val": only_h_c, "test": others}, 100)


def test_a_head_that_is_never_negative_takes_no_negative_labels(tiny):
    """A label of your own may be called mu, and be no length."""
    config = load_config(FinetuneConfig, ["gap.yaml", "target=mu"])
    molecules, parts = Molecules(QM9), (np.arange(100), {"val": np.arange(100, 200)}, 100)
    raw = molecules.label("mu").copy()
    raw[3] = -1
    molecules.label = lambda name: raw
    for target in ("mu", "gap,mu"):
        with pytest.raises(InputError, match=f"{target}: head=dipole is for one target, never below 0"):
            Labels(replace(config, target=target, head="dipole"), molecules, *parts)
    for plain in (replace(config, head="scalar"), replace(config, freeze_encoder=True)):
        assert Labels(plain, molecules, *parts).mean == pytest.approx(raw[:100].mean())


def test_labels_of_a_head_that_is_never_negative_keep_their_mean(tiny):
    """With it taken off, half of them would be below zero, whatever the label's name."""
    config, molecules = load_config(FinetuneConfig, ["gap.yaml"]), Molecules(QM9)
    for head, positive in (("dipole", True), ("extent", True), ("scalar", False), ("pooler", False)):
        labels = Labels(replace(config, head=head), molecules, np.arange(100), {}, 100)
        y = labels.standardised(molecules.read(range(100)), np.arange(100))
        assert (y > 0).all() == positive, head
    molecules.label, molecules.units["dipole"] = lambda name: Molecules(QM9).label("gap"), "D"  # named as a head is
    assert Labels(replace(config, target="dipole", head="scalar"), molecules, np.arange(100), {}, 100).mean > 0


def test_the_unit_of_a_label_whose_name_is_like_an_error(tiny):
    labels = Labels(load_config(FinetuneConfig, ["gap.yaml"]), Molecules(QM9), np.arange(100), {}, 100)
    labels.shown |= {"formation_per_atom": "eV"}
    units = {name: labels.unit_of(f"{name}_mae") for name in ("formation_per_atom", "gap", "energy_per_atom")}
    assert units == {"formation_per_atom": "eV", "gap": "meV", "energy_per_atom": "meV per atom"}


@pytest.mark.parametrize("metric, best", [("mae", 0.2 * 1 + 0.8 * 3), ("rmse", 0.2 * 2 + 0.8 * 4)])
def test_best_is_chosen_by_the_metric_for_energies_and_forces_too(metric, best):
    config = FinetuneConfig(metric=metric, energy_weight=0.2, force_weight=0.8)
    found = {"energy_mae": 1, "energy_rmse": 2, "forces_mae": 3, "forces_rmse": 4}
    assert finetune.score(found, SimpleNamespace(forces=True), config) == pytest.approx(best)


def test_ridge_is_least_squares_where_that_is_best():
    random = torch.Generator().manual_seed(0)
    x, w = torch.randn(50, 6, generator=random).double(), torch.randn(6, generator=random).double()
    y = x @ w
    expected = np.linalg.lstsq(x.numpy(), y.numpy(), rcond=None)[0]
    assert finetune.ridge(x, y, x, y).numpy() == pytest.approx(expected, abs=1e-6)
    noise = torch.randn(50, generator=random).double()  # nothing to learn: the largest penalty is best
    small = finetune.ridge(x, noise, x, torch.zeros(50, dtype=torch.float64))
    assert small.norm() < np.linalg.norm(np.linalg.lstsq(x.numpy(), noise.numpy(), rcond=None)[0])


# ---------------------------------------------------------------- stopping and going on


RESUMED = [
    ("gap", []),
    ("forces", ["ema_decay=0.9", "lr_schedule=plateau", "lr_patience=0", "lr_factor=0.5", "lr=1e-1", "clip_norm=1"]),
    ("gap", ["target=homo,lumo", "head=pooler"]),
    ("gap", ["target=mu", "lr_schedule=cosine", "ema_decay=0.5", "accumulate=2", "keep_steps=7"]),
]


@pytest.mark.parametrize("name, settings", RESUMED)
def test_resumed_is_bitwise_the_same(tiny, name, settings):
    whole = start(name, *settings, "max_steps=20", out="out/whole")
    parts = start(name, *settings, "max_steps=10", out="out/parts")
    start(name, *settings, "max_steps=20", "resume=true", out="out/parts")
    assert same_bits(whole / "last.pt", parts / "last.pt") and same_bits(whole / "best.pt", parts / "best.pt")
    for split in ("train", "val"):
        a, b = read_log(whole, split), read_log(parts, split)
        for record in a + b:
            record.pop("molecules_per_s", None)
        assert a == b
    a, b = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, parts))
    assert (a["test"], a["val"], a["best_step"]) == (b["test"], b["val"], b["best_step"])
    rates = [record["lr"] for record in read_log(whole)]
    assert "lr_schedule=plateau" not in settings or rates[-1] < rates[2]
    fails(
        [f"{name}.yaml", "out_dir=out/whole", *settings, "max_steps=20", "resume=true"],
        "finished at step 20: set max_steps",
    )
    fails([f"{name}.yaml", "out_dir=out/whole", *settings, "max_steps=20"], "already holds a run")


def test_equal_shapes_from_step_to_step_give_the_same_forces():
    """What compiled code is given on CUDA: the pairs, brought up to a multiple by some beyond the cutoff."""
    molecules, shapes = Molecules(ETHANOL), set()
    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL, "cutoff_upper": 3.0})  # ethanol as a whole lies within 5
    model = PropertyModel(EquivariantTransformer(config), "scalar", "sum", [0.0] * 100)

    def gradient(pos, z, batch, num_molecules, edge_index):
        shapes.add(edge_index.shape[1])
        return model.gradient(pos, z, batch, num_molecules, edge_index)

    for start in range(0, 40, 4):
        part = molecules.read(range(start, start + 4), forces=True)
        found = []
        for model.compiled, model.multiple in ((None, 1), (gradient, 32)):
            model.zero_grad()
            y, forces = model(part["z"], part["pos"], part["batch"], 4, forces=True)
            (y.square().mean() + (forces - part["forces"]).square().mean()).backward()
            found.append([y, forces, *[p.grad for p in model.parameters() if p.grad is not None]])
        for a, b in zip(*found, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * a.abs().max().item())
    assert shapes <= {96, 128, 144}  # 4 x 36 pairs are all there are


def test_pairs_that_fill_up_do_not_count_as_neighbours():
    batch = torch.zeros(6, dtype=torch.int64)
    pos = torch.tensor([[0.0, 0, 0]] + [[4 * math.cos(k), 4 * math.sin(k), k / 9] for k in range(5)])
    most = 1 + torch.bincount(radius_graph(pos, batch, 5.0).flatten()).max().item()
    config = ModelConfig(**MODEL, max_num_neighbors=most)
    model = PropertyModel(EquivariantTransformer(config), "scalar", "sum", [0.0] * 100)
    model.multiple = 15
    assert radius_graph(pos, batch, 5.0).shape[1] < 15 == model.pairs(pos, batch).shape[1]


@pytest.mark.parametrize(
    ("device", "one_shape", "multiple"), [("cuda", True, 256), ("cuda", False, 1), ("cpu", True, 1)]
)
def test_cuda_graphs_are_for_molecules_of_one_size(monkeypatch, device, one_shape, multiple):
    """Others would be compiled anew for each size, which torch gives up after the eighth."""
    seen = {}
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)
    monkeypatch.setattr(torch, "compile", lambda function, **settings: seen.update(settings) or function)
    model = PropertyModel(EquivariantTransformer(ModelConfig(**MODEL)), "scalar", "sum", [0.0] * 100)
    model.compile_derivative(torch.device(device), one_shape)
    assert (model.multiple, seen["dynamic"], "mode" in seen) == (multiple, multiple == 1, multiple > 1)


@pytest.mark.slow
def test_shapes_beyond_those_that_torch_compiles_go_uncompiled(monkeypatch):
    """The settings of CUDA, traced and run as they are: dynamics of ever other molecules, say."""
    compile = torch.compile

    def traced(function, mode=None, **settings):
        return compile(function, backend="eager", **settings)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(compiled, "check_compiler", lambda device: None)
    model = PropertyModel(EquivariantTransformer(ModelConfig(**MODEL)), "scalar", "sum", [0.0] * 100)
    model.eval().requires_grad_(False)
    pos = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    for atoms in range(2, 13):
        z, batch = torch.full((atoms,), 6), torch.zeros(atoms, dtype=torch.int64)
        model.compiled = None
        expected = model(z, pos[:atoms], batch, 1, forces=True)
        model.compile_derivative(torch.device("cuda"))
        monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
        for a, b in zip(model(z, pos[:atoms], batch, 1, forces=True), expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()  # what torch has given up here would not be compiled in the next test either


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gap", "forces"])
def test_compiled_equals_uncompiled(tiny, name):
    """To rounding; and a compiled run that goes on ends with the bits of one that was not stopped."""
    start(name)
    start(name, "compile=true", out="out/compiled")
    for a, b in zip(read_log(f"out/{name}"), read_log("out/compiled"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    start(name, "compile=true", "max_steps=2", out="out/again")
    start(name, "compile=true", "resume=true", out="out/again")
    assert same_bits("out/compiled/last.pt", "out/again/last.pt")


def test_the_best_of_a_killed_run_is_taken_over(tiny, monkeypatch):
    """best.pt is of step 6, last.pt of step 4. Gone on without validating at 6, the run can be resumed once more."""
    step, left = finetune.train_step, [7]

    def stop(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(finetune, "train_step", stop)
    often = ["max_steps=12", "save_every=4", "lr=1e-4"]
    with pytest.raises(KeyboardInterrupt):
        start("gap", *often, "val_every=2")
    assert load_property_model("out/gap/best.pt")[1]["step"] == 6
    fails(["gap.yaml", *often, "max_steps=5", "resume=true"], "if not, set max_steps=6")
    left[0] = 4  # up to step 8, which is saved
    with pytest.raises(KeyboardInterrupt):
        start("gap", *often, "val_every=12", "resume=true")
    left[0] = 12
    start("gap", *often, "val_every=12", "resume=true")
    assert json.loads(Path("out/gap/metrics.json").read_text())["best_step"] in (6, 12)


def test_a_run_stopped_between_two_files_goes_on(tiny, monkeypatch):
    """best.pt of step 5 is written, the run stops before last.pt of step 7."""
    whole = start("gap", "max_steps=9", out="out/whole")
    step, calls = finetune.train_step, []

    def stop(*arguments):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return step(*arguments)

    monkeypatch.setattr(finetune, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        start("gap", "max_steps=9")
    monkeypatch.setattr(finetune, "train_step", step)
    start("gap", "max_steps=9", "resume=true")
    assert same_bits(whole / "last.pt", "out/gap/last.pt") and same_bits(whole / "best.pt", "out/gap/best.pt")
    fails(["gap.yaml", "max_steps=12", "resume=true", "loss=l1"], "its loss is mse, now l1")
    fails(["gap.yaml", "max_steps=12", "resume=true", "train_size=50"], "its train_size is 100, now 50")


def test_ema_averages_the_weights(tiny):
    folder = start("gap", "ema_decay=0.5", "max_steps=2", "val_every=2")
    first = tensors(start("gap", "max_steps=1", out="out/one") / "last.pt")
    last, key = tensors(folder / "last.pt"), "encoder.embedding.weight"
    one, two = first[f"/state_dict/model.{key}"], last[f"/state_dict/model.{key}"]
    torch.testing.assert_close(last[f"/average/module.{key}"], (one + two) / 2, rtol=1e-5, atol=1e-8)


RANKS = [
    ("forces", ["position_noise_scale=0.05"]),
    ("gap", ["target=gap,mu", "head=pooler"]),  # its head leaves the vectors without a gradient, too
    pytest.param("gap", ["target=r2"], marks=pytest.mark.slow),  # its head leaves the vectors without a gradient
    pytest.param("forces", ["compile=true", "model.embedding_dimension=256"], marks=pytest.mark.slow),  # above 1 MB
]


@pytest.mark.parametrize("name, settings", RANKS)
def test_two_ranks_equal_one(tiny, name, settings):
    start(name, *settings, out="out/one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "finetune.py"), f"{name}.yaml", *settings, "out_dir=out/two"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    seconds = 600 if "compile=true" in settings else 120
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout + done.stderr
    for split in ("train", "val"):
        for a, b in zip(read_log("out/one", split), read_log("out/two", split), strict=True):
            for key in a.keys() - {"split", "step", "molecules_per_s"}:
                assert a[key] == pytest.approx(b[key], rel=1e-4), (split, a["step"], key)
    a, b = (json.loads(Path(f"out/{run}/metrics.json").read_text()) for run in ("one", "two"))
    for key, value in a["test"]["test"].items():
        assert b["test"]["test"][key] == pytest.approx(value, rel=1e-4)


# ---------------------------------------------------------------- bad input


BAD_SETTINGS = [
    ("gap", "target=gab", "gab", 2),
    ("gap", "target=", "target is not set", 2),
    ("gap", "target=energy_forces", "has no forces", 2),
    ("gap", "data=nowhere.h5", "nowhere.h5", 1),
    ("gap", "data=", "data is not set", 2),
    ("gap", "val_size=5000", "val_size = 5000", 2),
    ("gap", "batch_size=101", "batch_size", 2),
    ("gap", "accumulate=3", "batch_size", 2),
    ("gap", "ema_decay=1", "ema_decay = 1.0: must be below 1", 2),
    ("gap", "references=qm9", "one of auto, none, fit", 2),
    ("gap", "head=vector", "one of auto, scalar, dipole, extent, pooler", 2),
    ("gap", "target=gap,", "no label ''", 2),
    ("gap", "target=gap,gap", "a name stands twice", 2),
    ("gap", "target=gap,energy_forces", "no label 'energy_forces'", 2),
    ("gap", "lr_schedule=step", "one of cosine, cosine_warmup, plateau", 2),
    ("gap", "model.max_z=6", "model.max_z", None),
    ("gap", "model.max_num_neighbors=3", "max_num_neighbors", None),
    ("gap", "init_form=a.pt", "did you mean init_from", 2),
    ("gap", "lr=1e30", "the loss is", None),
    ("gap", "train_size=1", "batch_size 8 is more than the 1 molecules", 2),
    ("forces", "target=gap", "gap", 2),
    ("forces", "train_split=train", "no such split", 2),
]


@pytest.mark.parametrize("name, setting, message, code", BAD_SETTINGS, ids=[bad[1] for bad in BAD_SETTINGS])
def test_a_bad_setting_is_one_line(tiny, name, setting, message, code):
    fails([f"{name}.yaml", setting], message, code)
    assert not Path(f"out/{name}/last.pt").exists()


def test_a_long_name_of_a_split_does_not_run_into_the_next_column(tiny, capsys):
    names = ("test_1200K_reduced", "b")
    with_splits(tiny / "splits.h5")
    with h5py.File(tiny / "splits.h5", "r+") as file:
        file[f"split/{names[0]}"] = file["split/c"][...]
    start("gap", "data=splits.h5", "train_split=a", f"test_split={','.join(names)}", "max_steps=1")
    lines = [line for line in capsys.readouterr().out.splitlines() if "gap_mae " in line and "split val" not in line]
    assert [line.split()[:2] for line in lines] == [[name, "gap_mae"] for name in ("val", *names)]
    assert len({line.index("gap_mae") for line in lines}) == 1


def test_config_yaml_of_a_run_starts_the_same_run(tiny):
    Path("gap.yaml").write_text(yaml.safe_dump({**GAP, "paper": {"georecon_test_gap_mae": 31.4}}))
    folder = start("gap")
    config = load_config(FinetuneConfig, [str(folder / "config.yaml")])
    assert config == load_config(FinetuneConfig, ["gap.yaml", "compile=false"])  # what auto has come to
    finetune.main([str(folder / "config.yaml"), "out_dir=out/again"])
    assert same_bits(folder / "best.pt", "out/again/best.pt")


ROWS = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "target" in read_yaml(path)]
ROWS = [path for path in ROWS if not path.stem.startswith("molnet")]  # tests/test_molnet.py has these


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in ROWS if path.stem != "md17"], ids=lambda path: path.stem)
def test_every_row_runs_some_steps_at_full_size_on_a_file_of_its_layout(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    forces = load_config(FinetuneConfig, [str(path)]).target == "energy_forces"
    settings = [
        "train_split=",
        "val_split=",
        "test_split=",
        "train_size=40",
        "val_size=6",
        "test_size=6",
        "num_workers=0",
    ]
    settings += [f"data={ETHANOL if forces else QM9}", "max_steps=3", "batch_size=4", "log_every=1"]
    finetune.main([str(path), *settings])
    metrics = json.loads((tmp_path / "out" / path.stem / "metrics.json").read_text())
    assert all(math.isfinite(value) for value in metrics["test"]["test"].values())
    for name in metrics["paper"]:  # each of the paper's figures stands beside one of ours
        assert any(name.endswith(f"_{error}") for error in metrics["test"]["test"]), name
