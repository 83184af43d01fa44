"""The network: the equivariant transformer of TorchMD-NET (Tholke & De Fabritiis, arXiv:2202.02541), in torch alone.

GeoRecon (Yan, Li, Zhang) trains it, see pretrain.py. This file reads from leaf to root:

    1  graph operations      scatter_sum, radius_graph
    2  radial functions      cosine_cutoff, ExpNormalSmearing, NeighborEmbedding
    3  attention             EquivariantMultiHeadAttention
    4  vector norms          RMSVectorNorm, WhitenVectorNorm
    5  encoder               ModelConfig, EquivariantTransformer, new_encoder
    6  heads                 GatedEquivariantBlock, EquivariantScalar, EquivariantVectorOutput; see beyond/heads.py
    7  checkpoints           save_encoder, load_encoder

    N  atoms in the batch       z (N,) atomic numbers, pos (N, 3) in angstrom, batch (N,) molecule of each atom, sorted
    B  molecules in the batch   graph_emb (B, F)
    P  unordered pairs          edge_index (2, P) = [source j, target i] with i < j; edge_weight (P,) distance
    F  channels                 x (N, F) invariant, vec (N, 3, F) equivariant: vec(pos R^T) = R vec(pos)
    K  radial functions         edge_attr (P, K)
    H  attention heads of D = F / H channels
"""

import math
import pkgutil
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import silu

# ---------------------------------------------------------------- 1  graph operations


def take(x, index):
    """The rows of x (N, ...) at index (E,) -> (E, ...). On a CPU index_select's derivative compiles to slow atomics."""
    wide = index.view(-1, *[1] * (x.ndim - 1)).expand(-1, *x.shape[1:])  # (E, ...)
    return x.index_select(0, index) if x.is_cuda else x.gather(0, wide)


def scatter_sum(src, index, size):
    """Sum the rows of src (E, ...) that share an index (E,) -> (size, ...)."""
    total = src.new_zeros(size, *src.shape[1:])
    if src.is_cuda:
        return total.index_add_(0, index, src)
    return total.scatter_add_(0, index.view(-1, *[1] * (src.ndim - 1)).expand_as(src), src)


def scatter_mean(src, index, size):
    """Mean of the rows of src (E, ...) that share an index (E,) -> (size, ...)."""
    count = scatter_sum(src.new_ones(len(src), *[1] * (src.ndim - 1)), index, size)  # (size, 1, ...)
    return scatter_sum(src, index, size) / count


@torch.no_grad()
def radius_graph(pos, batch, cutoff, max_num_neighbors=0):
    """Every pair of atoms of one molecule closer than cutoff, once: pos (N, 3), batch (N,) -> edge_index (2, P).

    edge_index = [source j, target i] with i < j, sorted by target, then by source. The published, directed form is
    cat([edge_index, edge_index.flip(0), self-loops], dim=1); a filter that depends on the distance alone is the same
    for both directions, so we compute it once for the two. Memory grows with the pairs inside molecules, not with N^2.

    DEVIATION: no neighbour cap. Table 13's 32 keeps whichever neighbours come first in the atom order, which breaks
    permutation symmetry; max_num_neighbors > 0 is a bound (self included, as upstream) that is checked, never a cut.
    """
    if (batch[1:] < batch[:-1]).any():
        raise ValueError("radius_graph: batch must be sorted, the atoms of a molecule side by side")
    atom = torch.arange(len(pos), device=pos.device)
    num_later = torch.searchsorted(batch, batch, right=True) - 1 - atom  # (N,) atoms after i in its molecule
    i = atom.repeat_interleave(num_later)  # (C,) candidates: all pairs i < j of a molecule
    j = torch.arange(len(i), device=pos.device) - (num_later.cumsum(0) - num_later)[i] + i + 1
    # ~(>=), not (<): an atom with a NaN position keeps its pairs, so the NaN reaches the loss
    near = ~((pos[i] - pos[j]).square().sum(-1) >= cutoff**2)
    if max_num_neighbors:
        degree = 1 + torch.bincount(torch.cat([i[near], j[near]]), minlength=len(pos))
        if (most := degree.max().item()) > max_num_neighbors:
            raise ValueError(f"max_num_neighbors = {max_num_neighbors}, but an atom has {most}: raise it, or set 0")
    return torch.stack([j, i])[:, near]  # (2, P)


