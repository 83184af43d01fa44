"""Tables and figures of the studies, made from the results that are kept of their runs."""

import math
import re
import statistics

import numpy as np

from harness.errors import need
from harness.files import write_whole
from studies import runs

KINDS = dict.fromkeys(runs.STUDIES, "family") | {  # what a study's table and figure are of
    **{"control": "smoothness", "control_long": "smoothness", "alpha": "arms", "graph_embedding": "arms"},
    **{"qm9_wide": "wide", "precision": "losses", "family_long": "use"},
    **{"output_norm": "readings", "speedrun": "speedrun", "figure3": "readouts"},
}


def rows_for(study, results):
    """{arm: {column: its value for each seed}}."""
    kinds = {"readings": readings_rows, "family": family_rows, "readouts": readouts_rows}
    kinds["wide"] = lambda results: readings_rows(results, LOSSES)
    if (kind := KINDS[study]) in kinds:
        return kinds[kind](results)
    return rows_of(results, {"losses": LOSSES, "use": USE, "speedrun": SPEEDRUN}.get(kind, SMOOTHNESS))


def rows_of(results, columns):
    """The rows of runs <arm>_s<seed>; columns are {name: figure of a result, or None}."""
    rows = {}
    for result in results:
        row = rows.setdefault(result["run"].rpartition("_s")[0], {})
        for name, figure in columns.items():
            value = figure(result)
            row.setdefault(name, []).extend([] if value is None else [value])
    return rows


def columns_of(rows):
    """The columns of all rows that have a value somewhere, in order."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    return [column for column in columns if any(row.get(column) for row in rows.values())]


def cell(values):
    """Each seed's value; of three or more the mean ± the standard deviation."""
    if len(values) < 3:
        return " / ".join(f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
    mean = statistics.mean(values)
    form = ",.0f" if mean >= 100 else ".1f" if mean >= 10 else ".2f" if mean >= 1 else ".4f"
    return f"{mean:{form}} ± {statistics.stdev(values):{form}}"


def table(study, results):
    """Lines of markdown, an arm a line."""
    rows = rows_for(study, results)
    columns = columns_of(rows)
    yield f"| arm | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for arm, row in rows.items():
        yield f"| {arm} | {' | '.join(cell(row.get(column, [])) for column in columns)} |"
    # two fits of one encoder are not two arms; nor are untrained networks arms of readings
    for fit in {"readouts": FITS, "family": [""], "readings": [""]}.get(KINDS[study], ()):
        arms = [a for a in rows if a.endswith(fit) and (KINDS[study] != "readings" or "untrained" not in a)]
        least = [least_cell(name, [rows[arm].get(name, ()) for arm in arms]) for name in columns]
        if any(least):
            yield f"| the least difference that can be seen{fit} | {' | '.join(least)} |"


def least_cell(column, samples):
    """The smallest difference that can be seen; of a stretch the smallest factor, since its spread grows with it."""
    log = column.startswith(("LLC", "Fig. 2"))
    least = least_difference([[math.log(value) for value in row] for row in samples] if log else samples)
    shown = f"× {math.exp(least):.2f}" if log else cell([least])
    return shown if math.isfinite(least) else ""


def least_difference(samples):
    """The smallest difference of two arms that Student's t sees at 5 %, from the arms that have all seeds.

    A seed is a block: first weights, order and noise are the same in each arm. What it adds to all arms is no spread.
    """
    num = max(map(len, samples), default=0)
    values = np.array([row for row in samples if len(row) == num])  # (arms, seeds)
    if len(values) < 2 or num < 2:
        return math.nan
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    df = (len(values) - 1) * (num - 1)
    # the 97.5 % point, Abramowitz and Stegun 26.7.5
    t = 1.96 + 2.37 / df + 2.82 / df**2 + 2.56 / df**3 + 1.59 / df**4
    return t * math.sqrt(2 * np.square(rest).sum() / df / num)


def rows_drawn(study, results):
    """What is drawn: {arm: {column: its value for each seed}}, and the columns."""
    rows, kind = rows_for(study, results), KINDS[study]
    if kind == "smoothness":
        kept = [(k, name.rpartition("_")[2]) for k, name in enumerate(results[0]["smoothness"])]
        columns = {f"LLC, step {step}": llc("smoothness", k) for k, step in kept}
        columns |= {f"LLC, all, step {step}": llc("all_0", k) for k, step in kept}
        rows = rows_of(results, columns | {n: SMOOTHNESS[n] for n in SMOOTHNESS if n.startswith("at ")})
    shown = ("isomer's g, %", "mean g, %", "LLC", "H, ridge, meV") if kind == "arms" else None
    return rows, shown or columns_of(rows)


def draw(study, results):
    """results/STUDY/<kind>.png: a row an arm, a panel a column, a point a seed."""
    plt, (rows, columns) = need("matplotlib.pyplot", "drawing"), rows_drawn(study, results)
    size = {"figsize": (1.6 + 1.5 * len(columns), 1.1 + 0.28 * len(rows)), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(columns), sharey=True, squeeze=False, **size)
    for axis, column in zip(axes[0], columns, strict=True):
        points = [(value, place) for place, row in enumerate(rows.values()) for value in row.get(column, [])]
        axis.set_title(column.replace("&#8491;", "Å").replace(": ", "\n"), fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", color="0.9")
        axis.locator_params(axis="x", nbins=4)
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o", color="black", ms=4, fillstyle="none")
            if max(x) > 5 * min(x) > 0:
                axis.set(xscale="log")
                ticks = plt.LogLocator(subs=(1, 2, 5) if max(x) < 50 * min(x) else (1,))
                axis.xaxis.set(major_locator=ticks, major_formatter="{x:g}")
                axis.xaxis.set_minor_formatter(plt.NullFormatter())
    axes[0, 0].set_yticks(range(len(rows)), list(rows))
    axes[0, 0].invert_yaxis()
    made = [(f"{r['seed']}", f"{r['steps']:,}", f"{r['commit']}") for r in results]
    seeds, steps, commits = (list(dict.fromkeys(column)) for column in zip(*made, strict=True))
    commits = commits if len(commits) < 5 else [*commits[:3], f"{len(commits) - 3} more"]
    made_by = f"seed {', '.join(seeds)}; {', '.join(steps)} steps; commit {', '.join(commits)}"
    figure.supxlabel(made_by, fontsize=7, color="0.4")
    path = runs.ROOT / "results" / study / f"{KINDS[study]}.png"
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format="png"))


