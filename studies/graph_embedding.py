"""Analysis: does the decoder use the graph embedding g, and what does g hold? Beyond the paper.

    python -m studies.graph_embedding out/a/last.pt out/b/last.pt data=data/qm9_demo.h5

    rec loss          with the molecule's own g; its rise with the g of another molecule of the same
                      size, of an isomer (no atoms to count), and with the mean g (it tells nothing)
    linear readouts   R^2 of ridge regressions from g: number of atoms, composition, and, beyond the
                      composition, radius of gyration and mean cosine of the torsion angles
    identity          how often a noised molecule's g lies nearest to its own clean g, among isomers

Settings come after the checkpoints, key=value. Writes graph_embedding.json to out_dir.
"""

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from data import Molecules, choose
from finetune import ridge
from harness.errors import InputError, cli, explain, need
from harness.files import check_new, names_of, provenance, write_json
from harness.ranks import tune_cpu
from harness.settings import build_config, read_arguments
from harness.weights import read_torch
from model import new_encoder, scatter_mean, setting
from pretrain import GraphPooling, PretrainConfig, Pretraining, validation_batches


@dataclass(frozen=True)
class GraphEmbeddingConfig:
    """What is measured, and on how many molecules."""

    data: str = "data/qm9_demo.h5"  # HDF5 file made by data.py
    split: str = ""  # a named split of the file; empty: all its molecules
    num_molecules: int = setting(2000, low=10)  # of them, at random
    batch_size: int = setting(100, low=1)  # molecules at a time
    seed: int = setting(0, low=0)  # of the choice of other molecules
    out_dir: str = "out/graph_embedding"


def load_method(path):
    """-> Pretraining of a last.pt or step_<n>.pt of pretrain.py, and its settings."""
    content = read_torch(path, "name a last.pt or step_<n>.pt of pretrain.py")
    with explain(f"{path} is no last.pt or step_<n>.pt of pretrain.py"):
        if content["schema"] != "georecon/1":
            raise ValueError(f"its schema is {content['schema']}")
        config = build_config(PretrainConfig, content["config"])
        method = Pretraining(new_encoder(config.model), config)
        method.load_state_dict(content["state_dict"])
    return method.eval().requires_grad_(False), config


def groups(keys):
    """Places of equal keys: list -> {key: array of places}."""
    return {key: np.flatnonzero([k == key for k in keys]) for key in dict.fromkeys(keys)}


def others(keys, rng):
    """For each place another of the same key, by a random cycle; -1 where there is none."""
    other = np.full(len(keys), -1)
    for places in groups(keys).values():
        if len(places) > 1:
            order = rng.permutation(places)
            other[order] = np.roll(order, 1)
    return other


@torch.no_grad()
def encode_all(method, config, batches):
    """All molecules: g clean (M, F), g noised (M, F), what the decoder starts from, by batch."""
    pooling = getattr(method, "pooling", GraphPooling("mean", config.model.embedding_dimension))
    clean, noised, starts = [], [], []
    for part in batches:
        z, pos, batch, num = part["z"], part["pos"], part["batch"], part["num_molecules"]
        clean.append(pooling(method.encoder(z, pos, batch)[0], batch, num))
        x, vec = method.encoder(z, pos + config.position_noise_scale * part["noise"], batch)
        noised.append(pooling(x, batch, num))
        pos_rec = pos + config.alpha * config.position_noise_scale * part["noise"]
        if config.alpha != 1:
            x, vec = method.encoder(z, pos_rec, batch)
        starts.append((x, vec, pos_rec, batch, config.alpha * part["noise"]))
    return torch.cat(clean), torch.cat(noised), starts


@torch.no_grad()
def rec_losses(method, config, starts, graph_emb):
    """Rec loss of each molecule with these graph embeddings (M, F): -> (M,)."""
    losses, sizes = [], [int(batch[-1]) + 1 for *_, batch, _ in starts]
    for (x, vec, pos, batch, target), g in zip(starts, graph_emb.split(sizes), strict=True):
        predicted = method.decoder(x, vec if config.decoder_vec else None, g, pos, batch)
        losses.append(scatter_mean((predicted - target).square().mean(1), batch, len(g)))
    return torch.cat(losses).double()


