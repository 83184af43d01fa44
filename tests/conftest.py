"""Shared by all tests: where they run. GEORECON_TEST_DEVICE=cuda pytest runs the model's tests on a GPU."""

import os
from collections import Counter

import pytest
import torch

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
