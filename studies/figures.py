"""Tables and figures of the studies, made from the results that are kept of their runs."""

import math
import statistics

from harness.errors import need
from harness.files import write_whole
from studies import runs


def kind_of(study):
    """What a study's table and figure are of."""
    run, (program, *_) = next(iter(runs.STUDIES[study].items()))
    if study == "output_norm":
        return "readings"
    return "smoothness" if runs.analyses(study, run) else "errors" if program == "finetune.py" else "losses"


def table(study, results):
    """Lines of markdown: an arm of a study of smoothness, a test error of fine-tuning, or a run."""
    kinds = {"smoothness": smoothness_table, "errors": errors_table, "losses": losses_table}
    kinds["readings"] = readings_table
    return kinds[kind_of(study)](results)


def draw(study, results):
    """results/STUDY/<kind>.png."""
    plt = need("matplotlib.pyplot", "drawing")
    kinds = {"smoothness": draw_arms if study in runs.BESIDE else draw_smoothness}
    kinds |= {"errors": draw_errors, "losses": draw_losses, "readings": draw_readings}
    kinds[kind_of(study)](plt, results, runs.ROOT / "results" / study)


def save(figure, path, results, dpi=110):
    """Write a figure; below it stand the seeds, steps and commits that it is of."""
    rows = [(f"{r['seed']}", f"{r['steps']:,}", f"{r['commit']}") for r in results]
    seeds, steps, commits = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    commits = commits if len(commits) < 5 else [*commits[:3], f"{len(commits) - 3} more"]
    made_by = f"seed {', '.join(seeds)}; {', '.join(steps)} steps; commit {', '.join(commits)}"
    figure.supxlabel(made_by, fontsize=7, color="0.4")
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))


def losses_table(results):
    names = ("loss_noise", "loss_rec", "loss_rec_shuffled", "loss_clean")
    for result in results:
        val = result["val"]
        losses = " | ".join(f"{val[name]:.4f}" if name in val else "" for name in names)
        run = f"{result['study']} | {result['objective']} | {result['seed']}"
        yield f"| {run} | {result['steps']:,} | {losses} | {result['device']} |"


DOTS = (0, (1, 1))
# what fine-tuning starts from: color, line
STARTS = {"scratch": ("0.6", ":"), "coord": ("tab:orange", "--"), "georecon": ("black", "-")}
STARTS |= {"alpha3": ("tab:blue", "-."), "alpha3_no_g": ("tab:blue", DOTS), "coord_noise3": ("tab:orange", DOTS)}
STARTS |= {"no_g": ("0.4", DOTS), "rec_only": ("tab:blue", "--")}


def draw_losses(plt, results, folder):
    """Validation losses over the steps, a panel each, and whether the decoder uses the graph embedding."""
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.4), layout="constrained")
    for axis, name in zip(axes, ("loss_noise", "loss_rec", "loss_clean", "rise"), strict=True):
        for result in results:
            records, rounded = result["curve_val"], "precision=bf16" in result["command"]
            color, line = STARTS[result["objective"]]
            style = {"color": color, "ls": DOTS if rounded else line, "lw": 1.2}
            if result["seed"] == results[0]["seed"]:
                style["label"] = result["objective"] + ", bfloat16" * rounded
            if name in records[0]:
                axis.plot([r["step"] for r in records], [r[name] for r in records], **style)
            elif name == "rise" and "loss_rec_shuffled" in records[0]:
                rise = [100 * (r["loss_rec_shuffled"] / r["loss_rec"] - 1) for r in records]
                axis.plot([r["step"] for r in records], rise, **style)
        axis.set(xlabel="step", yscale="linear" if name == "rise" else "log", title=name)
    axes[3].set(ylim=(-0.1, 2), title="rise of loss_rec, %, with a wrong g")
    axes[0].legend(frameon=False)
    save(figure, folder / "loss.png", results, dpi=120)


def by_task(results):
    """Fine-tuning runs <task>_<start>_s<seed> as {task: {start: [result of each seed]}}."""
    tasks = {}
    for name, repeats in by_arm(results).items():
        start = next(start for start in STARTS if name.endswith(f"_{start}"))
        tasks.setdefault(name.removesuffix(f"_{start}"), {})[start] = repeats
    return tasks


def errors_table(results):
    tasks = by_task(results)
    known = [start for start in STARTS if any(start in starts for starts in tasks.values())]
    for task, starts in tasks.items():
        first = next(iter(starts.values()))[0]
        for split, errors in first["test"].items():
            for name in (name for name in errors if "rmse" not in name and "per_atom" not in name):
                found = [[r["test"][split][name] for r in starts.get(start, ())] for start in known]
                cells = [" / ".join(f"{value:.4g}" for value in values) for values in found]
                row = f"{task} | {split} | {name} | {first['units'].get(name, '')}"
                yield f"| {row} | {first['steps']:,} | {' | '.join(cells)} |"


