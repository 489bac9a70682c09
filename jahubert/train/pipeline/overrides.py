"""Parser for `key=value` overrides in Hydra's notation.

Values such as `1.10`, `2024_01`, `1e5` and `null` remain text until `structure` converts them to the declared
type of the setting, so that names and paths are not reformatted. Lists and mappings are written as in Hydra,
for example `[a, b]` and `{a: 1, b: [2, 3]}`. Brackets and commas inside quotes are literal.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jahubert.errors import ConfigError, quote

_KEY = re.compile(r"[^\W\d]\w*(?:[./-]\w+)*")  # a dotted name; later parts may be numbers
_CLOSING = {"[": "]", "{": "}", "(": ")"}
_QUOTES = "'\""
_CHOICE = re.compile(r"choice\((.*)\)", re.S)
_RANGE = re.compile(r"range\((.*)\)", re.S)
_MAX_LENGTH = 10_000  # maximum number of characters of an override
_MAX_DEPTH = 20  # maximum number of levels of nested lists and mappings
_MAX_RUNS = 10_000  # maximum number of combinations in a sweep


@dataclass(frozen=True)
class Override:
    """One setting from the command line.

    Attributes:
        key: dotted name.
        value: text, or a list or mapping of such values.
        delete: whether to reset the setting to its default (`~key`).
    """

    key: str
    value: Any = None
    delete: bool = False


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """Parse a list of overrides.

    Raises:
        ConfigError: some arguments are not overrides; the message lists all of them.
    """
    parsed: list[Override] = []
    mistakes: list[str] = []
    for argument in arguments:
        try:
            parsed.append(parse_override(argument))
        except ConfigError as error:
            mistakes.append(str(error))
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return parsed


def parse_override(argument: str) -> Override:
    """Parse `key=value`, `+key=value`, `++key=value` or `~key`."""
    _check_length(argument)
    name, equals, text = argument.partition("=")
    delete = name.startswith("~")
    key = name[1:] if delete else name.removeprefix("+").removeprefix("+")
    if not equals and not delete:
        raise ConfigError(f"{quote(argument)}: not a setting; write key=value")
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{argument}: {quote(key)} is not a valid setting name")
    return Override(key, None if delete else parse_value(text, argument), delete)


def _check_length(argument: str) -> None:
    if len(argument) > _MAX_LENGTH:
        raise ConfigError(
            f"{argument[:60]}...: {len(argument)} characters, but a setting may have at most {_MAX_LENGTH}"
        )


def parse_value(text: str, argument: str, depth: int = 0) -> Any:
    """Parse a value into text, a list or a mapping.

    Args:
        text: the value as given on the command line.
        argument: the whole override, for error messages.
        depth: number of lists and mappings that contain the value.
    """
    if depth > _MAX_DEPTH:
        raise ConfigError(f"{argument}: more than {_MAX_DEPTH} levels of brackets")
    first, closing = text[:1], _CLOSING.get(text[:1])
    if first and first in _QUOTES:
        end = _end_of_quote(text, 0)
        if end != len(text) - 1:
            raise ConfigError(f"{argument}: the value must end with a closing {first}")
        return re.sub(rf"\\([\\{first}])", r"\1", text[1:-1])
    if first not in ("[", "{") or closing is None:
        return text
    parts = list(split_top_level(text[1:-1], ",")) if _closes_at_end(text) else None
    if parts is None:
        if _end_of_bracket(text, 0) is not None:  # the brackets enclose only the start, as in "[2024] talks"
            return text
        raise ConfigError(f"{argument}: {first} without closing {closing}")
    items = [part.strip() for part in parts]
    if items == [""]:
        items = []
    if first == "[":
        return [parse_value(item, argument, depth + 1) for item in items]
    mapping = {}
    for item in items:
        name, *rest = split_top_level(item, ":")
        if not rest:
            raise ConfigError(f"{argument}: {quote(item)} is not of the form key: value")
        key = parse_value(name.strip(), argument, depth + 1)
        if not isinstance(key, str):
            raise ConfigError(f"{argument}: key {quote(name.strip())} is not a string")
        mapping[key] = parse_value(":".join(rest).strip(), argument, depth + 1)
    return mapping


def expand_sweeps(arguments: Sequence[str]) -> list[tuple[list[str], dict[str, str]]]:
    """Expand sweeps to one pair (overrides, swept settings) per combination of values.

    `key=a,b`, `key=choice(a,b)` and `key=range(1,4)` are sweeps. Quoted commas do not separate values.

    Raises:
        ConfigError: an argument is not a valid override, a sweep has an invalid or empty range or an empty
            value, or there are too many values or combinations.
    """
    parse_overrides([argument for argument in arguments if not _sweep_values(argument)])
    options = [_sweep_values(argument) or [argument] for argument in arguments]
    if math.prod(map(len, options)) > _MAX_RUNS:
        raise ConfigError(f"the sweep has more than {_MAX_RUNS} combinations; divide it into smaller sweeps")
    swept = [len(values) > 1 for values in options]
    jobs = []
    for combination in itertools.product(*options):
        chosen = [each for each, is_swept in zip(combination, swept, strict=True) if is_swept]
        parse_overrides(combination)
        pairs = [each.lstrip("+").partition("=") for each in chosen]
        jobs.append((list(combination), {key: value for key, _, value in pairs}))
    return jobs


def _sweep_values(argument: str) -> list[str] | None:
    """Expand a sweep to one override per value; return None if the argument is not a sweep."""
    _check_length(argument)
    name, _, text = argument.partition("=")
    if match := _RANGE.fullmatch(text):
        values = [str(number) for number in _range(match[1], argument)]
    else:
        match = _CHOICE.fullmatch(text)
        values = [part.strip() for part in split_top_level(match[1] if match else text, ",")]
        if len(values) == 1 and not match:
            return None
    if "" in values:
        raise ConfigError(f"{argument}: empty value in sweep")
    return [f"{name}={value}" for value in values]


def _range(text: str, argument: str) -> range:
    try:
        numbers = range(*[int(part) for part in text.split(",")])
    except (ValueError, TypeError):
        raise ConfigError(
            f"{argument}: write range(START,STOP) or range(START,STOP,STEP) with integers"
        ) from None
    if not numbers:
        raise ConfigError(f"{argument}: the range is empty")
    if len(numbers[: _MAX_RUNS + 1]) > _MAX_RUNS:
        raise ConfigError(f"{argument}: more than {_MAX_RUNS} values")
    return numbers


def split_top_level(text: str, separator: str) -> Iterator[str]:
    """Split text at the separators that are outside quotes and brackets."""
    start = position = 0
    while position < len(text):
        character = text[position]
        if character in _QUOTES and not text[start:position].strip():
            end = _end_of_quote(text, position)
            position = end if end is not None else position
        elif character in _CLOSING:
            end = _end_of_bracket(text, position)
            position = end if end is not None else position
        elif character == separator:
            yield text[start:position]
            start = position + 1
        position += 1
    yield text[start:]


def _end_of_quote(text: str, start: int) -> int | None:
    """Return the position of the closing quote for the quote at `start`, or None if there is none."""
    position = start + 1
    while position < len(text):
        if text[position] == "\\":
            position += 1
        elif text[position] == text[start]:
            return position
        position += 1
    return None


def _end_of_bracket(text: str, start: int) -> int | None:
    """Return the position of the closing bracket for the bracket at `start`, or None if there is none."""
    expected: list[str] = []
    position = start
    while position < len(text):
        character = text[position]
        if character in _QUOTES and text[position - 1] in "[{(,: ":
            end = _end_of_quote(text, position)
            position = end if end is not None else position
        elif character in _CLOSING:
            expected.append(_CLOSING[character])
        elif character in _CLOSING.values():
            if not expected or expected.pop() != character:
                return None
            if not expected:
                return position
        position += 1
    return None


def _closes_at_end(text: str) -> bool:
    return _end_of_bracket(text, 0) == len(text) - 1
