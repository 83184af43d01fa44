"""Uni-Mol (Zhou et al., ICLR 2023, github.com/deepmodeling/Uni-Mol): a backbone, in torch alone.

z (N,), pos (N, 3), batch (N,) -> x (N, F), vec (N, 3, F), as model.py's EquivariantTransformer. It
is a transformer that knows the geometry by the distances alone. They make the first attention
logits of all pairs; each layer adds its own and hands the sum on. So the logits are a state of
pairs, q, beside the state of atoms, x. There is no cutoff.

    n    tokens of a molecule: CLS, its atoms, SEP. CLS and SEP lie at the centroid
    T, P tokens, and pairs of tokens, of the batch. Tensors (B, n, ...) have PAD where a molecule is
         shorter than the longest; the Gaussians and the linear layers of the encoder skip it
    H    heads of D = F / H channels; K Gaussians (model.num_rbf)
    e_ij the ordered pair of two tokens, one of 31 x 31

    u_ij   = a[e_ij] d_ij + b[e_ij]
    G_ijk  = exp(-((u_ij - mu_k) / s_k)^2 / 2) / (sqrt(2 pi) s_k)
    q_ij   = W2 gelu(W1 G_ij + b1) + b2,   x_i = LN(E[token_i])
    layer    y = LN(x),   q_ij += Q_i . K_j / sqrt(D)
             x += W_o sum_j softmax_j(q_ij) V_j,   x += W_f2 gelu(W_f1 LN(x))
    end      x = LN(x),   delta_ij = LN(q_ij - q_ij of the start)
    vec_i  = W_v 1/n sum_j gelu(W_c delta_ij + c) (r_j - r_i)            H -> F channels

Formulas and names of the weights are those of the public code at commit 90f52c4; load_public takes
its state dict. tests/test_beyond_unimol.py compares the two. Only W_v, `vec_proj`, is ours: the
public model ends in a linear layer H -> 1, which moves atoms and is in beyond/unimol_objective.py.

DEVIATION: no dropout (the public code has 0.1). A stopped run could not go on to the same bits.
"""

import math
import warnings
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import gelu

from beyond.painn import refuse_norms
from harness.errors import InputError
from model import Linear, safe_norm, scatter_mean, scatter_sum, take

# ---------------------------------------------------------------- tokens

PAD, CLS, SEP, UNK = range(4)
ELEMENTS = (6, 7, 8, 16, 1, 17, 9, 35, 53, 14, 15, 5)  # C N O S H Cl F Br I Si P B, tokens 4 to 15
ELEMENTS += (11, 19, 13, 20, 50, 33, 80, 26, 30, 24, 34, 64, 79, 3)  # Na K Al Ca Sn As Hg Fe Zn Cr Se Gd Au Li
FIRST = 4  # the token of ELEMENTS[0]
MASK = FIRST + len(ELEMENTS)  # 30
NUM_TOKENS = MASK + 1


def token_table():
    """(119,) the token of each atomic number; UNK for what is no element of Uni-Mol's."""
    table = torch.full((119,), UNK)
    table[list(ELEMENTS)] = torch.arange(FIRST, MASK)
    return table


# ---------------------------------------------------------------- rows of tokens


def places(real):
    """Where real (B, ...) is true, in order: -> (T,)."""
    return real.flatten().nonzero().squeeze(1)


def spread(x, place, shape):
    """Rows (T, C) to their places (T,) of shape, 0 elsewhere: -> (*shape, C). take(..., place) is the way back."""
    return scatter_sum(x, place, math.prod(shape)).view(*shape, x.shape[-1])


def pad(token, pos, batch):
    """Atoms end to end -> a row for each molecule, [CLS, atoms, SEP, PAD ...].

    token (N,), pos (N, 3), batch (N,) -> token (B, n), pos (B, n, 3), and slot (N,): where the
    atoms are among the B n places.
    DEVIATION: positions are from the centroid of what the encoder is given. The public code takes
    the clean molecule's, so its CLS tells where the noise has moved the centroid.
    """
    if (batch.diff() < 0).any():
        raise ValueError("Uni-Mol: batch must be sorted, the atoms of a molecule side by side")
    counts = torch.bincount(batch)  # (B,)
    B, n = len(counts), int(counts.max()) + 2
    first_atom = counts.cumsum(0) - counts
    slot = batch * n + 1 + torch.arange(len(batch), device=batch.device) - first_atom[batch]  # (N,)
    rows = token.new_full((B, n), PAD)
    rows[:, 0] = CLS
    rows[torch.arange(B, device=batch.device), counts + 1] = SEP
    rows.view(-1)[slot] = token
    centred = pos - take(scatter_mean(pos, batch, B), batch)  # (N, 3)
    return rows, spread(centred, slot, (B, n)), slot


def steps(pos):
    """r_j - r_i and its length: pos (B, n, 3) -> (B, n, n, 3), (B, n, n)."""
    step = pos.unsqueeze(1) - pos.unsqueeze(2)
    return step, safe_norm(step, -1)  # an atom from itself: 0, and so are both derivatives


