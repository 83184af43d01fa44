"""The benchmark: what a race counts; what it does not overwrite."""

import json

import pytest
import torch

from harness.errors import InputError
from tools import benchmark


def test_a_race_does_not_count_first_calls():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = benchmark.race(functions, 3, torch.device("cpu"))
    assert calls == list("abababab") and [len(found) for found in times.values()] == [3, 3]


@pytest.mark.parametrize("content", ["[]", "{", '{"val": {"loss": 1.0}}', '{"md": {"rows": 5}}'])
def test_another_file_is_not_overwritten(tmp_path, content):
    out = tmp_path / "out.json"
    out.write_text(content)
    with pytest.raises(InputError, match="out.json.*name another file") as caught:
        benchmark.main(["md", f"out={out}"])
    assert caught.value.code == 2 and out.read_text() == content


def test_a_file_of_its_own_is_read(tmp_path):
    """Also with a case that the program no longer has."""
    known = {"growth": {"rows": [{"case": "growth"}]}}
    (tmp_path / "out.json").write_text(json.dumps(known))
    assert benchmark.read_known(tmp_path / "out.json") == known
    assert benchmark.read_known(tmp_path / "new.json") == {}
