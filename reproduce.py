"""The studies behind the README's figures: which runs they are, how they are run, what is kept of them.

    python reproduce.py                      the studies and what of each is done
    python reproduce.py STUDY [jobs=N]       run what is missing, N runs at a time, then write results/STUDY/
    python reproduce.py STUDY draw           draw its figure and print its table again from results/STUDY/*.json

A run lives in out/STUDY/<run>; a stopped one goes on where it stopped. Of a finished one results/STUDY/<run>.json keeps
the command, the seed, the commit, the machine, the final figures and the curves: delete that file, and out/STUDY/<run>,
to run it again.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from data import InputError, cli
from pretrain import fitting, write_atomically, write_text

ROOT = Path(__file__).parent


def seeds(numbers, runs):
    """{name: arguments} -> {name_s<seed>: arguments with the seed}."""
    return {f"{name}_s{seed}": [*arguments, f"seed={seed}"] for name, arguments in runs.items() for seed in numbers}


WIDE = ["pretrain.py", "configs/pcqm.yaml", "data=data/qm9.h5", "val_size=1000", "max_steps=3000", "log_every=50"]
WIDE += ["lr_warmup_steps=300", "lr_cosine_length=3000", "val_every=250", "num_workers=2"]

# fine-tuning of the 64-channel encoders in results/encoders, which never saw QM9's molecules of the splits val and test
SMALL = ["num_workers=0", "log_every=50", "lr=1e-3", "lr_schedule=cosine", "inference_batch_size=100", "lr_min=1e-6"]
SMALL += ["model.embedding_dimension=64", "model.num_layers=4", "model.num_rbf=32", "model.x_norm_layer=true"]
SMALL += ["model.vec_norm_layer=rms", "model.vec_norm_out=rms"]


def finetune(config, steps, *more):
    length = [f"max_steps={steps}", f"lr_cosine_length={steps}", f"lr_warmup_steps={steps // 15}"]
    return ["finetune.py", f"configs/{config}.yaml", *SMALL, *length, f"val_every={steps // 5}", *more]


def arms(name, run):
    """A run from each of the two encoders and from scratch, all else equal."""
    return {f"{name}_scratch": run} | {
        f"{name}_{objective}": [*run, f"init_from=results/encoders/{objective}_s1.pt"]
        for objective in ("georecon", "coord")
    }


ASPIRIN = arms("aspirin", finetune("md17_aspirin", 1500, "batch_size=8", "test_size=2000"))
QM9_UNSEEN = ["batch_size=32", "train_split=val", "val_split=train", "val_size=1000"]  # 10,000 labels
QM9_SEEN = ["batch_size=32", "val_split=train", "train_size=10000", "val_size=1000"]
GAP = arms("gap", finetune("qm9_gap", 1000, *QM9_UNSEEN))
GAP_SEEN = arms("gap_seen", finetune("qm9_gap", 1000, *QM9_SEEN))
U0 = arms("U0", finetune("qm9_U0", 1000, *QM9_UNSEEN))
BPA = arms("3bpa", finetune("3bpa", 1000))
PROBE = {
    f"probe_{target}_{objective}": [
        *["finetune.py", "configs/probe_qm9.yaml", f"target={target}", "train_split=val", "val_split=train"],
        *["train_size=0", "val_size=1000", f"init_from=results/encoders/{objective}_s1.pt"],
    ]
    for target in ("gap", "U0")
    for objective in ("georecon", "coord")
}

# objective or architecture: what Coord's public code, our default and GeoRecon's likely parent do with norms
NORMS = {
    "public": ["model.x_norm_layer=false", "model.vec_norm_layer=none", "model.vec_norm_out=whiten"],
    "rms": [],
    "whiten": ["model.vec_norm_layer=whiten", "model.vec_norm_out=whiten"],
}


def pretrain(*more, steps=3000, kept=(0, 3000)):
    length = [f"max_steps={steps}", f"lr_cosine_length={steps}", f"keep_steps={','.join(map(str, kept))}"]
    return ["pretrain.py", "configs/qm9_small.yaml", "compile=true", *length, *more]


CONTROL = {
    f"{objective}_{norms}": pretrain(f"objective={objective}", *NORMS[norms], kept=(0, 100, 300, 1000, 3000))
    for norms in NORMS
    for objective in ("coord", "georecon", "rec_only")
}
# when is the graph embedding used: one factor at a time from the default, which is georecon_rms of the control
FACTORS = {
    **{f"alpha{alpha}": pretrain(f"alpha={alpha}") for alpha in (3, 8)},
    **{f"depth{depth}": pretrain(f"decoder_layers={depth}") for depth in (0, 2)},
    "no_vec": pretrain("decoder_vec=false"),
    "no_g": pretrain("decoder_graph_emb=false"),  # what is left of GeoRecon without its graph embedding
    "w_rec3": pretrain("w_rec=3"),
    "w_clean0.1": pretrain("w_clean=0.1"),
    **{f"{kind}_pooling": pretrain(f"pooling={kind}") for kind in ("sum", "attention")},
    # frames of one molecule at 500 K: the clean geometry can no longer be guessed from the noised one
    "thermal": pretrain("data=data/md17_aspirin.h5"),
    "thermal_coord": pretrain("data=data/md17_aspirin.h5", "objective=coord"),  # for comparison
    "thermal_no_g": pretrain("data=data/md17_aspirin.h5", "decoder_graph_emb=false"),
}
# of what helped; and Coord with the noise of alpha = 3, to tell whether it is that alone
COMBINATIONS = {
    "alpha3_rec_only": pretrain("alpha=3", "objective=rec_only"),
    "alpha3_no_g": pretrain("alpha=3", "decoder_graph_emb=false"),
    "thermal_rec_only": pretrain("data=data/md17_aspirin.h5", "objective=rec_only"),
    "coord_noise3": pretrain("objective=coord", "position_noise_scale=0.12"),
}
THERMAL = {"coord": "thermal_coord", "georecon": "thermal", "no_g": "thermal_no_g", "rec_only": "thermal_rec_only"}

EQUAL = {"coord": "control/coord_rms", "georecon": "control/georecon_rms"}
EQUAL |= {run: f"graph_embedding/{run}" for run in ("alpha3", "alpha3_no_g", "coord_noise3", "no_g")}


def from_own_seed(tasks, encoders):
    """Each task from each encoder, the pretraining's seed and the fine-tuning's the same."""
    return {
        f"{task}_{start}_s{seed}": [*run, f"init_from=out/{encoder}_s{seed}/encoder.pt", f"seed={seed}"]
        for task, run in tasks.items()
        for start, encoder in encoders.items()
        for seed in (1, 2)
    }


STUDIES = {
    # GeoRecon and Coord on equal footing: same molecules, steps, encoder, seeds. About half an hour a run on two cores.
    "qm9_small": seeds(
        (1, 2),
        {
            "coord": ["pretrain.py", "configs/qm9_small.yaml", "objective=coord"],
            "georecon": ["pretrain.py", "configs/qm9_small.yaml"],
        },
    ),
    # the same at the paper's width and batch, on QM9 instead of PCQM4Mv2. Minutes a run on a large GPU.
    "qm9_wide": seeds((1,), {"coord": [*WIDE, "objective=coord"], "georecon": WIDE}),
    # how smooth is h, by objective and by norms; figures over the steps
    "control": seeds((1, 2), CONTROL),
    # the objectives at equal norms, for longer
    "control_long": seeds(
        (1,),
        {
            f"{objective}_rms": pretrain(f"objective={objective}", steps=20000, kept=(0, 1000, 3000, 8000, 20000))
            for objective in ("coord", "georecon", "rec_only")
        },
    ),
    # Table 5's values; its alpha = 1 is georecon_rms of the control
    "alpha": seeds((1, 2), {f"alpha{alpha}": pretrain(f"alpha={alpha}") for alpha in (1.15, 1.2, 1.35, 1.5)}),
    "graph_embedding": seeds((1, 2), FACTORS | COMBINATIONS),
    # what bfloat16 products cost: beside georecon_rms and coord_rms of the control
    "precision": seeds(
        (1,), {f"{o}_bf16": pretrain(f"objective={o}", "precision=bf16") for o in ("coord", "georecon")}
    ),
    # does it help where g is used? Needs the encoders of graph_embedding
    "thermal": from_own_seed(
        {"aspirin": ASPIRIN["aspirin_scratch"]},
        {start: f"graph_embedding/{run}" for start, run in THERMAL.items()},
    ),
    # what is worth pretraining on, each seed fine-tuned from its own encoder. Needs control and graph_embedding
    "finetune_equal": from_own_seed({"aspirin": ASPIRIN["aspirin_scratch"], "gap": GAP["gap_scratch"]}, EQUAL),
    # what the pretraining is worth, in a few minutes a run on one core
    "finetune_small": seeds((1,), ASPIRIN | GAP | BPA | PROBE | U0 | GAP_SEEN) | seeds((2,), ASPIRIN | GAP),
}


def folder(study, run):
    return ROOT / "out" / study / run


NOISES = (0.01, 0.04)  # angstrom, where the smoothness of the last step is measured too


def analyses(study, run):
    """What is measured of a pretraining run once it is done: {key of its JSON: (command, file, key in the file)}."""
    if study not in ("control", "control_long", "alpha", "graph_embedding"):
        return {}
    out, given = f"out/{study}/{run}", dict(argument.split("=", 1) for argument in STUDIES[study][run][2:])
    kept, on_qm9 = given["keep_steps"], "data" not in given
    data = ["data=data/qm9.h5", "split=test"] if on_qm9 else [f"data={given['data']}"]
    few = [*data, "num_molecules=32", "iterations=15"]
    smooth = ["lipschitz.py", *(f"{out}/step_{step}.pt" for step in kept.split(",")), *few]
    noised = {
        f"noised_{noise}": (
            ["lipschitz.py", f"{out}/last.pt", *few, f"position_noise_scale={noise}", f"out_dir={out}/noised_{noise}"],
            f"{out}/noised_{noise}/lipschitz.json",
            "summary",
        )
        for noise in NOISES
    }
    use = ["graph_embedding.py", f"{out}/step_0.pt", f"{out}/last.pt", *data]
    probe = ["finetune.py", "configs/probe_qm9.yaml", "target=H", "train_split=val", "val_split=train", "train_size=0"]
    probe += ["val_size=1000", f"init_from={out}/encoder.pt"]
    found = {
        "smoothness": ([*smooth, f"out_dir={out}/clean"], f"{out}/clean/lipschitz.json", "summary"),
        **noised,
        "graph_embedding": ([*use, f"out_dir={out}/use"], f"{out}/use/graph_embedding.json", "checkpoints"),
    }
    if on_qm9:
        found["probe_H"] = ([*probe, f"out_dir={out}/probe"], f"{out}/probe/metrics.json", "test")
    return found


def finished(study, run):
    return (ROOT / "results" / study / f"{run}.json").exists()


def execute(study, run, threads):
    """Run one run to its end, or the rest of it, measure it and keep its figures; the output goes to a file."""
    if finished(study, run):
        return
    out = folder(study, run)
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = [([*STUDIES[study][run], f"out_dir=out/{study}/{run}"], f"out/{study}/{run}/metrics.json")]
    todo += [(command, file) for command, file, _ in analyses(study, run).values()]
    with open(out.parent / f"{run}.txt", "a") as said:
        for command, file in todo:
            if (ROOT / file).exists():
                continue
            resume = ["resume=true"] if (ROOT / file).with_name("config.yaml").exists() else []
            options = {"cwd": ROOT, "env": {"OMP_NUM_THREADS": str(threads), **os.environ}}
            code = subprocess.run(
                [sys.executable, *command, *resume], stdout=said, stderr=subprocess.STDOUT, **options
            ).returncode
            if code:
                print(f"{study}/{run}: {command[0]} failed with exit code {code}, see {said.name}", flush=True)
                return
    keep(study, run)
    print(f"{study}/{run}: done", flush=True)


def keep(study, run):
    """Write results/STUDY/<run>.json from the run's folder."""
    log = [json.loads(line) for line in (folder(study, run) / "log.jsonl").read_text().splitlines()]
    rates = sorted(record["molecules_per_s"] for record in log if record["split"] == "train")
    result = {
        "study": study,
        "run": run,
        **json.loads((folder(study, run) / "metrics.json").read_text()),
        "curve_val": [record for record in log if record["split"] == "val"],
        "molecules_per_s": rates[len(rates) // 2] if rates else None,
    }
    how = result["analyses"] = {}
    for key, (_, file, inner) in analyses(study, run).items():
        found = json.loads((ROOT / file).read_text())
        result[key] = found[inner]
        how[key] = {name: found[name] for name in ("command", "commit", "settings") if name in found}
        if inner == "summary":  # of lipschitz.py: beside it the LLC of each molecule
            how[key]["llc"] = {name: list(one["llc"].values())[-1] for name, one in found["checkpoints"].items()}
    path = ROOT / "results" / study / f"{run}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")


