"""Settings: yaml and key=value of the command line -> a frozen dataclass, each value held against its field."""

import difflib
import math
import os
import re
import reprlib
from dataclasses import fields, is_dataclass, replace
from pathlib import Path

import yaml

from harness.errors import InputError, one_line


class StrictLoader(yaml.SafeLoader):
    """yaml.SafeLoader that refuses a key given twice instead of taking the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key '{key}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path, may_have_base=True):
    """Settings of a yaml file. Its key `base` may name a file beside it, whose settings it then overrides."""
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), StrictLoader)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}: give a config such as configs/demo.yaml", code=2) from None
    except Exception as error:  # yaml raises many kinds, as over a date that does not exist
        raise InputError(f"{path} is not valid yaml: {one_line(error)}", code=2) from None
    if not isinstance(settings, dict):
        raise InputError(f"{path}: a config is a mapping of lines `key: value`", code=2)
    if "base" not in settings:
        return settings
    if not may_have_base:
        raise InputError(f"{path} is the base of another config and cannot have a base itself", code=2)
    base = read_yaml(Path(path).parent / str(settings.pop("base")), may_have_base=False)
    sections = [config["model"] for config in (base, settings) if isinstance(config.get("model"), dict)]
    merged = {**base, **settings}
    return {**merged, "model": {**sections[0], **sections[1]}} if len(sections) == 2 else merged


def convert(value, kind, name):
    """A yaml or command line value as the type of its field; yaml reads 1e-4 as a string, so strings are parsed."""
    needed = {tuple: "a list of int", bool | None: "true, false or auto"}.get(kind) or kind.__name__
    wrong = InputError(f"{name} = {reprlib.repr(value)}: must be {needed}", code=2)
    try:
        if kind is tuple:
            items = value.split(",") if isinstance(value, str) else value
            items = items if isinstance(items, (list, tuple)) else [items]
            return tuple(convert(item, int, name) for item in items if item != "")
        if kind in (bool, bool | None):  # None: as the run finds best
            known = {"true": True, "false": False} | ({} if kind is bool else {"auto": None, "none": None})
            return known[str(value).lower()]
        if kind is dict and isinstance(value, dict):
            return {str(key): convert(n, float, f"{name}.{key}") for key, n in value.items()}
        if isinstance(value, (bool, dict, list)) or value is None or "\0" in str(value):
            raise wrong
        if kind is str:
            return str(value)
        number = float(value)  # ints too, for 1e5
        if not math.isfinite(number) or kind is int and (number != int(number) or abs(number) > 2**53):
            raise wrong
        return kind(number)
    except (KeyError, ValueError, TypeError, OverflowError):
        raise wrong from None


def build_config(kind, settings, prefix=""):
    """A dataclass from a mapping; an InputError names the key, the value and what is allowed."""
    if not isinstance(settings, dict):
        where = prefix.rstrip(".") or "config"
        raise InputError(f"{where} = {settings!r}: must be a mapping of lines `key: value`", code=2)
    known = {f.name: f for f in fields(kind)}
    values = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise InputError(f"unknown key {name}: {hint}", code=2)
        if is_dataclass(known[key].type):
            values[key] = build_config(known[key].type, value, f"{name}.")
            continue
        values[key] = convert(value, known[key].type, name)
        low, below, choices = (known[key].metadata.get(b) for b in ("low", "below", "choices"))
        for item in values[key] if isinstance(values[key], tuple) else [values[key]]:
            needed = choices and item not in choices and f"one of {', '.join(map(str, choices))}"
            needed = needed or low is not None and item < low and f"at least {low}"
            needed = needed or below is not None and item >= below and f"below {below}"
            if needed:
                raise InputError(f"{name} = {item}: must be {needed}", code=2)
    try:
        return kind(**values)
    except ValueError as error:
        raise InputError(str(error), code=2) from None


def override(settings, arguments):
    """Settings by name with key=value of the command line; a key inside `model:` is written model.key=value."""
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals:
            raise InputError(f"argument {argument!r}: settings are written key=value", code=2)
        section, _, inner = key.rpartition(".")
        target = settings.setdefault(section, {}) if section else settings
        if not isinstance(target, dict):
            raise InputError(f"{section} = {target!r}: must be a mapping of lines `key: value`", code=2)
        target[inner] = value
    return settings


def load_config(kind, arguments):
    """`CONFIG.yaml [key=value ...]` -> the dataclass kind."""
    settings = override(read_yaml(arguments[0]), arguments[1:])
    for key in (k for k in ("data", "out_dir", "init_from") if isinstance(settings.get(k), str)):
        settings[key] = os.path.expanduser(os.path.expandvars(settings[key]))  # ~ and $VAR
    config, home = build_config(kind, settings), Path(arguments[0]).parent
    config = config if config.out_dir else replace(config, out_dir=str(Path("out") / Path(arguments[0]).stem))
    if config.resume and (home / "last.pt").exists() and home.resolve() != Path(config.out_dir).resolve():
        raise InputError(f"{arguments[0]} is of a run that was in {config.out_dir}: say out_dir={home}", code=2)
    return config


def read_arguments(kind, arguments):
    """`CHECKPOINT ... [key=value ...]` of an analysis -> paths, and the settings as the dataclass kind."""
    paths = [argument for argument in arguments if "=" not in argument or os.path.isfile(argument)]
    return paths, build_config(kind, override({}, [argument for argument in arguments if argument not in paths]))


def check_data(path, data):
    """Refuse a missing data file by naming the command that makes it, from the header of the config or of its base."""
    text = Path(path).read_text(encoding="utf-8")
    if base := yaml.safe_load(text).get("base"):
        text += (Path(path).parent / str(base)).read_text(encoding="utf-8")
    told = re.search(rf"^# data: +(.*{re.escape(data)})$", text, re.M)
    if data and told and not os.path.exists(data):
        raise InputError(f"{data}: no such file: make it with `{told[1]}`")
