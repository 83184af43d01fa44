"""Heads of properties that are no sum over the atoms: `head` of finetune.py names one.

    dipole   the length of a vector, for QM9's mu            as TorchMD-NET
    extent   a second moment, for QM9's r2                   as TorchMD-NET
    pooler   two layers on the mean of x, of any encoder     as Uni-Mol

Each is made by Head(channels). head(x, vec, z, pos, batch, num_molecules) -> y' (B,).
"""

from torch import nn

from beyond.unimol import Dense
from model import EquivariantHead, Linear, safe_norm, scatter_mean, scatter_sum, take

# standard atomic weights, u, by atomic number; 0 stands for no element
STANDARD_WEIGHTS = """
1 1.008 4.0026 6.94 9.01218 10.81 12.011 14.007 15.999 18.9984 20.1797 22.9898 24.305 26.9815
28.085 30.9738 32.06 35.45 39.948 39.0983 40.078 44.9559 47.867 50.9415 51.9961 54.938 55.845
58.9332 58.6934 63.546 65.38 69.723 72.63 74.9216 78.971 79.904 83.798 85.4678 87.62 88.9058
91.224 92.9064 95.95 97.9072 101.07 102.906 106.42 107.868 112.414 114.818 118.71 121.76 127.6
126.904 131.293 132.905 137.327 138.905 140.116 140.908 144.242 144.913 150.36 151.964 157.25
158.925 162.5 164.93 167.259 168.934 173.054 174.967 178.49 180.948 183.84 186.207 190.23 192.217
195.084 196.967 200.592 204.38 207.2 208.98 208.982 209.987 222.018 223.02 226.025 227.028 232.038
231.036 238.029"""
ATOMIC_MASSES = tuple(map(float, STANDARD_WEIGHTS.split()))


def centred(z, pos, batch, num_molecules):
    """Positions from the centre of mass of each molecule: (N,), (N, 3), (N,) -> (N, 3)."""
    masses = pos.new_tensor(ATOMIC_MASSES)  # (93,)
    mass = masses[z.clamp(max=len(masses) - 1)].unsqueeze(1)  # (N, 1); past uranium all weigh alike
    centre = scatter_sum(mass * pos, batch, num_molecules) / scatter_sum(mass, batch, num_molecules)  # (B, 3)
    return pos - take(centre, batch)


class EquivariantDipoleMoment(EquivariantHead):
    """|sum_i q_i (r_i - r_com) + mu_i|, q_i and mu_i from the gated blocks: -> (B,)."""

    def forward(self, x, vec, z, pos, batch, num_molecules):
        charge, dipole = self.blocks(x, vec)  # (N, 1), (N, 3, 1)
        moment = charge * centred(z, pos, batch, num_molecules) + dipole.squeeze(-1)  # (N, 3)
        return safe_norm(scatter_sum(moment, batch, num_molecules), dim=1)


class ElectronicSpatialExtent(nn.Module):
    """sum_i x_i |r_i - r_com|^2, x_i from an MLP: -> (B,)."""

    def __init__(self, channels):
        super().__init__()
        first, last = Linear(channels, channels // 2), Linear(channels // 2, 1)
        self.output_network = nn.Sequential(first, nn.SiLU(), last)

    def forward(self, x, vec, z, pos, batch, num_molecules):
        square = centred(z, pos, batch, num_molecules).square().sum(1)  # (N,)
        return scatter_sum(self.output_network(x).squeeze(-1) * square, batch, num_molecules)


class Pooler(nn.Module):
    """Uni-Mol's property head, of any encoder: x (N, F) -> (B,), or (B, O) of several outputs.

    y_b = W2 tanh(W1 mean_{i in b} x_i + b1) + b2.
    DEVIATION: of the mean of x, since encoders give no CLS; and without dropout, as all of beyond/unimol.py.
    """

    def __init__(self, channels, out_channels=1):
        super().__init__()
        self.dense, self.out_proj = Dense(channels, channels), Dense(channels, out_channels)

    def forward(self, x, vec, z, pos, batch, num_molecules):
        return self.out_proj(self.dense(scatter_mean(x, batch, num_molecules)).tanh()).squeeze(-1)
