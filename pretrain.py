"""Stage 1: pretrain an encoder on 3D geometries alone, with GeoRecon's objective or Coord's (paper, Sec. 4).

    python pretrain.py configs/demo.yaml                                     a minute on a laptop, no download
    python pretrain.py configs/qm9_small.yaml objective=coord out_dir=out/qm9_small_coord
    torchrun --nproc_per_node=4 pretrain.py configs/pcqm.yaml                the paper's run
    python pretrain.py configs/pcqm.yaml resume=true                         go on where it stopped

A run writes to out_dir (default out/<name of the config>):

    config.yaml     every setting, resolved; itself a valid argument
    log.jsonl       one object per logged step: losses, learning rate, molecules/s; split train or val
    last.pt         all that resuming needs: encoder, heads, decoder, optimizer, step; step_<n>.pt are copies of it
    encoder.pt      the encoder alone: model.load_encoder("out/demo/encoder.pt")
    metrics.json    the final figures, and what made them

Everything random is a function of (seed, step): order and noise are drawn for the global batch and each rank takes its
slice. So a run that was killed and resumed ends with the same bits, and the number of ranks changes rounding only.
"""

import ctypes
import difflib
import json
import math
import os
import platform
import re
import reprlib
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows: no lock
    fcntl = None

from data import InputError, Molecules, StepBatches, cli, mute, split_indices
from model import EquivariantMultiHeadAttention, EquivariantTransformer, ModelConfig, Pretraining, save_encoder, setting

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class PretrainConfig:
    """Every setting of this stage. Names are Table 13's where it has one; defaults are its QM9 column."""

    data: str = ""  # HDF5 file made by data.py
    split: str = ""  # train on this named split of the file; empty: on all molecules
    val_size: int = setting(100, low=1)  # molecules held out for validation (Coord's 100)
    out_dir: str = ""  # empty: out/<name of the config>
    seed: int = setting(1, low=0)

    objective: str = setting("georecon", choices=("georecon", "coord", "rec_only"))
    position_noise_scale: float = setting(0.04, low=0)  # sigma, angstrom
    alpha: float = setting(1.0, low=0)  # Sec. 4.1: noise of the rec variant in units of sigma, "set to 1 for default"
    w_noise: float = setting(1.0, low=0)  # PAPER-SILENT: Coord's denoising_weight
    w_clean: float = setting(1.0, low=0)  # PAPER-SILENT
    w_rec: float = setting(0.45, low=0)  # PAPER-SILENT for the main run; the middle of Table 7's sweep
    decoder_layers: int = setting(1, low=0)  # PAPER-SILENT: "lightweight"
    decoder_vec: bool = True  # PAPER-SILENT: the decoder starts from vec of the encoder; false: from zero
    decoder_graph_emb: bool = True  # false: the decoder sees zero in place of g, a control that the paper lacks
    pooling: str = setting("mean", choices=("mean", "sum", "attention"))  # Sec. 4.2
    model: ModelConfig = field(default_factory=ModelConfig)

    batch_size: int = setting(200, low=1)  # molecules per step over all ranks: Table 13's 50 on each of 4 GPUs
    accumulate: int = setting(1, low=1)  # parts that each rank cuts its batch into, to save memory
    max_steps: int = setting(400_000, low=1)
    lr: float = setting(4e-4, low=0)
    lr_min: float = setting(1e-7, low=0)
    lr_warmup_steps: int = setting(10_000, low=0)
    lr_cosine_length: int = setting(400_000, low=1)
    precision: str = setting("32", choices=("32", "bf16"))  # bf16: the products of the linear layers alone

    inference_batch_size: int = setting(70, low=1)
    num_workers: int = setting(0, low=0)  # loader processes per rank; 0: read in the training process
    compile: bool = False  # attention layers by torch.compile: 1.4 times as fast on one CPU core, after a minute
    deterministic: bool = False  # bitwise repeatable on CUDA too, at some cost; the CPU always is
    log_every: int = setting(100, low=1)
    val_every: int = setting(1000, low=1)
    save_every: int = setting(1000, low=1)
    keep_steps: tuple = setting((), low=0)  # steps at which a copy step_<n>.pt is kept
    resume: bool = False

    def __post_init__(self):
        if not self.decoder_layers and not self.decoder_vec:
            raise ValueError("decoder_layers = 0, decoder_vec = False: nothing is left to give the noise a direction")


class StrictLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path, may_have_base=True):
    """The mapping in a yaml file, laid over that of the file beside it which its key `base` names, if it has one."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a config such as configs/demo.yaml", code=2) from None
    except Exception as error:  # of yaml's parser and of its constructors, such as of a date that does not exist
        raise InputError(f"{path} is not valid yaml: {' '.join(str(error).split())}", code=2) from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: a config is a mapping of lines `key: value`", code=2)
    if "base" not in settings:
        return settings
    if not may_have_base:
        raise InputError(f"{path} is the base of another config and cannot have a base itself", code=2)
    base = read_yaml(Path(path).parent / str(settings.pop("base")), may_have_base=False)
    sections = [config["model"] for config in (base, settings) if isinstance(config.get("model"), dict)]
    merged = {**base, **settings}
    return {**merged, "model": {**sections[0], **sections[1]}} if len(sections) == 2 else merged


def convert(value, kind, name):
    """A yaml or command line value as the type of its field; yaml reads 1e-4 as a string, so strings are parsed."""
    wrong = InputError(
        f"{name} = {reprlib.repr(value)}: must be {'a list of int' if kind is tuple else kind.__name__}", code=2
    )
    try:
        if kind is tuple:
            items = value.split(",") if isinstance(value, str) else value
            items = items if isinstance(items, (list, tuple)) else [items]
            return tuple(convert(item, int, name) for item in items if item != "")
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is dict and isinstance(value, dict):
            return {str(key): convert(number, float, f"{name}.{key}") for key, number in value.items()}
        if isinstance(value, (bool, dict, list)) or value is None:
            raise wrong
        if kind is str:
            if "\0" in str(value):
                raise wrong
            return str(value)
        number = float(value)  # ints too, for 1e5
        if not math.isfinite(number) or kind is int and (number != int(number) or abs(number) > 2**53):
            raise wrong
        return kind(number)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise wrong from None


def build_config(kind, settings, prefix=""):
    """A dataclass from a mapping; an InputError names the key, the value and what is allowed."""
    if not isinstance(settings, dict):
        where = prefix.rstrip(".") or "config"
        raise InputError(f"{where} = {settings!r}: must be a mapping of lines `key: value`", code=2)
    known = {f.name: f for f in fields(kind)}
    values = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are: {', '.join(known)}"
            raise InputError(f"unknown key {name}: {hint}", code=2)
        if is_dataclass(known[key].type):
            values[key] = build_config(known[key].type, value, f"{name}.")
            continue
        values[key] = convert(value, known[key].type, name)
        allowed = known[key].metadata
        low, choices = allowed.get("low"), allowed.get("choices")
        for item in values[key] if isinstance(values[key], tuple) else [values[key]]:
            if choices and item not in choices:
                raise InputError(f"{name} = {item}: must be one of {', '.join(map(str, choices))}", code=2)
            if low is not None and item < low:
                raise InputError(f"{name} = {item}: must be at least {low}", code=2)
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(str(error), code=2) from None


def override(settings, arguments):
    """Settings by name with key=value of the command line; a key inside `model:` is written model.key=value."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"argument {argument!r}: settings are written key=value", code=2)
        section, _, inner = key.rpartition(".")
        target = settings.setdefault(section, {}) if section else settings
        if not isinstance(target, dict):
            raise InputError(f"{section} = {target!r}: must be a mapping of lines `key: value`", code=2)
        target[inner] = value
    return settings


def load_config(kind, arguments):
    """`CONFIG.yaml [key=value ...]` -> the dataclass kind."""
    settings = override(read_yaml(arguments[0]), arguments[1:])
    config, home = build_config(kind, settings), Path(arguments[0]).parent
    config = config if config.out_dir else replace(config, out_dir=str(Path("out") / Path(arguments[0]).stem))
    if config.resume and (home / "last.pt").exists() and home.resolve() != Path(config.out_dir).resolve():
        raise InputError(f"{arguments[0]} is of a run that was in {config.out_dir}: say out_dir={home}", code=2)
    return config


