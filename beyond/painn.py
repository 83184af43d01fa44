"""PaiNN (Schutt, Unke & Gastegger, arXiv:2102.03150): another backbone, in torch alone.

z (N,), pos (N, 3), batch (N,) -> x (N, F), vec (N, 3, F), as model.py's EquivariantTransformer. N,
P, F and K are those of model.py, L is the number of layers. The formulas have the paper's names: q
is x, mu is vec.

    u_ij    = (pos_j - pos_i) / d_ij                      every pair i, j of a molecule with d_ij < cutoff
    W_ij^l  = (A^l g(d_ij) + c^l) C(d_ij)                 the filters of layer l
    q_i     = embedding(z_i),   mu_i = 0
    q, mu   = mixing(interaction(q, mu, W^l))             for each layer l

There is no norm, neither between the layers nor at the end: the scale of x and vec is free.
Formulas, parameter names and initialisation are schnetpack 2.1.1's (representation/painn.py). Its
state dict loads by name into a model with its num_rbf, cutoff_upper and max_z.
tests/test_beyond_painn.py compares the two.
"""

from dataclasses import fields

import torch
from torch import nn
from torch.nn.functional import silu

from harness.errors import InputError
from model import Linear, cosine_cutoff, linear, radius_graph, scatter_sum, take


def refuse_norms(config):
    """A setting that this network does not read would be an ablation without an effect."""
    for known in fields(config):
        value = getattr(config, known.name)
        if "norm" in known.name and value != known.default:
            told = f"model.{known.name} = {value}: model.backbone = {config.backbone}"
            raise InputError(f"{told} has no such part, leave it out", code=2)


class LinearSiLU(Linear):
    """silu(W x + b) in one module: schnetpack's names count linear layers alone, `.0` and `.1`."""

    def forward(self, x):
        return silu(super().forward(x))


class GaussianSmearing(nn.Module):
    """g_k(d) = exp(-(d - o_k)^2 / (2 w^2)), o from 0 to cutoff by w: distance (P,) -> (P, K).

    DEVIATION: schnetpack's default. The paper has sin(k pi d / cutoff) / d.
    """

    def __init__(self, cutoff, num_rbf):
        super().__init__()
        offsets = torch.linspace(0, cutoff, num_rbf)
        self.register_buffer("widths", (offsets[1] - offsets[0]).expand(num_rbf).clone())
        self.register_buffer("offsets", offsets)

    def forward(self, distance):
        return torch.exp(-0.5 * ((distance.unsqueeze(-1) - self.offsets) / self.widths).square())


class CosineCutoff(nn.Module):
    """C(d) of model.py, with the cutoff as a buffer: distance (P,) -> (P,)."""

    def __init__(self, cutoff):
        super().__init__()
        self.register_buffer("cutoff", torch.tensor([float(cutoff)]))

    def forward(self, distance):
        return cosine_cutoff(distance, self.cutoff)


class PaiNNInteraction(nn.Module):
    """Messages between atoms: q (N, F), mu (N, 3, F), filters W (P, 3F) -> q, mu.

    Pairs are i, j (P,) and unit (P, 3, 1). The other direction has the same filters and -unit.

    s_j        = B2 silu(B1 q_j)
    [a, b, e]  = W_ij * s_j
    q_i       += sum_j a
    mu_i      += sum_j b u_ij + e mu_j
    """

    compiles = True  # a step with both kinds compiled is 1.7 times as fast on one CPU core

    def __init__(self, channels):
        super().__init__()
        first, second = LinearSiLU(channels, channels), Linear(channels, 3 * channels)
        self.interatomic_context_net = nn.Sequential(first, second)

    def forward(self, q, mu, filters, i, j, unit):
        s_a, s_b, s_e = self.interatomic_context_net(q).chunk(3, dim=-1)  # (N, F)
        w_a, w_b, w_e = filters.chunk(3, dim=-1)  # (P, F)
        s_mu = s_e.unsqueeze(1) * mu  # (N, 3, F): a product per atom, not per pair
        for target, source, sign in ((i, j, 1), (j, i, -1)):
            q = q + scatter_sum(w_a * take(s_a, source), target, len(q))  # (P, F) -> (N, F)
            along = (w_b * take(s_b, source)).unsqueeze(1)  # (P, 1, F)
            message = torch.addcmul(w_e.unsqueeze(1) * take(s_mu, source), along, unit, value=sign)
            mu = mu + scatter_sum(message, target, len(q))  # (P, 3, F) -> (N, 3, F)
        return q, mu


