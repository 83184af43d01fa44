"""Files on disk: looked at before hours of work, written whole or not at all, and the record of what made them."""

import hashlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from harness.errors import InputError


def check_file(path, remedy):
    """Refuse a file that cannot be opened for reading."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: {'a folder, not a file' if os.path.isdir(path) else 'no such file'}: {remedy}")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: no permission to read it")


def check_new(*paths, kinds=(), make_folder=False):
    """Refuse files that cannot or must not be written, before hours of work; writes nothing.

    kinds are the endings that are allowed. With make_folder their folder may be missing.
    """
    for path in map(Path, paths):
        if kinds and path.suffix not in kinds:
            raise InputError(f"the file to write must end in {' or '.join(kinds)}, got {path}", code=2)
        if os.path.lexists(path):
            raise InputError(f"{path} exists: remove it, or choose another name or out_dir=")
    folder = Path(paths[0]).parent
    if not make_folder and not folder.is_dir():
        raise InputError(f"{folder}: no such folder to write {Path(paths[0]).name} in: create it first")
    parents = (folder.resolve(), *folder.resolve().parents)
    try:
        tempfile.TemporaryFile(dir=next(parent for parent in parents if parent.exists())).close()
    except OSError as error:
        raise InputError(f"{folder} cannot be made or written to ({error.strerror}): choose another place") from None


def sha256(path):
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_whole(path, write):
    """write(temporary path), then rename: a reader of path finds the old file whole or the new one whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write(temporary)
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | RuntimeError):  # RuntimeError: what torch.save makes of a full disk
            raise
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise InputError(f"{path} cannot be written: {reason}; a file of that name is as it was before") from None


def write_text(path, text):
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path, content):
    """Write content as JSON, which has no NaN and no Infinity: they become null."""
    content = json.loads(json.dumps(content), parse_constant=lambda name: None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def machine():
    """The processor's name on Linux, its kind on other systems."""
    info = Path("/proc/cpuinfo")
    named = os.access(info, os.R_OK) and re.search(r"model name\s*: (.*)", info.read_text())
    return f"cpu, {named[1] if named else platform.machine()}"


def provenance(device, ranks=1):
    """What made a result: command, commit, machine and versions."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None  # no git, or a copy without its history
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else machine(),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
