"""Stage 2: fine-tune a pretrained encoder on a property, or on energies and forces, or probe it with a linear layer.

    python finetune.py configs/demo_forces.yaml                                  a minute on a laptop, no download
    python finetune.py configs/md17_aspirin.yaml init_from=out/pcqm_md17/encoder.pt
    python finetune.py configs/probe_qm9.yaml init_from=out/qm9_small/encoder.pt   encoder frozen, one linear layer
    python finetune.py predict out/demo_forces/best.pt IN.xyz OUT.xyz             energies and forces of your molecules

init_from is an encoder.pt, last.pt or step_<n>.pt, also one of this stage, or a state dict of TorchMD-NET or Coord;
without it the encoder starts from scratch. A run writes to out_dir (default out/<name of the config>):

    config.yaml     every setting, resolved; itself a valid argument
    log.jsonl       one object per logged step: losses, learning rate, molecules/s; split train or val
    last.pt         all that resuming needs
    best.pt         the model at its best validation: finetune.load_property_model("out/demo_gap/best.pt")
    metrics.json    errors on validation and test with their units, beside the paper's, and what made them

A linear probe (freeze_encoder) leaves no last.pt and best.pt. The test molecules are evaluated once, at the end, by
best.pt. Labels are standardised with the training molecules alone:
y' = (y - sum_i ref(z_i) - mean) / std in float64, and only y' becomes float32.
"""

import json
import math
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import l1_loss, mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from data import (
    InputError,
    StepBatches,
    check_file,
    check_out,
    cli,
    epoch_order,
    flaw,
    need,
    read_xyz,
    readable,
    sha256,
    split_indices,
)
from model import (
    ElectronicSpatialExtent,
    EquivariantDipoleMoment,
    EquivariantScalar,
    EquivariantTransformer,
    EquivariantVectorOutput,
    ModelConfig,
    load_representation,
    radius_graph,
    scatter_mean,
    scatter_sum,
    setting,
)
from pretrain import (
    TRAIN,
    Log,
    backward,
    barrier,
    build_config,
    check_compiler,
    check_kinds,
    check_max_z,
    check_same_run,
    check_weights,
    claim_run_folder,
    compile_layers,
    enough_memory,
    fitting,
    grad_norm,
    load_optimizer,
    name_of,
    named_split,
    num_parameters,
    open_data,
    open_run_folder,
    provenance,
    run_stage,
    run_steps,
    save_torch,
    standard_normal,
    sum_over_ranks,
    too_many_neighbors,
    tune_cpu,
    write_atomically,
    write_text,
)
from pretrain import learning_rate as cosine_rate

# ---------------------------------------------------------------- settings and targets


class Target(NamedTuple):
    """How a property is predicted unless the config says otherwise."""

    head: str = "scalar"  # scalar: sum of per-atom scalars; dipole, extent: from vectors and positions
    references: str = "none"  # fit: per-element references by least squares on the training molecules
    centre: bool = True  # subtract the training mean; not from a label that is a length or a second moment


# QM9's twelve, Table 2. All that grows with the molecule gets references; orbital energies do not (torchmd-net #64).
TARGETS = {
    "mu": Target(head="dipole", centre=False),
    "r2": Target(head="extent", centre=False),
    **dict.fromkeys(("homo", "lumo", "gap"), Target()),
    **dict.fromkeys(("alpha", "zpve", "U0", "U", "H", "G", "Cv"), Target(references="fit")),
    "energy_forces": Target(references="fit"),
}
HEADS = {"scalar": EquivariantScalar, "dipole": EquivariantDipoleMoment, "extent": ElectronicSpatialExtent}
# eV of a lone atom at the level of QM9, by atomic number 1, 6, 7, 8, 9
QM9_REFERENCES = {
    "U0": (-13.61312172, -1029.86312267, -1485.30251237, -2042.61123593, -2713.48485589),
    "U": (-13.5745904, -1029.82456413, -1485.26398105, -2042.5727046, -2713.44632457),
    "H": (-13.54887564, -1029.79887659, -1485.2382935, -2042.54701705, -2713.42063702),
    "G": (-13.90303183, -1030.25891228, -1485.71166277, -2043.01812778, -2713.88796536),
}


