"""Conversion of parquet shards from the Hugging Face Hub to tar shards with a table of captions.

Recordings in compressed parquet pages cannot be read by byte range. They are therefore copied once, without
decoding, to an uncompressed tar file. An Arrow file next to the tar file contains the name, caption, byte
range and number of samples of each usable recording, so the tar file need not be read again. A shard is
converted again if the size or modification time of its parquet file changes.
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tar_index import FLAC_HEAD, measure

from jahubert.audio.search import is_sidecar
from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_path, atomic_write
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.parquet import parquet_batches, parquet_schema
from jahubert.train.data.utterances import UNUSABLE_AUDIO

VERSION = 2
CAPTIONS = ("transcription", "text", "sentence")  # accepted names for the caption column
_TAR_BLOCK = 512  # bytes
_NAME_BYTES = 100  # length of the name field in a tar header
_MAX_SIZE = 8**11  # exclusive upper bound on the size field in a tar header
_SCHEMA = pa.schema(
    [
        ("name", pa.string()),
        ("caption", pa.string()),
        ("offset", pa.int64()),  # bytes into the tar file
        ("length", pa.int64()),  # bytes
        ("n_samples", pa.int64()),  # 16 kHz samples
    ]
)


@dataclass(frozen=True)
class Shard:
    """A converted shard, with one table row per usable recording, and the unusable recordings."""

    tar: Path
    recordings: pa.Table  # columns as in _SCHEMA
    broken: list[list[str]]  # [name, reason, detail]

    def numbers(self, name: str) -> np.ndarray:
        return self.recordings[name].to_numpy()

    def strings(self, name: str) -> list[str]:
        return _strings(self.recordings[name])


def find_parquet(data: Path, subset: str) -> list[Path]:
    """Return the parquet shards of a subset, or an empty list if the folder has none.

    The shards are those in `data`/<subset> or, as on the Hub, `data`/<subset>/train. If neither has any, the
    subset `all` consists of those in `data` or `data`/data.

    Raises:
        DataError: `data` or `data`/data has parquet shards, but the subset is not `all`.
    """
    for folder in (data / subset, data / subset / "train"):
        if shards := _parquet_files(folder):
            return shards
    for folder in (data, data / "data"):
        if shards := _parquet_files(folder):
            if subset != "all":
                raise DataError(
                    f"subset={subset} does not select any of the parquet files in {folder}; leave out "
                    f"subset= to use all of them, or move those of the subset to {data / subset}"
                )
            return shards
    return []


def parquet_subsets(data: Path) -> list[str]:
    """Return the names of the subfolders with parquet shards of a subset, as on the Hub."""
    return sorted(
        folder.name for folder in data.glob("*") if _parquet_files(folder) or _parquet_files(folder / "train")
    )


def _parquet_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.glob("*.parquet")) if not is_sidecar(path)]


def to_tar(shard: Path, folder: Path) -> Shard:
    """Convert a shard to a tar file in `folder` if it is new or has changed.

    Raises:
        DataError: the shard cannot be read, is damaged or not parquet, or has no audio or caption column.
    """
    tar, table_path = folder / f"{shard.stem}.tar", folder / f"{shard.stem}.arrow"
    status = shard.stat()
    state = json.dumps([VERSION, status.st_size, status.st_mtime_ns]).encode()
    if tar.is_file() and (known := _read_table(table_path, state)) is not None:
        return Shard(tar, *known)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(tar) as temporary, open(temporary, "wb") as archive:
        table = _copy_recordings(shard, archive)
    table, broken = _measure_others(table, tar)
    metadata = {b"state": state, b"broken": json.dumps(broken, ensure_ascii=False).encode()}
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_file(buffer, _SCHEMA.with_metadata(metadata)) as out:
        out.write_table(table)
    with atomic_write(table_path, "wb") as file:
        file.write(buffer.getvalue())
    return Shard(tar, table, broken)


def _strings(column: pa.Array | pa.ChunkedArray) -> list[Any]:
    """Convert a column of strings to a list, ten times faster than `to_pylist`."""
    return column.to_numpy(zero_copy_only=False).tolist()


def _read_table(path: Path, state: bytes) -> tuple[pa.Table, list[list[str]]] | None:
    """Read the table of a converted shard, or return None if it is missing, damaged or outdated."""
    try:
        with pa.OSFile(str(path)) as file:
            table = pa.ipc.open_file(file).read_all()
    except (pa.ArrowException, OSError):
        return None
    metadata = table.schema.metadata or {}
    if metadata.get(b"state") != state:
        return None
    return table, json.loads(metadata[b"broken"])


def _copy_recordings(shard: Path, archive: BinaryIO) -> pa.Table:
    """Copy the recordings in a shard to a tar file, and return their table."""
    schema = parquet_schema(shard)
    caption_column = next((name for name in CAPTIONS if name in schema.names), None)
    audio_type = schema.field("audio").type if "audio" in schema.names else pa.null()
    fields = [field.name for field in audio_type] if pa.types.is_struct(audio_type) else []
    if "bytes" not in fields or caption_column is None:
        found = [f"audio ({audio_type})" if name == "audio" else name for name in schema.names]
        raise DataError(
            f"{shard}: expected the columns audio (a struct with bytes and, optionally, path) and "
            f"{' or '.join(CAPTIONS)}, found {', '.join(found)}"
        )
    columns = ["audio", caption_column, *(["name"] if "name" in schema.names else [])]
    names: set[str] = set()
    batches = []
    for batch in parquet_batches(shard, columns):
        audio = batch.column("audio")
        paths = pa.nulls(len(batch), pa.string())
        if "name" in columns:
            paths = batch.column("name").cast(pa.string())
        elif "path" in fields:
            paths = audio.field("path")
        new_names = _unique_names(shard.stem, _strings(paths), names)
        captions = [" ".join((text or "").split()) for text in _strings(batch.column(caption_column))]
        contents = audio.field("bytes").cast(pa.large_binary()).fill_null(b"")
        batches.append(_write_members(archive, new_names, captions, contents))
    archive.write(bytes(2 * _TAR_BLOCK))
    return pa.Table.from_batches(batches, _SCHEMA)


def _unique_names(stem: str, paths: list[str | None], names: set[str]) -> list[str]:
    """Return the member names of the next rows, and add them to `names`.

    A row without a path is named after its row number. If a path occurred before, the name consists of the
    row number and the file name.
    """
    new = []
    for row, path in enumerate(paths, len(names)):
        name = f"{stem}/{(path or f'{row:06d}.flac').removeprefix('./')}"
        if name in names:
            name = f"{stem}/{row:06d}-{PurePosixPath(name).name}"
        names.add(name)
        new.append(name)
    return new


def _write_members(
    archive: BinaryIO, names: list[str], captions: list[str], contents: pa.LargeBinaryArray
) -> pa.RecordBatch:
    """Append recordings to a tar file, and return their table rows."""
    bounds = np.frombuffer(contents.buffers()[1], np.int64)[contents.offset :][: len(contents) + 1]
    data = memoryview(contents.buffers()[2] or b"")
    length_N = np.diff(bounds)
    headers = _headers(names, length_N)
    padding_N = -length_N % _TAR_BLOCK
    member_N = np.array([len(header) for header in headers]) + length_N + padding_N
    end_N = archive.tell() + np.cumsum(member_N)
    zeros = bytes(_TAR_BLOCK)
    parts: list[bytes | memoryview] = []
    for header, start, end, padding in zip(headers, bounds, bounds[1:], padding_N.tolist(), strict=False):
        parts += (header, data[start:end], zeros[:padding])
    archive.write(b"".join(parts))  # one write per recording would release the GIL each time
    n_samples_N = _flac_samples(np.frombuffer(data, np.uint8), bounds[:-1], length_N)
    columns = [names, captions, end_N - padding_N - length_N, length_N, n_samples_N]
    return pa.RecordBatch.from_arrays([pa.array(column) for column in columns], schema=_SCHEMA)


def _headers(names: list[str], length_N: np.ndarray) -> list[bytes]:
    """Create all tar headers at once, using `tarfile` only for long names and large files."""
    raw = [name.encode() for name in names]
    header_NB = np.zeros((len(raw), _TAR_BLOCK), np.uint8)
    fields = b"0000644\0" + b"0000000\0" * 2 + bytes(12) + b"00000000000\0" + b" " * 8 + b"0"
    header_NB[:, _NAME_BYTES : _NAME_BYTES + len(fields)] = np.frombuffer(fields, np.uint8)
    header_NB[:, 257:265] = np.frombuffer(b"ustar  \0", np.uint8)
    header_NB[:, :_NAME_BYTES] = np.array(raw, f"S{_NAME_BYTES}").view(np.uint8).reshape(-1, _NAME_BYTES)
    header_NB[:, 124:135] = _octal(length_N, 11)
    header_NB[:, 148:154] = _octal(header_NB.sum(1, dtype=np.int64), 6)
    header_NB[:, 154] = 0
    headers = [header.tobytes() for header in header_NB]
    for row, (name, length) in enumerate(zip(raw, length_N.tolist(), strict=True)):
        if len(name) > _NAME_BYTES or length >= _MAX_SIZE:
            info = tarfile.TarInfo(names[row])
            info.size = length
            headers[row] = info.tobuf(tarfile.GNU_FORMAT)
    return headers


def _octal(value_N: np.ndarray, n_digits: int) -> np.ndarray:
    """Return the octal digits of each value as an array of ASCII codes, (N, n_digits)."""
    shifts = 3 * np.arange(n_digits - 1, -1, -1)
    return (value_N[:, None] >> shifts & 7) + ord("0")


def _flac_samples(data_B: np.ndarray, start_N: np.ndarray, length_N: np.ndarray) -> np.ndarray:
    """Read the numbers of samples from FLAC headers. Unknown numbers, and audio in other formats, give 0."""
    n_samples_N = np.zeros(len(start_N), np.int64)
    row_M = np.flatnonzero(length_N >= FLAC_HEAD)
    head_MB = data_B[start_N[row_M, None] + np.arange(FLAC_HEAD)]
    is_flac_M = (head_MB[:, :4] == np.frombuffer(b"fLaC", np.uint8)).all(1) & (head_MB[:, 4] & 0x7F == 0)
    # 20 bits for the rate, 3 for the channels, 5 for the sample size and 36 for the number of samples
    numbers_M = np.ascontiguousarray(head_MB[:, 18:26]).view(">u8")[:, 0].astype(np.uint64)
    is_flac_M &= numbers_M >> np.uint64(44) == SAMPLE_RATE
    n_samples_N[row_M[is_flac_M]] = (numbers_M & np.uint64((1 << 36) - 1))[is_flac_M]
    return n_samples_N


def _measure_others(table: pa.Table, tar: Path) -> tuple[pa.Table, list[list[str]]]:
    """Determine the lengths of recordings whose numbers of samples are 0.

    Returns:
        The usable rows, and [name, reason, detail] of each unusable recording.
    """
    n_samples_N = table["n_samples"].to_numpy().copy()
    broken: list[list[str]] = []
    for row in np.flatnonzero(n_samples_N == 0).tolist():
        offset, length = table["offset"][row].as_py(), table["length"][row].as_py()
        n_samples_N[row], reason = measure(tar, offset, length)
        if reason:
            broken.append([table["name"][row].as_py(), UNUSABLE_AUDIO, reason])
    table = table.set_column(_SCHEMA.get_field_index("n_samples"), _SCHEMA.field("n_samples"), [n_samples_N])
    if broken:
        table = table.filter(pc.invert(pc.is_in(table["name"], pa.array([name for name, *_ in broken]))))
    return table, broken
