"""Write tests/parity.npz: what TorchMD-NET itself computes for random weights, for test_model.py to compare with.

    pip install torchmd-net==3.1.0 && python tests/make_parity.py     # in an environment of its own, 5 GB with torch

The file in this repository was made with torchmd-net 3.1.0, torch 2.14.1 and numpy 2.4.6 on the CPU; the tests read the
file and need none of it. Weights are not stored: `random_weights` draws them again from a seed on both sides, biases,
LayerNorms and embeddings included, rounded to float32 so that both precisions compute with the same numbers.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch

PATH = Path(__file__).with_name("parity.npz")
SETTINGS = {  # Table 13's two columns with fewer channels: depth, heads, radial functions and cutoff are theirs
    "qm9": dict(embedding_dimension=32, num_layers=8, num_rbf=64, num_heads=8),
    "md17": dict(embedding_dimension=16, num_layers=6, num_rbf=32, num_heads=8),
}
MOLECULES = {  # angstrom; QM9's geometries of gdb 19, 5, 3, 1 and the first frame of MD17's aspirin (all CC0)
    "acetamide": """C  0.0068  1.4997 -0.0257   C -0.0274 -0.0175 -0.1489   N  1.1783 -0.6332  0.0569
        O -1.0372 -0.6398 -0.4073   H  0.9139  1.9292 -0.4610   H -0.8708  1.9112 -0.5235
        H -0.0283  1.7852  1.0315   H  1.9841 -0.1318  0.3867   H  1.1905 -1.6392  0.1001""",
    "hydrogen cyanide": "C -0.0133  1.1325  0.0083   N  0.0023 -0.0192  0.0019   H -0.0278  2.1989  0.0142",
    "water": "O -0.0344  0.9775  0.0076   H  0.0648  0.0206  0.0015   H  0.8718  1.3008  0.0007",
    "methane": """C -0.0127  1.0858  0.0080   H  0.0022 -0.0060  0.0020   H  1.0117  1.4638  0.0003
        H -0.5408  1.4475 -0.8766   H -0.5238  1.4379  0.9064""",
    "aspirin": """C  2.0103 -1.1845 -0.0204   C  1.2136  1.2943 -0.6642   C  2.9456 -0.4349 -0.7374
        C  2.4540  0.7308 -1.2049   C -2.7976  2.4646  0.3983   C  0.6429 -0.8233  0.2878   C  0.3398  0.5249  0.0070
        O -1.3817 -1.6188  1.3941   O -1.6766  1.3927 -1.4635   O  0.2139 -3.0499  0.5246   C -0.2937 -1.7854  0.8618
        C -1.7156  1.6563 -0.3091   O -0.8227  1.1213  0.5996   H -0.1781 -3.7326  1.0450   H  2.3672 -2.0926  0.4364
        H  0.9270  2.2987 -0.9246   H  3.9147 -0.8670 -0.9662   H  3.1306  1.4877 -1.6845   H -2.6156  3.4742  0.5497
        H -3.7552  2.5704 -0.1630   H -2.7673  1.9612  1.4199""",
    # acetamide with its methyl group 7 angstrom away: two fragments that do not see each other
    "dissociated": """C  0.0068  8.4997 -0.0257   C -0.0274 -0.0175 -0.1489   N  1.1783 -0.6332  0.0569
        O -1.0372 -0.6398 -0.4073   H  0.9139  8.9292 -0.4610   H -0.8708  8.9112 -0.5235
        H -0.0283  8.7852  1.0315   H  1.9841 -0.1318  0.3867   H  1.1905 -1.6392  0.1001""",
    "argon": "Ar 0.3000 -0.2000  0.1000",
}
SUBSET = ("acetamide", "dissociated", "argon")  # the molecules whose x, vec with vector_cutoff are stored
NUMBERS = {"H": 1, "C": 6, "N": 7, "O": 8, "Ar": 18}


def molecule(name):
    """-> z (n,), pos (n, 3) float64, rounded to float32."""
    words = MOLECULES[name].split()
    z = torch.tensor([NUMBERS[symbol] for symbol in words[::4]])
    pos = torch.tensor([[float(words[k + axis]) for axis in (1, 2, 3)] for k in range(0, len(words), 4)])
    return z, pos.double()


def collate(names):
    """-> z (N,), pos (N, 3), batch (N,)."""
    z, pos = zip(*(molecule(name) for name in names))
    batch = torch.arange(len(names)).repeat_interleave(torch.tensor([len(part) for part in z]))
    return torch.cat(z), torch.cat(pos), batch


def random_weights(shapes, seed):
    """Names and shapes of a state dict -> its values: uniform, of a size that keeps eight layers in range.

    Drawn in the order of the names, from `random()`, whose stream NumPy keeps across versions. The names are ours:
    TorchMD-NET 3 has `update_net.layers.0` where TorchMD-NET 0.2, Coord and this repository have `update_net.0`.
    """
    generator = np.random.default_rng(seed)
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        value = 2 * generator.random(shape) - 1
        if len(shape) == 2 and "embedding.weight" not in name:
            value *= 0.7 * math.sqrt(3 / shape[1])  # a Linear
        elif "norm" in name and name.endswith("weight"):
            value = 1 + 0.5 * value
        elif name.endswith("bias"):
            value *= 0.5
        weights[name] = torch.from_numpy(value).float()
    return weights


def our_name(name):
    return name.replace("update_net.layers.", "update_net.")


def fill(model, seed):
    """Give TorchMD-NET's model the weights of random_weights; its radial functions and settings stay as they are."""
    state = model.state_dict()
    learnt = [name for name, _ in model.named_parameters()]
    weights = random_weights({our_name(name): state[name].shape for name in learnt}, seed)
    model.load_state_dict(state | {name: weights[our_name(name)] for name in learnt})
    return model.double().eval()


