"""The transcripts of a CSJ talk: SDB and TRN (Shift_JIS), XML (UTF-8), as segments of words with their tags.

A segment is what the corpus itself times: speech between pauses of 0.2 s. Its words are short units in SDB
and XML; TRN has only phrases (bunsetsu). Every error names the file and the line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from jahubert.errors import DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import PHONES, VOWELS

_TIME, _WRITTEN, _SAID = 3, 5, 10  # columns of SDB, from 0
_SDB_TIME = re.compile(r"(\d+) (\d+\.\d+)-(\d+\.\d+) ([LR]):.*")
_TRN_TIME = re.compile(r"(\d{4,}) (\d+\.\d+)-(\d+\.\d+) ([LR]):.*")
_EVENTS = re.compile(r"(\s*<[^<>]*>)+\s*")
# Phonemes of the corpus's own XML whose name is another one here. H lengthens the vowel before it; FV, a
# creaking without a vowel of its own, is no phone.
_PHONEMES = {"Q": "q", "c": "ts", "cy": "ch", "sy": "sh", "zy": "j", "F": "f", "Fy": "hy", "VN": "N"}
_PHONEMES |= {"ty": "ts", "dy": "d", "kw": "k", "gw": "g", "v": "b"}
_PHONEMES |= {phone: phone for phone in PHONES if not phone.endswith(":")} | {"dy": "d"}


@dataclass
class Word:
    """A word with its tags, and what is wrong with its line."""

    line: int
    written: str
    said: str
    masked: bool = False
    problem: str = ""


@dataclass
class Segment:
    """Words between two pauses; times in 16 kHz samples from the start of the talk, end exclusive."""

    start: int
    end: int
    channel: str  # L or R
    words: list[Word] = field(default_factory=list)


@dataclass
class PhoneTime:
    """A phone of the 40 and when it is said, in 16 kHz samples from the start of the talk."""

    symbol: str
    start: int
    end: int
    channel: str


def read_sdb(path: Path) -> list[Segment]:
    """Segments of an SDB file, in its order; the channels of a dialogue are mixed in it, line by line.

    Raises:
        DataError: bytes that are not Shift_JIS (CP932), or a line without a time.
    """
    segments: dict[tuple[str, str], Segment] = {}
    for number, line in _lines(path):
        columns = line.split("\t")
        match = _SDB_TIME.fullmatch(columns[_TIME]) if len(columns) > _TIME else None
        if match is None:
            found = repr(columns[_TIME]) if len(columns) > _TIME else f"{len(columns)} columns"
            raise DataError(
                f"{path}:{number}: no time in column {_TIME + 1}, such as '0001 00000.113-00006.570 "
                f"L:-001-001'; found {found}. Restore the file from the corpus"
            )
        name, start, end, channel = match.groups()
        segment = segments.setdefault(
            (name, channel), _segment(f"{path}:{number}", _samples(start), _samples(end), channel)
        )
        if len(columns) > _SAID:
            segment.words.append(Word(number, columns[_WRITTEN], columns[_SAID]))
        else:
            problem = f"{len(columns)} columns, and the pronunciation would be column {_SAID + 1}"
            segment.words.append(Word(number, "", "", problem=problem))
    return list(segments.values())


def read_trn(path: Path) -> list[Segment]:
    """Segments of a TRN (Form1) file; its words are phrases.

    Raises:
        DataError: bytes that are not Shift_JIS (CP932), a broken time, or a phrase outside a segment.
    """
    segments: list[Segment] = []
    for number, line in _lines(path):
        if line.startswith("%"):
            continue
        if match := _TRN_TIME.fullmatch(line):
            _, start, end, channel = match.groups()
            segments.append(_segment(f"{path}:{number}", _samples(start), _samples(end), channel))
            continue
        if _EVENTS.fullmatch(line):
            continue
        written, ampersand, said = (part.strip() for part in line.partition("&"))
        if not segments or (not ampersand and re.match(r"\d{4,} ", line)):
            raise DataError(
                f"{path}:{number}: a segment starts with a time, such as '0001 00000.113-00006.570 L:'; "
                f"found {line[:60]!r}. Restore the file from the corpus"
            )
        problem = "" if ampersand else "a phrase without & and a pronunciation behind it"
        segments[-1].words.append(Word(number, written, said, problem=problem))
    return segments


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, from 1, decoded one by one, without empty ones."""
    for number, raw in enumerate(path.read_bytes().split(b"\n"), 1):
        raw = raw.rstrip(b"\r\x1a")
        try:
            line = raw.decode("cp932")
        except UnicodeDecodeError as error:
            wrong, before = raw[error.start : error.start + 2].hex(" "), raw[: error.start].decode("cp932")
            raise DataError(
                f"{path}:{number}: not Shift_JIS (CP932): the bytes {wrong} behind {before[-20:]!r}. "
                "Restore the file from the corpus"
            ) from error
        if line.strip():
            yield number, line


