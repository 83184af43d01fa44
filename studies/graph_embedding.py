"""Analysis: does the decoder use the graph embedding g? Beyond the paper.

    python -m studies.graph_embedding out/a/last.pt out/b/last.pt data=data/qm9_demo.h5

prints the rec loss with the molecule's own g, and its rise with the g of an isomer (no atoms to
count) and with the mean g (it tells nothing). Settings come after the checkpoints, key=value.
Writes graph_embedding.json to out_dir.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from data import Molecules, choose
from harness.errors import InputError, cli, explain
from harness.files import check_new, provenance, write_json
from harness.ranks import tune_cpu
from harness.settings import build_config, read_arguments
from harness.weights import read_torch, require
from lipschitz import aligned, names_of
from model import new_encoder, scatter_mean, setting
from pretrain import PretrainConfig, Pretraining, validation_batches


@dataclass(frozen=True)
class GraphEmbeddingConfig:
    """What is measured, and on how many molecules."""

    data: str = "data/qm9_demo.h5"  # HDF5 file made by data.py
    split: str = ""  # a named split of the file; empty: all its molecules
    num_molecules: int = setting(2000, low=10)  # of them, at random
    out_dir: str = "out/graph_embedding"


def load_method(path):
    """-> Pretraining of a last.pt or step_<n>.pt of pretrain.py, and its settings."""
    content = read_torch(path, "name a last.pt or step_<n>.pt of pretrain.py")
    with explain(f"{path} is no last.pt or step_<n>.pt of pretrain.py"):
        require(content, {"schema": "georecon/1", "config": dict, "state_dict": dict}, "the file")
        config = build_config(PretrainConfig, content["config"])
        if config.objective not in ("georecon", "rec_only") or not config.decoder_graph_emb:
            raise ValueError("it has no decoder that is given g")
        method = Pretraining(new_encoder(config.model), config)
        method.load_state_dict(content["state_dict"])
    return method.eval().requires_grad_(False), config


def others(keys, rng):
    """For each place another of the same key, by a random cycle; -1 where there is none."""
    other = np.full(len(keys), -1)
    for key in dict.fromkeys(keys):
        places = np.flatnonzero([k == key for k in keys])
        if len(places) > 1:
            order = rng.permutation(places)
            other[order] = np.roll(order, 1)
    return other


@torch.no_grad()
def encode_all(method, config, batches):
    """All molecules: g (M, F), and what the decoder starts from, by batch."""
    clean, starts = [], []
    for part in batches:
        z, pos, batch, num = part["z"], part["pos"], part["batch"], part["num_molecules"]
        clean.append(method.pooling(method.encoder(z, pos, batch)[0], batch, num))
        pos_rec = pos + config.alpha * config.position_noise_scale * part["noise"]
        x, vec = method.encoder(z, pos_rec, batch)
        target = (config.alpha if config.rec_target == "scaled" else 1) * part["noise"]
        starts.append((x, vec, pos_rec, batch, target))
    return torch.cat(clean), starts


@torch.no_grad()
def rec_losses(method, config, starts, graph_emb):
    """Rec loss of each molecule with these graph embeddings (M, F): -> (M,)."""
    losses, sizes = [], [int(batch[-1]) + 1 for *_, batch, _ in starts]
    for (x, vec, pos, batch, target), g in zip(starts, graph_emb.split(sizes), strict=True):
        predicted = method.decoder(x, vec if config.decoder_vec else None, g, pos, batch)
        losses.append(scatter_mean((predicted - target).square().mean(1), batch, len(g)))
    return torch.cat(losses).double()


def use(method, config, starts, clean, formulas):
    """Rise of the rec loss with an isomer's g and with the mean g, in % of that with the true g."""
    true = rec_losses(method, config, starts, clean)
    figures = {"rec_loss": true.mean().item()}
    other = others(formulas, np.random.default_rng(0))
    valid = torch.from_numpy(other >= 0)
    if valid.sum() > 1:
        wrong = rec_losses(method, config, starts, clean[other.clip(0)])
        figures["rise_isomer"] = 100 * ((wrong - true)[valid].mean() / true[valid].mean()).item()
    blank = rec_losses(method, config, starts, clean.mean(0).expand_as(clean))
    return figures | {"rise_mean": 100 * (blank.mean() / true.mean() - 1).item()}


def study(paths, config):
    """The figures of each checkpoint in paths."""
    names, methods = names_of(paths), [load_method(path) for path in paths]
    molecules = Molecules(config.data)
    index = choose(molecules, config.split, config.num_molecules, "num_molecules")
    max_z = min(settings.model.max_z for _, settings in methods)
    molecules.check_elements(index, max_z)
    formulas = [tuple(row) for row in molecules.composition(index, max_z)]
    batches = validation_batches(molecules, index, 100)
    results = {}
    for path, name, (method, settings) in zip(paths, names, methods, strict=True):
        with explain("the radius graph", ValueError):
            clean, starts = encode_all(method, settings, batches)
        results[name] = use(method, settings, starts, clean, formulas)
        if not all(math.isfinite(value) for value in results[name].values()):
            raise InputError(f"{path}: its figures are not finite: take an earlier step_<n>.pt")
    return results


def main(arguments):
    paths, config = read_arguments(GraphEmbeddingConfig, arguments)
    if not paths:
        raise InputError("name one last.pt or more, such as out/demo/last.pt", code=2)
    path = Path(config.out_dir) / "graph_embedding.json"
    check_new(path, make_folder=True)
    tune_cpu()
    made_by = provenance(torch.device("cpu"))
    results = study(paths, config)
    print("\n".join(aligned(results)))
    write_json(path, {"checkpoints": results, "settings": asdict(config)} | made_by)
    print(f"wrote {path}")


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
