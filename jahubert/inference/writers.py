"""Output formats for transcripts: text, JSON, TSV, subtitles, Praat TextGrid and Audacity labels.

Each writer converts one `Transcript` to the content of a file. Times are in seconds, except in subtitles.
"""

from __future__ import annotations

import html
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jahubert.errors import ConfigError
from jahubert.formats.atomic import atomic_write
from jahubert.phonemes import BOUNDARY

if TYPE_CHECKING:
    from jahubert.inference.transcribe import Transcript, Word

# A subtitle cue ends at a pause, or before it becomes too long to read.
CUE_PAUSE = 0.6  # minimum length of such a pause in seconds
CUE_LENGTH = 7.0  # maximum duration of a cue with more than one word, in seconds
CUE_CHARACTERS = 40  # maximum number of characters, not counting spaces, in a cue with more than one word
CUE_MIN_LENGTH = 0.8  # minimum duration of a cue in seconds, unless the next cue starts earlier

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_SURROGATES = re.compile(r"[\ud800-\udfff]")
TSV_HEADER = "audio\tstart\tend\tkana\tphonemes\twritten\n"


def join_words(words: Iterable[Word]) -> str:
    """Join the text of words, without spaces for lexicon spellings and with spaces for kana."""
    words = list(words)
    separator = "" if any(word.written for word in words) else " "
    return separator.join(word.text for word in words)


def text(transcript: Transcript) -> str:
    """Return one line of text per segment (see `TranscriptSegment.text`), or an empty line without words."""
    return "\n".join(segment.text for segment in transcript.segments) + "\n"


def jsonl(transcript: Transcript) -> str:
    """Return the complete transcript as one line of JSON."""
    words = [_word_fields(word) for word in transcript.words]
    segments = [
        {
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "text": segment.text,
            "words": [_word_fields(word) for word in segment.words],
        }
        for segment in transcript.segments
    ]
    content = {
        "audio": transcript.audio,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "phonemes": list(transcript.phonemes),
        "score": round(transcript.score, 4),
        "confidence": _rounded(transcript.confidence),
        "calibrated": transcript.calibrated,
        "words": words,
        "segments": segments,
    }
    # A name that is not valid UTF-8 contains lone surrogates, which cannot be encoded.
    return _SURROGATES.sub(_json_escape, json.dumps(content, ensure_ascii=False)) + "\n"


def _word_fields(word: Word) -> dict[str, Any]:
    return {
        "kana": word.kana,
        "phonemes": list(word.phonemes),
        "start": round(word.start, 3),
        "end": round(word.end, 3),
        "score": round(word.score, 4),
        "confidence": _rounded(word.confidence),
        **({"written": word.written} if word.written else {}),
        "times": [[round(start, 3), round(end, 3)] for start, end in word.times],
    }


def _rounded(confidence: float | None) -> float | None:
    """Round a confidence for JSON. An unknown confidence becomes None."""
    return None if confidence is None or math.isnan(confidence) else round(confidence, 3)


def tsv_rows(transcript: Transcript) -> str:
    """Return one line of tab-separated values per word, without the header."""
    name = escape_controls(transcript.audio)
    return "".join(
        f"{name}\t{word.start:.3f}\t{word.end:.3f}\t{word.kana}\t{' '.join(word.phonemes)}\t{word.written}\n"
        for word in transcript.words
    )


def escape_controls(name: str) -> str:
    """Escape control characters in a file name, because they would break a line of tab-separated values."""
    return _CONTROL.sub(_json_escape, name)


def _json_escape(match: re.Match[str]) -> str:
    return f"\\u{ord(match[0]):04x}"


def tsv(transcript: Transcript) -> str:
    """Return a table of words in tab-separated values, with a header."""
    return TSV_HEADER + tsv_rows(transcript)


def srt(transcript: Transcript) -> str:
    """Return SubRip subtitles."""
    return "\n".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{line}\n"
        for number, (start, end, line) in enumerate(_cues(transcript.words), start=1)
    )


def vtt(transcript: Transcript) -> str:
    """Return WebVTT subtitles."""
    cues = (
        f"{_clock(start, '.')} --> {_clock(end, '.')}\n{html.escape(line, quote=False)}\n"
        for start, end, line in _cues(transcript.words)
    )
    return "\n".join(["WEBVTT\n", *cues])


def textgrid(transcript: Transcript) -> str:
    """Return a Praat TextGrid with the interval tiers `words` (kana or written words) and `phones`."""
    words = [(word.start, word.end, word.text) for word in transcript.words]
    phones = [
        (start, end, phone)
        for word in transcript.words
        for phone, (start, end) in zip(word.phonemes, word.times, strict=True)
    ]
    end = max([transcript.duration, *(stop for _, stop, _ in phones)])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end:.6f}"]
    lines += ["tiers? <exists>", "size = 2", "item []:"]
    for number, (name, labeled) in enumerate((("words", words), ("phones", phones)), start=1):
        intervals = _tile(labeled, end)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += [
            "        xmin = 0",
            f"        xmax = {end:.6f}",
            f"        intervals: size = {len(intervals)}",
        ]
        for index, (start, stop, label) in enumerate(intervals, start=1):
            quoted = label.replace('"', '""')
            lines += [f"        intervals [{index}]:", f"            xmin = {start:.6f}"]
            lines += [f"            xmax = {stop:.6f}", f'            text = "{quoted}"']
    return "\n".join(lines) + "\n"


