"""Reader for ReazonSpeech v1 and v2 (Reazon Human Interaction Laboratory): television speech with captions.

The recipe reads `tsv/<subset>.tsv` (name, tab, caption; no header) and `data/000.tar` ... `data/fff.tar` as
downloaded, or the parquet files from the Hugging Face Hub. Tar shards are not unpacked, because the manifest
contains byte ranges. Captions are stored as text, which stage=targets converts to phones and pretraining
ignores.
"""

from __future__ import annotations

import logging
import os
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from parquet_shards import find_parquet, to_tar
from tar_index import index_shards

from jahubert.errors import ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch
from jahubert.train.data.manifest import Rejected, Utterances

log = logging.getLogger(__name__)

_SHARD = re.compile(rb"[0-9a-f]{3}")
_LOG_EVERY = 256  # number of shards between log lines


@dataclass(frozen=True)
class Config:
    subset: str = "all"  # name of a .tsv: tiny, small, medium, large or all
    dev: int = 1000  # number of utterances at the start of the corpus
    test: int = 100  # number of utterances after the dev split
    processes: int = 0  # number of processes that index tar shards; 0: one per core

    def __post_init__(self) -> None:
        if min(self.dev, self.test, self.processes) < 0:
            raise ConfigError(f"dev, test and processes must be at least 0; found {self}")


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterances | Rejected]:
    """Yield recordings with ids `<shard>/<name>` and rejected items, shard by shard.

    `work/index` caches the members of each shard. An interrupted run can therefore be resumed, and only new
    shards are read if shards are added.

    Raises:
        DataError: the table of the subset or all of its shards are missing.
    """
    if data is not None and (parquet := find_parquet(data, config.subset)):
        yield from _prepare_parquet(parquet, work, config)
        return
    table, folder = find_release(data, config.subset)
    captions = Captions(table)
    yield from captions.rejected
    shards = {name: folder / f"{name}.tar" for name in sorted(captions.runs)}
    for name, path in list(shards.items()):
        if not path.is_file():
            detail = f"{captions.count(name)} rows of {table.name}"
            yield Rejected(f"{name}.tar", "missing shard", detail, missing=str(path.absolute()))
            del shards[name]
    if not shards:
        example = next(iter(sorted(captions.runs)), "000")
        raise DataError(
            f"{folder}: none of the {len(captions.runs)} shards of {table.name} found (for example "
            f"{example}.tar); download them to this folder"
        )
    n_rows = n_samples = 0
    indices = index_shards(list(shards.values()), work / "index", config.processes or os.cpu_count() or 1)
    for number, ((name, path), index) in enumerate(zip(shards.items(), indices, strict=True), 1):
        texts, rejected_rows = captions.of(name)
        rows, rejected = _match_captions(path, index, texts, table)
        yield from (*rejected_rows, *rejected)
        yield from _assign_splits(rows, n_rows, config)
        n_rows += len(rows)
        n_samples += int(rows.n_samples_N.sum())
        if number % _LOG_EVERY == 0 or number == len(shards):
            _log_progress(number, len(shards), n_rows, n_samples)


def _prepare_parquet(parquet: Sequence[Path], work: Path, config: Config) -> Iterator[Utterances | Rejected]:
    """Convert parquet shards to tar shards in `work/shards`, and yield their recordings."""
    n_rows = n_samples = 0
    for number, (_, shard) in enumerate(prefetch(partial(to_tar, folder=work / "shards"), parquet), 1):
        yield from (Rejected(*item) for item in shard.broken)
        names, captions = shard.strings("name"), shard.strings("caption")
        ids = [name.rpartition(".")[0] or name for name in names]
        numbers = (shard.numbers(name) for name in ("offset", "length", "n_samples"))
        yield from _assign_splits(Utterances(str(shard.tar), ids, *numbers, captions), n_rows, config)
        n_rows += len(ids)
        n_samples += int(shard.numbers("n_samples").sum())
        if number % _LOG_EVERY == 0 or number == len(parquet):
            _log_progress(number, len(parquet), n_rows, n_samples)


def _log_progress(n_shards: int, total: int, n_rows: int, n_samples: int) -> None:
    hours = n_samples / SAMPLE_RATE / 3600
    log.info(f"reazonspeech: {n_shards:,} of {total:,} shards, {n_rows:,} utterances, {hours:,.2f} h")


