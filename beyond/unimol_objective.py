"""Uni-Mol's pretraining, masked and moved atoms, and with reconstruction (GeoRecon, App. G).

    python pretrain.py configs/unimol_small_pretrain.yaml
    python pretrain.py configs/unimol_small_rec_pretrain.yaml

A share of 0.15 of the atoms is chosen. Of these 5 % stay as they are, 5 % become another element
and 90 % become MASK; all but the first are moved by u, uniform in +- position_noise_scale
(1 angstrom) along each axis. The network says what the chosen atoms were, where, and how far from all others.

    L = CE + 5 coord + 10 dist + 0.01 x_norm + 0.01 pair_norm
    unimol_rec: L + w_rec 5 rec + w_clean 5 clean

    token      cross entropy of the chosen atoms' elements
    coord      smooth L1 of (moved position + update, clean position) of the chosen atoms
    dist       smooth L1 of (predicted, clean distance - mean) / std, chosen atoms to all tokens
    x_norm     by how much |x_i| is farther than 1 from sqrt F; pair_norm: the same of q's change
    clean      smooth L1 of the update of the clean molecule, 0
    rec        as coord, from the decoder, which is given g, the mean of the clean molecule's x

PAPER-SILENT: App. G says only that reconstruction was added to Uni-Mol. This way is ours. The masks
stay; the clean pass has neither MASK nor moved atoms; the decoder is below.
`decoder_graph_emb: false` is its control without g.
"""

from dataclasses import fields

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, smooth_l1_loss

from beyond.scd import uniform
from beyond.unimol import (
    FIRST,
    MASK,
    NUM_TOKENS,
    Dense,
    Layer,
    NonLinearHead,
    UniMol,
    logits,
    pad,
    places,
    split,
    spread,
    steps,
)
from harness.errors import InputError
from model import scatter_mean, take

SHARE, LEFT, RANDOM = 0.15, 0.05, 0.05
COORD, DIST, X_NORM, PAIR_NORM = 5, 10, 0.01, 0.01  # weights of the losses; that of token is 1

# ---------------------------------------------------------------- what is hidden


def corrupt(token, batch, noise):
    """What the network sees: -> chosen (N,) bool, token (N,), u (N, 3) in [-1, 1], 0 if not moved.

    noise (N, 7), standard normal: u; the order of choosing; the number of chosen atoms,
    floor(0.15 m + U) of a molecule of m; stay, element or MASK; the element.
    """
    chance = uniform(noise)  # (N, 7) in (0, 1)
    counts = torch.bincount(batch)  # (B,)
    first_atom = counts.cumsum(0) - counts
    number = (SHARE * counts + chance[first_atom, 4]).floor()  # (B,)
    order = noise[:, 3].argsort(stable=True)
    order = order[batch[order].argsort(stable=True)]  # (N,) inside the molecules
    place = torch.arange(len(batch), device=batch.device) - first_atom[batch]
    chosen = torch.empty_like(place).scatter(0, order, place) < number[batch]  # (N,)
    moved = chosen & (chance[:, 5] >= LEFT)
    element = (FIRST + (MASK - FIRST) * chance[:, 6]).long().clamp(max=MASK - 1)
    hidden = torch.where(chance[:, 5] < 1 - RANDOM, MASK, element)
    return chosen, torch.where(moved, hidden, token), (2 * chance[:, :3] - 1) * moved.unsqueeze(1)


class Distances:
    """Mean and standard deviation of the distances between atoms, of up to 1,000 molecules.

    DEVIATION: the public code has those of its own conformers, 6.31 and 3.39 angstrom.
    """

    def __init__(self, molecules):
        index = np.unique(np.linspace(0, len(molecules) - 1, 1000).astype(np.int64))
        distances = [torch.pdist(molecules.read([m])["pos"].double()) for m in index]
        number, total = sum(map(len, distances)), sum(d.sum() for d in distances)
        mean = total / max(number, 1)
        square = sum((d - mean).square().sum() for d in distances) / max(number, 1)
        self.statistics = torch.tensor([mean, square.sqrt() if square else 1.0])

    def __call__(self, index):
        return {"distances": self.statistics}


# ---------------------------------------------------------------- heads


