"""Conversion of a corpus into a manifest by the reader in its recipe.

Reads   the corpus, through `prepare()` in `recipes/<recipe>/prepare.py`
Writes  manifest.arrow, rejected.jsonl (rejected utterances with reasons), work/ (audio that the recipe
        creates, and the cache of decoding checks)

    python -m jahubert.run recipe=tofugu stage=prepare data=/path/to/japanese-vocabulary-pronunciation-audio
"""

from __future__ import annotations

import json
import logging
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
from jahubert.errors import AudioError, DataError
from jahubert.frames import HUBERT
from jahubert.prefetch import usable_cores
from jahubert.train.data.decode_cache import DecodeCache, DecodeRecorder
from jahubert.train.data.manifest import Manifest, Rejected, Utterance, Utterances, write_manifest
from jahubert.train.data.utterances import (
    DECODING_THREADS,
    UNUSABLE_AUDIO,
    load_utterance,
    read_reliably,
    too_many,
)
from jahubert.train.experiment import distributed, provenance
from jahubert.train.experiment.config import (
    config_group,
    expand_user,
    raise_config_errors,
    runtime_field,
    seed_field,
    structure,
)
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.registry import generates_corpus, recipe_reader

log = logging.getLogger(__name__)

VERSION = 1
_MAX_PENDING = 256  # maximum number of utterances queued for checking


@dataclass(frozen=True)
class Config:
    recipe: str  # name of a folder in recipes/, or path of a folder with recipe.yaml and prepare.py
    # Folder of the corpus, or a file that describes it; null if the recipe generates the corpus.
    data: str | None = None
    # Options of the recipe, declared by the `Config` in its prepare.py.
    options: Any = config_group(
        lambda values: recipe_reader(values["recipe"], "Config") if values["recipe"] else None
    )
    seed: int = seed_field()  # random seed that is passed to the recipe
    # Whether to decode every utterance and reject broken audio now, rather than fail during training. If all
    # audio is intact, the manifest lists the same utterances in both cases.
    check_audio: bool = runtime_field(True)
    # Maximum share of utterances that may be rejected for unusable audio. If this share is exceeded and more
    # than one such utterance is rejected, the stage ends with an error. 0: any unusable audio is an error.
    max_unusable: float = runtime_field(0.05)

    def __post_init__(self) -> None:
        if not 0 <= self.max_unusable <= 1:
            raise_config_errors([f"max_unusable must be in [0, 1]; found {self.max_unusable}"])
        if self.recipe and self.data and generates_corpus(self.recipe):
            raise_config_errors(
                [f"data is {self.data}, but the {self.recipe} recipe generates its corpus: omit data="]
            )


def run(config: Config, out: Path) -> dict[str, Any]:
    return distributed.rank0_broadcast(lambda: prepare(config, out))


def prepare(config: Config, out: Path) -> dict[str, Any]:
    """Read the corpus and write the manifest. Only rank 0 calls this."""
    options, read = config.options, recipe_reader(config.recipe, "prepare")
    if isinstance(options, Mapping):  # the config was created without `structure`, e.g. in a test
        options = structure(options, recipe_reader(config.recipe, "Config"), "prepare.options")
    data = expand_user(config.data) if config.data else None  # "" would mean the current folder
    work = out / "work"
    work.mkdir(exist_ok=True)
    cache = DecodeCache(work / "decoded") if config.check_audio else None
    items = check_items(read(data, work, options, config.seed), config.check_audio, cache)
    with progress("reading the corpus", "utterances") as done:  # the total number is unknown
        counts = write_manifest(out / "manifest.arrow", _counted(items, done))
    if counts["rejected"]:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counts["rejected"].items())
        log.warning(
            "rejected utterances: %d (%s); see %s/rejected.jsonl",
            sum(counts["rejected"].values()),
            reasons,
            out,
        )
    n_unusable = counts["rejected"].get(UNUSABLE_AUDIO, 0)
    n_audio = n_unusable + counts["utterances"]
    if too_many(n_unusable, n_audio, config.max_unusable):
        raise DataError(
            f"the audio of {n_unusable} of {n_audio} utterances is unusable; see {out}/rejected.jsonl. "
            f"Replace the files, or increase prepare.max_unusable (now {config.max_unusable:g}) to leave out "
            "utterances with unusable audio"
        )
    # The fingerprint is recorded, because the corpus or its reader may change while all settings stay the
    # same.
    return counts | {"content": Manifest(out / "manifest.arrow").fingerprint}