# ---------------------------------------------------------------- process, files, log


def tune_cpu():
    """What costs a CPU several times the arithmetic, for the whole process; to be called before any thread is started.

    glibc is to reuse freed memory instead of handing it back: page faults are up to 3/4 of the time. And numbers below
    1e-38 (1e-308 in float64) are to be zero: 3 % of the radial functions' values and many gradients are such, on which
    an Intel core takes a hundred times as long.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large arrays from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
    torch.set_flush_denormal(True)  # False where the processor cannot


def set_up_process(config):
    """-> device, rank, world. Under torchrun joins its process group; on its own it is rank 0 of 1."""
    rank, world = 0, 1
    if "RANK" in os.environ:  # WORLD_SIZE alone may be left over from the shell or a queue
        told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
        if not all(map(str.isdecimal, told)) or int(told[0]) >= int(told[1]) or "MASTER_ADDR" not in os.environ:
            raise InputError("RANK is set, but not what goes with it: start with torchrun, or unset RANK", code=2)
        rank, world = int(told[0]), int(told[1])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(f"{local + 1} or more ranks, but {torch.cuda.device_count()} GPU: lower --nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "RANK" in os.environ:
        # torchrun's store outlives a restart: under the same name a rank would find the address of one that is dead
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    return device, rank, world


def leave_process():
    """End the process group in order: gloo's threads must let go of the last tensors before the interpreter ends.

    Otherwise it aborts now and then (pytorch #179291). DDP holds on to the group, so it must be out of scope.
    """
    barrier()
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(values):
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()


def write_atomically(path, write):
    """write(temporary path), then rename: whoever opens path finds the old file whole or the new one whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: what torch.save makes of a full disk
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"{path} cannot be written: {reason}; a file of that name is as it was before") from None


def write_text(path, text):
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


LOOK = "look at the settings, and at the data with data.py info"
REMEDY = f"start anew with a lower lr, or {LOOK}"


class Log:
    """log.jsonl, and the same figures for the eye: a tqdm bar on a terminal, plain lines in a file."""

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
    """Take the lines of steps that are going to be run again out of a log, and a line that a kill cut off."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            kept += [line + "\n"] if json.loads(line)["step"] <= step else []
        except (ValueError, TypeError, KeyError, RecursionError):
            continue
    write_text(path, "".join(kept))


# ---------------------------------------------------------------- run folder


RUN_FILES = ("config.yaml", "log.jsonl", "last.pt", "encoder.pt", "best.pt", "metrics.json")


def may_resume(config):
    """Whether a run in the folder is to be gone on with: asked for, or torchrun has started this process again."""
    return config.resume or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def open_run_folder(config):
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
    checkpoint = load_checkpoint(folder / "last.pt")
    step = checkpoint["step"]
    if step > config.max_steps or step == config.max_steps and (folder / "metrics.json").exists():
        raise InputError(f"{folder} is finished, at step {step}: set max_steps higher to go on with it")
    return checkpoint


def claim_run_folder(config, start):
    """Make the folder and write config.yaml -> an open file whose lock lasts until it is closed.

    Of two processes that start or resume the same run, one is refused.
    """
    folder = Path(config.out_dir)
    path = folder / "config.yaml"
    settings = {**asdict(config), "keep_steps": list(config.keep_steps), "resume": False}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch(exist_ok=may_resume(config))
        lock = open(folder / ".lock", "w")  # noqa: SIM115, it stays open
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (FileExistsError, BlockingIOError):
        raise InputError(f"{folder} cannot be used: a file bears that name, or another run is at work there") from None
    except OSError as error:
        raise InputError(f"{folder} cannot be made: {error.strerror}; choose another out_dir=") from None
    for left in folder.glob(".*.tmp"):  # by a kill in the middle of writing
        left.unlink()
    drop_log_after(folder / "log.jsonl", -1 if start is None else start)
    write_text(path, yaml.safe_dump(settings, sort_keys=False))
    (folder / "metrics.json").unlink(missing_ok=True)  # of a run that is now made longer
    return lock


def check_weights(state_dict, path):
    """Refuse weights that are not finite, of a run that went wrong, or no plain tensors, of a damaged file."""
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor):
            continue
        plain = value.layout == torch.strided and not (value.is_quantized or value.is_complex())
        if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise InputError(f"{path}: {name} is no plain tensor of numbers")
        if not value.isfinite().all():
            raise InputError(f"{path}: {name} is not finite: go back to an earlier step_<n>.pt, or start anew")


def check_kinds(content, kinds, path, what):
    """Refuse a mapping in which a key is missing or of another type; kinds {key: type or types}."""
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise InputError(f"{path} is no {what}: its {key} is missing or of another kind")


CHECKPOINT = {"config": dict, "data_sha256": str, "step": int, "wall_s": float, "state_dict": dict, "optimizer": dict}


def load_checkpoint(path):
    """A last.pt or step_<n>.pt as a dict; plain tensors and values only, so that it cannot run code."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        reason = f"{type(error).__name__} {error}".partition("\n")[0]
        raise InputError(f"{path} cannot be read as a checkpoint: {reason}") from None
    what = "checkpoint of a georecon/1 run"
    check_kinds(checkpoint, CHECKPOINT, path, what)
    check_kinds(checkpoint["config"], {"model": dict}, path, what)
    kept = (checkpoint.get(name) for name in ("first_val", "last_val", "best_val"))
    errors = [found for found in kept if isinstance(found, dict)]
    figures = [checkpoint["wall_s"], *(value for found in errors for value in found.values())]
    right = all(isinstance(v, float) and math.isfinite(v) for v in figures) and checkpoint["step"] >= 0
    if checkpoint.get("schema") != "georecon/1" or not right:
        raise InputError(f"{path} is no {what}")
    check_weights(checkpoint["state_dict"], path)
    return checkpoint