def use(method, config, starts, clean, sizes, formulas, rng):
    """Rise of the rec loss with another's g, in % of that with the true g, and standard errors."""
    true = rec_losses(method, config, starts, clean)
    figures = {"rec_loss": true.mean().item()}
    replacements = {"same_size": others(sizes, rng), "isomer": others(formulas, rng)}
    for name, other in replacements.items():
        valid = torch.from_numpy(other >= 0)
        if valid.sum() < 2:
            continue
        wrong = rec_losses(method, config, starts, clean[other.clip(0)])
        rise = (wrong - true)[valid] / true[valid].mean()
        figures[f"rise_{name}"] = 100 * rise.mean().item()
        figures[f"rise_{name}_error"] = 100 * rise.std().item() / math.sqrt(len(rise))
    blank = rec_losses(method, config, starts, clean.mean(0).expand_as(clean))
    return figures | {"rise_mean": 100 * (blank.mean() / true.mean() - 1).item()}


def mean_cosine_of_torsions(z, pos):
    """Mean cos(torsion angle) over chains of four bonded atoms without hydrogen; nan: none."""
    ase, analysis = need("ase", "torsions"), need("ase.geometry.analysis", "torsions")
    heavy = z > 1
    if heavy.sum() < 4:
        return math.nan
    atoms = ase.Atoms(z[heavy], pos[heavy])
    dihedrals = analysis.Analysis(atoms).unique_dihedrals[0]
    chains = [(first, *rest) for first, found in enumerate(dihedrals) for rest in found]
    return np.cos(np.radians(atoms.get_dihedrals(chains))).mean() if chains else math.nan


def descriptors(arrays, num_molecules):
    """Each molecule's number of atoms, of each element (M, E), radius of gyration, torsions."""
    z, pos, batch = (arrays[name].numpy() for name in ("z", "pos", "batch"))
    molecules = [(z[batch == m], pos[batch == m].astype(float)) for m in range(num_molecules)]
    elements = np.unique(z)
    return SimpleNamespace(
        size=np.array([len(z) for z, _ in molecules], dtype=float),
        composition=np.array([(z[:, None] == elements).sum(0) for z, _ in molecules], dtype=float),
        gyration=np.array([np.sqrt(((p - p.mean(0)) ** 2).sum(1).mean()) for _, p in molecules]),
        torsion=np.array([mean_cosine_of_torsions(*molecule) for molecule in molecules]),
    )


def r_squared(features, y):
    """R^2 of a ridge regression on the last fifth; fitted on three, the penalty chosen on one.

    None where one of the three parts has fewer than ten molecules or does not vary.
    """
    known = np.isfinite(y)
    features, y = features[known], torch.from_numpy(y[known])
    a, b = int(0.6 * len(y)), int(0.8 * len(y))
    parts = y[:a], y[a:b], y[b:]
    if min(map(len, parts)) < 10 or min(part.std() for part in parts) < 1e-9:
        return None
    features = (features - features[:a].mean(0)) / features[:a].std(0).clamp(min=1e-8)
    y = y - y[:a].mean()
    w = ridge(features[:a], y[:a], features[a:b], y[a:b])
    rest, whole = features[b:] @ w - y[b:], y[b:] - y[b:].mean()
    return 1 - (rest.square().sum() / whole.square().sum()).item()


def beyond(composition, y):
    """y less its least-squares prediction from the composition, fitted where r_squared fits."""
    fitted = np.flatnonzero(np.isfinite(y))
    fitted = fitted[: int(0.6 * len(fitted))]
    counts = np.column_stack([composition, np.ones(len(y))])
    return y - counts @ np.linalg.lstsq(counts[fitted], y[fitted], rcond=None)[0]


