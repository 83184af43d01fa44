"""Stage 2: fine-tune a pretrained encoder on a property, or on energies and forces, or probe it with a linear layer.

    python finetune.py configs/demo_forces.yaml                                  a minute on a laptop, no download
    python finetune.py configs/md17_aspirin.yaml init_from=out/pcqm_md17/encoder.pt
    python finetune.py configs/probe_qm9.yaml init_from=out/qm9_small/encoder.pt   encoder frozen, one linear layer

init_from is a checkpoint of any stage, or a state dict of TorchMD-NET or Coord; without it the encoder is a fresh one.
A run folder has best.pt, the model at its best validation, in the place of encoder.pt. It is tested once, at the end.
"""

import math
import pkgutil
from dataclasses import asdict, dataclass, field, fields, replace

import numpy as np
import torch
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import Molecules, StepBatches, choose, split_indices, standard_normal
from formats.weights import make_encoder
from harness.compiled import compile_gradient, compile_layers, fill_up
from harness.errors import InputError, cli, explain
from harness.files import sha256
from harness.ranks import barrier, sum_over_ranks
from harness.run import start
from harness.settings import build_config
from harness.weights import read_torch, require
from model import EquivariantVectorOutput, ModelConfig, new_encoder, radius_graph, scatter_mean, scatter_sum, setting
from pretrain import TRAIN, backward, num_parameters
from pretrain import learning_rate as cosine_rate

# ---------------------------------------------------------------- settings and targets

HEADS = {"scalar": "model:EquivariantScalar", "dipole": "beyond.heads:EquivariantDipoleMoment"}
HEADS |= {"extent": "beyond.heads:ElectronicSpatialExtent", "pooler": "beyond.heads:Pooler"}
HEAD_OF = {"mu": "dipole", "r2": "extent"}  # PAPER-SILENT. All others: scalar, a sum over atoms
# PAPER-SILENT: what grows with the molecule gets a reference for each element, orbital energies none (torchmd-net #64)
WITH_REFERENCES = ["alpha", "zpve", "U0", "U", "H", "G", "Cv", "energy"]


@dataclass(frozen=True)
class FinetuneConfig:
    """Every setting of this stage. Names are Table 13's where it has one; defaults are its QM9 column."""

    data: str = ""  # HDF5 file made by data.py
    target: str = ""  # energy_forces, or a label of the file such as gap, or several: homo,lumo
    train_split: str = ""  # named splits of the file; without them, random parts of all molecules
    val_split: str = ""
    test_split: str = ""  # several, separated by commas, are reported apart
    train_size: int = setting(0, low=0)  # 0: all of the named split, or what others leave over
    val_size: int = setting(0, low=0)
    test_size: int = setting(0, low=0)
    out_dir: str = ""  # empty: out/<name of the config>
    seed: int = setting(1, low=0)  # weights and order; the split does not depend on it

    init_from: str = ""  # empty: from scratch
    init_key: str = ""  # which of several networks in init_from
    freeze_encoder: bool = False  # linear probing, Sec. 5.3
    pooling: str = setting("mean", choices=("mean", "sum"))  # PAPER-SILENT: of a probe's features
    head: str = setting("auto", choices=("auto", *HEADS), tuning=True)
    reduce: str = setting("sum", choices=("sum", "mean"), tuning=True)  # head = scalar
    references: str = setting("auto", choices=("auto", "none", "fit"))
    loss: str = setting("mse", choices=("mse", "l1"), tuning=True)
    metric: str = setting("mae", choices=("mae", "rmse"), tuning=True)  # which chooses best.pt
    energy_weight: float = setting(1.0, low=0)  # this and the next three: of energy_forces alone
    force_weight: float = setting(1.0, low=0)
    ema_alpha_y: float = setting(1.0, low=0)
    ema_alpha_dy: float = setting(1.0, low=0)
    position_noise_scale: float = setting(0.0, low=0, tuning=True)  # angstrom, of the noise of a second pass
    denoising_weight: float = setting(0.1, low=0, tuning=True)
    paper: dict = field(default_factory=dict)  # {<model>_<test set>_<error>: its figure}, kept in metrics.json
    model: ModelConfig = field(default_factory=ModelConfig)  # from scratch; an encoder.pt brings its own

    batch_size: int = setting(128, low=1)  # molecules per step over all ranks
    accumulate: int = setting(1, low=1, tuning=True)  # parts that each rank cuts its batch into, to save memory
    max_steps: int = setting(300_000, low=1)  # PAPER-SILENT: the second restart of cosine_warmup, when lr is at its end
    lr: float = setting(4e-4, low=0)
    lr_min: float = setting(1e-7, low=0)
    lr_schedule: str = setting("cosine_warmup", choices=("cosine", "cosine_warmup", "plateau"))
    lr_warmup_steps: int = setting(10_000, low=0)
    lr_cosine_length: int = setting(100_000, low=1)
    lr_patience: int = setting(15, low=0)  # plateau: validations without a gain before lr falls
    lr_factor: float = setting(0.8, low=0.01, below=1)  # PAPER-SILENT. plateau: lr falls to lr * lr_factor
    clip_norm: float = setting(0.0, low=0, tuning=True)  # of the gradient; 0: none, as Coord's code
    ema_decay: float = setting(0.0, low=0, below=1, tuning=True)  # above 0: a moving average of the weights is tested

    inference_batch_size: int = setting(128, low=1)
    num_workers: int = setting(0, low=0)
    compile: bool | None = setting(None, tuning=True)  # auto: a long run with a compiler, but not forces on a GPU
    deterministic: bool = False
    log_every: int = setting(100, low=1)
    val_every: int = setting(1000, low=1)
    save_every: int = setting(1000, low=1)
    keep_steps: tuple = setting((), low=0)
    resume: bool = False

    def __post_init__(self):
        for known in fields(self) if self.freeze_encoder else ():
            if known.metadata.get("tuning") and getattr(self, known.name) not in (False, known.default):
                raise ValueError(f"freeze_encoder = true: a linear probe has no {known.name}, leave it out")
        if len(set(names := self.target.split(","))) < len(names):
            raise ValueError(f"target = {self.target}: a name stands twice")
        if self.freeze_encoder and (self.target == "energy_forces" or self.lr_schedule == "plateau"):
            raise ValueError("freeze_encoder = true: a probe has no target=energy_forces and no lr_schedule=plateau")


