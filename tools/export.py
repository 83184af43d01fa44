"""Weights for others, and back: the encoder of a checkpoint in another format.

    python -m tools.export results/encoders/coord_s1.pt coord.safetensors
    python -m tools.export coord.safetensors encoder.pt           and back
    python -m tools.export out/plain/encoder.pt plain.ckpt        a state dict of TorchMD-NET
    python -m tools.export plain.ckpt back.pt x_norm_layer=false vec_norm_layer=none ...    and back

The first file is a checkpoint of ours or a .safetensors of this program. TorchMD-NET has none of
our norms, so an encoder with them is refused; its state dict has "representation_model.<name>", and
not the architecture: settings of ModelConfig, key=value, say it.
"""

import json
from pathlib import Path

from formats.weights import read_encoder
from harness.errors import InputError, cli, explain, need
from harness.files import check_file, check_new, write_whole
from harness.settings import build_config, read_arguments
from harness.weights import require, require_finite, save_torch
from model import ModelConfig, new_encoder, save_encoder

TORCHMD = {"backbone": "et", "x_norm_layer": False, "vec_norm_layer": "none", "vec_norm_out": "none"}


def read(path, model):
    """The encoder of a .safetensors of ours, or of what init_from takes; a foreign state dict is of model."""
    if Path(path).suffix != ".safetensors":
        return read_encoder(path, model)[0]
    safetensors = need("safetensors", "reading .safetensors")
    check_file(path, "name a file that this program wrote")
    with explain(f"{path} is no .safetensors of an encoder of ours", Exception):
        with safetensors.safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
            state_dict = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        require(about, {"schema": "georecon/1", "model": str}, "its metadata")
        require_finite(state_dict, "it")
        encoder = new_encoder(build_config(ModelConfig, json.loads(about["model"])))
        encoder.load_state_dict(state_dict)
    return encoder


def export(encoder, out):
    """Write the encoder in the format that the ending of out says."""
    content = save_encoder(encoder)
    model, state_dict = content["model"], content["state_dict"]
    if out.suffix == ".pt":
        save_torch(out, content)
    elif out.suffix == ".safetensors":
        library = need("safetensors.torch", "writing .safetensors")
        about = {"schema": content["schema"], "model": json.dumps(model), "format": "pt"}
        write_whole(out, lambda path: path.write_bytes(library.save(state_dict, metadata=about)))
    else:
        if other := [f"model.{key} = {model[key]}" for key, ours in TORCHMD.items() if model[key] != ours]:
            raise InputError(f"TorchMD-NET has no network with {', '.join(other)}: write a .safetensors")
        save_torch(out, {f"representation_model.{name}": weights for name, weights in state_dict.items()})


def main(arguments):
    paths, model = read_arguments(ModelConfig, arguments)
    if len(paths) != 2:
        raise InputError("usage: python -m tools.export IN OUT.safetensors (or OUT.pt, OUT.ckpt)", code=2)
    source, out = paths
    check_new(out, kinds=(".safetensors", ".pt", ".ckpt"))
    export(encoder := read(source, model), Path(out))
    print(f"{out}: {encoder.config}")


if __name__ == "__main__":
    cli(main, __doc__, needed=2)