class TokenHead(nn.Module):
    """(..., F) -> scores of the tokens (..., 31)."""

    def __init__(self, channels):
        super().__init__()
        self.dense, self.layer_norm = Dense(channels, channels), nn.LayerNorm(channels)
        self.weight = nn.Linear(channels, NUM_TOKENS, bias=False).weight
        self.bias = nn.Parameter(torch.zeros(NUM_TOKENS))

    def forward(self, x):
        return self.layer_norm(gelu(self.dense(x))) @ self.weight.T + self.bias


class DistanceHead(nn.Module):
    """q (B, H, n, n) -> distances (B, n, n), in standard deviations from the mean."""

    def __init__(self, num_heads):
        super().__init__()
        self.dense, self.layer_norm = Dense(num_heads, num_heads), nn.LayerNorm(num_heads)
        self.out_proj = Dense(num_heads, 1)

    def forward(self, pair):
        out = self.out_proj(self.layer_norm(gelu(self.dense(pair.permute(0, 2, 3, 1))))).squeeze(-1)
        return 0.5 * (out + out.mT)


class UniMolDecoder(nn.Module):
    """The light decoder: x (B, n, F), the encoding and g (B, F) -> what to move each token by, (B, n, 3).

    h = W [x || g], then `decoder_layers` layers that go on from the encoder's q. A last Q_i . K_j
    makes pairs of h, and a coordinate head of the decoder's own reads how q has changed.
    """

    def __init__(self, channels, num_heads, num_layers):
        super().__init__()
        self.num_heads = num_heads
        self.combine = Dense(2 * channels, channels)
        self.layers = nn.ModuleList(Layer(channels, num_heads) for _ in range(num_layers))
        self.norm, self.query_key = nn.LayerNorm(channels), Dense(channels, 2 * channels)
        self.pair_norm, self.pair2coord = nn.LayerNorm(num_heads), NonLinearHead(num_heads, 1)

    def forward(self, x, code, graph_emb):
        place, shape = places(code.real), code.real.shape  # (T,), of these molecules alone
        x = torch.cat([x, graph_emb.unsqueeze(1).expand_as(x)], dim=-1)  # (B, n, 2F)
        x, pair = self.combine(take(x.flatten(0, 1), place)), code.last  # (T, F)
        for layer in self.layers:
            x, pair = layer(x, pair, code.real, place)
        rows = spread(self.query_key(self.norm(x)), place, shape)  # (B, n, 2F)
        query, key = (split(part, self.num_heads) for part in rows.chunk(2, dim=-1))
        change = code._replace(last=pair + logits(query, key)).change()  # (B, n, n, H)
        return code.weigh(self.pair2coord(self.pair_norm(change))).squeeze(-1)


# ---------------------------------------------------------------- the objective


def off_norm(x, real):
    """Mean over real of relu(| |x| - sqrt C | - 1): (B, ..., C), (B, ...) -> (B,)."""
    error = (((x.square().sum(-1) + 1e-10).sqrt() - x.shape[-1] ** 0.5).abs() - 1).relu()
    return (error * real).flatten(1).sum(1) / real.flatten(1).sum(1)


