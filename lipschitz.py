"""Analysis: how smooth is the pooled embedding h of an encoder? Tables 1 and 5, Figure 2.

    python lipschitz.py out/a/encoder.pt out/b/encoder.pt data=data/qm9_demo.h5

A checkpoint is what init_from of finetune.py takes: an encoder.pt, last.pt or step_<n>.pt, or a state dict of
TorchMD-NET or Coord, whose architecture model.key=value says. After them come settings of LipschitzConfig, key=value.

Local Lipschitz constant (App. B): LLC = |J P|_2, J = dh/dpos (F, 3n), P removes rigid motions. h has no unit, so
the LLC is in 1/angstrom. Two more figures do not depend on the scale of h: LLC / |h|, and the LLC of features that are
standardised over the molecules measured. All is float64.

Writes to out_dir (default out/lipschitz): lipschitz.json with a figure per molecule, lipschitz.png and .svg.
"""

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import Molecules, choose, normal_of_each
from formats.weights import read_encoder
from harness.errors import InputError, cli, explain
from harness.files import check_new, provenance, write_json, write_whole
from harness.ranks import tune_cpu
from harness.settings import read_arguments
from model import ModelConfig, scatter_mean, scatter_sum, setting

# ---------------------------------------------------------------- settings


@dataclass(frozen=True)
class LipschitzConfig:
    """What is measured, and how."""

    data: str = "data/qm9_demo.h5"  # HDF5 file made by data.py
    split: str = ""  # a named split of the file; empty: all its molecules
    num_molecules: int = setting(100, low=1)  # of them, at random
    of: str = setting("graph", choices=("graph", "atoms", "all"))  # PAPER-SILENT: mean of x; all x; all x and vec
    iterations: tuple = setting((5, 15, 25), low=1)  # power iterations after which the norm is noted, Table 1
    batch_size: int = setting(100, low=1)  # molecules at a time
    # angstrom of noise added to the geometries before measuring; at 10 no geometry is left, and larger squares overflow
    position_noise_scale: float = setting(0.0, low=0, below=10.0)
    seed: int = setting(0, low=0)  # of directions and noise
    out_dir: str = "out/lipschitz"
    init_key: str = ""  # which of several networks in a checkpoint
    model: ModelConfig = field(default_factory=ModelConfig)  # of a TorchMD-NET or Coord state dict; ours bring theirs

    def __post_init__(self):
        if not self.iterations:
            raise ValueError("iterations is empty: name one number or more, as in 5,15,25")


# ---------------------------------------------------------------- the Jacobian and its norm


def output(of, encoder, z, pos, batch, num_molecules):
    """-> h (R, C), and rows (R,), the molecule of each row. A molecule's output is all of its rows as one vector."""
    with explain("the radius graph", ValueError):
        x, vec = encoder(z, pos, batch)  # (N, F), (N, 3, F)
    if of == "graph":
        return scatter_mean(x, batch, num_molecules), torch.arange(num_molecules, device=x.device)  # (B, F), (B,)
    return x if of == "atoms" else torch.cat([x, vec.flatten(1)], dim=1), batch  # (N, F) or (N, 4 F), (N,)


def rigid_motions(pos, batch, num_molecules):
    """Orthonormal basis of the rigid motions of each molecule: pos (N, 3) -> Q (N, 3, 6).

    Three translations and three rotations e_a x (r_i - r_centre); dependent columns are zero. The rank is 6, for a
    linear molecule 5 (to the digits of float32 positions), for an atom 3.
    """
    counts = torch.bincount(batch, minlength=num_molecules)
    r = pos - scatter_mean(pos, batch, num_molecules)[batch]
    axes = torch.eye(3, dtype=pos.dtype, device=pos.device).expand(len(pos), 3, 3)  # (N, 3, 3): axis a is [:, a]
    turns = torch.linalg.cross(axes, r.unsqueeze(1).expand(-1, 3, -1))  # (N, a, 3)
    motions = torch.cat([axes, turns], dim=1).mT  # (N, 3, 6)
    place = torch.arange(len(pos), device=pos.device) - (counts.cumsum(0) - counts)[batch]  # of an atom in its molecule
    padded = pos.new_zeros(num_molecules, int(counts.max()), 3, 6)
    padded[batch, place] = motions
    U, S, _ = torch.linalg.svd(padded.flatten(1, 2), full_matrices=False)  # (B, 3 n, 6 or fewer), (B, 6 or fewer)
    return (U * S.gt(1e-5 * S[:, :1]).unsqueeze(1)).unflatten(1, (-1, 3))[batch, place]


