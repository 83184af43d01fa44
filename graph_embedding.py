"""Analysis: does the decoder use the graph embedding g, and what does g hold? Beyond the paper.

    python graph_embedding.py out/a/last.pt out/b/last.pt data=data/qm9_demo.h5 [key=value ...]

    rec loss          of the decoder with the molecule's own g, and how it rises with g of another molecule of the same
                      size, of an isomer (so that it is not counting atoms), and with the mean g, which tells nothing
    linear readouts   R^2 of ridge regressions from g: number of atoms, composition, and, of what
                      composition does not predict, the radius of gyration and the mean cosine of the torsion angles
    identity          how often g of a noised molecule lies nearest to its own clean g among all its isomers

Writes graph_embedding.json to out_dir (default out/graph_embedding).
"""

import math
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from types import SimpleNamespace

import numpy as np
import torch

from data import InputError, cli, need
from finetune import encode, read_weights, ridge
from lipschitz import check_elements, choose, names_of, new_file, read_arguments, write_result
from model import EquivariantTransformer, GraphPooling, Pretraining, scatter_mean, setting
from pretrain import (
    PretrainConfig,
    build_config,
    fitting,
    provenance,
    tune_cpu,
    validation_batches,
)


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
    """-> Pretraining of a last.pt or step_<n>.pt of pretrain.py."""
    content = read_weights(path, "name a last.pt or step_<n>.pt of pretrain.py")
    with fitting(f"{path} is no last.pt or step_<n>.pt of pretrain.py"):
        if content["schema"] != "georecon/1":
            raise ValueError(f"its schema is {content['schema']}")
        config = build_config(PretrainConfig, content["config"])
        method = Pretraining(EquivariantTransformer(config.model), config)
        method.load_state_dict(content["state_dict"])
    return method.eval().requires_grad_(False), config


# ---------------------------------------------------------------- is it used?


def groups(keys):
    """Places of equal keys: list -> {key: array of places}."""
    found = defaultdict(list)
    for place, key in enumerate(keys):
        found[key].append(place)
    return {key: np.array(places) for key, places in found.items()}


def others(keys, rng):
    """For each place another one of the same key, by a random cycle through them; -1 where there is none."""
    found = np.full(len(keys), -1)
    for places in groups(keys).values():
        if len(places) > 1:
            order = rng.permutation(places)
            found[order] = np.roll(order, 1)
    return found


@torch.no_grad()
def encode_all(method, config, batches):
    """Of every molecule: g clean, g noised, and what the decoder starts from: (M, F), (M, F), [a tuple a batch]."""
    pooling = getattr(method, "pooling", None) or GraphPooling("mean", config.model.embedding_dimension)
    clean, noised, starts = [], [], []
    for part in batches:
        z, pos, batch, num = part["z"], part["pos"], part["batch"], part["num_molecules"]
        clean.append(pooling(encode(method.encoder, z, pos, batch)[0], batch, num))
        pos_noised = pos + config.position_noise_scale * part["noise"]
        x, vec = encode(method.encoder, z, pos_noised, batch)
        noised.append(pooling(x, batch, num))
        pos_rec = pos + config.alpha * config.position_noise_scale * part["noise"]
        if config.alpha != 1:
            x, vec = encode(method.encoder, z, pos_rec, batch)
        starts.append((x, vec, pos_rec, batch, config.alpha * part["noise"]))
    return torch.cat(clean), torch.cat(noised), starts


@torch.no_grad()
def rec_losses(method, config, starts, graph_emb):
    """Rec loss of each molecule with these graph embeddings (M, F): -> (M,)."""
    found, first = [], 0
    for x, vec, pos_rec, batch, target in starts:
        num = int(batch[-1]) + 1
        g = graph_emb[first : first + num]
        predicted = method.decoder(x, vec if config.decoder_vec else None, g, pos_rec, batch)
        found.append(scatter_mean((predicted - target).square().mean(1), batch, num))
        first += num
    return torch.cat(found).double()


def use(method, config, starts, clean, sizes, formulas, rng):
    """Rise of the rec loss when g is another's, in % of that with the true g, and its standard error."""
    true = rec_losses(method, config, starts, clean)
    found = {"rec_loss": true.mean().item()}
    replacements = {"same_size": others(sizes, rng), "isomer": others(formulas, rng)}
    for name, other in replacements.items():
        valid = torch.from_numpy(other >= 0)
        if valid.sum() < 2:
            continue
        rise = (rec_losses(method, config, starts, clean[other.clip(0)]) - true)[valid] / true[valid].mean()
        found[f"rise_{name}"] = 100 * rise.mean().item()
        found[f"rise_{name}_error"] = 100 * rise.std().item() / math.sqrt(len(rise))
    blank = rec_losses(method, config, starts, clean.mean(0).expand_as(clean))
    found["rise_mean"] = 100 * (blank.mean() / true.mean() - 1).item()
    return found


# ---------------------------------------------------------------- what does it hold?


def mean_cosine_of_torsions(z, pos):
    """Mean cos(torsion angle) over all chains of four bonded atoms without hydrogen; nan where there is none."""
    ase, analysis = need("ase", "torsion angles"), need("ase.geometry.analysis", "torsion angles")
    heavy = z > 1
    if heavy.sum() < 4:
        return math.nan
    atoms = ase.Atoms(z[heavy], pos[heavy])
    chains = [(a, *rest) for a, found in enumerate(analysis.Analysis(atoms).unique_dihedrals[0]) for rest in found]
    return np.cos(np.radians(atoms.get_dihedrals(chains))).mean() if chains else math.nan


