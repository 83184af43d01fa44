"""Write tests/golden.json: losses of short runs of both stages, which test_golden.py compares with.

    python tests/make_golden.py                 all runs, half a minute on one core
    python tests/make_golden.py coord mu        these runs, printed; the file stays as it is

A run starts from its command line, and its figures are read from log.jsonl and metrics.json.
So the code in between may move freely.
Write the file anew only after a change that is meant to alter losses.

Runs are in float64. Processors, threads and versions of torch differ in rounding, and 20 steps
of Adam enlarge that: in float32 to 1e-4 of a figure, with whitening 2e-2; in float64 to 5e-11.
"""

import contextlib
import importlib
import io
import json
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch
import yaml

ROOT = Path(__file__).parent.parent
PATH = Path(__file__).with_name("golden.json")


@contextlib.contextmanager
def in_double():
    """Everything in float64 on the CPU: new tensors, and all that would be float32 in the program.

    Data and noise come from float32 arrays, labels through Tensor.float: only these are replaced.
    A place that asks for float32 in another way is to be added here.
    """
    from_numpy = torch.from_numpy

    def double_from_numpy(array):
        tensor = from_numpy(array)
        return tensor.double() if tensor.dtype == torch.float32 else tensor

    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch, "from_numpy", double_from_numpy),
            (torch.Tensor, "float", torch.Tensor.double),
            (torch.cuda, "is_available", lambda: False),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float64)
        yield


# ---------------------------------------------------------------- the runs

QM9, ETHANOL = ({"data": str(ROOT / f"data/{name}_demo.h5")} for name in ("qm9", "ethanol"))
PRETRAINED = {"init_from": str(ROOT / "results/encoders/georecon_s1.pt")}
STEPS = {"max_steps": 20, "log_every": 1, "val_every": 20}
TINY = {
    "val_size": 20,
    "batch_size": 4,
    "lr": 1e-3,
    "lr_warmup_steps": 5,
    "lr_cosine_length": 20,
    "model": {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4},
}
TEST = {"test_size": 20}  # molecules that fine-tuning evaluates at its end
FORCES = ETHANOL | TEST | {"target": "energy_forces"}
# weights at which each term counts, and a bound that about half of the steps reach
NOISE = {"position_noise_scale": 0.005, "clip_norm": 1, "energy_weight": 0.2, "force_weight": 0.01}
WHITEN = {"model.vec_norm_layer": "whiten", "model.vec_norm_out": "whiten"}
PROBE = PRETRAINED | {"freeze_encoder": "true", "train_size": 100, "val_every": 5, "lr": 1e-2}
# a learning rate that is so high that it falls twice
PLATEAU = {"lr_schedule": "plateau", "lr_patience": 0, "lr": 2e-2, "val_every": 2}
OPTIONS = PLATEAU | {"loss": "l1", "reduce": "mean", "accumulate": 2, "ema_decay": 0.9}

CASES = {  # name: stage, file in configs/ (none: TINY), settings
    "demo": ("pretrain", "demo.yaml", QM9),
    "demo_forces": ("finetune", "demo_forces.yaml", ETHANOL),
    "demo_gap": ("finetune", "demo_gap.yaml", QM9),
    "coord": ("pretrain", None, QM9 | {"objective": "coord"}),
    "georecon": ("pretrain", None, QM9),
    "alpha": ("pretrain", None, QM9 | {"alpha": 1.2}),
    "rec_only": ("pretrain", None, QM9 | {"objective": "rec_only"}),
    "attention": ("pretrain", None, QM9 | {"pooling": "attention"}),
    "no_graph_emb": ("pretrain", None, QM9 | {"decoder_graph_emb": "false"}),
    "decoder": ("pretrain", None, QM9 | {"decoder_layers": 2, "decoder_vec": "false"}),
    "whiten": ("pretrain", None, QM9 | WHITEN),
    "accumulate": ("pretrain", None, QM9 | {"accumulate": 2}),
    "forces": ("finetune", None, FORCES),
    "forces_noise": ("finetune", None, FORCES | NOISE),
    "U0": ("finetune", None, QM9 | TEST | {"target": "U0"}),
    "mu": ("finetune", None, QM9 | TEST | {"target": "mu"}),
    "r2": ("finetune", None, QM9 | TEST | {"target": "r2"}),
    "options": ("finetune", None, QM9 | TEST | {"target": "gap"} | OPTIONS),
    "pretrained": ("finetune", None, QM9 | TEST | {"target": "gap"} | PRETRAINED),
    "probe": ("finetune", None, QM9 | TEST | {"target": "gap"} | PROBE),
}


def figures(folder):
    """{split and name: values} of the losses that a run logged, and of the errors at its end."""
    found = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name in record.keys() - {"step", "split", "lr", "molecules_per_s"}:
            found.setdefault(f"{record['split']} {name}", []).append(record[name])
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    for split, errors in {"val": metrics["val"], **metrics.get("test", {})}.items():
        if not any(name.endswith("_ridge") for name in errors):  # of all but a probe the file has no constant
            errors = {name: value for name, value in errors.items() if not name.endswith("_constant")}
        found |= {f"final {split} {name}": [value] for name, value in errors.items()}
    return found


def run(name, folder):
    """Run a case in an empty folder -> its figures."""
    stage, config, settings = CASES[name]
    path = ROOT / "configs" / config if config else folder / "tiny.yaml"
    if not config:
        path.write_text(yaml.safe_dump(TINY))
    settings = STEPS | settings | {"out_dir": folder / "run"}
    sys.path[:0] = [] if str(ROOT) in sys.path else [str(ROOT)]
    with in_double():
        main = importlib.import_module(stage).main
        main([str(path), *(f"{key}={value}" for key, value in settings.items())])
    return figures(folder / "run")


def written(golden):
    """json with a line for each series; ten digits are enough to compare to 1e-6."""
    cases = []
    for name, found in golden.items():
        rounded = {key: [float(f"{value:.10g}") for value in found[key]] for key in sorted(found)}
        lines = (f"  {json.dumps(key)}: {json.dumps(values)}" for key, values in rounded.items())
        cases.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(cases) + "\n}\n"


if __name__ == "__main__":
    golden = {}
    for name in sys.argv[1:] or CASES:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            golden[name] = run(name, Path(folder))
    if sys.argv[1:]:
        print(written(golden), end="")
    else:
        PATH.write_text(written(golden), encoding="utf-8")
        print(f"{PATH.name}: {PATH.stat().st_size:,} bytes")
