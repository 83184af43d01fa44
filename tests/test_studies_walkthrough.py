"""studies/walkthrough.ipynb: its cells run in order without jupyter, and its outputs are there and name no machine."""

import ast
import importlib
import json
import re
import sys
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATH = ROOT / "studies/walkthrough.ipynb"
NOTEBOOK = json.loads(PATH.read_text(encoding="utf-8"))
CELLS = NOTEBOOK["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]
# five packages, what a notebook needs, and the repository's own
MAY_IMPORT = {"torch", "numpy", "h5py", "tqdm", "yaml", "matplotlib"}
OURS = {"data", "finetune", "harness", "lipschitz", "model", "pretrain"}


def execute(cells, folder, monkeypatch):
    """The cells in one namespace, started in folder."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))
    import matplotlib

    matplotlib.use("Agg")
    namespace = {}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*non-interactive.*")  # plt.show()
        for k, cell in enumerate(cells):
            exec(compile(cell, f"code cell {k}", "exec"), namespace)
    matplotlib.pyplot.close("all")
    return namespace


def losses_are_equal(namespace):
    hand, theirs = namespace["hand"], namespace["theirs"]
    assert hand.keys() == theirs.keys()
    for name, value in hand.items():
        assert value.item() == pytest.approx(theirs[name].item(), rel=1e-12), name


def test_each_code_cell_follows_a_markdown_cell():
    kinds = [cell["cell_type"] for cell in CELLS]
    assert kinds == ["markdown", "code"] * (len(kinds) // 2) + ["markdown"]
    for number in range(1, 10):
        assert sum(f"## {number}. " in "".join(cell["source"]) for cell in CELLS) == 1, number


def test_cells_compile_and_import_what_is_there():
    for cell in CODE:
        for node in ast.walk(ast.parse(cell)):
            names = [alias.name for alias in getattr(node, "names", [])]
            for module in names if isinstance(node, ast.Import) else ():
                first = module.split(".")[0]
                assert first in MAY_IMPORT | OURS | set(sys.stdlib_module_names)
                importlib.import_module(module)
            if isinstance(node, ast.ImportFrom):
                first = node.module.split(".")[0]
                assert first in MAY_IMPORT | OURS | set(sys.stdlib_module_names)
                assert all(hasattr(importlib.import_module(node.module), name) for name in names)
        assert all(len(line) <= 100 for line in cell.splitlines())


def test_outputs_are_kept_and_name_no_machine():
    outputs = [cell["outputs"] for cell in CELLS if cell["cell_type"] == "code"]
    assert all(outputs[1:])  # the first cell says nothing
    shown = [output for cell in outputs for output in cell]
    pictures = [output for output in shown if output["output_type"] == "display_data"]
    printed = [output for output in shown if output["output_type"] == "stream"]
    assert len(pictures) == 5 and len(printed) + len(pictures) == len(shown)
    assert all(len(picture["data"]["image/png"]) > 10_000 for picture in pictures)
    told = "".join("".join(output["text"]) for output in printed)
    assert {output["name"] for output in printed} == {"stdout"} and not re.search(r"[/\\@]|arning", told)
    assert NOTEBOOK["metadata"].keys() == {"kernelspec", "language_info"}
    assert not any(cell["metadata"] for cell in CELLS)
    assert PATH.stat().st_size < 1_000_000


def test_it_names_files_that_are_there():
    text = "\n".join("".join(cell["source"]) for cell in CELLS)
    for name in re.findall(r"\b(?:configs|data|results|studies)/[\w./-]+\.\w+", text):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (PATH.parent / name).exists(), name


@pytest.mark.parametrize("folder", [".", "studies"])
def test_the_losses_by_hand_are_those_of_the_code(folder, monkeypatch):
    """Sections 1 to 4, from the root and from studies/."""
    last = next(k for k, cell in enumerate(CODE) if "theirs = objective(" in cell)
    losses_are_equal(execute(CODE[: last + 1], ROOT / folder, monkeypatch))


@pytest.mark.slow
def test_all_of_it_runs(monkeypatch):
    found = execute(CODE, ROOT, monkeypatch)
    losses_are_equal(found)
    for name, history in found["histories"].items():
        assert found["ends"][name]["loss_noise"] < 0.8 < history["loss_noise"][0]
    moved, constants = zip(*found["walks"].values())
    assert moved[1][2].mean() > 5 * moved[0][2].mean()  # georecon and coord, at 0.01 angstrom
    assert all((c > 0).all() for c in constants)
    assert max(curve[-1][1] for curve in found["errors"].values()) < found["by_mean"]
