"""The run folder: who may write there, what a run was, and its log."""

import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import yaml
from tqdm import tqdm

from harness.errors import InputError, mute
from harness.files import write_text
from harness.weights import read_torch

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

LOOK = "look at the settings, and at the data with data.py info"
REMEDY = f"start anew with a lower lr, or {LOOK}"
RUN_FILES = ("config.yaml", "log.jsonl", "last.pt", "encoder.pt", "best.pt", "metrics.json")
# a template of last.pt and step_<n>.pt, see weights.require; a stage adds its own entries
LAST = {"schema": "georecon/1", "config": {"model": dict}, "data_sha256": str, "step": int, "wall_s": float}
LAST |= {"state_dict": dict, "optimizer": dict}
# settings that resuming may change: where files lie, how often to write, how work is cut up
FREE_TO_CHANGE = {"data", "out_dir", "resume", "max_steps", "log_every", "val_every", "save_every", "keep_steps"}
FREE_TO_CHANGE |= {"paper", "num_workers", "accumulate", "inference_batch_size", "lr_cosine_length"}


class Log:
    """log.jsonl, and the same figures for the eye: a tqdm bar on a terminal, lines in a file."""

    def __init__(self, path, start, stop, active):
        self.path, self.active = path, active
        self.bar = tqdm(initial=start, total=stop, unit="step", disable=not (active and sys.stderr.isatty()))

    def write(self, record):
        for key, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                step, split = record["step"], record["split"]
                raise InputError(f"{key} is {value} at step {step} ({split}): {REMEDY if step else LOOK}")
        if not self.active:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise InputError(f"{self.path} cannot be written: {error.strerror}; then resume=true goes on") from None
        shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in record.items()}
        if self.bar.disable or record["split"] == "val":
            self.say("  ".join(f"{key} {value}" for key, value in shown.items()))
        else:
            self.bar.set_postfix({key: shown[key] for key in ("loss", "lr", "molecules_per_s")})

    def say(self, line):
        if self.active:
            try:
                with tqdm.external_write_mode():
                    print(line, flush=True)
            except OSError:  # the terminal or pipe is gone, or its disk full: log.jsonl has it all, the run goes on
                mute()


def drop_log_after(path, step):
    """Drop the log lines of steps that will run again, and a line that a kill cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    write_text(path, "".join(kept))


def may_resume(config):
    """Whether to go on with a run in the folder: asked for, or torchrun has started this process again."""
    return config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def open_folder(config):
    """-> the checkpoint to go on from, or None for a new run; refuses to touch a run that is not to be resumed."""
    folder = Path(config.out_dir)
    if not any(os.path.exists(folder / name) for name in RUN_FILES):
        if config.resume:
            raise InputError(f"nothing to resume: {folder} holds no run; leave resume=true out to start one")
        return None
    if not may_resume(config):
        raise InputError(f"{folder} already holds a run: go on with resume=true, or choose another out_dir=")
    if not (folder / "last.pt").exists():
        if (folder / "metrics.json").exists():
            raise InputError(f"{folder} is finished, and holds no last.pt to go on from; choose another out_dir=")
        return None  # it was stopped before its first checkpoint
    checkpoint = read_torch(folder / "last.pt", "it is what resume=true goes on from", LAST)
    step, done = checkpoint["step"], (folder / "metrics.json").exists()
    if step < 0:
        raise InputError(f"{folder / 'last.pt'}: its step is {step}")
    stopped = checkpoint["config"].get("max_steps") != step  # best.pt may be of another step
    if step > config.max_steps or step == config.max_steps and (done or stopped):
        how = "finished" if done else "stopped"
        raise InputError(f"{folder}: {how} at step {step}: set max_steps, lr_cosine_length higher")
    return checkpoint


def claim_folder(config, start):
    """Make the folder and write config.yaml -> an open file whose lock lasts until it is closed.

    Of two processes that start or resume the same run, one is refused. start is the step to go on from, or None.
    """
    folder, path = Path(config.out_dir), Path(config.out_dir) / "config.yaml"
    settings = {**asdict(config), "keep_steps": list(config.keep_steps), "resume": False}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=may_resume(config))
        lock = open(folder / ".lock", "w")  # noqa: SIM115, it stays open
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, BlockingIOError):
        raise InputError(f"{folder} cannot be used: a file has that name, or another run is at work there") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}; choose another out_dir=") from None
    for name in (*RUN_FILES, "step_*.pt"):
        for left in folder.glob(f".{name}.tmp"):  # by a kill in the middle of writing
            left.unlink()
    drop_log_after(folder / "log.jsonl", -1 if start is None else start)
    write_text(path, yaml.safe_dump(settings, sort_keys=False))
    (folder / "metrics.json").unlink(missing_ok=True)  # of a run that is now made longer
    return lock


def flatten(settings):
    """{key: value} with the keys of a section written section.key, as on the command line."""
    inner = {f"model.{key}": value for key, value in settings["model"].items()}
    return {key: value for key, value in settings.items() if key != "model"} | inner


def check_same_run(checkpoint, config, data_sha256):
    """Refuse to resume a run with other settings or other data: the result would be neither run."""
    defaults = asdict(type(config)())  # for a key that was added after the run
    where = f"cannot resume {config.out_dir}"
    if foreign := checkpoint["config"].keys() - defaults.keys():
        raise InputError(f"{where}: it is of another program, with the key {min(map(str, foreign))}")
    saved, now = flatten({**defaults, **checkpoint["config"]}), flatten(asdict(config))
    for key in sorted(now.keys() - FREE_TO_CHANGE):
        if saved.get(key) != now[key]:
            raise InputError(f"{where}: its {key} is {saved.get(key)}, now {now[key]}", code=2)
    if checkpoint["data_sha256"] != data_sha256:
        raise InputError(f"{where}: {config.data} is not the file that it was trained on")
