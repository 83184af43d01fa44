"""The benchmark: what a race counts; what it does not overwrite."""

import pytest
import torch

from harness.errors import InputError
from tools import benchmark


def test_a_race_does_not_count_first_calls():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = benchmark.race(functions, 3, torch.device("cpu"))
    assert calls == list("abababab") and [len(found) for found in times.values()] == [3, 3]


def test_a_file_that_is_there_is_not_overwritten(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("{}")
    with pytest.raises(InputError, match="out.json exists"):
        benchmark.main(["pretrain", f"out={out}"])
    assert out.read_text() == "{}"