def load_optimizer(optimizer, saved, step):
    """Take moments and learning rate from what optimizer.state_dict() gave after a step; ValueError: they do not fit.

    The fused kernel trusts their shapes: it would read and write beyond the end of a wrong one.
    """
    (group,) = optimizer.param_groups
    if bool(saved["state"]) != (step > 0):
        raise ValueError("the optimizer has no moments")
    for k, state in saved["state"].items():
        shape = group["params"][k].shape
        for name, wanted in {"step": (), "exp_avg": shape, "exp_avg_sq": shape}.items():
            value = state[name]
            right = value.dtype == torch.float32 and value.shape == wanted and value.is_contiguous()
            if not right or not value.isfinite().all() or len(state) != 3:
                raise ValueError(f"the optimizer's {name} of parameter {k} is not a finite float32 {tuple(wanted)}")
    own = optimizer.state_dict()["param_groups"][0] | {"lr": float(saved["param_groups"][0]["lr"])}
    optimizer.load_state_dict({"state": saved["state"], "param_groups": [own]})


@contextmanager
def fitting(what):
    """What a wrong checkpoint makes torch raise: as an InputError `<what>: <reason>`."""
    try:
        yield
    except (InputError, RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        lacks = "it lacks the key " if isinstance(error, KeyError) else ""
        raise InputError(f"{what}: {lacks}{' '.join(str(error).split())[:400]}") from None


def save_torch(path, content):
    write_atomically(path, lambda temporary: torch.save(content, temporary))


# what may differ between a run and its resumption: where files lie, how often things are written, how work is cut up
FREE_TO_CHANGE = {"data", "out_dir", "resume", "max_steps", "log_every", "val_every", "save_every", "keep_steps"}
FREE_TO_CHANGE |= {"num_workers", "accumulate", "inference_batch_size"}


def flatten(settings):
    """{key: value} with the keys of a section written section.key, as on the command line."""
    inner = {f"model.{key}": value for key, value in settings["model"].items()}
    return {key: value for key, value in settings.items() if key != "model"} | inner


def check_same_run(checkpoint, config, data_sha256):
    """Refuse to resume a run with other settings or other data: the result would be neither run."""
    defaults = asdict(type(config)())  # for a key that is younger than the run
    if foreign := checkpoint["config"].keys() - defaults.keys():
        raise InputError(
            f"cannot resume {config.out_dir}: a run of another program, with the key {min(map(str, foreign))}"
        )
    saved, now = flatten({**defaults, **checkpoint["config"]}), flatten(asdict(config))
    for key in sorted(now.keys() - FREE_TO_CHANGE):
        if saved.get(key) != now[key]:
            raise InputError(f"cannot resume {config.out_dir}: its {key} is {saved.get(key)}, now {now[key]}", code=2)
    if checkpoint["data_sha256"] != data_sha256:
        raise InputError(f"cannot resume {config.out_dir}: {config.data} is not the file that it was trained on")


# ---------------------------------------------------------------- training


def learning_rate(step, config):
    """Linear warm-up over lr_warmup_steps, then a cosine of length lr_cosine_length from lr to lr_min.

    DEVIATION: the closed form; torch's recursion in Coord's code, whose warm-up overwrites it, ends up 0.15 % higher.
    """
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    phase = min(step / config.lr_cosine_length, 1.0)
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * phase))