def remove(motions, v, batch, num_molecules):
    """P v = v - Q Q^T v for each molecule: Q (N, 3, 6), v (N, 3) -> (N, 3)."""
    share = scatter_sum((motions * v.unsqueeze(2)).sum(1), batch, num_molecules)  # (B, 6)
    return v - (motions * share[batch].unsqueeze(1)).sum(2)


def dots(a, b, rows, num_molecules):
    """<a, b> over the rows of each molecule: (R, C), (R, C) -> (B,)."""
    return scatter_sum((a * b).sum(1), rows, num_molecules)


def jacobian_products(h, pos):
    """-> the functions v (N, 3) -> J v (R, C) and u (R, C) -> J^T u (N, 3). h must be computed from pos with a graph.

    J^T u is linear in u, so its derivative by u along v is J v: with both graphs at hand a product costs no new forward
    pass. h of a molecule depends on its own atoms alone, J is block diagonal: one product serves the whole batch.
    """
    u = torch.zeros_like(h, requires_grad=True)
    (pulled,) = torch.autograd.grad(h, pos, u, create_graph=True, materialize_grads=True)

    def jvp(v):
        return torch.autograd.grad(pulled, u, v, retain_graph=True, materialize_grads=True)[0]

    def vjp(u):
        return torch.autograd.grad(h, pos, u, retain_graph=True, materialize_grads=True)[0]

    return jvp, vjp


def spectral_norms(jvp, vjp, project, v, batch, rows, scale, iterations):
    """|J P|_2 of h / scale (C,) of each molecule, by power iteration from v (N, 3): -> {iterations: (B,)}.

    DEVIATION: the norm of J on the span of all iterates (Lanczos' method), not |J v_k| of the last. The cost is equal.
    Where two singular values lie close the last iterate alone was 3 % off after 25 steps; this is exact after 15.
    """
    num, found, norm, basis, images = int(batch[-1]) + 1, {}, 0.0, [], []
    for step in range(1, max(iterations) + 1):
        v = raw = project(v)
        for _ in range(2):  # the second time for what rounding left over
            for w in basis:
                v = v - w * dots(v, w, batch, num)[batch].unsqueeze(1)
        size = dots(v, v, batch, num).sqrt()
        # nothing is left when the span is the whole space, as for the 3 directions of a triatomic molecule
        new = size > 1e-10 * dots(raw, raw, batch, num).sqrt()
        v = v * torch.where(new, 1 / size, 0)[batch].unsqueeze(1)
        basis.append(v)
        images.append(jvp(v) / scale)  # (R, C)
        image = torch.stack(images, dim=2)  # (R, C, step)
        gram = scatter_sum(image.mT @ image, rows, num)  # (B, step, step)
        finite = gram.isfinite().all(2).all(1)
        previous, norm = norm, torch.linalg.eigvalsh(gram.nan_to_num(0, 0, 0))[:, -1].clamp(min=0).sqrt()  # (B,)
        norm = torch.where(finite, norm, torch.nan)
        found |= {later: norm for later in iterations if later >= step}
        if (norm - previous <= 1e-10 * norm).all():
            break
        v = vjp(images[-1] / scale)
    return {later: found[later] for later in sorted(iterations)}


# ---------------------------------------------------------------- one encoder


DIRECTION, NOISE = 1, 2  # first number of a key


def batches(molecules, index, config, device):
    """Batches of the molecules index in float64: z, pos, batch, num_molecules, directions."""
    for part in np.array_split(index, math.ceil(len(index) / config.batch_size)):
        arrays = molecules.read(part)
        directions, noise = (normal_of_each(molecules, part, kind, config.seed).double() for kind in (DIRECTION, NOISE))
        pos = arrays["pos"].double() + config.position_noise_scale * noise
        z, pos, batch, directions = (t.to(device) for t in (arrays["z"], pos, arrays["batch"], directions))
        yield z, pos, batch, len(part), directions


DISPLACEMENTS = tuple(round(0.01 * k, 2) for k in range(11))  # angstrom, |delta| of Fig. 2


@torch.no_grad()
def embed(of, encoder, parts):
    """Outputs of all molecules, and the norm of each: (R, C), (M,)."""
    outputs = [(*output(of, encoder, *part[:4]), part[3]) for part in parts]
    return torch.cat([h for h, *_ in outputs]), torch.cat([dots(h, h, *rest).sqrt() for h, *rest in outputs])


