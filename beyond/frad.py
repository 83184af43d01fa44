"""Frad, fractional denoising: turn torsions, noise the coordinates, predict that noise alone.

Feng et al., "Fractional Denoising for 3D Molecular Pre-training", arXiv:2307.10683. For each
rotatable bond

    angle ~ N(0, tau^2)      tau = dihedral_angle_noise_scale, 2 degrees      pos_turned: all bonds turned by theirs
    eps ~ N(0, sigma^2)      sigma = position_noise_scale, angstrom
    L = 1/(3N) sum_i |head(x_i, vec_i of pos_turned + eps) - eps_i / sigma|^2

The torsions are noise that the network sees and need not predict. With tau = 0 this is Coord.

    R         rotors, the rotatable bonds of a batch: bond (R, 2) = atoms [j stays, k turns]
    fragment  (N,) the rigid piece of each atom: 0 stays, f >= 1 hangs on rotor f - 1 (rotors.py)
"""

import math
import os

import h5py
import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss, normalize

from formats.schema import open_dataset
from harness.errors import InputError, explain
from model import EquivariantVectorOutput

# ---------------------------------------------------------------- turning a batch


def product(a, b):
    """Matrix products a (..., 3, 3), b (..., 3, c) -> (..., 3, c), in their dtype under autocast, too."""
    return (a.unsqueeze(-1) * b.unsqueeze(-3)).sum(-2)


def turn(pos, bond, fragment, angle):
    """Turn rotors by angles: pos (N, 3), bond (R, 2), fragment (N,), angle (R,) rad -> (N, 3).

    k's side turns by the right-hand rule about j -> k, so that each torsion i-j-k-l grows by the
    angle. This is exact at any angle. A rotor's own map is x -> Q x + s about its bond as it was
    before; an atom goes through the maps of all rotors between it and the root, the nearest one
    first. An angle of 0 is the identity to the bit.
    DEVIATION: Frad's code turns one bond after another by RDKit's SetDihedralDeg. The outcome is
    the same up to a rigid motion of each part of a molecule.
    """
    j, k = bond.unbind(1)
    eye = torch.eye(3, dtype=pos.dtype, device=pos.device)
    axis = normalize(pos[k] - pos[j], dim=1)  # (R, 3)
    # cross v = axis x v
    cross = torch.linalg.cross(axis.unsqueeze(2), eye.unsqueeze(0), dim=1)  # (R, 3, 3)
    angle = angle[:, None, None]
    # Rodrigues
    Q = eye + angle.sin() * cross + 2 * (angle / 2).sin().square() * product(cross, cross)
    s = pos[k].unsqueeze(2) - product(Q, pos[k].unsqueeze(2))  # (R, 3, 1)

    # the map of each fragment, of the root's fragment 0 first; up: the fragment that this map
    # continues in
    Q, s = torch.cat([eye.unsqueeze(0), Q]), torch.cat([s.new_zeros(1, 3, 1), s])  # (R+1, 3, 3), (R+1, 3, 1)
    up = torch.cat([fragment.new_zeros(1), fragment[j]])  # (R+1,)
    while up.any():  # each pass doubles the number of rotors in a map: log2(longest chain) passes
        Q, s, up = product(Q[up], Q), product(Q[up], s) + s[up], up[up]
    return (product(Q[fragment], pos.unsqueeze(2)) + s[fragment]).squeeze(2)


# ---------------------------------------------------------------- the rotors of a batch