TRAIN, VAL = 1, 2  # first number of a noise's key


def standard_normal(shape, *key):
    """Standard normal numbers that depend on the integers in key alone: float32 tensor."""
    return torch.from_numpy(np.random.default_rng(key).standard_normal(shape, dtype=np.float32))


def normal_of_each(molecules, index, *key):
    """Standard normal numbers (N, 3) for the molecules index; each one's depend on the key and on it alone."""
    sizes = np.diff(molecules.ptr)
    return torch.cat([standard_normal((int(sizes[m]), 3), *key, int(m)) for m in index])


def validation_batches(molecules, index, size):
    """The validation molecules in batches, each molecule with a noise of its own that no setting changes."""
    batches = []
    for part in np.array_split(index, math.ceil(len(index) / size)):  # in random order: neighbours in a file are alike
        noise = normal_of_each(molecules, part, VAL)
        batches.append({**molecules.read(part), "noise": noise, "num_molecules": len(part)})
    return batches


def check_max_z(z, max_z, path):
    if (highest := int(z.max())) >= max_z:
        raise InputError(f"{path} holds atomic number {highest}, model.max_z = {max_z}: set it above {highest}")


@contextmanager
def too_many_neighbors():
    """More of them than model.max_num_neighbors: as an InputError."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from None


def run_losses(net, part, noise, device, config, shuffle=False):
    """Losses of one part of a batch, by name."""
    check_max_z(part["z"], config.model.max_z, config.data)
    z, pos, batch, noise = (
        tensor.to(device, non_blocking=True) for tensor in (part["z"], part["pos"], part["batch"], noise)
    )
    with too_many_neighbors(), torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        return net(z, pos, batch, noise, part["num_molecules"], shuffle)


@torch.no_grad()
def evaluate(net, batches, device, config, rank, world):
    """Mean losses per atom over the validation batches, which the ranks share, plus loss_rec_shuffled."""
    mine = batches[rank::world]
    shuffle = all(part["num_molecules"] > 1 for part in batches)
    total = 0.0
    for part in mine or batches[:1]:  # a rank without a share runs one batch at weight 0, to know the names
        losses = run_losses(net, part, part["noise"], device, config, shuffle)
        weight = len(part["z"]) if mine else 0
        total = total + weight * torch.stack([*losses.values(), torch.ones_like(losses["loss"])]).double()
    total = sum_over_ranks(total)
    return dict(zip(losses, (total[:-1] / total[-1]).tolist(), strict=True))


def backward(net, parts, losses_of, world):
    """Forward and backward over this rank's parts of the global batch -> its share of the mean losses, by name.

    losses_of(part): by name, that part's share of the means over the global batch, whatever the ranks' shares are.
    """
    share = {}
    for k, part in enumerate(parts):
        more_to_come = isinstance(net, DistributedDataParallel) and k < len(parts) - 1
        with net.no_sync() if more_to_come else nullcontext():
            losses = losses_of(part)
            (losses["loss"] * world).backward()  # DDP divides the sum of the ranks' gradients by world
        for name, loss in losses.items():
            share[name] = share.get(name, 0.0) + loss.detach()
    return share


def train_step(net, parts, step, device, config, world):
    """Forward and backward over this rank's parts of the global batch -> its share of the mean losses, by name."""
    noise = standard_normal((parts[0]["global_atoms"], 3), TRAIN, config.seed, step)  # (A, 3) for the global batch

    def losses_of(part):
        first, num_atoms = part["first_atom"], len(part["z"])
        losses = run_losses(net, part, noise[first : first + num_atoms], device, config)
        return {name: loss * (num_atoms / part["global_atoms"]) for name, loss in losses.items()}

    return backward(net, parts, losses_of, world)


