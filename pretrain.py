"""Stage 1: pretrain an encoder on 3D geometries alone, with GeoRecon's objective or Coord's (paper, Sec. 4).

    python pretrain.py configs/demo.yaml                                     a minute on a laptop, no download
    python pretrain.py configs/qm9_small.yaml objective=coord out_dir=out/qm9_small_coord
    torchrun --nproc_per_node=4 pretrain.py configs/pcqm.yaml                the paper's run
    python pretrain.py configs/pcqm.yaml resume=true                         go on where it stopped

A run writes to out_dir (default out/<name of the config>); README.md says what each file is.

All randomness follows from keys: the order from (seed, epoch), noise from (seed, step), first weights from the seed.
Validation molecules and their noise are the same for all seeds. A rank takes its slice of the global order and noise.
So a killed run resumes to the same bits (on three ranks or more: to rounding). The number of ranks changes rounding.
"""

import math
import pkgutil
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from data import Molecules, StepBatches, normal_of_each, split_indices, standard_normal
from harness.compiled import compile_layers
from harness.errors import InputError, cli, explain
from harness.ranks import sum_over_ranks
from harness.run import start
from model import (
    EquivariantLayers,
    EquivariantVectorOutput,
    Linear,
    ModelConfig,
    new_encoder,
    save_encoder,
    scatter_mean,
    scatter_sum,
    setting,
    take,
)

# ---------------------------------------------------------------- settings

BEYOND = {  # imported when a config asks for one
    "frad": "beyond.frad:Frad",
    "scd": "beyond.scd:SelfConditioned",
    "unimol": "beyond.unimol_objective:UniMolPretraining",
    "unimol_rec": "beyond.unimol_objective:UniMolPretraining",
}


@dataclass(frozen=True)
class PretrainConfig:
    """Every setting of this stage. Names are Table 13's where it has one; defaults are its QM9 column."""

    data: str = ""  # HDF5 file made by data.py
    split: str = ""  # train on this named split of the file; empty: on all molecules
    val_size: int = setting(100, low=1)  # molecules held out for validation (Coord's 100)
    out_dir: str = ""  # empty: out/<name of the config>
    seed: int = setting(1, low=0)

    objective: str = setting("georecon", choices=("georecon", "coord", "rec_only", *BEYOND))
    position_noise_scale: float = setting(0.04, low=0)  # sigma, angstrom
    alpha: float = setting(1.0, low=0)  # Sec. 4.1: noise of the rec variant in units of sigma, "set to 1 for default"
    w_noise: float = setting(1.0, low=0)  # PAPER-SILENT: Coord's denoising_weight
    w_clean: float = setting(1.0, low=0)  # PAPER-SILENT
    w_rec: float = setting(0.45, low=0)  # PAPER-SILENT for the main run; the middle of Table 7
    rec_target: str = setting("scaled", choices=("scaled", "unit"))  # PAPER-SILENT: alpha eps / sigma; eps / sigma
    decoder_layers: int = setting(1, low=0)  # PAPER-SILENT: "lightweight"
    decoder_vec: bool = True  # PAPER-SILENT: the decoder starts from vec of the encoder; false: from zero
    decoder_graph_emb: bool = True  # false: the decoder sees zero in place of g, a control that the paper lacks
    pooling: str = setting("mean", choices=("mean", "sum", "attention"))  # Sec. 4.2
    dihedral_angle_noise_scale: float = setting(2.0, low=0)  # frad: degrees
    mask_probability: float = setting(0.2, low=0, below=1 + 1e-9)  # scd: share of the molecules that train without g
    clean_noise_scale: float = setting(0.005, low=0)  # scd: angstrom, of the encoding that g is taken from
    drop_path: float = setting(0.0, low=0, below=1)  # scd: share of the increments of atoms that are dropped
    model: ModelConfig = field(default_factory=ModelConfig)

    batch_size: int = setting(200, low=1)  # molecules per step over all ranks: Table 13's 50 on each of 4 GPUs
    accumulate: int = setting(1, low=1)  # parts that each rank cuts its batch into, to save memory
    max_steps: int = setting(400_000, low=1)
    lr: float = setting(4e-4, low=0)
    lr_min: float = setting(1e-7, low=0)
    lr_warmup_steps: int = setting(10_000, low=0)
    lr_cosine_length: int = setting(400_000, low=1)
    precision: str = setting("32", choices=("32", "tf32", "bf16"))  # tf32: a GPU's; bf16: of linear layers alone

    inference_batch_size: int = setting(70, low=1)
    num_workers: int = setting(0, low=0)  # loader processes a rank; 0: read in the training process
    compile: bool | None = None  # attention layers by torch.compile; auto: in a long run with a compiler
    deterministic: bool = False  # bitwise repeatable on CUDA too, at some cost; the CPU always is
    log_every: int = setting(100, low=1)
    val_every: int = setting(1000, low=1)
    save_every: int = setting(1000, low=1)
    keep_steps: tuple = setting((), low=0)  # steps at which a copy step_<n>.pt is kept
    resume: bool = False


