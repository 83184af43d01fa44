"""tools/curves.py: what is drawn is what is logged, while a run goes on, too."""

import json
import shutil

import pytest

from harness.errors import InputError
from tools import curves

plt = pytest.importorskip("matplotlib.pyplot")


def lines_of(axis):
    return [list(zip(*line.get_data(), strict=True)) for line in axis.lines]


def test_panels_hold_what_is_logged(runs, tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)  # to look at it
    out = tmp_path / "new/curves.png"
    curves.main([str(runs / "georecon"), str(runs / "coord"), f"out={out}"])
    assert out.read_bytes().startswith(b"\x89PNG") and f"{runs}/georecon, {runs}/coord" in capsys.readouterr().out
    (figure,) = drawn
    titles = [axis.get_title().removesuffix(" over steps") for axis in figure.axes]
    panels = dict(zip(titles, figure.axes, strict=True))
    logs = {
        run: [json.loads(line) for line in (runs / run / "log.jsonl").read_text().splitlines()]
        for run in ("georecon", "coord")
    }
    assert panels.keys() == {name for log in logs.values() for record in log for name in record} - {"step", "split"}
    for name, axis in panels.items():
        expected = [
            [(record["step"], record[name]) for record in log if record["split"] == split and name in record]
            for log in logs.values()
            for split in ("train", "val")
        ]
        assert sorted(filter(None, lines_of(axis))) == sorted(filter(None, expected)), name
    styles = {(line.get_color(), line.get_linestyle()) for line in panels["loss"].lines}
    assert len(styles) == 2  # told apart without colour
    plt.rcdefaults()


def test_an_error_has_its_unit(runs, tmp_path, monkeypatch):
    """That of the finished runs; they may differ."""
    shutil.copytree(runs / "gap", tmp_path / "going_on")
    (tmp_path / "going_on/metrics.json").unlink()
    assert curves.units_of([runs / "gap", tmp_path / "going_on"])["gap_mae"] == ", meV"
    shutil.copytree(runs / "gap", tmp_path / "volt")
    metrics = (runs / "gap/metrics.json").read_text()
    (tmp_path / "volt/metrics.json").write_text(metrics.replace('"meV"', '"eV"'))
    assert curves.units_of([runs / "gap", tmp_path / "volt"])["gap_mae"] == ", meV or eV"
    drawn = []
    monkeypatch.setattr(plt, "close", drawn.append)
    curves.main([str(runs / "gap"), f"out={tmp_path}/a.png"])
    assert "gap_mae, meV over steps" in [axis.get_title() for axis in drawn[0].axes]


def test_a_picture_is_replaced_and_may_be_svg(runs, tmp_path):
    out = tmp_path / "curves.svg"
    for _ in range(2):
        curves.main([str(runs / "gap"), f"out={out}"])
    assert out.read_text().startswith("<?xml") and [path.name for path in tmp_path.iterdir()] == ["curves.svg"]


def test_a_run_that_goes_on(runs, tmp_path):
    """Its last line may be half written; a line in the middle may not."""
    shutil.copytree(runs / "coord", tmp_path / "coord")
    log = tmp_path / "coord/log.jsonl"
    whole = curves.read_log(tmp_path / "coord")
    log.write_text(log.read_text() + '{"step": 4, "spl')
    assert curves.read_log(tmp_path / "coord") == whole
    log.write_text(log.read_text() + "\n")
    with pytest.raises(InputError, match="log.jsonl: line 4 is damaged"):
        curves.main([str(tmp_path / "coord"), f"out={tmp_path}/a.png"])
    log.write_text("")
    with pytest.raises(InputError, match="nothing is logged yet"):
        curves.main([str(tmp_path / "coord"), f"out={tmp_path}/a.png"])
    assert not (tmp_path / "a.png").exists()


def test_a_name_may_hold_anything(runs, tmp_path):
    shutil.copytree(runs / "coord", tmp_path / r"a $\foo$")
    curves.main([str(tmp_path / r"a $\foo$"), f"out={tmp_path}/a.svg"])
    assert r"$\foo$" in (tmp_path / "a.svg").read_text()


@pytest.mark.parametrize(
    "arguments, said, code",
    [
        (["nowhere"], "nowhere/log.jsonl", 1),
        (["out=a.png"], "usage", 2),
        (["nowhere", "--tensorbord"], "usage", 2),
        (["nowhere", "out=a.gif"], "usage", 2),
        ([f"run{k}" for k in range(13)], "up to 12", 2),  # one could not tell their lines apart
        (["nowhere", "colour=red"], "unknown key colour", 2),
    ],
)
def test_what_it_cannot_draw_is_one_line(arguments, said, code):
    with pytest.raises(InputError, match=said) as caught:
        curves.main(arguments)
    assert caught.value.code == code and "\n" not in str(caught.value)


def test_tensorboard_reads_what_is_logged(runs, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for _ in range(2):  # a later call shows each step once, too
        curves.main([str(runs / "coord"), "--tensorboard", f"out={tmp_path}/a.png"])
    file, _ = (tmp_path / "a").rglob("events*")
    events = reader.EventAccumulator(str(file.parent))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss/val")]
    assert found == [(step, pytest.approx(y)) for step, y in curves.read_log(runs / "coord")["loss"]["val"]]
