"""Reader for CSJ, the Corpus of Spontaneous Japanese (NINJAL): fine-tuning data and the three test sets.

The recipe reads the USB, DVD and merl layouts (csj_files.py) with SDB, XML or TRN transcripts
(csj_transcripts.py), resolves tags (csj_tags.py), and joins segments with short gaps into utterances
(csj_speech.py). Each word is the phone sequence of a short unit word, or of a phrase in TRN files. The splits
are train, dev, eval1, eval2 and eval3. Phone times in the XML files of core talks are stored as the
alignments of the utterances.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from csj_files import EVALS, Talk, abbreviated, assign_sets, find_talks, read_list
from csj_summary import SplitCount, log_summary
from csj_talks import NO_TIMES, TalkOptions, check_talk, read_talk

from jahubert.errors import ConfigError, DataError
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.data.utterances import UNUSABLE_AUDIO, too_many

log = logging.getLogger(__name__)

_MAX_LISTED = 20  # maximum number of problems in a message


@dataclass(frozen=True)
class Config(TalkOptions):
    subset: str = "core"  # core, all, or a file that lists the training talks, one per line
    dev: Literal["lhotse", "kaldi"] = "lhotse"  # lhotse: 39 talks; kaldi: the first 4,000 training utterances
    # Maximum fraction of damaged talks, and of unreadable segments in the other talks. A larger fraction ends
    # the run. A talk is damaged if it has no usable transcript or audio, or if a larger fraction of its
    # segments is unreadable. A single damaged talk or unreadable segment is accepted, unless max_broken is 0.
    max_broken: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.max_broken <= 1:
            raise ConfigError(f"max_broken must be in [0, 1]; found {self.max_broken}")


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield rejected items, and utterances with the ids `<talk>_<start>_<end>` (times in milliseconds).

    In dialogues, `-L` or `-R` follows the name of the talk.

    All transcripts are checked before any audio is read, so that problems are reported within minutes. The
    test sets are yielded first, followed by dev and by the training talks in random order, so that the first
    part of the training data is a representative sample. With `dev=kaldi`, dev consists of the first
    utterances of the training talks, in order of their ids. Channels of stereo files are written to `work` as
    FLAC files. The numbers of talks, utterances, hours and words in every split are logged.

    Raises:
        DataError: the corpus is not given or not found, the sets are invalid (see `assign_sets`), a file
            cannot be read, or too many segments or talks are unusable.
    """
    if data is None:
        raise DataError("data= is required: the csj recipe needs data=FOLDER, a copy of the corpus")
    talks = find_talks(data)
    sets = assign_sets(talks, config.subset, config.dev)
    if phrases := [talk for talk in sets if list(talks[talk].transcripts) == ["trn"]]:
        log.warning(
            "csj: talks with only a TRN file, whose words are phrases (%d): %s",
            len(phrases),
            abbreviated(phrases),
        )
    unusable, damaged = _check_talks({name: talks[name] for name in sets}, config)
    yield from unusable
    n_kaldi_dev = int(read_list("dev-kaldi")[0]) if config.dev == "kaldi" else 0
    counts = {name: SplitCount() for name in ("train", "dev", *EVALS)}
    rejected = Counter(item.reason for item in unusable)
    skipped = {item.id for item in unusable}
    without_times: list[str] = []
    for talk in _ordered_talks(sets, seed, shuffle=lambda: counts["dev"].utterances >= n_kaldi_dev):
        if talk in skipped:
            continue
        for item in read_talk(talks[talk], work, config):
            if isinstance(item, Rejected):
                rejected[item.reason] += 1
                if item.reason == NO_TIMES:
                    without_times.append(item.detail)
                if item.reason == UNUSABLE_AUDIO:
                    damaged[talk] = item.detail
                    _check_share(damaged, len(sets), config)
                yield item
                continue
            is_kaldi_dev = sets[talk] == "train" and counts["dev"].utterances < n_kaldi_dev
            split = "dev" if is_kaldi_dev else sets[talk]
            counts[split].add(item, talk)
            yield replace(item, split=split)
    if without_times:
        log.warning(
            "csj: number of talks with unreadable phone times: %d; the affected utterances are kept without "
            "an alignment. First problem: %s",
            len(without_times),
            without_times[0],
        )
    log_summary(counts, rejected, config)