def safe_norm(vec, dim):
    """|vec|, as s / sqrt(s + 1e-10) of the squared length s: first and second derivatives are finite at zero.

    UPSTREAM torchmd-net/models/utils.py:626-645 masks an exact zero. But where symmetry forbids a vector (the
    carbon of CO2) vec is rounding, and d|vec| points anywhere. Here the derivative goes to zero with vec.
    """
    square = vec.square().sum(dim)
    return square * (square + 1e-10).rsqrt()


# ---------------------------------------------------------------- 2  radial functions


def linear(x, weight, bias=None):
    """x W^T + b. Under torch.autocast only the product runs in bfloat16. The result has the dtype of x."""
    return nn.functional.linear(x, weight, bias).to(x.dtype)


class Linear(nn.Linear):
    """nn.Linear with TorchMD-NET's initialisation: Xavier uniform weights, zero bias."""

    def reset_parameters(self):
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x):
        return linear(x, self.weight, self.bias)


def cosine_cutoff(distance, cutoff):
    """C(d) = (cos(pi d / cutoff) + 1) / 2 for d < cutoff, and 0 beyond."""
    return 0.5 * (torch.cos(distance.clamp(max=cutoff) * (math.pi / cutoff)) + 1)


class ExpNormalSmearing(nn.Module):
    """rbf_k(d) = C(d) exp(-beta_k (exp(-5 d / cutoff) - mu_k)^2): distance (P,) -> (P, K)."""

    def __init__(self, cutoff, num_rbf):
        super().__init__()
        self.cutoff = cutoff
        self.register_buffer("means", torch.linspace(math.exp(-cutoff), 1, num_rbf))
        self.register_buffer("betas", torch.full((num_rbf,), (2 / num_rbf * (1 - math.exp(-cutoff))) ** -2))

    def forward(self, distance):
        distance = distance.unsqueeze(-1)  # (P, 1)
        decay = torch.exp(distance * (-5.0 / self.cutoff))
        return cosine_cutoff(distance, self.cutoff) * torch.exp(-self.betas * (decay - self.means).square())


class Graph(NamedTuple):
    """The geometry that the layers see: the pairs within the cutoff, and one self-loop for all atoms."""

    i: torch.Tensor  # (P,) target of the first direction; the second direction runs from i to j
    j: torch.Tensor  # (P,) source of the first direction
    unit: torch.Tensor  # (P, 3) (pos_j - pos_i) / distance
    cutoff: torch.Tensor  # (P, 1) C(distance)
    edge_attr: torch.Tensor  # (P, K) rbf(distance)
    self_attr: torch.Tensor  # (1, K) rbf(0): a self-loop has distance 0, C = 1 and no direction
    inside: torch.Tensor | None = None  # (P, 1) 1, or 0 for a pair beyond the cutoff; None: all 1


class NeighborEmbedding(nn.Module):
    """x_i <- W_c [x_i || sum_{j != i} C(d_ij) (W_d rbf(d_ij)) * emb(z_j)]: (N, F) -> (N, F)."""

    def __init__(self, channels, num_rbf, max_z):
        super().__init__()
        self.embedding = nn.Embedding(max_z, channels)
        self.distance_proj = Linear(num_rbf, channels)
        self.combine = Linear(2 * channels, channels)

    def forward(self, z, x, graph):
        neighbor = self.embedding(z)  # (N, F)
        filters = self.distance_proj(graph.edge_attr) * graph.cutoff  # (P, F)
        total = scatter_sum(take(neighbor, graph.j) * filters, graph.i, len(z))
        total = total + scatter_sum(take(neighbor, graph.i) * filters, graph.j, len(z))
        return self.combine(torch.cat([x, total], dim=1))


# ---------------------------------------------------------------- 3  attention


