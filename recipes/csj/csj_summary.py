"""Summary of the prepared splits, with published figures for comparison."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from csj_files import EVALS, TALKS, held_out, read_list

from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.manifest import Utterance

log = logging.getLogger(__name__)


def _hours(hours: int, minutes: int, seconds: int = 0) -> float:
    return hours + minutes / 60 + seconds / 3600


# Other recipes join segments differently, so hours agree within a few percent at best, and numbers of
# utterances are comparable only if the rule is the same. KALDI contains the numbers of utterances without
# masked names in egs/csj/s5, which joins segments by the rule join=kaldi.
KALDI = {"eval1": 1272, "eval2": 1292, "eval3": 1385}
KALDI_DEV = _hours(6, 31)  # hours of the 4,000 development utterances
LHOTSE_DEV = (3743, _hours(6, 40, 15))  # number of utterances, hours
# Hours in icefall (egs/csj/ASR), where utterances may contain silences of up to 1 s.
ICEFALL = {"eval1": _hours(1, 55, 40), "eval2": _hours(2, 2, 7), "eval3": _hours(1, 26, 44)}
PAPER_HOURS = {"core": 32.0, "all": 552.0}  # fine-tuning data in the paper on rinna/japanese-hubert-base


class SummaryOptions(Protocol):
    """Options that determine which published figures are comparable."""

    subset: str
    dev: str
    join: str


@dataclass
class SplitCount:
    """Numbers of talks, utterances, hours and words in a split."""

    talks: set[str] = field(default_factory=set)
    utterances: int = 0
    n_samples: int = 0
    words: int = 0

    @property
    def hours(self) -> float:
        return self.n_samples / SAMPLE_RATE / 3600

    def add(self, item: Utterance, talk: str) -> None:
        self.talks.add(talk)
        self.utterances += 1
        self.n_samples += item.n_samples
        self.words += len(item.words)


def log_summary(counts: Mapping[str, SplitCount], rejected: Counter[str], config: SummaryOptions) -> None:
    """Log the size of every split next to published sizes, the numbers of rejected items, and empty splits.

    The line of a split with an unexpected number of talks is logged as a warning.
    """
    expected = expected_talks(config.subset, config.dev)
    for name, count in counts.items():
        talks = count.talks
        if name == "train" and config.dev == "kaldi":  # the first training utterances are the development set
            talks = talks | counts["dev"].talks
        of_expected = f" of {expected[name]:,}" if name in expected else ""
        log.log(
            logging.WARNING if of_expected and len(talks) != expected[name] else logging.INFO,
            f"csj {name}: talks: {len(talks):,}{of_expected}, utterances: {count.utterances:,}, "
            f"{count.hours:.2f} h, words: {count.words:,}{comparison(name, count, config)}",
        )
    for reason, n in rejected.most_common():
        log.info(f"csj rejected, {reason}: {n:,}")
    if empty := [name for name, count in counts.items() if not count.utterances]:
        log.warning("csj: no utterances in %s", ", ".join(empty))


def expected_talks(subset: str, dev: str) -> dict[str, int]:
    """Return the number of talks in each split of a complete copy of the corpus, where it is known."""
    set_of = held_out(dev)
    expected = {name: sum(other == name for other in set_of.values()) for name in (*EVALS, "dev")}
    if dev == "kaldi":
        del expected["dev"]
    if subset == "core":
        expected["train"] = len(set(read_list("core")) - set_of.keys())
    elif subset == "all":
        expected["train"] = TALKS - len(set_of)
    return expected


def comparison(name: str, count: SplitCount, config: SummaryOptions) -> str:
    """Return a comparison of the size of a split with published sizes, or "" if none is comparable."""
    figures = []  # (source, its figures, quantity, this split's quantity relative to the source's)
    if name in KALDI and config.join == "kaldi":
        ratio = count.utterances / KALDI[name]
        figures.append(("Kaldi", f"{KALDI[name]:,} utterances", "utterances", ratio))
    if name in ICEFALL:
        figures.append(("icefall", f"{ICEFALL[name]:.2f} h", "hours", count.hours / ICEFALL[name]))
    if name == "dev" and config.dev == "lhotse":
        utterances, hours = LHOTSE_DEV
        figures.append(("lhotse", f"{utterances:,} utterances, {hours:.2f} h", "hours", count.hours / hours))
    if name == "dev" and config.dev == "kaldi":
        figures.append(("Kaldi", f"4,000 utterances, {KALDI_DEV:.2f} h", "hours", count.hours / KALDI_DEV))
    if name == "train" and config.subset in PAPER_HOURS:
        hours = PAPER_HOURS[config.subset]
        figures.append(("the paper", f"{hours:.0f} h", "hours", count.hours / hours))
    return "".join(
        f"; {source}: {figure} (this split: {ratio:.1%} of these {quantity})"
        for source, figure, quantity, ratio in figures
    )
