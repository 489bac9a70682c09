"""The utterance table: one Arrow file, memory-mapped and shared by all workers.

A corpus of 22 million utterances never becomes Python objects: rows are built when they are asked for.
Audio paths below the manifest's own folder are stored relative to it, so that an experiment's folder can be
moved or copied. `rejected.jsonl` beside it says what was dropped and why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
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
from jahubert.errors import AudioError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.utterances import Phone, Rejected, Utterance, Utterances, load_utterance

log = logging.getLogger(__name__)

FORMAT = b"1"
_PAUSES = (1.0, 5.0, 20.0)  # seconds before audio is asked for again
_ADVICE = (
    "Put the recording back as stage=prepare found it: the same command continues. To do without it, begin "
    "again under another name=..., with stage=prepare, which leaves out what cannot be read; units, "
    "checkpoints and targets belong to the manifest that they were made from, and are made again too"
)
_ROWS = 8192  # a record batch: what is held in memory while writing
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


def write_manifest(path: str | os.PathLike, items: Iterable[Utterance | Utterances | Rejected]) -> dict:
    """Write utterances as they come, in bounded memory; the file appears under its name only when complete.

    Returns counts: {"utterances", "hours", "rejected": {reason: n}, "splits": {split: {"utterances", "hours",
    "with_words"}}}. Raises DataError for an unusable utterance, for two with one id (naming both sources),
    and when nothing at all was accepted.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft, made = path.with_name(path.name + ".draft"), path.with_name(path.name + ".tmp")
    rejected = path.with_name("rejected.jsonl")
    rejected_draft = rejected.with_name("rejected.jsonl.tmp")
    writing = _Writing(path.parent.absolute())
    try:
        with (
            pa.OSFile(str(draft), "wb") as sink,
            pa.ipc.new_file(sink, _SCHEMA) as table,
            open(rejected_draft, "w", encoding="utf-8", errors="backslashreplace") as drops,
        ):
            rows: list[dict] = []
            for item in items:
                if isinstance(item, Rejected):
                    writing.drop(item)
                    line = {"id": item.id, "reason": item.reason}
                    line |= {"detail": item.detail} if item.detail else {}
                    line |= {"missing": item.missing} if item.missing else {}
                    drops.write(json.dumps(line, ensure_ascii=False) + "\n")
                    continue
                if isinstance(item, Utterance):
                    rows.append(writing.add(item))
                if rows and (len(rows) == _ROWS or isinstance(item, Utterances)):
                    table.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
                    rows = []
                if isinstance(item, Utterances) and len(item):
                    table.write_batch(writing.add_all(item))
            if rows:
                table.write_batch(pa.RecordBatch.from_pylist(rows, _SCHEMA))
        os.replace(rejected_draft, rejected)
        if not writing.n_samples:
            raise DataError(f"no utterance to write into {path}: {writing.why_empty()} (see {rejected})")
        with pa.memory_map(str(draft)) as source:
            table = pa.ipc.open_file(source)
            writing.check_ids(table)
            _finish(table, made, writing.metadata())
        os.replace(made, path)
    finally:
        for temporary in (draft, made, rejected_draft):
            temporary.unlink(missing_ok=True)
    return writing.counts()


def _finish(table: pa.ipc.RecordBatchFileReader, path: Path, metadata: dict[bytes, bytes]) -> None:
    """Copy the draft below a schema that carries the fingerprint, which is known only at the end."""
    schema = _SCHEMA.with_metadata(metadata)
    with open(path, "wb") as file:
        with pa.ipc.new_file(file, schema) as out:
            for i in range(table.num_record_batches):
                out.write_batch(table.get_batch(i).replace_schema_metadata(metadata))
        file.flush()
        os.fsync(file.fileno())