def peer(setting, vector_cutoff=False, precision=64):
    """The whole model of TorchMD-NET: encoder, equivariant scalar head, forces."""
    from torchmdnet.models.model import create_model

    return create_model(
        setting
        | dict(model="equivariant-transformer", output_model="Scalar", prior_model=None, derivative=True)
        | dict(rbf_type="expnorm", trainable_rbf=False, activation="silu", attn_activation="silu")
        | dict(neighbor_embedding=True, distance_influence="both", cutoff_lower=0.0, cutoff_upper=5.0, max_z=100)
        | dict(max_num_neighbors=64, aggr="add", reduce_op="add", vector_cutoff=vector_cutoff, precision=precision)
        | dict(static_shapes=False, check_errors=True, box_vecs=None, atom_filter=-1, charge=False, spin=False)
    )


def save(path, out):
    """Write the arrays {name: array} of a fixture, and say what they are."""
    np.savez_compressed(path, **out)
    print(f"{path.name}: {path.stat().st_size:,} bytes")
    for key, value in out.items():
        print(f"{key:32} {value.dtype} {value.shape} largest {abs(value).max():.3g}")


def main():
    out = {}
    for setting in SETTINGS:
        for vector_cutoff in (False, True):
            model = fill(peer(SETTINGS[setting], vector_cutoff), seed=0)
            key = f"{setting}/{'vector_cutoff' if vector_cutoff else 'published'}"
            z, pos, batch = collate(SUBSET if vector_cutoff else MOLECULES)
            if not vector_cutoff or setting == "md17":
                with torch.no_grad():
                    x, vec, *_ = model.representation_model(z, pos, batch)
                out |= {f"{key}/x": x, f"{key}/vec": vec}
            energy, forces = model(*collate(MOLECULES))
            out |= {f"{key}/energy": energy.flatten().detach(), f"{key}/forces": forces.detach()}
        out[f"{setting}/means"] = model.representation_model.distance_expansion.means
        out[f"{setting}/betas"] = model.representation_model.distance_expansion.betas
    out = {key: value.numpy() for key, value in out.items()}

    full = dict(embedding_dimension=256, num_layers=8, num_rbf=64, num_heads=8)
    shapes = {name: list(value.shape) for name, value in peer(full, precision=32).state_dict().items()}
    out["state_dict_256_8_64"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    save(PATH, out)


if __name__ == "__main__":
    main()