class UniMolPretraining(nn.Module):
    """Objectives unimol and unimol_rec, as pretrain.Pretraining; see beyond/README.md.

    DEVIATION: a loss of chosen atoms is their sum over 0.15 N, the number to be expected, not over
    their number; and the others are means over atoms, too: each atom counts its molecule's mean.
    That way the parts of a batch add up, on any number of ranks. For dist it means that each chosen
    atom counts alike, whatever the size of its molecule.
    DEVIATION: optimizer and schedule are those of pretrain.py. The public code has weight decay
    1e-4, clips gradients to a norm of 1, and lets the learning rate fall linearly.
    """

    extra_noise = 4
    inputs = Distances
    unit = "token: nats; coord, clean, rec: smooth L1 of angstrom; dist: of standard deviations; norms: 1"

    def __init__(self, encoder, config):
        super().__init__()
        told = f"objective = {config.objective}"
        if not isinstance(encoder, UniMol):
            raise InputError(f"{told}: it needs model.backbone=unimol", code=2)
        for known in fields(config):
            unread = known.name in ("rec_target", "pooling", "decoder_vec")
            if unread and getattr(config, known.name) != known.default:
                raise InputError(f"{told}: {known.name} is not for it, leave it out", code=2)
        self.config = config  # keys: objective position_noise_scale; rec: alpha w_rec w_clean decoder_*
        channels, num_heads = config.model.embedding_dimension, config.model.num_heads
        self.encoder = encoder
        encoder.vec_proj.requires_grad_(False)  # no loss sees it; later stages train it
        self.pair2coord_proj = nn.ModuleDict({"linear2": Dense(num_heads, 1)})
        self.dist_head, self.lm_head = DistanceHead(num_heads), TokenHead(channels)
        if config.objective == "unimol_rec":
            self.decoder = UniMolDecoder(channels, num_heads, config.decoder_layers)

    def update(self, code):
        """What the coordinate head moves each token by: -> (B, n, 3)."""
        return code.weigh(self.pair2coord_proj["linear2"](self.encoder.weights(code))).squeeze(-1)

    def masked_losses(self, code, x, slot, chosen, token, shift, batch, target):
        """The five losses of the masked molecules: code, x (B, n, F), slot (N,).

        The answers: token (N,), shift (N, 3) from the seen position to the clean one, target (B, n, n).
        """
        expected, rows = SHARE * len(token), slot[chosen]
        scores = self.lm_head(x.flatten(0, 1)[rows])  # (chosen, 31)
        error = smooth_l1_loss(self.dist_head(code.last), target, reduction="none")  # (B, n, n)
        error = (error * code.real.unsqueeze(1)).sum(2) / code.real.sum(1, keepdim=True)  # (B, n)
        pairs = code.real.unsqueeze(1) & code.real.unsqueeze(2)
        return {
            "loss_token": cross_entropy(scores, token[chosen], reduction="sum") / expected,
            "loss_coord": self.miss(self.update(code), slot, shift, chosen),
            "loss_dist": error.flatten()[rows].sum() / expected,
            "loss_x_norm": off_norm(code.x, code.real)[batch].mean(),
            "loss_pair_norm": off_norm(code.change(), pairs)[batch].mean(),
        }

    def miss(self, update, slot, shift, chosen):
        """Smooth L1 of the update (B, n, 3) of chosen atoms against shift (N, 3)."""
        rows = slot[chosen]
        return smooth_l1_loss(update.flatten(0, 1)[rows], shift[chosen], reduction="sum") / (3 * SHARE * len(slot))

    def forward(self, z, pos, batch, noise, num_molecules, shuffle=False, distances=None):
        """noise (N, 7) standard normal, distances (2,) mean and std -> dict of scalar losses."""
        config, encoder, B = self.config, self.encoder, num_molecules
        token = encoder.tokens(z)
        chosen, seen, u = corrupt(token, batch, noise)
        shift = -config.position_noise_scale * u  # (N, 3) from the moved position back
        variants = [(seen, pos - shift)]
        if config.objective == "unimol_rec":
            variants += [(token, pos)] + [(seen, pos - config.alpha * shift)] * (config.alpha != 1)
        # one encoder call for all variants: they are further molecules of the batch
        tokens, positions = (torch.cat(part) for part in zip(*variants))
        code, slot = encoder.encode(tokens, positions, torch.cat([batch + k * B for k in range(len(variants))]))
        x, slot = encoder.invariant(code), slot[: len(z)]  # (variants * B, n, F), (N,)
        _, target = steps(pad(token, pos, batch)[1])  # (B, n, n)
        target = (target - distances[0]) / distances[1]

        losses = self.masked_losses(code.rows(slice(B)), x[:B], slot, chosen, token, shift, batch, target)
        weights = 1, COORD, DIST, X_NORM, PAIR_NORM
        total = sum(weight * loss for weight, loss in zip(weights, losses.values(), strict=True))
        if config.objective == "unimol":
            return {"loss": total, **losses}

        clean, rec = slice(B, 2 * B), slice(B) if config.alpha == 1 else slice(2 * B, None)
        still = self.update(code.rows(clean)).flatten(0, 1)[slot]  # (N, 3)
        losses["loss_clean"] = smooth_l1_loss(still, torch.zeros_like(still))
        graph_emb = scatter_mean(x[clean].flatten(0, 1)[slot], batch, B) * config.decoder_graph_emb  # (B, F)

        def rec_loss(graph_emb):
            update = self.decoder(x[rec], code.rows(rec), graph_emb)
            return self.miss(update, slot, config.alpha * shift, chosen)

        losses["loss_rec"] = rec_loss(graph_emb)
        if shuffle:
            losses["loss_rec_shuffled"] = rec_loss(graph_emb.roll(1, 0))
        total = total + COORD * (config.w_rec * losses["loss_rec"] + config.w_clean * losses["loss_clean"])
        return {"loss": total, **losses}