# the control's arms that a study is to be compared with
BESIDE = dict.fromkeys(("graph_embedding", "alpha", "precision"), ("coord_rms", "georecon_rms"))


def read_result(study, run):
    """results/STUDY/<run>.json; refused if it lacks what tables and figures take, or is of another run or command."""
    path = ROOT / "results" / study / f"{run}.json"
    with fitting(f"{path} is no result of this run, delete it and run the study again"):
        result = json.loads(path.read_text(encoding="utf-8"))
        made_by = (result["study"], result["run"], result["command"].removesuffix(" resume=true"))
        if made_by != (study, run, shlex.join([*STUDIES[study][run], f"out_dir=out/{study}/{run}"])):
            raise ValueError(f"it was made by another command, {result['command']}")
        list(table(study, [result])), f"{result['seed']:d}, {result['steps']:,}", result["commit"], result["val"].keys()
        [record[name] / 1 for record in result["curve_val"] for name in set().union(*result["curve_val"]) - {"split"}]
        [(found["llc"]["median"], found["llc"]["p95"]) for found in result.get("smoothness", {}).values()]
    return result


def read_results(study):
    """What is finished of a study, after what it is to be compared with."""
    others = [("control", run) for run in STUDIES["control"] if run.rpartition("_")[0] in BESIDE.get(study, ())]
    return [read_result(*name) for name in others + [(study, run) for run in STUDIES[study]] if finished(*name)]