def find_release(data: Path | None, subset: str) -> tuple[Path, Path]:
    """Find the table of a subset and the folder of its shards.

    Args:
        data: folder of a release, or the folder that contains it.

    Raises:
        DataError: there is no release or more than one, or the table does not exist.
    """
    if data is None:
        raise DataError(
            "data= is required: the reazonspeech recipe needs data=FOLDER with tsv/*.tsv and data/*.tar"
        )
    releases = [folder for folder in (data, *sorted(data.glob("reazonspeech-v*"))) if _tables(folder)]
    if len(releases) != 1:
        contents = " and ".join(folder.name for folder in releases) or "no table such as tsv/tiny.tsv"
        raise DataError(
            f"{data}: found {contents}; set data= to the folder of one release, with tsv/*.tsv and data/*.tar"
        )
    tables = _tables(releases[0])
    if subset not in tables:
        available = ", ".join(sorted(tables))
        raise DataError(f"{releases[0]}: table {subset}.tsv not found; available subsets: {available}")
    shards = releases[0] / "data"
    return tables[subset], shards if shards.is_dir() else releases[0]


def _tables(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in (*folder.glob("*.tsv"), *folder.glob("tsv/*.tsv"))}


def _match_captions(
    path: Path, index: dict[str, Any], texts: dict[str, str], table: Path
) -> tuple[Utterances, list[Rejected]]:
    """Return the recordings in a shard that have a caption, and the rejected recordings and captions.

    This empties `texts`.
    """
    rejected = [Rejected(*item) for item in index["broken"]]
    for name, _, _ in index["broken"]:
        texts.pop(name, None)
    captioned = set(texts)
    matched: list[int] = []
    captions: list[str] = []
    for row, name in enumerate(index["names"]):
        text = texts.pop(name, None)
        if text is None:
            reason = "duplicate name" if name in captioned else "no caption"
            rejected.append(Rejected(name, reason, str(path)))
            continue
        matched.append(row)
        captions.append(text)
    rejected += [Rejected(name, "no audio in its shard", table.name) for name in texts]
    columns = (np.array(index[name], np.int64)[matched] for name in ("offsets", "lengths", "n_samples"))
    ids = [index["names"][row].rpartition(".")[0] or index["names"][row] for row in matched]
    return Utterances(str(path), ids, *columns, captions), rejected


def _assign_splits(rows: Utterances, n_before: int, config: Config) -> Iterator[Utterances]:
    """Assign rows to dev, test and train by position, given that `n_before` rows precede them."""
    bounds = np.clip(np.array([0, config.dev, config.dev + config.test]) - n_before, 0, len(rows)).tolist()
    for split, first, last in zip(("dev", "test", "train"), bounds, [*bounds[1:], len(rows)], strict=True):
        if last - first == len(rows) > 0:  # all rows belong to one split, which is almost always the case
            yield replace(rows, split=split)
        elif first < last:
            yield rows.take(np.arange(first, last), split)


@dataclass
class Captions:
    """The captions in a table, read shard by shard.

    The rows may have any order. Only their positions are kept in memory.
    """

    table: Path
    # Shard -> start byte, end byte and first line of each run of consecutive rows.
    runs: dict[str, array] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)  # rows without a valid shard name

    def __post_init__(self) -> None:
        last, run, end = b"", array("q"), 0
        with open(self.table, "rb") as file:
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                shard = line.removeprefix(b"./").partition(b"/")[0]
                if shard == last:
                    run[-2] = end
                elif _SHARD.fullmatch(shard):
                    run = self.runs.setdefault(shard.decode(), array("q"))
                    run.extend((start, end, number))
                    last = shard
                else:
                    last = b""
                    if line.strip():
                        detail = f"{self.table.name}:{number}: {line[:60]!r}"
                        self.rejected.append(Rejected(f"line {number}", "row without a shard", detail))

    def count(self, shard: str) -> int:
        """Return the number of rows for a shard."""
        return sum(block.count(b"\n") + (not block.endswith(b"\n")) for block, _ in self._blocks(shard))

    def of(self, shard: str) -> tuple[dict[str, str], list[Rejected]]:
        """Return the captions for a shard, keyed by recording name, and the unusable rows."""
        texts: dict[str, str] = {}
        rejected: list[Rejected] = []
        for block, first in self._blocks(shard):
            for number, line in enumerate(block.removesuffix(b"\n").split(b"\n"), first):
                raw, tab, caption = line.rstrip(b"\r").partition(b"\t")
                name, reason = raw.decode("utf-8", "backslashreplace").removeprefix("./"), ""
                try:
                    text = caption.decode()
                except UnicodeDecodeError:
                    reason, text = "caption that is not UTF-8", ""
                if not tab:
                    reason = "row without a tab"
                elif name in texts:
                    reason = "duplicate row"
                if reason:
                    rejected.append(Rejected(name, reason, f"{self.table.name}:{number}"))
                else:
                    texts[name] = text
        return texts, rejected

    def _blocks(self, shard: str) -> Iterator[tuple[bytes, int]]:
        run = self.runs[shard]
        with open(self.table, "rb") as file:
            for start, end, number in zip(run[::3], run[1::3], run[2::3], strict=True):
                file.seek(start)
                yield file.read(end - start), number
