"""Tables and figures of the studies, made from the results that are kept of their runs."""

import math
import statistics

import numpy as np

from harness.errors import need
from harness.files import write_whole
from studies import runs


def kind_of(study):
    """What a study's table and figure are of."""
    run, (program, *_) = next(iter(runs.STUDIES[study].items()))
    if study in runs.SMOOTHNESS:
        return "arms" if study in runs.BESIDE else "smoothness"
    kinds = {"output_norm": "readings", "family": "family", "family_finetune": "family"}
    return kinds.get(study, "errors" if program == "finetune.py" else "losses")


def rows_for(study, results):
    """{arm: {column: its value for each seed}}."""
    kinds = {"losses": losses_rows, "errors": errors_rows, "readings": readings_rows, "family": family_rows}
    return kinds[kind](results) if (kind := kind_of(study)) in kinds else rows_of(results, SMOOTHNESS)


def rows_of(results, columns):
    """The rows of runs <arm>_s<seed>; columns are {name: figure of a result, or None}."""
    rows = {}
    for result in results:
        row = rows.setdefault(result["run"].rpartition("_s")[0], {})
        for name, figure in columns.items():
            value = figure(result)
            row.setdefault(name, []).extend([] if value is None else [value])
    return rows


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
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    if kind_of(study) == "family":
        least = {name: [least_difference([row.get(name, ()) for row in rows.values()])] for name in columns}
        rows["the least difference that can be seen"] = least
    yield f"| arm | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for arm, row in rows.items():
        yield f"| {arm} | {' | '.join(cell(row.get(column, [])) for column in columns)} |"


def least_difference(samples):
    """The smallest difference of two arms that Student's t sees at 5 %, from the arms that have all seeds.

    A seed is a block: first weights, order and noise are the same in each arm. What it adds to all arms is no spread.
    """
    num = max(map(len, samples))
    values = np.array([row for row in samples if len(row) == num])  # (arms, seeds)
    if len(values) < 2 or num < 2:
        return math.nan
    rest = values - values.mean(0) - values.mean(1, keepdims=True) + values.mean()
    df = (len(values) - 1) * (num - 1)
    t = 1.96 + 2.37 / df + 2.82 / df**2 + 2.56 / df**3  # the 97.5 % point, Abramowitz and Stegun 26.7.5
    return t * math.sqrt(2 * np.square(rest).sum() / df / num)


def draw(study, results):
    """results/STUDY/<kind>.png."""
    plt = need("matplotlib.pyplot", "drawing")
    drawn = {"losses": draw_losses, "smoothness": draw_smoothness}.get(kind_of(study), draw_rows)
    drawn(plt, study, results, runs.ROOT / "results" / study)


def draw_rows(plt, study, results, folder):
    """A row an arm, a panel a column, a point a seed."""
    rows, kind = rows_for(study, results), kind_of(study)
    if kind == "errors":  # a panel a task: its error of forces, or its first
        tasks = {error.partition(":")[0]: error for error in sorted(rows, key=lambda error: "forces" in error)}
        starts = dict.fromkeys(start for row in rows.values() for start in row)
        rows = {start: {error: rows[error].get(start, []) for error in tasks.values()} for start in starts}
    shown = ("isomer's g, %", "mean g, %", "LLC", "H, ridge, meV") if kind == "arms" else None
    columns = shown or list(dict.fromkeys(column for row in rows.values() for column in row))
    size = {"figsize": (1.6 + 1.5 * len(columns), 1.2 + 0.28 * len(rows)), "layout": "constrained"}
    figure, axes = plt.subplots(1, len(columns), sharey=True, squeeze=False, **size)
    for axis, column in zip(axes[0], columns, strict=True):
        points = [(value, place) for place, row in enumerate(rows.values()) for value in row.get(column, [])]
        axis.set_title(column.replace("&#8491;", "Å").replace(": ", "\n"), fontsize=7)
        axis.tick_params(labelsize=7)
        axis.grid(axis="y", color="0.9")
        if points:
            x, y = zip(*points, strict=True)
            axis.plot(x, y, "o", color="black", ms=4, fillstyle="none")
            if max(x) > 5 * min(x) > 0:
                axis.set(xscale="log")
                axis.xaxis.set(major_locator=plt.LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
                axis.xaxis.set_minor_formatter(plt.NullFormatter())
    axes[0, 0].set_yticks(range(len(rows)), list(rows))
    axes[0, 0].invert_yaxis()
    save(figure, folder / f"{kind}.png", results)


def save(figure, path, results, dpi=110):
    """Write a figure; below it stand the seeds, steps and commits that it is of."""
    rows = [(f"{r['seed']}", f"{r['steps']:,}", f"{r['commit']}") for r in results]
    seeds, steps, commits = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    commits = commits if len(commits) < 5 else [*commits[:3], f"{len(commits) - 3} more"]
    made_by = f"seed {', '.join(seeds)}; {', '.join(steps)} steps; commit {', '.join(commits)}"
    figure.supxlabel(made_by, fontsize=7, color="0.4")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))