class EquivariantMultiHeadAttention(nn.Module):
    """One layer of TorchMD-NET's equivariant transformer: x (N, F), vec (N, 3, F) -> increments.

    Per head and directed edge j -> i, self-loops included:
        A_ij     = SiLU(sum_D q_i k_j dk_ij) C(d_ij)                 no softmax, no 1/sqrt(D)
        y_i      = sum_j A_ij (v^x_j dx_ij)
        w_i      = sum_j vec_j (v^1_j d1_ij) + u_ij (v^2_j d2_ij)    u_ij = (pos_j - pos_i) / d_ij, 0 on a self-loop
        o1,o2,o3 = W_o y_i
        dx_i     = <U1 vec_i, U2 vec_i> o2 + o3,    dvec_i = (U3 vec_i) o1 + w_i
    The filters dk, dx, d1, d2 = SiLU(W rbf(d_ij) + b) depend on the distance alone: they are computed once for both
    directions of a pair, and once for the self-loops of all atoms. vec_j v^1_j is a product per atom, not per edge.
    """

    compiles = True  # harness/compiled.py: one of the modules that `compile` compiles

    def __init__(self, channels, num_heads, num_rbf, vector_cutoff):
        super().__init__()
        self.num_heads, self.vector_cutoff = num_heads, vector_cutoff
        self.layernorm = nn.LayerNorm(channels)
        self.q_proj = Linear(channels, channels)
        self.k_proj = Linear(channels, channels)
        self.v_proj = Linear(channels, 3 * channels)
        self.o_proj = Linear(channels, 3 * channels)
        self.vec_proj = Linear(channels, 3 * channels, bias=False)
        self.dk_proj = Linear(num_rbf, channels)
        self.dv_proj = Linear(num_rbf, 3 * channels)

    def parts(self, proj):
        """Weight (F, C) and bias (F,) of the parts x, 1 and 2 of v_proj or dv_proj.

        UPSTREAM stores the three parts of a head side by side, (H, 3, D). We split them, so each is contiguous.
        """
        weight = proj.weight.unflatten(0, (self.num_heads, 3, -1))  # (H, 3, D, C)
        bias = proj.bias.unflatten(0, (self.num_heads, 3, -1))  # (H, 3, D)
        return [(weight[:, part].flatten(0, 1), bias[:, part].flatten()) for part in range(3)]

    def filters(self, attr, parts):
        """d_k and the filters of parts: rbf (M, K) -> (M, F) each."""
        return [silu(self.dk_proj(attr)), *(silu(linear(attr, *part)) for part in parts)]

    def heads(self, *values):
        """(M, F) -> (M, H, D), each. Split once, so that compiled loops over pairs can be vectorised."""
        return (value.unflatten(-1, (self.num_heads, -1)) for value in values)

    def attend(self, q, k, d_k):
        """A_ij before its cutoff: three (M, H, D) -> (M, H, 1)."""
        return silu((q * k * d_k).sum(-1, keepdim=True))

    def fade(self, graph, d_x, *vector_filters):
        """-> the factor that A still needs (C or 1), d_x, d_1, d_2. Pairs beyond the cutoff get zero weight."""
        if self.vector_cutoff:  # DEVIATION (off by default): vec messages vanish at the cutoff too, torchmd-net #260
            return 1.0, *(d * graph.cutoff for d in (d_x, *vector_filters))
        cutoff, inside = graph.cutoff.unsqueeze(-1), graph.inside
        return cutoff, d_x, *(d if inside is None else d * inside for d in vector_filters)

    def forward(self, x, vec, graph):
        """vec None is zero, as in the first layer: every term with vec or v^1 drops out."""
        x, used = self.layernorm(x), slice(None, None, 2 if vec is None else 1)  # no vec: x and 2
        v_x, *v_1, v_2 = (linear(x, *part) for part in self.parts(self.v_proj)[used])  # (N, F)
        q, k, v_x = self.heads(self.q_proj(x), self.k_proj(x), v_x)  # (N, H, D)
        parts = self.parts(self.dv_proj)[used]
        d_k, d_x, *d_1, d_2 = self.filters(graph.edge_attr, parts)  # (P, F)
        loop_k, loop_x, *loop_1 = self.filters(graph.self_attr, parts[:-1])  # (1, F)
        loop_k, loop_x = self.heads(loop_k, loop_x)  # (1, H, D)

        # self-loops: C = 1, no u
        y = v_x * loop_x * self.attend(q, k, loop_k)  # (N, H, D)
        w = x.new_zeros(len(x), 3, x.shape[1])
        if vec is not None:
            vec_v = vec * v_1[0].unsqueeze(1)  # (N, 3, F)
            w = vec_v * loop_1[0]  # (N, 3, F)

        # the two directions of each pair
        cutoff, d_x, *d_1, d_2 = self.fade(graph, d_x, *d_1, d_2)
        d_k, d_x = self.heads(d_k, d_x)  # (P, H, D)
        unit = graph.unit.unsqueeze(2)  # (P, 3, 1)
        for i, j, sign in ((graph.i, graph.j, 1), (graph.j, graph.i, -1)):
            attention = self.attend(take(q, i), take(k, j), d_k) * cutoff  # (P, H, 1)
            y = y + scatter_sum(take(v_x, j) * d_x * attention, i, len(x))  # (P, H, D) -> (N, H, D)
            message = (take(v_2, j) * d_2).unsqueeze(1)  # (P, 1, F)
            if vec is None:
                message = message * (sign * unit)  # (P, 3, F)
            else:
                message = torch.addcmul(take(vec_v, j) * d_1[0].unsqueeze(1), message, unit, value=sign)
            w = w + scatter_sum(message, i, len(x))  # (P, 3, F) -> (N, 3, F)
        # vec_proj gets a zero vec, not None: DDP needs a gradient, here zero, for its weights
        return self.update(y, w, x.new_zeros(1, 3, x.shape[1]) if vec is None else vec)

    def update(self, y, w, vec):
        """dx (N, F), dvec (N, 3, F)."""
        u_1, u_2, u_3 = self.vec_proj(vec).chunk(3, dim=-1)  # (N, 3, F)
        o_1, o_2, o_3 = self.o_proj(y.flatten(1)).chunk(3, dim=-1)  # (N, F)
        return (u_1 * u_2).sum(1) * o_2 + o_3, torch.addcmul(w, u_3, o_1.unsqueeze(1))


