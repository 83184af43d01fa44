"""What README.md and FORK.md say of forking: the loop without its harness, and FORK.md followed to the letter."""

import csv
import importlib.util
import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import fork_loop
import pytest
import torch
from test_model import all_molecules, difference, fill, random_orthogonal, small
from tiny_run import read_log

import pretrain
from data import Molecules
from formats.sources import SYMBOLS
from model import load_encoder, new_encoder, radius_graph

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "FORK.md").read_text(encoding="utf-8")
FILES = dict(re.findall(r"`([\w/]+\.py)`:\n\n```python\n(.*?)```", PAGE, flags=re.S))
LINES = re.findall(r"An entry in the dict `(\w+)` of `(\w+\.py)`:\n\n```\n(.+)\n```", PAGE)
COMMANDS = re.findall(r"^python (.+)$", PAGE, flags=re.M)
TINY = "max_steps=3 batch_size=4 model.embedding_dimension=16 model.num_layers=2 model.num_rbf=16 model.num_heads=4"

# The commands one after the other in one process, as `python -m` or `python FILE` would run each
DRIVER = """
import importlib, json, runpy, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, "")
for name, *arguments in json.load(open("commands.json")):
    if name.startswith("formats."):
        runpy.run_module(name, run_name="__main__")
    else:
        importlib.import_module(name).main(arguments)
"""


def test_the_loop_without_its_harness_trains_the_same_weights(tmp_path, monkeypatch):
    """Sixty lines, and the bits of `pretrain.py configs/demo.yaml`."""
    assert len(Path(fork_loop.__file__).read_text().splitlines()) <= 60
    monkeypatch.chdir(Path(__file__).parent.parent)
    plain = fork_loop.pretrain(replace(fork_loop.CONFIG, max_steps=5))
    pretrain.main(["configs/demo.yaml", "max_steps=5", "val_every=5", f"out_dir={tmp_path / 'run'}"])
    ours = torch.load(tmp_path / "run/last.pt", weights_only=True)["state_dict"]
    assert plain.state_dict().keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in plain.state_dict().items())


# ---------------------------------------------------------------- FORK.md


