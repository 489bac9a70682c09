"""Segments of a talk as words in phones, and joined to utterances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from csj_tags import Options, Untagged
from csj_transcripts import Segment

from jahubert.errors import ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import kana_to_phones, to_katakana


@dataclass(frozen=True)
class Joining:
    max_gap: float = 0.5  # seconds between two segments that are joined
    max_seconds: float = 10.0  # of joined segments; a single one may be longer
    # kaldi: a segment is joined as long as what comes before it is not longer than max_seconds, and masked
    # names take with them whatever they are joined to. The rule of egs/csj/s5, to compare with it.
    join: Literal["strict", "kaldi"] = "strict"

    def __post_init__(self) -> None:
        if self.max_gap < 0 or self.max_seconds <= 0:
            raise ConfigError(
                f"max_gap must not be negative, and max_seconds above 0; found {self.max_gap} and "
                f"{self.max_seconds}"
            )


@dataclass(frozen=True)
class Spoken:
    """A segment without its tags, or several joined; times in 16 kHz samples from the start of the talk."""

    start: int
    end: int
    words: tuple[tuple[str, ...], ...]  # as phones
    text: str  # as written
    masked: bool  # a name in it is noise
    problems: tuple[str, ...]  # file:line: what cannot be read there

    @property
    def event_only(self) -> bool:
        """Whether nothing is spoken: noise, applause, a cough."""
        return not (self.words or self.masked or self.problems)

    def merged_with(self, other: Spoken) -> Spoken:
        return Spoken(
            self.start,
            max(self.end, other.end),
            self.words + other.words,
            self.text + other.text,
            self.masked or other.masked,
            self.problems + other.problems,
        )


def speech_of(segments: Sequence[Segment], path: Path, options: Options) -> list[Spoken]:
    """The segments of one channel without their tags, in their order; `path` is for messages."""
    words = [word for segment in segments for word in segment.words]
    said, written = Untagged(options, "pronunciation"), Untagged(options, "orthography")
    for number, word in enumerate(words):
        said.feed(number, word.said)
        written.feed(number, word.written)
    kana, text = said.texts(), written.texts()
    masked = said.masked | written.masked | {number for number, word in enumerate(words) if word.masked}
    problems: dict[int, list[str]] = {
        number: [word.problem] for number, word in enumerate(words) if word.problem
    }
    for number, problem in said.problems + written.problems:
        if problem not in problems.setdefault(number, []):
            problems[number].append(problem)
    result, first = [], 0
    for segment in segments:
        own = range(first, first + len(segment.words))
        first = own.stop
        wrong = [
            f"{path}:{words[number].line}: {problem}"
            for number in own
            for problem in problems.get(number, ())
        ]
        phones: list[tuple[str, ...]] = []
        hidden = not masked.isdisjoint(own)
        if not wrong and not hidden:
            for spelled, line in joined_words((kana[number], words[number].line) for number in own):
                try:
                    phones.append(_phones(spelled))
                except DataError as error:
                    wrong.append(f"{path}:{line}: {error}")
        whole = "".join(text[own.start : own.stop])
        result.append(Spoken(segment.start, segment.end, tuple(phones), whole, hidden, tuple(wrong)))
    return result


def joined_words(words: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """(kana, line) of the words that can be said on their own.

    What begins with ー, or is nothing but ッ, belongs to the word before it in the segment (行こ + う, said
    イコ + ー); where there is none, the ー is left out. Words without sound are left out too.
    """
    found: list[tuple[str, int]] = []
    for kana, line in words:
        kana = to_katakana(kana).replace("・", "")
        if found and (kana.startswith("ー") or not kana.strip("ッー")):
            found[-1] = (found[-1][0] + kana, found[-1][1])
        elif (kana := kana.lstrip("ー")).strip("ッー"):
            found.append((kana, line))
    return found


@cache
def _phones(kana: str) -> tuple[str, ...]:
    return tuple(kana_to_phones(kana))


def join(segments: Iterable[Spoken], options: Joining) -> list[Spoken]:
    """Join neighboring segments into utterances while the gap between them and their length allow it.

    A segment that holds only an event, which may lie inside a speech segment, is returned as it is and does
    not take part: it neither ends nor bridges nor lengthens an utterance.
    """
    max_gap, max_samples = round(options.max_gap * SAMPLE_RATE), round(options.max_seconds * SAMPLE_RATE)
    result: list[Spoken] = []
    last: int | None = None  # index of the utterance that the next segment may join
    for segment in segments:
        if segment.event_only:
            result.append(segment)
        elif last is not None and _can_join(result[last], segment, max_gap, max_samples, options.join):
            result[last] = result[last].merged_with(segment)
        else:
            last = len(result)
            result.append(segment)
    return result


def _can_join(utterance: Spoken, segment: Spoken, max_gap: int, max_samples: int, rule: str) -> bool:
    if segment.start - utterance.end > max_gap:
        return False
    if rule == "kaldi":
        return utterance.end - utterance.start <= max_samples
    if utterance.masked or segment.masked or utterance.problems or segment.problems:
        return False
    return max(utterance.end, segment.end) - utterance.start <= max_samples