# ---------------------------------------------------------------- the method


class GraphPooling(nn.Module):
    """g_b = mean_{i in b} x_i (Sec. 4.2: "We adopt mean pooling"): x (N, F) -> graph_emb (B, F).

    PAPER-SILENT: for the ablation, `sum`, and `attention`: softmax over the atoms of a molecule of a linear score.
    """

    def __init__(self, kind, channels):
        super().__init__()
        self.kind = kind
        self.score = Linear(channels, 1) if kind == "attention" else None

    def forward(self, x, batch, num_molecules):
        if self.kind != "attention":
            return (scatter_sum if self.kind == "sum" else scatter_mean)(x, batch, num_molecules)
        score = self.score(x)  # (N, 1)
        lowest = score.new_full((num_molecules, 1), -torch.inf)
        highest = lowest.scatter_reduce(0, batch.unsqueeze(1), score.detach(), "amax")  # (B, 1)
        weight = (score - take(highest, batch)).exp()  # (N, 1)
        return scatter_sum(weight * x, batch, num_molecules) / scatter_sum(weight, batch, num_molecules)


class GraphReconstructionDecoder(EquivariantLayers):
    """The light decoder: predict the noise of each atom from its own embedding and the molecule's pooled one.

    h_i = W [x_i^rec || g_clean], then attention layers on the perturbed graph, then a gated head: -> (N, 3). Sec. 4.2.
    PAPER-SILENT: the paper says only that the decoder is "lightweight" and concatenates. Ours has layers like the
    encoder's and a head of its own. It starts from the encoder's vec; None starts it from zero.
    """

    def __init__(self, config, num_layers):
        super().__init__(config, num_layers)
        channels = config.embedding_dimension
        self.combine = Linear(2 * channels, channels)
        self.head = EquivariantVectorOutput(channels)

    def forward(self, x, vec, graph_emb, pos, batch):
        x = self.combine(torch.cat([x, take(graph_emb, batch)], dim=1))  # (N, F)
        return self.head(*self.layers(x, vec, self.graph(pos, batch)))  # (N, 3)


