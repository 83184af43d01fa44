"""What is kept of a run, what is drawn of it, and that a damaged result is one line."""

import json
import math
import re
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from finetune import FinetuneConfig
from harness.errors import InputError
from harness.settings import load_config
from pretrain import PretrainConfig
from studies import features, figures, reproduce, runs

ROOT = Path(__file__).parent.parent


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder where results/control is what is committed, and the only results."""
    shutil.copytree(ROOT / "results/control", tmp_path / "results/control")
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    return tmp_path


def state(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_result_is_of_a_run_of_its_study(capsys):
    """Of that name and command: read_results refuses others."""
    for study, commands in runs.STUDIES.items():
        there = {path.stem for path in (ROOT / "results" / study).glob("*.json")}
        read = [result["run"] for result in reproduce.read_results(study) if result["study"] == study]
        assert there == set(read) <= set(commands) and there
    reproduce.main([])
    assert "control: 18 of 18 runs done" in capsys.readouterr().out


def test_every_command_has_settings_that_its_stage_takes(monkeypatch):
    """A list is written hours before its last run starts."""
    monkeypatch.chdir(ROOT)
    kinds = {"pretrain.py": PretrainConfig, "finetune.py": FinetuneConfig}
    for commands in runs.STUDIES.values():
        for program, *arguments in commands.values():
            assert load_config(kinds[program], arguments).max_steps > 0


PUBLISHED = {
    "README.md": (
        "output_norm",
        "table10",
        "table3",
        "figure3",
        "qm9_wide",
        "thermal",
        "family",
        "family_weights",
        "family_long",
        "unimol",
    ),
    "speedrun.md": ("speedrun",),
    "lipschitz.md": ("control", "control_long", "alpha", "graph_embedding"),
    "encoders/README.md": ("encoders",),
}


@pytest.mark.parametrize("page, study", [(page, study) for page in PUBLISHED for study in PUBLISHED[page]])
def test_published_tables_are_those_of_the_results(page, study):
    table = "\n".join(figures.table(study, reproduce.read_results(study)))
    assert f"<!-- {study} -->\n{table}\n\n" in (ROOT / "results" / page).read_text()


def test_a_row_of_the_speedrun_has_reached_its_goal():
    """The error that its name gives, as shown, on two threads or ranks, from no encoder."""
    for arm, row in figures.rows_for("speedrun", reproduce.read_results("speedrun")).items():
        assert row["error"][0] <= float(arm.rpartition("-")[2])
    for result in reproduce.read_results("speedrun"):
        assert result["ranks"] * result["threads"] == 2 and not result["init_from"]


@pytest.mark.parametrize("name", ["freesolv", "chnof"])
def test_the_published_tables_of_features_are_those_of_the_results(name):
    table = "\n".join(features.table(json.loads((ROOT / f"results/features/{name}.json").read_text())))
    assert f"<!-- features/{name} -->\n{table}\n\n" in (ROOT / "results/README.md").read_text()


def test_the_published_table_of_memory_is_that_of_the_results():
    page = (ROOT / "results/speed.md").read_text()
    there = dict(re.findall(r"^\| `(\w+)\.yaml` \| \d+ \| \d+ \| ([\d.]+) \|$", page, re.M))
    files = (ROOT / "results/memory").glob("*.json")
    assert there == {path.stem: f"{json.loads(path.read_text())['memory_gb']:.1f}" for path in files}


def test_what_a_design_can_see():
    """Of two arms it is a paired test: t(2) = 4.303 times the standard error of the mean difference."""
    first, second = [1.0, 2.0, 3.0], [11.0, 13.0, 12.0]  # differences 10, 11, 9: standard deviation 1
    assert figures.least_difference([first, second]) == pytest.approx(4.303 / math.sqrt(3), rel=0.04)
    assert figures.least_difference([first, second, [5.0]]) == figures.least_difference([first, second])
    assert figures.least_difference([first, [x + 7 for x in first]]) == pytest.approx(0, abs=1e-12)
    # 12 arms: t(22) = 2.074; a standard deviation of 1 in normal numbers, and seeds that differ by far more
    rng = np.random.default_rng(0)
    many = [(rng.standard_normal(3) + 100 * np.arange(3)).tolist() for _ in range(12)]
    assert figures.least_difference(many) == pytest.approx(2.074 * math.sqrt(2 / 3), rel=0.3)
    assert all(math.isnan(figures.least_difference(few)) for few in ([[1.0], [2.0]], [first], []))


def test_drawing_makes_the_figure_and_leaves_the_results(place, capsys):
    pytest.importorskip("matplotlib")
    figure = place / "results/control/smoothness.png"
    figure.unlink()
    before = state(place)
    reproduce.main(["control", "draw"])
    assert figure.stat().st_size > 20_000 and figure.read_bytes().startswith(b"\x89PNG")
    figure.unlink()
    assert state(place) == before
    assert len(capsys.readouterr().out.splitlines()) == 2 + 9  # an arm a line


def test_an_arm_without_g_is_drawn_alone(place):
    """No figure for two of three panels."""
    pytest.importorskip("matplotlib")
    shutil.rmtree(place / "results/control")
    (place / "results/graph_embedding").mkdir()
    shutil.copy(ROOT / "results/graph_embedding/thermal_no_g_s1.json", place / "results/graph_embedding")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reproduce.main(["graph_embedding", "draw"])
    assert (place / "results/graph_embedding/arms.png").exists()


DAMAGE = {
    **{"cut": lambda text, _: text[:999], "list": lambda *_: "[]", "empty": lambda *_: "{}", "null": lambda *_: "null"},
    **{
        f"no {key}": lambda _, result, key=key: json.dumps({k: v for k, v in result.items() if k != key})
        for key in (
            "study",
            "run",
            "command",
            "smoothness",
            "noised_0.04",
            "graph_embedding",
            "val",
            "curve_val",
            "seed",
        )
    },
    "of another run": lambda _, result: json.dumps(result | {"run": "coord_rms_s2"}),
    "of another command": lambda _, result: json.dumps(result | {"command": result["command"] + " lr=1"}),
    "a step without LLC": lambda _, result: json.dumps(result | {"smoothness": result["smoothness"] | {"step_0": {}}}),
    "without a step": lambda _, result: json.dumps(result | {"smoothness": {}}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_result_is_one_line(place, damage):
    """Neither a wrong figure, nor hours of runs before it is said."""
    path = place / "results/control/rec_only_whiten_s2.json"  # the last of the study
    text = path.read_text()
    path.write_text(DAMAGE[damage](text, json.loads(text)))
    before = state(place)
    for arguments in ([], ["control"], ["control", "draw"]):
        with pytest.raises(InputError, match="rec_only_whiten_s2.json .*delete it and run") as caught:
            reproduce.main(arguments)
        assert "\n" not in str(caught.value) and state(place) == before


@pytest.mark.parametrize("key", ["test", "val", "steps", "units"])
def test_a_fine_tuning_result_without_its_errors_is_one_line(place, key):
    (place / "results/thermal").mkdir()
    result = json.loads((ROOT / "results/thermal/aspirin_coord_s1.json").read_text())
    del result[key]
    (place / "results/thermal/aspirin_coord_s1.json").write_text(json.dumps(result))
    with pytest.raises(InputError, match=f"aspirin_coord_s1.json .*(its {key} is missing|lacks the key '{key}')"):
        reproduce.main(["thermal", "draw"])


def test_what_is_kept_says_how_it_was_measured(place):
    """And of the LLC a figure a molecule; it is read as the results of before."""
    path = place / "results/control/georecon_rms_s1.json"
    expected = json.loads(path.read_text())
    path.unlink()
    out = reproduce.runs.ROOT / "out/control/georecon_rms_s1"
    out.mkdir(parents=True)
    (out / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in expected["curve_val"]))
    (out / "metrics.json").write_text(json.dumps({k: v for k, v in expected.items() if k not in ("study", "run")}))
    for key, (_, file, inner) in runs.analyses("control", "georecon_rms_s1").items():
        made_by = {"command": key, "commit": "abc", "settings": {"num_molecules": 2}}
        found = {inner: expected[key], "checkpoints": {"last": {"llc": {"15": [1.0, 2.0]}}}} | {inner: expected[key]}
        (place / file).parent.mkdir(parents=True)
        (place / file).write_text(json.dumps(found | made_by))
    reproduce.keep("control", "georecon_rms_s1")
    kept = json.loads(path.read_text())
    assert kept["analyses"].keys() == {"smoothness", "noised_0.01", "noised_0.04", "graph_embedding", "probe_H"}
    assert kept["analyses"]["smoothness"] == {
        **{"command": "smoothness", "commit": "abc", "settings": {"num_molecules": 2}, "llc": {"last": [1.0, 2.0]}}
    }
    assert "llc" not in kept["analyses"]["probe_H"]
    assert kept["smoothness"] == expected["smoothness"] and reproduce.read_result("control", "georecon_rms_s1") == kept


def test_what_reproduce_starts_is_there(place):
    """Stages by their file, analyses of this folder by their module."""
    for study, commands in runs.STUDIES.items():
        for run, command in commands.items():
            for started in [command, *(other for other, *_ in runs.analyses(study, run).values())]:
                name = started[1].replace(".", "/") + ".py" if started[0] == "-m" else started[0]
                assert (ROOT / name).exists(), started


def test_a_run_that_fails_is_said_and_leaves_no_result(place, capsys, monkeypatch):
    monkeypatch.setitem(runs.STUDIES, "control", {"coord_rms_s9": ["nowhere.py", "a.yaml"]})
    monkeypatch.setattr(reproduce, "analyses", lambda study, run: {})
    reproduce.execute("control", "coord_rms_s9", 1)
    said = capsys.readouterr().out
    assert "control/coord_rms_s9: nowhere.py a.yaml failed with exit code 2, see " in said
    assert "nowhere.py" in (place / "out/control/coord_rms_s9.txt").read_text()
    assert not reproduce.finished("control", "coord_rms_s9")
