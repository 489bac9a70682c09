"""Reader for ReazonSpeech v1 and v2 (Reazon Human Interaction Laboratory): television speech with captions.

The recipe reads `tsv/<subset>.tsv` (name, tab, caption; no header) and `data/000.tar` ... `data/fff.tar` as
downloaded, or the parquet files from the Hugging Face Hub. Tar shards are not unpacked, because the manifest
contains byte ranges. Captions are stored as text, which stage=targets converts to labels and pretraining
ignores.
"""

from __future__ import annotations

import logging
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from parquet_shards import Shard, find_parquet, parquet_subsets, to_tar
from tar_index import DAMAGED, TRUNCATED, index_shards

from jahubert.errors import ConfigError, DataError, ReadError, quote
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch, usable_cores
from jahubert.train.data.manifest import Rejected, Utterances
from jahubert.train.data.utterances import (
    is_file,
    is_folder,
    read_lines,
    read_reliably,
    same_content,
    too_many,
)

log = logging.getLogger(__name__)

_SHARD = re.compile(rb"[0-9a-f]{3}")
_LOG_EVERY = 256  # number of shards between log lines
# Reasons for rejection
NO_AUDIO, NO_CAPTION, INCOMPLETE = "no audio in its shard", "no caption", "incomplete shard"
DAMAGES = (DAMAGED, TRUNCATED, INCOMPLETE)  # reasons that concern a whole shard


@dataclass(frozen=True)
class Config:
    subset: str = "all"  # tiny, small, medium, large or all: name of a table (.tsv) or a parquet folder
    dev: int = 1000  # number of utterances in the dev split, from the start of the corpus
    test: int = 100  # number of utterances in the test split, which follow those of the dev split
    processes: int = 0  # number of processes that index tar shards; 0: one per core
    # Maximum fraction of damaged shards, and maximum fraction of other unusable recordings and table rows. A
    # larger fraction ends the run. A single damaged shard or unusable recording is accepted, unless
    # max_broken is 0.
    max_broken: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.max_broken <= 1:
            raise ConfigError(f"max_broken must be in [0, 1]; found {self.max_broken}")
        if min(self.dev, self.test, self.processes) < 0:
            raise ConfigError(f"dev, test and processes must be at least 0; found {self}")


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterances | Rejected]:
    """Yield recordings with ids `<shard>/<name>` and rejected items, shard by shard.

    The index of each tar shard is stored in `work/index`, and converted parquet shards in `work/shards`. An
    interrupted run can therefore be resumed, and if shards are added, only these are read.

    Raises:
        DataError: the release is not found or ambiguous (see `find_parquet` and `find_release`), all shards
            of the subset are missing, a file cannot be read, or too many shards or recordings are unusable.
        JahubertError: a process that indexes shards failed.
    """
    if data is not None and (parquet := find_parquet(data, config.subset)):
        folder = parquet[0].parent
        if tables := [path for release in dict.fromkeys((data, folder)) for path in _table_files(release)]:
            raise DataError(
                f"{data}: found both parquet files ({parquet[0]}) and the table {tables[0]} of a release "
                "with tar shards; set data= to a folder with one of them"
            )
        log.info("reazonspeech: number of parquet files in %s: %d", folder, len(parquet))
        yield from _prepare_parquet(parquet, work, config)
        return
    table, folder = find_release(data, config.subset)
    captions = Captions(table)
    shards = {name: folder / f"{name}.tar" for name in sorted(captions.runs)}
    for name, path in list(shards.items()):
        if not is_file(path):
            detail = f"rows in {table.name}: {captions.count(name)}"
            yield Rejected(f"{name}.tar", "missing shard", detail, missing=str(path.absolute()))
            del shards[name]
    if not shards:
        example = next(iter(sorted(captions.runs)), "000")
        raise DataError(
            f"{folder}: found no shard of {table.name}, such as {example}.tar; download the shards to this "
            "folder"
        )
    n_rows = n_samples = 0
    limit = _Limit(len(shards), config.max_broken)
    yield from limit.count(captions.rejected)
    indices = index_shards(list(shards.values()), work / "index", config.processes or usable_cores())
    for number, ((name, path), index) in enumerate(zip(shards.items(), indices, strict=True), 1):
        texts, rejected_rows = captions.of(name)
        rows, rejected = _match_captions(path, index, texts, table)
        yield from limit.count([*rejected_rows, *rejected], len(rows), path.name)
        yield from _assign_splits(rows, n_rows, config)
        n_rows += len(rows)
        n_samples += int(rows.n_samples_N.sum())
        if number % _LOG_EVERY == 0 or number == len(shards):
            _log_progress(number, len(shards), n_rows, n_samples)
    limit.check()


