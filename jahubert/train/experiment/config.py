"""From a mapping of plain values to frozen dataclasses, with every mistake reported at once.

Behind this door there are only dataclasses: a misspelt key, a wrong type or a value out of range is
found before any work starts. A stage's `Config` declares its fields with the paper's defaults; a field
made with `free(...)` may change without changing the result (device, workers, logging), so provenance
leaves it out; a field of type `Path` is an input and counts by what is in it, not by where it lies. A
`Path` that names a model (`a_model(...)`) may also be a name on the Hub, and `a_split(...)` is one of the
manifest's; the class of a `group(...)` depends
on the settings before it.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jahubert.errors import ConfigError

T = TypeVar("T")
Chosen = Callable[[Mapping[str, Any]], type | None]

_RANGES: dict[str, Callable[[float], bool]] = {  # none of them holds nan
    "positive": lambda value: value > 0,
    "at least 0": lambda value: value >= 0,
    "at least 1": lambda value: value >= 1,
    "at least 2": lambda value: value >= 2,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
}


def runtime_field(default: Any) -> Any:
    """A dataclass field that does not change the result."""
    return dataclasses.field(default=default, metadata={"free": True})


def model_field(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that names a model: a folder, a file or a name on the Hub."""
    return dataclasses.field(default=default, metadata={"model": True})


def split_field(default: Any) -> Any:
    """A dataclass field that names a split of the config's manifest, or several."""
    return dataclasses.field(default=default, metadata={"split": True})


def config_group(chosen: Chosen) -> Any:
    """A dataclass field that is a group of settings: `chosen` gives its class for the values before it.

    None says that one of these is mistaken, which has been noted. Without `structure` it is what it is given.
    """
    return dataclasses.field(default_factory=dict, metadata={"group": chosen})


def range_errors(config: Any, allowed: Mapping[str, Iterable[str]]) -> list[str]:
    """A sentence on each number (None is none) outside what is allowed, as {"at least 0": fields, ...}."""
    return [
        f"{name} is {value}, but must be {what}"
        for what, names in allowed.items()
        for name in names
        if (value := getattr(config, name)) is not None and not _RANGES[what](value)
    ]


def raise_config_errors(mistakes: Sequence[str]) -> None:
    """ConfigError with all of them, one a line, if there are any."""
    if mistakes:
        raise ConfigError("\n".join(dict.fromkeys(mistakes)))  # iterations share some


def structure(tree: Mapping[str, Any], cls: type[T], where: str = "") -> T:
    """Build the dataclass `cls` from a mapping; nested dataclasses from nested mappings.

    Raises:
        ConfigError: naming every unknown key (with the nearest right one), missing key, wrong type and
            failed check, one line each.
    """
    mistakes: list[str] = []
    built = _build(tree, cls, where, mistakes)
    if mistakes:
        raise ConfigError(
            "the configuration has "
            + f"{len(mistakes)} mistake{'s' * (len(mistakes) > 1)}:\n  "
            + "\n  ".join(mistakes)
        )
    return built


def unknown_name_error(what: str, name: str, known: Iterable[str], missing: bool = False) -> str:
    """One sentence on a name that does not exist (or, `missing`, was not given): the nearest one, or all."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near and not missing else "choose one of " + ", ".join(known)
    return f"{what}=... is missing; {hint}" if missing else f"{what}={name}: there is no such {what}; {hint}"


def unknown_key_error(key: str, known: Iterable[str], where: str) -> str:
    """One sentence on a key that does not exist."""
    known = sorted(known)
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {where}{near[0]}?" if near else "known keys are " + ", ".join(known)
    return f"{where}{key}: there is no such key; {hint}"


def _build(tree: Any, cls: type, where: str, mistakes: list[str], base: Any = None) -> Any:
    """An instance of `cls`; what `tree` does not say is taken from `base`, else from the fields' defaults."""
    if not isinstance(tree, Mapping):
        mistakes.append(f"{where or 'configuration'}: expected a group of settings, found {tree!r}")
        return None
    prefix = f"{where}." if where else ""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls) if f.init}
    before = len(mistakes)
    mistakes += [unknown_key_error(str(key), known, prefix) for key in tree if key not in known]
    values = {}
    for name, field in known.items():
        default = field.default if base is None else getattr(base, name)
        if "group" in field.metadata:
            values[name] = _group(tree.get(name), field.metadata["group"], values, prefix + name, mistakes)
        elif name in tree:
            values[name] = _value(tree[name], hints[name], prefix + name, mistakes, default)
        elif base is not None:
            values[name] = default
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            mistakes.append(f"{prefix}{name}: a value is needed")
    if len(mistakes) > before:
        return None
    try:
        return cls(**values)
    except ConfigError as error:
        mistakes += [prefix + line for line in str(error).splitlines()]
        return None


