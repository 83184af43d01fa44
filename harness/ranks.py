"""The process and its ranks: torchrun's group, the device, and what a CPU needs to be told."""

import ctypes
import os
import signal
import sys

import torch
import torch.distributed as dist

from harness.errors import InputError

SIGNALS = {signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGTERM)}  # that ask to stop


def tune_cpu():
    """Make a CPU several times faster with two settings. Call it before any thread starts.

    glibc keeps freed memory: page faults took up to 3/4 of the time. Numbers below 1e-38 (1e-308 in float64) become
    zero: 3 % of the radial functions' values are that small, and an Intel core multiplies them a hundred times slower.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large arrays from the heap too
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the top of the heap back
    torch.set_flush_denormal(True)  # False where the processor cannot


def join_ranks(deterministic):
    """-> device, rank, world. Under torchrun it joins the process group; on its own it is rank 0 of 1."""
    rank, world = 0, 1
    if "RANK" in os.environ:  # WORLD_SIZE alone may be left over from the shell or a queue
        told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")]
        if not all(map(str.isdecimal, told)) or int(told[0]) >= int(told[1]) or "MASTER_ADDR" not in os.environ:
            raise InputError("RANK is set, but not what goes with it: start with torchrun, or unset RANK", code=2)
        rank, world = int(told[0]), int(told[1])
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise InputError(f"{local + 1} or more ranks, but {torch.cuda.device_count()} GPU: lower --nproc_per_node")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if "RANK" in os.environ:
        # torchrun's store outlives a restart: under the same name a rank would find the address of a dead one
        store, _, _ = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        # tensors on the CPU by gloo: ranks agree on a signal without waiting for the GPU
        backend, bound = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=bound)
    return device, rank, world


def follow_parent(*_):
    """In a worker process: a signal to the whole group is the parent's, which ends its workers; end with the parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def sum_over_ranks(values):
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def barrier():
    if dist.is_initialized():
        dist.barrier()