def use_of_g(val):
    """By how much another molecule's g raises the loss that g is for, in percent; None without g."""
    loss = "loss_rec" if "loss_rec" in val else "loss_noise"
    other = val.get(f"{loss}_shuffled")
    return None if other is None else 100 * (other / val[loss] - 1)


LOSSES = {name: lambda val, name=name: val.get(name) for name in ("loss_noise", "loss_rec", "loss_clean")}
LOSSES["use of g, %"] = use_of_g


def losses_rows(results):
    return rows_of(results, {name: lambda run, of=figure: of(run["val"]) for name, figure in LOSSES.items()})


# objective: color, line
STYLES = {"coord": ("tab:orange", "--"), "georecon": ("black", "-"), "rec_only": ("tab:blue", "--")}


def draw_losses(plt, study, results, folder):
    """Validation losses over the steps, a panel each, and whether the decoder uses the graph embedding."""
    figure, axes = plt.subplots(1, len(LOSSES), figsize=(13, 3.4), layout="constrained")
    for axis, (name, figure_of) in zip(axes, LOSSES.items(), strict=True):
        for result in results:
            color, line = STYLES[result["objective"]]
            rounded, first = "precision=bf16" in result["command"], result["seed"] == results[0]["seed"]
            label = result["objective"] + ", bfloat16" * rounded if first else None
            points = [(record["step"], figure_of(record)) for record in result["curve_val"]]
            if points[-1][1] is not None:
                axis.plot(*zip(*points, strict=True), color=color, ls=":" if rounded else line, lw=1.2, label=label)
        axis.set(xlabel="step", yscale="linear" if figure_of is use_of_g else "log", title=name)
    axes[-1].set(ylim=(-0.1, 2))
    axes[0].legend(frameon=False)
    save(figure, folder / "loss.png", results, dpi=120)


def errors_rows(results):
    """{error: {what fine-tuning, <task>_<start>_s<seed>, starts from: test error for each seed}}."""
    rows = {}
    for run in results:
        name = run["run"].rpartition("_s")[0]
        start = max((start for start in runs.ALL_STARTS if name.endswith(f"_{start}")), key=len)
        task = name.removesuffix(f"_{start}")
        for split, errors in run["test"].items():
            for error in (error for error in errors if "rmse" not in error and "per_atom" not in error):
                kind = f"{task}, {split}: {error}, {run['units'].get(error, '')}"
                rows.setdefault(kind, {}).setdefault(start, []).append(errors[error])
    return rows


def at_end(result, kind):
    """What an analysis found of a run's last step."""
    return list(result[kind].values())[-1]


SMOOTHNESS = {
    "loss_noise": lambda result: result["val"]["loss_noise"],
    "loss_rec": lambda result: result["val"].get("loss_rec"),
    "LLC": lambda result: at_end(result, "smoothness")["llc"]["median"],
    "p95": lambda result: at_end(result, "smoothness")["llc"]["p95"],
    "at 0.01 &#8491;": lambda result: at_end(result, "noised_0.01")["llc"]["median"],
    "at 0.04 &#8491;": lambda result: at_end(result, "noised_0.04")["llc"]["median"],
    "LLC/&#124;h&#124;": lambda result: at_end(result, "smoothness")["llc_by_norm"]["median"],
    "standardised": lambda result: at_end(result, "smoothness")["llc_standardised"]["median"],
    "isomer's g, %": lambda result: at_end(result, "graph_embedding").get("rise_isomer"),
    "mean g, %": lambda result: at_end(result, "graph_embedding").get("rise_mean"),
    "R2 torsion": lambda result: at_end(result, "graph_embedding")["r2_torsion"],
    "identity": lambda result: at_end(result, "graph_embedding")["identified"],
    "H, ridge, meV": lambda result: result.get("probe_H", {"test": {}})["test"].get("H_mae_ridge"),
}


def by_arm(results):
    """{arm: [result of each seed]}."""
    arms = {}
    for result in results:
        arms.setdefault(result["run"].rpartition("_s")[0], []).append(result)
    return arms


