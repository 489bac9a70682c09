"""Conversion of parquet shards, as on the Hugging Face Hub, to tar shards with a table of captions.

Compressed parquet pages have no byte range per recording, so recordings are copied once, without decoding, to
an uncompressed tar, which is read in place like the original shards. A shard is converted again when the size
or modification time of its parquet file change.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_path, atomic_write

VERSION = 1
CAPTIONS = ("transcription", "text", "sentence")  # accepted names of the column
_BATCH_ROWS = 256  # rows in memory


def find_parquet(data: Path, subset: str) -> list[Path]:
    """The parquet shards of a release: in `data`, or in its folders <subset> and data."""
    for folder in (data / subset, data, data / "data"):
        if shards := sorted(folder.glob("*.parquet")):
            return shards
    return []


def to_tar(shard: Path, folder: Path) -> tuple[Path, dict[str, str]]:
    """Convert a shard to `folder`, unless it exists; return the tar and name -> caption.

    Raises:
        DataError: not parquet, or without the columns of audio and captions.
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
    with atomic_path(target) as temporary, tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT) as archive:
        for name, content, caption in _recordings(shard):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
            captions[name] = caption
    with atomic_write(state_path) as file:
        json.dump({"state": state, "captions": captions}, file, ensure_ascii=False)
    return target, captions


def _recordings(shard: Path) -> Iterator[tuple[str, bytes, str]]:
    """(name, content, caption) of the rows with audio; names are made unique with the row number."""
    try:
        file = pq.ParquetFile(shard)
        names = file.schema_arrow.names
        caption_column = next((name for name in CAPTIONS if name in names), None)
        if "audio" not in names or caption_column is None:
            raise DataError(
                f"{shard}: expected the columns audio and {' or '.join(CAPTIONS)}, found {', '.join(names)}"
            )
        columns = ["audio", caption_column, *(["name"] if "name" in names else [])]
        row, seen = 0, set()
        for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
            for record in batch.to_pylist():
                audio: dict[str, Any] = record["audio"] or {}
                name = record.get("name") or audio.get("path") or f"{row:06d}.flac"
                name = f"{shard.stem}/{name.removeprefix('./')}"
                if name in seen:
                    name = f"{shard.stem}/{row:06d}-{Path(name).name}"
                seen.add(name)
                yield name, audio.get("bytes") or b"", " ".join((record[caption_column] or "").split())
                row += 1
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{shard}: cannot be read as parquet ({error})") from error
