"""Are pooled embeddings good features? Linear regression on a csv, beside Morgan fingerprints.

    python -m tools.embed results/encoders/coord_s1.pt freesolv.csv out/features/coord_s1.npz     each encoder
    python -m studies.features freesolv.csv expt out/features/*.npz [out_dir=out/features]

All see the same random splits of the molecules, 90 % to fit and 10 % to test. `composition` counts
the elements. Writes features.json: of each its size, and the root mean square errors.
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


@dataclass(frozen=True)
class FeaturesConfig:
    splits: int = setting(20, low=2)
    out_dir: str = "out/features"


def of_smiles(path, ids):
    """Morgan fingerprints with counts (M, 2048), and numbers of atoms of each element, of the rows ids."""
    chem, prints = need("rdkit.Chem", "fingerprints"), need("rdkit.Chem.rdFingerprintGenerator", "fingerprints")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    molecules = [chem.AddHs(chem.MolFromSmiles(rows[row]["smiles"])) for row in ids]
    morgan = prints.GetMorganGenerator(radius=2, fpSize=2048)
    counts = np.array([np.bincount([a.GetAtomicNum() for a in m.GetAtoms()], minlength=100) for m in molecules])
    bare = [morgan.GetCountFingerprintAsNumPy(chem.RemoveHs(m)) for m in molecules]
    return {"composition": counts.astype(float), "Morgan fingerprint": np.array(bare, dtype=float)}


def errors(x, y, splits):
    """Root mean square errors of ridge regressions on x (M, F), whose penalty cross-validation chooses: (splits,)."""
    linear, select = need("sklearn.linear_model", "ridge"), need("sklearn.model_selection", "ridge")
    pipeline, scale = need("sklearn.pipeline", "ridge"), need("sklearn.preprocessing", "ridge")
    model = pipeline.make_pipeline(scale.StandardScaler(), linear.RidgeCV(np.logspace(-2, 5, 15)))
    parts = select.ShuffleSplit(splits, test_size=0.1, random_state=1)
    return (-select.cross_val_score(model, x, y, cv=parts, scoring="neg_root_mean_squared_error")).tolist()


def table(result):
    """Lines of markdown, a feature a line: mean and standard deviation over the splits."""
    yield from ("| features | number | RMSE |", "|---|---|---|")
    for name, (number, found) in result["features"].items():
        yield f"| {name} | {number:,} | {statistics.mean(found):.2f} ± {statistics.stdev(found):.2f} |"


def main(arguments):
    words, config = read_arguments(FeaturesConfig, arguments)
    if len(words) < 3:
        raise InputError("usage: python -m studies.features FILE.csv COLUMN embedding.npz ...", code=2)
    (path, column, *embeddings), out = words, Path(config.out_dir) / "features.json"
    check_new(out, make_folder=True)
    with explain("name a csv with a column smiles, a column, and files of tools.embed"):
        loaded = {Path(file).stem: np.load(file) for file in embeddings}
        ids, y = (next(iter(loaded.values()))[key] for key in ("id", f"y/{column}"))
        if other := [name for name, arrays in loaded.items() if not np.array_equal(arrays["id"], ids)]:
            raise InputError(f"{other[0]} is of other molecules than the first")
        features = {"mean": np.zeros((len(y), 1)), **of_smiles(path, ids)}
        features |= {name: arrays["embedding"].astype(float) for name, arrays in loaded.items()}
    known = np.isfinite(y)
    found = {name: (x.shape[1], errors(x[known], y[known], config.splits)) for name, x in features.items()}
    result = {"file": Path(path).name, "column": column, "molecules": int(known.sum()), "features": found}
    print("\n".join(table(result)))
    write_json(out, result | provenance(torch.device("cpu")))


if __name__ == "__main__":
    cli(main, __doc__, needed=3)