def _prepare_parquet(parquet: Sequence[Path], work: Path, config: Config) -> Iterator[Utterances | Rejected]:
    """Convert parquet shards to tar shards in `work/shards`, and yield their recordings."""
    n_rows = n_samples = 0
    copies = list(_find_copies(parquet))
    yield from copies
    parquet = [path for path in parquet if str(path) not in {copy.id for copy in copies}]
    limit = _Limit(len(parquet), config.max_broken)
    convert = partial(_convert, folder=work / "shards")
    for number, (_, shard) in enumerate(prefetch(convert, parquet), 1):
        if isinstance(shard, Rejected):
            yield from limit.count([shard])
            continue
        names, captions = shard.strings("name"), shard.strings("caption")
        yield from limit.count([Rejected(*item) for item in shard.broken], len(names))
        ids = [name.rpartition(".")[0] or name for name in names]
        numbers = (shard.numbers(name) for name in ("offset", "length", "n_samples"))
        yield from _assign_splits(Utterances(str(shard.tar), ids, *numbers, captions), n_rows, config)
        n_rows += len(ids)
        n_samples += int(shard.numbers("n_samples").sum())
        if number % _LOG_EVERY == 0 or number == len(parquet):
            _log_progress(number, len(parquet), n_rows, n_samples)
    limit.check()


def _convert(parquet: Path, folder: Path) -> Shard | Rejected:
    if not is_file(parquet):
        return Rejected(parquet.name, DAMAGED, f"{parquet}: a folder or a broken link, not a file")
    try:
        return to_tar(parquet, folder)
    except ReadError:
        raise
    except DataError as error:
        return Rejected(parquet.name, DAMAGED, str(error))


def _find_copies(parquet: Sequence[Path]) -> Iterator[Rejected]:
    """Yield duplicate files, e.g. from a second download. The file with the shortest name is kept."""
    by_size: dict[int, list[Path]] = {}
    for path in sorted(filter(is_file, parquet), key=lambda path: (len(path.name), path)):
        size = read_reliably(path.stat, path).st_size
        others = by_size.setdefault(size, [])
        if size and (first := next((other for other in others if same_content(path, other)), None)):
            yield Rejected(str(path), "duplicate file", f"same content as {first}")
        else:
            others.append(path)


@dataclass
class _Limit:
    """Numbers of damaged shards and of unusable recordings, whose shares must not exceed `max_broken`."""

    n_shards: int
    max_broken: float
    damaged: list[Rejected] = field(default_factory=list)  # shards
    n_usable: int = 0  # recordings
    n_broken: int = 0  # recordings and table rows
    first_broken: Rejected | None = None

    def count(self, rejected: Sequence[Rejected], n_usable: int = 0, shard: str = "") -> Iterator[Rejected]:
        """Count and yield rejected items, usually all those of one shard.

        If too many captions of an otherwise intact shard have no audio, the shard itself is yielded as well.

        Raises:
            DataError: too many shards are damaged.
        """
        self.n_usable += n_usable
        damage = [item for item in rejected if item.reason in DAMAGES]
        n_lost = sum(item.reason == NO_AUDIO for item in rejected)
        if not damage and too_many(n_lost, n_lost + n_usable, self.max_broken or 1.0):
            detail = f"captions without audio: {n_lost} of {n_lost + n_usable}"
            damage = [Rejected(shard, INCOMPLETE, detail)]
            yield damage[0]
        self.damaged += damage[:1]
        if too_many(len(self.damaged), self.n_shards, self.max_broken):
            raise DataError(self._message(len(self.damaged), self.n_shards, "shards", self.damaged[0]))
        ignored = {*DAMAGES, NO_CAPTION, *([NO_AUDIO] if damage else [])}
        for item in rejected:
            if item.reason not in ignored:
                self.n_broken += 1
                self.first_broken = self.first_broken or item
            yield item

    def check(self) -> None:
        """Raise DataError if too many recordings are unusable, or if damage leaves no recording."""
        total = self.n_broken + self.n_usable
        is_empty = not self.n_usable
        if self.first_broken and (
            too_many(self.n_broken, total, self.max_broken) or (is_empty and not self.damaged)
        ):
            raise DataError(self._message(self.n_broken, total, "recordings", self.first_broken))
        if is_empty and self.damaged:
            raise DataError(self._message(len(self.damaged), self.n_shards, "shards", self.damaged[0]))

    def _message(self, n: int, total: int, items: str, first: Rejected) -> str:
        remedy = "Correct the files or download them again"
        if n < total:
            limit = f"prepare.options.max_broken (now {self.max_broken})"
            remedy += f", or increase {limit} to leave out unusable {items}"
        return (
            f"reazonspeech: unusable {items}: {n} of {total}; first problem: {first.id}: {first.reason} "
            f"({first.detail}). {remedy}"
        )


