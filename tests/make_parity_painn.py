"""Write tests/parity_painn.npz: what schnetpack's PaiNN computes for random weights, for test_beyond_painn.py.

    pip download --no-deps schnetpack==2.1.1 && pip install sympy tqdm
    python tests/make_parity_painn.py schnetpack-2.1.1-py3-none-any.whl

The file in this repository was made with schnetpack 2.1.1, torch 2.14.1 and numpy 2.4.6 on the CPU; the tests read the
file and need none of it. Weights are not stored: make_parity.py's `random_weights` draws them again from a seed.
"""

import json
import sys
import types
from pathlib import Path

import numpy as np
import torch
from make_parity import MOLECULES, collate, random_weights, save

PATH = Path(__file__).with_name("parity_painn.npz")
SETTINGS = {
    "published": dict(embedding_dimension=24, num_layers=3, num_rbf=20, cutoff_upper=5.0),  # the paper has 128 channels
    "short": dict(embedding_dimension=8, num_layers=4, num_rbf=32, cutoff_upper=2.5),  # many pairs are beyond it
}
FULL = dict(embedding_dimension=128, num_layers=3, num_rbf=20, cutoff_upper=5.0)  # schnetpack's configs/


def load_schnetpack(wheel):
    """Import from the wheel without its root package, whose dependencies (lightning, matscipy, ...) PaiNN lacks."""
    root = types.ModuleType("schnetpack")
    root.__path__ = [f"{wheel}/schnetpack"]
    sys.modules["schnetpack"] = root


def peer(embedding_dimension, num_layers, num_rbf, cutoff_upper):
    from schnetpack.nn import CosineCutoff, GaussianRBF
    from schnetpack.representation import PaiNN

    return PaiNN(embedding_dimension, num_layers, GaussianRBF(num_rbf, cutoff_upper), CosineCutoff(cutoff_upper))


def directed_pairs(pos, batch, cutoff):
    """Target and source of every directed pair of a molecule within the cutoff: the peer has no neighbour list here."""
    near = (pos[:, None] - pos[None]).norm(dim=-1) < cutoff  # (N, N)
    near &= (batch[:, None] == batch[None]) & ~torch.eye(len(pos), dtype=torch.bool)
    return near.nonzero().T


def main(wheel):
    load_schnetpack(wheel)
    out = {}
    z, pos, batch = collate(MOLECULES)
    pos.requires_grad_()
    for key, setting in SETTINGS.items():
        model = peer(**setting)
        out |= {f"{key}/{name}": value.clone() for name, value in model.named_buffers()}  # as float32
        weights = random_weights({name: value.shape for name, value in model.named_parameters()}, seed=0)
        model.load_state_dict(model.state_dict() | weights)
        i, j = directed_pairs(pos, batch, setting["cutoff_upper"])
        result = model.double()({"_atomic_numbers": z, "_Rij": pos[j] - pos[i], "_idx_i": i, "_idx_j": j})
        x, vec = result["scalar_representation"], result["vector_representation"]
        (slope,) = torch.autograd.grad(x.square().sum() + vec.square().sum(), pos)
        out |= {f"{key}/x": x.detach(), f"{key}/vec": vec.detach(), f"{key}/slope": slope}
    out = {key: value.numpy() for key, value in out.items()}

    shapes = {name: list(value.shape) for name, value in peer(**FULL).state_dict().items()}
    out["state_dict_128_3_20"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    save(PATH, out)


if __name__ == "__main__":
    main(sys.argv[1])
