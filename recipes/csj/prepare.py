"""CSJ, the Corpus of Spontaneous Japanese (NINJAL): fine-tuning and the three test sets.

Reads the USB, DVD and merl layouts (csj_files.py); SDB where it is, else XML, else TRN
(csj_transcripts.py); tags become phones by the options of csj_tags.py. Segments with little silence between
them are joined to utterances. Words are short units as phones; splits are train, dev, eval1, eval2, eval3.
Where a talk has an XML with phone times (the core), they become the alignment of its utterances.
"""

from __future__ import annotations

import logging
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from csj_files import EVALS, Talk, find_talks, read_list, sets_of
from csj_summary import Count, log_summary
from csj_talks import NO_TIMES, Reading, problems_of, read_talk

from jahubert.errors import DataError
from jahubert.train.data.manifest import Rejected, Utterance

log = logging.getLogger(__name__)

_SHOWN = 20  # places that an error lists


@dataclass(frozen=True)
class Config(Reading):
    subset: str = "core"  # core, all, or a file with the talks to train on, one a line
    dev: Literal["lhotse", "kaldi"] = "lhotse"  # 39 talks, or the first 4,000 utterances of the training data
    broken: Literal["stop", "drop"] = "stop"  # where a transcript cannot be read


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield `<talk>_<start>_<end>` (milliseconds; `<talk>-L` in dialogues), and what had to be left out.

    All transcripts are read once before any audio is, so that what is wrong with them is known in minutes.
    The test sets come first, then dev, then the training talks in random order, so that the first part of
    the training data is a fair sample of it. The two channels of a stereo file go to `work`, one FLAC each.
    Logs talks, utterances, hours and words of every split.

    Raises:
        DataError: no corpus; a talk in two sets, or a held-out one in training; transcripts that cannot be
            read, unless broken=drop.
    """
    if data is None:
        raise DataError(
            "data= is missing: recipe csj needs data=FOLDER, a copy of the Corpus of Spontaneous Japanese"
        )
    talks = find_talks(data)
    sets = sets_of(talks, config.subset, config.dev)
    if phrases := [talk for talk in sets if list(talks[talk].transcripts) == ["trn"]]:
        shown = " ".join(phrases[:5])
        log.warning("csj: %d talks have only a TRN, whose words are phrases: %s ...", len(phrases), shown)
    if config.broken == "stop":
        _refuse_broken({name: talks[name] for name in sets}, config)
    first = int(read_list("dev-kaldi")[0]) if config.dev == "kaldi" else 0
    counts = {name: Count() for name in ("train", "dev", *EVALS)}
    dropped: Counter[str] = Counter()
    without_times: list[str] = []
    for talk in _in_order(sets, seed, shuffled=lambda: counts["dev"].utterances >= first):
        for item in read_talk(talks[talk], work, config):
            if isinstance(item, Rejected):
                dropped[item.reason] += 1
                without_times += [item.detail] if item.reason == NO_TIMES else []
                yield item
                continue
            split = "dev" if sets[talk] == "train" and counts["dev"].utterances < first else sets[talk]
            counts[split].add(item, talk)
            yield replace(item, split=split)
    if without_times:
        log.warning(
            "csj: phone times of %d talks cannot be read in full; utterances there have none, and lose "
            "nothing else. The first: %s",
            len(without_times),
            without_times[0],
        )
    log_summary(counts, dropped, config)


def _refuse_broken(talks: Mapping[str, Talk], config: Config) -> None:
    """Raise DataError with the places where transcripts cannot be read, if there are any."""
    log.info("csj: reading the transcripts of %d talks, before any audio", len(talks))
    found = {name: problems for name, talk in talks.items() if (problems := problems_of(talk, config))}
    if not found:
        return
    problems = [problem for name in found for problem in found[name]]
    shown = "\n  ".join(problems[:_SHOWN]) + "\n  ..." * (len(problems) > _SHOWN)
    raise DataError(
        f"transcripts of {len(found)} talks cannot be read, at {len(problems)} places:\n  {shown}\n"
        "Mend the files, or leave these utterances out with prepare.options.broken=drop"
    )


def _in_order(sets: dict[str, str], seed: int, shuffled: Callable[[], bool]) -> Iterator[str]:
    """Talks: test sets, dev, then training talks, by their ids and, once `shuffled` says so, at random."""
    for name in (*EVALS, "dev"):
        yield from (talk for talk in sets if sets[talk] == name)
    waiting = sorted((talk for talk in sets if sets[talk] == "train"), reverse=True)
    while waiting and not shuffled():
        yield waiting.pop()
    random.Random(f"talks {seed}").shuffle(waiting)
    yield from waiting