def grad_norm(parameters):
    """Norm of the whole gradient: a scalar tensor."""
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


@contextmanager
def stop_signals():
    """A list that SIGTERM, SIGINT or SIGHUP put their number in, for the loop to end in order; a second one kills.

    Not under torchrun, which passes on to its ranks what they may have been sent already.
    """
    caught = []

    def note(number, _):
        caught.append(number)
        if len(caught) > 1 and not dist.is_initialized():
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    terminal_closed = getattr(signal, "SIGHUP", signal.SIGTERM)
    previous = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, terminal_closed)}
    previous = {n: handler for n, handler in previous.items() if handler != signal.SIG_IGN}  # as nohup asks for
    for n in previous:
        signal.signal(n, note)
    try:
        yield caught
    finally:
        for n in previous:
            signal.signal(n, previous[n])


def asked_to_stop(caught, done, device, world):
    """Number of the signal that some rank has caught, else 0; several ranks agree on it at every tenth step."""
    number = caught[0] if caught else 0
    if world == 1:
        return number
    if done % 10:
        return 0
    seen = torch.tensor(number, device=device)
    dist.all_reduce(seen, dist.ReduceOp.MAX)
    return int(seen)


def means_if_finite(values, names, done, source, config, rank):
    """Means by name of what the last steps gave, values (steps, names); else stop and say whose step it was."""
    bad = ~values.isfinite().all(1)
    if not bad.any():
        return dict(zip(names, values.mean(0).tolist(), strict=True))
    row = int(bad.nonzero()[0])
    step, found = done - len(values) + row, dict(zip(names, map(str, values[row].tolist()), strict=True))
    path, last = Path(config.out_dir) / "not_finite.json", Path(config.out_dir) / "last.pt"
    if rank == 0:
        ids = source.molecules.ids[source.chosen(step)].tolist()
        write_text(path, json.dumps({"step": step + 1, "losses": found, "molecules": ids}, indent=1) + "\n")
    good = f"{last} is from before" if last.exists() else "there is no checkpoint yet"
    barrier()  # torchrun ends the other ranks as soon as one is gone
    raise InputError(
        f"the loss is {found['loss']}, its gradient {found['grad_norm']} at step {step + 1}; {path} names that step's "
        f"molecules; {good}: {REMEDY}"
    )


def run_steps(config, source, start, take_step, validate, save, log, device, world):
    """The loop of both stages, from step start to max_steps or to a signal: it logs, validates and saves.

    take_step(step, parts) -> the learning rate, and this rank's share of the losses and of grad_norm, by name.
    """
    pinned = device.type == "cuda"
    steps = range(start, config.max_steps)
    loader = DataLoader(source, batch_size=None, sampler=steps, num_workers=config.num_workers, pin_memory=pinned)
    window, window_began = [], time.perf_counter()
    with stop_signals() as caught:
        for step, parts in enumerate(loader, start):
            lr, share = take_step(step, parts)
            window.append(torch.stack(list(share.values())))
            log.bar.update()

            done = step + 1
            last = done == config.max_steps
            stop = asked_to_stop(caught, done, device, world)
            logging = last or done % config.log_every == 0
            saving = last or stop or done % config.save_every == 0 or done in config.keep_steps
            if logging or saving:
                values = sum_over_ranks(torch.stack(window))
                means = means_if_finite(values, list(share), done, source, config, source.rank)
            if logging:
                elapsed = max(time.perf_counter() - window_began, 1e-9)
                rate = round(len(window) * config.batch_size / elapsed, 1)
                log.write({"step": done, "split": "train", **means, "lr": lr, "molecules_per_s": rate})
                window = []
            if last or done % config.val_every == 0:
                validate(done)
            if saving:
                save(done)
            if stop and not last:
                log.bar.close()
                barrier()  # torchrun ends the other ranks as soon as one is gone
                if source.rank:
                    raise SystemExit(128 + stop)
                name = signal.Signals(stop).name
                message = (
                    f"stopped by {name} after step {done}, which {config.out_dir}/last.pt holds: resume=true goes on"
                )
                raise InputError(message, code=128 + stop)
            if not window:
                window_began = time.perf_counter()


