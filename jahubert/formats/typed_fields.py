"""Typed access to JSON files and model settings.

Model files are untrusted input. `typed` checks the type of every field once, so that later code never gets a
string or NaN instead of a number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jahubert.errors import CheckpointError, quote
from jahubert.limits import ADVICE, JSON_BYTES, limit

MAX_INT = 2**31 - 1
_NAMES = {
    bool: "true or false",
    int: "an integer of at most 31 bits",
    float: "a finite number (of at most 31 bits if it is an integer)",
    str: "valid Unicode text",
    tuple: "a list of integers of at most 31 bits",
    list: "a list",
    dict: "an object",
}


def typed(where: object, name: str, value: Any, kind: type) -> Any:
    """Check the type of a field, and return its value.

    Args:
        where: path of the file, for the error message.
        name: name of the field, for the error message.
        value: the value to check.
        kind: bool, int, float, str, list, dict, or tuple for a list of integers, which is returned as a
            tuple.

    Raises:
        CheckpointError: the value has another type, is not finite, is too large for any model setting, or is
            text that UTF-8 cannot encode.
    """
    if kind is float and type(value) is int and abs(value) <= MAX_INT:
        value = float(value)
    if kind is tuple and type(value) in (list, tuple) and all(_is_int(item) for item in value):
        return tuple(value)
    matches = _is_int(value) if kind is int else type(value) is kind and kind is not tuple
    if kind is float and matches:
        matches = math.isfinite(value)
    if kind is str and matches:
        matches = _is_encodable(value)
    if not matches:
        raise CheckpointError(f"{where}: {name} is {quote(value)}, but must be {_NAMES[kind]}")
    return value


def typed_item(where: object, table: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """Return the checked field `name` of a table, or `default` if it is missing or null."""
    value = table.get(name)
    return default if value is None else typed(where, name, value, kind)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, damaged, too large or not a JSON object.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit(JSON_BYTES) + 1)
        if len(data) > limit(JSON_BYTES):
            raise ValueError(f"more than {limit(JSON_BYTES):,} bytes; {ADVICE}")
        content = json.loads(data.decode("utf-8"))
        json.dumps(content, ensure_ascii=False).encode("utf-8")  # raises an error for lone surrogates
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent}: not a model folder ({path.name} is missing)") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}); copy the file again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def read_optional_json(path: Path) -> dict[str, Any]:
    """Read a JSON object like `read_json`, but return an empty dict if the file does not exist."""
    return read_json(path) if path.is_file() else {}


def _is_int(value: Any) -> bool:
    return type(value) is int and abs(value) <= MAX_INT


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