def learning_rate(step, config):
    """`cosine` of pretrain.py, or `cosine_warmup`: cosines of length T, 2 T, ...; warm-up replaces the start."""
    if config.lr_schedule == "cosine" or step < config.lr_warmup_steps:
        return cosine_rate(step, config)
    cycle = (step // config.lr_cosine_length + 1).bit_length() - 1
    phase = (step - config.lr_cosine_length * (2**cycle - 1)) / (config.lr_cosine_length * 2**cycle)
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * phase))


# ---------------------------------------------------------------- data


def split_data(config, molecules):
    """-> indices to train and to validate, {name: indices} of test sets; disjoint, with known labels."""
    label, sizes, parts = config.target, {"train": config.train_size}, {}  # sizes: of the parts drawn from pool
    pool = molecules.split(config.train_split, label)
    lone = np.diff(molecules.ptr)[pool] == 1  # isolated atoms always train: tested, their offset would be all error
    pool, atoms = pool[~lone], pool[lone]
    if config.val_split in ("", config.train_split):
        sizes["val"] = config.val_size
    else:
        parts["val"] = choose(molecules, config.val_split, config.val_size, "val_size", label)
    if not config.test_split:
        sizes["test"] = config.test_size
    if len(rest := [f"{name}_size" for name, size in sizes.items() if size == 0]) > 1:
        raise InputError(f"{' and '.join(rest)} are 0: only one part can take what the others leave over", code=2)
    if sum(sizes.values()) + len(rest) > len(pool):
        asked = ", ".join(f"{name}_size = {size}" for name, size in sizes.items())
        raise InputError(f"{asked}: {molecules.path} has {len(pool)} molecules for these, {label} known", code=2)
    drawn = split_indices(len(pool), [size or None for size in sizes.values()] + ([] if rest else [None]))
    parts |= {name: pool[part] for name, part in zip(sizes, drawn, strict=False)}
    train, val = np.concatenate([atoms, parts.pop("train")]), parts.pop("val")
    for name in config.test_split.split(",") if config.test_split else ():
        key = f"test_{name}" if name in ("train", "val") else name  # beside a training part or validation part of ours
        if key in parts or not name:
            raise InputError(f"test_split = {config.test_split}: a name is empty, or two become {key}", code=2)
        parts[key] = choose(molecules, name, config.test_size, "test_size", label)
    molecule = molecules.ids if "conformers" in molecules.attrs else np.arange(len(molecules))  # (M,), of each row
    each = [np.unique(molecule[part]) for part in (train, val, *parts.values())]
    if len(np.unique(np.concatenate(each))) < sum(map(len, each)):
        raise InputError("the training, validation and test parts share molecules: name splits of the file", code=2)
    return train, val, parts