class Rotors:
    """The rotors of molecules index (B,): -> {"bond": (R, 2), "fragment": (N,)} int64.

    Atoms and rotors are numbered as in their batch. It may be pickled and forked, as data.Molecules may.
    """

    def __init__(self, molecules):
        self.path, self.ptr = molecules.path, molecules.ptr
        self._file = None  # opened in each process: an HDF5 handle must not cross a fork
        remedy = "`python data.py rotors PLAIN.h5 [RAW] OUT.h5` adds them, see beyond/README.md"
        with h5py.File(self.path, "r") as file:
            if "rotor" not in file:
                raise InputError(f"{self.path} has no rotors, which objective = frad turns: {remedy}")
            with explain(f"its rotors are damaged, {remedy}"):
                self.rotor_ptr = open_dataset(file, "rotor/ptr", "int64", (len(self.ptr),))[:]
                if self.rotor_ptr[0] != 0 or (np.diff(self.rotor_ptr) < 0).any():
                    raise InputError(f"{self.path}: rotor/ptr must start at 0 and never fall")
                open_dataset(file, "rotor/bond", "uint16", (int(self.rotor_ptr[-1]), 2))
                open_dataset(file, "rotor/fragment", "uint16", (int(self.ptr[-1]),))

    def __getstate__(self):
        return self.__dict__ | {"_file": None}

    def _rows(self, name, ptr, index):
        """Rows ptr[m]:ptr[m+1] of a dataset for each m of index, end to end, and their numbers."""
        with explain(f"{self.path}: dataset rotor/{name} is damaged, make the file again", OSError, RuntimeError):
            if self._file is None or self._file[0] != os.getpid():
                self._file = os.getpid(), h5py.File(self.path, "r")
            dataset = self._file[1][f"rotor/{name}"]
            rows = [dataset[ptr[m] : ptr[m + 1]] for m in index]
        return np.concatenate([dataset[:0], *rows]).astype(np.int64), ptr[index + 1] - ptr[index]

    def __call__(self, index):
        index = np.asarray(index, dtype=np.int64).reshape(-1)
        bond, rotors = self._rows("bond", self.rotor_ptr, index)  # (R, 2), (B,)
        fragment, atoms = self._rows("fragment", self.ptr, index)  # (N,), (B,)
        of_rotor, of_atom = (np.repeat(np.arange(len(index)), number) for number in (rotors, atoms))  # (R,), (N,)
        first_atom, first_rotor = np.cumsum(atoms) - atoms, np.cumsum(rotors) - rotors  # (B,)
        own = np.arange(len(bond)) - first_rotor[of_rotor] + 1  # (R,) the fragment that it turns

        def check(bad, batch, why):
            if bad.any():
                m = index[batch[bad.argmax()]]
                raise InputError(f"{self.path}: molecule {m} has {why}: make the file again")

        check((bond >= atoms[of_rotor, None]).any(1), of_rotor, "a rotor on an atom that is not there")
        j, k = bond.T + first_atom[of_rotor]
        check(fragment > rotors[of_atom], of_atom, "an atom on a rotor that is not there")
        check(fragment[k] != own, of_rotor, "a rotor that does not turn its own atom")
        check(fragment[j] >= own, of_rotor, "a rotor that stands before the one it hangs on")
        fragment += np.where(fragment > 0, first_rotor[of_atom], 0)
        bond = torch.from_numpy(np.stack([j, k], axis=1))
        return {"bond": bond, "fragment": torch.from_numpy(fragment)}


# ---------------------------------------------------------------- the objective


class Frad(nn.Module):
    """Fractional denoising on any encoder (z, pos, batch) -> x, vec.

    Names and first weights are Coord's.

    DEVIATION: the clean geometry is the file's. Frad's code takes the conformer of its own LMDB
    file.
    """

    extra_noise = 1  # one more standard normal number an atom: the angle of the rotor that turns it
    unit = "mean square error of noise / sigma, per atom and axis"
    inputs = Rotors  # inputs(molecules)(index) -> what forward needs besides the atoms

    def __init__(self, encoder, config):
        super().__init__()
        self.config = config  # keys: position_noise_scale dihedral_angle_noise_scale
        self.encoder = encoder
        self.noise_head = EquivariantVectorOutput(config.model.embedding_dimension)

    def forward(self, z, pos, batch, noise, num_molecules, shuffle=False, bond=None, fragment=None):
        """noise (N, 4), standard normal: eps / sigma, and angle / tau of the rotor k."""
        eps, twist = noise[:, :3], noise[:, 3]  # (N, 3), (N,)
        tau = math.radians(self.config.dihedral_angle_noise_scale)
        pos = turn(pos, bond, fragment, tau * twist[bond[:, 1]])  # each rotor has a k of its own
        x, vec = self.encoder(z, pos + self.config.position_noise_scale * eps, batch)
        loss = mse_loss(self.noise_head(x, vec), eps)
        return {"loss": loss, "loss_noise": loss}
