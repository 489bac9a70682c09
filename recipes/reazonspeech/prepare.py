"""ReazonSpeech (Reazon Human Interaction Laboratory), v1 and v2 of any size: television speech with captions.

Reads `tsv/<subset>.tsv` (name, tab, caption; no header) and `data/000.tar` ... `data/fff.tar` as they were
downloaded. Nothing is unpacked: the manifest points into the shards. Captions are kept as text; pretraining
does not look at them, and stage=targets reads them into phones.
"""

from __future__ import annotations

import logging
import os
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tar_index import indexed

from jahubert.errors import ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.manifest import Rejected, Utterances

log = logging.getLogger(__name__)

_SHARD = re.compile(rb"[0-9a-f]{3}")
_SAY_EVERY = 256  # shards


@dataclass(frozen=True)
class Config:
    subset: str = "all"  # tiny, small, medium, large or all: the name of a .tsv
    dev: int = 1000  # utterances, the first ones
    test: int = 100  # the next ones
    processes: int = 0  # that index shards; 0: one for each core

    def __post_init__(self) -> None:
        if min(self.dev, self.test, self.processes) < 0:
            raise ConfigError(f"dev, test and processes must not be negative; found {self}")


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterances | Rejected]:
    """Yield the recordings shard by shard, `<shard>/<name>`, and what had to be left out.

    `work/index` keeps where the members of each shard lie: a run that was stopped goes on from there, and a
    shard that came later is the only one to be read.

    Raises:
        DataError: no table of that subset, or none of its shards.
    """
    table, folder = find_release(data, config.subset)
    captions = Captions(table)
    yield from captions.rejected
    there = {name: folder / f"{name}.tar" for name in sorted(captions.runs)}
    for name in [name for name, path in there.items() if not path.is_file()]:
        detail = f"{captions.count(name)} rows of {table.name}"
        yield Rejected(f"{name}.tar", "shard that is not there", detail, missing=str(there[name].absolute()))
        del there[name]
    if not there:
        raise DataError(
            f"{folder}: none of the {len(captions.runs)} shards of {table.name} is there, such as "
            f"{next(iter(sorted(captions.runs)), '000')}.tar; download them beside the table"
        )
    done = n_samples = 0
    indices = indexed(list(there.values()), work / "index", config.processes or os.cpu_count() or 1)
    for number, ((name, path), index) in enumerate(zip(there.items(), indices, strict=True), 1):
        texts, rejected = captions.of(name)
        rows, more = _joined(path, index, texts, table)
        yield from (*rejected, *more)
        yield from _in_splits(rows, done, config)
        done, n_samples = done + len(rows), n_samples + int(rows.n_samples_N.sum())
        if number % _SAY_EVERY == 0 or number == len(there):
            hours = n_samples / SAMPLE_RATE / 3600
            log.info(
                f"reazonspeech: {number:,} of {len(there):,} shards, {done:,} utterances, {hours:,.2f} h"
            )


def find_release(data: Path | None, subset: str) -> tuple[Path, Path]:
    """The table of a subset, and the folder of the shards, in a release or in the folder that holds one."""
    if data is None:
        raise DataError(
            "data= is missing: recipe reazonspeech needs data=FOLDER, a release with tsv/*.tsv and data/*.tar"
        )
    releases = [folder for folder in (data, *sorted(data.glob("reazonspeech-v*"))) if _tables(folder)]
    if len(releases) != 1:
        found = " and ".join(folder.name for folder in releases) or "no table such as tsv/tiny.tsv"
        raise DataError(
            f"{data}: {found} here; give data=FOLDER with tsv/*.tsv and data/*.tar of one release"
        )
    tables = _tables(releases[0])
    if subset not in tables:
        raise DataError(f"{releases[0]}: no table {subset}.tsv; subset can be {', '.join(sorted(tables))}")
    shards = releases[0] / "data"
    return tables[subset], shards if shards.is_dir() else releases[0]


def _tables(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in (*folder.glob("*.tsv"), *folder.glob("tsv/*.tsv"))}


def _joined(
    path: Path, index: dict[str, Any], texts: dict[str, str], table: Path
) -> tuple[Utterances, list[Rejected]]:
    """The recordings of a shard that have a caption, and what is left of both; empties `texts`."""
    rejected = [Rejected(*item) for item in index["broken"]]
    for name, _, _ in index["broken"]:
        texts.pop(name, None)
    captioned = set(texts)
    kept: list[int] = []
    captions: list[str] = []
    for row, name in enumerate(index["names"]):
        text = texts.pop(name, None)
        if text is None:
            reason = "name that comes twice" if name in captioned else "no caption"
            rejected.append(Rejected(name, reason, str(path)))
            continue
        kept.append(row)
        captions.append(text)
    rejected += [Rejected(name, "no audio in its shard", table.name) for name in texts]
    columns = (np.array(index[name], np.int64)[kept] for name in ("offsets", "lengths", "n_samples"))
    ids = [index["names"][row].rpartition(".")[0] or index["names"][row] for row in kept]
    return Utterances(str(path), ids, *columns, captions), rejected


def _in_splits(rows: Utterances, done: int, config: Config) -> Iterator[Utterances]:
    """The rows, of which `done` others came before, as dev, test and train."""
    bounds = np.clip(np.array([0, config.dev, config.dev + config.test]) - done, 0, len(rows)).tolist()
    for split, first, last in zip(("dev", "test", "train"), bounds, [*bounds[1:], len(rows)], strict=True):
        if first < last:
            yield rows.take(range(first, last), split)


@dataclass
class Captions:
    """A table of captions that is read shard by shard: only where the rows of each shard are is kept.

    A table is ordered by shard or not; its rows may be as many as the corpus has.
    """

    table: Path
    # Shard -> first byte, byte behind the end and first line of each run of its rows.
    runs: dict[str, array] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)  # rows that belong to no shard

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
                        self.rejected.append(Rejected(f"line {number}", "row that names no shard", detail))

    def count(self, shard: str) -> int:
        """How many rows a shard has."""
        return sum(block.count(b"\n") + (not block.endswith(b"\n")) for block, _ in self._blocks(shard))

    def of(self, shard: str) -> tuple[dict[str, str], list[Rejected]]:
        """Name -> caption of a shard, and the rows that cannot be used."""
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
                    reason = "row that comes twice"
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