def _segment(where: str, start: int, end: int, channel: str) -> Segment:
    if end <= start:
        first, last = start / SAMPLE_RATE, end / SAMPLE_RATE
        raise DataError(
            f"{where}: a segment from {first:.3f} to {last:.3f} s, which is no time at all. Restore the file "
            "from the corpus"
        )
    return Segment(start, end, channel)


def _samples(seconds: str) -> int:
    return round(float(seconds) * SAMPLE_RATE)


# --- XML --------------------------------------------------------------------------------------------------


def read_xml(path: Path) -> tuple[list[Segment], list[PhoneTime]]:
    """Segments of an XML file, and the phone times that talks of the core have in it.

    Raises:
        DataError: not XML, a time that is missing or no number, or a phoneme that the corpus does not have.
    """
    reader = _XmlReader(path)
    try:
        with open(path, "rb") as file:
            reader.parser.ParseFile(file)
    except expat.ExpatError as error:
        raise DataError(
            f"{path}:{error.lineno}: not XML ({error}). Restore the file from the corpus"
        ) from error
    return reader.segments, reader.phones


class _XmlReader:
    def __init__(self, path: Path):
        self.path = path
        self.segments: list[Segment] = []
        self.phones: list[PhoneTime] = []
        self._phoneme = ""
        self._times: list[int] = []
        self._where_phoneme = ""
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        if name == "IPU":
            start, end = (self._time(attributes, key) for key in ("IPUStartTime", "IPUEndTime"))
            self.segments.append(_segment(self._where(), start, end, attributes.get("Channel", "L")))
        elif name == "SUW" and self.segments:
            line, said = self.parser.CurrentLineNumber, attributes.get("PhoneticTranscription", "")
            problem = "" if "PhoneticTranscription" in attributes else "a SUW without a PhoneticTranscription"
            written = attributes.get("OrthographicTranscription", "")
            self.segments[-1].words.append(Word(line, written, said, problem=problem))
        elif name == "TransSUW" and self.segments and self.segments[-1].words:
            masks = (attributes.get(f"TagMask{part}", "0") for part in ("Start", "Midst", "End"))
            self.segments[-1].words[-1].masked |= any(mask not in ("", "0") for mask in masks)
        elif name == "Phoneme":
            self._phoneme, self._times = attributes.get("PhonemeEntity", ""), []
            self._where_phoneme = self._where()
        elif name == "Phone":
            self._times += [self._time(attributes, key) for key in ("PhoneStartTime", "PhoneEndTime")]

    def _end(self, name: str) -> None:
        if name == "Phoneme" and self._times and self.segments:
            self._add(self._phoneme, self._times[0], self._times[-1])

    def _add(self, phoneme: str, start: int, end: int) -> None:
        """A phoneme; from its first phone's start to its last one's end."""
        channel = self.segments[-1].channel
        before = self.phones[-1] if self.phones and self.phones[-1].channel == channel else None
        if before is not None:
            start = max(start, before.end)
        if phoneme == "FV" or end <= start:
            return
        if phoneme == "H":
            if before is not None and before.end == start:
                before.symbol += ":" * (before.symbol in VOWELS)
                before.end = end
        elif phoneme in _PHONEMES:
            self.phones.append(PhoneTime(_PHONEMES[phoneme], start, end, channel))
        else:
            raise DataError(
                f"{self._where_phoneme}: PhonemeEntity {phoneme!r} is outside the set; known are H, FV and "
                f"{' '.join(_PHONEMES)}"
            )

    def _time(self, attributes: dict[str, str], key: str) -> int:
        try:
            return _samples(attributes[key])
        except (KeyError, ValueError):
            raise DataError(
                f"{self._where()}: {key} must be a time in seconds, found {attributes.get(key)!r}. Restore "
                "the file from the corpus"
            ) from None

    def _where(self) -> str:
        return f"{self.path}:{self.parser.CurrentLineNumber}"
