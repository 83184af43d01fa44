"""Pictures of runs, finished or going on: losses, rate, gradient, speed and errors, side by side.

    python -m tools.curves out/demo out/coord [out=out/curves.png] [--tensorboard]

A panel is a figure of log.jsonl, a line is a run: thin in training, with circles in validation.
out= may end in .svg; an older picture is replaced. --tensorboard adds a folder of event files.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from harness.errors import InputError, cli, explain, need
from harness.files import check_file, write_whole
from harness.settings import read_arguments

STYLES = [(color, dash) for dash in ("-", "--", ":", "-.") for color in ("black", "0.4", "0.7")]
COLUMNS = 4  # panels in a row


@dataclass(frozen=True)
class CurvesConfig:
    out: str = "out/curves.png"


def read_log(folder):
    """log.jsonl of a run -> {figure: {split: [(step, value)]}}; skips a half last line."""
    path, figures = Path(folder) / "log.jsonl", {}
    check_file(path, "name folders of runs, such as out/demo")
    for number, line in enumerate(path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines(), 1):
        with explain(f"{path}: line {number} is damaged, remove it"):
            record = json.loads(line)
            step, split = record.pop("step"), record.pop("split")
            for name, value in record.items():
                points = figures.setdefault(name, {"train": [], "val": []})[split]
                points.append((int(step), float("nan" if value is None else value)))
    if not figures:
        raise InputError(f"{path}: nothing is logged yet")
    return figures


def units_of(folders):
    """{error: ", unit", as metrics.json says it of the finished runs among folders}."""
    units = {}
    for path in (Path(folder) / "metrics.json" for folder in folders):
        with explain(f"{path} is damaged"):
            found = json.loads(path.read_text(encoding="utf-8"))["units"] if path.exists() else {}
            for name, unit in found.items():
                units.setdefault(name, {})[unit] = True
    return {name: f", {' or '.join(found)}" for name, found in units.items() if "loss" not in name}


def draw(logs, out):
    """{folder of a run: its figures} -> a picture."""
    plt = need("matplotlib.pyplot", "drawing")
    plt.rcParams["text.parse_math"] = False  # a $ in a name
    panels = list(dict.fromkeys(name for figures in logs.values() for name in figures))
    rows = -(-len(panels) // COLUMNS)
    size = {"figsize": (3 * COLUMNS, 2.3 * rows + 0.6), "layout": "constrained"}
    picture, axes = plt.subplots(rows, COLUMNS, squeeze=False, **size)
    styles, units = STYLES[: len(logs)], units_of(logs)
    for axis, name in zip(axes.flat, panels, strict=False):
        axis.set_title(f"{name}{units.get(name, '')} over steps", fontsize=8)
        axis.tick_params(labelsize=7)
        for figures, (color, dashes) in zip(logs.values(), styles, strict=True):
            for split, points in figures.get(name, {}).items():
                marker = {"marker": "o", "ms": 3} if split == "val" else {"lw": 0.9}
                axis.plot([step for step, _ in points], [y for _, y in points], ls=dashes, color=color, **marker)
        drawn = [y for line in axis.lines for y in line.get_ydata() if y == y] or [0]
        if name not in ("lr", "molecules_per_s") and max(drawn) > 10 * min(drawn) > 0:
            axis.set(yscale="log")
            axis.yaxis.set(major_locator=plt.LogLocator(subs=(1, 2, 3, 5)), major_formatter="{x:g}")
            axis.yaxis.set_minor_formatter(plt.NullFormatter())
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    lines = [plt.Line2D([], [], color=color, ls=dashes) for color, dashes in styles]
    place = {"loc": "outside lower center", "title": "thin: training, circles: validation"}
    picture.legend(lines, logs, ncols=4, frameon=False, fontsize=8, **place)
    write_whole(out, lambda path: picture.savefig(path, dpi=120, format=out.suffix[1:]))
    plt.close(picture)


def write_events(events, logs, folder):
    """Event files for `tensorboard --logdir folder`, a folder a run."""
    for run, figures in logs.items():
        with events.SummaryWriter(f"{folder}{Path(run).resolve()}", purge_step=0) as writer:
            for name, split in ((n, s) for n in figures for s in figures[n]):
                for step, value in figures[name][split]:
                    writer.add_scalar(f"{name}/{split}", value, step)
    print(f"wrote {folder}: tensorboard --logdir '{folder}'")


def main(arguments):
    words = [word for word in arguments if word != "--tensorboard"]
    folders, config = read_arguments(CurvesConfig, words)
    out = Path(config.out)
    sound = 0 < len(folders) <= len(STYLES) and out.suffix in (".png", ".svg")
    if not sound or any(word.startswith("-") for word in words):
        raise InputError("usage: python -m tools.curves out/a [out/b ... up to 12] [out=NAME.png or .svg]", code=2)
    logs = {str(Path(folder)): read_log(folder) for folder in folders}
    events = need("torch.utils.tensorboard", "--tensorboard") if len(words) < len(arguments) else None
    out.parent.mkdir(parents=True, exist_ok=True)
    draw(logs, out)
    print(f"wrote {out}: {', '.join(logs)}")
    if events:
        write_events(events, logs, out.with_suffix(""))


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