# ---------------------------------------------------------------- 4  vector norms


class RMSVectorNorm(nn.Module):
    """vec / sqrt(mean(vec^2) + 1), the mean over axes and channels: (N, 3, F) -> (N, 3, F).
    PAPER-SILENT: the default. With eps = 1 it shrinks large vectors and leaves small ones alone. So it does not
    amplify rounding where symmetry forces vec = 0, and it is exact on every symmetric molecule.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, vec):
        return vec * (vec.square().mean((1, 2), keepdim=True) + 1).rsqrt() * self.weight


class InverseSqrt(torch.autograd.Function):
    """A -> A^(-1/2) for symmetric positive definite A (N, 3, 3), differentiable without end.

    Autograd through an eigendecomposition divides by differences of eigenvalues, NaN for the zero
    vector or a tetrahedral site. Y = A^(-1/2) obeys Y^2 = A^-1, so dY solves
    Y dY + dY Y = -Y^2 dA Y^2: a sum of eigenvalues of Y, never zero. The map dA -> dY is its own
    adjoint: forward and reverse mode are one formula.
    """

    @staticmethod
    def forward(A):
        eigenvalues, U = torch.linalg.eigh(A.nan_to_num(0, 0, 0))  # eigh raises on NaN, which centred has, too
        return (U * eigenvalues.rsqrt().unsqueeze(-2)) @ U.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def derivative(Y, dA):
        eye = torch.eye(3, dtype=Y.dtype, device=Y.device)
        # X -> Y X + X Y as a 9 x 9 matrix on the row-major entries of X
        sylvester = torch.einsum("nac,bd->nabcd", Y, eye) + torch.einsum("ac,ndb->nabcd", eye, Y)
        dA = 0.5 * (dA + dA.mT)
        X = torch.linalg.solve(sylvester.reshape(-1, 9, 9), dA.reshape(-1, 9, 1)).reshape(-1, 3, 3)
        return -Y @ Y @ X @ Y @ Y

    @staticmethod
    def backward(ctx, grad):
        return InverseSqrt.derivative(*ctx.saved_tensors, grad)

    @staticmethod
    def jvp(ctx, dA):
        return InverseSqrt.derivative(*ctx.saved_tensors, dA)


class WhitenVectorNorm(nn.Module):
    """C^(-1/2) (vec - channel mean), C = covariance of the F vectors of an atom: (N, 3, F) -> (N, 3, F), in float64.

    UPSTREAM pre-training-via-denoising torchmd_et.py:352-439. DEVIATION: the regulariser is 1e-5 * identity, theirs is
    1e-5 * diag(1, 2, 3), which is not equivariant.
    """

    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, vec):
        centred = vec.double() - vec.double().mean(-1, keepdim=True)  # (N, 3, F)
        eye = torch.eye(3, dtype=centred.dtype, device=vec.device)
        covariance = centred @ centred.mT / vec.shape[-1] + 1e-5 * eye  # (N, 3, 3)
        return (InverseSqrt.apply(covariance) @ centred).to(vec.dtype) * self.weight


# ---------------------------------------------------------------- 5  encoder


def setting(default, **allowed):
    """A config field with its limits: low, below, choices, tuning (a linear probe may not set it)."""
    return field(default=default, metadata=allowed)


BACKBONES = {  # those of beyond/ are imported when a config asks for one
    "et": "model:EquivariantTransformer",
    "adaptive": "beyond.scd:AdaptiveTransformer",
    "ungated": "beyond.scd:UngatedTransformer",
    "painn": "beyond.painn:PaiNN",
    "unimol": "beyond.unimol:UniMol",
}
VECTOR_NORMS = {"none": nn.Identity, "rms": RMSVectorNorm, "whiten": WhitenVectorNorm}


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the encoder; defaults are Table 13's QM9 column. Names are Table 13's where it has one."""

    backbone: str = setting("et", choices=tuple(BACKBONES))
    embedding_dimension: int = setting(256, low=2)
    num_layers: int = setting(8, low=1)
    num_rbf: int = setting(64, low=2)
    num_heads: int = setting(8, low=1)
    cutoff_upper: float = setting(5.0, low=0.1, below=1000.0)  # angstrom
    max_z: int = setting(100, low=1)  # atomic numbers 0 .. max_z - 1
    max_num_neighbors: int = setting(0, low=0)  # 0: no bound; see radius_graph
    x_norm_layer: bool = True  # PAPER-SILENT: LayerNorm on x after each residual
    vec_norm_layer: str = setting("rms", choices=tuple(VECTOR_NORMS))  # PAPER-SILENT: on vec after each residual
    vec_norm_out: str = setting("rms", choices=tuple(VECTOR_NORMS))  # PAPER-SILENT: on vec after the last layer
    vector_cutoff: bool = False  # et alone: see EquivariantMultiHeadAttention

    def __post_init__(self):
        if self.embedding_dimension % self.num_heads:
            width = f"model.embedding_dimension = {self.embedding_dimension}"
            raise ValueError(f"{width} must be a multiple of model.num_heads = {self.num_heads}")