def by_task(results):
    """Fine-tuning runs <task>_<start>_s<seed> as {task: {start: [result of each seed]}}."""
    tasks = {}
    for result in results:
        name = result["run"].rpartition("_s")[0]
        start = next(start for start in STARTS if name.endswith(f"_{start}"))
        tasks.setdefault(name.removesuffix(f"_{start}"), {}).setdefault(start, []).append(result)
    return tasks


def kind_of(study):
    """What its table and figure are of."""
    run, command = next(iter(STUDIES[study].items()))
    return "smoothness" if analyses(study, run) else "errors" if command[0] == "finetune.py" else "losses"


def table(study, results):
    """Lines of the README's table: an arm of a study of smoothness a line, a test figure of fine-tuning, or a run."""
    if kind_of(study) == "smoothness":
        yield from smoothness_table(results)
    elif kind_of(study) == "errors":
        yield from errors_table(results)
    else:
        names = ("loss_noise", "loss_rec", "loss_rec_shuffled", "loss_clean")
        for result in results:
            losses = " | ".join(f"{result['val'][name]:.4f}" if name in result["val"] else "" for name in names)
            seed, steps, where = result["seed"], f"{result['steps']:,}", result["device"]
            yield f"| {result['study']} | {result['objective']} | {seed} | {steps} | {losses} | {where} |"


