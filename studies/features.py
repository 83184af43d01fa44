"""Are pooled embeddings good features? Ridge regression on a column of a csv, beside Morgan fingerprints.

    python -m tools.embed results/encoders/coord_s1.pt my.csv coord.npz      # and other encoders
    python -m studies.features COLUMN *.npz [splits=20] [out_dir=out/features]

All see the same random splits of the molecules, 90 % to fit and 10 % to test. Writes features.json:
for each set its size, and the root mean square error of each split.
"""

import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from harness.errors import InputError, cli, explain, need
from harness.files import check_file, check_new, provenance, write_json
from harness.settings import read_arguments
from model import setting
from studies.figures import cell


@dataclass(frozen=True)
class FeaturesConfig:
    splits: int = setting(20, low=2)
    out_dir: str = "out/features"


def fingerprints(smiles):
    """Morgan fingerprints with counts: -> (M, 2048)."""
    chem = need("rdkit.Chem", "fingerprints")
    morgan = need("rdkit.Chem.rdFingerprintGenerator", "fingerprints").GetMorganGenerator(radius=2, fpSize=2048)
    return np.array([morgan.GetCountFingerprintAsNumPy(chem.MolFromSmiles(text)) for text in smiles], dtype=float)


def load(path, column):
    """-> the arrays of a file of tools.embed that has SMILES and this column."""
    check_file(path, "make it with python -m tools.embed")
    with explain(f"{path} is no file of tools.embed", Exception):
        arrays = dict(np.load(path))
        if not np.isfinite(arrays["embedding"]).all():
            raise InputError("its embeddings are not finite")
    if not {"smiles", f"y/{column}"} <= arrays.keys():
        raise InputError(f"{path} has no smiles, or no y/{column}: embed a csv; it has {', '.join(arrays)}")
    return arrays


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
        rows.setdefault(re.sub(r"_s\d+$", "", name), []).append(statistics.mean(found))
    yield from ("| features | RMSE |", "|---|---|")
    yield from (f"| {name} | {cell(values)} |" for name, values in rows.items())


def main(arguments):
    words, config = read_arguments(FeaturesConfig, arguments)
    if len(words) < 2:
        raise InputError("usage: python -m studies.features COLUMN embedding.npz ...", code=2)
    (column, *paths), out = words, Path(config.out_dir) / "features.json"
    check_new(out, make_folder=True)
    loaded = {Path(path).stem: load(path, column) for path in paths}
    first = next(iter(loaded.values()))
    same = all(np.array_equal(arrays[key], first[key]) for arrays in loaded.values() for key in ("id", "smiles"))
    if len(loaded) < len(paths) or not same:
        raise InputError("two files have one name, or they are of other molecules: embed one csv by each encoder")
    known = np.flatnonzero(np.isfinite(y := first[f"y/{column}"]))
    features = {"mean": np.zeros((len(y), 1)), "Morgan fingerprint": fingerprints(first["smiles"])}
    features |= {name: arrays["embedding"].astype(float) for name, arrays in loaded.items()}
    if len(known) < 20:
        raise InputError(f"{column} has {len(known)} numbers: 20 or more are needed")
    sets = {k: (x.shape[1], errors(x[known], y[known], config.splits)) for k, x in features.items()}
    result = {"column": column, "molecules": len(known), "features": sets}
    print("\n".join(table(result)))
    write_json(out, result | provenance(torch.device("cpu")))


if __name__ == "__main__":
    cli(main, __doc__, needed=2)