class EquivariantLayers(nn.Module):
    """Attention layers with residuals and norms, and the graph that they see: the body of encoder and decoder."""

    def __init__(self, config, num_layers):
        super().__init__()
        self.config = config
        channels = config.embedding_dimension
        self.distance_expansion = ExpNormalSmearing(config.cutoff_upper, config.num_rbf)
        shape = channels, config.num_heads, config.num_rbf, config.vector_cutoff
        self.attention_layers = nn.ModuleList(EquivariantMultiHeadAttention(*shape) for _ in range(num_layers))
        x_norm = nn.LayerNorm if config.x_norm_layer else nn.Identity
        self.x_norms = nn.ModuleList(x_norm(channels) for _ in range(num_layers))
        self.vec_norms = nn.ModuleList(VECTOR_NORMS[config.vec_norm_layer](channels) for _ in range(num_layers))

    def graph(self, pos, batch, edge_index=None):
        """pos (N, 3), batch (N,) -> Graph of the pairs within cutoff_upper.

        edge_index (2, P): these pairs, if already known; pairs beyond the cutoff may be among them, with zero weight.
        """
        given = edge_index is not None
        if not given:
            edge_index = radius_graph(pos, batch, self.config.cutoff_upper, self.config.max_num_neighbors)
        j, i = edge_index
        edge_vec = take(pos, j) - take(pos, i)  # (P, 3)
        # the clamp keeps two coincident atoms finite: derivative 0 instead of 0 / 0
        edge_weight = edge_vec.square().sum(-1).clamp(min=1e-12).sqrt()  # (P,)
        return Graph(
            i=i,
            j=j,
            unit=edge_vec / edge_weight.unsqueeze(-1),
            cutoff=cosine_cutoff(edge_weight, self.config.cutoff_upper).unsqueeze(-1),
            edge_attr=self.distance_expansion(edge_weight),
            self_attr=self.distance_expansion(pos.new_zeros(1)),
            inside=(edge_weight < self.config.cutoff_upper).to(pos.dtype).unsqueeze(-1) if given else None,
        )

    def layers(self, x, vec, graph):
        """x (N, F), vec (N, 3, F) or None for zero -> x, vec after all layers."""
        for attention, x_norm, vec_norm in zip(self.attention_layers, self.x_norms, self.vec_norms, strict=True):
            dx, dvec = attention(x, vec, graph)
            x = x_norm(x + dx)
            vec = vec_norm(dvec if vec is None else vec + dvec)
        return x, vec