def use_of_g(val, instead="shuffled"):
    """By how much another molecule's g, or the token, raises the loss of g, in %; or None."""
    loss = "loss_rec" if "loss_rec" in val else "loss_noise"
    other = val.get(f"{loss}_{instead}")
    return None if other is None else 100 * (other / val[loss] - 1)


LOSSES = ("loss_noise", "loss_token", "loss_coord", "loss_dist", "loss_rec", "loss_clean")
LOSSES = {name: lambda run, name=name: run["val"].get(name) for name in LOSSES}
LOSSES["use of g, %"] = lambda run: use_of_g(run["val"])
USE = {  # of g, in %, over the steps
    f"step {n:,}": lambda run, n=n: use_of_g(next(v for v in run["curve_val"] if v["step"] == n))
    for n in (1000, 3000, 8000, 20000)
}


def at_end(result, kind, when=-1):
    """What an analysis found of a run's last weights, or its first (when=0); nothing, if it was not asked."""
    return list(result.get(kind, {"": {}}).values())[when]


def llc(kind, when=-1):
    """The figure of a result that is its median LLC by this analysis; None, if it was not asked."""
    return lambda result: at_end(result, kind, when)["llc"]["median"] if kind in result else None


SMOOTHNESS = {
    "loss_noise": lambda result: result["val"]["loss_noise"],
    "loss_rec": lambda result: result["val"].get("loss_rec"),
    "LLC": llc("smoothness"),
    **{f"LLC, {of}": llc(f"{of}_0") for of in runs.READINGS},
    "p95": lambda result: at_end(result, "smoothness")["llc"]["p95"],
    **{f"at {noise} &#8491;": llc(f"noised_{noise}") for noise in runs.NOISES},
    "LLC/&#124;h&#124;": lambda result: at_end(result, "smoothness")["llc_by_norm"]["median"],
    "standardised": lambda result: at_end(result, "smoothness")["llc_standardised"]["median"],
    "isomer's g, %": lambda result: at_end(result, "graph_embedding").get("rise_isomer"),
    "mean g, %": lambda result: at_end(result, "graph_embedding").get("rise_mean"),
    "H, ridge, meV": lambda result: result.get("probe_H", {"test": {}})["test"].get("H_mae_ridge"),
}


