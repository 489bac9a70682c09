"""Utterance manifest: a memory-mapped Arrow file, shared by all workers.

Rows are converted to Python objects only on access, so that a corpus of 22 million utterances fits in memory.
Paths of audio inside the manifest's folder are stored relative to it, so that an experiment folder can be
moved or copied. `rejected.jsonl`, next to the manifest, lists rejected recordings with the reasons.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import zlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from jahubert.audio import AudioSource
from jahubert.errors import AudioError, DataError, quote
from jahubert.formats.atomic import atomic_path, atomic_write, temporary_file
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.utterances import (
    Phone,
    Rejected,
    Utterance,
    Utterances,
    load_utterance,
    read_reliably,
)
from jahubert.train.experiment.provenance import verify_files

# Recipes import the types of their utterances from here.
__all__ = ["Manifest", "Phone", "Rejected", "Utterance", "Utterances", "write_manifest"]

log = logging.getLogger(__name__)

FORMAT = b"1"
_MISSING_AUDIO_HINT = (
    "Restore the original recording and rerun the same command. To train without it, start a new "
    "experiment (name=...) with stage=prepare, which rejects unreadable audio, and run all later stages again"
)
_BATCH_ROWS = 8192  # rows per record batch, except that each archive has a batch of its own
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("path", pa.string()),
        ("offset", pa.int64()),  # bytes
        ("length", pa.int64()),  # bytes
        ("start", pa.int64()),  # 16 kHz samples
        ("n_samples", pa.int64()),  # 16 kHz samples
        ("speaker", pa.string()),
        ("text", pa.string()),
        ("words", pa.list_(pa.list_(pa.string()))),
        ("split", pa.string()),
        (
            "alignment",
            pa.list_(pa.struct([("symbol", pa.string()), ("start", pa.int64()), ("end", pa.int64())])),
        ),
    ]
)


def write_manifest(
    path: str | os.PathLike[str], items: Iterable[Utterance | Utterances | Rejected]
) -> dict[str, Any]:
    """Write a manifest and its `rejected.jsonl` atomically, without keeping all rows in memory.

    Returns:
        Statistics: {"utterances", "hours", "rejected": {reason: n}, "splits": {split: {"utterances", "hours",
        "with_words"}}}.

    Raises:
        DataError: an utterance is invalid, an id is not unique, or there are no utterances.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rejected = path.with_name("rejected.jsonl")
    builder = _ManifestBuilder(path.parent.absolute())
    with temporary_file(path.with_name("draft")) as draft:
        with (
            pa.OSFile(str(draft), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as table,
            atomic_write(rejected, errors="backslashreplace") as rejected_file,
        ):
            rows: list[dict[str, Any]] = []
            for item in items:
                if isinstance(item, Rejected):
                    builder.count_rejected(item)
                    record = {"id": item.id, "reason": item.reason}
                    if item.detail:
                        record["detail"] = item.detail
                    if item.missing:
                        record["missing"] = item.missing
                    rejected_file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    continue
                if isinstance(item, Utterance):
                    rows.append(builder.row(item))
                if rows and (len(rows) == _BATCH_ROWS or isinstance(item, Utterances)):
                    table.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
                    rows = []
                if isinstance(item, Utterances) and len(item):
                    table.write_batch(builder.record_batch(item))
            if rows:
                table.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
        if not builder.n_samples:
            raise DataError(f"{path}: no usable utterances: {builder.why_empty()} (see {rejected})")
        with pa.memory_map(str(draft)) as source, atomic_path(path) as temporary:
            table = pa.ipc.open_file(source)
            builder.check_ids(table)
            batches = [table.get_batch(i) for i in range(table.num_record_batches)]
            _copy_with_metadata(table, temporary, builder.metadata() | {b"crc32": _crc32(batches)})
    return builder.counts()


def _copy_with_metadata(
    table: pa.ipc.RecordBatchFileReader, path: Path, metadata: dict[bytes, bytes]
) -> None:
    """Copy the draft to `path`, adding `metadata` that is known only when the draft is complete."""
    schema = _SCHEMA.with_metadata(metadata)
    with open(path, "wb") as file, pa.ipc.new_file(file, schema) as out:
        for i in range(table.num_record_batches):
            out.write_batch(table.get_batch(i).replace_schema_metadata(metadata))


def _crc32(batches: Iterable[pa.RecordBatch]) -> bytes:
    """Compute the CRC-32 of all buffers in the batches, as 8 hexadecimal digits."""
    crc = 0
    for batch in batches:
        for column in batch.columns:
            for buffer in column.buffers():
                if buffer is not None:
                    crc = zlib.crc32(buffer, crc)
    return f"{crc:08x}".encode()


class _ManifestBuilder:
    """Checks and counts utterances while a manifest is written, and computes the fingerprint."""

    def __init__(self, folder: Path):
        self.prefix = os.path.abspath(folder) + os.sep
        self.sha = hashlib.sha256()
        # An array takes 8 bytes per utterance; a set of the ids would take over 100.
        self.id_hashes = array("q")
        self.n_samples = 0
        self.rejected: dict[str, int] = {}
        self.splits: dict[str, dict[str, Any]] = {}

    def count_rejected(self, item: Rejected) -> None:
        self.rejected[item.reason] = self.rejected.get(item.reason, 0) + 1

    def row(self, item: Utterance) -> dict[str, Any]:
        """Check and count an utterance, and return its manifest row."""
        _check(item)
        row = {
            "id": item.id,
            "path": self._relative(item.audio.path),
            "offset": item.audio.offset,
            "length": item.audio.length,
            "start": item.start,
            "n_samples": item.n_samples,
            "speaker": item.speaker,
            "text": item.text,
            "words": [list(word) for word in item.words],
            "split": item.split,
            "alignment": [{"symbol": p.symbol, "start": p.start, "end": p.end} for p in item.alignment],
        }
        try:
            self.sha.update(json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise DataError(
                f"utterance {quote(item.id)} ({item.audio}): the name or text is not valid Unicode; "
                "correct it"
            ) from error
        self.id_hashes.append(_id_hash(item.id))
        self._count(item.split, 1, item.n_samples, bool(item.words))
        return row

    def record_batch(self, items: Utterances) -> pa.RecordBatch:
        """Check and count the utterances in an archive, and return their manifest rows."""
        if items.n_samples_N.min() <= 0 or not all(items.ids) or not items.split:
            for item in items:
                _check(item)
        n, path = len(items), self._relative(items.path)
        numbers = [items.offset_N, items.length_N, items.n_samples_N]
        content = [
            path,
            items.split,
            list(items.ids),
            *(column.tolist() for column in numbers),
            list(items.texts),
        ]
        try:
            self.sha.update(json.dumps(content, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise DataError(f"{items.path}: a name or text is not valid Unicode; correct it") from error
        self.id_hashes.extend(map(_id_hash, items.ids))
        self._count(items.split, n, int(items.n_samples_N.sum()), 0)
        columns: dict[str, Any] = {
            "id": items.ids,
            "path": [path] * n,
            "offset": items.offset_N,
            "length": items.length_N,
            "start": np.zeros(n, np.int64),
            "n_samples": items.n_samples_N,
            "speaker": [""] * n,
            "text": items.texts,
            "words": [[]] * n,
            "split": [items.split] * n,
            "alignment": [[]] * n,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in _SCHEMA]
        return pa.RecordBatch.from_arrays(arrays, schema=_SCHEMA)

    def _relative(self, path: str) -> str:
        path = os.path.abspath(path)
        return path[len(self.prefix) :] if path.startswith(self.prefix) else path

    def _count(self, name: str, n: int, n_samples: int, with_words: int) -> None:
        self.n_samples += n_samples
        split = self.splits.setdefault(name, {"utterances": 0, "n_samples": 0, "with_words": 0})
        split["utterances"] += n
        split["n_samples"] += n_samples
        split["with_words"] += with_words

    def check_ids(self, table: pa.ipc.RecordBatchFileReader) -> None:
        """Raise a DataError that names both sources if two utterances have the same id."""
        hashes = np.frombuffer(self.id_hashes, dtype=np.int64)
        values, counts = np.unique(hashes, return_counts=True)
        suspects = np.flatnonzero(np.isin(hashes, values[counts > 1]))
        first: dict[str, Utterance] = {}
        rows = _Rows(table, Path(self.prefix))
        for i in suspects:  # the ids are compared, because different ids can have equal hashes
            item = rows[int(i)]
            if item.id in first:
                raise DataError(
                    f"duplicate utterance id {quote(item.id)}: {first[item.id].location} and "
                    f"{item.location}. "
                    "Make ids unique, for example by including the folder or the speaker"
                )
            first[item.id] = item

    def counts(self) -> dict[str, Any]:
        splits = {
            name: {
                "utterances": s["utterances"],
                "hours": _hours(s["n_samples"]),
                "with_words": s["with_words"],
            }
            for name, s in sorted(self.splits.items())
        }
        return {
            "utterances": len(self.id_hashes),
            "hours": _hours(self.n_samples),
            "rejected": dict(sorted(self.rejected.items())),
            "splits": splits,
        }

    def metadata(self) -> dict[bytes, bytes]:
        counts = json.dumps(self.counts(), ensure_ascii=False).encode()
        return {b"format": FORMAT, b"fingerprint": self.sha.hexdigest().encode(), b"counts": counts}

    def why_empty(self) -> str:
        if not self.rejected:
            return "the recipe yielded no utterances"
        reason, n = max(self.rejected.items(), key=lambda pair: pair[1])
        total = sum(self.rejected.values())
        return f"everything was rejected; the most frequent reason ({n} of {total}) is: {reason}"


def _check(item: Utterance) -> None:
    problem = ""
    if not item.id:
        problem = "has no id"
    elif item.n_samples <= 0 or item.start < 0:
        problem = f"has an invalid start or length: start is {item.start}, n_samples is {item.n_samples}"
    elif not item.split:
        problem = "has no split"
    elif any(not word for word in item.words):
        problem = "has a word without phones"
    else:
        end = 0
        for phone in item.alignment:
            if not end <= phone.start < phone.end <= item.n_samples:
                problem = (
                    "has an alignment with a phone that is empty, overlaps the previous one or ends after "
                    f"{item.n_samples} samples: {phone}"
                )
                break
            end = phone.end
    if problem:
        raise DataError(f"utterance {quote(item.id)} ({item.audio}) {problem}")


def _id_hash(id: str) -> int:
    digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _hours(n_samples: int) -> float:
    return n_samples / SAMPLE_RATE / 3600


class _Rows:
    """Random access to the rows in an open Arrow file."""

    def __init__(self, table: pa.ipc.RecordBatchFileReader, folder: Path):
        self.folder = folder
        self.batches = [table.get_batch(i) for i in range(table.num_record_batches)]
        self.ends = list(np.cumsum([batch.num_rows for batch in self.batches]).tolist())

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, i: int) -> Utterance:
        batch = bisect_right(self.ends, i)
        row = self.batches[batch].slice(i - (self.ends[batch - 1] if batch else 0), 1).to_pylist()[0]
        audio = AudioSource(os.path.join(self.folder, row["path"]), row["offset"], row["length"])
        return Utterance(
            id=row["id"],
            audio=audio,
            start=row["start"],
            n_samples=row["n_samples"],
            speaker=row["speaker"],
            text=row["text"],
            words=tuple(tuple(word) for word in row["words"]),
            split=row["split"],
            alignment=tuple(Phone(**phone) for phone in row["alignment"]),
        )

    def column(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([batch.column(name) for batch in self.batches], type=_SCHEMA.field(name).type)


class Manifest:
    """A memory-mapped manifest, which is cheap to open and to send to a worker process."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise DataError(
                f"{self.path}: manifest not found; run stage=prepare (if the stage is reported as done, "
                f"delete {self.path.parent} first)"
            )
        try:
            self._source = pa.memory_map(str(self.path))
            table = pa.ipc.open_file(self._source)
            self._rows = _Rows(table, self.path.parent)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path}: not a manifest, or damaged ({error}); rerun stage=prepare"
            ) from error
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != FORMAT or not table.schema.remove_metadata().equals(_SCHEMA):
            raise DataError(f"{self.path}: not a manifest of format {FORMAT.decode()}; rerun stage=prepare")
        try:
            self.fingerprint: str = metadata[b"fingerprint"].decode()
            self._crc32: bytes = metadata[b"crc32"]
            self.counts: dict[str, Any] = json.loads(metadata[b"counts"])
            self.counts["splits"].keys()  # raises an error unless it is a mapping, as other code expects
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"{self.path}: damaged metadata ({error}); rerun stage=prepare") from error

    @classmethod
    def verified(cls, path: str | os.PathLike[str]) -> Manifest:
        """Open a manifest after verifying it against the record of the prepare stage and its own checksum.

        Raises:
            DataError: the manifest is missing or damaged.
        """
        verify_files(Path(path).absolute())
        manifest = cls(path)
        manifest.validate()
        return manifest

    def validate(self) -> None:
        """Validate all Arrow buffers and their checksum, which reads the whole file.

        A damaged manifest that is not detected can crash the process or return wrong rows.

        Raises:
            DataError: the manifest is damaged.
        """
        try:
            for batch in self._rows.batches:
                batch.validate(full=True)
        except pa.ArrowException as error:
            raise DataError(f"{self.path}: damaged ({error}); rerun stage=prepare") from error
        if self._crc32 != _crc32(self._rows.batches):
            raise DataError(f"{self.path}: damaged (checksum mismatch); rerun stage=prepare")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Utterance:
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"utterance {i} is out of range for a manifest of {len(self)} utterances")
        return self._rows[i % len(self)]

    def __reduce__(self) -> tuple[type[Manifest], tuple[Path]]:
        return Manifest, (self.path,)  # each worker maps the file into its own memory

    @cached_property
    def n_samples(self) -> np.ndarray:
        """Lengths of all utterances in 16 kHz samples, read-only int64 (utterances,)."""
        n_samples: np.ndarray = self._rows.column("n_samples").to_numpy()
        n_samples.flags.writeable = False
        return n_samples

    def ids(self, indices: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """Return the ids of the utterances at `indices`, or all ids (2 GB of strings for 22 million)."""
        column = self._rows.column("id")
        if indices is not None:
            column = column.take(pa.array(indices, pa.int64()))
        ids: list[str] = column.to_pylist()
        return ids

    def indices(
        self, split: str | None = None, has_words: bool | None = None, has_alignment: bool | None = None
    ) -> np.ndarray:
        """Return the ascending int64 indices of the selected utterances.

        Args:
            split: select only utterances in this split.
            has_words: select only utterances with words (True) or without words (False).
            has_alignment: select only utterances with phone times (True) or without them (False).

        Raises:
            DataError: the manifest does not contain `split`.
        """
        keep = np.ones(len(self), bool)
        if split is not None:
            keep &= np.asarray(pc.equal(self._rows.column("split"), split))
        for column, wanted in (("words", has_words), ("alignment", has_alignment)):
            if wanted is not None:
                keep &= np.asarray(pc.greater(pc.list_value_length(self._rows.column(column)), 0)) == wanted
        if split is not None and split not in self.counts["splits"]:
            splits = ", ".join(self.counts["splits"])
            raise DataError(f"{self.path} has no split {quote(split)}; available splits: {splits}")
        return np.flatnonzero(keep)

    def load(self, i: int, start: int = 0, n_samples: int | None = None) -> torch.Tensor:
        """Load samples of utterance `i`, float32 (T,).

        Reading is retried after transient errors, for example those of a network file system.

        Args:
            start: first sample, counted from the start of the utterance.
            n_samples: number of samples; None selects all samples to the end of the utterance.

        Raises:
            AudioError: the audio is missing, unusable, or shorter than specified in the manifest.
            ReadError: the file system still fails after several attempts.
        """
        item = self[i]
        try:
            return read_reliably(lambda: load_utterance(item, start, n_samples), item.audio)
        except (AudioError, OSError) as error:
            message = f"utterance {quote(item.id)}: {str(error).rstrip('.')}. {_MISSING_AUDIO_HINT}"
            raise AudioError(message) from error
