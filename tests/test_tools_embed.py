"""tools/embed.py: the mean of x of each molecule, beside its numbers; studies/features.py: what that is worth."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lipschitz import SMALL

from harness.errors import InputError
from model import ModelConfig, load_encoder, new_encoder, save_encoder, scatter_mean
from studies import features
from tools import embed

pytest.importorskip("rdkit")
ROOT = Path(__file__).parent.parent
ENCODER = ROOT / "results/encoders/georecon_s1.pt"
TABLE = "smiles,logS,note\nCCO,1.5,a\nC(,2,b\nc1ccccc1,,c\nCC(=O)O,-3,d\nO.C,0.5,e\n"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_embeddings_of_a_csv(capsys):
    Path("in.csv").write_text(TABLE)
    embed.main([str(ENCODER), "in.csv", "out.npz"])
    said = capsys.readouterr().out
    assert "left out: row 1 C(" in said and "out.npz: 4 molecules; id, embedding, smiles, y/logS" in said
    found = np.load("out.npz")
    assert (
        set(found) == {"id", "embedding", "smiles", "y/logS"}
        and "  note: 5 of its cells are no numbers\n" in said
        and "smiles:" not in said
    )
    assert "elements: H C O;" in said and found["smiles"].tolist() == ["CCO", "c1ccccc1", "CC(=O)O", "O.C"]
    assert found["id"].tolist() == [0, 2, 3, 4]
    assert np.array_equal(found["y/logS"], [1.5, np.nan, -3, 0.5], equal_nan=True)
    assert found["embedding"].dtype == np.float32 and np.isfinite(found["embedding"]).all()


def test_numbers_with_a_decimal_comma_are_said(capsys):
    Path("in.csv").write_text('smiles;logS\nCCO;"1,5"\nCCN;2.5\nCCC;\n')
    embed.main([str(ENCODER), "in.csv", "out.npz"])
    assert "  logS: 1 of its cells are no numbers\n" in capsys.readouterr().out
    assert np.isnan(np.load("out.npz")["y/logS"]).tolist() == [True, False, True]


def test_a_column_that_stands_twice_is_said(capsys):
    Path("in.csv").write_text("smiles,a,a\nCCO,1,2\nCCN,3,4\n")
    embed.main([str(ENCODER), "in.csv", "out.npz"])
    assert capsys.readouterr().out.count("column a stands 2 times: the first was read") == 1
    assert np.load("out.npz")["y/a"].tolist() == [1, 3]


def test_an_embedding_is_the_mean_of_x_and_does_not_turn(runs):
    """One molecule at a time equals a batch; frames of an xyz, turned and moved."""
    ase_io = pytest.importorskip("ase.io")
    frames = ase_io.read(ROOT / "data/ethanol_100.xyz", ":3")
    for frame in frames:
        frame.calc = None
    turned = [frame.copy() for frame in frames]
    for frame in turned:
        frame.rotate(50, (1, 2, 3))
        frame.translate((5, -2, 7))
    ase_io.write("in.xyz", frames + turned)
    embed.main([str(ENCODER), "in.xyz", "out.npz"])
    found = np.load("out.npz")["embedding"]
    z = torch.from_numpy(np.concatenate([frame.numbers for frame in frames]))
    pos = torch.from_numpy(np.concatenate([frame.positions for frame in frames])).float()
    batch = torch.arange(3).repeat_interleave(9)
    with torch.no_grad():
        expected = scatter_mean(load_encoder(ENCODER)(z, pos, batch)[0], batch, 3)
    assert found[:3] == pytest.approx(expected.numpy(), abs=2e-4)
    assert found[3:] == pytest.approx(found[:3], abs=2e-4) and np.abs(found[0] - found[1]).max() > 1e-2
    embed.main([str(runs / "gap/best.pt"), "in.xyz", "gap.npz"])
    assert np.load("gap.npz")["embedding"].shape == (6, 16)


def test_what_it_cannot_embed_is_one_line():
    Path("in.csv").write_text(TABLE)
    Path("none.csv").write_text("smiles,a\nC(,1\n")
    torch.save(save_encoder(new_encoder(ModelConfig(**SMALL | {"max_z": 8}))), "small.pt")
    for arguments, said, code in (
        ([ENCODER, "in.csv", "out.csv"], "must end in .npz", 2),
        ([ENCODER, "nowhere.csv", "out.npz"], "nowhere.csv: no such file", 1),
        ([ENCODER, "none.csv", "out.npz"], "no molecules inside", 1),
        (["small.pt", "in.csv", "out.npz"], "molecule 0 has element 8", 1),
        (["in.csv", "in.csv", "out.npz"], "is no torch file", 1),
        ([ENCODER, "in.csv"], "usage", 2),
    ):
        with pytest.raises(InputError, match=said) as caught:
            embed.main([str(argument) for argument in arguments])
        assert caught.value.code == code and not Path("out.npz").exists()


def test_only_a_number_makes_a_name_a_seed():
    found = {"coord_s1": [2, [1.0]], "coord_s2": [2, [3.0]], "coord_small": [2, [5.0]], "my": [2, [7.0]]}
    lines = list(features.table({"features": found}))
    assert lines[2:] == ["| coord | 1 / 3 |", "| coord_small | 5 |", "| my | 7 |"]


def test_features_that_tell_the_answer_win_and_noise_does_not():
    pytest.importorskip("sklearn")
    smiles = [f"{'C' * k}{end}" for k in range(1, 21) for end in ("O", "N", "Cl", "F")]
    y = np.array([len(s) + 3.0 * ("O" in s) for s in smiles])
    rng = np.random.default_rng(0)
    told = {"id": np.arange(80), "smiles": smiles, "y/y": np.where(np.arange(80) == 7, np.nan, y)}
    np.savez("answer.npz", embedding=np.stack([y, rng.standard_normal(80)], axis=1), **told)
    np.savez("noise.npz", embedding=rng.standard_normal((80, 2)), **told)
    features.main(["y", "answer.npz", "noise.npz", "splits=4", "out_dir=out"])
    result = json.loads(Path("out/features.json").read_text())
    mean = {name: np.mean(errors) for name, (_, errors) in result["features"].items()}
    assert result["molecules"] == 79 and list(mean) == ["mean", "Morgan fingerprint", "answer", "noise"]
    assert mean["answer"] < 0.1 < mean["Morgan fingerprint"] < mean["mean"] / 2
    assert mean["noise"] > 0.9 * mean["mean"]
    assert mean["mean"] == pytest.approx(np.std(y), rel=0.2)
    np.savez("other.npz", embedding=np.zeros((80, 1)), **told | {"smiles": smiles[::-1]})
    np.savez("sdf.npz", embedding=np.zeros((80, 1)), **{k: told[k] for k in ("id", "y/y")})
    np.savez("nan.npz", embedding=np.full((80, 2), np.nan), **told)
    np.savez("few.npz", embedding=np.zeros((2, 2)), **{name: column[:2] for name, column in told.items()})
    Path("cut.npz").write_bytes(Path("answer.npz").read_bytes()[:300])
    for words, said in (
        (["y", "answer.npz", "other.npz"], "they are of other molecules"),
        (["nothing", "answer.npz"], "no y/nothing: embed a csv; it has embedding, id, smiles, y/y"),
        (["y", "sdf.npz"], "sdf.npz has no smiles"),
        (["y", "cut.npz"], "cut.npz is no file of tools.embed"),
        (["y", "nan.npz"], "its embeddings are not finite"),
        (["y", "few.npz"], "y has 2 numbers: 20 or more"),
        (["y", "nowhere.npz"], "nowhere.npz: no such file"),
        (["y"], "usage"),
    ):
        with pytest.raises(InputError, match=said):
            features.main([*words, "out_dir=other"])
    assert not Path("other").exists()
