"""Training data for the comparison of pretraining languages: Common Voice in Japanese or in other languages.

Development and test splits are Japanese in both cases, so that units and models can be compared on the same
utterances.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jahubert.errors import ConfigError, DataError, quote
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.manifest import Rejected, Utterance
from jahubert.train.experiment.config import expand_user
from jahubert.train.experiment.registry import recipe_module

read_speech = recipe_module("builtin").read_speech
Clips = read_speech.Config
GROUPS = ("pretraining", "finetuning")
_LONGEST_MINUTES = 5  # speakers with more audio than this are in the group pretraining


@dataclass(frozen=True)
class Config:
    language: str = "japanese"  # language of the training split: japanese or other
    other_languages: str | None = None  # folder with clips.tsv (columns file, speaker), for language=other
    minutes: float = 90.0  # duration of the training split in minutes
    speakers: int | None = None  # with language=other: number of speakers, those with the most audio
    # Japanese training speakers to use: all, or one of two groups without common speakers, pretraining and
    # finetuning
    group: str = "all"
    clips: Clips = field(default_factory=lambda: Clips(speeds=()))

    def __post_init__(self) -> None:
        if self.language not in ("japanese", "other"):
            raise ConfigError(f"language must be japanese or other; found {quote(self.language)}")
        if self.language == "other" and not self.other_languages:
            raise ConfigError("language=other requires other_languages=FOLDER")
        if self.minutes <= 0:
            raise ConfigError(f"minutes must be positive; found {self.minutes}")
        if self.speakers is not None and (self.language != "other" or self.speakers < 1):
            raise ConfigError(
                f"speakers must be null or, with language=other, at least 1; found {self.speakers} with "
                f"language={self.language}"
            )
        if self.group not in ("all", *GROUPS):
            raise ConfigError(f"group must be all, {' or '.join(GROUPS)}; found {quote(self.group)}")
        if self.group != "all" and self.language != "japanese":
            raise ConfigError(f"group={self.group} requires language=japanese; found {self.language}")
        if self.clips.speeds:
            raise ConfigError(
                "clips.speeds must be empty, because copies at other speeds would count toward minutes"
            )


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield the utterances of the splits train, dev_cv and test_cv, and rejected items.

    `data` is a folder with `transcripts.tsv` (columns file, text, speaker). Utterances are assigned to the
    training split in random order until its duration reaches `minutes`; the rest are rejected.

    Raises:
        DataError: a corpus is not given, not found or unusable, or the training split is shorter than
            `minutes`.
    """
    if data is None:
        raise DataError("the languages recipe needs data=FOLDER, a folder with transcripts.tsv")
    n_samples, is_complete = 0, False
    for item in _utterances(data, work, config, seed):
        if isinstance(item, Rejected) or item.split != "train":
            yield item
        elif is_complete:
            yield Rejected(item.id, "training split is complete")
        else:
            n_samples += item.n_samples
            is_complete = n_samples >= config.minutes * 60 * SAMPLE_RATE
            yield item
    if not is_complete:
        found = n_samples / SAMPLE_RATE / 60
        raise DataError(
            f"the training split ({config.language}) contains {found:.1f} minutes of audio, less than "
            f"minutes={config.minutes:g}; set minutes to at most this duration"
        )


def _utterances(data: Path, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield the utterances of all splits, those of train in random order, and rejected recordings."""
    training = []
    for item in read_speech.sentences(data, work, config.clips, seed, set()):
        if isinstance(item, Rejected) or item.split in ("dev_cv", "test_cv"):
            yield item
        elif item.split == "train":
            training.append(item)
    if config.language == "japanese":
        group_of = _divide_speakers(training, seed)
        for item in training:
            if config.group in ("all", group_of[item.speaker]):
                yield item
            else:
                yield Rejected(item.id, f"speaker is not in group {config.group}")
    if config.language == "other":
        others = list(read_speech.other_languages(expand_user(config.other_languages), work))
        random.Random(f"other languages {seed}").shuffle(others)
        speakers = _longest_speakers(others, config.speakers)
        for item in others:
            if isinstance(item, Utterance) and item.speaker not in speakers:
                item = Rejected(item.id, "not one of the speakers with the longest recordings")
            yield item


def _divide_speakers(training: list[Utterance], seed: int) -> dict[str, str]:
    """Assign half of the speakers with little audio to finetuning, and all others to pretraining."""
    samples = _samples_by_speaker(training)
    short = sorted(name for name, n in samples.items() if n <= _LONGEST_MINUTES * 60 * SAMPLE_RATE)
    drawn = random.Random(f"languages groups {seed}").sample(short, len(short) // 2)
    return dict.fromkeys(samples, "pretraining") | dict.fromkeys(drawn, "finetuning")


def _longest_speakers(items: list[Utterance | Rejected], number: int | None) -> set[str]:
    """Return the `number` speakers with the most audio, or all speakers if it is None."""
    used = [item for item in items if isinstance(item, Utterance)]
    return {speaker for speaker, _ in _samples_by_speaker(used).most_common(number)}


def _samples_by_speaker(items: Iterable[Utterance]) -> Counter[str]:
    samples: Counter[str] = Counter()
    for item in items:
        samples[item.speaker] += item.n_samples
    return samples
