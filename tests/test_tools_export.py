"""tools/export.py: the weights of another format are the same numbers, and come back as the same network."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_lipschitz import QM9, SMALL

import finetune
from formats.weights import read_encoder
from harness.errors import InputError
from model import ModelConfig, load_encoder, new_encoder, save_encoder
from tools import export

PARITY = Path(__file__).parent / "parity.npz"
PLAIN = {"x_norm_layer": False, "vec_norm_layer": "none", "vec_norm_out": "none"}
WATER = torch.tensor([8, 1, 1]), torch.tensor([[0, 0, 0.119], [0, 0.763, -0.477], [0, -0.763, -0.477]])


def make(path, **changes):
    torch.manual_seed(0)
    encoder = new_encoder(ModelConfig(**SMALL | changes))
    torch.save(save_encoder(encoder), path)
    return str(path), encoder


def outputs(encoder):
    z, pos = WATER
    return encoder(z, pos, torch.zeros_like(z))


def equal(one, two):
    return one.config == two.config and all(map(torch.equal, outputs(one), outputs(two)))


@pytest.mark.parametrize("changes", [{}, {"backbone": "painn"}, PLAIN], ids=str)
def test_safetensors_there_and_back(tmp_path, changes):
    library = pytest.importorskip("safetensors.torch")
    path, encoder = make(tmp_path / "encoder.pt", **changes)
    export.main([path, f"{tmp_path}/a.safetensors"])
    theirs = library.load_file(tmp_path / "a.safetensors")  # as anybody reads it
    assert theirs.keys() == encoder.state_dict().keys()
    assert all(torch.equal(theirs[name], weights) for name, weights in encoder.state_dict().items())
    export.main([f"{tmp_path}/a.safetensors", f"{tmp_path}/back.pt"])
    assert equal(load_encoder(tmp_path / "back.pt"), encoder)


def test_a_state_dict_for_torchmd_net_there_and_back(tmp_path):
    """Its names are those of TorchMD-NET 3.1.0, which tests/parity.npz keeps; init_from reads it."""
    path, encoder = make(tmp_path / "encoder.pt", **PLAIN)
    export.main([path, f"{tmp_path}/a.ckpt"])
    names = set(torch.load(tmp_path / "a.ckpt", weights_only=True))
    _, wide = make(tmp_path / "wide.pt", embedding_dimension=256, num_layers=8, num_rbf=64, num_heads=8, **PLAIN)
    told = json.loads(np.load(PARITY)["state_dict_256_8_64"].tobytes())
    assert {f"representation_model.{name}" for name in wide.state_dict()} <= set(told)
    assert names == {f"representation_model.{name}" for name in encoder.state_dict()}
    back, rest = read_encoder(f"{tmp_path}/a.ckpt", encoder.config)
    assert rest == 0 and equal(back, encoder)
    sizes = [f"{key}={value}" for key, value in (SMALL | PLAIN).items()]
    export.main([f"{tmp_path}/a.ckpt", f"{tmp_path}/back.pt", *sizes])
    assert equal(load_encoder(tmp_path / "back.pt"), encoder)


def test_the_encoder_of_a_fine_tuned_model(runs, tmp_path):
    export.main([str(runs / "gap/best.pt"), f"{tmp_path}/a.pt"])
    model, _ = finetune.load_property_model(runs / "gap/best.pt")
    assert equal(load_encoder(tmp_path / "a.pt"), model.encoder)


def test_what_it_cannot_export_is_one_line(runs, tmp_path):
    path, _ = make(tmp_path / "encoder.pt")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    for arguments, said, code in (
        ([path, f"{tmp_path}/a.ckpt"], "TorchMD-NET has no network with model.x_norm_layer = True", 1),
        ([path, f"{tmp_path}/a.onnx"], "must end in .safetensors or .pt or .ckpt", 2),
        ([path, path], "encoder.pt exists", 1),
        ([QM9, f"{tmp_path}/a.pt"], "is no torch file", 1),
        ([str(damaged), f"{tmp_path}/a.pt"], "damaged.safetensors is no .safetensors", 1),
        ([path], "usage", 2),
    ):
        with pytest.raises(InputError, match=said) as caught:
            export.main(arguments)
        assert caught.value.code == code and "\n" not in str(caught.value)
    assert not list(tmp_path.glob("a.*"))