class Encoding(NamedTuple):
    """What the layers leave. The first axis is that of molecules."""

    x: torch.Tensor  # (B, n, F) before the last LayerNorm
    first: torch.Tensor  # (B, H, n, n) q of the distances alone
    last: torch.Tensor  # (B, H, n, n) q after the last layer
    step: torch.Tensor  # (B, n, n, 3) r_j - r_i
    real: torch.Tensor  # (B, n) false for PAD

    def rows(self, part):
        """Those of some molecules, a slice."""
        return Encoding(*(value[part] for value in self))

    def change(self):
        """By how much the layers have changed q: -> (B, n, n, H)."""
        return (self.last - self.first).permute(0, 2, 3, 1)

    def weigh(self, weight):
        """1/n sum_j weight_ij (r_j - r_i) over the tokens: (B, n, n, C) -> (B, n, 3, C)."""
        step = self.step * self.real[:, None, :, None]  # (B, n, n, 3)
        return product(step.mT, weight) / self.real.sum(1)[:, None, None, None]


# ---------------------------------------------------------------- layers


def product(a, b):
    """a @ b in the dtype of a and b whatever autocast says: bfloat16 is for linear layers alone."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


class Dense(Linear):
    """A linear layer that starts as Uni-Mol's: weights N(0, 0.02), biases 0."""

    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.02)
        nn.init.zeros_(self.bias)


class NonLinearHead(nn.Module):
    """W2 gelu(W1 x + b1) + b2: (..., C) -> (..., O)."""

    compiles = True

    def __init__(self, channels, out):
        super().__init__()
        self.linear1, self.linear2 = Dense(channels, channels), Dense(channels, out)

    def forward(self, x):
        return self.linear2(gelu(self.linear1(x)))


class GaussianLayer(nn.Module):
    """Distances (P,) and ordered pairs of tokens (P,) -> G (P, K).

    DEVIATION: mu and s start uniform in (0, 3), a at 1 and b at 0. The public code sets that, too,
    and then redraws all four from N(0, 0.02). That makes some Gaussians narrower than 0.001, and
    their derivatives as steep. DEVIATION: in the dtype of pos, not always in float32.
    """

    compiles = True

    def __init__(self, num_rbf):
        super().__init__()
        self.means, self.stds = nn.Embedding(1, num_rbf), nn.Embedding(1, num_rbf)
        self.mul, self.bias = nn.Embedding(NUM_TOKENS**2, 1), nn.Embedding(NUM_TOKENS**2, 1)
        nn.init.uniform_(self.means.weight, 0, 3)
        nn.init.uniform_(self.stds.weight, 0, 3)
        nn.init.ones_(self.mul.weight)
        nn.init.zeros_(self.bias.weight)

    def forward(self, distance, pair):
        u = self.mul(pair) * distance.unsqueeze(-1) + self.bias(pair)  # (P, 1)
        steep = 1 / (math.sqrt(2) * (self.stds.weight.abs() + 1e-5))  # (1, K); products, as divisions cost more
        bell = torch.exp(-((u - self.means.weight) * steep).square())  # (P, K)
        return bell * (steep / math.sqrt(3.14159))  # UPSTREAM models/unimol.py:394: so short a pi


class SelfAttention(nn.Module):
    """x (T, F), q (B, H, n, n), real (B, n), place (T,) -> the increment of x, and q plus this layer's logits."""

    def __init__(self, channels, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.in_proj, self.out_proj = Dense(channels, 3 * channels), Dense(channels, channels)

    def forward(self, x, pair, real, place):
        rows = spread(self.in_proj(x), place, real.shape)  # (B, n, 3F)
        query, key, value = (split(part, self.num_heads) for part in rows.chunk(3, dim=-1))
        pair = pair + logits(query, key)
        # q stays finite: PAD is left out inside the softmax alone
        attention = pair.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)  # (B, H, n, n)
        rows = product(attention, value).transpose(1, 2).flatten(2)  # (B, n, F)
        return self.out_proj(take(rows.flatten(0, 1), place)), pair