@dataclass(frozen=True)
class FinetuneConfig:
    """Every setting of this stage. Names are Table 13's where it has one; defaults are its QM9 column."""

    data: str = ""  # HDF5 file made by data.py
    target: str = ""  # energy_forces, or a label of the file such as gap
    train_split: str = ""  # named splits of the file; without them, random parts of all molecules
    val_split: str = ""
    test_split: str = ""  # several, separated by commas, are reported apart
    train_size: int = setting(0, low=0)  # 0: all of the named split, or what the other parts leave over
    val_size: int = setting(0, low=0)
    test_size: int = setting(0, low=0)
    out_dir: str = ""  # empty: out/<name of the config>
    seed: int = setting(1, low=0)  # weights and order; the split does not depend on it

    init_from: str = ""  # empty: from scratch
    freeze_encoder: bool = False  # linear probing, Sec. 5.3
    pooling: str = setting("mean", choices=("mean", "sum"))  # PAPER-SILENT: of a probe's features
    head: str = setting("auto", choices=("auto", *HEADS))
    reduce: str = setting("sum", choices=("sum", "mean"))  # of the per-atom scalars
    references: str = setting("auto", choices=("auto", "none", "fit", "qm9"))
    loss: str = setting("mse", choices=("mse", "l1"))
    energy_weight: float = setting(1.0, low=0)
    force_weight: float = setting(1.0, low=0)
    ema_alpha_y: float = setting(1.0, low=0)
    ema_alpha_dy: float = setting(1.0, low=0)
    position_noise_scale: float = setting(0.0, low=0)  # angstrom, of a second pass whose noise is to be predicted
    denoising_weight: float = setting(0.1, low=0)
    paper: dict = field(default_factory=dict)  # {<model>_<test set>_<error>: its figure}, kept in metrics.json
    model: ModelConfig = field(default_factory=ModelConfig)  # from scratch; an encoder.pt brings its own

    batch_size: int = setting(128, low=1)  # molecules per step over all ranks
    accumulate: int = setting(1, low=1)  # parts that each rank cuts its batch into, to save memory
    max_steps: int = setting(300_000, low=1)  # PAPER-SILENT: the second restart of cosine_warmup, when lr is at its end
    lr: float = setting(4e-4, low=0)
    lr_min: float = setting(1e-7, low=0)
    lr_schedule: str = setting("cosine_warmup", choices=("cosine", "cosine_warmup", "plateau"))
    lr_warmup_steps: int = setting(10_000, low=0)
    lr_cosine_length: int = setting(100_000, low=1)
    lr_patience: int = setting(15, low=0)  # plateau: validations without a gain before lr falls
    lr_factor: float = setting(0.8, low=0.01)  # PAPER-SILENT: by this
    clip_norm: float = setting(0.0, low=0)  # of the gradient; 0: none, as the paper
    ema_decay: float = setting(0.0, low=0)  # validate and test an average of the weights; 0: the weights themselves

    inference_batch_size: int = setting(128, low=1)
    num_workers: int = setting(0, low=0)
    compile: bool = False  # by torch.compile: 1.8 times as fast on one CPU core, after some minutes
    deterministic: bool = False
    log_every: int = setting(100, low=1)
    val_every: int = setting(1000, low=1)
    save_every: int = setting(1000, low=1)
    keep_steps: tuple = setting((), low=0)
    resume: bool = False

    def __post_init__(self):
        if self.ema_decay >= 1:
            raise ValueError(f"ema_decay = {self.ema_decay}: must be below 1")
        if self.lr_factor >= 1:
            raise ValueError(f"lr_factor = {self.lr_factor}: must be below 1")
        not_of_a_probe = ("loss", "clip_norm", "ema_decay", "head", "reduce", "accumulate", "compile")
        not_of_a_probe += ("position_noise_scale", "denoising_weight")
        for known in fields(self) if self.freeze_encoder else ():
            if known.name in not_of_a_probe and getattr(self, known.name) != known.default:
                raise ValueError(f"freeze_encoder = true: a linear probe has no {known.name}, leave it out")
        if self.freeze_encoder and self.lr_schedule == "plateau":
            raise ValueError("freeze_encoder = true: the schedule of a linear probe is cosine or cosine_warmup")


def learning_rate(step, config):
    """`cosine` of pretrain.py, or `cosine_warmup`: cosines of length T, 2 T, 4 T, ... after a linear warm-up."""
    if config.lr_schedule == "cosine" or step < config.lr_warmup_steps:
        return cosine_rate(step, config)
    cycle = (step // config.lr_cosine_length + 1).bit_length() - 1
    phase = (step - config.lr_cosine_length * (2**cycle - 1)) / (config.lr_cosine_length * 2**cycle)
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * phase))


# ---------------------------------------------------------------- data


def split_data(config, molecules):
    """-> indices of the training and the validation molecules, and {name: indices} of the test sets; all disjoint."""
    pool = named_split(molecules, config.train_split)
    from_pool = {"train": config.train_size}
    parts = {}
    if config.val_split and config.val_split != config.train_split:
        val = named_split(molecules, config.val_split)
        size = config.val_size or len(val)
        if size > len(val):
            raise InputError(f"val_size = {size}: {config.val_split} has {len(val)} molecules", code=2)
        parts["val"] = val[split_indices(len(val), [size, None])[0]]
    else:
        from_pool["val"] = config.val_size
    if not config.test_split:
        from_pool["test"] = config.test_size
    if sum(size == 0 for size in from_pool.values()) > 1:
        names = " and ".join(f"{name}_size" for name, size in from_pool.items() if size == 0)
        raise InputError(f"{names} are 0: only one part can take what the others leave over", code=2)
    if sum(from_pool.values()) + (0 in from_pool.values()) > len(pool):
        told = ", ".join(f"{name}_size = {size}" for name, size in from_pool.items())
        raise InputError(f"{told}: {molecules.path} has {len(pool)} molecules for these", code=2)
    sizes = [size or None for size in from_pool.values()]
    if None not in sizes:
        sizes.append(None)
    parts |= {name: pool[part] for name, part in zip(from_pool, split_indices(len(pool), sizes), strict=False)}
    train, val = parts.pop("train"), parts.pop("val")
    for name in config.test_split.split(",") if config.test_split else ():
        key = f"test_{name}" if name in ("train", "val") else name  # beside a training part or validation part of ours
        if key in parts or not name:
            raise InputError(f"test_split = {config.test_split}: a name is empty, or two become {key}", code=2)
        test = named_split(molecules, name)
        if config.test_size > len(test):
            raise InputError(f"test_size = {config.test_size}: {name} has {len(test)} molecules", code=2)
        parts[key] = test[split_indices(len(test), [config.test_size or len(test), None])[0]]
    together = np.concatenate([train, val, *parts.values()])
    if len(np.unique(together)) < len(together):
        raise InputError("the training, validation and test splits share molecules: name disjoint ones", code=2)
    return train, val, parts