def draw_smoothness(plt, study, results, folder):
    """Median LLC over the steps, and at the last step over noise; a column for each norms."""
    columns = {}
    for arm, repeats in by_arm(results).items():
        objective, _, norms = arm.rpartition("_")
        column, label = (norms, objective) if norms in runs.NORMS else ("", arm)
        columns.setdefault(column, {})[label] = repeats
    size = {"figsize": (1.2 + 3.2 * len(columns), 6.2), "layout": "constrained"}
    figure, axes = plt.subplots(2, len(columns), sharey=True, squeeze=False, **size)
    colors = ("tab:orange", "black", "tab:blue", "0.6", "tab:green", "tab:red")
    labels = list(dict.fromkeys(label for arms in columns.values() for label in arms))
    kinds = ("smoothness", *(f"noised_{noise}" for noise in runs.NOISES))
    for (norms, arms), (over_steps, over_noise) in zip(columns.items(), axes.T, strict=True):
        for label, repeats in arms.items():
            k = labels.index(label)
            style = {"marker": "osv^D<>ph"[k % 9], "color": colors[k % 6], "lw": 1.2, "ms": 4}
            for run in repeats:
                style["label"] = label if run is repeats[0] else None
                style["fillstyle"] = ("full", "none")[run["seed"] > 1]
                found = [step["llc"] for step in run["smoothness"].values()]
                over_steps.plot([one["median"] for one in found], **style)
                over_noise.plot([at_end(run, kind)["llc"]["median"] for kind in kinds], **style)
                thin = style | {"ls": ":", "lw": 0.8, "ms": 2.5, "label": None}
                over_steps.plot([one["p95"] for one in found], **thin)
        steps = [name.rpartition("_")[2] for name in run["smoothness"]]
        over_steps.set_xticks(range(len(steps)), steps)
        over_noise.set_xticks(range(len(kinds)), ["0", *map(str, runs.NOISES)])
        over_steps.set(yscale="log", xlabel="step", title=f"{norms} (dotted: p95)".strip())
        over_noise.set(yscale="log", xlabel="noise on the geometry, Å (last step)")
    beside = {"loc": "upper left", "bbox_to_anchor": (1, 1), "title": "filled: seed 1"}
    axes[0, -1].legend(frameon=False, fontsize=8, **beside)
    for axis in axes[:, 0]:
        axis.set_ylabel("median LLC, 1/angstrom")
    save(figure, folder / "smoothness.png", results)


def medians(result, reading, noise=0):
    """Median LLC of a reading of the encoder's output: of the first and of the last weights."""
    return [one["llc"]["median"] for one in result[f"{reading}_{noise}"].values()]


def readings_rows(results):
    """{arm: {reading of the encoder's output: LLC for each seed}}, untrained networks among the arms."""

    def columns(when):
        at = [(of, noise) for of in runs.READINGS for noise in (0, runs.NOISES[-1])]
        names = (f"{of} at {noise} &#8491;" if noise else of for of, noise in at)
        return {name: lambda run, at=where: medians(run, *at)[when] for name, where in zip(names, at, strict=True)}

    untrained = rows_of([run for run in results if run["objective"] == "coord"], columns(0))
    untrained = {arm.replace("coord", "untrained"): row for arm, row in untrained.items()}
    return untrained | rows_of(results, columns(-1))


FAMILY = {  # of a pretraining run
    "loss_noise": lambda run: run["val"]["loss_noise"],
    "use of g, %": lambda run: use_of_g(run["val"]),
    "LLC": lambda run: medians(run, "graph")[-1],
    "LLC at 0.04 &#8491;": lambda run: medians(run, "graph", 0.04)[-1],
}
FINETUNED = tuple(f"readout-{y}, test: {y}_mae_ridge" for y in ("H", "U0", "gap"))
FINETUNED += ("gap, test: gap_mae,", "aspirin, test: forces_mae")


def family_rows(results):
    """As rows_of: of pretraining runs, and of what was fine-tuned from them."""
    finetuned = [run for run in results if run["study"] == "family_finetune"]
    rows = rows_of([run for run in results if run["study"] != "family_finetune"], FAMILY)
    rows = {arm.removesuffix("_rms"): row for arm, row in rows.items()}
    for kind, starts in errors_rows(finetuned).items():
        if kind.startswith(FINETUNED):
            for arm, values in starts.items():
                rows.setdefault(arm, {})[kind.replace(", test", "")] = values
    return rows
