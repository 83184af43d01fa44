"""A user's mistake is one line that says what is wrong, where, and what to do. It is never a traceback."""

import importlib
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path

LOST = r"DataLoader worker \(pid|by peer|Socket closed|Broken pipe|pair closure|Timed out waiting"
# what libraries raise over a file that is damaged, cut off or of another kind
FOREIGN = (EOFError, OSError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError)


class InputError(Exception):
    """A mistake of the user in one line; the process exits with its code, 1 for a failure and 2 for usage."""

    def __init__(self, message, code=1):
        message = str(message).rpartition("InputError: ")[2]  # a loader process puts its traceback before it
        super().__init__(message.strip().replace("\n", " "))
        self.code = code


def one_line(error):
    """What an exception says, in one line of bounded length."""
    said = " ".join(str(error).split())[:400] or type(error).__name__
    return f"it lacks the key {said}" if isinstance(error, KeyError) else said


@contextmanager
def explain(what, *kinds):
    """Turn an exception inside into an InputError `<what>: <reason>`. kinds default to FOREIGN and InputError."""
    kinds = kinds or (InputError, *FOREIGN)
    try:
        yield
    except kinds as error:
        raise InputError(f"{what}: {one_line(error)}") from error


def need(module, purpose):
    """Import an optional package, or say what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = (error.name or module).split(".")[0].replace("sklearn", "scikit-learn")
        raise InputError(f"{purpose} needs the package {package}: pip install {package}") from error


def cli(main, usage=None, needed=0):
    """Run main(argv), print what the user did wrong as one line `<script>.py: error: ...` and exit with its code.

    -h prints the usage instead; so do fewer arguments than needed, with exit code 2.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # the parent process has closed it
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115, for as long as we live
    sys.stdout.reconfigure(errors="backslashreplace")  # names of files need not be UTF-8
    try:
        if usage and ((asked := sys.argv[1:2] in (["-h"], ["--help"])) or len(sys.argv) <= needed):
            print(usage.strip(), file=sys.stdout if asked else sys.stderr, flush=True)
            sys.exit(0 if asked else 2)
        main(sys.argv[1:])
        sys.stdout.flush()
        return
    except InputError as error:
        said, code = error, error.code
    except (MemoryError, RuntimeError) as error:
        full = isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", str(error), re.I)
        if not full and not re.search(LOST, str(error)):
            raise
        remedy = "in training accumulate=2 or more cuts a batch into parts, and resume=true goes on"
        lost = f"a loader process or a rank was lost ({one_line(error).rstrip('.')}): resume=true goes on"
        said, code = f"out of memory: take smaller batches; {remedy}" if full else lost, 1
    except UnicodeEncodeError as error:
        said, code = f"{error.object!r} cannot be written as UTF-8: rename that file", 1
    except OSError as error:  # 5, 28, 32: a failing disk, a full one, a closed pipe
        where = error.filename or ("standard output" if error.errno in (5, 28, 32) else "system")
        said, code = f"{where}: {error.strerror or error}", 1
        if where == "standard output":
            mute()
    except KeyboardInterrupt:
        said, code = "interrupted", 130
    print(f"{Path(sys.argv[0]).name}: error: {said}", file=sys.stderr)
    sys.exit(code)


def mute():
    """Throw away everything printed from now on, so that printing does not fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