class PaiNNMixing(nn.Module):
    """Mixing of channels inside an atom: q (N, F), mu (N, 3, F) -> q, mu.

    [V, U]     = D mu
    n          = sqrt(|V|^2 + 1e-8)            with 1e-8 the derivatives are finite at V = 0
    [a, b, e]  = C2 silu(C1 [q || n])
    q         += a + e <V, U>
    mu        += b U
    """

    compiles = True

    def __init__(self, channels):
        super().__init__()
        first, second = LinearSiLU(2 * channels, channels), Linear(channels, 3 * channels)
        self.intraatomic_context_net = nn.Sequential(first, second)
        self.mu_channel_mix = Linear(channels, 2 * channels, bias=False)

    def forward(self, q, mu):
        v, u = self.mu_channel_mix(mu).chunk(2, dim=-1)  # (N, 3, F)
        length = (v.square().sum(1) + 1e-8).sqrt()  # (N, F)
        a, b, e = self.intraatomic_context_net(torch.cat([q, length], dim=-1)).chunk(3, dim=-1)  # (N, F)
        return q + a + e * (v * u).sum(1), torch.addcmul(mu, b.unsqueeze(1), u)


class PaiNN(nn.Module):
    """The encoder: z (N,), pos (N, 3), batch (N,) -> x (N, F), vec (N, 3, F) equivariant."""

    def __init__(self, config):
        super().__init__()
        refuse_norms(config)
        self.config = config
        channels, layers = config.embedding_dimension, config.num_layers
        self.embedding = nn.Embedding(config.max_z, channels)
        self.radial_basis = GaussianSmearing(config.cutoff_upper, config.num_rbf)
        self.cutoff_fn = CosineCutoff(config.cutoff_upper)
        self.filter_net = Linear(config.num_rbf, layers * 3 * channels)
        self.interactions = nn.ModuleList(PaiNNInteraction(channels) for _ in range(layers))
        self.mixing = nn.ModuleList(PaiNNMixing(channels) for _ in range(layers))

    def forward(self, z, pos, batch, edge_index=None):
        """edge_index (2, P): the pairs, if already known; beyond the cutoff C = 0, no weight."""
        if edge_index is None:
            edge_index = radius_graph(pos, batch, self.config.cutoff_upper, self.config.max_num_neighbors)
        j, i = edge_index
        edge_vec = take(pos, j) - take(pos, i)  # (P, 3)
        # the clamp keeps two coincident atoms finite: derivative 0 instead of 0 / 0
        distance = edge_vec.square().sum(-1).clamp(min=1e-12).sqrt()  # (P,)
        unit = (edge_vec / distance.unsqueeze(-1)).unsqueeze(2)  # (P, 3, 1)
        rbf, fade = self.radial_basis(distance), self.cutoff_fn(distance).unsqueeze(-1)  # (P, K), (P, 1)

        q = self.embedding(z)  # (N, F)
        # zero, not None: the first layer is one with the others, and its weights get the gradient
        # that DDP waits for
        mu = q.new_zeros(len(z), 3, q.shape[1])  # (N, 3, F)
        weights, biases = (part.chunk(len(self.mixing)) for part in (self.filter_net.weight, self.filter_net.bias))
        # a linear layer for each l: slices of one product would differ in their offset, which
        # torch.compile minds
        for interaction, mixing, A, c in zip(self.interactions, self.mixing, weights, biases, strict=True):
            q, mu = interaction(q, mu, linear(rbf, A, c) * fade, i, j, unit)  # filters (P, 3F)
            q, mu = mixing(q, mu)
        return q, mu