def head_of(config):
    auto = "scalar" if config.freeze_encoder else HEAD_OF.get(config.target, "scalar")
    return auto if config.head == "auto" else config.head


class Labels:
    """T labels in the file's units; y' = (y - sum_i ref(z_i) - mean) / std in float64, by the training molecules."""

    def __init__(self, config, molecules, train, others, max_z):
        if not config.target:
            raise InputError("target is not set: energy_forces, or a label of the file", code=2)
        self.forces = config.target == "energy_forces"
        if self.forces and "forces" not in molecules.units:
            raise InputError(f"target = energy_forces, but {molecules.path} has no forces", code=2)
        self.name = "energy" if self.forces else config.target
        self.names = self.name.split(",")
        self.raw = np.stack([molecules.label(name) for name in self.names], axis=1)  # (M, T)
        units = [molecules.units[name] for name in self.names]
        shown = ["meV" if unit == "eV" and not self.forces else unit for unit in units]  # with forces: as in the file
        self.unit = ",".join(units)
        self.shown = {"forces": f"{units[0]}/angstrom", "energy_per_atom": f"{shown[0]} per atom"}
        self.shown |= {"targets": shown[0] if len({*shown}) == 1 else "mean over units", **dict(zip(self.names, shown))}
        self.scale = np.array([1.0 if new == unit else 1000.0 for new, unit in zip(shown, units)])  # (T,)
        if not (np.abs(self.raw[np.concatenate([train, *others.values()])]) < 1e30).all():
            raise InputError(f"{molecules.path}: {self.name} is not finite everywhere: look at it with data.py info")
        self.molecule = molecules.ids if "conformers" in molecules.attrs else np.arange(len(molecules))  # (M,)
        counts = molecules.composition(train, max_z, self.forces)  # (M, max_z)
        self.elements = np.flatnonzero(counts.sum(0)).tolist()
        fit = np.linalg.lstsq(counts, self.raw[train], rcond=1e-10)[0]  # (max_z, T)
        fitted = np.isin(self.names, {"none": [], "fit": self.names}.get(config.references, WITH_REFERENCES))  # (T,)
        self.references = fit * fitted
        rest = self.raw[train] - counts @ self.references  # (M, T)
        if (head := head_of(config)) in HEAD_OF.values() and (len(self.names) > 1 or (rest < 0).any()):
            raise InputError(f"{self.name}: head={head} is for one target, never below 0: set head=scalar", code=2)
        _, sizes, rows = np.linalg.svd(counts.T @ counts)  # the fit is valid for compositions that rows span
        self.span = [row.tolist() for s, row in zip(sizes, rows) if fitted.any() and s > 1e-9 * counts.sum()]
        middle = (np.median if config.metric == "mae" else np.mean)(rest, 0)
        centred = head not in HEAD_OF.values()  # else y stays >= 0
        self.mean, self.std = (rest.mean(0), rest.std(0)) if centred else (np.zeros(1), np.abs(rest).mean(0))
        if self.forces:  # if all energies are nearly equal, the forces bound std from below
            forces = molecules.read(train[:1000], forces=True)["forces"].double()
            self.std = np.maximum(self.std, 1e-3 * forces.square().mean().sqrt().item())
        told = zip(self.names, self.mean, self.std, units, np.where(fitted, "after fitted", "no"))
        self.remark = "; ".join(f"{n}: mean {m:.6g}, scale {s:.4g} {u}, {h} atom references" for n, m, s, u, h in told)
        if 0 < len(self.span) < len(self.elements):
            self.remark += "; too few compositions to tell elements apart: valid for these alone"
        elif (grow := ~fitted & (np.var(rest - counts @ fit, 0) < 0.01 * np.var(rest, 0))).any():
            self.remark += f"; {', '.join(np.array(self.names)[grow])} grows with the molecule: try references=fit"
        held_out = {n: molecules.composition(i, max_z, self.forces) for n, i in others.items()}  # (m, max_z) each
        known = {n: ~c[:, ~counts.any(0)].any(1) for n, c in held_out.items()}  # (m,) of elements that were trained on
        self.others = {n: i[known[n]] for n, i in others.items()}
        self.constant = {n: torch.from_numpy(c[known[n]] @ self.references + middle) for n, c in held_out.items()}
        gone = {n: i[~known[n]] for n, i in others.items() if not known[n].all()}
        if told := ", ".join(f"{len(i)} of {n} (the first has id {molecules.ids[i[0]]})" for n, i in gone.items()):
            self.remark += f"; left out, with an element that no training molecule has: {told}"
        if not all(map(len, self.others.values())):
            raise InputError(f"{molecules.path}: with an element that no training molecule has: {told}, and no others")
        if not (self.std > 1e-12 * np.maximum(1.0, np.abs(self.mean))).all():
            raise InputError(f"{molecules.path}: {self.name} is the same for all {len(train)} training molecules")

    def standardised(self, part, index):
        """y' of the molecules index (B,) -> float32 (B,) or (B, T); part of Molecules.read."""
        atoms = scatter_sum(torch.from_numpy(self.references)[part["z"]], part["batch"], len(index))  # (B, T)
        rest = self.raw[index] - atoms.numpy() - self.mean
        return torch.from_numpy(rest / self.std).float().squeeze(1)

    def unit_of(self, error):
        """The unit of a figure such as forces_mae."""
        return self.shown[max((name for name in self.shown if error.startswith(f"{name}_")), key=len)]


