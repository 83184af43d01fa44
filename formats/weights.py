"""Weights of others -> an encoder: our checkpoints, and state dicts of TorchMD-NET and Coord."""

import re
from dataclasses import asdict, replace

from harness.errors import InputError, explain
from harness.settings import build_config
from harness.weights import read_torch
from model import ModelConfig, new_encoder

EMBEDDING = re.compile(r"(.*(?<!neighbor_embedding)\.)?(embedding|embed_tokens)\.weight")  # every encoder has one
WRAPPERS = re.compile(r"\b(module|_orig_mod)\.")  # of DataParallel and torch.compile


def load_representation(encoder, state_dict, init_key=""):
    """Load TorchMD-NET's or our own encoder weights by name; a ValueError names every key that does not fit.

    Takes a bare encoder's state dict, or a whole model's, with the encoder under any prefix; of several
    networks init_key names one. `distance.*` are TorchMD-NET's neighbour list settings.
    """
    owners = {found[1] or "" for key in state_dict if (found := EMBEDDING.fullmatch(key))}
    names = {o: o.removesuffix("representation_model.").rstrip(".") or "." for o in owners}
    asked = WRAPPERS.sub("", f"{init_key}.").rstrip(".") or "."
    chosen = [o for o, name in names.items() if not init_key or asked in (name, o.rstrip("."))]
    if owners and len(chosen) != 1:
        said = f"no network {init_key!r}" if init_key else "several networks"
        raise ValueError(f"it holds {said}: name one with init_key=, there are {', '.join(sorted(names.values()))}")
    for owner in chosen:
        others = tuple(other for other in owners if len(other) > len(owner))
        inside = [key for key in state_dict if key.startswith(owner) and not key.startswith(others)]
        state_dict = {key.removeprefix(owner): state_dict[key] for key in inside}
    state_dict = {key: value for key, value in state_dict.items() if not key.startswith("distance.")}
    needs = {key: tuple(value.shape) for key, value in encoder.state_dict().items()}
    has = {key: tuple(getattr(value, "shape", ())) for key, value in state_dict.items()}
    faults = [f"{key} unexpected" for key in has if key not in needs]
    faults += [f"{key} missing" for key in needs if key not in has]
    faults += [f"{k} {has[k]} where {n} is needed" for k, n in needs.items() if has.get(k, n) != n]
    for name, ours in encoder.named_buffers():
        if has.get(name) == ours.shape and ((state_dict[name] - ours).abs() > 1e-3 * ours.abs()).any():
            faults.append(f"{name} are of another cutoff: set model.cutoff_upper to the file's")
    if faults:
        raise ValueError("these weights are not of this encoder: " + "; ".join(faults))
    encoder.load_state_dict(state_dict)


def read_encoder(path, model, init_key=""):
    """-> the encoder in a checkpoint, and how many tensors there are beside it; a foreign state dict is of model."""
    if str(path).endswith(".safetensors"):  # torch would read it, but not what network it is of
        raise InputError(f"{path}: convert it first: python -m tools.export {path} encoder.pt")
    content = read_torch(path, "name an encoder.pt of pretrain.py, or a state dict")
    held = content.get("state_dict", content)
    for name in [name for name, value in held.items() if isinstance(value, dict)]:  # {"model": state dict, ...}
        held = {k: v for k, v in held.items() if k != name} | {f"{name}.{k}": v for k, v in held[name].items()}
    state_dict = {WRAPPERS.sub("", str(key)): value for key, value in held.items()}
    with explain(f"no encoder can be made of {path}"):
        if len(state_dict) < len(held):
            raise ValueError("it holds several networks of one name but for a wrapper's: save one apart")
        if "schema" in content:
            if content["schema"] != "georecon/1":
                raise ValueError(f"its schema is {content['schema']}, not georecon/1")
            # vector_cutoff has no weights, so it may be turned on after pretraining
            own = build_config(ModelConfig, content["model"] if "model" in content else content["config"]["model"])
            model = replace(own, vector_cutoff=own.vector_cutoff or model.vector_cutoff)
        else:
            print(f"{path} does not say its norms: as set, vec_norm_out={model.vec_norm_out}. Public Coord has whiten")
        encoder = new_encoder(model)
        load_representation(encoder, state_dict, init_key)
    return encoder, len(held) - len(encoder.state_dict())


def make_encoder(config, checkpoint):
    """-> the encoder of init_from, or a fresh one, and the line that says which weights it has."""
    if checkpoint and config.init_from:  # init_from may have changed since; last.pt has the weights
        with explain(f"{config.out_dir}/last.pt does not fit this code's model"):
            own = build_config(ModelConfig, checkpoint["config"]["model"])
        own = replace(own, vector_cutoff=own.vector_cutoff or config.model.vector_cutoff)
        return new_encoder(own), f"encoder: of last.pt at step {checkpoint['step']:,}"
    if config.init_key and not config.init_from:
        raise InputError("init_key names a network in init_from, which is not set", code=2)
    if not config.init_from:
        with explain("a model of this size cannot be made", RuntimeError):
            encoder = new_encoder(config.model)
        return encoder, f"encoder: from scratch, seed {config.seed}; fresh: all {len(encoder.state_dict())} tensors"
    encoder, rest = read_encoder(config.init_from, config.model, config.init_key)
    brought = asdict(encoder.config).items() - asdict(config.model).items()
    by_file = ", ".join(f"{key}={value}" for key, value in sorted(brought)) or "as configured"
    line = f"encoder: {len(encoder.state_dict())} tensors of {config.init_from}, {rest} others in it not"
    return encoder, f"{line} used; fresh: the head; model, by the file: {by_file}"
