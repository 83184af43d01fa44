"""Write tests/parity_unimol.npz: what unimol_tools' pretraining model computes, for test_beyond_unimol.py.

    pip download --no-deps unimol_tools==0.1.6
    python tests/make_parity_unimol.py unimol_tools-0.1.6-py3-none-any.whl

The file in this repository was made with unimol_tools 0.1.6, torch 2.14.1 and numpy 2.4.6 on the CPU; the tests read
the file and need none of it. Weights are not stored: `weights` draws them again from a seed. The peer's Gaussians and
norms are in float32 whatever the dtype of the model. Here they are in float64, so that no error can hide behind them.
"""

import importlib
import json
import sys
import types
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from make_parity import MOLECULES, molecule, random_weights, save

PATH = Path(__file__).with_name("parity_unimol.npz")
SETTING = dict(embedding_dimension=64, num_layers=3, num_rbf=128, num_heads=8)
PAD, CLS, SEP, UNK, MASK, NUM_TOKENS = 0, 1, 2, 3, 30, 31
TOKENS = {6: 4, 7: 5, 8: 6, 1: 8, 18: UNK}  # of make_parity's elements, by the order of the public dict.txt
STATISTICS = 6.312581655060595, 3.3899264663911888  # the public code's mean and std of distances, angstrom


def weights(shapes, seed=0):
    """As random_weights; Gaussians between 0 and 3 angstrom, or nothing would depend on the distances."""
    drawn = random_weights(shapes, seed)
    for name, low, high in (("means", 0, 3), ("stds", 0.3, 3), ("mul", 0.8, 1.2), ("bias", -0.2, 0.2)):
        key = next(key for key in drawn if key.endswith(f"gbf.{name}.weight"))
        value = drawn[key] / drawn[key].abs().max()  # in [-1, 1]
        drawn[key] = low + (high - low) * (value + 1) / 2
    return drawn


def corrupted(name):
    """A molecule with hidden atoms: clean tokens and positions, those that the network sees, which are chosen."""
    z, pos = molecule(name)
    generator = np.random.default_rng([7, len(z)])
    token = torch.tensor([TOKENS[int(number)] for number in z])
    number = max(1, round(0.3 * len(z)))
    chosen = torch.zeros(len(z), dtype=torch.bool)
    chosen[np.argsort(generator.random(len(z)))[:number].copy()] = True
    seen = torch.where(chosen, MASK, token)
    if number > 1:  # one of them stays, another becomes bromine
        first, second = chosen.nonzero().flatten()[:2]
        seen[first], seen[second] = token[first], 11
    shift = torch.from_numpy(2 * generator.random((len(z), 3)) - 1) * (seen != token).unsqueeze(1)
    return token, pos, seen, pos + shift, chosen


def rows(parts, value):
    """Rows of unequal lengths -> one padded tensor, with a further column: the peer needs some padding."""
    longest = max(len(part) for part in parts) + 1
    out = parts[0].new_full((len(parts), longest, *parts[0].shape[1:]), value)
    for row, part in zip(out, parts):
        row[: len(part)] = part
    return out


def peer_inputs(names):
    """What unimol_tools' model and loss take. The origin is the centroid of what is seen, as in beyond/unimol.py."""
    source, place, target, clean, far = [], [], [], [], []
    for name in names:
        token, pos, seen, moved, chosen = corrupted(name)
        origin = pos.new_zeros(1, 3)
        source.append(torch.cat([torch.tensor([CLS]), seen, torch.tensor([SEP])]))
        target.append(torch.cat([torch.tensor([PAD]), torch.where(chosen, token, PAD), torch.tensor([PAD])]))
        place.append(torch.cat([origin, moved - moved.mean(0), origin]))
        clean.append(torch.cat([origin, pos - moved.mean(0), origin]))
        far.append(torch.cat([origin, pos - pos.mean(0), origin]))
    tokens, place, far = rows(source, PAD), rows(place, 0), rows(far, 0)
    distance, target_distance = ((at[:, None] - at[:, :, None]).norm(dim=-1) for at in (place, far))
    inputs = dict(src_tokens=tokens, src_coord=place, src_distance=distance)
    inputs["src_edge_type"] = tokens[:, :, None] * NUM_TOKENS + tokens[:, None]
    targets = dict(tgt_tokens=rows(target, PAD), tgt_coordinates=rows(clean, 0), tgt_distance=target_distance)
    return inputs, targets


class Dictionary:
    def __len__(self):
        return NUM_TOKENS

    def pad(self):
        return PAD


def load_unimol_tools(wheel):
    """Import from the wheel without its packages' own __init__, which ask for what pretraining does not need."""
    for name in ("unimol_tools", "unimol_tools.models", "unimol_tools.pretrain"):
        package = types.ModuleType(name)
        package.__path__ = [f"{wheel}/{name.replace('.', '/')}"]
        sys.modules[name] = package
    utils = types.ModuleType("unimol_tools.utils")
    utils.pad_1d_tokens = utils.pad_2d = utils.pad_coords = None  # only its collate functions call them
    sys.modules[utils.__name__] = utils


def peer(embedding_dimension, num_layers, num_heads, num_rbf=128):
    kind = importlib.import_module("unimol_tools.pretrain.unimol").UniMolModel
    shape = dict(encoder_layers=num_layers, encoder_embed_dim=embedding_dimension, encoder_attention_heads=num_heads)
    shape |= dict(encoder_ffn_embed_dim=4 * embedding_dimension, max_seq_len=256, activation_fn="gelu")
    shape |= dict.fromkeys(("emb_dropout", "dropout", "attention_dropout", "activation_dropout"), 0.0)
    shape |= dict(masked_token_loss=1, masked_coord_loss=5, masked_dist_loss=10)
    shape |= dict(x_norm_loss=0.01, delta_pair_repr_norm_loss=0.01)
    return kind(types.SimpleNamespace(**shape), Dictionary())


def main(wheel):
    load_unimol_tools(wheel)
    model = peer(**SETTING)
    model.load_state_dict(weights({name: value.shape for name, value in model.state_dict().items()}))
    model.double().eval()
    loss = importlib.import_module("unimol_tools.pretrain.loss").UniMolLoss(Dictionary())
    out = {}
    with torch.no_grad(), mock.patch.object(torch.Tensor, "float", torch.Tensor.double):
        inputs, targets = peer_inputs(MOLECULES)
        chosen = targets["tgt_tokens"] != PAD
        keys = "logits", "distances", "coordinates", "x_norm", "pair_norm"
        out |= dict(zip(keys, model(**inputs, encoder_masked_tokens=chosen)))
        for name in MOLECULES:  # five losses and their weighted sum, of each molecule alone
            total, _, logged = loss(model, *peer_inputs([name]))
            terms = [logged[f"masked_{term}_loss"] for term in ("token", "coord", "dist")]
            terms += [logged["x_norm_loss"], logged["delta_pair_repr_norm_loss"], total]
            out[f"losses/{name}"] = torch.stack([term.double() for term in terms])
    out = {key: value.numpy() for key, value in out.items()}

    base = peer(embedding_dimension=512, num_layers=15, num_heads=64)
    shapes = {name: list(value.shape) for name, value in base.state_dict().items()}
    out["state_dict_512_15_64"] = np.frombuffer(json.dumps(shapes).encode(), np.uint8)
    save(PATH, out)


if __name__ == "__main__":
    main(sys.argv[1])
