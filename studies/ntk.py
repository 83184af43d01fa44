"""Analysis: does fine-tuning stay where the network is linear in its weights? Table 8.

    python finetune.py configs/demo_gap.yaml keep_steps=0,20,40,60,80,100 out_dir=out/kept
    python -m studies.ntk out/kept/step_*.pt data=data/qm9_demo.h5

compares the network at each step_<n>.pt, on molecules of data, with its linearisation at the first,
which is its neural tangent kernel's. Settings, key=value, come after the checkpoints: data, split,
num_molecules, out_dir (default out/ntk, for ntk.json).
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, mse_loss

from data import Molecules, choose
from finetune import FinetuneConfig, PropertyModel, head_of
from harness.errors import InputError, cli, explain
from harness.files import check_new, provenance, write_json
from harness.folder import FREE_TO_CHANGE, LAST
from harness.ranks import tune_cpu
from harness.settings import build_config, read_arguments
from harness.weights import read_torch, require
from lipschitz import aligned
from model import new_encoder, setting


@dataclass(frozen=True)
class NtkConfig:
    """On what the networks are compared."""

    data: str = "data/qm9_demo.h5"  # HDF5 file made by data.py
    split: str = ""  # a named split of the file; empty: all its molecules
    num_molecules: int = setting(100, low=1)  # of them, at random
    out_dir: str = "out/ntk"


def load_step(path):
    """A step_<n>.pt of finetune.py -> step, PropertyModel in float64, target, the run."""
    content = read_torch(path, "name step_<n>.pt of a run of finetune.py with keep_steps=")
    with explain(f"{path} is no step_<n>.pt of finetune.py"):
        require(content, LAST, "the file")
        config = build_config(FinetuneConfig, content["config"])
        encoder = new_encoder(config.model)
        model = PropertyModel(encoder, head_of(config), config.reduce, [0.0] * config.model.max_z)
        model.load_state_dict({k[6:]: v for k, v in content["state_dict"].items() if k.startswith("model.")})
        if not model.std > 0 or content["step"] < 0:
            raise ValueError(f"its std is {model.std.item()}, its step {content['step']}")
    run = {k: v for k, v in content["config"].items() if k not in FREE_TO_CHANGE}
    return content["step"], model.double(), config.target, (run, content["data_sha256"])


def linearisation(models, z, pos, batch, y):
    """Compare f(theta_t) with f(theta_0) + J(theta_0) (theta_t - theta_0): -> a dict per model.

    PAPER-SILENT: of what the cosines are. Predictions y' (B,): as they are, and their change since
    theta_0. Gradients of the mean square error: against that at theta_0, and the linearisation's.
    """
    first = {name: p.detach() for name, p in models[0].named_parameters()}

    def f(parameters):
        return torch.func.functional_call(models[0], parameters, (z, pos, batch, len(y)))[0]

    def gradient(parameters, change=0.0):
        """Predictions, and the gradient of the mean square error of f + change; change moves no weight."""
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        predicted = f(leaves)
        found = torch.autograd.grad(mse_loss(predicted + change, y), leaves.values(), materialize_grads=True)
        return predicted.detach(), torch.cat([t.flatten() for t in found])

    start, start_gradient = gradient(first)
    for model in models:
        now = dict(model.named_parameters())
        move = {name: (now[name] - p).detach() for name, p in first.items()}
        _, change = torch.func.jvp(f, (first,), (move,))
        predicted, now_gradient = gradient(now)
        _, linear = gradient(first, change)
        yield {
            "prediction": cosine_similarity(predicted, start + change, dim=0).item(),
            "prediction_change": cosine_similarity(predicted - start, change, dim=0).item(),
            "gradient_start": cosine_similarity(now_gradient, start_gradient, dim=0).item(),
            "gradient_linear": cosine_similarity(now_gradient, linear, dim=0).item(),
        }


def compare(paths, config):
    """-> {step: figures} of a run's checkpoints, of which the first is theta_0, and the target."""
    loaded = sorted(((*load_step(path), path) for path in paths), key=lambda entry: entry[0])
    steps, models = [entry[0] for entry in loaded], [entry[1] for entry in loaded]
    if len(set(steps)) < max(2, len(steps)) or any(entry[3] != loaded[0][3] for entry in loaded):
        raise InputError("name two or more different steps of one run, its step_<n>.pt", code=2)
    molecules = Molecules(config.data)
    target = "energy" if loaded[0][2] == "energy_forces" else loaded[0][2]
    index = choose(molecules, config.split, config.num_molecules, "num_molecules", target)
    molecules.check_elements(index, models[0].encoder.config.max_z)
    arrays = molecules.read(index)
    z, pos, batch = arrays["z"], arrays["pos"].double(), arrays["batch"]
    rest = torch.from_numpy(molecules.label(target)[index])
    rest = rest - models[0].restore(torch.zeros(len(index)), z, batch)
    if not rest.isfinite().all():
        raise InputError(f"{molecules.path}: {target} is not finite everywhere: see data.py info")
    rows = dict(zip(steps, linearisation(models, z, pos, batch, rest / models[0].std), strict=True))
    for row, (*_, path) in zip(rows.values(), loaded, strict=True):
        if not all(map(math.isfinite, row.values())):
            raise InputError(f"{path}: its figures are not finite: leave that step out")
    return rows, target


def thirds(rows):
    """Means over the thirds of a run: hundreds of steps, as in Table 8, if it has 300."""
    means, edges = {}, np.linspace(min(rows), max(rows), 4).round().astype(int)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        if inside := [row for step, row in rows.items() if low < step <= high]:
            means[f"{low}-{high}"] = {name: sum(row[name] for row in inside) / len(inside) for name in inside[0]}
    return means


def main(arguments):
    paths, config = read_arguments(NtkConfig, arguments)
    path = Path(config.out_dir) / "ntk.json"
    check_new(path, make_folder=True)
    tune_cpu()
    made_by = provenance(torch.device("cpu"))
    rows, target = compare(paths, config)
    print("\n".join(aligned(thirds(rows))))
    write_json(path, {"steps": rows, "target": target, "checkpoints": paths, "settings": asdict(config)} | made_by)
    print(f"wrote {path}")


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