class EquivariantTransformer(EquivariantLayers):
    """The encoder: z (N,), pos (N, 3), batch (N,) -> x (N, F) invariant, vec (N, 3, F) equivariant. Sec. 4.2.
    Attribute names and weight layout are TorchMD-NET's, so its `representation_model.*` loads.
    """

    def __init__(self, config):
        super().__init__(config, config.num_layers)
        channels = config.embedding_dimension
        self.embedding = nn.Embedding(config.max_z, channels)
        self.neighbor_embedding = NeighborEmbedding(channels, config.num_rbf, config.max_z)
        self.out_norm = nn.LayerNorm(channels)
        self.out_norm_vec = VECTOR_NORMS[config.vec_norm_out](channels)

    def forward(self, z, pos, batch, edge_index=None):
        graph = self.graph(pos, batch, edge_index)
        x = self.neighbor_embedding(z, self.embedding(z), graph)  # (N, F)
        x, vec = self.layers(x, None, graph)  # (N, F), (N, 3, F)
        return self.out_norm(x), self.out_norm_vec(vec)


def new_encoder(config):
    """The encoder that config.backbone names, with fresh weights: (z, pos, batch, edge_index=None) -> x, vec."""
    return pkgutil.resolve_name(BACKBONES[config.backbone])(config)


# ---------------------------------------------------------------- 6  heads


class GatedEquivariantBlock(nn.Module):
    """x' = s, vec' = g W2 vec, [s, g] = MLP[x || |W1 vec|]: (N, F), (N, 3, F) -> (N, O), (N, 3, O).
    arXiv:2102.03150 (PaiNN), Fig. 3, as in TorchMD-NET.
    """

    def __init__(self, channels, out_channels, scalar_activation):
        super().__init__()
        self.scalar_activation = scalar_activation
        self.vec1_proj = Linear(channels, channels, bias=False)
        self.vec2_proj = Linear(channels, out_channels, bias=False)
        self.update_net = nn.Sequential(Linear(2 * channels, channels), nn.SiLU(), Linear(channels, 2 * out_channels))

    def forward(self, x, vec):
        length = safe_norm(self.vec1_proj(vec), dim=1)  # (N, F)
        x, gate = self.update_net(torch.cat([x, length], dim=-1)).chunk(2, dim=-1)  # (N, O) each
        return silu(x) if self.scalar_activation else x, gate.unsqueeze(1) * self.vec2_proj(vec)


class EquivariantHead(nn.Module):
    """Two gated blocks, F -> F / 2 -> O: x (N, F), vec (N, 3, F) -> (N, O), (N, 3, O)."""

    def __init__(self, channels, out_channels=1):
        super().__init__()
        first = GatedEquivariantBlock(channels, channels // 2, scalar_activation=True)
        last = GatedEquivariantBlock(channels // 2, out_channels, scalar_activation=False)
        self.output_network = nn.ModuleList([first, last])

    def blocks(self, x, vec):
        for block in self.output_network:
            x, vec = block(x, vec)
        return x, vec


class EquivariantScalar(EquivariantHead):
    """Per-atom scalar: x (N, F), vec (N, 3, F) -> (N,), or (N, O) of several."""

    def __init__(self, channels, out_channels=1):
        super().__init__(channels, out_channels)
        # Nothing uses the last block's vectors. Its weights stay for TorchMD-NET's files, without a gradient for DDP.
        self.output_network[-1].vec2_proj.requires_grad_(False)

    def forward(self, x, vec):
        return self.blocks(x, vec)[0].squeeze(-1)


class EquivariantVectorOutput(EquivariantHead):
    """Per-atom vector, the denoising head of Sec. 4.2: x (N, F), vec (N, 3, F) -> (N, 3)."""

    def forward(self, x, vec):
        return self.blocks(x, vec)[1].squeeze(-1)


# ---------------------------------------------------------------- 7  checkpoints


def save_encoder(encoder):
    """The content of an encoder.pt: plain values and tensors that torch.load(weights_only=True) reads."""
    return {"schema": "georecon/1", "model": asdict(encoder.config), "state_dict": encoder.state_dict()}


def load_encoder(path):
    """The encoder of an encoder.pt, on the CPU; a ValueError says what is wrong with the file."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["schema"] != "georecon/1":
            raise ValueError(f"its schema is {checkpoint['schema']}")
        encoder = new_encoder(ModelConfig(**checkpoint["model"]))
        encoder.load_state_dict(checkpoint["state_dict"])
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        first = str(error).partition("\n")[0]
        raise ValueError(f"{path} is no encoder.pt of schema georecon/1: {type(error).__name__} {first}") from None
    return encoder
