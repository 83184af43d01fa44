"""Molecules to features: the mean embedding of each, for a model of your own.

    python -m tools.embed results/encoders/georecon_s1.pt IN.csv OUT.npz       also IN.sdf, IN.xyz
    python -m tools.embed out/my/best.pt IN.csv OUT.npz                        of a fine-tuned model

OUT.npz holds `id` (M,), `embedding` (M, F), `smiles` (M,) of a csv, and `y/<name>` (M,) of each
column or tag with numbers, NaN where it has none. RDKit makes a conformer of each SMILES; a row
without one is left out. An element that the encoder never saw has a random vector.
results/README.md says what such features are worth.
"""

from pathlib import Path

import numpy as np
import torch

from formats.sources import SYMBOLS
from formats.weights import read_encoder
from harness.errors import InputError, cli, explain
from harness.files import check_new, write_whole
from harness.ranks import tune_cpu
from model import ModelConfig
from tools.predict import read_molecules


@torch.no_grad()
def embed(encoder, molecules):
    """The mean of x over the atoms of each molecule {id, z (n,), pos (n, 3)}: -> (M, F) float32."""
    found = []
    for mol in molecules:
        z, pos = torch.from_numpy(mol["z"]).long(), torch.from_numpy(mol["pos"])
        if z.max() >= encoder.config.max_z:
            raise InputError(f"molecule {mol['id']} has element {z.max()}, max_z is {encoder.config.max_z}")
        with explain(f"molecule {mol['id']}", ValueError):
            x = encoder(z, (pos - pos.mean(0)).float(), torch.zeros_like(z))[0]  # (n, F)
        found.append(x.double().mean(0))
    return torch.stack(found).float().numpy()


def main(arguments):
    if len(arguments) != 3:
        raise InputError("usage: python -m tools.embed encoder.pt IN.csv OUT.npz (or .sdf, .xyz)", code=2)
    checkpoint, source, out = arguments
    check_new(out, kinds=(".npz",))
    tune_cpu()
    encoder = read_encoder(checkpoint, ModelConfig())[0].eval()
    molecules = read_molecules(source)
    arrays = {"id": [mol["id"] for mol in molecules], "embedding": embed(encoder, molecules)}
    arrays |= {"smiles": [mol["smiles"] for mol in molecules]} if "smiles" in molecules[0] else {}
    tags = [mol.get("tags", {}) for mol in molecules]
    for name in dict.fromkeys(name for tag in tags for name in tag):
        arrays[f"y/{name}"] = [tag.get(name, np.nan) for tag in tags]

    def write(path):
        with open(path, "wb") as file:  # np.savez would add .npz to the name
            np.savez(file, **arrays)

    write_whole(Path(out), write)
    print(f"{out}: {len(molecules):,} molecules; {', '.join(arrays)}")
    there = " ".join(SYMBOLS.split()[z] for z in sorted({z for mol in molecules for z in mol["z"].tolist()}))
    print(f"  elements: {there}; was the encoder trained on all of them?")


if __name__ == "__main__":
    cli(main, __doc__, needed=3)
