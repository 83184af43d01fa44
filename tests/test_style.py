"""The house: what the files import, what the README claims of them."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STAGES = sorted(ROOT.glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
PACKAGES = {"torch", "numpy", "h5py", "tqdm", "yaml"} | {path.stem for path in STAGES}


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_five_packages_are_enough_to_import(path):
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:  # imports inside functions are optional ones
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names - set(sys.stdlib_module_names) <= ({"torch"} if path.name == "model.py" else PACKAGES)


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            allowed = {"pretrain": 120, "finetune": 150}.get(node.name, 60)  # a whole run, top to bottom
            assert node.end_lineno - node.lineno < allowed, node.name


@pytest.mark.parametrize("path", STAGES, ids=lambda path: path.name)
def test_readme_tells_the_length_of_each_file(path):
    (told,) = re.findall(rf"^\| `{path.name}` \|.*\| (\d+) \|$", README, re.M)
    assert int(told) == pytest.approx(len(path.read_text(encoding="utf-8").splitlines()), rel=0.05)


def test_readme_names_files_that_are_there():
    for name in set(re.findall(r"\b(?:configs|results|tests|data)/[\w./-]+\.(?:yaml|json|png|py|npz)\b", README)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"^\| `(\w+\.yaml)` \|", README, re.M):
        assert (ROOT / "configs" / name).exists(), name


def test_every_config_is_in_the_readme():
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in README, path.name