# ---------------------------------------------------------------- model


class PropertyModel(nn.Module):
    """Encoder and property head; what it returns is standardised, and `restore` brings it back to the label's unit."""

    def __init__(self, encoder, head, reduce, references, mean=0.0, std=1.0):
        super().__init__()
        self.kind, self.reduce = head, reduce
        self.compiled, self.multiple = None, 1  # by compile_derivative
        self.encoder = encoder
        self.head = pkgutil.resolve_name(HEADS[head])(encoder.config.embedding_dimension, *np.shape(mean))
        for name, value in {"references": references, "mean": mean, "std": std}.items():  # (max_z[, T]), ([T]), ([T])
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float64))

    def predict(self, pos, z, batch, num_molecules, edge_index=None):
        """-> y' (B,), or (B, T) of several targets."""
        x, vec = self.encoder(z, pos, batch, edge_index)  # (N, F), (N, 3, F)
        if self.kind != "scalar":
            return self.head(x, vec, z, pos, batch, num_molecules)
        return (scatter_sum if self.reduce == "sum" else scatter_mean)(self.head(x, vec), batch, num_molecules)

    def gradient(self, pos, *others):
        """-> dy'/dpos (N, 3), y' (B,); with a graph of their own if the module is training."""
        with torch.enable_grad():
            pos = pos.detach().requires_grad_()
            y = self.predict(pos, *others)
            (gradient,) = torch.autograd.grad(y.sum(), pos, create_graph=self.training)
        return gradient, y if self.training else y.detach()

    def compile_derivative(self, device, one_shape=True):
        """Compile energies, forces and their gradients for training. From now on forward() runs the compiled code."""

        def total(*arguments):
            y = self.predict(*arguments)
            return y.sum(), y

        self.compiled, self.multiple = compile_gradient(total, self, device, one_shape)

    def pairs(self, pos, batch):
        """-> edge_index (2, P) of the pairs within the cutoff, padded with others to a multiple of self.multiple."""
        cutoff = self.encoder.config.cutoff_upper
        near = radius_graph(pos, batch, cutoff, self.encoder.config.max_num_neighbors)
        if self.multiple == 1:
            return near
        j, i = every = radius_graph(pos, batch, math.inf)
        return every[:, fill_up((pos[i] - pos[j]).square().sum(1) < cutoff**2, self.multiple)]

    def forward(self, z, pos, batch, num_molecules, forces=False):
        """-> y' (B,), and with forces -dy'/dpos (N, 3), else None; -dy'/dpos has a graph only in training."""
        if not forces:
            return self.predict(pos, z, batch, num_molecules), None
        edge_index = self.pairs(pos, batch) if self.compiled else None  # not compiled: their number varies
        gradient, y = (self.compiled or self.gradient)(pos, z, batch, num_molecules, edge_index)
        return y, -gradient

    def restore(self, y, z, batch):
        """y' (B,) -> the property in the label's unit, float64."""
        return y.double() * self.std + self.mean + scatter_sum(self.references[z], batch, len(y))


