"""A corpus folder becomes a manifest, through the recipe's own reader.

Reads   the corpus, with `prepare()` of `recipes/<recipe>/prepare.py`
Writes  manifest.arrow, rejected.jsonl (what was dropped and why), work/ (audio that the recipe made, and
        which recordings of archives were decoded)

    python -m jahubert.run recipe=tofugu stage=prepare data=/path/to/japanese-vocabulary-pronunciation-audio
"""

from __future__ import annotations

import json
import logging
import os
import shlex
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from jahubert.audio import audio_length
from jahubert.errors import AudioError
from jahubert.frames import HUBERT
from jahubert.train.data.decode_cache import DecodeCache, DecodeRecorder
from jahubert.train.data.manifest import Manifest, Rejected, Utterance, Utterances, write_manifest
from jahubert.train.data.utterances import load_utterance
from jahubert.train.experiment import distributed, provenance
from jahubert.train.experiment.config import config_group, runtime_field, structure
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.registry import recipe_reader

log = logging.getLogger(__name__)

VERSION = 1
_AHEAD = 256  # utterances that may wait to be checked


@dataclass(frozen=True)
class Config:
    recipe: str  # a name under recipes/, or a folder with a prepare.py
    data: str | None = None  # the corpus folder
    options: Any = config_group(
        lambda values: recipe_reader(values["recipe"], "Config") if values["recipe"] else None
    )
    seed: int = 0
    # Decode every utterance once, and leave out what is broken: here, and not after a day of work, is the
    # time to learn of it. Of sound audio comes the same manifest with and without.
    check_audio: bool = runtime_field(True)


def run(config: Config, out: Path) -> dict[str, Any]:
    return distributed.rank0_broadcast(lambda: prepare(config, out))


def prepare(config: Config, out: Path) -> dict[str, Any]:
    """The work of the stage, which one process does."""
    options, read = config.options, recipe_reader(config.recipe, "prepare")
    if isinstance(options, Mapping):  # made without a recipe's tree of settings
        options = structure(options, recipe_reader(config.recipe, "Config"), "prepare.options")
    data = Path(config.data).expanduser() if config.data else None  # "" too, which would be this folder
    work = out / "work"
    work.mkdir(exist_ok=True)
    marks = DecodeCache(work / "decoded") if config.check_audio else None
    items = usable(read(data, work, options, config.seed), config.check_audio, marks)
    with progress("reading the corpus", "utterances") as done:  # how many there are, no recipe knows
        counts = write_manifest(out / "manifest.arrow", _counted(items, done))
    if counts["rejected"]:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counts["rejected"].items())
        log.warning("left out %d (%s); see %s/rejected.jsonl", sum(counts["rejected"].values()), reasons, out)
    # A corpus or its reader can change without any setting: what comes after depends on what was read.
    return counts | {"content": Manifest(out / "manifest.arrow").fingerprint}


def kept(config: Config, out: Path) -> None:
    """Warn of files that were missing when the manifest was made and are there now."""
    came = []
    if not (out / "rejected.jsonl").is_file():
        return  # a folder that somebody tidied up
    with open(out / "rejected.jsonl", encoding="utf-8") as file:
        for line in file:
            if '"missing"' in line and Path(path := json.loads(line).get("missing", "")).is_file():
                came.append(path)
    if came:
        records = " ".join(shlex.quote(str(out / name)) for name in (provenance.DONE, provenance.STARTED))
        log.warning(
            "%s is without %d files that were missing and are there now, such as %s. To take them in:\n"
            "  rm -f %s\nand the same command again, which reads and decodes only what is new. What was made "
            "from the shorter manifest is then refused, as after any change of the data",
            out,
            len(came),
            came[0],
            records,
        )


def usable(
    items: Iterable[Utterance | Utterances | Rejected],
    check_audio: bool = True,
    marks: DecodeCache | None = None,
) -> Iterator[Utterance | Utterances | Rejected]:
    """What the recipe gave, in its order; utterances whose audio is of no use come back as `Rejected`.

    `Utterances` come back whole without `check_audio`, else one by one. With `marks`, what was decoded
    before is not decoded again.
    """
    waiting: deque[tuple[Future[Utterance | Rejected], DecodeRecorder | None]] = deque()

    def first() -> Utterance | Rejected:
        future, mark = waiting.popleft()
        result = future.result()
        if mark is not None:
            mark.add(result)
        return result

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for item in items:
            whole = _without_decoding(item, check_audio, marks) if isinstance(item, Utterances) else None
            if whole is not None:
                while waiting:
                    yield first()
                yield from whole
                continue
            mark = DecodeRecorder(marks, item) if marks and isinstance(item, Utterances) else None
            for single in item if isinstance(item, Utterances) else (item,):
                waiting.append((pool.submit(_checked, single, check_audio), mark))
                if len(waiting) == _AHEAD:
                    yield first()
        while waiting:
            yield first()


def _without_decoding(
    items: Utterances, check_audio: bool, marks: DecodeCache | None
) -> Iterable[Utterance | Utterances | Rejected] | None:
    """What is usable of many, where that is known; None where they must be decoded."""
    if not check_audio:
        return _long_enough(items)
    found = marks.lookup(items) if marks else None
    # One by one, as if they had been decoded: the manifest's fingerprint is over what it was given.
    return None if found is None else chain(*found)


def _counted(
    items: Iterable[Utterance | Utterances | Rejected], done: Callable[[int], None]
) -> Iterator[Utterance | Utterances | Rejected]:
    for item in items:
        done(len(item) if isinstance(item, Utterances) else 1)
        yield item


def _long_enough(items: Utterances) -> Iterator[Utterances | Rejected]:
    short_N = items.n_samples_N < HUBERT.n_samples(1)
    for i in np.flatnonzero(short_N):
        yield _checked(items[int(i)], False)  # type: ignore[misc]
    yield items.take(np.flatnonzero(~short_N)) if short_N.any() else items


def _checked(item: Utterance | Rejected, check_audio: bool) -> Utterance | Rejected:
    if isinstance(item, Rejected):
        return item
    try:
        if item.n_samples == 0:
            item = replace(item, n_samples=audio_length(item.audio) - item.start)
        if item.n_samples < HUBERT.n_samples(1):
            return Rejected(item.id, "shorter than one frame", f"{item.n_samples} samples of {item.audio}")
        if check_audio:
            load_utterance(item)
    except AudioError as error:
        return Rejected(item.id, "unusable audio", str(error))
    return item