def composition(molecules, index, max_z, forces=False):
    """Atoms of each element in the molecules of index (M,) -> (M, max_z) float64; looks at forces too, if asked."""
    counts = np.zeros((len(index), max_z))
    for start in range(0, len(index), 10_000):
        part = molecules.read(index[start : start + 10_000], forces)
        check_max_z(part["z"], max_z, molecules.path)
        np.add.at(counts, (start + part["batch"].numpy(), part["z"].numpy()), 1)
    return counts


def elements(molecules, index, forces=False):
    """Set of the atomic numbers in the molecules of index; looks at forces too, if asked."""
    parts = (index[start : start + 10_000] for start in range(0, len(index), 10_000))
    return set().union(*(np.unique(molecules.read(part, forces)["z"]).tolist() for part in parts))


class Labels:
    """A label in the file's unit, and y' = (y - references - mean) / std; the three from the training molecules."""

    def __init__(self, config, molecules, train, max_z, others):
        self.target = TARGETS.get(config.target, Target())
        self.name = "energy" if config.target == "energy_forces" else config.target
        if not self.name:
            raise InputError("target is not set: energy_forces, or a label of the file", code=2)
        self.forces = config.target == "energy_forces"
        if self.forces and "forces" not in molecules.units:
            raise InputError(f"target = energy_forces, but {molecules.path} has no forces", code=2)
        try:
            self.raw = molecules.label(self.name)  # (M,)
        except InputError as error:
            raise InputError(error, code=2) from None
        self.unit = molecules.units[self.name]
        # Table 2 has meV; energies of a trajectory keep the file's unit, as Tables 3, 4 and 10
        self.shown, self.scale = ("meV", 1000.0) if self.unit == "eV" and not self.forces else (self.unit, 1.0)
        if self.forces and config.freeze_encoder:
            raise InputError("freeze_encoder = true: a linear probe predicts a label, name one as the target", code=2)
        if not (np.abs(self.raw) < 1e30).all():
            raise InputError(f"{molecules.path}: {self.name} is not finite everywhere: look at it with data.py info")
        counts = composition(molecules, train, max_z, self.forces)
        self.elements = np.flatnonzero(counts.sum(0)).tolist()
        self.references = self.fit(config, counts, self.raw[train])  # (max_z,)
        self.remark = ""
        if self.references.any() and np.linalg.matrix_rank(counts) < len(self.elements):
            self.remark = "; too few compositions to tell the elements apart: valid for the trained compositions alone"
        rest = self.raw[train] - counts @ self.references
        self.mean = rest.mean() if self.target.centre else 0.0
        self.std = rest.std() if self.target.centre else np.abs(rest).mean()
        if self.forces:  # energies may be nearly equal; forces say what an error is worth
            self.std = max(self.std, 1e-3 * self.force_rms(molecules, train))
        held = {name: elements(molecules, index, self.forces) for name, index in others.items()}
        missing = {name for name, found in held.items() if found - set(self.elements)}
        if missing:
            where = " and ".join(sorted(missing))
            raise InputError(f"{molecules.path}: {where} hold an element that no training molecule does: draw more")
        if not self.std > 1e-12 * max(1.0, abs(self.mean)):
            raise InputError(f"{molecules.path}: {self.name} is the same for all {len(train)} training molecules")

    def fit(self, config, counts, values):
        kind = self.target.references if config.references == "auto" else config.references
        references = np.zeros(counts.shape[1])
        if kind == "qm9":
            if self.name not in QM9_REFERENCES or len(references) < 10:
                raise InputError(f"references = qm9: there are none for {self.name}, or model.max_z < 10", code=2)
            references[[1, 6, 7, 8, 9]] = QM9_REFERENCES[self.name]
        elif kind == "fit":
            references = np.linalg.lstsq(counts, values, rcond=1e-10)[0]
        return references

    @staticmethod
    def force_rms(molecules, train):
        return molecules.read(train[:1000], forces=True)["forces"].double().square().mean().sqrt().item()

    def standardised(self, part, index):
        """y' of the molecules index (B,) -> float32 (B,); part as Molecules.read gives it."""
        atoms = torch.from_numpy(self.references)[part["z"]]
        rest = torch.from_numpy(self.raw[index]) - scatter_sum(atoms, part["batch"], len(index)) - self.mean
        return (rest / self.std).float()


# ---------------------------------------------------------------- model


def encode(encoder, z, pos, batch, edge_index=None):
    with too_many_neighbors():
        return encoder(z, pos, batch, edge_index)


def pairs(encoder, pos, batch, multiple):
    with too_many_neighbors():
        return radius_graph(pos, batch, encoder.config.cutoff_upper, encoder.config.max_num_neighbors, multiple)