def audacity(transcript: Transcript) -> str:
    """Return a label file for Audacity (File, Import, Labels) with one label per word.

    The text of models without a word boundary is split as in subtitles.
    """
    words = chain.from_iterable(map(_pieces, transcript.words))
    return "".join(f"{word.start:.6f}\t{word.end:.6f}\t{word.text}\n" for word in words)


# Format name -> suffix of the file name, and writer.
FORMATS: dict[str, tuple[str, Callable[[Transcript], str]]] = {
    "text": (".txt", text),
    "json": (".json", jsonl),
    "tsv": (".tsv", tsv),
    "srt": (".srt", srt),
    "vtt": (".vtt", vtt),
    "textgrid": (".TextGrid", textgrid),
    "audacity": (".labels.txt", audacity),
}
# Formats that contain either the text of words or their phonemes. All other formats contain both.
SINGLE_SPELLING = ("text", "srt", "vtt", "audacity")


def render(transcript: Transcript, format: str, phonemes: bool = False) -> str:
    """Render the transcript in one of `FORMATS`.

    Args:
        phonemes: whether to write phonemes instead of the text of words in the formats of `SINGLE_SPELLING`.

    Raises:
        ConfigError: the format is unknown.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; choose one of {', '.join(FORMATS)}")
    if phonemes and format in SINGLE_SPELLING:
        transcript = _spell_phonemes(transcript, boundary="" if format == "audacity" else f" {BOUNDARY}")
    return FORMATS[format][1](transcript)


def save(
    transcript: Transcript, base: str | os.PathLike[str], formats: Iterable[str], phonemes: bool = False
) -> list[Path]:
    """Write one UTF-8 file per format, named `base` plus the suffix of the format. Return the paths."""
    written = []
    for format in formats:
        path = Path(os.fspath(base) + FORMATS[format][0])
        save_file(transcript, path, format, phonemes)
        written.append(path)
    return written


def save_file(transcript: Transcript, path: Path, format: str, phonemes: bool = False) -> None:
    """Write a UTF-8 file in one format, and create its folder if it does not exist."""
    content = render(transcript, format, phonemes)
    path.parent.mkdir(parents=True, exist_ok=True)
    # File names that are not valid UTF-8 contain lone surrogates, which cannot be encoded.
    with atomic_write(path, errors="replace") as file:
        file.write(content)


def _spell_phonemes(transcript: Transcript, boundary: str) -> Transcript:
    """Replace the text of words with phonemes, and add `boundary` after all but the last in a segment."""
    words = []
    for index, word in enumerate(transcript.words, start=1):
        spelling = " ".join(word.phonemes)
        if index < len(transcript.words) and index not in transcript.segment_starts:
            spelling += boundary
        words.append(replace(word, kana=spelling, written=""))
    return replace(transcript, words=tuple(words))


def _cues(words: Iterable[Word]) -> list[tuple[float, float, str]]:
    """Group words into subtitle cues (start, end, text)."""
    groups: list[list[Word]] = []
    for word in chain.from_iterable(map(_pieces, words)):
        if groups and _fits(word, groups[-1]):
            groups[-1].append(word)
        else:
            groups.append([word])
    cues = []
    for index, group in enumerate(groups):
        start, end = group[0].start, max(group[-1].end, group[0].start + CUE_MIN_LENGTH)
        if index + 1 < len(groups):
            end = max(group[-1].end, min(end, groups[index + 1][0].start))
        cues.append((start, end, join_words(group)))
    return cues


def _pieces(word: Word) -> Iterator[Word]:
    """Split the word of a model without a word boundary, which is a whole segment, into parts for cues."""
    if word.written or word.kana != "".join(word.phonemes) or len(word.times) != len(word.phonemes):
        yield word
        return
    first = 0
    for index, (start, end) in enumerate(word.times):
        if index > first and (
            start - word.times[index - 1][1] >= CUE_PAUSE
            or end - word.times[first][0] > CUE_LENGTH
            or index - first >= CUE_CHARACTERS
        ):
            yield _part(word, first, index)
            first = index
    yield _part(word, first, len(word.times))


def _part(word: Word, first: int, last: int) -> Word:
    """Return the symbols from `first` to `last`, exclusive, of a word as a word."""
    symbols, times = word.phonemes[first:last], word.times[first:last]
    start, end = times[0][0], times[-1][1]
    return replace(word, kana="".join(symbols), phonemes=symbols, times=times, start=start, end=end)


def _fits(word: Word, cue: list[Word]) -> bool:
    """Return whether a word can be appended to a cue."""
    n_characters = sum(len(w.text.replace(" ", "")) for w in [*cue, word])
    pause = word.start - cue[-1].end
    length = word.end - cue[0].start
    return pause < CUE_PAUSE and length <= CUE_LENGTH and n_characters <= CUE_CHARACTERS


def _clock(seconds: float, point: str) -> str:
    """Format a timestamp as HH:MM:SS and milliseconds, separated by `point`."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{point}{ms % 1000:03d}"


def _tile(labeled: list[tuple[float, float, str]], end: float) -> list[tuple[float, float, str]]:
    """Fill the gaps between intervals with empty intervals, as Praat requires."""
    tiles = []
    position = 0.0
    for start, stop, label in labeled:
        if start > position:
            tiles.append((position, start, ""))
        tiles.append((start, stop, label))
        position = stop
    if end > position or not tiles:
        tiles.append((position, end, ""))
    return tiles