def open_data(config):
    if not config.data:
        raise InputError("data is not set: name an HDF5 file made by data.py", code=2)
    return Molecules(config.data)


def named_split(molecules, name):
    """Indices of a split that the file brings along, of all molecules if no name is given."""
    if name and name not in molecules.splits:
        has = ", ".join(molecules.splits) or "none"
        raise InputError(f"split = {name}: {molecules.path} has no such split, it has {has}", code=2)
    return molecules.splits[name] if name else np.arange(len(molecules))


def load_data(config, rank, world):
    """-> Molecules, the batches of this rank by step, the validation batches: those are the same for every seed."""
    molecules = open_data(config)
    index = named_split(molecules, config.split)
    if config.val_size >= len(index):
        raise InputError(f"val_size = {config.val_size}: {config.data} has {len(index)} molecules in all", code=2)
    val, train = (index[part] for part in split_indices(len(index), [config.val_size, None]))
    batches = StepBatches(molecules, train, config.batch_size, config.seed, rank, world, config.accumulate)
    return molecules, batches, validation_batches(molecules, val, config.inference_batch_size)


def check_compiler(device):
    """Compile a trifle that no cache holds: torch would look for its compiler only in the first step."""
    salt = time.time_ns() % 2**30
    try:
        torch.compile(lambda x: x.sin() * salt)(torch.zeros(2, device=device))
    except Exception as error:  # of many kinds, by what is missing
        cause = str(error).partition("\n")[0]
        remedy = "install a C++ compiler (on CUDA a C compiler), or set compile=false"
        raise InputError(f"compile = true: torch cannot compile here, {cause}: {remedy}") from None


def compile_layers(model, device):
    """Compile the attention layers: for all sizes at once, so that a resumed run has the bits of an unbroken one."""
    check_compiler(device)
    for layer in (m for m in model.modules() if isinstance(m, EquivariantMultiHeadAttention)):
        layer.compile(dynamic=True)


@contextmanager
def enough_memory():
    """What the allocator says of a model that is too large: as an InputError."""
    try:
        yield
    except RuntimeError as error:
        raise InputError(f"a model of this size cannot be made: {str(error).partition('. ')[0]}") from None


def make_model(config, device):
    torch.manual_seed(config.seed)
    with enough_memory():
        model = Pretraining(EquivariantTransformer(config.model), config).to(device)
    if config.compile:
        compile_layers(model, device)
    return model


def name_of(device):
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"


def describe(config, num_train, model, device, world):
    """The lines that say what is about to be trained, on what, where."""
    yield f"{config.objective} on {config.data}: {num_train:,} molecules to train, {config.val_size:,} to validate"
    yield f"{num_parameters(model):,} parameters, {num_parameters(model.encoder):,} of them the encoder"
    yield f"{world} x {name_of(device)}; {config.max_steps:,} steps of {config.batch_size} molecules"


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def final_metrics(config, model, first_val, last_val, wall_s, data_sha256):
    return {
        "val": last_val,
        "val_start": first_val,
        "units": dict.fromkeys(last_val, "mean square error of noise / sigma, per atom and axis"),
        "objective": config.objective,
        "seed": config.seed,
        "steps": config.max_steps,
        "parameters": num_parameters(model),
        "parameters_encoder": num_parameters(model.encoder),
        "wall_s": round(wall_s, 1),
        "data": config.data,
        "data_sha256": data_sha256,
    }


def processor():
    """Its name as Linux has it, its kind elsewhere."""
    try:
        named = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        named = None
    return f"cpu, {named[1] if named else platform.machine()}"


