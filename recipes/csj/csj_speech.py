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

    def with_next(self, other: Spoken) -> Spoken:
        return Spoken(
            self.start,
            other.end,
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


def join(pieces: Iterable[Spoken], options: Joining) -> list[Spoken]:
    """Utterances: neighbours joined while the silence between them and their length allow it."""
    gap, longest = round(options.max_gap * SAMPLE_RATE), round(options.max_seconds * SAMPLE_RATE)
    joined: list[Spoken] = []
    for piece in pieces:
        last = joined[-1] if joined else None
        if last is None or piece.start - last.end > gap:
            fits = False
        elif options.join == "kaldi":
            fits = last.end - last.start <= longest
        else:
            usable = not (last.masked or piece.masked or last.problems or piece.problems)
            fits = usable and piece.end - last.start <= longest
        if fits and last is not None:
            joined[-1] = last.with_next(piece)
        else:
            joined.append(piece)
    return joined