class Finetuning(nn.Module):
    """The losses of this stage, each a share of the mean over the global batch: ranks and parts add up."""

    def __init__(self, model, config):
        super().__init__()
        self.config, self.model = config, model
        self.forces = config.target == "energy_forces"
        noisy = config.position_noise_scale and config.denoising_weight
        self.noise_head = EquivariantVectorOutput(model.encoder.config.embedding_dimension) if noisy else None

    def forward(self, z, pos, batch, y, forces, noise, molecules_share, atoms_share):
        """y (B,) and forces (N, 3) standardised or None, noise (N, 3) -> dict of scalar losses."""
        config = self.config
        loss_fn = mse_loss if config.loss == "mse" else l1_loss
        predicted, predicted_forces = self.model(z, pos, batch, len(y), self.forces)  # (B,), (N, 3)
        total = loss_fn(predicted, y) * molecules_share
        losses = {"loss_energy" if self.forces else "loss_property": total}
        if self.forces:
            # L = w_E a_y L_E + w_F a_dy L_F. Upstream smooths L_E <- a L_E + (1 - a) (past L_E, without gradient):
            # the past adds a constant, so what trains the network is a L_E. With Table 13's 0.2 and 0.05, 0.01 L_E.
            losses["loss_forces"] = loss_fn(predicted_forces, forces) * atoms_share
            total = config.energy_weight * config.ema_alpha_y * total
            total = total + config.force_weight * config.ema_alpha_dy * losses["loss_forces"]
        if self.noise_head:
            # DEVIATION: a second pass. The parent's code noises the one pass and keeps the clean geometry's labels.
            x, vec = self.model.encoder(z, pos + config.position_noise_scale * noise, batch)
            losses["loss_noise"] = mse_loss(self.noise_head(x, vec), noise) * atoms_share
            total = total + config.denoising_weight * losses["loss_noise"]
        return {"loss": total, **losses}


# BEST: what a best.pt must hold, see harness/weights.require. ABOUT: its entry `property`
ABOUT = dict.fromkeys(("target", "name", "unit", "head", "reduce"), str)
ABOUT |= {"elements": list, "val": {str: float}, "step": int}
BEST = {"schema": "georecon/1", "model": dict, "state_dict": dict, "property": ABOUT}


def load_property_model(path, device="cpu"):
    """-> the PropertyModel of a best.pt, in evaluation mode, and what the file says of it."""
    content = read_torch(path, "name the best.pt of a finetune.py run; a linear probe leaves none")
    with explain(f"{path} is no best.pt of finetune.py that fits this code's model"):
        require(content, BEST, "the file")
        about = content["property"]
        known = about["reduce"] in ("sum", "mean") and (about["name"] + about["unit"]).isprintable()
        if not known or not all(type(z) is int for z in about["elements"]):
            raise ValueError("its name or unit is no word, its reduce none of ours, or an element no number")
        encoder, T = new_encoder(build_config(ModelConfig, content["model"])), about["name"].count(",") + 1
        empty = (np.zeros((*s, T) if T > 1 else s) for s in ((encoder.config.max_z,), (), ()))
        model = PropertyModel(encoder, about["head"], about["reduce"], *empty)
        model.load_state_dict(content["state_dict"])
        if not (model.std > 0).all():
            raise ValueError(f"its std is {model.std.tolist()}")
    return model.to(device).eval().requires_grad_(False), about


def check_best(path, step, state, config):
    """Refuse to resume if best.pt is of another run -> its figures, which after a kill may be of a later step."""
    about = load_property_model(path)[1]
    same = about["target"] == config.target and about["val"].keys() == state["best_val"].keys()
    same = same and (about["step"] > step or (about["step"], about["val"]) == (state["best_step"], state["best_val"]))
    if not same or about["step"] > config.max_steps:
        raise InputError(f"{path} is of another run than last.pt; if not, set max_steps={about['step']}")
    return {"best_val": about["val"], "best_step": about["step"]}


# ---------------------------------------------------------------- evaluation