def provenance(device, world):
    """What made a result: command, commit, machine and versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # no git, or a copy without its history
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else processor(),
        "ranks": world,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def report(first_val, last_val):
    """The lines that say what became of each loss."""
    yield f"{'validation':<22}{'start':>10}{'end':>10}"
    for name in last_val:
        start = f"{first_val[name]:.4f}" if name in first_val else ""  # inference_batch_size 1 has nothing to shuffle
        yield f"{name:<22}{start:>10}{last_val[name]:>10.4f}"
    if "loss_rec_shuffled" in last_val:
        gap = last_val["loss_rec_shuffled"] - last_val["loss_rec"]
        yield f"{'gap':<22}{gap:>20.4f}  rec loss with another molecule's graph embedding, less that with the true one"


def pretrain(config, device, rank, world):
    """The whole run: data, model, start or resume, loop, figures."""
    folder = Path(config.out_dir)
    checkpoint = open_run_folder(config)

    made_by = provenance(device, world)  # now: the checkout may move on during a long run
    molecules, source, val_batches = load_data(config, rank, world)
    data_sha256 = molecules.sha256()

    model = make_model(config, device)
    net = model
    if dist.is_initialized():
        net = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)

    # start or resume
    start, elapsed, first_val, last_val = 0, 0.0, None, None
    if checkpoint:
        check_same_run(checkpoint, config, data_sha256)
        with fitting(f"{folder / 'last.pt'} does not fit this code's model"):
            model.load_state_dict(checkpoint["state_dict"])
            load_optimizer(optimizer, checkpoint["optimizer"], checkpoint["step"])
        figures = dict.fromkeys(("first_val", "last_val"), (dict, type(None)))
        check_kinds(checkpoint, figures, folder / "last.pt", "last.pt of pretrain.py")
        start, elapsed = checkpoint["step"], checkpoint["wall_s"]
        first_val, last_val = checkpoint["first_val"], checkpoint["last_val"]
    barrier()  # every rank has looked at the folder before rank 0 writes to it
    lock = claim_run_folder(config, start if checkpoint else None) if rank == 0 else None
    log = Log(folder / "log.jsonl", start, config.max_steps, active=rank == 0)
    for line in describe(config, len(source.index), model, device, world):
        log.say(line)
    if checkpoint:
        log.say(f"resumed {folder} at step {start}")
    began = time.perf_counter() - elapsed

    def save(step):
        if rank == 0:
            check_weights(model.state_dict(), f"step {step}")
            content = {
                "schema": "georecon/1",
                "config": asdict(config),
                "data_sha256": data_sha256,
                "step": step,
                "wall_s": time.perf_counter() - began,
                "first_val": first_val,
                "last_val": last_val,
                "state_dict": model.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            # last.pt comes last: killed in between, the run goes on from the step before and writes the others again
            save_torch(folder / "encoder.pt", save_encoder(model.encoder))
            if step in config.keep_steps:
                save_torch(folder / f"step_{step}.pt", content)
            save_torch(folder / "last.pt", content)

    def validate(step):
        nonlocal first_val, last_val
        last_val = evaluate(model, val_batches, device, config, rank, world)
        first_val = first_val or last_val
        log.write({"step": step, "split": "val", **last_val})

    if not first_val:
        validate(0)
    if start == 0 and 0 in config.keep_steps:
        save(0)

    def take_step(step, parts):
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, config)
        share = train_step(net, parts, step, device, config, world)
        share["grad_norm"] = grad_norm(model.parameters()) / world  # the ranks' shares are summed, the norm is the same
        optimizer.step()
        optimizer.zero_grad()
        return lr, share

    run_steps(config, source, start, take_step, validate, save, log, device, world)
    log.bar.close()
    if rank == 0:
        wall_s = time.perf_counter() - began
        metrics = final_metrics(config, model, first_val, last_val, wall_s, data_sha256)
        metrics |= made_by
        write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
        for line in report(first_val, last_val):
            log.say(line)
        lock.close()
        log.say(f"{wall_s:.0f} s; wrote config.yaml, log.jsonl, last.pt, encoder.pt, metrics.json to {folder}")


def run_stage(stage, kind, arguments):
    """Run stage(config, device, rank, world) from its command line, whose settings are the dataclass kind."""
    config = load_config(kind, arguments)
    tune_cpu()
    device, rank, world = set_up_process(config)
    stage(config, device, rank, world)
    leave_process()


def main(arguments):
    run_stage(pretrain, PretrainConfig, arguments)


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
