"""SCD, self-conditioned denoising (arXiv:2603.17196): the clean molecule conditions each layer.

    python pretrain.py configs/qm9_scd.yaml

    g      = project(encoder(clean, mask token))                the molecule's own graph embedding, (B, F)
    L      = 1/(3N) sum_i |head(encoder(noised, g)) - eps_i / sigma|^2

GeoRecon hands g to a decoder; SCD hands it to the whole network. With probability mask_probability
a molecule trains on the mask token in place of g. All later stages run the encoder on the mask
token: encoder(z, pos, batch).

Facts of the method are from its public code. Two controls: `model.backbone: adaptive` with
`objective: coord` has this network and no g; `mask_probability: 1` has both encodings without g.
"""

import math

import torch
from torch import nn
from torch.nn.functional import mse_loss

from harness.errors import InputError
from model import EquivariantTransformer, EquivariantVectorOutput, Linear, scatter_sum, take


class AdaptiveNorm(nn.Module):
    """What a condition c_i makes of a layer's input and output: x, c (N, F) -> h, gate (N, F).

        x0                 = LayerNorm(x)
        shift, scale, gate = MLP([c || x0])
        h                  = tanh(a x0) (1 + scale) / a + shift
        gate               = tanh(b gate)                            dx <- gate * dx

    a and b are learned numbers. If not gated, the gate is 1, as a control.
    DEVIATION: the public code cuts the gradient of x0 into the MLP. Forces would then not be the
    derivative of the energy, so we keep it.
    """

    compiles = True

    def __init__(self, channels, gated=True):
        super().__init__()
        self.layernorm = nn.LayerNorm(channels)
        first, last = Linear(2 * channels, channels), Linear(channels, (2 + gated) * channels)
        self.modulation = nn.Sequential(first, nn.SiLU(), nn.LayerNorm(channels), last)
        self.a = nn.Parameter(torch.full((1,), 0.2))
        self.b = nn.Parameter(torch.full((1,), 0.2)) if gated else None

    def forward(self, x, condition):
        x = self.layernorm(x)
        parts = self.modulation(torch.cat([condition, x], dim=1))  # (N, 3 F), or (N, 2 F)
        shift, scale, *gate = parts.split(x.shape[1], dim=1)  # (N, F) each
        a = self.a.abs().clamp(min=1e-5)
        h = torch.tanh(a * x) * (1 + scale) / a + shift
        return h, torch.tanh(self.b * gate[0]) if gate else torch.ones_like(h)


class AdaptiveTransformer(EquivariantTransformer):
    """The equivariant transformer with an AdaptiveNorm for each attention layer's LayerNorm.

    DEVIATION: before each layer the public code sends the components of vec through tanh, adds an
    offset and clamps them to 1000, which is not equivariant. Ours has the norms of
    `model.vec_norm_layer` and `model.vec_norm_out`.
    """

    gated = True

    def __init__(self, config):
        super().__init__(config)
        channels = config.embedding_dimension
        self.mask_token = nn.Parameter(torch.randn(channels))
        self.condition_norm = nn.LayerNorm(channels)
        self.adaptive_norms = nn.ModuleList(AdaptiveNorm(channels, self.gated) for _ in self.attention_layers)
        for attention in self.attention_layers:
            attention.layernorm = nn.Identity()

    def forward(self, z, pos, batch, edge_index=None, graph_emb=None, keep=None):
        """As EquivariantTransformer. graph_emb (B, F): the condition, None for the mask token.

        keep (L, N): by what to multiply each atom's increments in each layer, for drop path; None
        for 1.
        """
        graph = self.graph(pos, batch, edge_index)
        x = self.neighbor_embedding(z, self.embedding(z), graph)  # (N, F)
        if graph_emb is None:
            condition = self.condition_norm(self.mask_token).expand(len(z), -1)  # (N, F)
        else:
            condition = take(self.condition_norm(graph_emb), batch)  # (N, F)
        vec = None  # zero
        for k, attention in enumerate(self.attention_layers):
            h, gate = self.adaptive_norms[k](x, condition)  # (N, F)
            dx, dvec = attention(h, vec, graph)  # (N, F), (N, 3, F)
            dx = gate * dx
            if keep is not None:
                dx, dvec = dx * keep[k, :, None], dvec * keep[k, :, None, None]
            x = self.x_norms[k](x + dx)
            vec = self.vec_norms[k](dvec if vec is None else vec + dvec)
        return self.out_norm(x), self.out_norm_vec(vec)