def module_of(name, folder):
    """The module of a block of FORK.md."""
    path = folder / Path(name).name
    path.write_text(FILES[name], encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_table(path, num):
    """mine.csv of the first molecules of the demo."""
    molecules = Molecules(ROOT / "data/qm9_demo.h5")
    gap = molecules.label("gap")
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(re.search(r"^molecule,.*$", PAGE, flags=re.M)[0].split(","))
        for m in range(num):
            part = molecules.read([m])
            for z, pos in zip(part["z"].tolist(), part["pos"].double() / 10, strict=True):
                table.writerow([m, SYMBOLS.split()[z], *pos.tolist(), gap[m]])


def follow(folder):
    """Copy the repository to folder, and do there what FORK.md says."""
    for shelf in ("harness", "formats", "beyond", "configs"):
        shutil.copytree(ROOT / shelf, folder / shelf, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    (folder / "data").mkdir()
    shutil.copy(ROOT / "data/qm9_demo.h5", folder / "data")
    for name, text in FILES.items():
        assert not (folder / name).exists(), f"FORK.md would overwrite {name}"
        (folder / name).write_text(text, encoding="utf-8")
    for table, name, line in LINES:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(f"\n{table} = {{") == 1
        (folder / name).write_text(text.replace(f"\n{table} = {{", f"\n{table} = {{{line} "), encoding="utf-8")
    write_table(folder / "mine.csv", 60)


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A copy in which FORK.md has been followed, and its commands run for three steps each."""
    folder, calls = tmp_path_factory.mktemp("fork"), []
    follow(folder)
    for command in COMMANDS:
        name, *arguments = command.removeprefix("-m ").split()
        name = name.removesuffix(".py")
        short = TINY.split() if name in ("pretrain", "finetune") else []
        if any(argument.startswith("init_from=") for argument in arguments):  # the file brings the model along
            short = [setting for setting in short if not setting.startswith("model.")]
        calls.append([name, *arguments, *short])
    masked = next(call for call in calls if "objective=masked_types" in call)
    calls.append([*masked, "accumulate=2", "out_dir=out/parts"])  # a later key=value holds
    (folder / "commands.json").write_text(json.dumps(calls))
    done = subprocess.run([sys.executable, "-c", DRIVER], cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_page_has_three_files_two_lines_and_their_commands():
    assert list(FILES) == ["beyond/masked_types.py", "beyond/messages.py", "formats/mine.py"]
    assert [(table, name) for table, name, _ in LINES] == [("BEYOND", "pretrain.py"), ("BACKBONES", "model.py")]
    assert len(COMMANDS) == 8 and PAGE.count("```") == 2 * (len(FILES) + len(LINES) + 3 + 1)
    told = [int(number) for number in re.findall(r"in (\d+)\b", PAGE.partition("##")[0])]
    assert told == [len([line for line in text.splitlines() if line.strip()]) for text in FILES.values()]
    assert all(len(line) <= 100 for text in FILES.values() for line in text.splitlines())


def test_what_the_page_adds_trains_and_is_fine_tuned(fork):
    for name in ("masked_types", "messages", "mine"):
        first, last = (json.loads((fork / f"out/{name}/metrics.json").read_text())[key] for key in ("val_start", "val"))
        assert math.isfinite(last["loss"]) and last["loss"] != first["loss"]
        found = json.loads((fork / f"out/{name}_gap/metrics.json").read_text())
        assert math.isfinite(found["val"]["gap_mae"]) and found["init_from"] == f"out/{name}/encoder.pt"
    brought = torch.load(fork / "out/messages_gap/best.pt", weights_only=True)
    assert brought["model"]["backbone"] == "messages"


def test_the_losses_of_masked_types_add_up_over_the_parts_of_a_batch(fork):
    whole, parts = (read_log(fork / f"out/{name}")[-1] for name in ("masked_types", "parts"))
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)


def test_the_data_set_is_the_table(fork):
    mine, theirs = Molecules(fork / "data/mine.h5"), Molecules(ROOT / "data/qm9_demo.h5")
    a, b = mine.read(range(60)), theirs.read(range(60))
    assert torch.equal(a["z"], b["z"]) and difference(a["pos"], b["pos"]) < 1e-5
    assert mine.units == {"gap": "eV"} and (mine.label("gap") == theirs.label("gap")[:60]).all()


def test_the_encoder_of_a_fork_is_read_by_its_own_copy_alone(fork):
    """Ours does not know the name; the error says so."""
    with pytest.raises(ValueError, match="messages"):
        load_encoder(fork / "out/messages/encoder.pt")


def test_masked_types_is_its_equation(tmp_path):
    """The hidden elements are not seen, the loss is of their atoms alone, and every weight gets a gradient."""
    kind = module_of("beyond/masked_types.py", tmp_path)
    config = replace(pretrain.PretrainConfig(), model=small())
    z, pos, batch = all_molecules(torch.device("cpu"))
    method = fill(kind.MaskedTypes(new_encoder(config.model), config)).double()
    noise = torch.randn(len(z), 4, dtype=pos.dtype, generator=torch.Generator().manual_seed(0))
    hidden = noise[:, 3] > torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - kind.SHARE)).item()
    assert 0 < hidden.sum() < len(z)
    x, vec = method.encoder(torch.where(hidden, 0, z), pos, batch)
    chance = method.head(torch.cat([x, vec.norm(dim=1)], dim=1)).log_softmax(1)
    by_hand = -chance[hidden, z[hidden]].sum() / (kind.SHARE * len(z))
    losses = method(z, pos, batch, noise, int(batch[-1]) + 1)
    assert losses["loss"].item() == pytest.approx(by_hand.item(), rel=1e-6)
    wrong = (chance.argmax(1) != z)[hidden].sum().item() / (kind.SHARE * len(z))
    assert losses["wrong"].item() == pytest.approx(wrong, rel=1e-6)
    losses["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())


def test_messages_is_a_backbone(tmp_path):
    """It turns with the molecule, knows no pair beyond the cutoff, and has two derivatives."""
    network = fill(module_of("beyond/messages.py", tmp_path).Messages(small())).double()
    z, pos, batch = all_molecules(torch.device("cpu"))
    x, vec = network(z, pos, batch)
    assert x.shape == (len(z), 16) and vec.shape == (len(z), 3, 16)
    assert vec.abs().max() > 1e-3
    for sign in (1, -1):
        turn = random_orthogonal(0, sign)
        x_turned, vec_turned = network(z, pos @ turn.T + 1.5, batch)
        assert difference(x_turned, x.detach()) < 1e-9
        assert difference(vec_turned.mT, vec.detach().mT @ turn.T) < 1e-9
    for pairs in (radius_graph(pos, batch, 5.0), radius_graph(pos, batch, math.inf)):
        assert difference(network(z, pos, batch, pairs)[0], x.detach()) < 1e-9
    pos = pos.clone().requires_grad_()
    x, vec = network(z, pos, batch)
    assert all(g is not None for g in torch.autograd.grad(x.sum() + vec.sum(), network.parameters(), retain_graph=True))
    (slope,) = torch.autograd.grad(x.square().sum() + vec.square().sum(), pos, create_graph=True)
    slope.square().sum().backward()
    assert slope.isfinite().all() and pos.grad.isfinite().all()
