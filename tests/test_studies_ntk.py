"""Table 8: the linearisation is the network near theta_0; what is compared is of one run."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_lipschitz import CONFIG, QM9, SMALL, scaled, spread

import lipschitz
from data import Molecules
from finetune import PropertyModel
from harness.errors import InputError
from model import EquivariantTransformer, ModelConfig
from studies import ntk


def test_linearisation_is_exact_for_small_moves_and_not_for_large_ones():
    torch.manual_seed(0)
    (part,) = lipschitz.batches(Molecules(QM9), spread(8), CONFIG, "cpu")
    z, pos, batch, num, _ = part
    y = torch.randn(num, dtype=torch.float64)

    def moved(size):
        torch.manual_seed(1)
        encoder = EquivariantTransformer(ModelConfig(**SMALL))
        model = PropertyModel(encoder, "scalar", "sum", [0.0] * 100).double()
        for p in model.parameters():
            p.data += size * torch.randn_like(p)
        return model

    models = [moved(0), moved(1e-5), moved(0.3)]
    start, near, far = ntk.linearisation(models, z, pos, batch, y)
    assert start["prediction"] == pytest.approx(1) and start["gradient_start"] == pytest.approx(1)
    assert near["prediction_change"] == pytest.approx(1, abs=1e-4)
    assert near["gradient_linear"] == pytest.approx(1, abs=1e-3)
    assert far["prediction_change"] < 0.9 and far["gradient_start"] < 0.9


CHANGES = [{"step": -1}, {"step": True}, {"std": 0.0}, {"std": -1.0}, {"std": np.inf}]


@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_step_that_is_none_is_refused(runs, tmp_path, change):
    content = torch.load(runs / "gap/step_2.pt", weights_only=True)
    if "std" in change:
        content["state_dict"]["model.std"].fill_(change["std"])
    changed = content | {k: v for k, v in change.items() if k == "step"}
    torch.save(changed, tmp_path / "wrong.pt")
    paths = [str(runs / "gap/step_0.pt"), str(tmp_path / "wrong.pt")]
    with pytest.raises(InputError, match=f"wrong.pt.*{next(iter(change))}"):
        ntk.main([*paths, f"data={QM9}", f"out_dir={tmp_path}/a"])


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_figures_that_are_not_finite_are_refused(runs, tmp_path):
    step = scaled(runs / "gap/step_2.pt", 1e30, tmp_path / "step_2.pt")
    few = [f"data={QM9}", "num_molecules=2"]
    with pytest.raises(InputError, match="step_2.pt: its figures are not finite"):
        ntk.main([str(runs / "gap/step_0.pt"), step, *few, f"out_dir={tmp_path}/a"])
    assert not (tmp_path / "a").exists()


def test_bins_of_table_8_end_with_the_last_step():
    means = ntk.thirds({step: {"prediction": float(step)} for step in (0, 50, 100, 150, 300)})
    assert means == {"0-100": {"prediction": 75}, "100-200": {"prediction": 150}, "200-300": {"prediction": 300}}
    assert ntk.thirds(dict.fromkeys((0, 20), {"prediction": 1.0})) == {"13-20": {"prediction": 1}}


def test_table_8(runs, tmp_path, capsys):
    steps = [str(path) for path in sorted((runs / "gap").glob("step_*.pt"))]
    ntk.main([*steps, f"data={QM9}", "num_molecules=10", f"out_dir={tmp_path}"])
    found = json.loads((tmp_path / "ntk.json").read_text())["steps"]
    assert list(found) == ["0", "1", "2", "3", "4"]
    assert found["0"]["gradient_start"] == pytest.approx(1)
    assert found["1"]["prediction_change"] > 0.8
    assert "prediction_change" in capsys.readouterr().out


def test_table_8_is_of_one_run(runs, tmp_path):
    shutil.copytree(runs / "gap", tmp_path / "other")
    content = torch.load(tmp_path / "other/step_2.pt", weights_only=True)
    torch.save({**content, "config": content["config"] | {"seed": 2}}, tmp_path / "other/step_2.pt")
    steps = [str(runs / "gap/step_0.pt"), str(tmp_path / "other/step_2.pt")]
    with pytest.raises(InputError, match="different steps of one run"):
        ntk.main([*steps, f"data={QM9}", "num_molecules=10", f"out_dir={tmp_path}"])