class UngatedTransformer(AdaptiveTransformer):
    """A control: is it the norm, or is it the gate?"""

    gated = False


def uniform(normal):
    """Standard normal numbers -> numbers uniform in (0, 1)."""
    return 0.5 * (1 + torch.erf(normal / math.sqrt(2)))


class SelfConditioned(nn.Module):
    """The objective, as pretrain.Pretraining: its contract is in beyond/README.md.

    DEVIATION: noise, target, norms and vector_cutoff are those of Coord in pretrain.py, and element
    embeddings and mask token are trained, so that the two can be compared. The public code removes
    the mean of each molecule's noise, freezes both, and lets vector messages vanish at the cutoff.
    DEVIATION: drop path (0.1) is off by default. PAPER-SILENT: only the second encoding has it.
    """

    inputs = None
    unit = "mean square error of noise / sigma, per atom and axis"

    def __init__(self, encoder, config):
        super().__init__()
        if not isinstance(encoder, AdaptiveTransformer):
            raise InputError("objective = scd: its encoder takes g, set model.backbone=adaptive", code=2)
        self.config, channels = config, config.model.embedding_dimension
        # columns of noise: 3 for the noised molecule; then 3 for the clean one, 1 for the mask, and
        # 1 a layer for drop path
        self.extra_noise = 4 + (config.model.num_layers if config.drop_path else 0)
        self.encoder = encoder
        self.noise_head = EquivariantVectorOutput(channels)
        norms = [nn.LayerNorm(channels) for _ in range(4)]
        layers = [Linear(channels, channels) for _ in range(3)]
        self.project_atom = nn.Sequential(norms[0], layers[0], nn.SiLU(), norms[1])
        self.project_molecule = nn.Sequential(norms[2], layers[1], nn.SiLU(), norms[3], layers[2])

    def forward(self, z, pos, batch, noise, num_molecules, shuffle=False):
        """noise (N, 7 or 7 + L) standard normal -> dict of scalar losses.

        When evaluated, also `loss_noise_masked` and, with shuffle, `loss_noise_shuffled`: the
        encoder sees the mask token, or the previous molecule's graph embedding. With
        mask_probability 1 the encoder never saw a g: all are losses with the token.
        """
        config = self.config
        clean = pos + config.clean_noise_scale * noise[:, 3:6]
        noised, target = pos + config.position_noise_scale * noise[:, :3], noise[:, :3]
        x, _ = self.encoder(z, clean, batch)  # (N, F), with gradient
        graph_emb = self.project_molecule(scatter_sum(self.project_atom(x), batch, num_molecules))  # (B, F)

        def loss(graph_emb, keep=None):
            x, vec = self.encoder(z, noised, batch, None, graph_emb, keep)  # (N, F), (N, 3, F)
            return mse_loss(self.noise_head(x, vec), target)

        token = self.encoder.mask_token.expand_as(graph_emb)  # (B, F)
        if self.training:
            first_atom = torch.searchsorted(batch, torch.arange(num_molecules, device=batch.device))
            masked = uniform(noise[first_atom, 6]) < config.mask_probability  # (B,)
            chance = uniform(noise[:, 7:].T)  # (L, N), or (0, N)
            keep = (chance >= config.drop_path).to(x.dtype) / (1 - config.drop_path) if len(chance) else None
            # where: all molecules masked, the projection still gets a (zero) gradient, for DDP
            total = loss(torch.where(masked.unsqueeze(1), token, graph_emb), keep)
            return {"loss": total, "loss_noise": total}
        graph_emb = token if config.mask_probability >= 1 else graph_emb
        total = loss(graph_emb)
        losses = {"loss": total, "loss_noise": total, "loss_noise_masked": loss(token)}
        return losses | ({"loss_noise_shuffled": loss(graph_emb.roll(1, 0))} if shuffle else {})