def _check_talks(talks: Mapping[str, Talk], config: Config) -> tuple[list[Rejected], dict[str, str]]:
    """Check all files before audio is decoded, and log the problems.

    Returns:
        Unusable talks and duplicate files, and the first problem of each damaged talk. A talk is damaged if
        it is unusable or if the share of its unreadable segments exceeds `max_broken`.

    Raises:
        DataError: too many talks, or segments of the other talks, are damaged (see `too_many`).
    """
    log.info("csj: number of talks whose files are checked: %d", len(talks))
    checks = {id: check_talk(talk, config) for id, talk in talks.items()}
    damaged = {}
    for id, check in checks.items():
        if check.rejected:
            damaged[id] = f"{check.rejected.reason}: {check.rejected.detail}"
        elif too_many(check.n_broken, check.n_segments, config.max_broken):
            counted = f"unreadable segments: {check.n_broken} of {check.n_segments}"
            damaged[id] = f"{counted}; first problem: {check.problems[0]}"
    _check_share(damaged, len(talks), config)
    if damaged:
        log.warning("%s\nTheir unusable utterances are rejected", _damage(damaged, len(talks)))
    if text_problems := [problem for check in checks.values() for problem in check.text_problems]:
        log.warning(
            "csj: number of problems in the orthography, which does not affect phones: %d; the text of the "
            "affected utterances is incomplete. First problem: %s",
            len(text_problems),
            text_problems[0],
        )
    others = [check for id, check in checks.items() if id not in damaged]
    n_segments, n_broken = sum(check.n_segments for check in others), sum(check.n_broken for check in others)
    if n_broken:
        problems = [problem for check in others for problem in check.problems]
        message = f"csj: unreadable segments ({n_broken} of {n_segments}):{_listed(problems)}"
        if too_many(n_broken, n_segments, config.max_broken):
            raise DataError(f"{message}\n{_remedy(config)}")
        log.warning("%s\nThe utterances in these segments are rejected", message)
    unusable = [check.rejected for check in checks.values() if check.rejected]
    return [*unusable, *(copy for check in checks.values() for copy in check.duplicates)], damaged


def _check_share(damaged: Mapping[str, str], n_talks: int, config: Config) -> None:
    """Raise DataError if too many talks are damaged (see `too_many`)."""
    if too_many(len(damaged), n_talks, config.max_broken):
        raise DataError(f"{_damage(damaged, n_talks)}\n{_remedy(config)}")


def _damage(damaged: Mapping[str, str], n_talks: int) -> str:
    problems = [f"{id}: {problem}" for id, problem in damaged.items()]
    return f"csj: damaged talks ({len(damaged)} of {n_talks}):{_listed(problems)}"


def _listed(problems: Sequence[str]) -> str:
    more = ["..."] if len(problems) > _MAX_LISTED else []
    return "".join(f"\n  {problem}" for problem in [*problems[:_MAX_LISTED], *more])


def _remedy(config: Config) -> str:
    return (
        f"Fix the files, or increase prepare.options.max_broken (now {config.max_broken}) to reject only the "
        "affected utterances"
    )


def _ordered_talks(sets: dict[str, str], seed: int, shuffle: Callable[[], bool]) -> Iterator[str]:
    """Yield the talks in the test sets, in dev and in train.

    Training talks are ordered by id until `shuffle` returns True; the remaining ones follow in random order.
    """
    for name in (*EVALS, "dev"):
        yield from (talk for talk in sets if sets[talk] == name)
    remaining = sorted((talk for talk in sets if sets[talk] == "train"), reverse=True)
    while remaining and not shuffle():
        yield remaining.pop()
    random.Random(f"talks {seed}").shuffle(remaining)
    yield from remaining
