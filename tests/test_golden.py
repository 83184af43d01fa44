"""The losses of short runs stay those of tests/golden.json, which make_golden.py wrote."""

import json

import pytest
from make_golden import CASES, PATH, run

GOLDEN = json.loads(PATH.read_text(encoding="utf-8"))


def test_the_file_holds_every_run_and_no_other():
    assert GOLDEN.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_file(name, tmp_path):
    found, golden = run(name, tmp_path), GOLDEN[name]
    assert found.keys() == golden.keys()
    for key, values in golden.items():
        assert found[key] == pytest.approx(values, rel=1e-6, abs=0), key
