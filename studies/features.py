"""Are pooled embeddings good features? Ridge regression on a csv, beside Morgan fingerprints.

    python -m tools.embed results/encoders/coord_s1.pt my.csv out/features/coord.npz  # and others
    python -m studies.features my.csv COLUMN out/features/*.npz [splits=20] [out_dir=out/features]

All see the same random splits of the molecules, 90 % to fit and 10 % to test. Writes features.json:
of each features their number, and the root mean square error of each split.
"""

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness.errors import InputError, cli, explain, need
from harness.files import check_new, provenance, write_json
from harness.settings import read_arguments
from model import setting
from studies.figures import cell


@dataclass(frozen=True)
class FeaturesConfig:
    splits: int = setting(20, low=2)
    out_dir: str = "out/features"


def of_smiles(path, column, ids):
    """Of the rows ids of a csv: the column's texts, and Morgan fingerprints, counts (M, 2048)."""
    chem = need("rdkit.Chem", "fingerprints")
    prints = need("rdkit.Chem.rdFingerprintGenerator", "fingerprints")
    morgan = prints.GetMorganGenerator(radius=2, fpSize=2048)
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    smiles = next(name for name in rows[0] if name.lower() == "smiles")
    molecules = [chem.MolFromSmiles(rows[row][smiles]) for row in ids]
    found = [morgan.GetCountFingerprintAsNumPy(mol) for mol in molecules]
    return [rows[row][column] for row in ids], np.array(found, dtype=float)


def errors(x, y, splits):
    """Root mean square errors (splits,) on x (M, F); cross-validation chooses the penalty."""
    linear, select = need("sklearn.linear_model", "ridge"), need("sklearn.model_selection", "ridge")
    pipeline, scale = need("sklearn.pipeline", "ridge"), need("sklearn.preprocessing", "ridge")
    model = pipeline.make_pipeline(scale.StandardScaler(), linear.RidgeCV(np.logspace(-2, 5, 15)))
    parts = select.ShuffleSplit(splits, test_size=0.1, random_state=1)
    found = select.cross_val_score(model, x, y, cv=parts, scoring="neg_root_mean_squared_error")
    return (-found).tolist()


def table(result):
    """Lines of markdown, a row for each features <name>_s<seed>: of each seed the mean over the splits."""
    rows = {}
    for name, (_, found) in result["features"].items():
        rows.setdefault(name.rpartition("_s")[0] or name, []).append(statistics.mean(found))
    yield from ("| features | RMSE |", "|---|---|")
    yield from (f"| {name} | {cell(values)} |" for name, values in rows.items())


def main(arguments):
    words, config = read_arguments(FeaturesConfig, arguments)
    if len(words) < 3:
        raise InputError("usage: python -m studies.features FILE.csv COLUMN embedding.npz ...", code=2)
    (path, column, *embeddings), out = words, Path(config.out_dir) / "features.json"
    check_new(out, make_folder=True)
    with explain("name a csv with SMILES, a column of it, and files of tools.embed of it", Exception):
        loaded = {Path(file).stem: np.load(file) for file in embeddings}
        first = next(iter(loaded.values()))
        texts, morgan = of_smiles(path, column, first["id"])
        known = np.flatnonzero(np.isfinite(y := first[f"y/{column}"]))
        same = all(np.array_equal(arrays["id"], first["id"]) for arrays in loaded.values())
        if len(loaded) < len(embeddings) or not same or any(float(texts[k]) != y[k] for k in known):
            raise InputError("they are of other molecules, or two have one name")
        features = {"mean": np.zeros((len(y), 1)), "Morgan fingerprint": morgan}
        features |= {name: arrays["embedding"].astype(float) for name, arrays in loaded.items()}
        found = {k: (x.shape[1], errors(x[known], y[known], config.splits)) for k, x in features.items()}
    result = {"file": Path(path).name, "column": column, "molecules": len(known), "features": found}
    print("\n".join(table(result)))
    write_json(out, result | provenance(torch.device("cpu")))


if __name__ == "__main__":
    cli(main, __doc__, needed=3)
