"""Conversion of parquet shards from the Hugging Face Hub to tar shards with a table of captions.

Recordings in compressed parquet pages cannot be read by byte range. They are therefore copied once, without
decoding, to an uncompressed tar, which is read like the original shards. A shard is converted again if the
size or modification time of its parquet file changes.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_path, atomic_write
from jahubert.train.data.parquet import parquet_batches, parquet_schema

VERSION = 1
CAPTIONS = ("transcription", "text", "sentence")  # accepted names of the caption column
_TAR_BLOCK = 512  # bytes


def find_parquet(data: Path, subset: str) -> list[Path]:
    """Find the parquet shards of a release: in `data`, or in its folder `<subset>` or `data`."""
    for folder in (data / subset, data, data / "data"):
        if shards := sorted(folder.glob("*.parquet")):
            return shards
    return []


def to_tar(shard: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """Convert a shard to a tar file in `folder`, unless this was done before.

    Returns:
        The tar file, and a mapping from the names of recordings to captions.

    Raises:
        DataError: the shard is not parquet, or has no audio or caption column.
    """
    target, state_path = folder / f"{shard.stem}.tar", folder / f"{shard.stem}.json"
    status = shard.stat()
    state = [VERSION, status.st_size, status.st_mtime_ns]
    try:
        record = json.loads(state_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if record.get("state") == state and target.is_file():
        return target, record["captions"]
    folder.mkdir(parents=True, exist_ok=True)
    captions: dict[str, str] = {}
    with atomic_path(target) as temporary, open(temporary, "wb") as archive:
        for name, content, caption in _recordings(shard):
            archive.write(_header(name, len(content)) + content + bytes(-len(content) % _TAR_BLOCK))
            captions[name] = caption
        archive.write(bytes(2 * _TAR_BLOCK))
    with atomic_write(state_path) as file:
        json.dump({"state": state, "captions": captions}, file, ensure_ascii=False)
    return target, captions


def _header(name: str, size: int) -> bytes:
    """Create a tar header. `tarfile` is ten times as slow and only used for long names or large files."""
    raw = name.encode("utf-8", "surrogateescape")
    if len(raw) > 100 or size >= 8**11:
        info = tarfile.TarInfo(name)
        info.size = size
        return info.tobuf(tarfile.GNU_FORMAT)
    fields = b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    rest = b"0" + bytes(100) + b"ustar  \0" + bytes(247)
    checksum = sum(raw) + sum(fields) + sum(rest) + 8 * ord(" ")
    return raw.ljust(100, b"\0") + fields + b"%06o\0 " % checksum + rest


def _recordings(shard: Path) -> Iterator[tuple[str, bytes, str]]:
    """Yield (name, content, caption) of each row; duplicate names get the row number as a prefix."""
    schema = parquet_schema(shard)
    caption_column = next((name for name in CAPTIONS if name in schema.names), None)
    is_audio = "audio" in schema.names and pa.types.is_struct(schema.field("audio").type)
    if not is_audio or caption_column is None:
        raise DataError(
            f"{shard}: expected the columns audio (bytes and path) and {' or '.join(CAPTIONS)}, found "
            f"{', '.join(schema.names)}"
        )
    columns = ["audio", caption_column, *(["name"] if "name" in schema.names else [])]
    row, seen = 0, set()
    for batch in parquet_batches(shard, columns):
        audio = batch.column("audio")
        contents, paths = (audio.field(field).to_pylist() for field in ("bytes", "path"))
        if "name" in columns:
            paths = batch.column("name").to_pylist()
        for content, path, caption in zip(
            contents, paths, batch.column(caption_column).to_pylist(), strict=True
        ):
            name = f"{shard.stem}/{(path or f'{row:06d}.flac').removeprefix('./')}"
            if name in seen:
                name = f"{shard.stem}/{row:06d}-{Path(name).name}"
            seen.add(name)
            yield name, content or b"", " ".join((caption or "").split())
            row += 1