def identified(clean, noised, formulas):
    """How often the nearest clean g to a noised g, standardised, is its own, among its isomers'."""
    scale = clean.std(0).clamp(min=1e-8)
    isomers = [places for places in groups(formulas).values() if len(places) > 1]
    right, total = 0, max(sum(map(len, isomers)), 1)
    for places in isomers:
        distances = torch.cdist(noised[places] / scale, clean[places] / scale)
        right += (distances.argmin(1) == torch.arange(len(places))).sum().item()
    return {"identified": right / total, "identified_by_chance": len(isomers) / total}


def hold(clean, noised, known, formulas):
    """What can be read from g."""
    g = clean.double()
    counted = [r2 for column in known.composition.T if (r2 := r_squared(g, column)) is not None]
    return {
        "r2_size": r_squared(g, known.size),
        "r2_composition": float(np.mean(counted)) if counted else None,
        "r2_gyration": r_squared(g, beyond(known.composition, known.gyration)),
        "r2_torsion": r_squared(g, beyond(known.composition, known.torsion)),
        **identified(g, noised.double(), formulas),
    }


# table: figure and heading
COLUMNS = {"rec_loss": "rec loss", "rise_same_size": "size, %", "rise_isomer": "isomer, %"}
COLUMNS |= {"rise_isomer_error": "+-", "rise_mean": "mean, %", "r2_size": "R2 size"}
COLUMNS |= {"r2_composition": "R2 comp.", "r2_gyration": "R2 gyr.", "r2_torsion": "R2 tors."}
COLUMNS |= {"identified": "identity", "identified_by_chance": "(chance)"}


def table(results):
    """Lines of the table, a checkpoint a row: how g is used, and what can be read from it."""
    width = max(map(len, results)) + 1
    yield " " * width + "".join(f"{heading:>10}" for heading in COLUMNS.values())
    for label, figures in results.items():
        values = [figures.get(name) for name in COLUMNS]
        cells = [f"{'':>10}" if value is None else f"{value:>10.4f}" for value in values]
        yield f"{label:<{width}}" + "".join(cells)


def study(paths, config):
    """The figures of each checkpoint in paths."""
    names, methods = names_of(paths), [load_method(path) for path in paths]
    molecules = Molecules(config.data)
    index = choose(molecules, config.split, config.num_molecules, "num_molecules")
    molecules.check_elements(index, min(settings.model.max_z for _, settings in methods))
    known = descriptors(molecules.read(index), len(index))
    formulas = [tuple(row) for row in known.composition]
    batches = validation_batches(molecules, index, config.batch_size)
    results = {}
    for path, name, (method, settings) in zip(paths, names, methods, strict=True):
        with explain("the radius graph", ValueError):
            clean, noised, starts = encode_all(method, settings, batches)
        results[name] = hold(clean, noised, known, formulas)
        if hasattr(method, "decoder") and settings.decoder_graph_emb:
            rng, sizes = np.random.default_rng(config.seed), known.size.tolist()
            results[name] |= use(method, settings, starts, clean, sizes, formulas, rng)
        if not all(math.isfinite(value) for value in results[name].values() if value is not None):
            raise InputError(f"{path}: its figures are not finite: take an earlier step_<n>.pt")
    return results


def main(arguments):
    paths, config = read_arguments(GraphEmbeddingConfig, arguments)
    if not paths:
        raise InputError("name one last.pt or more, such as out/demo/last.pt", code=2)
    path = Path(config.out_dir) / "graph_embedding.json"
    check_new(path, make_folder=True)
    tune_cpu()
    made_by, began = provenance(torch.device("cpu")), time.perf_counter()
    results = study(paths, config)
    print("\n".join(table(results)))
    result = {"checkpoints": results, "settings": asdict(config)}
    write_json(path, result | {"wall_s": round(time.perf_counter() - began, 1), **made_by})
    print(f"{time.perf_counter() - began:.0f} s; wrote {path}")


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
