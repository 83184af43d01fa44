"""Shared by all tests: where they run. GEORECON_TEST_DEVICE=cuda pytest runs the model's tests on a GPU."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import TINY

torch.set_num_threads(1)  # faster than two for networks this small, and no slower on a busy machine
# a program that a test calls would leave the test's process without numbers next to zero, which hypothesis refuses
torch.set_flush_denormal = lambda mode: False

TALLY = Counter()  # of the faults and the bad inputs that were tried


@pytest.fixture(scope="session")
def device():
    return torch.device(os.environ.get("GEORECON_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def tally():
    return TALLY


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A GeoRecon run, a Coord run and a fine-tuning run of seconds, with copies of their steps."""
    import finetune
    import pretrain

    folder, root = tmp_path_factory.mktemp("runs"), Path(__file__).parent.parent
    common = [f"data={root / 'data/qm9_demo.h5'}", "val_size=20", "batch_size=4"]
    common += ["model.embedding_dimension=16", "model.num_layers=2", "model.num_rbf=16"]
    common += ["model.num_heads=4"]
    stage = [str(root / "configs/demo.yaml"), *common, "max_steps=3"]
    pretrain.main([*stage, f"out_dir={folder}/georecon", "keep_steps=0,2"])
    pretrain.main([*stage, f"out_dir={folder}/coord", "objective=coord"])
    stage = [str(root / "configs/demo_gap.yaml"), *common, "max_steps=4", "train_size=40"]
    stage += ["test_size=20", "init_from=", "keep_steps=0,1,2,3,4", "lr_warmup_steps=0"]
    finetune.main([*stage, f"out_dir={folder}/gap"])
    return folder


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes of pytest-xdist
        session.config.workeroutput["tally"] = dict(TALLY)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    TALLY.update(getattr(node, "workeroutput", {}).get("tally", {}))


def pytest_terminal_summary(terminalreporter):
    if TALLY:
        failed = len(terminalreporter.stats.get("failed", ()))
        told = ", ".join(f"{name}: {number}" for name, number in sorted(TALLY.items()))
        terminalreporter.write_line(f"{told}; failures: {failed}")


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A config file of a run of seconds, in a folder of its own that is the working directory."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path