def descriptors(arrays, num_molecules):
    """Of each molecule: number of atoms, count of each element (M, E), radius of gyration, mean cosine of torsions."""
    z, pos, batch = (arrays[name].numpy() for name in ("z", "pos", "batch"))
    molecules = [(z[batch == m], pos[batch == m].astype(float)) for m in range(num_molecules)]
    elements = np.unique(z)
    return SimpleNamespace(
        size=np.array([len(z_m) for z_m, _ in molecules], dtype=float),
        composition=np.array([[np.sum(z_m == element) for element in elements] for z_m, _ in molecules], dtype=float),
        gyration=np.array([np.sqrt(((p - p.mean(0)) ** 2).sum(1).mean()) for _, p in molecules]),
        torsion=np.array([mean_cosine_of_torsions(*molecule) for molecule in molecules]),
    )


def r_squared(features, y):
    """R^2 of a ridge regression on the last fifth, fitted on the first three, penalty chosen on the fourth.

    None where one of the three parts has fewer than ten molecules or does not vary.
    """
    known = np.isfinite(y)
    features, y = features[known], torch.from_numpy(y[known])
    a, b = int(0.6 * len(y)), int(0.8 * len(y))
    if min(a, b - a, len(y) - b) < 10 or min(part.std() for part in (y[:a], y[a:b], y[b:])) < 1e-9:
        return None
    features = (features - features[:a].mean(0)) / features[:a].std(0).clamp(min=1e-8)
    y = y - y[:a].mean()
    w = ridge(features[:a], y[:a], features[a:b], y[a:b])
    return 1 - ((features[b:] @ w - y[b:]).square().sum() / (y[b:] - y[b:].mean()).square().sum()).item()


def beyond(composition, y):
    """y less its least-squares prediction from the composition, fitted where r_squared fits."""
    fitted = np.flatnonzero(np.isfinite(y))
    fitted = fitted[: int(0.6 * len(fitted))]
    counts = np.column_stack([composition, np.ones(len(y))])
    return y - counts @ np.linalg.lstsq(counts[fitted], y[fitted], rcond=None)[0]


def identified(clean, noised, formulas):
    """How often the nearest clean g (standardised) to a noised g is that of the same molecule, among its isomers."""
    scale = clean.std(0).clamp(min=1e-8)
    right = chance = total = 0
    for places in groups(formulas).values():
        if len(places) > 1:
            distances = torch.cdist(noised[places] / scale, clean[places] / scale)
            right += (distances.argmin(1) == torch.arange(len(places))).sum().item()
            chance += 1
            total += len(places)
    return {"identified": right / max(total, 1), "identified_by_chance": chance / max(total, 1)}


def hold(clean, noised, known, formulas):
    """What can be read from g."""
    g = clean.double()
    counted = [found for column in known.composition.T if (found := r_squared(g, column)) is not None]
    return {
        "r2_size": r_squared(g, known.size),
        "r2_composition": float(np.mean(counted)) if counted else None,
        "r2_gyration": r_squared(g, beyond(known.composition, known.gyration)),
        "r2_torsion": r_squared(g, beyond(known.composition, known.torsion)),
        **identified(g, noised.double(), formulas),
    }


# ---------------------------------------------------------------- table and files


COLUMNS = {  # of the table: figure and heading
    **{"rec_loss": "rec loss", "rise_same_size": "size, %", "rise_isomer": "isomer, %", "rise_isomer_error": "+-"},
    **{"rise_mean": "mean, %", "r2_size": "R2 size", "r2_composition": "R2 comp.", "r2_gyration": "R2 gyr."},
    **{"r2_torsion": "R2 tors.", "identified": "identity", "identified_by_chance": "(chance)"},
}


def table(results):
    """Lines of the table, a checkpoint a row: the rec loss, its rise with another's g, and what can be read from g."""
    width = max(map(len, results)) + 1
    yield " " * width + "".join(f"{heading:>10}" for heading in COLUMNS.values())
    for label, found in results.items():
        cells = (" " * 10 if found.get(name) is None else f"{found[name]:>10.4f}" for name in COLUMNS)
        yield f"{label:<{width}}" + "".join(cells)


def study(paths, config):
    """The figures of each checkpoint in paths."""
    methods = [load_method(path) for path in paths]
    molecules, index = choose(config)
    check_elements(molecules, index, [method.encoder for method, _ in methods])
    known = descriptors(molecules.read(index), len(index))
    formulas = [tuple(row) for row in known.composition]
    batches = validation_batches(molecules, index, config.batch_size)
    results = {}
    for path, name, (method, settings) in zip(paths, names_of(paths), methods, strict=True):
        clean, noised, starts = encode_all(method, settings, batches)
        results[name] = hold(clean, noised, known, formulas)
        if hasattr(method, "decoder") and settings.decoder_graph_emb:
            rng = np.random.default_rng(config.seed)
            results[name] |= use(method, settings, starts, clean, known.size.tolist(), formulas, rng)
        if not all(math.isfinite(value) for value in results[name].values() if value is not None):
            raise InputError(f"{path}: its figures are not finite: go back to an earlier step_<n>.pt")
    return results


def main(arguments):
    paths, config = read_arguments(GraphEmbeddingConfig, arguments)
    if not paths:
        raise InputError("name one last.pt or more: python graph_embedding.py out/demo/last.pt data=FILE.h5", code=2)
    names_of(paths)
    path = new_file(config.out_dir, "graph_embedding.json")
    tune_cpu()
    made_by, began = provenance(torch.device("cpu"), 1), time.perf_counter()
    results = study(paths, config)
    print("\n".join(table(results)))
    wall_s = round(time.perf_counter() - began, 1)
    write_result(path, {"checkpoints": results, "settings": asdict(config), "wall_s": wall_s, **made_by})
    print(f"{wall_s:.0f} s; wrote {path}")


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