class _Writing:
    """Checks, counts and the running fingerprint of a manifest that is being written."""

    def __init__(self, folder: Path):
        self.prefix = os.path.abspath(folder) + os.sep
        self.sha = hashlib.sha256()
        self.id_hashes = array("q")  # 8 bytes an utterance, where a set of strings would need over 100
        self.n_samples = 0
        self.rejected: dict[str, int] = {}
        self.splits: dict[str, dict] = {}

    def drop(self, item: Rejected) -> None:
        self.rejected[item.reason] = self.rejected.get(item.reason, 0) + 1

    def add(self, item: Utterance) -> dict:
        """The row of an utterance."""
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
                f"utterance {item.id!r} ({item.audio}) has a name or text that is not Unicode: rename it"
            ) from error
        self.id_hashes.append(_id_hash(item.id))
        self._count(item.split, 1, item.n_samples, bool(item.words))
        return row

    def add_all(self, items: Utterances) -> pa.RecordBatch:
        """The rows of many utterances."""
        if items.n_samples_N.min() <= 0 or not all(items.ids) or not items.split:
            for item in items:
                _check(item)
        n, path = len(items), self._relative(items.path)
        numbers = [items.offset_N, items.length_N, items.n_samples_N]
        row = [
            path,
            items.split,
            list(items.ids),
            *(column.tolist() for column in numbers),
            list(items.texts),
        ]
        try:
            self.sha.update(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        except UnicodeEncodeError as error:
            raise DataError(f"{items.path}: a name or text in it is not Unicode: rename it") from error
        self.id_hashes.extend(map(_id_hash, items.ids))
        self._count(items.split, n, int(items.n_samples_N.sum()), 0)
        given: dict[str, Any] = {
            "id": items.ids,
            "path": [path] * n,
            "text": items.texts,
            "split": [items.split] * n,
        }
        given |= dict(zip(("offset", "length", "n_samples"), numbers, strict=True))
        given |= {
            "start": np.zeros(n, np.int64),
            "speaker": [""] * n,
            "words": [[]] * n,
            "alignment": [[]] * n,
        }
        return pa.RecordBatch.from_arrays([pa.array(given[f.name], f.type) for f in _SCHEMA], schema=_SCHEMA)

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
        """DataError naming both sources of the first id that comes twice."""
        hashes = np.frombuffer(self.id_hashes, dtype=np.int64)
        values, counts = np.unique(hashes, return_counts=True)
        suspects = np.flatnonzero(np.isin(hashes, values[counts > 1]))
        first: dict[str, Utterance] = {}
        rows = _Rows(table, Path(self.prefix))
        for i in suspects:  # equal hashes of unequal ids are possible, so the ids themselves decide
            item = rows[int(i)]
            if item.id in first:
                raise DataError(
                    f"two utterances have the id {item.id!r}: {first[item.id].location} and {item.location}. "
                    "Ids must be unique: put the folder or the speaker into them"
                )
            first[item.id] = item

    def counts(self) -> dict:
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
            return "the recipe found nothing"
        reason, n = max(self.rejected.items(), key=lambda pair: pair[1])
        return f"all {sum(self.rejected.values())} were rejected, {n} of them because: {reason}"


def _check(item: Utterance) -> None:
    problem = ""
    if not item.id:
        problem = "has no id"
    elif item.n_samples <= 0 or item.start < 0:
        problem = f"covers no audio: start {item.start}, n_samples {item.n_samples} (see audio_length)"
    elif not item.split:
        problem = "has no split"
    elif any(not word for word in item.words):
        problem = "has a word without phones"
    else:
        end = 0
        for phone in item.alignment:
            if not end <= phone.start < phone.end <= item.n_samples:
                problem = f"has an alignment that overlaps or leaves its {item.n_samples} samples at {phone}"
                break
            end = phone.end
    if problem:
        raise DataError(f"utterance {item.id!r} ({item.audio}) {problem}")


def _id_hash(id: str) -> int:
    digest = hashlib.blake2b(id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _hours(n_samples: int) -> float:
    return n_samples / SAMPLE_RATE / 3600


class _Rows:
    """Random access to the rows of an open Arrow file."""

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
    """A written manifest, memory-mapped; cheap to open, cheap to send to a worker process."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path).absolute()
        if not self.path.is_file():
            raise DataError(
                f"no manifest at {self.path}: run stage=prepare first; if that calls itself done, delete "
                f"{self.path.parent} before"
            )
        try:
            self._source = pa.memory_map(str(self.path))
            table = pa.ipc.open_file(self._source)
            self._rows = _Rows(table, self.path.parent)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{self.path} is not a manifest, or it is damaged: {error}. Run prepare again"
            ) from error
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != FORMAT or not table.schema.remove_metadata().equals(_SCHEMA):
            raise DataError(f"{self.path} is not a manifest of format {FORMAT.decode()}: run prepare again")
        self.fingerprint: str = metadata[b"fingerprint"].decode()
        self.counts: dict = json.loads(metadata[b"counts"])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> Utterance:
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"utterance {i} of a manifest of {len(self)}")
        return self._rows[i % len(self)]

    def __reduce__(self):
        return Manifest, (self.path,)  # a worker maps the file itself

    @cached_property
    def n_samples(self) -> np.ndarray:
        """int64 (utterances,), 16 kHz samples; read-only."""
        n_samples = self._rows.column("n_samples").to_numpy()
        n_samples.flags.writeable = False
        return n_samples

    def ids(self, indices: Sequence[int] | np.ndarray | None = None) -> list[str]:
        """Ids, of all utterances or of some; all of 22 million are 2 GB of strings."""
        column = self._rows.column("id")
        return (column if indices is None else column.take(pa.array(indices, pa.int64()))).to_pylist()

    def indices(self, split: str | None = None, has_words: bool | None = None) -> np.ndarray:
        """int64 indices, ascending, of a split and with or without words; DataError for an unknown split."""
        keep = np.ones(len(self), bool)
        if split is not None:
            keep &= np.asarray(pc.equal(self._rows.column("split"), split))
        if has_words is not None:
            keep &= np.asarray(pc.greater(pc.list_value_length(self._rows.column("words")), 0)) == has_words
        found = np.flatnonzero(keep)
        if split is not None and split not in self.counts["splits"]:
            splits = ", ".join(self.counts["splits"])
            raise DataError(f"{self.path} has no split {split!r}; its splits are: {splits}")
        return found

    def load(self, i: int, start: int = 0, n_samples: int | None = None) -> torch.Tensor:
        """The audio of an utterance, or `n_samples` samples of it from its sample `start` on, float32 (T,).

        What a file server that is away for a moment does not give is asked for again.

        AudioError, naming the utterance, if it cannot be read or ends before the manifest says.
        """
        item = self[i]
        for pause in (*_PAUSES, None):
            try:
                return load_utterance(item, start, n_samples)
            except (AudioError, OSError) as error:
                if pause is None or not _may_pass(error):
                    raise AudioError(f"utterance {item.id!r}: {str(error).rstrip('.')}. {_ADVICE}") from error
                log.warning("%s: %s; trying again in %g s", item.audio, error, pause)
                time.sleep(pause)
        raise AssertionError("the last pause is None")


def _may_pass(error: Exception) -> bool:
    """Whether the file server, and not the file, is what is wrong; that a file is not there is its answer."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)