class PropertyModel(nn.Module):
    """Encoder and property head; what it returns is standardised, and `restore` brings it back to the label's unit."""

    def __init__(self, encoder, head, reduce, references, mean=0.0, std=1.0):
        super().__init__()
        self.kind, self.reduce = head, reduce
        self.compiled, self.multiple = None, 1  # by compile_derivative
        self.encoder = encoder
        self.head = HEADS[head](encoder.config.embedding_dimension)
        self.register_buffer("references", torch.as_tensor(references, dtype=torch.float64))  # (max_z,)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float64))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float64))

    def readout(self, x, vec, z, pos, batch, num_molecules):
        """x (N, F), vec (N, 3, F) -> y' (B,)."""
        if self.kind != "scalar":
            return self.head(x, vec, z, pos, batch, num_molecules)
        return (scatter_sum if self.reduce == "sum" else scatter_mean)(self.head(x, vec), batch, num_molecules)

    def derivative(self, z, pos, batch, num_molecules, edge_index):
        """-> y' (B,), dy'/dpos (N, 3); with a graph of their own if the module is training."""
        with torch.enable_grad():
            pos = pos.detach().requires_grad_()
            x, vec = encode(self.encoder, z, pos, batch, edge_index)
            y = self.readout(x, vec, z, pos, batch, num_molecules)
            (gradient,) = torch.autograd.grad(y.sum(), pos, create_graph=self.training)
        return y if self.training else y.detach(), gradient

    def compile_derivative(self, device, one_shape=True):
        """From now on energies and forces, and what training makes of them, are computed by compiled code.

        one_shape: whether batches have as many atoms from step to step, and gradients are not accumulated over them.
        """

        def derivative(z, pos, batch, num_molecules, edge_index):
            def total(pos):
                x, vec = self.encoder(z, pos, batch, edge_index)
                y = self.readout(x, vec, z, pos, batch, num_molecules)
                return y.sum(), y

            # not autograd.grad: torch.compile can differentiate this one again
            gradient, y = torch.func.grad(total, has_aux=True)(pos)
            return y, gradient

        check_compiler(device)
        if device.type == "cuda" and one_shape:  # as CUDA graphs, since launches dominate
            # each shape is compiled for itself; with fullgraph torch would raise an error at the ninth
            self.multiple, settings = 256, {"mode": "reduce-overhead", "dynamic": False}
        else:  # one kernel for all shapes, so that a resumed run has the bits of an unbroken one
            self.multiple, settings = 1, {"fullgraph": True, "dynamic": True}
        self.compiled = torch.compile(derivative, **settings)

    def forward(self, z, pos, batch, num_molecules, forces=False, edge_index=None):
        """-> y' (B,), and with forces -dy'/dpos (N, 3), else None. Leaves no graph unless the module is training."""
        if not forces:
            x, vec = encode(self.encoder, z, pos, batch, edge_index)
            return self.readout(x, vec, z, pos, batch, num_molecules), None
        if self.compiled and edge_index is None:  # not compiled: how many pairs there are depends on the positions
            edge_index = pairs(self.encoder, pos, batch, self.multiple)
        y, gradient = (self.compiled or self.derivative)(z, pos, batch, num_molecules, edge_index)
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
        if config.position_noise_scale and config.denoising_weight:
            self.noise_head = EquivariantVectorOutput(model.encoder.config.embedding_dimension)

    def forward(self, z, pos, batch, y, forces, noise, molecules_share, atoms_share):
        """y (B,) and forces (N, 3) standardised, noise (N, 3) or None -> dict of scalar losses."""
        config = self.config
        loss_fn = mse_loss if config.loss == "mse" else l1_loss
        predicted, predicted_forces = self.model(z, pos, batch, len(y), self.forces)
        losses = {"loss_energy" if self.forces else "loss_property": loss_fn(predicted, y) * molecules_share}
        if self.forces:
            # L = w_E a_y L_E + w_F a_dy L_F. Upstream smooths L_E <- a L_E + (1 - a) (past L_E, without gradient):
            # the past adds a constant, so what trains the network is a L_E. With Table 13's 0.2 and 0.05, 0.01 L_E.
            losses["loss_forces"] = loss_fn(predicted_forces, forces) * atoms_share
            total = config.energy_weight * config.ema_alpha_y * losses["loss_energy"]
            total = total + config.force_weight * config.ema_alpha_dy * losses["loss_forces"]
        else:
            total = losses["loss_property"]
        if noise is not None:
            # DEVIATION: a second pass. The parent's code noises the one pass and keeps the clean geometry's labels.
            x, vec = encode(self.model.encoder, z, pos + config.position_noise_scale * noise, batch)
            losses["loss_noise"] = mse_loss(self.noise_head(x, vec), noise) * atoms_share
            total = total + config.denoising_weight * losses["loss_noise"]
        return {"loss": total, **losses}


def read_weights(path, remedy):
    """A torch file as a dict; plain tensors and values only, so that it cannot run code."""
    check_file(path, remedy)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        reason = "is no torch file, cut off, or holds pickled classes, which could run code"
        hint = "a Lightning file's tensors are exported as the README says under Fine-tuning"
        raise InputError(f"{path} {reason} ({type(error).__name__}); {hint}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not weights by name")
    inner = content.get("state_dict", content)
    check_weights(inner if isinstance(inner, dict) else {}, path)
    return content


def read_encoder(path, model):
    """-> the encoder in a checkpoint, and how many tensors there are beside it.

    encoder.pt, last.pt, step_<n>.pt of ours bring their ModelConfig; a TorchMD-NET or Coord state dict is of model.
    """
    content = read_weights(path, "name an encoder.pt of pretrain.py, or a state dict")
    state_dict = content.get("state_dict", content)
    with fitting(f"no encoder can be made of {path}"):
        if "schema" in content:
            if content["schema"] != "georecon/1":
                raise ValueError(f"its schema is {content['schema']}, not georecon/1")
            # vector messages may be made to vanish at the cutoff after pretraining: no weights belong to it
            vector_cutoff = model.vector_cutoff
            model = build_config(ModelConfig, content["model"] if "model" in content else content["config"]["model"])
            model = replace(model, vector_cutoff=model.vector_cutoff or vector_cutoff)
            own = ("encoder.", "model.encoder.")  # of pretrain.py, of finetune.py
            inner = {k.split("encoder.", 1)[1]: v for k, v in state_dict.items() if k.startswith(own)}
            state_dict = inner or state_dict
        encoder = EquivariantTransformer(model)
        load_representation(encoder, state_dict)
    return encoder, len(content.get("state_dict", content)) - len(encoder.state_dict())