def errors(model, molecules, index, labels, config, device, rank=0, world=1):
    """Mean absolute and root mean square errors over the molecules of index, by name, in the unit shown."""
    model.eval()
    y, total = torch.zeros(len(index), len(labels.names)).double(), torch.zeros(3).double()  # (n, T), (3,)
    mine = np.arange(rank, len(index), world)
    for place in np.array_split(mine, math.ceil(len(mine) / config.inference_batch_size)) if len(mine) else ():
        part = molecules.read(index[place], labels.forces)
        z, pos, batch = (part[name].to(device) for name in ("z", "pos", "batch"))
        with torch.no_grad(), explain("the radius graph", ValueError):
            predicted, f = model(z, pos, batch, len(place), labels.forces)
            y[place] = model.restore(predicted, z, batch).view(len(place), -1).cpu()
        if labels.forces:
            error = f.double().cpu() * model.std.cpu() - part["forces"].double()  # (n, 3)
            total += torch.stack([error.abs().sum(), error.square().sum(), torch.tensor(error.numel())])
    model.train()
    y, (f_abs, f_sq, f_num) = sum_over_ranks(y.to(device)).cpu(), sum_over_ranks(total.to(device)).tolist()
    forces = {"forces_mae": f_abs / f_num, "forces_rmse": (f_sq / f_num) ** 0.5} if labels.forces else {}
    return errors_of(y, molecules, index, labels) | forces


def errors_of(y, molecules, index, labels):
    """Those of predictions y (n, T) in the labels' units, without the forces."""
    _, first, same = np.unique(labels.molecule[index], return_index=True, return_inverse=True)
    error = (y - torch.from_numpy(labels.raw[index])) * torch.from_numpy(labels.scale)
    error = scatter_mean(error, torch.from_numpy(same), len(first))  # that of the mean over a molecule's conformers
    found = {}
    for name, one in zip(labels.names, error.T, strict=True):
        found |= {f"{name}_mae": one.abs().mean().item(), f"{name}_rmse": one.square().mean().sqrt().item()}
    for kind in ("mae", "rmse") if len(labels.names) > 1 else ():  # Table 11's QM8: the mean over its targets
        found[f"targets_{kind}"] = sum(found[f"{name}_{kind}"] for name in labels.names) / len(labels.names)
    if labels.forces:
        per_atom = error[:, 0].abs() / torch.from_numpy(np.diff(molecules.ptr)[index[first]])
        found["energy_per_atom_mae"] = per_atom.mean().item()
    return found


def score(found, labels, config):
    """best.pt has the lowest score: errors by energy_weight and force_weight, or mean errors / std. PAPER-SILENT."""
    if labels.forces:
        weights = {"energy": config.energy_weight, "forces": config.force_weight}
        return sum(weight * found[f"{name}_{config.metric}"] for name, weight in weights.items())
    shares = zip(labels.names, labels.std * labels.scale, strict=True)
    return sum(found[f"{name}_{config.metric}"] / std for name, std in shares) / len(labels.names)


# ---------------------------------------------------------------- linear probe


@torch.no_grad()
def pooled_features(encoder, molecules, index, config, device):
    """Pooled x of the frozen encoder: (M, F) float64."""
    features = []
    for part in np.array_split(index, math.ceil(len(index) / config.inference_batch_size)):
        arrays = molecules.read(part)
        with explain("the radius graph", ValueError):
            x = encoder(*(arrays[name].to(device) for name in ("z", "pos", "batch")))[0].double().cpu()
        features.append((scatter_mean if config.pooling == "mean" else scatter_sum)(x, arrays["batch"], len(part)))
    return torch.cat(features)