def _log_progress(n_shards: int, total: int, n_rows: int, n_samples: int) -> None:
    hours = n_samples / SAMPLE_RATE / 3600
    log.info(f"reazonspeech: shards: {n_shards:,} of {total:,}, utterances: {n_rows:,}, {hours:,.2f} h")


def find_release(data: Path | None, subset: str) -> tuple[Path, Path]:
    """Find the table of a subset and the folder of its shards.

    Args:
        data: folder of a release, or the folder that contains it.

    Raises:
        DataError: `data` is None, there is no release or more than one, the table does not exist, or there
            are two tables of this name with different content.
    """
    if data is None:
        raise DataError(
            "data= is required: the reazonspeech recipe needs data=FOLDER with tsv/*.tsv and data/*.tar, or "
            "with parquet files"
        )
    releases = [folder for folder in (data, *sorted(data.glob("reazonspeech-v*"))) if _tables(folder)]
    if not releases and (others := parquet_subsets(data)):
        raise DataError(
            f"{data}: no parquet files for subset={subset}; set it to one of: {', '.join(others)}"
        )
    if len(releases) != 1:
        contents = " and ".join(folder.name for folder in releases) or "no table such as tsv/tiny.tsv"
        raise DataError(
            f"{data}: found {contents}; set data= to the folder of one release, with tsv/*.tsv and "
            "data/*.tar, or with parquet files"
        )
    tables = _tables(releases[0])
    copies = [path for path in _table_files(releases[0]) if path.stem == subset]
    if len(copies) > 1 and not same_content(*copies):
        raise DataError(f"{copies[0]} and {copies[1]} have different content; remove one of them")
    if subset not in tables:
        available = ", ".join(sorted(tables))
        raise DataError(f"{releases[0]}: table {subset}.tsv not found; available subsets: {available}")
    shards = releases[0] / "data"
    return tables[subset], shards if is_folder(shards) else releases[0]


def _tables(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in _table_files(folder)}


def _table_files(folder: Path) -> list[Path]:
    return [*folder.glob("*.tsv"), *folder.glob("tsv/*.tsv")]


def _match_captions(
    path: Path, index: dict[str, Any], texts: dict[str, str], table: Path
) -> tuple[Utterances, list[Rejected]]:
    """Return the recordings in a shard that have a caption, and the rejected recordings and captions.

    The captions of the recordings are removed from `texts`.
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
            reason = "duplicate name" if name in captioned else NO_CAPTION
            rejected.append(Rejected(name, reason, str(path)))
            continue
        matched.append(row)
        captions.append(text)
    rejected += [Rejected(name, NO_AUDIO, table.name) for name in texts]
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
    # Rows without a valid shard name, and a last row without a line end, which may be truncated.
    rejected: list[Rejected] = field(default_factory=list)

    def __post_init__(self) -> None:
        last, run, end = b"", array("q"), 0
        for number, line in enumerate(read_lines(self.table), 1):
            start, end = end, end + len(line)
            shard = line.removeprefix(b"./").partition(b"/")[0] if line.endswith(b"\n") else b""
            if shard == last != b"":
                run[-2] = end
            elif _SHARD.fullmatch(shard):
                run = self.runs.setdefault(shard.decode(), array("q"))
                run.extend((start, end, number))
                last = shard
            else:
                last = b""
                if line.strip():
                    detail = f"{self.table.name}:{number}: {quote(line)}"
                    reason = "row without a shard" if line.endswith(b"\n") else "row without a line end"
                    self.rejected.append(Rejected(f"line {number}", reason, detail))

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
        for start, end, number in zip(run[::3], run[1::3], run[2::3], strict=True):
            yield read_reliably(partial(self._read, start, end), self.table), number

    def _read(self, start: int, end: int) -> bytes:
        with open(self.table, "rb") as file:
            file.seek(start)
            return file.read(end - start)
