"""Conversion of settings from plain values to frozen dataclasses, with all errors reported at once.

Misspelled keys, wrong types and values out of range are reported before any work starts. Each stage declares
its settings and their defaults in a `Config`. Some kinds of fields have a special meaning:

- `runtime_field`: a setting that does not change the result (device, workers, logging) and is therefore not
  part of provenance records.
- `Path`: an input file or folder. Provenance records identify it by its content if possible.
- `model_field`: the `Path` of a model, or the name of a model on the Hub.
- `split_field`: the name of a split in the manifest.
- `config_group`: a group of settings whose class depends on preceding settings.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jahubert.errors import ConfigError, quote

T = TypeVar("T")
GroupClass = Callable[[Mapping[str, Any]], type | None]

_INTEGER = re.compile(r"[+-]?\d+(_\d+)*")
_MAX_SEED = 2**32 - 1  # larger seeds would be truncated by some of the random generators
_MAX_DIGITS = 1_000  # no valid setting has so many; by default, Python converts at most 4,300
_RANGES: dict[str, Callable[[float], bool]] = {  # NaN satisfies none of these conditions
    "positive": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
}


def runtime_field(default: Any) -> Any:
    """Declare a dataclass field for a setting that does not change the result of a stage."""
    return dataclasses.field(default=default, metadata={"runtime": True})


def model_field(default: Any = dataclasses.MISSING) -> Any:
    """Declare a dataclass field for a model: a folder, a file or a name on the Hub."""
    return dataclasses.field(default=default, metadata={"model": True})


def split_field(default: Any) -> Any:
    """Declare a dataclass field for a split, or a tuple of splits, of the manifest in the same config."""
    return dataclasses.field(default=default, metadata={"split": True})


def seed_field() -> Any:
    """Declare a dataclass field for a random seed, which is 0 by default."""
    return dataclasses.field(default=0, metadata={"seed": True})


def config_group(group_class: GroupClass) -> Any:
    """Declare a dataclass field for a group of settings.

    Args:
        group_class: a function that maps the values of the preceding fields to the class of the group, or to
            None if one of them is invalid. Only `structure` calls it.
    """
    return dataclasses.field(default_factory=dict, metadata={"group": group_class})


def range_errors(config: Any, allowed: Mapping[str, Iterable[str]]) -> list[str]:
    """Return one error message per number that is out of range. The value None is always allowed.

    Args:
        allowed: maps a range to the names of fields, e.g. {"at least 0": ("workers",)}.
    """
    return [
        f"{name} is {value}, but must be {what}"
        for what, names in allowed.items()
        for name in names
        if (value := getattr(config, name)) is not None and not _RANGES[what](value)
    ]


def interval_errors(config: Any, limits: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return one error message per field that is not an interval (low, high) within its limits.

    Args:
        limits: maps field names to the lowest and highest allowed values.
    """
    errors = []
    for name, (lowest, highest) in limits.items():
        interval = getattr(config, name)
        if len(interval) != 2 or not lowest <= interval[0] <= interval[1] <= highest:
            message = f"must be [low, high] with {lowest:g} <= low <= high <= {highest:g}"
            errors.append(f"{name} is {list(interval)}, but {message}")
    return errors


def raise_config_errors(errors: Sequence[str]) -> None:
    """Raise ConfigError with all messages, one per line, unless `errors` is empty."""
    if errors:
        raise ConfigError("\n".join(dict.fromkeys(errors)))  # several iterations may have the same error


def structure(tree: Mapping[str, Any], cls: type[T], where: str = "") -> T:
    """Build the dataclass `cls` from a mapping, and nested dataclasses from nested mappings.

    Text is converted to the declared type, so that settings can come from the command line.

    Args:
        where: dotted name of the group, for error messages.

    Raises:
        ConfigError: some settings are invalid. The message has one line for each unknown key, missing key,
            wrong type and failed check.
    """
    errors: list[str] = []
    built: T = _build(tree, cls, where, errors)
    if errors:
        raise settings_error(errors)
    return built