class Pretraining(nn.Module):
    """The objectives of Sec. 4.3 on any encoder (z, pos, batch) -> x, vec; returns every loss term by name.

    objective   loss
    coord       |head(noised) - eps / sigma|^2, Coord (Zaidi et al., arXiv:2206.00133)
    georecon    w_noise * coord + w_clean * |head(clean)|^2 + w_rec * |decoder(rec | g_clean) - alpha eps / sigma|^2
    rec_only    georecon with w_clean = 0 (App. E)
    All are means over atoms and axes. beyond/README.md says what extra_noise and inputs are for.
    """

    extra_noise, inputs = 0, None
    unit = "mean square error of noise / sigma, per atom and axis"

    def __init__(self, encoder, config):
        super().__init__()
        self.config = config  # keys: objective alpha w_* rec_target decoder_* pooling position_noise_scale
        self.encoder = encoder
        self.noise_head = EquivariantVectorOutput(config.model.embedding_dimension)
        if config.objective != "coord":
            if not config.decoder_layers and not config.decoder_vec:
                raise InputError("decoder_layers = 0, decoder_vec = False: nothing gives the noise a direction", code=2)
            self.pooling = GraphPooling(config.pooling, config.model.embedding_dimension)
            self.decoder = GraphReconstructionDecoder(config.model, config.decoder_layers)

    def forward(self, z, pos, batch, noise, num_molecules, shuffle=False):
        """noise (N, 3) = eps / sigma, standard normal -> dict of scalar losses; `loss` is the weighted total.

        With shuffle, also `loss_rec_shuffled`: the decoder sees the previous molecule's graph embedding.
        """
        config, N = self.config, len(z)
        # Sec. 4.1: "The injected noise is shared across these variants."
        pos_noised = pos + config.position_noise_scale * noise
        pos_rec = pos + config.alpha * config.position_noise_scale * noise
        # one encoder call for all variants: they are further molecules of the batch. alpha = 1: rec is the noised one
        variants = [pos_noised, pos, pos_rec][: 1 if config.objective == "coord" else 2 if config.alpha == 1 else 3]
        offsets = [batch + k * num_molecules for k in range(len(variants))]
        x, vec = self.encoder(z.repeat(len(variants)), torch.cat(variants), torch.cat(offsets))

        # Node level, Sec. 4.2 "Denoising Head". PAPER-SILENT: the target is eps / sigma, of unit variance.
        # L_noise = 1/(3N) sum_i |head(x_i^noised) - eps_i / sigma|^2
        # L_clean = 1/(3N) sum_i |head(x_i^clean)  - 0|^2            "a zero noise vector", the same head
        predicted = self.noise_head(x[: 2 * N], vec[: 2 * N])
        losses = {"loss_noise": mse_loss(predicted[:N], noise)}
        if config.objective == "coord":
            return {"loss": losses["loss_noise"], **losses}
        losses["loss_clean"] = predicted[N:].square().mean()

        # Graph level, Sec. 4.2 "Reconstruction Head": the decoder sees the clean molecule as g.
        # L_rec = 1/(3N) sum_i |decoder([x_i^rec || g^clean], vec_i^rec) - alpha eps_i / sigma|^2      "scaled noise"
        # decoder_graph_emb = false, a control: g tells nothing. It is 0 * g, for DDP: attention pooling gets a gradient
        graph_emb = config.decoder_graph_emb * self.pooling(x[N : 2 * N], batch, num_molecules)  # (B, F), with gradient
        rec = slice(N) if config.alpha == 1 else slice(2 * N, None)
        x_rec, vec_rec = x[rec], vec[rec] if config.decoder_vec else None
        target = config.alpha * noise if config.rec_target == "scaled" else noise
        losses["loss_rec"] = mse_loss(self.decoder(x_rec, vec_rec, graph_emb, pos_rec, batch), target)
        if shuffle:
            other = self.decoder(x_rec, vec_rec, graph_emb.roll(1, 0), pos_rec, batch)
            losses["loss_rec_shuffled"] = mse_loss(other, target)

        # L = w_noise L_noise + w_clean L_clean + w_rec L_rec, Sec. 4.3
        w_clean = 0.0 if config.objective == "rec_only" else config.w_clean
        total = config.w_noise * losses["loss_noise"] + w_clean * losses["loss_clean"]
        return {"loss": total + config.w_rec * losses["loss_rec"], **losses}


# ---------------------------------------------------------------- one step, and validation


TRAIN, VAL = 1, 2  # first number of the key that noise is drawn from