def draw_errors(plt, results, folder):
    """Validation errors over the steps, a panel a task, a line a start."""
    tasks = by_task(results)
    rows = 1 if len(tasks) < 4 else 2
    columns = -(-len(tasks) // rows)
    size = {"figsize": (3 * columns, 2.8 * rows), "layout": "constrained", "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **size)
    for axis, (task, starts) in zip(axes.flat, tasks.items(), strict=False):
        for start, repeats in starts.items():
            color, line = STARTS[start]
            for k, run in enumerate(repeats):
                name = "forces_mae" if "forces_mae" in run["val"] else next(iter(run["val"]))
                records = [record for record in run["curve_val"] if record["step"]]
                x, y = ([record[key] for record in records] for key in ("step", name))
                axis.plot(x, y, ls=line, color=color, lw=1.2, label=None if k else start)
            if f"{name}_ridge" in run["val"]:
                axis.axhline(run["val"][f"{name}_ridge"], color=color, ls=line, lw=0.5)
        unit = run["units"].get(name, "")
        axis.set(xlabel="step", yscale="log", title=f"{task}: {name}\n{unit}, validation")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    found = (axis.get_legend_handles_labels() for axis in axes.flat[: len(tasks)])
    lines = {label: line for pair in found for line, label in zip(*pair, strict=True)}
    axes[0, 0].legend(lines.values(), lines.keys(), frameon=False)
    save(figure, folder / "errors.png", results)


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


def smoothness_table(results):
    yield f"| arm | {' | '.join(SMOOTHNESS)} |"
    yield "|---" * (1 + len(SMOOTHNESS)) + "|"
    for arm, repeats in by_arm(results).items():
        columns = [[figure(run) for run in repeats] for figure in SMOOTHNESS.values()]
        known = [[f"{value:.3g}" for value in column if value is not None] for column in columns]
        yield f"| {arm} | {' | '.join(map(' / '.join, known))} |"


def draw_smoothness(plt, results, folder):
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


def spread(values):
    """mean ± standard deviation over the seeds."""
    form = ",.0f" if statistics.mean(values) >= 100 else ".2g"
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def readings_table(results):
    heads = [f"{of}{what}" for of in runs.READINGS for what in (", untrained", "", ", at 0.04 &#8491;")]
    yield f"| arm | seeds | {' | '.join(heads)} |"
    yield "|---" * (2 + len(heads)) + "|"
    for arm, repeats in by_arm(results).items():
        cells = []
        for of in runs.READINGS:
            untrained, trained = zip(*(medians(run, of) for run in repeats), strict=True)
            noised = [medians(run, of, runs.NOISES[-1])[-1] for run in repeats]
            cells += map(spread, (untrained, trained, noised))
        yield f"| {arm} | {len(repeats)} | {' | '.join(cells)} |"


def draw_readings(plt, results, folder):
    """Median LLC by norms, a panel a reading, a point a seed; crosses: untrained."""
    figure, axes = plt.subplots(1, 3, sharey=True, figsize=(9, 3.4), layout="constrained")
    arms = by_arm(results)
    norms = list(dict.fromkeys(arm.rpartition("_")[2] for arm in arms))
    for axis, of in zip(axes, runs.READINGS, strict=True):
        for arm, repeats in arms.items():
            objective, _, norm = arm.rpartition("_")
            color, place = STARTS[objective][0], norms.index(norm) + (0.15 if objective == "georecon" else -0.15)
            untrained, trained = zip(*(medians(run, of) for run in repeats), strict=True)
            label = objective if norm == norms[0] else None
            axis.plot([place] * len(trained), trained, "o", color=color, ms=5, fillstyle="none", label=label)
            axis.plot([place] * len(untrained), untrained, "x", color="0.6", ms=4)
        axis.set_xticks(range(len(norms)), norms)
        axis.set(yscale="log", title={"graph": "mean of x", "atoms": "x of all atoms", "all": "x and vec"}[of])
        axis.grid(axis="y", color="0.9")
    axes[0].set_ylabel("median LLC, 1/angstrom")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, folder / "readings.png", results)


def draw_arms(plt, results, folder):
    """A row an arm, a point a seed: what a wrong g costs the decoder, the LLC, the readout of H."""
    arms = by_arm(results)
    size = {"figsize": (9.5, 1.2 + 0.28 * len(arms)), "layout": "constrained"}
    figure, (use, smooth, readout) = plt.subplots(1, 3, sharey=True, **size)
    points = [("isomer's g, %", use, "o", "black"), ("mean g, %", use, "x", "tab:red")]
    points += [("LLC", smooth, "o", "black"), ("H, ridge, meV", readout, "o", "black")]
    for name, axis, marker, color in points:
        y = [place for place, repeats in enumerate(arms.values()) for _ in repeats]
        x = [SMOOTHNESS[name](run) for repeats in arms.values() for run in repeats]
        x = [math.nan if value is None else value for value in x]  # not every arm has each figure
        axis.plot(x, y, marker, color=color, ms=5, fillstyle="none")
        axis.grid(axis="y", color="0.9")
    use.set(xscale="log", xlabel="rise of the rec loss, %, with another g")
    use.legend(["an isomer's", "the mean"], frameon=False, fontsize=8)
    smooth.set(xscale="log", xlabel="median LLC, 1/angstrom")
    for axis, ticks in ((use, [0.5, 1, 2, 5, 10]), (smooth, [3, 5, 10, 20, 40])):
        axis.set_xticks(ticks, list(map(str, ticks)))
        axis.set_xticks([], minor=True)
    readout.set(xlabel="linear readout of H, error in meV")
    use.set_yticks(range(len(arms)), list(arms))
    use.invert_yaxis()
    save(figure, folder / "arms.png", results)