def split(x, num_heads):
    """(B, n, F) -> (B, H, n, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def logits(query, key):
    """Q_i . K_j / sqrt(D): two (B, H, n, D) -> (B, H, n, n)."""
    return product(query / math.sqrt(query.shape[-1]), key.mT)


class Layer(nn.Module):
    """As SelfAttention, but -> x, q after one layer; the hidden layer has 4 F channels."""

    compiles = True

    def __init__(self, channels, num_heads):
        super().__init__()
        self.self_attn = SelfAttention(channels, num_heads)
        self.self_attn_layer_norm = nn.LayerNorm(channels)
        self.fc1, self.fc2 = Dense(channels, 4 * channels), Dense(4 * channels, channels)
        self.final_layer_norm = nn.LayerNorm(channels)

    def forward(self, x, pair, real, place):
        dx, pair = self.self_attn(self.self_attn_layer_norm(x), pair, real, place)
        x = x + dx
        return x + self.fc2(gelu(self.fc1(self.final_layer_norm(x)))), pair


class Transformer(nn.Module):
    """The first norm and the layers; as Layer. UniMol applies the last two norms, named as in public."""

    def __init__(self, channels, num_heads, num_layers):
        super().__init__()
        self.emb_layer_norm, self.final_layer_norm = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.final_head_layer_norm = nn.LayerNorm(num_heads)
        self.layers = nn.ModuleList(Layer(channels, num_heads) for _ in range(num_layers))

    def forward(self, x, pair, real, place):
        x = self.emb_layer_norm(x)
        for layer in self.layers:
            x, pair = layer(x, pair, real, place)
        return x, pair


# ---------------------------------------------------------------- the encoder


class UniMol(nn.Module):
    """The encoder: z (N,), pos (N, 3), batch (N,) -> x (N, F), vec (N, 3, F) equivariant."""

    one_graph = False  # the padding depends on the sizes of the molecules, so the derivative cannot be compiled

    def __init__(self, config):
        super().__init__()
        refuse_norms(config)
        if config.num_heads == 1:  # a LayerNorm over one head is 0, and vec would not depend on the geometry
            raise InputError("model.num_heads = 1: model.backbone = unimol needs two or more", code=2)
        self.config = config
        channels, num_heads, num_rbf = config.embedding_dimension, config.num_heads, config.num_rbf
        self.register_buffer("token_of", token_table(), persistent=False)
        self.embed_tokens = nn.Embedding(NUM_TOKENS, channels, padding_idx=PAD)
        nn.init.normal_(self.embed_tokens.weight[PAD + 1 :], std=0.02)
        self.encoder = Transformer(channels, num_heads, config.num_layers)
        self.gbf, self.gbf_proj = GaussianLayer(num_rbf), NonLinearHead(num_rbf, num_heads)
        self.pair2coord_proj = nn.ModuleDict({"linear1": Dense(num_heads, num_heads)})
        self.vec_proj = Linear(num_heads, channels, bias=False)

    def tokens(self, z):
        """(N,) -> (N,)."""
        token = self.token_of[z]
        if (unknown := token == UNK).any():  # Python shows a warning once
            told = f"atomic numbers {z[unknown].unique().tolist()} are none of Uni-Mol's 26 elements"
            warnings.warn(f"{told}: all of them are the one token UNK", stacklevel=3)
        return token

    def encode(self, token, pos, batch):
        """token (N,), pos (N, 3), batch (N,) -> Encoding, slot (N,)."""
        token, pos, slot = pad(token, pos, batch)  # (B, n), (B, n, 3)
        step, distance = steps(pos)
        pair = token.unsqueeze(2) * NUM_TOKENS + token.unsqueeze(1)  # (B, n, n)
        real = token != PAD  # (B, n)
        place = places(real.unsqueeze(2) & real.unsqueeze(1))  # (P,)
        first = self.gbf_proj(self.gbf(take(distance.flatten(), place), take(pair.flatten(), place)))  # (P, H)
        first = spread(first, place, pair.shape).permute(0, 3, 1, 2)  # (B, H, n, n)
        place = places(real)  # (T,)
        x, last = self.encoder(self.embed_tokens(take(token.flatten(), place)), first, real, place)
        return Encoding(spread(x, place, real.shape), first, last, step, real), slot

    def invariant(self, code):
        """The x of all tokens: -> (B, n, F)."""
        return self.encoder.final_layer_norm(code.x)

    def weights(self, code):
        """How much each pair counts in vec and in the coordinate head: -> (B, n, n, H)."""
        delta = self.encoder.final_head_layer_norm(code.change())
        return gelu(self.pair2coord_proj["linear1"](delta))

    def forward(self, z, pos, batch, edge_index=None):
        """edge_index is not looked at: all pairs of a molecule are used."""
        code, slot = self.encode(self.tokens(z), pos, batch)
        x = take(self.invariant(code).flatten(0, 1), slot)  # (N, F)
        vec = take(code.weigh(self.weights(code)).flatten(0, 1), slot)  # (N, 3, H)
        return x, self.vec_proj(vec)


def load_public(module, state_dict):
    """Load the `model` of a public Uni-Mol checkpoint by name into a UniMol or objective unimol.

    What has no place there is left out. vec_proj, which no public file has, stays as it is. Until
    April 2024 the public code had 1/(n - 1) in place of 1/n and summed over PAD too: the weights of
    2022 were made so. x is the same; the scale of vec and of the moves is not.
    """
    prefix = "" if isinstance(module, UniMol) else "encoder."
    own = [name for name in module.state_dict() if not name.endswith("vec_proj.weight")]
    if missing := [name for name in own if name.removeprefix(prefix) not in state_dict]:
        raise ValueError(f"these weights are not of this network: {', '.join(missing)} missing")
    found = {name: state_dict[name.removeprefix(prefix)] for name in own}
    module.load_state_dict(found, strict=False)