def constants(encoder, part, std, config):
    """Norms of J P for one batch -> {step: (B, 2)}, of h as it is and of h / std."""
    z, pos, batch, num, directions = part
    scale = torch.stack([torch.ones_like(std), std])  # (2, C)
    motions = rigid_motions(pos, batch, num)
    pos = pos.clone().requires_grad_()
    h, rows = output(config.of, encoder, z, pos, batch, num)
    jvp, vjp = jacobian_products(h, pos)
    project = partial(remove, motions, batch=batch, num_molecules=num)
    norms = [spectral_norms(jvp, vjp, project, directions, batch, rows, s, config.iterations) for s in scale]
    return {step: torch.stack([found[step] for found in norms], dim=1) for step in sorted(config.iterations)}


@torch.no_grad()
def sensitivity(of, encoder, part, displacements):
    """Fig. 2: |h(x + delta) - h(x)| of each molecule along a random direction, rigid motions removed: -> (B, S)."""
    z, pos, batch, num, directions = part
    along = remove(rigid_motions(pos, batch, num), directions, batch, num)
    size = dots(along, along, batch, num).sqrt()
    along = along * torch.where(size > 0, 1 / size, 0)[batch].unsqueeze(1)
    start, rows = output(of, encoder, z, pos, batch, num)
    moved = [output(of, encoder, z, pos + d * along, batch, num)[0] - start for d in displacements]
    return torch.stack([dots(change, change, rows, num).sqrt() for change in moved], dim=1)


def measure(encoder, molecules, index, config, device):
    """All measurements of one encoder: dict of lists with one entry for each molecule."""
    encoder = encoder.double().eval().requires_grad_(False).to(device)
    parts = list(batches(molecules, index, config, device))
    h, size = embed(config.of, encoder, parts)
    known = h[h.isfinite().all(1)]  # rows that are not finite would spoil std
    std = known.std(0) if len(known) > 1 else torch.zeros_like(h[0])
    std = torch.where(std > 1e-8 * h.nan_to_num(0, 0, 0).abs().max(), std, torch.inf)  # constant channels: 0
    norms = [constants(encoder, part, std, config) for part in parts]
    norms = {step: torch.cat([part[step] for part in norms]) for step in norms[0]}  # (M, 2)
    last = list(norms.values())[-1]
    return {
        "llc": {str(step): found[:, 0].tolist() for step, found in norms.items()},
        "llc_by_norm": (last[:, 0] / size).tolist(),
        "llc_standardised": last[:, 1].tolist(),
        "norm": size.tolist(),
        "sensitivity": torch.cat([sensitivity(config.of, encoder, part, DISPLACEMENTS) for part in parts]).tolist(),
    }


# ---------------------------------------------------------------- table, files, figures


def names_of(paths):
    """Short names of checkpoints for a table: their paths without the parts that all share."""
    if unnamed := [path for path in paths if not Path(path).name]:
        raise InputError(f"'{unnamed[0]}' is no file: name a checkpoint, such as out/demo/encoder.pt", code=2)
    parts = [Path(path).with_suffix("").parts for path in paths]
    for place, rest in ((0, slice(1, None)), (-1, slice(None, -1))):
        while len(parts) > 1 and all(len(p) > 1 for p in parts) and len({p[place] for p in parts}) == 1:
            parts = [p[rest] for p in parts]
    names = [str(Path(*p)) for p in parts]
    if len(set(names)) < len(names):
        raise InputError("a checkpoint is named twice, or two cannot be told apart by their names", code=2)
    return names


