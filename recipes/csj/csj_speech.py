"""Conversion of transcript segments to words in phones, and joining of segments into utterances."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from csj_tags import TagOptions, resolve_tags
from csj_transcripts import Segment

from jahubert.errors import ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import kana_to_phones, to_katakana


@dataclass(frozen=True)
class JoinOptions:
    max_gap: float = 0.5  # maximum silence between joined segments (seconds)
    max_seconds: float = 10.0  # maximum length of joined segments; a single segment may be longer
    # kaldi: the rule of egs/csj/s5, for comparison with Kaldi. With this rule, max_seconds limits the length
    # of an utterance before its last segment is added, an utterance to which a masked name is joined is
    # rejected, and segments are not joined across a segment of the other channel.
    join: Literal["strict", "kaldi"] = "strict"

    def __post_init__(self) -> None:
        if self.max_gap < 0 or self.max_seconds <= 0:
            raise ConfigError(
                f"max_gap must be at least 0 and max_seconds above 0; found {self.max_gap} and "
                f"{self.max_seconds}"
            )


@dataclass(frozen=True)
class SpokenSegment:
    """A segment with resolved tags, or several joined segments."""

    start: int  # 16 kHz samples from the start of the talk
    end: int  # exclusive
    words: tuple[tuple[str, ...], ...]  # the phones of each word
    text: str  # orthography
    masked: bool  # whether the segment contains a masked name, whose audio is noise
    problems: tuple[str, ...]  # problems in the pronunciation, each with file:line
    text_problems: tuple[str, ...] = ()  # problems in the orthography, which does not affect phones
    channel: str = "L"

    @property
    def event_only(self) -> bool:
        """Whether the segment has no speech to recognize, for example only noise, applause or a cough."""
        return not (self.words or self.masked or self.problems)

    def merged_with(self, other: SpokenSegment) -> SpokenSegment:
        return SpokenSegment(
            self.start,
            max(self.end, other.end),
            self.words + other.words,
            self.text + other.text,
            self.masked or other.masked,
            self.problems + other.problems,
            self.text_problems + other.text_problems,
            self.channel,
        )


def resolve_segments(segments: Sequence[Segment], path: Path, options: TagOptions) -> list[SpokenSegment]:
    """Resolve the tags in all channels of a transcript, and return segments in transcript order."""
    resolved: dict[int, SpokenSegment] = {}
    for channel in {segment.channel for segment in segments}:
        rows = [i for i, segment in enumerate(segments) if segment.channel == channel]
        spoken = _resolve_channel([segments[i] for i in rows], path, options)
        resolved |= dict(zip(rows, spoken, strict=True))
    return [resolved[i] for i in range(len(segments))]


def _resolve_channel(segments: Sequence[Segment], path: Path, options: TagOptions) -> list[SpokenSegment]:
    words = [word for segment in segments for word in segment.words]
    segment_N = [i for i, segment in enumerate(segments) for _ in segment.words]
    kana = resolve_tags([word.pronunciation for word in words], segment_N, options, "pronunciation")
    text = resolve_tags([word.orthography for word in words], segment_N, options, "orthography")
    masked = kana.masked | text.masked | {i for i, word in enumerate(words) if word.masked}
    problems = [(i, word.problem) for i, word in enumerate(words) if word.problem] + kana.problems
    text_problems = [(i, word.text_problem) for i, word in enumerate(words) if word.text_problem]
    text_problems += text.problems

    def located(problems: list[tuple[int, str]], rows: range) -> list[str]:
        return [f"{path}:{words[i].line}: {problem}" for i, problem in sorted(problems) if i in rows]

    result, first = [], 0
    for segment in segments:
        rows = range(first, first + len(segment.words))
        first = rows.stop
        unreadable = located(problems, rows)
        is_masked = not masked.isdisjoint(rows)
        phones: list[tuple[str, ...]] = []
        if not unreadable and not is_masked:
            for spelling, line in merge_dependent_words((kana.texts[i], words[i].line) for i in rows):
                try:
                    phones.append(_phones(spelling))
                except DataError as error:
                    unreadable.append(f"{path}:{line}: {error}")
        result.append(
            SpokenSegment(
                segment.start,
                segment.end,
                tuple(phones),
                "".join(text.texts[rows.start : rows.stop]),
                is_masked,
                tuple(unreadable),
                tuple(located(text_problems, rows)),
                segment.channel,
            )
        )
    return result


def merge_dependent_words(words: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Merge words that cannot be pronounced alone with the preceding word in the segment.

    Such words start with ー, as in 行こ + う, pronounced イコ + ー, or consist only of ッ and ー. If there is
    no preceding word, a leading ー is dropped, and a word that consists only of ッ and ー is dropped.

    Args:
        words: pairs (kana, line number).
    """
    result: list[tuple[str, int]] = []
    for kana, line in words:
        kana = to_katakana(kana).replace("・", "")
        if result and (kana.startswith("ー") or not kana.strip("ッー")):
            result[-1] = (result[-1][0] + kana, result[-1][1])
        elif (kana := kana.lstrip("ー")).strip("ッー"):
            result.append((kana, line))
    return result


@cache
def _phones(kana: str) -> tuple[str, ...]:
    return tuple(kana_to_phones(kana))


def join_segments(segments: Iterable[SpokenSegment], options: JoinOptions) -> list[SpokenSegment]:
    """Join neighboring segments into utterances within the limits on gaps and length.

    Segments without speech (`event_only`), which may overlap other segments, are returned unchanged and do
    not affect the joining of other segments.

    Args:
        segments: the segments of all channels, in transcript order.
        options: rule and limits for joining.
    """
    max_gap, max_samples = round(options.max_gap * SAMPLE_RATE), round(options.max_seconds * SAMPLE_RATE)
    result: list[SpokenSegment] = []
    open_utterances: dict[str, int] = {}  # channel -> index of the utterance that can still be extended
    for segment in segments:
        if segment.event_only:
            result.append(segment)
            continue
        last = open_utterances.get(segment.channel)
        if last is not None and _can_join(result[last], segment, max_gap, max_samples, options.join):
            result[last] = result[last].merged_with(segment)
            continue
        if options.join == "kaldi":
            open_utterances.clear()
        open_utterances[segment.channel] = len(result)
        result.append(segment)
    return result


def _can_join(
    utterance: SpokenSegment, segment: SpokenSegment, max_gap: int, max_samples: int, rule: str
) -> bool:
    if segment.start - utterance.end > max_gap:
        return False
    if rule == "kaldi":
        return utterance.end - utterance.start <= max_samples
    if utterance.masked or segment.masked or utterance.problems or segment.problems:
        return False
    return max(utterance.end, segment.end) - utterance.start <= max_samples
