"""What was prepared, beside what is known of the corpus from its makers and from other recipes."""

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


# Each recipe joins segments by a rule of its own, so hours agree within some percent at best, and numbers of
# utterances only where the rule is the same. Kaldi: egs/csj/s5, masked names left out, as join=kaldi does.
KALDI = {"eval1": 1272, "eval2": 1292, "eval3": 1385}
KALDI_DEV = _hours(6, 31)  # of 4,000 utterances
LHOTSE_DEV = (3743, _hours(6, 40, 15))
# icefall (egs/csj/ASR): silences up to 1 s inside.
ICEFALL = {"eval1": _hours(1, 55, 40), "eval2": _hours(2, 2, 7), "eval3": _hours(1, 26, 44)}
PAPER_HOURS = {"core": 32.0, "all": 552.0}  # of rinna/japanese-hubert-base


class Chosen(Protocol):
    """The options that decide what can be compared."""

    subset: str
    dev: str
    join: str


@dataclass
class Count:
    """What the summary says of a split."""

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


def log_summary(counts: Mapping[str, Count], dropped: Counter[str], config: Chosen) -> None:
    """Say what every split has and should have, and what was left out; warn of talks that are missing."""
    expected = expected_talks(config.subset, config.dev)
    for name, count in counts.items():
        # The first utterances of the training data are the development set: their talks belong together.
        talks = (
            count.talks | counts["dev"].talks if name == "train" and config.dev == "kaldi" else count.talks
        )
        of = f" of {expected[name]:,}" if name in expected else ""
        log.log(
            logging.WARNING if of and len(talks) != expected[name] else logging.INFO,
            f"csj {name}: {len(talks):,}{of} talks, {count.utterances:,} utterances, "
            f"{count.hours:.2f} h, {count.words:,} words{beside(name, count, config)}",
        )
    for reason, n in dropped.most_common():
        log.info(f"csj dropped, {reason}: {n:,}")
    if missing := [name for name, count in counts.items() if not count.utterances]:
        log.warning("csj: nothing is in %s; a stage that needs it will say so", ", ".join(missing))


def expected_talks(subset: str, dev: str) -> dict[str, int]:
    """Split -> how many talks it has in a whole copy of the corpus, where that is known."""
    held = held_out(dev)
    found = {name: sum(of == name for of in held.values()) for name in (*EVALS, "dev")}
    if dev == "kaldi":
        del found["dev"]
    if subset == "core":
        found["train"] = len(set(read_list("core")) - held.keys())
    elif subset == "all":
        found["train"] = TALKS - len(held)
    return found


def beside(name: str, count: Count, config: Chosen) -> str:
    """How a split compares with what other recipes have of it; "" where none is comparable."""
    known = []
    if name in KALDI and config.join == "kaldi":
        known.append(("Kaldi", f"{KALDI[name]:,} utterances", count.utterances / KALDI[name]))
    if name in ICEFALL:
        known.append(("icefall", f"{ICEFALL[name]:.2f} h", count.hours / ICEFALL[name]))
    if name == "dev" and config.dev == "lhotse":
        utterances, hours = LHOTSE_DEV
        known.append(("lhotse", f"{utterances:,} utterances, {hours:.2f} h", count.hours / hours))
    if name == "dev" and config.dev == "kaldi":
        known.append(("Kaldi", f"4,000 utterances, {KALDI_DEV:.2f} h", count.hours / KALDI_DEV))
    if name == "train" and config.subset in PAPER_HOURS:
        hours = PAPER_HOURS[config.subset]
        known.append(("the paper", f"{hours:.0f} h", count.hours / hours))
    return "".join(f"; {who}: {figure}, here {share:.1%} of that" for who, figure, share in known)
