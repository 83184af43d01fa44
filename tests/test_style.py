"""The house: where the code lies, what may import what, how long it is, and what the documents claim of it."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BUDGETS = {"model.py": 580, "data.py": 260, "pretrain.py": 380, "finetune.py": 600, "lipschitz.py": 345}
SHELVES = {"harness": 965, "formats": 870, "tools": 700, "studies": 945}
CODE = sorted(path for pattern in ("*.py", *(f"{shelf}/*.py" for shelf in SHELVES)) for path in ROOT.glob(pattern))
BEYOND = sorted(ROOT.glob("beyond/*.py"))  # has no budget of its own: it may grow by a file for each idea
PACKAGES = {"torch", "numpy", "h5py", "tqdm", "yaml"}
STAGES = ["data", "pretrain", "finetune"]  # each may import those before it
MAY_IMPORT = {  # of ours; model is of torch alone
    "model": set(),
    "harness": {"harness"},
    "beyond": {"beyond", "harness", "formats", "model"},
    "formats": {"formats", "harness", "model"},
    **{stage: {"harness", "formats", "model", *STAGES[:place]} for place, stage in enumerate(STAGES)},
    "data": {"harness", "formats", "model", "beyond"},  # a command asks for beyond/rotors.py
    "lipschitz": {"harness", "formats", "model", "data"},
    "tools": {"beyond", "harness", "formats", "model", *STAGES, "lipschitz", "tools"},
    "studies": {"harness", "formats", "model", *STAGES, "lipschitz", "studies"},
}


def lines_of(path):
    return path.read_text(encoding="utf-8").splitlines()


def identity(path):
    return str(path.relative_to(ROOT))


def imported(nodes):
    """First names of what is imported."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_five_files_at_the_top_and_five_shelves():
    assert {path.name for path in ROOT.glob("*.py")} == BUDGETS.keys()
    for shelf in (*SHELVES, "beyond"):
        (rule,) = lines_of(ROOT / shelf / "__init__.py")
        assert re.fullmatch(r'""".+\."""', rule)
        assert (ROOT / shelf / "README.md").exists()


@pytest.mark.parametrize("name", BUDGETS)
def test_a_stage_keeps_its_budget(name):
    assert len(lines_of(ROOT / name)) <= BUDGETS[name]


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_shelf_keeps_its_budget(shelf):
    assert sum(len(lines_of(path)) for path in (ROOT / shelf).glob("*.py")) <= SHELVES[shelf]


def test_all_code_keeps_its_budget():
    assert sum(len(lines_of(path)) for path in CODE) <= 5500


@pytest.mark.parametrize("path", CODE + BEYOND, ids=identity)
def test_imports_follow_the_rule(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    room = path.stem if path.parent == ROOT else path.parent.name
    ours = imported(ast.walk(tree)) & MAY_IMPORT.keys()  # those inside functions, too
    if path.name == "data.py":
        ours -= {"data"}
    assert ours - {room} <= MAY_IMPORT[room]
    if room not in ("tools", "studies"):  # five packages are enough; those inside functions are optional
        foreign = imported(tree.body) - set(sys.stdlib_module_names) - MAY_IMPORT.keys()
        assert foreign <= ({"torch"} if room == "model" else PACKAGES)


@pytest.mark.parametrize("path", CODE + BEYOND, ids=identity)
def test_functions_are_short(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            allowed = {"pretrain": 70, "finetune": 100}.get(node.name, 60)  # a whole run, top to bottom
            assert node.end_lineno - node.lineno < allowed, node.name


def test_long_lines_are_the_exception():
    lines = [line for path in CODE + BEYOND for line in lines_of(path)]
    assert sum(len(line) > 100 for line in lines) < 0.1 * len(lines)


@pytest.mark.parametrize("name", BUDGETS)
def test_readme_tells_the_length_of_each_file(name):
    (told,) = re.findall(rf"`{name}`[^\n]*?\b(\d+) lines", README)
    assert int(told) == pytest.approx(len(lines_of(ROOT / name)), rel=0.05)


def test_readme_is_read_in_ten_minutes():
    assert len(README.splitlines()) <= 170 and len(README.split()) <= 1900
    prose = re.sub(r"```.*?```", "", README, flags=re.S).splitlines()
    assert all(len(line) <= 200 for line in prose if not line.startswith(("|", "![")))


@pytest.mark.parametrize(
    "path", sorted(p for end in ("*.md", "*/*.md", "configs/*.yaml") for p in ROOT.glob(end)), ids=identity
)
def test_documents_name_files_that_are_there(path):
    text = path.read_text(encoding="utf-8")
    kept = r"\b(?:configs|results|tests|data)/[\w./-]+\.(?:yaml|json|png|py|npz)\b|\bresults/[a-z_0-9]+/"
    for name in set(re.findall(kept, text)):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (path.parent / name).exists(), name


def test_every_config_is_in_the_documents():
    told = README + (ROOT / "configs/README.md").read_text(encoding="utf-8")
    for path in (ROOT / "configs").glob("*.yaml"):
        assert path.name in told, path.name
