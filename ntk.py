"""Analysis: does fine-tuning stay where the network is linear in its weights, as a neural tangent kernel is? Table 8.

    python finetune.py configs/demo_gap.yaml keep_steps=0,20,40,60,80,100 out_dir=out/kept
    python ntk.py out/kept/step_*.pt data=data/qm9_demo.h5

compares the network at each step_<n>.pt, on molecules of data, with its linearisation at the first. After the
checkpoints come settings, key=value: data, split, num_molecules, out_dir (default out/ntk, for ntk.json).
"""

import math
import time
from dataclasses import asdict, dataclass

import torch
from torch.nn.functional import cosine_similarity, mse_loss

from data import InputError, cli
from finetune import TARGETS, FinetuneConfig, PropertyModel, Target, read_weights
from lipschitz import check_elements, choose, new_file, read_arguments, write_result
from model import EquivariantTransformer, setting
from pretrain import FREE_TO_CHANGE, build_config, check_kinds, fitting, flatten, provenance, tune_cpu


@dataclass(frozen=True)
class NtkConfig:
    """On what the networks are compared."""

    data: str = "data/qm9_demo.h5"  # HDF5 file made by data.py
    split: str = ""  # a named split of the file; empty: all its molecules
    num_molecules: int = setting(100, low=1)  # of them, at random
    out_dir: str = "out/ntk"


def load_step(path):
    """-> PropertyModel in float64, FinetuneConfig, step, settings of the run, of a step_<n>.pt of finetune.py."""
    content = read_weights(path, "name step_<n>.pt of a run of finetune.py with keep_steps=")
    what = "step_<n>.pt of finetune.py"
    check_kinds(content, {"config": dict, "step": int, "data_sha256": str, "state_dict": dict}, path, what)
    with fitting(f"{path} is no {what}"):
        config = build_config(FinetuneConfig, content["config"])
        head = TARGETS.get(config.target, Target()).head if config.head == "auto" else config.head
        encoder = EquivariantTransformer(config.model)
        model = PropertyModel(encoder, head, config.reduce, [0.0] * config.model.max_z)
        weights = {
            key.removeprefix("model."): v for key, v in content["state_dict"].items() if key.startswith("model.")
        }
        model.load_state_dict(weights)
        if not model.std > 0 or type(content["step"]) is bool or content["step"] < 0:
            raise ValueError(f"its std is {model.std.item()}, its step {content['step']}")
    run = {key: value for key, value in flatten(content["config"]).items() if key not in FREE_TO_CHANGE}
    return model.double(), config, content["step"], run | {"data_sha256": content["data_sha256"]}


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def linearisation(models, z, pos, batch, y):
    """Compare f(theta_t) with f_lin(theta_t) = f(theta_0) + J(theta_0) (theta_t - theta_0): -> a dict per model.

    PAPER-SILENT: of what the cosines are. Predictions on the batch, y' (B,): as they are, and their change since
    theta_0. Gradients of the mean square error by all parameters: against that at theta_0, and against that of f_lin.
    """
    first = dict(models[0].named_parameters())

    def f(parameters):
        return torch.func.functional_call(models[0], parameters, (z, pos, batch, len(y)))[0]

    def gradient(parameters):
        leaves = {name: p.detach().requires_grad_() for name, p in parameters.items()}
        predicted = f(leaves)
        used = torch.autograd.grad(mse_loss(predicted, y), leaves.values(), materialize_grads=True)
        return predicted.detach(), flat(used)

    start, start_gradient = gradient(first)
    for model in models:
        now = dict(model.named_parameters())
        move = {name: (now[name] - p).detach() for name, p in first.items()}
        _, change = torch.func.jvp(f, ({k: p.detach() for k, p in first.items()},), (move,))
        predicted, now_gradient = gradient(now)
        leaves = {name: p.detach().requires_grad_() for name, p in first.items()}
        residual = 2 * (start + change - y) / len(y)  # d MSE / d f at f_lin(theta_t)
        linear = flat(torch.autograd.grad(f(leaves), leaves.values(), residual, materialize_grads=True))
        yield {
            "prediction": cosine_similarity(predicted, start + change, dim=0).item(),
            "prediction_change": cosine_similarity(predicted - start, change, dim=0).item(),
            "gradient_start": cosine_similarity(now_gradient, start_gradient, dim=0).item(),
            "gradient_linear": cosine_similarity(now_gradient, linear, dim=0).item(),
        }


def compare(paths, config):
    """-> {step: figures} of a fine-tuning run's checkpoints, the first of which is theta_0, and their target."""
    loaded = sorted(((*load_step(path), path) for path in paths), key=lambda entry: entry[2])
    models, steps = [entry[0] for entry in loaded], [entry[2] for entry in loaded]
    if len(set(steps)) < max(2, len(steps)) or any(run != loaded[0][3] for *_, run, _ in loaded):
        raise InputError("ntk compares two or more different steps of one run: name its step_<n>.pt", code=2)
    molecules, index = choose(config)
    check_elements(molecules, index, [models[0].encoder])
    target = "energy" if loaded[0][1].target == "energy_forces" else loaded[0][1].target
    arrays = molecules.read(index)
    z, pos, batch = arrays["z"], arrays["pos"].double(), arrays["batch"]
    rest = torch.from_numpy(molecules.label(target)[index]) - models[0].restore(torch.zeros(len(index)), z, batch)
    if not rest.isfinite().all():
        raise InputError(f"{molecules.path}: {target} is not finite everywhere: look at it with data.py info")
    rows = dict(zip(steps, linearisation(models, z, pos, batch, rest / models[0].std), strict=True))
    for row, (*_, path) in zip(rows.values(), loaded, strict=True):
        if not all(map(math.isfinite, row.values())):
            raise InputError(f"{path}: its figures are not finite: leave that step out")
    return rows, target


def table(rows):
    """Means over bins of a hundred steps, as in Table 8; over thirds of a shorter run."""
    steps, names = list(rows), list(next(iter(rows.values())))
    yield f"{'steps':<12}" + "".join(f"{name:>20}" for name in names)
    span = steps[-1] - steps[0]
    width = 100 if span >= 100 else math.ceil(span / 3)
    for start in range(steps[0], steps[-1], width):
        inside = [row for step, row in rows.items() if start < step <= start + width]
        if inside:
            means = "".join(f"{sum(row[name] for row in inside) / len(inside):>20.4f}" for name in names)
            yield f"{f'{start}-{min(start + width, steps[-1])}':<12}{means}"
    if steps[0]:
        yield f"the linearisation is at step {steps[0]}; Table 8's is at the pretrained weights, step 0"


def main(arguments):
    paths, config = read_arguments(NtkConfig, arguments)
    path = new_file(config.out_dir, "ntk.json")
    tune_cpu()
    made_by, began = provenance(torch.device("cpu"), 1), time.perf_counter()
    rows, target = compare(paths, config)
    print("\n".join(table(rows)))
    result = {"steps": rows, "target": target, "checkpoints": paths, "settings": asdict(config)}
    write_result(path, result | {"wall_s": round(time.perf_counter() - began, 1), **made_by})
    print(f"{time.perf_counter() - began:.0f} s; wrote {path}")


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
