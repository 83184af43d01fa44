"""Whether g is used, against decoders of which that is known."""

import json

import numpy as np
import pytest
import torch
from test_lipschitz import QM9, encoder, scaled

from harness.errors import InputError
from model import save_encoder
from studies import graph_embedding


def test_others_share_the_key_and_are_never_oneself():
    keys = [3, 3, 5, 3, 7, 5]
    other = graph_embedding.others(keys, np.random.default_rng(0))
    assert other[4] == -1
    for place in (0, 1, 2, 3, 5):
        assert keys[other[place]] == keys[place] and other[place] != place
    assert sorted(other[[0, 1, 3]]) == [0, 1, 3]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_figures_that_are_not_finite_are_refused(runs, tmp_path):
    huge = scaled(runs / "georecon/last.pt", 1e30, tmp_path / "huge.pt")
    with pytest.raises(InputError, match="huge.pt: its figures are not finite"):
        graph_embedding.main([huge, f"data={QM9}", "num_molecules=20", f"out_dir={tmp_path}/a"])
    assert not (tmp_path / "a").exists()


def test_few_molecules_give_no_figures_that_are_none(runs, tmp_path):
    for num in (10, 20, 60):
        few = [f"data={QM9}", f"num_molecules={num}", f"out_dir={tmp_path}/{num}"]
        graph_embedding.main([str(runs / "georecon/last.pt"), *few])
        text = (tmp_path / f"{num}/graph_embedding.json").read_text()
        assert "NaN" not in text and "Infinity" not in text


def test_use_of_the_graph_embedding(runs, tmp_path, capsys):
    graph_embedding.main([str(runs / "georecon/last.pt"), f"data={QM9}", "num_molecules=60", f"out_dir={tmp_path}"])
    (found,) = json.loads((tmp_path / "graph_embedding.json").read_text())["checkpoints"].values()
    assert {"rec_loss", "rise_isomer", "rise_mean"} <= found.keys()
    assert "rise_isomer" in capsys.readouterr().out


def test_a_run_without_a_decoder_that_is_given_g_is_refused(runs, tmp_path):
    without = torch.load(runs / "georecon/last.pt", weights_only=True)
    without["config"]["decoder_graph_emb"] = False
    torch.save(without, tmp_path / "last.pt")
    for path in (runs / "coord/last.pt", tmp_path / "last.pt"):
        with pytest.raises(InputError, match="no decoder that is given g"):
            graph_embedding.main([str(path), f"data={QM9}", "num_molecules=60", f"out_dir={tmp_path}/out"])


def test_a_decoder_that_cannot_see_g_does_not_use_it(runs, tmp_path):
    """And one that sees nothing else does: both by planting it in the weights."""
    content = torch.load(runs / "georecon/last.pt", weights_only=True)
    combine = content["state_dict"]["decoder.combine.weight"]  # (F, 2 F): own node | g
    found = {}
    for name, columns in (("blind", slice(16, 32)), ("forced", slice(0, 16))):
        changed = combine.clone()
        changed[:, columns] = 0
        weights = {**content["state_dict"], "decoder.combine.weight": changed}
        torch.save({**content, "state_dict": weights}, tmp_path / name)
        settings = [f"data={QM9}", "num_molecules=60", f"out_dir={tmp_path}/{name}_out"]
        graph_embedding.main([str(tmp_path / name), *settings])
        result = json.loads((tmp_path / f"{name}_out/graph_embedding.json").read_text())
        found[name] = result["checkpoints"].popitem()[1]
    rises = ("rise_isomer", "rise_mean")
    assert all(found["blind"][key] == 0 for key in rises)
    assert found["forced"]["rise_isomer"] != 0


def test_it_refuses_what_is_no_run_of_pretraining(tmp_path):
    path = tmp_path / "encoder.pt"
    torch.save(save_encoder(encoder().float()), path)
    with pytest.raises(InputError, match="no last.pt"):
        graph_embedding.main([str(path), f"data={QM9}", f"out_dir={tmp_path}/a"])