STARTS = {  # what fine-tuning starts from: color, line
    "scratch": ("0.6", ":"),
    "coord": ("tab:orange", "--"),
    "georecon": ("black", "-"),
    "alpha3": ("tab:blue", "-."),
    "alpha3_no_g": ("tab:blue", (0, (1, 1))),
    "coord_noise3": ("tab:orange", (0, (1, 1))),
    "no_g": ("0.4", (0, (1, 1))),
    "rec_only": ("tab:blue", "--"),
}


def errors_table(results):
    tasks = by_task(results)
    known = [start for start in STARTS if any(start in starts for starts in tasks.values())]
    for task, starts in tasks.items():
        first = next(iter(starts.values()))[0]
        for split, found in first["test"].items():
            for name in (name for name in found if "rmse" not in name and "per_atom" not in name):
                cells = []
                for start in known:
                    values = [result["test"][split][name] for result in starts.get(start, ())]
                    cells.append(" / ".join(f"{value:.4g}" for value in values))
                unit = first["units"].get(name, "")
                yield f"| {task} | {split} | {name} | {unit} | {first['steps']:,} | {' | '.join(cells)} |"


def at_end(result, kind):
    """What lipschitz.py found of a run's last step."""
    return list(result[kind].values())[-1]


def use_at_end(result):
    return list(result["graph_embedding"].values())[-1]


