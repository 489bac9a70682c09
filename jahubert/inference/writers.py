"""A transcript as text: plain, JSON, table, subtitles, Praat, Audacity.

Each writer turns one `Transcript` into the whole content of a file, as a string; times are in seconds.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jahubert.errors import ConfigError
from jahubert.phonemes import BOUNDARY

if TYPE_CHECKING:
    from jahubert.inference.transcribe import Transcript, Word

# A subtitle ends at a pause, or when it would be too long to read.
CUE_PAUSE = 0.6  # seconds
CUE_LENGTH = 7.0  # seconds
CUE_KANA = 40  # characters

TSV_HEADER = "audio\tstart\tend\tkana\tphonemes\n"


def text(transcript: Transcript) -> str:
    """Kana, words separated by spaces, in one line."""
    return transcript.text + "\n"


def jsonl(transcript: Transcript) -> str:
    """Everything that is known, as one line of JSON."""
    words = [
        {
            "kana": word.kana,
            "phonemes": list(word.phonemes),
            "start": round(word.start, 3),
            "end": round(word.end, 3),
            "score": round(word.score, 4),
            "times": [[round(start, 3), round(end, 3)] for start, end in word.times],
        }
        for word in transcript.words
    ]
    content = {
        "audio": transcript.audio,
        "duration": round(transcript.duration, 3),
        "text": transcript.text,
        "phonemes": list(transcript.phonemes),
        "score": round(transcript.score, 4),
        "words": words,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"


def tsv_rows(transcript: Transcript) -> str:
    """One line a word, without the header."""
    name = " ".join(transcript.audio.split())
    return "".join(
        f"{name}\t{word.start:.3f}\t{word.end:.3f}\t{word.kana}\t{' '.join(word.phonemes)}\n"
        for word in transcript.words
    )


def tsv(transcript: Transcript) -> str:
    """A table of words with a header."""
    return TSV_HEADER + tsv_rows(transcript)


def srt(transcript: Transcript) -> str:
    """SubRip subtitles."""
    return "\n".join(
        f"{number}\n{_clock(start, ',')} --> {_clock(end, ',')}\n{line}\n"
        for number, (start, end, line) in enumerate(_cues(transcript.words), start=1)
    )


def vtt(transcript: Transcript) -> str:
    """WebVTT subtitles."""
    cues = (f"{_clock(a, '.')} --> {_clock(b, '.')}\n{line}\n" for a, b, line in _cues(transcript.words))
    return "\n".join(["WEBVTT\n", *cues])


def textgrid(transcript: Transcript) -> str:
    """A Praat TextGrid with the interval tiers `words` (kana) and `phones`."""
    words = [(word.start, word.end, word.kana) for word in transcript.words]
    phones = [
        (start, end, phone)
        for word in transcript.words
        for phone, (start, end) in zip(word.phonemes, word.times, strict=True)
    ]
    end = max([transcript.duration, *(stop for _, stop, _ in phones)])
    lines = ['File type = "ooTextFile"', 'Object class = "TextGrid"', "", "xmin = 0", f"xmax = {end:.6f}"]
    lines += ["tiers? <exists>", "size = 2", "item []:"]
    for number, (name, marked) in enumerate((("words", words), ("phones", phones)), start=1):
        intervals = _tile(marked, end)
        lines += [f"    item [{number}]:", '        class = "IntervalTier"', f'        name = "{name}"']
        lines += [
            "        xmin = 0",
            f"        xmax = {end:.6f}",
            f"        intervals: size = {len(intervals)}",
        ]
        for place, (start, stop, label) in enumerate(intervals, start=1):
            quoted = label.replace('"', '""')
            lines += [f"        intervals [{place}]:", f"            xmin = {start:.6f}"]
            lines += [f"            xmax = {stop:.6f}", f'            text = "{quoted}"']
    return "\n".join(lines) + "\n"


def audacity(transcript: Transcript) -> str:
    """Labels for Audacity (File, Import, Labels): one a word, from start to end."""
    return "".join(f"{word.start:.6f}\t{word.end:.6f}\t{word.kana}\n" for word in transcript.words)


# Name of the format -> ending of its files and its writer.
FORMATS: dict[str, tuple[str, Callable[[Transcript], str]]] = {
    "text": (".txt", text),
    "json": (".json", jsonl),
    "tsv": (".tsv", tsv),
    "srt": (".srt", srt),
    "vtt": (".vtt", vtt),
    "textgrid": (".TextGrid", textgrid),
    "audacity": (".labels.txt", audacity),
}
# Formats that show one spelling of a word; the others hold kana and phonemes.
ONE_SPELLING = ("text", "srt", "vtt", "audacity")


def render(transcript: Transcript, format: str, phonemes: bool = False) -> str:
    """The transcript in one of `FORMATS`; with `phonemes` those stand where kana would."""
    if format not in FORMATS:
        raise ConfigError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}")
    if phonemes and format in ONE_SPELLING:
        transcript = _in_phonemes(transcript, boundary="" if format == "audacity" else f" {BOUNDARY}")
    return FORMATS[format][1](transcript)


def save(
    transcript: Transcript, base: str | os.PathLike, formats: Iterable[str], phonemes: bool = False
) -> list[Path]:
    """Write `base` + ending for each format, UTF-8; a file is replaced only when the new one is complete."""
    written = []
    for format in formats:
        content = render(transcript, format, phonemes)
        path = Path(os.fspath(base) + FORMATS[format][0])
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(path.name + ".tmp")
        # File names that are not UTF-8 reach us as lone surrogates, which no file can hold.
        beside.write_text(content, encoding="utf-8", errors="replace")
        beside.replace(path)
        written.append(path)
    return written


def _in_phonemes(transcript: Transcript, boundary: str) -> Transcript:
    """Words spelled in phonemes, each but the last with the boundary behind it."""
    last = len(transcript.words) - 1
    words = (
        replace(word, kana=" ".join(word.phonemes) + boundary * (number < last))
        for number, word in enumerate(transcript.words)
    )
    return replace(transcript, words=tuple(words))


def _cues(words: Iterable[Word]) -> list[tuple[float, float, str]]:
    """Words gathered into subtitles: (start, end, text)."""
    groups: list[list[Word]] = []
    for word in words:
        if groups:
            open_ = groups[-1]
            n_kana = sum(len(w.kana) for w in open_) + len(word.kana)
            pause, length = word.start - open_[-1].end, word.end - open_[0].start
            if pause < CUE_PAUSE and length <= CUE_LENGTH and n_kana <= CUE_KANA:
                open_.append(word)
                continue
        groups.append([word])
    return [(group[0].start, group[-1].end, " ".join(word.kana for word in group)) for group in groups]


def _clock(seconds: float, point: str) -> str:
    """Hours:minutes:seconds and milliseconds behind `point`."""
    ms = round(seconds * 1000)
    return f"{ms // 3_600_000:02d}:{ms // 60_000 % 60:02d}:{ms // 1000 % 60:02d}{point}{ms % 1000:03d}"


def _tile(marked: list[tuple[float, float, str]], end: float) -> list[tuple[float, float, str]]:
    """Praat wants intervals without gaps: fill them with empty ones."""
    tiles, at = [], 0.0
    for start, stop, label in marked:
        if start > at:
            tiles.append((at, start, ""))
        tiles.append((start, stop, label))
        at = stop
    if end > at or not tiles:
        tiles.append((at, end, ""))
    return tiles
