"""The studies behind the results: how their runs are run, and what is kept of them.

    python -m studies.reproduce                  the studies, and what of each is done
    python -m studies.reproduce STUDY [jobs=N]   run what is missing, N runs at a time, then draw
    python -m studies.reproduce STUDY draw       table and figure from results/STUDY/*.json

A run lives in out/STUDY/<run>, a stopped one goes on; results/STUDY/<run>.json keeps it. Delete both to run it again.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from harness.errors import InputError, cli, explain
from harness.files import write_json
from harness.weights import require
from studies import runs
from studies.figures import draw, rows_drawn, table
from studies.runs import STUDIES, analyses


def finished(study, run):
    return (runs.ROOT / "results" / study / f"{run}.json").exists()


def execute(study, run, threads):
    """Run one run to its end, measure it and keep its figures; the output goes to a file."""
    if finished(study, run):
        return
    out = runs.ROOT / "out" / study / run
    out.parent.mkdir(parents=True, exist_ok=True)
    todo = [([*STUDIES[study][run], f"out_dir=out/{study}/{run}"], out / "metrics.json")]
    todo += [(command, file) for command, file, _ in analyses(study, run).values()]
    options = {"cwd": runs.ROOT, "env": {"OMP_NUM_THREADS": str(threads), **os.environ}}
    with open(out.parent / f"{run}.txt", "a") as output:
        for command, file in todo:
            if (runs.ROOT / file).exists():
                continue
            resume = (runs.ROOT / file).with_name("config.yaml").exists()
            command = [sys.executable, *command, *["resume=true"] * resume]
            if code := subprocess.run(command, stdout=output, stderr=output, **options).returncode:
                what = f"{' '.join(command[1:3])} failed with exit code {code}"
                print(f"{study}/{run}: {what}, see {output.name}", flush=True)
                return
    keep(study, run)
    print(f"{study}/{run}: done", flush=True)


def keep(study, run):
    """Write results/STUDY/<run>.json from the run's folder."""
    out = runs.ROOT / "out" / study / run
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    rates = sorted(record["molecules_per_s"] for record in log if record["split"] == "train")
    result = {"study": study, "run": run, **json.loads((out / "metrics.json").read_text())}
    result["curve_val"] = [record for record in log if record["split"] == "val"]
    result["molecules_per_s"] = rates[len(rates) // 2] if rates else None
    result["first_grad_norm"] = next((one["grad_norm"] for one in log if "grad_norm" in one), None)
    how = result["analyses"] = {}
    for key, (_, file, inner) in analyses(study, run).items():
        found = json.loads((runs.ROOT / file).read_text())
        result[key] = found[inner]
        how[key] = {k: found[k] for k in ("command", "commit", "settings") if k in found}
        if inner == "summary":  # of lipschitz.py: beside it the LLC of each molecule
            llcs = {name: one["llc"] for name, one in found["checkpoints"].items()}
            how[key]["llc"] = {name: list(llc.values())[-1] for name, llc in llcs.items()}
    write_json(runs.ROOT / "results" / study / f"{run}.json", result)


def read_result(study, run):
    """results/STUDY/<run>.json; refused if it lacks figures, or is of another run or command."""
    path = runs.ROOT / "results" / study / f"{run}.json"
    with explain(f"{path} is no result of this run, delete it and run the study again"):
        result = json.loads(path.read_text(encoding="utf-8"))
        needed = {"study": study, "run": run, "seed": int, "steps": int, "commit": (str, type(None)), "curve_val": list}
        require(result, needed | dict.fromkeys(analyses(study, run), dict) | {"val": {str: float}}, "the file")
        command = shlex.join([*STUDIES[study][run], f"out_dir=out/{study}/{run}"])
        if result["command"].removesuffix(" resume=true") != command:
            raise ValueError(f"it was made by another command, {result['command']}")
        list(table(study, [result]))  # it has what this takes of it, and what is drawn
        rows_drawn(study, [result])
    return result


def read_results(study):
    """What is finished of a study, after what it is to be compared with."""
    names = []
    for other, arms in (runs.BESIDE.get(study, {}) | {study: None}).items():
        names += [(other, run) for run in STUDIES[other] if arms is None or run.rpartition("_")[0] in arms]
    return [read_result(*name) for name in names if finished(*name)]


def main(arguments):
    if not arguments:
        for study, commands in STUDIES.items():
            missing = [run for run in commands if not finished(study, run)]
            done = f"{len(commands) - len(missing)} of {len(commands)} runs done"
            print(f"{study}: {done}{', to do: ' * bool(missing)}{', '.join(missing)}")
            read_results(study)
        return
    study, *options = arguments
    if study not in STUDIES:
        raise InputError(f"no study {study!r}: there are {', '.join(STUDIES)}", code=2)
    if wrong := [option for option in options if not re.fullmatch(r"draw|jobs=[1-9]\d*", option)]:
        raise InputError(f"argument {wrong[0]!r}: after the study comes draw, or jobs=N", code=2)
    jobs = max([1, *(int(option[5:]) for option in options if option != "draw")])
    if "draw" not in options:
        read_results(study)  # what is there must be whole before hours go into the rest
        threads = max(1, os.cpu_count() // jobs)
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda run: execute(study, run, threads), STUDIES[study]))
        if missing := [run for run in STUDIES[study] if not finished(study, run)]:
            raise InputError(f"{len(missing)} runs are not finished: {', '.join(missing)}")
    results = read_results(study)
    if all(result["study"] != study for result in results):
        raise InputError(f"results/{study} is empty: run `python -m studies.reproduce {study}`")
    print("\n".join(table(study, results)))
    draw(study, results)


if __name__ == "__main__":
    cli(main, __doc__)