def aligned(rows):
    """{name: {column: number or None}} -> the lines of a table."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    width, widths = max(map(len, rows)) + 2, [max(10, len(column) + 2) for column in columns]
    yield " " * width + "".join(f"{column:>{w}}" for column, w in zip(columns, widths, strict=True))
    for name, row in rows.items():
        cells = ["" if row.get(column) is None else f"{row[column]:.4g}" for column in columns]
        yield f"{name:<{width}}" + "".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))


def quantiles(found):
    """Median, p95, max and the number that are not finite, of a list."""
    values = np.array(found)
    finite = values[np.isfinite(values)]
    median, p95, largest = np.quantile(finite, [0.5, 0.95, 1]) if len(finite) else [math.nan] * 3
    return {"median": median, "p95": p95, "max": largest, "not_finite": len(values) - len(finite)}


def mean_curve(found):
    """The mean curve of Fig. 2 over the molecules whose curve is finite: (S,)."""
    curves = np.array(found["sensitivity"])  # (M, S)
    finite = curves[np.isfinite(curves).all(1)]
    return finite.mean(0) if len(finite) else curves[0] * math.nan


def summarise(found):
    """Of one encoder: median, p95 and max of each kind of LLC, and the mean curve of Fig. 2."""
    kinds = {"llc": list(found["llc"].values())[-1]}
    kinds |= {name: found[name] for name in ("llc_by_norm", "llc_standardised", "norm")}
    kinds = {name: quantiles(values) for name, values in kinds.items()}
    return kinds | {"sensitivity": mean_curve(found).tolist()}


def table(results):
    """Lines of the table, an encoder a row: the LLC in 1/angstrom, and medians that do not depend on the scale of h."""
    rows = {}
    for name, found in results.items():
        kinds = {step: quantiles(norms) for step, norms in found["llc"].items()}
        row = rows[name] = {f"{kind} {step}": kinds[step][kind] for step in kinds for kind in ("median", "p95", "max")}
        for key, title in (("llc_by_norm", "LLC/|h|"), ("llc_standardised", "standardised")):
            row[title] = quantiles(found[key])["median"]
        row["not finite"] = kinds[list(kinds)[-1]]["not_finite"]
    return aligned(rows)


def draw(results, folder, made_of):
    """lipschitz.png and .svg: the share of molecules below an LLC, and Fig. 2; made_of is printed below."""
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError:
        print("no figure: drawing needs matplotlib (pip install matplotlib)")
        return
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    lines, greys = ("-", "--", "-.", ":"), ("black", "0.55", "tab:red")
    for k, (name, found) in enumerate(results.items()):
        style = {"ls": lines[k % 4], "color": greys[k // 4 % 3]}
        values = np.sort(list(found["llc"].values())[-1])
        left.step(values, np.arange(1, len(values) + 1) / len(values), where="post", label=name, **style)
        right.plot(DISPLACEMENTS, mean_curve(found), lw=2, **style)
        right.plot(DISPLACEMENTS, found["sensitivity"][0], lw=0.7, **style)
    left.set(xlabel="LLC, 1/angstrom", ylabel="share of molecules below")
    right.set(xlabel="|delta|, angstrom", ylabel="|h(x + delta) - h(x)|", title="mean (thick), one molecule (thin)")
    limits = [v for found in results.values() for v in list(found["llc"].values())[-1] if v > 0]
    if limits and max(limits) > 100 * min(limits):
        left.set_xscale("log")
    left.legend(frameon=False, fontsize=8)
    figure.supxlabel(made_of, fontsize=7, color="0.4", parse_math=False)
    for kind in ("png", "svg"):
        write_whole(folder / f"lipschitz.{kind}", lambda path, kind=kind: figure.savefig(path, dpi=130, format=kind))
    plt.close(figure)


def main(arguments):
    paths, config = read_arguments(LipschitzConfig, arguments)
    if not paths:
        raise InputError("name one checkpoint or more: python lipschitz.py out/demo/encoder.pt data=FILE.h5", code=2)
    names, folder = names_of(paths), Path(config.out_dir)
    check_new(*(folder / f"lipschitz.{kind}" for kind in ("json", "png", "svg")), make_folder=True)
    tune_cpu()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made_by = provenance(device)
    molecules = Molecules(config.data)
    index = choose(molecules, config.split, config.num_molecules, "num_molecules")
    encoders = {name: read_encoder(path, config.model, config.init_key)[0] for name, path in zip(names, paths)}
    molecules.check_elements(index, min(encoder.config.max_z for encoder in encoders.values()))
    found = {name: measure(encoder, molecules, index, config, device) for name, encoder in encoders.items()}
    print("\n".join(table(found)))
    result = {"summary": {n: summarise(one) for n, one in found.items()}, "checkpoints": found}
    result |= {"molecules": index.tolist(), "displacements": DISPLACEMENTS, "settings": asdict(config)}
    write_json(folder / "lipschitz.json", result | made_by)
    draw(found, folder, f"{config.data}, {len(index)} molecules, commit {made_by['commit']}")
    print(f"wrote {folder / 'lipschitz.json'}")


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