def readings_rows(results, more=()):
    """{arm: {reading of the output: its stretch for each seed}}, untrained, too; more: of trained ones."""

    def columns(when):
        at = [(of, noise) for of in runs.READINGS for noise in (0, runs.NOISES[-1])]
        llcs = {f"LLC, {of}{f' at {n} &#8491;' * bool(n)}": llc(f"{of}_{n}", when) for of, n in at}
        return llcs | {"Fig. 2, graph": lambda run: at_end(run, "graph_0", when)["sensitivity"][-1]}

    untrained = rows_of([run for run in results if run["objective"] == "coord"], columns(0))
    untrained = {arm.replace("coord", "untrained"): row for arm, row in untrained.items()}
    return untrained | rows_of(results, columns(-1) | dict(more))


FITS = {", descent": "_mae", ", closed form": "_mae_ridge"}  # of a linear layer
# of a fine-tuning run its first error that ends so; of 3BPA both
FINETUNED = ("forces_mae", "mae_ridge", "targets_mae", "expt_rmse", "exp_rmse", "_mae")
SHOWN = dict.fromkeys(("3bpa", "3bpa-clipped"), ("energy_mae", "forces_mae"))


def errors_shown(errors, task=""):
    """The names of the errors that a table shows."""
    return SHOWN.get(task) or [next(error for end in FINETUNED for error in errors if error.endswith(end))]


SPEEDRUN = {
    "error": lambda run: run["test"]["test"][errors_shown(run["test"]["test"])[0]],
    "minutes": lambda run: run["wall_s"] / 60,
    "molecules seen": lambda run: run["steps"] * int(re.search(r" batch_size=(\d+)", run["command"])[1]),
}
FAMILY = {  # of a pretraining run
    **{name: LOSSES[name] for name in ("loss_noise", "loss_token", "loss_coord", "loss_dist", "use of g, %")},
    "the same, mask token, %": lambda run: use_of_g(run["val"], "masked"),
    "LLC": llc("graph_0"),
    "LLC at 0.04 &#8491;": llc("graph_0.04"),
}


def family_rows(results):
    """As rows_of: of pretraining runs, and of what was fine-tuned from them, <task>_<arm>_s<n>."""
    rows = rows_of([run for run in results if "objective" in run], FAMILY)
    rows = {arm.removesuffix("_rms"): row for arm, row in rows.items()}
    for run in (run for run in results if "objective" not in run):
        task, arm = run["run"].rpartition("_s")[0].split("_", 1)
        for name, errors in run["test"].items():
            for error in errors_shown(errors, task):
                column = f"{task}{f', {name}' if name != 'test' else ''}: {error}, {run['units'].get(error, '')}"
                rows.setdefault(arm, {}).setdefault(column, []).append(errors[error])
                if (constant := f"{error}_constant") in errors:
                    rows.setdefault("a constant", {})[column] = [errors[constant]]
    return rows


def readouts_rows(results):
    """{start, and how the linear layer was fitted: {target: its error for each seed}}."""
    found = {}
    for how, end in FITS.items():
        errors = {y: lambda run, key=y + end: run["test"]["test"][key] for y in runs.TARGETS.split(",")}
        found |= {f"{arm[4:]}{how}": row for arm, row in rows_of(results, errors).items()}  # all_<start>
    return found
