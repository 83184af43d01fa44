"""Checkpoints: read without running code, and held against what is expected before anything trusts them."""

import math
import reprlib

import torch

from harness.errors import InputError
from harness.files import check_file, write_whole


def require(found, like, where):
    """Refuse a value that does not fit the template like. The InputError names the place.

    A template is a type (a float must be finite), a tuple of types of which one must fit, a tensor (of that dtype
    and shape, plain and finite), a dictionary of templates by key, {type: template} for any keys of a type, or the
    value itself.
    """
    if isinstance(like, dict):
        require(found, dict, where)
        for key, inner in like.items():
            if isinstance(key, type):
                for name, value in found.items():
                    require(name, key, f"{where}: a key")
                    require(value, inner, f"{where}: its {name}")
            elif key not in found:
                raise InputError(f"{where}: its {key} is missing")
            else:
                require(found[key], inner, f"{where}: its {key}")
        return
    if isinstance(like, torch.Tensor):
        require_plain(found, where)
        if found.dtype != like.dtype or found.shape != like.shape or not found.is_contiguous():
            raise InputError(f"{where} is no {like.dtype} {tuple(like.shape)}")
        return
    if isinstance(like, (type, tuple)):
        right = isinstance(found, like) and not (like is int and isinstance(found, bool))
        right = right and (like is not float or math.isfinite(found))
    else:
        right = type(found) is type(like) and found == like
    if not right:
        kinds = like if isinstance(like, tuple) else (like,)
        wanted = " or ".join(k.__name__ if isinstance(k, type) else repr(k) for k in kinds)
        raise InputError(f"{where} is {reprlib.repr(found)}, expected {wanted}")


def require_plain(value, where):
    """Accept only a dense tensor of finite real numbers whose storage is large enough."""
    plain = isinstance(value, torch.Tensor) and value.layout == torch.strided
    plain = plain and not (value.is_quantized or value.is_complex())
    if not plain or value.untyped_storage().nbytes() < value.numel() * value.element_size():
        raise InputError(f"{where} is no plain tensor of numbers")
    if not value.isfinite().all():
        raise InputError(f"{where} is not finite: go back to an earlier step_<n>.pt, or start anew")


def require_finite(state_dict, where):
    """Refuse weights of a run that went wrong, or of a damaged file."""
    for name, value in state_dict.items():
        if isinstance(value, torch.Tensor):
            require_plain(value, f"{where}: {name}")


def read_torch(path, remedy, like=None):
    """A torch file as a dictionary that fits the template like; plain tensors and values alone cannot run code."""
    check_file(path, remedy)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off or not its own
        reason = "is no torch file, cut off, or holds pickled classes, which could run code"
        hint = "configs/README.md says how a Lightning file's tensors are exported"
        raise InputError(f"{path} {reason} ({type(error).__name__}); {hint}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not weights by name")
    if like:
        require(content, like, path)
    inner = content.get("state_dict", content)
    require_finite(inner if isinstance(inner, dict) else {}, path)
    return content


def save_torch(path, content):
    write_whole(path, lambda temporary: torch.save(content, temporary))


def load_adam(optimizer, saved, step):
    """Take moments and learning rate from what optimizer.state_dict() gave after `step` steps.

    The fused kernel trusts their shapes: it would read and write beyond the end of a wrong one.
    """
    (group,) = optimizer.param_groups
    if bool(saved["state"]) != (step > 0):
        raise ValueError("the optimizer has no moments")
    for k, state in saved["state"].items():
        moment = torch.empty_like(group["params"][k], device="meta")
        like = {"step": torch.empty((), device="meta"), "exp_avg": moment, "exp_avg_sq": moment}
        require(state, like, f"the optimizer's parameter {k}")
        if state.keys() != like.keys():
            raise ValueError(f"the optimizer's parameter {k} has more than {', '.join(like)}")
    own = optimizer.state_dict()["param_groups"][0] | {"lr": float(saved["param_groups"][0]["lr"])}
    optimizer.load_state_dict({"state": saved["state"], "param_groups": [own]})