def _group(tree: Any, chosen: Chosen, values: Mapping[str, Any], where: str, mistakes: list[str]) -> Any:
    """A group of settings whose class depends on the values before it."""
    try:
        cls = chosen(values)
    except ConfigError as error:
        mistakes.append(str(error))
        return None
    return None if cls is None else _build({} if tree is None else tree, cls, where, mistakes)


def _value(value: Any, hint: Any, where: str, mistakes: list[str], default: Any = None) -> Any:
    """`value` as the annotated type, or a mistake; a group of settings changes those of `default`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        hint = next(arg for arg in args if arg is not type(None))
        return _value(value, hint, where, mistakes, default)
    if dataclasses.is_dataclass(hint):
        base = default if isinstance(default, typing.cast(type, hint)) else None
        return _build({} if value is None else value, typing.cast(type, hint), where, mistakes, base)
    if origin is typing.Literal:
        if value in args:
            return value
        near = difflib.get_close_matches(str(value), [str(arg) for arg in args], n=1)
        hint_text = f"; did you mean {near[0]}?" if near else ""
        mistakes.append(f"{where}: must be one of {', '.join(map(str, args))}, found {value!r}{hint_text}")
        return None
    if origin is tuple and isinstance(value, (list, tuple)):
        return tuple(_value(item, args[0], f"{where}[{i}]", mistakes) for i, item in enumerate(value))
    if origin is dict and isinstance(value, Mapping):
        return dict(value)
    converted = _scalar(value, hint)
    if converted is None:
        number = hint is float and _number(value) is not None  # then it is nan, or infinite
        name = "a finite number" if number else getattr(hint, "__name__", str(hint))
        mistakes.append(
            f"{where}: expected {name}, found {value!r}" + ("; give it a value" * (value is None))
        )
    return converted


def _scalar(value: Any, hint: Any) -> Any:
    if isinstance(value, bool):
        return value if hint in (bool, Any) else None
    if hint is Any:
        return value
    if hint is float:
        number = _number(value)
        return number if number is not None and math.isfinite(number) else None
    if hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    if hint is str and isinstance(value, int):  # a name may be a number
        return str(value)
    return value if isinstance(hint, type) and isinstance(value, hint) else None


def _number(value: Any) -> float | None:
    """YAML reads 5e-4 as text."""
    try:
        return float(value) if isinstance(value, (int, float, str)) else None
    except ValueError:
        return None
    except OverflowError:  # of a whole number with hundreds of digits
        return math.inf


def result_fields(config: Any) -> dict[str, Any]:
    """Every field that changes the result, flat: `{"optim.lr": 5e-4, ...}`; `Path` values stay paths."""
    flat: dict[str, Any] = {}
    for name, value, about in _leaves(config):
        if about.get("free"):
            continue
        if isinstance(value, Mapping):
            flat |= {f"{name}.{key}": inner for key, inner in value.items()}
        else:
            flat[name] = list(value) if isinstance(value, tuple) else value
    return flat


def default_fields(config: Any) -> dict[str, Any]:
    """What `result_fields` gives where nothing was set, of the fields that need not be set."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if "group" in field.metadata:
            inner = default_fields(getattr(config, field.name))
        elif dataclasses.is_dataclass(default):
            inner = result_fields(default)
        else:
            flat |= {} if default is dataclasses.MISSING else {field.name: default}
            continue
        flat |= {f"{field.name}.{name}": value for name, value in inner.items()}
    return flat


def input_fields(config: Any) -> Iterator[tuple[str, Path, bool]]:
    """(name, path, whether it may be a name on the Hub) of every file and folder that is named."""
    for name, value, about in _leaves(config):
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path):
                yield name, path, bool(about.get("model"))


def split_fields(config: Any) -> Iterator[tuple[str, str]]:
    """(name of the setting, split) of every split that is named."""
    for name, value, about in _leaves(config):
        if about.get("split"):
            yield from ((name, split) for split in ((value,) if isinstance(value, str) else value or ()))


def _leaves(config: Any) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(flat name, value, what the field says of itself) of every setting."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            for name, inner, about in _leaves(value):
                yield f"{field.name}.{name}", inner, {**field.metadata, **about}
        else:
            yield field.name, value, field.metadata
