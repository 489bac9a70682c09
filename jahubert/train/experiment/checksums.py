"""Recording and verification of file sizes and checksums in stage and checkpoint folders."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.formats.atomic import PREFIX

_CHUNK = 1 << 20  # bytes
LARGE = 1 << 30  # bytes; larger files can optionally be verified by size only
# Files in these folders are not read by other stages or are verified in other ways: checkpoints have their
# own checksums, and decoding verifies the audio in `work`.
_EXCLUDED_FOLDERS = ("checkpoints", "checkpoints_fairseq2", "tensorboard", "wandb", "work", "shards")
_EXCLUDED_FILES = ("started.json", "provenance.json", ".running")


def file_crc32(path: Path) -> str:
    """Compute the CRC-32 of a file, as 8 hexadecimal digits."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            crc = zlib.crc32(chunk, crc)
    return f"{crc:08x}"


def content_crc32(content: Mapping[str, Any]) -> str:
    """Compute the CRC-32 of JSON-serializable content.

    Saving the content as JSON and loading it does not change the CRC-32.
    """
    normalized = json.loads(json.dumps(content, default=str))
    return f"{zlib.crc32(json.dumps(normalized, sort_keys=True).encode()):08x}"


def describe_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return the size and checksum of each output file of a stage, keyed by path relative to `folder`.

    Records, the lock file, temporary files and the files in `_EXCLUDED_FOLDERS` are omitted.
    """
    outputs = {}
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        excluded = (
            relative.parts[0] in _EXCLUDED_FOLDERS
            or relative.name in _EXCLUDED_FILES
            or any(part.startswith(PREFIX) for part in relative.parts)
        )
        if path.is_file() and not excluded:
            outputs[relative.as_posix()] = {"bytes": path.stat().st_size, "crc32": file_crc32(path)}
    return outputs


def verify_outputs(
    folder: Path,
    outputs: Mapping[str, Mapping[str, Any]],
    below: Path | None = None,
    max_bytes: float = math.inf,
) -> None:
    """Verify files against their recorded sizes and checksums.

    Args:
        folder: the folder of the stage or checkpoint.
        outputs: as returned by `describe_outputs`.
        below: verify only this file, or the files in this folder.
        max_bytes: verify only the sizes of files larger than this.

    Raises:
        DataError: a file is missing or damaged.
    """
    for name, expected in outputs.items():
        path = folder / name
        if below is not None and below not in (path, *path.parents):
            continue
        damage = _damage(path, expected, max_bytes)
        if damage:
            raise DataError(f"{path}: {damage}; restore this file, or delete {folder} and rerun its stage")


def _damage(path: Path, expected: Mapping[str, Any], max_bytes: float) -> str:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return "file not found"
    if size != expected["bytes"]:
        return f"damaged: has {size} bytes, but {expected['bytes']} bytes were written"
    if size > max_bytes:
        return ""
    crc32 = file_crc32(path)
    if crc32 != expected["crc32"]:
        return f"damaged: checksum is {crc32}, but {expected['crc32']} was recorded"
    return ""