def make_encoder(config, checkpoint):
    """-> the encoder of init_from, or a fresh one, and the line that says which weights it has."""
    if checkpoint and config.init_from:  # which may be another file by now: its weights are in the checkpoint
        with fitting(f"{config.out_dir}/last.pt does not fit this code's model"):
            own = build_config(ModelConfig, checkpoint["config"]["model"])
        own = replace(own, vector_cutoff=own.vector_cutoff or config.model.vector_cutoff)
        return EquivariantTransformer(own), f"encoder: of last.pt at step {checkpoint['step']:,}"
    if not config.init_from:
        with enough_memory():
            encoder = EquivariantTransformer(config.model)
        return encoder, f"encoder: from scratch, seed {config.seed}; fresh: all {len(encoder.state_dict())} tensors"
    encoder, rest = read_encoder(config.init_from, config.model)
    brought = asdict(encoder.config).items() - asdict(config.model).items()
    by_file = ", ".join(f"{key}={value}" for key, value in sorted(brought)) or "as configured"
    return encoder, (
        f"encoder: {len(encoder.state_dict())} tensors of {config.init_from}, {rest} others in it not used; "
        f"fresh: the head; model, by the file: {by_file}"
    )


def load_property_model(path):
    """-> the PropertyModel of a best.pt, in evaluation mode on the CPU, and what the file says of it (a dict)."""
    content = read_weights(path, "name the best.pt of a run of finetune.py; a linear probe leaves none")
    if content.get("schema") != "georecon/1" or "property" not in content:
        raise InputError(f"{path} is no best.pt of finetune.py")
    about = content["property"]
    kinds = {"target": str, "name": str, "unit": str, "head": str, "reduce": str, "elements": list, "val": dict}
    check_kinds(about, kinds | {"step": int}, path, "best.pt of finetune.py")
    with fitting(f"{path} does not fit this code's model"):
        if about["reduce"] not in ("sum", "mean"):
            raise ValueError(f"its reduce is {about['reduce']}")
        if not all(type(z) is int for z in about["elements"]) or not (about["name"] + about["unit"]).isprintable():
            raise ValueError("its elements are no numbers, or its name or unit no word")
        encoder = EquivariantTransformer(build_config(ModelConfig, content["model"]))
        model = PropertyModel(encoder, about["head"], about["reduce"], references=[0.0] * encoder.config.max_z)
        model.load_state_dict(content["state_dict"])
        if not model.std > 0:
            raise ValueError(f"its std is {model.std.item()}")
    return model.eval().requires_grad_(False), about


def check_best(folder, state, config):
    """Refuse to resume beside a best.pt that is not of this run; a kill may have left one of a step after last.pt's."""
    about = load_property_model(folder / "best.pt")[1]
    same = about["target"] == config.target
    if same:
        check_kinds(state["best_val"], dict.fromkeys(about["val"], float), folder / "last.pt", "last.pt of this run")
        best = state["best_step"], state["best_val"]
        same = about["step"] > state["step"] or (about["step"], about["val"]) == best
    if not same:
        raise InputError(f"{folder / 'best.pt'} is of another run than last.pt: bring its own back")


# ---------------------------------------------------------------- evaluation


def predict_batches(model, molecules, index, size, device, forces):
    """Predictions for molecules index (M,), in batches -> (place in index, y (b,) float64, forces (n, 3), part)."""
    for place in np.array_split(np.arange(len(index)), math.ceil(len(index) / size)):
        part = molecules.read(index[place], forces)
        z, pos, batch = (part[name].to(device) for name in ("z", "pos", "batch"))
        with torch.no_grad():
            y, f = model(z, pos, batch, len(place), forces)
            y = model.restore(y, z, batch).cpu()
        yield place, y, f.double().cpu() * model.std.cpu() if forces else None, part


def errors(model, molecules, index, labels, config, device, rank, world):
    """Mean absolute and root mean square errors over the molecules of index, by name, in the unit shown."""
    model.eval()
    total = torch.zeros(7, dtype=torch.float64)
    mine, size = index[rank::world], config.inference_batch_size
    for place, y, f, part in predict_batches(model, molecules, mine, size, device, labels.forces) if len(mine) else ():
        error = (y - torch.from_numpy(labels.raw[mine[place]])) * labels.scale  # (b,)
        per_atom = error.abs() / torch.bincount(part["batch"])
        total[:3] += torch.stack([error.abs().sum(), error.square().sum(), per_atom.sum()])
        if labels.forces:
            error = f - part["forces"].double()  # (n, 3)
            total[3:5] += torch.stack([error.abs().sum(), error.square().sum()])
            total[5] += error.numel()
        total[6] += len(place)
    model.train()
    absolute, square, per_atom, f_absolute, f_square, f_num, num = sum_over_ranks(total.to(device)).tolist()
    found = {f"{labels.name}_mae": absolute / num, f"{labels.name}_rmse": math.sqrt(square / num)}
    if labels.forces:
        found["energy_per_atom_mae"] = per_atom / num
        found |= {"forces_mae": f_absolute / f_num, "forces_rmse": math.sqrt(f_square / f_num)}
    return found