def ridge(features, y, val_features, val_y):
    """Closed-form linear regression on standardised features (M, F): -> w (F,), the penalty the best on validation."""
    covariance, moment = features.T @ features / len(features), features.T @ y / len(features)  # (F, F), (F,)
    eye, penalties = torch.eye(len(moment), dtype=y.dtype), (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    solutions = [torch.linalg.solve(covariance + penalty * eye, moment) for penalty in penalties]
    return min(solutions, key=lambda w: (val_features @ w - val_y).abs().mean().item())


def probe(config, encoder, molecules, parts, labels, device, log):
    """Sec. 5.3 and Fig. 3: one linear layer on the frozen encoder -> {set: errors}, by descent and in closed form."""
    features, offset, y, scale = {}, {}, {}, torch.from_numpy(labels.std)
    for name, index in parts.items():
        features[name] = pooled_features(encoder.eval(), molecules, index, config, device)
        atoms = molecules.composition(index, len(labels.references)) @ labels.references
        offset[name] = torch.from_numpy(atoms + labels.mean)  # (M, T)
        y[name] = (torch.from_numpy(labels.raw[index]) - offset[name]) / scale  # (M, T)
    mean, std = features["train"].mean(0), features["train"].std(0).clamp(min=1e-8)
    features = {name: (value - mean) / std for name, value in features.items()}

    def mae(name, w, b):
        predicted = (features[name] @ w + b) * scale + offset[name]  # (M, T)
        found = errors_of(predicted, molecules, parts[name], labels)
        return {error: value for error, value in found.items() if error.endswith("_mae")}

    layer = nn.Linear(features["train"].shape[1], len(labels.names))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config.lr, weight_decay=0.0)
    x, target = features["train"].float(), y["train"].float()  # (M, F), (M, T)
    batches = StepBatches(molecules, range(len(x)), config.batch_size, config.seed)
    best = (math.inf, None, 0)  # score; w (F, T), b (T,); step
    for step in range(config.max_steps + 1):
        w, b = layer.weight.detach().double().T.clone(), layer.bias.detach().double().clone()
        if step % config.val_every == 0 or step == config.max_steps:
            found, trained = mae("val", w, b), [*mae("train", w, b).values()]  # the last: of all targets
            log.write({"step": step, "split": "val", **found, "train_mae": trained[-1]})
            best = min(best, (score(found, labels, config), (w, b), step), key=lambda one: one[0])
        if step == config.max_steps:
            break
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        mse_loss(layer(x[batches.chosen(step)]), target[batches.chosen(step)]).backward()
        optimizer.step()
        optimizer.zero_grad()
        log.bar.update()
    each = zip(y["train"].T, y["val"].T, strict=True)
    closed = torch.stack([ridge(features["train"], a, features["val"], b) for a, b in each], dim=1)
    tested = {part: mae(part, *best[1]) for part in y if part != "train"}
    for part in tested:
        tested[part] |= {f"{name}_ridge": value for name, value in mae(part, closed, 0.0).items()}
    return best[2], tested, num_parameters(layer)


# ---------------------------------------------------------------- the run


def train_step(net, parts, step, labels, config, device, world):
    """Gradients of the global batch in net; parts are this rank's -> its share of the mean losses, by name."""
    noise = standard_normal(parts[0]["global_atoms"], TRAIN, config.seed, step)  # (A, 3), for the noise head

    def share_of(part):
        mine = noise[part["first_atom"] :][: len(part["z"])]
        y = labels.standardised(part, part["index"].numpy())
        forces = (part["forces"].double() / labels.std[0]).float() if labels.forces else None
        arrays = (part["z"], part["pos"], part["batch"], y, forces, mine)
        arrays = [a if a is None else a.to(device, non_blocking=True) for a in arrays]
        with explain("the radius graph", ValueError):
            return net(*arrays, part["num_molecules"] / config.batch_size, len(mine) / part["global_atoms"])

    return backward(net, parts, share_of, world)


# what last.pt must hold besides the harness's entries. (float,) also allows infinity, plateau's best at first
LAST = {"best_val": {str: float}, "best_step": int, "plateau": {"best": (float,), "num_bad_epochs": int}}
LAST["init_sha256"] = (str, type(None))