def learning_rate(step, config):
    """A cosine from lr at step 0 to lr_min at step lr_cosine_length; a linear warm-up replaces its start.

    DEVIATION: closed form. Coord's code has torch's recursion and overwrites it in warm-up: it ends 0.15 % higher.
    """
    if step < config.lr_warmup_steps:
        return config.lr * (step + 1) / config.lr_warmup_steps
    phase = min(step / config.lr_cosine_length, 1.0)
    return config.lr_min + 0.5 * (config.lr - config.lr_min) * (1 + math.cos(math.pi * phase))


def losses_of(net, part, noise, config, device, shuffle=False):
    """Losses of one part of a batch, by name."""
    arrays = {name: part[name] for name in ("z", "pos", "batch")} | {"noise": noise, **part.get("inputs", {})}
    arrays = {name: array.to(device, non_blocking=True) for name, array in arrays.items()}
    bf16 = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
    with explain("the radius graph", ValueError), bf16:
        return net(**arrays, num_molecules=part["num_molecules"], shuffle=shuffle)


def backward(net, parts, share_of, world):
    """Forward and backward over this rank's parts of the global batch -> its share of the losses and of grad_norm.

    share_of(part): by name, that part's share of the means over the global batch. Ranks may have unequal shares.
    """
    share = {}
    for k, part in enumerate(parts):
        more_to_come = isinstance(net, DistributedDataParallel) and k < len(parts) - 1
        with net.no_sync() if more_to_come else nullcontext():
            losses = share_of(part)
            (losses["loss"] * world).backward()  # DDP divides the ranks' sum of gradients by world
        for name, loss in losses.items():
            share[name] = share.get(name, 0.0) + loss.detach()
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    share["grad_norm"] = nn.utils.get_total_norm(gradients) / world  # shares are summed, the norm is the same
    return share


def train_step(net, parts, step, config, device, world):
    """Gradients of the global batch in net; parts are this rank's -> its share of the mean losses, by name."""
    extra = getattr(net, "module", net).extra_noise  # DistributedDataParallel keeps the model in `module`
    noise = standard_normal(parts[0]["global_atoms"], TRAIN, config.seed, step, extra=extra)  # for the global batch

    def share_of(part):
        first, num_atoms = part["first_atom"], len(part["z"])
        losses = losses_of(net, part, noise[first : first + num_atoms], config, device)
        return {name: loss * (num_atoms / part["global_atoms"]) for name, loss in losses.items()}

    return backward(net, parts, share_of, world)


def validation_batches(molecules, index, size, extra=0):
    """The validation molecules in batches. A molecule gets the same noise in every run, whatever the settings."""
    batches = []
    for part in np.array_split(index, math.ceil(len(index) / size)):  # in random order: neighbours in a file are alike
        noise = normal_of_each(molecules, part, VAL, extra=extra)
        batches.append({**molecules.read(part), "noise": noise, "num_molecules": len(part)})
    return batches


@torch.no_grad()
def evaluate(model, batches, config, device, rank, world):
    """Mean losses per atom over the validation batches, which the ranks share, plus loss_rec_shuffled."""
    mine, num_atoms = batches[rank::world], sum(len(part["z"]) for part in batches)
    shuffle = all(part["num_molecules"] > 1 for part in batches)
    total = 0.0
    for part in mine or batches[:1]:  # a rank without a share runs one batch at weight 0, to know the names
        losses = losses_of(model, part, part["noise"], config, device, shuffle)
        weight = len(part["z"]) / num_atoms if mine else 0
        total = total + weight * torch.stack(list(losses.values())).double()
    return dict(zip(losses, sum_over_ranks(total).tolist(), strict=True))


