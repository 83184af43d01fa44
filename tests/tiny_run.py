"""A pretraining run of seconds, and what tests ask of it; the fixture `tiny` in conftest.py is its config."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent


DEMO = ROOT / "data/qm9_demo.h5"


TINY = {
    "data": str(DEMO),
    "val_size": 30,
    "batch_size": 8,
    "max_steps": 20,
    "lr": 1e-3,
    "lr_warmup_steps": 5,
    "lr_cosine_length": 20,
    "log_every": 1,
    "val_every": 10,
    "save_every": 7,
    "deterministic": torch.cuda.is_available(),  # on the CPU it always is
    "model": {"embedding_dimension": 16, "num_layers": 2, "num_rbf": 16, "num_heads": 4},
}


def launch(*arguments, ranks=0):
    """Start pretrain.py as a user does: plain, or under torchrun; on one thread, for equal bits."""
    command = [sys.executable]
    if ranks:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if ranks:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # over gloo: two ranks would need two GPUs
    command += [str(ROOT / "pretrain.py"), *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes)


def run(*arguments, ranks=0):
    process = launch(*arguments, ranks=ranks)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0 and "Warning" not in err, out + err
    return out


def read_log(folder, split="train"):
    records = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["split"] == split]


def same_bits(a, b):
    """Whether two checkpoints hold the same weights and optimizer state, bit for bit."""
    a, b = (torch.load(Path(folder) / "last.pt", weights_only=True) for folder in (a, b))
    moments = [
        (a["optimizer"]["state"][k][m], b["optimizer"]["state"][k][m])
        for k, s in a["optimizer"]["state"].items()
        for m in s
    ]
    weights = [(a["state_dict"][key], b["state_dict"][key]) for key in a["state_dict"]]
    return a["step"] == b["step"] and all(torch.equal(x, y) for x, y in weights + moments)