def settings_error(errors: Sequence[str]) -> ConfigError:
    """Create a ConfigError that lists invalid settings, one per line."""
    count = "1 mistake" if len(errors) == 1 else f"{len(errors)} mistakes"
    error = ConfigError(f"the configuration has {count}:\n  " + "\n  ".join(errors))
    error.settings = tuple(errors)
    return error


def is_null(value: Any) -> bool:
    """Return whether a setting is null. A value from the command line is null if its text is `null`."""
    return value is None or (isinstance(value, str) and value.lower() == "null")


def expand_user(path: str | Path) -> Path:
    """Expand `~` and `~user` in a path.

    Raises:
        ConfigError: the user does not exist.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path}: user {quote(Path(path).parts[0].removeprefix('~'))} does not exist on this machine"
        ) from None


def unknown_name_error(
    what: str, name: str, known: Iterable[str], missing: bool = False, kind: str = ""
) -> str:
    """Return an error message, with a suggestion, for a name that is unknown or (`missing`) not given.

    Args:
        what: name of the setting.
        kind: kind of object that the setting selects; by default, the last part of `what`.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near and not missing else "choose one of " + ", ".join(known)
    kind = kind or what.rpartition(".")[2]
    return f"{what}=... is missing; {hint}" if missing else f"{what}={name}: no such {kind}; {hint}"


def unknown_key_error(key: str, known: Iterable[str], where: str) -> str:
    """Return an error message, with a suggestion, for a key that does not exist."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {where}{near[0]}?" if near else "known keys: " + ", ".join(known)
    return f"{where}{key}: no such key; {hint}"


def _build(tree: Any, cls: type, where: str, errors: list[str], base: Any = None) -> Any:
    """Build `cls`. Missing values are taken from `base` if it is given, otherwise from the field defaults."""
    tree = {} if is_null(tree) and where else tree
    if not isinstance(tree, Mapping):
        errors.append(f"{where or 'configuration'}: expected a group of settings, found {quote(tree)}")
        return None
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    n_errors = len(errors)
    errors += [unknown_key_error(str(key), known, prefix) for key in tree if key not in known]
    values = {}
    for name, field in known.items():
        default = field.default if base is None else getattr(base, name)
        if "group" in field.metadata:
            values[name] = _group(tree.get(name), field.metadata["group"], values, prefix + name, errors)
        elif name in tree:
            values[name] = _value(tree[name], hints[name], prefix + name, errors, default)
            if field.metadata.get("seed") and not 0 <= (values[name] or 0) <= _MAX_SEED:
                errors.append(f"{prefix}{name} is {values[name]}, but must be from 0 to {_MAX_SEED}")
        elif base is not None:
            values[name] = default
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            errors.append(f"{prefix}{name}: required")
    if len(errors) > n_errors:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        errors += [prefix + line for line in str(error).splitlines()]
        return None


def _group(
    tree: Any, group_class: GroupClass, values: Mapping[str, Any], where: str, errors: list[str]
) -> Any:
    """Build a group of settings whose class depends on the preceding values."""
    try:
        cls = group_class(values)
    except ConfigError as error:
        errors.append(str(error))
        return None
    return None if cls is None else _build(tree, cls, where, errors)


def _value(value: Any, hint: Any, where: str, errors: list[str], default: Any = None) -> Any:
    """Convert `value` to its declared type; settings that are missing from a group come from `default`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in args and is_null(value):
            return None
        hint = next(arg for arg in args if arg is not type(None))
        return _value(value, hint, where, errors, default)
    if dataclasses.is_dataclass(hint):
        base = default if isinstance(default, typing.cast(type, hint)) else None
        return _build(value, typing.cast(type, hint), where, errors, base)
    if origin is typing.Literal:
        choices = {str(arg): arg for arg in args}
        if str(value) in choices:
            return choices[str(value)]
        near = difflib.get_close_matches(str(value), list(choices), n=1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        errors.append(f"{where}: must be one of {', '.join(choices)}, found {quote(value)}{hint_text}")
        return None
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(item, args[0], f"{where}[{i}]", errors) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return untyped(value)
    if hint is Path and isinstance(value, str):
        try:
            return expand_user(value)
        except ConfigError as error:
            errors.append(f"{where}={error}")
            return None
    converted = _scalar(value, hint)
    if converted is None:
        errors.append(f"{where}: {_type_error(value, hint)}")
    return converted


def _type_error(value: Any, hint: Any) -> str:
    """Return the error message for a value that cannot be converted to its declared type."""
    origin = typing.get_origin(hint)
    expected = {tuple: "a list", dict: "a group of settings"}.get(
        origin, getattr(hint, "__name__", str(hint))
    )
    if hint is float and _number(value) is not None:
        expected = "a finite number"
    advice = ""
    if is_null(value):
        advice = "; set a value"
    elif origin is tuple and isinstance(value, str):
        advice = f"; write [{value}]"
    elif isinstance(value, str) and "," in value:
        advice = "; use --multirun for several values"
    return f"expected {expected}, found {quote(value)}{advice}"


def _scalar(value: Any, hint: Any) -> Any:
    """Convert a scalar to the type `hint`; return None if this is not possible."""
    if hint is Any:
        return untyped(value)
    if hint is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    if isinstance(value, bool):
        return value if hint is bool else None
    if hint is int and isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value) if len(value) < _MAX_DIGITS else None
    if hint is float:
        number = _number(value)
        return number if number is not None and math.isfinite(number) else None
    if hint is str and isinstance(value, int):  # a name in a YAML file may be a number
        return str(value)
    is_class = typing.get_origin(hint) is None and isinstance(hint, type)  # tuple[int, ...] is not a class
    return value if is_class and isinstance(value, hint) else None