def finetune(config, run):
    """The whole run: data, model, start or resume, loop, test."""
    molecules, device = Molecules(config.data), run.device
    train, val, tests = split_data(config, molecules)
    splits = [config.train_split, *filter(None, [config.val_split, *config.test_split.split(",")])]
    lost = {s: len(molecules.split(s)) - len(molecules.split(s, config.target)) for s in splits}
    lost = ", ".join(f"{num:,} of {name or 'all'}" for name, num in lost.items() if num)
    ranks, forces = (run.rank, run.world), config.target == "energy_forces"
    batches = StepBatches(molecules, train, config.batch_size, config.seed, *ranks, config.accumulate, forces)

    # The seed is set again before the head is made: it is then the same for every encoder.
    # DEVIATION: upstream loads the property head too, although pretraining leaves it untrained.
    torch.manual_seed(config.seed)
    encoder, encoder_line = make_encoder(config, run.checkpoint)
    config = replace(config, model=encoder.config)
    molecules.check_elements(np.concatenate([train, val, *tests.values()]), encoder.config.max_z)
    labels = Labels(config, molecules, train, {"val": val} | tests, encoder.config.max_z)
    parts = {"train": train} | labels.others
    torch.manual_seed(config.seed)
    constants = map(np.squeeze, (labels.references, labels.mean, labels.std))  # of one target without T
    model = PropertyModel(encoder, head_of(config), config.reduce, *constants)
    module = Finetuning(model, config).to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
    if config.compile and forces:
        model.compile_derivative(device, one_shape=len(set(np.diff(molecules.ptr))) == config.accumulate == 1)
    elif config.compile:
        compile_layers(module, device)
    unused = model.kind in ("extent", "pooler")  # two heads take no vectors; a probe trains neither encoder nor head
    net = module if config.freeze_encoder else run.parallel(module, find_unused_parameters=unused)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, fused=True)
    plateau = ReduceLROnPlateau(optimizer, "min", config.lr_factor, config.lr_patience, min_lr=config.lr_min)

    state = {"best_val": None, "best_step": 0, "plateau": {"best": math.inf, "num_bad_epochs": 0}}
    state["init_sha256"] = sha256(config.init_from) if run.is_new and config.init_from else None
    run.restore(config, batches, state, LAST, state_dict=module, optimizer=optimizer, average=average)
    plateau.load_state_dict(state["plateau"])
    state.update({} if run.is_new else check_best(run.folder / "best.pt", run.step, state, config))
    run.begin(
        f"{config.target} on {config.data}: {', '.join(f'{len(index):,} {name}' for name, index in parts.items())}",
        *(["drawn at random, not by the file's own splits"] if molecules.splits and not config.train_split else []),
        f"labels: {labels.remark}",
        encoder_line,
        *([f"left out: {lost}: {config.target.replace(',', ' or ')} unknown"] if lost else []),
        f"{num_parameters(module):,} parameters",
    )
    if config.freeze_encoder:
        step, found, parameters = probe(config, encoder, molecules, parts, labels, device, run.log)
        return finish(config, run, labels, molecules, parts, found.pop("val"), found, state, step, parameters)

    def validate():
        model_now = average.module if average else model
        found = errors(model_now, molecules, parts["val"], labels, config, device, *ranks)
        run.log.write({"step": run.step, "split": "val", **found})
        if state["best_val"] is None or score(found, labels, config) < score(state["best_val"], labels, config):
            state.update(best_val=found, best_step=run.step)
            about = {"target": config.target, "name": labels.name, "unit": labels.unit, "head": model.kind}
            about |= {"reduce": config.reduce, "elements": labels.elements, "span": labels.span, "step": run.step}
            content = {"schema": "georecon/1", "model": asdict(encoder.config), "property": about | {"val": found}}
            run.write("best.pt", content | {"state_dict": model_now.state_dict()})
        return score(found, labels, config)

    if run.is_new:
        validate()
        if 0 in config.keep_steps:
            run.save()
    for step, mine in run.steps():  # from last.pt's step to max_steps, or to a signal
        if config.lr_schedule != "plateau" or step < config.lr_warmup_steps:
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        losses = train_step(net, mine, step, labels, config, device, run.world)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(trained, config.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(model)
        run.record(losses, optimizer.param_groups[0]["lr"])
        if run.validating:
            found = validate()
            if config.lr_schedule == "plateau" and run.step > config.lr_warmup_steps:
                plateau.step(found)
                state["plateau"] = {"best": plateau.best, "num_bad_epochs": plateau.num_bad_epochs}
        if run.saving:
            run.save()  # step_<n>.pt if it is to be kept, last.pt

    barrier()  # best.pt is whole
    best, about = load_property_model(run.folder / "best.pt", device)
    found = {name: errors(best, molecules, parts[name], labels, config, device, *ranks) for name in tests}
    finish(config, run, labels, molecules, parts, about["val"], found, state, about["step"], num_parameters(model))


def finish(config, run, labels, molecules, parts, val, test, state, best_step, parameters):
    """Say what came out, beside the paper's figures and what a constant does, and write metrics.json."""
    units, error = {}, f"{'targets' if len(labels.names) > 1 else labels.name}_{config.metric}"
    for split, found in {"val": val, **test}.items():
        found[f"{error}_constant"] = errors_of(labels.constant[split], molecules, parts[split], labels)[error]
        for name, value in found.items():
            units[name] = labels.unit_of(name)
            end = f"_{split}_{name}"
            theirs = [f"{key.removesuffix(end)} {v:g}" for key, v in config.paper.items() if key.endswith(end)]
            beside = f"   in the paper: {', '.join(theirs)}" * bool(theirs)
            run.say(f"{split:<{2 + max(map(len, parts))}}{name:<24}{value:>12.5g} {units[name]}{beside}")
    figures = {"test": test, "val": val, "units": units, "paper": config.paper, "target": config.target}
    figures |= {"best_step": best_step, "parameters": parameters, "molecules": {n: len(i) for n, i in parts.items()}}
    run.finish(**figures, init_from=config.init_from, init_sha256=state["init_sha256"])


def main(arguments):
    start(finetune, FinetuneConfig, arguments)


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