def report(first_val, last_val):
    """The table of validation losses, line by line. Use of g: what another molecule's g, or none, adds to a loss."""
    yield f"{'validation':<22}{'start':>10}{'end':>10}"
    for name, end in last_val.items():
        start = f"{first_val[name]:.4f}" if name in first_val else ""  # inference_batch_size 1 has nothing to shuffle
        own = last_val.get(name.removesuffix("_shuffled").removesuffix("_masked"), end)
        yield f"{name:<22}{start:>10}{end:>10.4f}" + (f"   use of g: {end - own:.4f}" if own != end else "")


# ---------------------------------------------------------------- the run


def objective_of(config):
    """The class of config.objective."""
    return pkgutil.resolve_name(BEYOND[config.objective]) if config.objective in BEYOND else Pretraining


def make_model(config, device):
    torch.manual_seed(config.seed)
    if config.precision == "tf32" and device.type == "cpu":
        raise InputError("precision = tf32 is for a GPU, this is a CPU: set 32 or bf16", code=2)
    torch.set_float32_matmul_precision("high" if config.precision == "tf32" else "highest")
    with explain("a model of this size cannot be made", RuntimeError):
        model = objective_of(config)(new_encoder(config.model), config).to(device)
    if config.compile:
        compile_layers(model, device)
    return model


def num_parameters(module):
    return sum(p.numel() for p in module.parameters())


def pretrain(config, run):
    """The whole run: data, model, start or resume, loop, figures."""
    molecules = Molecules(config.data, objective_of(config).inputs)
    index = molecules.split(config.split)
    if config.val_size >= len(index):
        raise InputError(f"val_size = {config.val_size}: {config.data} has {len(index)} molecules in all", code=2)
    val, train = (index[part] for part in split_indices(len(index), [config.val_size, None]))
    batches = StepBatches(molecules, train, config.batch_size, config.seed, run.rank, run.world, config.accumulate)
    molecules.check_elements(index, config.model.max_z)
    model = make_model(config, run.device)
    val_batches = validation_batches(molecules, val, config.inference_batch_size, model.extra_noise)
    net = run.parallel(model)  # DistributedDataParallel under torchrun
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0, fused=True)
    total, inner = num_parameters(model), num_parameters(model.encoder)

    found = {"first_val": None, "last_val": None}
    run.restore(config, batches, found, dict.fromkeys(found, {str: float}), state_dict=model, optimizer=optimizer)
    run.begin(
        f"{config.objective} on {config.data}: {len(train):,} molecules to train, {len(val):,} to validate",
        *(["of all splits of the file, those to test on, too"] if molecules.splits and not config.split else []),
        f"{total:,} parameters, {inner:,} of them the encoder",
    )

    def validate():
        found["last_val"] = evaluate(model.eval(), val_batches, config, run.device, run.rank, run.world)
        found["first_val"] = found["first_val"] or found["last_val"]
        run.log.write({"step": run.step, "split": "val", **found["last_val"]})
        model.train()

    def save():
        run.save(encoder=save_encoder(model.encoder))  # encoder.pt, step_<n>.pt if it is to be kept, last.pt

    if run.is_new:
        validate()
        if 0 in config.keep_steps:
            save()
    for step, parts in run.steps():  # from last.pt's step to max_steps, or to a signal
        optimizer.param_groups[0]["lr"] = lr = learning_rate(step, config)
        losses = train_step(net, parts, step, config, run.device, run.world)
        optimizer.step()
        optimizer.zero_grad()
        run.record(losses, lr)
        if run.validating:
            validate()
        if run.saving:  # every save_every steps, at keep_steps, at a signal, at the end
            save()

    run.say("\n".join(report(found["first_val"], found["last_val"])))
    units = dict.fromkeys(found["last_val"], getattr(model, "unit", "as the objective has it"))
    figures = {"val": found["last_val"], "val_start": found["first_val"], "units": units}
    run.finish(**figures, objective=config.objective, parameters=total, parameters_encoder=inner)


def main(arguments):
    start(pretrain, PretrainConfig, arguments)


if __name__ == "__main__":
    cli(main, __doc__, needed=1)
