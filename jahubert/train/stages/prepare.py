"""A corpus folder becomes a manifest, through the recipe's own reader.

Reads   the corpus, with `prepare()` of `recipes/<recipe>/prepare.py`
Writes  manifest.arrow, rejected.jsonl (what was dropped and why), work/ (audio that the recipe made)

    python -m jahubert.run recipe=tofugu stage=prepare data=/path/to/japanese-vocabulary-pronunciation-audio
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from jahubert.audio import audio_length
from jahubert.errors import AudioError
from jahubert.frames import HUBERT
from jahubert.train import ranks
from jahubert.train.config import free, group, structure
from jahubert.train.lookup import reader
from jahubert.train.manifest import Manifest, Rejected, Utterance, Utterances, load_utterance, write_manifest

log = logging.getLogger(__name__)

VERSION = 1
_AHEAD = 256  # utterances that may wait to be checked


@dataclass(frozen=True)
class Config:
    recipe: str  # a name under recipes/, or a folder with a prepare.py
    data: str | None = None  # the corpus folder
    options: Any = group(lambda values: reader(values["recipe"], "Config") if values["recipe"] else None)
    seed: int = 0
    # Decode every utterance once, and leave out what is broken: here, and not after a day of work, is the
    # time to learn of it. Of sound audio comes the same manifest with and without.
    check_audio: bool = free(True)


def run(config: Config, out: Path) -> dict[str, Any]:
    return ranks.from_first(lambda: prepare(config, out))


def prepare(config: Config, out: Path) -> dict[str, Any]:
    """The work of the stage, which one process does."""
    options, read = config.options, reader(config.recipe, "prepare")
    if isinstance(options, Mapping):  # made without a recipe's tree of settings
        options = structure(options, reader(config.recipe, "Config"), "prepare.options")
    data = None if config.data is None else Path(config.data).expanduser()
    work = out / "work"
    work.mkdir(exist_ok=True)
    items = usable(read(data, work, options, config.seed), config.check_audio)
    counts = write_manifest(out / "manifest.arrow", items)
    if counts["rejected"]:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counts["rejected"].items())
        log.warning("left out %d (%s); see %s/rejected.jsonl", sum(counts["rejected"].values()), reasons, out)
    # A corpus or its reader can change without any setting: what comes after depends on what was read.
    return counts | {"content": Manifest(out / "manifest.arrow").fingerprint}


def usable(
    items: Iterable[Utterance | Utterances | Rejected], check_audio: bool = True
) -> Iterator[Utterance | Utterances | Rejected]:
    """What the recipe gave, in its order; utterances whose audio is of no use come back as `Rejected`.

    `Utterances` come back whole where nothing is to be decoded, else one by one.
    """
    waiting: deque[Future[Utterance | Rejected]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for item in items:
            if isinstance(item, Utterances) and not check_audio:
                while waiting:
                    yield waiting.popleft().result()
                yield from _long_enough(item)
                continue
            for single in item if isinstance(item, Utterances) else (item,):
                waiting.append(pool.submit(_checked, single, check_audio))
                if len(waiting) == _AHEAD:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


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