def kept(config: Config, out: Path) -> None:
    """Warn about files that were missing when the manifest was created but exist now."""
    new_files = []
    if not (out / "rejected.jsonl").is_file():
        return  # the user has deleted the list
    with open(out / "rejected.jsonl", encoding="utf-8") as file:
        for line in file:
            if '"missing"' in line and Path(path := json.loads(line).get("missing", "")).is_file():
                new_files.append(path)
    if new_files:
        records = " ".join(shlex.quote(str(out / name)) for name in (provenance.DONE, provenance.STARTED))
        log.warning(
            "%s: files that were missing when the manifest was created exist now: %d, for example %s. To add "
            "them, run\n  rm -f %s\nand rerun the same command; only new files are read. Then rerun the "
            "stages that used the old manifest",
            out,
            len(new_files),
            new_files[0],
            records,
        )


def check_items(
    items: Iterable[Utterance | Utterances | Rejected],
    check_audio: bool = True,
    cache: DecodeCache | None = None,
) -> Iterator[Utterance | Utterances | Rejected]:
    """Yield the items from a recipe in order, with a `Rejected` for each unusable utterance.

    Args:
        check_audio: whether to decode every utterance. The recordings of `Utterances` are then yielded one by
            one.
        cache: results of earlier decoding checks, which are not repeated.
    """
    pending: deque[tuple[Future[Utterance | Rejected], DecodeRecorder | None]] = deque()

    def next_result() -> Utterance | Rejected:
        future, recorder = pending.popleft()
        result = future.result()
        if recorder is not None:
            recorder.add(result)
        return result

    with ThreadPoolExecutor(min(DECODING_THREADS, usable_cores())) as pool:
        for item in items:
            checked = _without_decoding(item, check_audio, cache) if isinstance(item, Utterances) else None
            if checked is not None:
                while pending:
                    yield next_result()
                yield from checked
                continue
            recorder = DecodeRecorder(cache, item) if cache and isinstance(item, Utterances) else None
            for single in item if isinstance(item, Utterances) else (item,):
                pending.append((pool.submit(_checked, single, check_audio), recorder))
                if len(pending) == _MAX_PENDING:
                    yield next_result()
        while pending:
            yield next_result()


def _without_decoding(
    items: Utterances, check_audio: bool, cache: DecodeCache | None
) -> Iterable[Utterance | Utterances | Rejected] | None:
    """Return the checked items if no decoding is necessary, otherwise None."""
    if not check_audio:
        return _long_enough(items)
    cached = cache.lookup(items) if cache else None
    # The utterances are yielded one by one, as after decoding, so that the manifest has the same fingerprint.
    return None if cached is None else chain(*cached)


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
        "\n".join((item.id, item.audio.path, item.text, item.speaker)).encode()
    except UnicodeEncodeError:
        return Rejected(item.id, "name or text is not Unicode", str(item.audio))
    try:
        if item.n_samples == 0:
            length = read_reliably(lambda: audio_length(item.audio), item.audio)
            item = replace(item, n_samples=length - item.start)
        if item.n_samples < HUBERT.n_samples(1):
            return Rejected(item.id, "shorter than one frame", f"{item.n_samples} samples of {item.audio}")
        if check_audio:
            read_reliably(lambda: load_utterance(item), item.audio)
    except AudioError as error:  # the recording is broken; a file system error would end the stage
        return Rejected(item.id, UNUSABLE_AUDIO, str(error))
    return item