SMOOTHNESS = {
    "loss_noise": lambda result: result["val"]["loss_noise"],
    "loss_rec": lambda result: result["val"].get("loss_rec"),
    "LLC": lambda result: at_end(result, "smoothness")["llc"]["median"],
    "p95": lambda result: at_end(result, "smoothness")["llc"]["p95"],
    "at 0.01 &#8491;": lambda result: at_end(result, "noised_0.01")["llc"]["median"],
    "at 0.04 &#8491;": lambda result: at_end(result, "noised_0.04")["llc"]["median"],
    "LLC/&#124;h&#124;": lambda result: at_end(result, "smoothness")["llc_by_norm"]["median"],
    "standardised": lambda result: at_end(result, "smoothness")["llc_standardised"]["median"],
    "isomer's g, %": lambda result: use_at_end(result).get("rise_isomer"),
    "mean g, %": lambda result: use_at_end(result).get("rise_mean"),
    "R2 torsion": lambda result: use_at_end(result)["r2_torsion"],
    "identity": lambda result: use_at_end(result)["identified"],
    "H, ridge, meV": lambda result: result["probe_H"]["test"]["H_mae_ridge"] if "probe_H" in result else None,
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
    for arm, runs in by_arm(results).items():
        cells = []
        for figure in SMOOTHNESS.values():
            values = [figure(run) for run in runs]
            cells.append(" / ".join(f"{value:.3g}" for value in values if value is not None))
        yield f"| {arm} | {' | '.join(cells)} |"


def draw(study, results):
    """results/STUDY/<kind>.png, from the study's JSON."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        raise InputError("drawing needs matplotlib: pip install matplotlib") from None
    kinds = {"smoothness": draw_arms if study in BESIDE else draw_smoothness, "errors": draw_errors}
    kinds.get(kind_of(study), draw_losses)(plt, results, ROOT / "results" / study)


def save(figure, path, results, dpi=110):
    """Write it, below it the seeds, steps and commits that it is of."""
    rows = ((f"{result['seed']}", f"{result['steps']:,}", f"{result['commit']}") for result in results)
    seeds, steps, commits = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    commits = commits if len(commits) < 5 else [*commits[:3], f"{len(commits) - 3} more"]
    made_by = f"seed {', '.join(seeds)}; {', '.join(steps)} steps; commit {', '.join(commits)}"
    figure.supxlabel(made_by, fontsize=7, color="0.4")
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=dpi, format="png"))


def draw_smoothness(plt, results, folder):
    """Median LLC over the steps, and of the last step over the distance from equilibrium; a column for each norms."""
    columns = {}
    for arm, runs in by_arm(results).items():
        objective, _, norms = arm.rpartition("_")
        column, label = (norms, objective) if norms in NORMS else ("", arm)
        columns.setdefault(column, {})[label] = runs
    size = {"figsize": (1.2 + 3.2 * len(columns), 6.2), "layout": "constrained", "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(2, len(columns), **size)
    markers, colors = "osv^D<>ph", ("tab:orange", "black", "tab:blue", "0.6", "tab:green", "tab:red")
    labels = list(dict.fromkeys(label for arms in columns.values() for label in arms))
    for column, (norms, arms) in enumerate(columns.items()):
        over_steps, over_noise = axes[:, column]
        for label, runs in arms.items():
            k = labels.index(label)
            style = {"marker": markers[k % 9], "color": colors[k % 6], "lw": 1.2, "ms": 4}
            for run in runs:
                style |= {"label": label if run is runs[0] else None, "fillstyle": ("full", "none")[run["seed"] > 1]}
                over_steps.plot([found["llc"]["median"] for found in run["smoothness"].values()], **style)
                noised = [
                    at_end(run, kind)["llc"]["median"] for kind in ("smoothness", *map("noised_{}".format, NOISES))
                ]
                over_noise.plot(noised, **style)
                tail = [found["llc"]["p95"] for found in run["smoothness"].values()]
                over_steps.plot(tail, **style | {"ls": ":", "lw": 0.8, "ms": 2.5, "label": None})
        steps = [name.rpartition("_")[2] for name in run["smoothness"]]
        over_steps.set_xticks(range(len(steps)), steps)
        over_noise.set_xticks(range(1 + len(NOISES)), ["0", *map(str, NOISES)])
        over_steps.set(yscale="log", xlabel="step", title=f"{norms} (dotted: p95)".strip())
        over_noise.set(yscale="log", xlabel="noise on the geometry, \u00c5 (last step)")
    axes[0, -1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), title="filled: seed 1")
    for axis in axes[:, 0]:
        axis.set_ylabel("median LLC, 1/angstrom")
    save(figure, folder / "smoothness.png", results)


def draw_arms(plt, results, folder):
    """A row an arm, a point a seed: what a wrong graph embedding costs the decoder, the LLC, the readout of H."""
    arms = by_arm(results)
    size = {"figsize": (9.5, 1.2 + 0.28 * len(arms)), "layout": "constrained", "sharey": True}
    figure, axes = plt.subplots(1, 3, **size)
    panels = [("isomer's g, %", "o", "black"), ("mean g, %", "x", "tab:red")], [("LLC", "o", "black")]
    for axis, drawn in zip(axes, (*panels, [("H, ridge, meV", "o", "black")]), strict=True):
        for name, marker, color in drawn:
            points = [(SMOOTHNESS[name](run), place) for place, runs in enumerate(arms.values()) for run in runs]
            x = [math.nan if value is None else value for value, _ in points]  # not every arm has each figure
            axis.plot(x, [place for _, place in points], marker, color=color, ms=5, label=name, fillstyle="none")
        axis.grid(axis="y", color="0.9")
    use, smooth, readout = axes
    use.set(xscale="log", xlabel="rise of the rec loss, %, with another g")
    use.set_xticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
    use.set_xticks([], minor=True)
    use.legend(["an isomer's", "the mean"], frameon=False, fontsize=8)
    smooth.set(xscale="log", xlabel="median LLC, 1/angstrom")
    smooth.set_xticks([3, 5, 10, 20, 40], ["3", "5", "10", "20", "40"])
    smooth.set_xticks([], minor=True)
    readout.set(xlabel="linear readout of H, error in meV")
    use.set_yticks(range(len(arms)), list(arms))
    use.invert_yaxis()
    save(figure, folder / "arms.png", results)


def draw_errors(plt, results, folder):
    """Validation errors over the steps, a panel a task, a line a start."""
    tasks = by_task(results)
    rows = 1 if len(tasks) < 4 else 2
    columns = -(-len(tasks) // rows)
    figure, axes = plt.subplots(rows, columns, figsize=(3 * columns, 2.8 * rows), layout="constrained", squeeze=False)
    for axis, (task, starts) in zip(axes.flat, tasks.items(), strict=False):
        for start, runs in starts.items():
            for k, run in enumerate(runs):
                name = "forces_mae" if "forces_mae" in run["val"] else next(iter(run["val"]))
                points = [(record["step"], record[name]) for record in run["curve_val"] if record["step"]]
                color, line = STARTS[start]
                axis.plot(*zip(*points, strict=True), ls=line, color=color, lw=1.2, label=None if k else start)
            if f"{name}_ridge" in run["val"]:
                axis.axhline(run["val"][f"{name}_ridge"], color=color, ls=line, lw=0.5)
        axis.set(xlabel="step", yscale="log", title=f"{task}: {name}\n{run['units'].get(name, '')}, validation")
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    pairs = (zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes.flat[: len(tasks)])
    labelled = {label: handle for found in pairs for handle, label in found}
    axes[0, 0].legend(labelled.values(), labelled.keys(), frameon=False)
    save(figure, folder / "errors.png", results)


def draw_losses(plt, results, folder):
    """Validation losses over the steps, and whether the decoder uses the graph embedding."""
    figure, (losses, clean, use) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    curves = {
        ("coord", "loss_noise"): (losses, "Coord: noise", "tab:orange", "-"),
        ("georecon", "loss_noise"): (losses, "GeoRecon: noise", "black", "-"),
        ("georecon", "loss_rec"): (losses, "GeoRecon: rec", "tab:blue", "--"),
        ("georecon", "loss_clean"): (clean, None, "black", "-"),
    }
    for result in results:
        records = result["curve_val"]
        steps = [record["step"] for record in records]
        rounded = "precision=bf16" in result["command"]
        for (objective, name), (panel, label, color, line) in curves.items():
            if objective == result["objective"]:
                label = label and f"{label}, bfloat16" if rounded else label
                label = label if result["seed"] == results[0]["seed"] else None
                line = ":" if rounded else line
                panel.plot(steps, [record[name] for record in records], line, color=color, lw=1.2, label=label)
        if result["objective"] == "georecon":
            rise = [100 * (record["loss_rec_shuffled"] / record["loss_rec"] - 1) for record in records]
            use.plot(steps, rise, ":" if rounded else "-", marker=".", color="black", lw=1)
    losses.set(xlabel="step", yscale="log", ylim=(0.2, 1.1), title="validation loss: noise and rec")
    losses.set_yticks([0.2, 0.3, 0.5, 1.0], ["0.2", "0.3", "0.5", "1"], minor=False)
    losses.set_yticks([], minor=True)
    clean.set(xlabel="step", yscale="log", title="validation loss: clean")
    use.set(xlabel="step", ylim=(-0.1, 2), title="rise of rec, %, with a wrong graph emb.")
    losses.legend(frameon=False)
    save(figure, folder / "loss.png", results, dpi=120)


def main(arguments):
    if not arguments:
        for study, runs in STUDIES.items():
            print(f"{study}: {sum(finished(study, run) for run in runs)} of {len(runs)} runs done: {', '.join(runs)}")
            read_results(study)
        return
    study, options = arguments[0], arguments[1:]
    if study not in STUDIES:
        raise InputError(f"no study {study!r}: there are {', '.join(STUDIES)}", code=2)
    jobs = 1
    for option in options:
        key, _, value = option.partition("=")
        if option != "draw" and not (key == "jobs" and value.isdecimal() and int(value) > 0):
            raise InputError(f"argument {option!r}: after the study comes draw, or jobs=N", code=2)
        jobs = int(value) if key == "jobs" else jobs
    if "draw" not in options:
        read_results(study)  # what is there must be whole before hours go into the rest
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda run: execute(study, run, max(1, os.cpu_count() // jobs)), STUDIES[study]))
        if missing := [run for run in STUDIES[study] if not finished(study, run)]:
            raise InputError(f"{len(missing)} of {len(STUDIES[study])} runs are not finished: {', '.join(missing)}")
    results = read_results(study)
    if all(result["study"] != study for result in results):
        raise InputError(f"results/{study} holds no results: run `python reproduce.py {study}` first")
    print("\n".join(table(study, results)))
    draw(study, results)


if __name__ == "__main__":
    cli(main, __doc__)