def score(found, labels, config):
    """What chooses best.pt: the errors weighted as the losses. PAPER-SILENT."""
    if labels.forces:
        return config.energy_weight * found["energy_mae"] + config.force_weight * found["forces_mae"]
    return found[f"{labels.name}_mae"]


def unit_of(name, labels):
    if name.startswith("forces"):
        return f"{labels.unit}/angstrom"
    return f"{labels.shown} per atom" if "per_atom" in name else labels.shown


# ---------------------------------------------------------------- linear probe


@torch.no_grad()
def pooled_features(encoder, molecules, index, config, device):
    """Pooled x of the frozen encoder: (M, F) float64."""
    features = []
    for part in np.array_split(index, math.ceil(len(index) / config.inference_batch_size)):
        arrays = molecules.read(part)
        z, pos, batch = (arrays[name].to(device) for name in ("z", "pos", "batch"))
        x = encode(encoder, z, pos, batch)[0].double()
        features.append((scatter_mean if config.pooling == "mean" else scatter_sum)(x, batch, len(part)).cpu())
    return torch.cat(features)


def ridge(features, y, val_features, val_y):
    """Closed-form linear regression on standardised features (M, F): -> w (F,), the penalty the best on validation."""
    covariance = features.T @ features / len(features)
    eye = torch.eye(len(covariance), dtype=covariance.dtype)
    solutions = [
        torch.linalg.solve(covariance + penalty * eye, features.T @ y / len(features))
        for penalty in (1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    ]
    return min(solutions, key=lambda w: (val_features @ w - val_y).abs().mean().item())


def probe(config, encoder, molecules, parts, labels, device, log):
    """Sec. 5.3 and Fig. 3: one linear layer on the frozen encoder -> {set: errors}, by descent and in closed form."""
    features, y = {}, {}
    for name, index in parts.items():
        features[name] = pooled_features(encoder, molecules, index, config, device)
        atoms = composition(molecules, index, len(labels.references)) @ labels.references
        y[name] = torch.from_numpy((labels.raw[index] - atoms - labels.mean) / labels.std)
    mean, std = features["train"].mean(0), features["train"].std(0).clamp(min=1e-8)
    features = {name: (value - mean) / std for name, value in features.items()}

    def mae(name, w, b):
        return (features[name] @ w + b - y[name]).abs().mean().item() * labels.std * labels.scale

    layer = nn.Linear(features["train"].shape[1], 1)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=config.lr, weight_decay=0.0)
    x, target = features["train"].float(), y["train"].float()  # (M, F), (M,)
    size, steps_per_epoch = config.batch_size, len(x) // config.batch_size
    best, key = (math.inf, None, 0), f"{labels.name}_mae"
    for step in range(config.max_steps + 1):
        w, b = layer.weight.detach().double()[0], layer.bias.detach().double()
        if step % config.val_every == 0 or step == config.max_steps:
            found = mae("val", w, b)
            log.write({"step": step, "split": "val", key: found, "train_mae": mae("train", w, b)})
            best = min(best, (found, (w.clone(), b.clone()), step), key=lambda entry: entry[0])
        if step == config.max_steps:
            break
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            order = torch.from_numpy(epoch_order(len(x), config.seed, epoch))
        chosen = order[place * size : (place + 1) * size]
        optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        loss = mse_loss(layer(x[chosen]).squeeze(1), target[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        log.bar.update()
    centre = y["train"].mean()  # not 0 for a label that is only scaled
    closed = ridge(features["train"], y["train"] - centre, features["val"], y["val"] - centre)
    nothing = torch.zeros_like(closed)
    median = y["train"].median()
    return best[2], {
        name: {
            key: mae(name, *best[1]),
            f"{key}_ridge": mae(name, closed, centre),
            f"{key}_constant": mae(name, nothing, median),
        }
        for name in parts
        if name != "train"
    }


# ---------------------------------------------------------------- training


def train_step(net, parts, step, labels, config, device, world):
    """Forward and backward over this rank's parts of the global batch -> its share of the mean losses, by name."""
    noise = None
    if config.position_noise_scale and config.denoising_weight:
        noise = standard_normal((parts[0]["global_atoms"], 3), TRAIN, config.seed, step)  # (A, 3) for the global batch

    def losses_of(part):
        first, num_atoms = part["first_atom"], len(part["z"])
        y = labels.standardised(part, part["index"].numpy())
        forces = (part["forces"].double() / labels.std).float() if labels.forces else None
        mine = noise[first : first + num_atoms] if noise is not None else None
        arrays = [t if t is None else t.to(device) for t in (part["z"], part["pos"], part["batch"], y, forces, mine)]
        return net(*arrays, part["num_molecules"] / config.batch_size, num_atoms / part["global_atoms"])

    return backward(net, parts, losses_of, world)


def describe(config, sizes, labels, encoder_line, model, device, world):
    """The lines that say what is about to be trained, on what, from where."""
    yield f"{config.target} on {config.data}: {', '.join(f'{size:,} {name}' for name, size in sizes.items())}"
    yield f"labels: mean {labels.mean:.6g}, scale {labels.std:.4g} {labels.unit} after atom references{labels.remark}"
    yield encoder_line
    yield f"{num_parameters(model):,} parameters"
    yield f"{world} x {name_of(device)}; {config.max_steps:,} steps of {config.batch_size} molecules"


def final_metrics(config, val, test, labels, sizes, best_step, parameters, wall_s):
    return {
        "test": test,
        "val": val,
        "units": {name: unit_of(name, labels) for name in val},
        "paper": config.paper,
        "target": config.target,
        "seed": config.seed,
        "steps": config.max_steps,
        "best_step": best_step,
        "molecules": sizes,
        "init_from": config.init_from,
        "parameters": parameters,
        "wall_s": round(wall_s, 1),
        "data": config.data,
    }


def report(metrics):
    """The lines that say what came out, beside the paper's figure."""
    for split, found in {"val": metrics["val"], **metrics["test"]}.items():
        for name, value in found.items():
            suffix = f"_{split}_{name}"
            paper = [f"{k.removesuffix(suffix)} {v:g}" for k, v in metrics["paper"].items() if k.endswith(suffix)]
            paper = f"   in the paper: {', '.join(paper)}" if paper else ""
            yield f"{split:<14}{name:<24}{value:>12.5g} {metrics['units'].get(name, '')}{paper}"


def finetune(config, device, rank, world):
    """The whole run: data, model, start or resume, loop, test."""
    folder = Path(config.out_dir)
    checkpoint = open_run_folder(config)
    made_by = provenance(device, world)  # now: the checkout may move on during a long run
    molecules = open_data(config)
    train, val, tests = split_data(config, molecules)
    data_sha256 = molecules.sha256()
    forces = config.target == "energy_forces"
    source = StepBatches(molecules, train, config.batch_size, config.seed, rank, world, config.accumulate, forces)

    # model: seeded again for the head, so that it is the same wherever the encoder comes from
    # DEVIATION: upstream loads the property head too, which pretraining has left untrained
    torch.manual_seed(config.seed)
    encoder, encoder_line = make_encoder(config, checkpoint)
    config = replace(config, model=encoder.config)
    labels = Labels(config, molecules, train, encoder.config.max_z, {"val": val} | tests)
    torch.manual_seed(config.seed)
    head = labels.target.head if config.head == "auto" else config.head
    model = PropertyModel(encoder, head, config.reduce, labels.references, labels.mean, labels.std)
    net = module = Finetuning(model, config).to(device)
    if dist.is_initialized() and not config.freeze_encoder:
        unused = head == "extent"  # it takes no vectors
        net = DistributedDataParallel(module, gradient_as_bucket_view=True, find_unused_parameters=unused)
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=0.0, fused=True)
    plateau = ReduceLROnPlateau(optimizer, factor=config.lr_factor, patience=config.lr_patience, min_lr=config.lr_min)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay)) if config.ema_decay else None
    evaluated = average.module if average else model
    if config.compile:
        if labels.forces:
            sizes = np.diff(molecules.ptr)
            model.compile_derivative(device, sizes.min() == sizes.max() and config.accumulate == 1)
        else:
            compile_layers(module, device)

    # start or resume
    state = {"step": 0, "wall_s": 0.0, "best_val": None, "best_step": 0, "init_sha256": None}
    if checkpoint:
        check_same_run(checkpoint, config, data_sha256)
        with fitting(f"{folder / 'last.pt'} does not fit this code's model"):
            module.load_state_dict(checkpoint["state_dict"])
            load_optimizer(optimizer, checkpoint["optimizer"], checkpoint["step"])
            saved = checkpoint["plateau"]
            plateau.best, plateau.num_bad_epochs = float(saved["best"]), int(saved["num_bad_epochs"])
            if average:
                average.load_state_dict(checkpoint["average"])
            state = {key: checkpoint[key] for key in state}
        kinds = {"best_val": dict, "best_step": int, "init_sha256": str if config.init_from else type(None)}
        check_kinds(state, kinds, folder / "last.pt", "last.pt of finetune.py")
        check_best(folder, state, config)
    elif config.init_from:
        state["init_sha256"] = sha256(config.init_from)
    barrier()  # every rank has looked at the folder before rank 0 writes to it
    lock = claim_run_folder(config, state["step"] if checkpoint else None) if rank == 0 else None
    log = Log(folder / "log.jsonl", state["step"], config.max_steps, active=rank == 0)
    parts = {"train": train, "val": val, **tests}
    sizes = {name: len(index) for name, index in parts.items()}
    for line in describe(config, sizes, labels, encoder_line, module, device, world):
        log.say(line)
    began = time.perf_counter() - state["wall_s"]

    def finish(val_errors, test_errors, best_step):
        if rank == 0:
            wall_s = time.perf_counter() - began
            # a probe trains a linear layer in place of the property head
            parameters = encoder.config.embedding_dimension + 1 if config.freeze_encoder else num_parameters(model)
            metrics = final_metrics(config, val_errors, test_errors, labels, sizes, best_step, parameters, wall_s)
            metrics |= {"data_sha256": data_sha256, "init_sha256": state["init_sha256"], **made_by}
            write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
            lock.close()
            for line in report(metrics):
                log.say(line)
            log.say(f"{wall_s:.0f} s; the run is in {folder}")

    if config.freeze_encoder:
        best_step, found = probe(config, model.encoder.eval(), molecules, parts, labels, device, log)
        return finish(found.pop("val"), found, best_step)

    def save_best(step):
        content = {"schema": "georecon/1", "model": asdict(encoder.config), "state_dict": evaluated.state_dict()}
        content["property"] = {
            "target": config.target,
            "name": labels.name,
            "unit": labels.unit,
            "head": head,
            "reduce": config.reduce,
            "elements": labels.elements,
            "step": step,
            "val": state["best_val"],
        }
        save_torch(folder / "best.pt", content)

    def save(step):
        if rank:
            return
        check_weights(module.state_dict(), f"step {step}")
        content = {"schema": "georecon/1", "config": asdict(config), "data_sha256": data_sha256, **state}
        content |= {"step": step, "wall_s": time.perf_counter() - began, "state_dict": module.state_dict()}
        content |= {"optimizer": optimizer.state_dict(), "plateau": plateau.state_dict()}
        content["average"] = average.state_dict() if average else None
        if step in config.keep_steps:
            save_torch(folder / f"step_{step}.pt", content)
        save_torch(folder / "last.pt", content)

    def validate(step):
        found = errors(evaluated, molecules, val, labels, config, device, rank, world)
        log.write({"step": step, "split": "val", **found})
        if state["best_val"] is None or score(found, labels, config) < score(state["best_val"], labels, config):
            state["best_val"], state["best_step"] = found, step
            if rank == 0:
                save_best(step)
        if config.lr_schedule == "plateau" and step > config.lr_warmup_steps:
            plateau.step(score(found, labels, config))

    if not checkpoint:
        validate(0)
        if 0 in config.keep_steps:
            save(0)

    def take_step(step, parts):
        if config.lr_schedule != "plateau" or step < config.lr_warmup_steps:
            optimizer.param_groups[0]["lr"] = learning_rate(step, config)
        lr = optimizer.param_groups[0]["lr"]
        share = train_step(net, parts, step, labels, config, device, world)
        norm = nn.utils.clip_grad_norm_(trained, config.clip_norm) if config.clip_norm else grad_norm(trained)
        share["grad_norm"] = norm / world  # the ranks' shares are summed, the norm is the same
        optimizer.step()
        optimizer.zero_grad()
        if average:
            average.update_parameters(model)
        return lr, share

    run_steps(config, source, state["step"], take_step, validate, save, log, device, world)
    barrier()  # best.pt is whole
    log.bar.close()
    best, about = load_property_model(folder / "best.pt")
    best.to(device)
    found = {name: errors(best, molecules, t, labels, config, device, rank, world) for name, t in tests.items()}
    finish(about["val"], found, about["step"])