def _number(value: Any) -> float | None:
    """Convert a value to a number, or return None. Text is accepted, because YAML reads 5e-4 as text."""
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None
    except OverflowError:  # the integer has hundreds of digits
        return math.inf


def untyped(value: Any) -> Any:
    """Convert text to null, a boolean or a number if it looks like one, for settings without a type."""
    if isinstance(value, Mapping):
        return {key: untyped(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [untyped(inner) for inner in value]
    if not isinstance(value, str):
        return value
    if is_null(value):
        return None
    for hint in (bool, int, float):
        converted = _scalar(value, hint)
        if converted is not None:
            return converted
    return value


def result_fields(config: Any) -> dict[str, Any]:
    """Return the settings that change the result, flattened: `{"train.lr": 5e-4, ...}`."""
    flat: dict[str, Any] = {}
    omitted = _runtime_fields(config)
    for name, value, _ in _leaves(config):
        if name in omitted:
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def _runtime_fields(config: Any) -> set[str]:
    """Return the names of the settings that do not change the result, which `result_fields` omits.

    These are the fields declared by `runtime_field`. If the config has a method `unused_settings`, the fields
    and groups whose names it returns are included.
    """
    unused = config.unused_settings() if hasattr(config, "unused_settings") else ()
    return {
        name
        for name, _, metadata in _leaves(config)
        if metadata.get("runtime") or name.partition(".")[0] in unused
    }


def default_fields(config: Any) -> dict[str, Any]:
    """Return the default values of settings, keyed as in `result_fields`. Required settings are omitted."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if "group" in field.metadata:
            nested = default_fields(getattr(config, field.name))
        elif dataclasses.is_dataclass(default):
            nested = result_fields(default)
        else:
            if default is not dataclasses.MISSING:
                flat[field.name] = default
            continue
        flat |= {f"{field.name}.{name}": value for name, value in nested.items()}
    return flat


def input_fields(config: Any) -> Iterator[tuple[str, Path, bool]]:
    """Yield (dotted name, path, whether the path may be a Hub name) for each input in a config."""
    for name, value, metadata in _leaves(config):
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                yield name, path, bool(metadata.get("model"))


def split_fields(config: Any) -> Iterator[tuple[str, str]]:
    """Yield (dotted name, split) for each split that is set in a config."""
    for name, value, metadata in _leaves(config):
        if metadata.get("split"):
            for split in (value,) if isinstance(value, str) else value or ():
                yield name, split


def _leaves(config: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """Yield (dotted name, value, metadata of the field and its groups) for each setting."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            for name, nested, metadata in _leaves(value):
                yield f"{field.name}.{name}", nested, {**field.metadata, **metadata}
        else:
            yield field.name, value, field.metadata
