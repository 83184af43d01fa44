"""torch.compile: the layers of a network, or the gradient of a function by its first argument."""

import logging
import time
from contextlib import suppress
from dataclasses import replace

import torch

from harness.errors import InputError, one_line


def check_compiler(device):
    """Compile a tiny new function -> True. Else a missing compiler would show in the first step."""
    for name in ("torch.utils.cpp_extension", "torch._inductor.select_algorithm"):
        logging.getLogger(name).setLevel(logging.ERROR)  # no CUDA, which kernel is taken: no news
    torch._dynamo.config.optimize_ddp = False  # under torchrun: it cuts graphs at 1 MB, forces fail
    new = eval(f"lambda x: x.sin() * {time.time_ns() % 2**30}")  # new code: torch compiles it once
    try:
        torch.compile(new)(torch.zeros(2, device=device))
        return True
    except Exception as error:  # of many kinds, by what is missing
        remedy = "install a C++ compiler (on CUDA a C compiler), or set compile=false"
        raise InputError(f"compile = true: torch cannot compile here, {one_line(error)}: {remedy}") from None


def settle(config, device, checkpoint):
    """compile: auto is true in a long run where torch can compile. A resumed run stays as it was, for its bits."""
    if config.compile is not None or getattr(config, "freeze_encoder", False):  # a probe has nothing to compile
        return config
    unsure = device.type == "cuda" and (config.deterministic or getattr(config, "target", "") == "energy_forces")
    pays = False
    with suppress(InputError):
        pays = not checkpoint and config.max_steps >= 3000 and not unsure and check_compiler(device)
    return replace(config, compile=checkpoint["config"].get("compile") if checkpoint else pays)


def compile_layers(model, device):
    """Compile the modules that say `compiles`: for all sizes at once, so a resumed run has the bits of one unbroken."""
    check_compiler(device)
    for layer in (module for module in model.modules() if getattr(module, "compiles", False)):
        layer.compile(dynamic=True)


def compile_gradient(function, model, device, one_shape):
    """function(pos, ...) -> (scalar, output) becomes compiled code -> (d scalar / d pos, output), and a number.

    Sizes that vary should be multiples of that number. one_shape: equal sizes from call to call, and no accumulated
    gradients. That allows CUDA graphs, which pay since launches dominate. model is what function runs: one with a
    module that says `one_graph = False` is refused.
    """

    def gradient(*arguments):  # not autograd.grad: torch.compile can differentiate this one again
        return torch.func.grad(function, has_aux=True)(*arguments)

    if not all(getattr(module, "one_graph", True) for module in model.modules()):
        raise InputError("the derivative of this network cannot be compiled: set compile=false", code=2)
    check_compiler(device)
    if device.type == "cuda" and one_shape:
        # each shape is compiled for itself; beyond the limit it runs uncompiled, fullgraph raises
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(gradient, mode="reduce-overhead", dynamic=False), 256
    return torch.compile(gradient, fullgraph=True, dynamic=True), 1  # equal bits, all shapes


def fill_up(mask, multiple):
    """Set False entries of a mask until the True ones are a multiple: CUDA graphs need it."""
    return mask | ((~mask).cumsum(0) <= -mask.sum() % multiple)