# ---------------------------------------------------------------- predict


IN_EV = {"eV": 1.0, "kcal/mol": 0.0433641153}


def predict_molecule(model, about, z, pos, edge_index=None):
    """One molecule, z (n,) and pos (n, 3) on the model's device -> value, forces (n, 3) float64 or None.

    eV and eV/angstrom for a model of energies and forces, else the property in its unit. InputError: unknown element.
    """
    if strange := set(z.tolist()) - set(about["elements"]):
        raise InputError(f"element {min(strange)} was not among the molecules that the model was trained on")
    forces, batch = about["target"] == "energy_forces", torch.zeros_like(z)
    scale = IN_EV[about["unit"]] if forces else 1.0
    y, f = model(z, (pos - pos.mean(0)).to(next(model.parameters()).dtype), batch, 1, forces, edge_index)
    return model.restore(y, z, batch).item() * scale, (f.double() * model.std).cpu().numpy() * scale if forces else None


def predict(checkpoint, source, out):
    """python finetune.py predict best.pt IN.xyz OUT.xyz: eV and eV/angstrom, or the property in its unit."""
    ase = need("ase", "reading and writing xyz")
    need("ase.io", "reading and writing xyz")
    calculators = need("ase.calculators.singlepoint", "reading and writing xyz")
    model, about = load_property_model(checkpoint)
    check_file(source, "give an extended xyz")
    check_out(Path(out), ".xyz", ".extxyz")
    if about["target"] == "energy_forces" and about["unit"] not in IN_EV:
        raise InputError(f"{checkpoint}: energies in {about['unit']}; known are {', '.join(IN_EV)}")
    written = []
    with readable(Path(source)):
        read = list(read_xyz(Path(source), labelled=False))
    for mol in read:
        if "skip" in mol:
            raise InputError(f"{source}: molecule {mol['id']} is {mol['skip']}")
        if cause := flaw(mol["z"], mol["pos"], {}):
            raise InputError(f"{source}: molecule {mol['id']} has {cause}")
        try:
            value, forces = predict_molecule(
                model, about, torch.from_numpy(mol["z"]).long(), torch.from_numpy(mol["pos"])
            )
        except InputError as error:
            raise InputError(f"{source}: molecule {mol['id']}: {error}") from None
        atoms = ase.Atoms(mol["z"], mol["pos"])
        if forces is None:
            atoms.info |= {about["name"]: value, "unit": about["unit"]}
        else:
            atoms.calc = calculators.SinglePointCalculator(atoms, energy=value, forces=forces)
        written.append(atoms)
    if not written:
        raise InputError(f"{source}: no molecules inside")
    write_atomically(Path(out), lambda path: ase.io.write(str(path), written, format="extxyz"))
    kind = f"{about['name']} and forces" if about["target"] == "energy_forces" else about["name"]
    print(f"{out}: {kind} of {len(written)} molecules")


def main(arguments):
    if arguments[:1] == ["predict"]:
        if len(arguments) != 4:
            raise InputError("usage: python finetune.py predict best.pt IN.xyz OUT.xyz", code=2)
        tune_cpu()
        return predict(*arguments[1:])
    run_stage(finetune, FinetuneConfig, arguments)


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
