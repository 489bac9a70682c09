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

from csj_phonemes import LONG, OUTSIDE, PHONES, SILENT, phone_of

from jahubert.errors import DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import VOWELS

_TIME, _WRITTEN, _SAID = 3, 5, 10  # columns of SDB, from 0
_SDB_TIME = re.compile(r"(\d+) (\d+\.\d+)-(\d+\.\d+) ([LR]):.*")
_TRN_TIME = re.compile(r"(\d{4,}) (\d+\.\d+)-(\d+\.\d+) ([LR]):.*")
_EVENTS = re.compile(r"(\s*<[^<>]*>)+\s*")
UNKNOWN = ""  # a phone that could not be read: its time is known, what it was is not


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
    """A phone of the 40, or UNKNOWN, and when it is said, in 16 kHz samples from the start of the talk."""

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
        written, said = ((*columns, *[""] * _SAID)[column] for column in (_WRITTEN, _SAID))
        lacks = len(columns) <= _SAID and not _nothing_said(written)
        problem = f"{len(columns)} columns, and the pronunciation would be column {_SAID + 1}"
        segment.words.append(Word(number, written, said, problem=problem if lacks else ""))
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


def _nothing_said(written: str) -> bool:
    """Whether a word is events and no more, whose pronunciation may be missing."""
    return not _EVENTS.sub("", written).strip()


def _samples(seconds: str) -> int:
    return round(float(seconds) * SAMPLE_RATE)


# --- XML --------------------------------------------------------------------------------------------------


@dataclass
class Xml:
    """What an XML file holds: segments, and for talks of the core when each phone is said.

    `problems` are places, as file:line, where phone times cannot be read; a phone there is UNKNOWN.
    """

    segments: list[Segment] = field(default_factory=list)
    phones: list[PhoneTime] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def read_xml(path: Path) -> Xml:
    """The segments and phone times of an XML file. What is wrong with phone times is only noted in it.

    Raises:
        DataError: not XML, or a time of a segment that is missing or no number.
    """
    reader = _XmlReader(path)
    try:
        with open(path, "rb") as file:
            reader.parser.ParseFile(file)
    except expat.ExpatError as error:
        raise DataError(
            f"{path}:{error.lineno}: not XML ({error}). Restore the file from the corpus"
        ) from error
    return reader.found


class _XmlReader:
    def __init__(self, path: Path):
        self.path, self.found = path, Xml()
        self._label, self._line = "", 0  # of the phoneme that is being read
        self._before = ""  # label of the last of `phones`
        self._times: list[int] = []
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        segments, line = self.found.segments, self.parser.CurrentLineNumber
        if name == "IPU":
            start, end = (self._time(attributes, key) for key in ("IPUStartTime", "IPUEndTime"))
            segments.append(_segment(f"{self.path}:{line}", start, end, attributes.get("Channel", "L")))
            self._before = ""
        elif name == "SUW" and segments:
            written, said = (
                attributes.get(f"{kind}Transcription", "") for kind in ("Orthographic", "Phonetic")
            )
            lacks = "PhoneticTranscription" not in attributes and not _nothing_said(written)
            problem = "a SUW without a PhoneticTranscription" if lacks else ""
            segments[-1].words.append(Word(line, written, said, problem=problem))
        elif name == "TransSUW" and segments and segments[-1].words:
            masks = (attributes.get(f"TagMask{part}", "0") for part in ("Start", "Midst", "End"))
            segments[-1].words[-1].masked |= any(mask not in ("", "0") for mask in masks)
        elif name == "Phoneme" and segments:
            self._label, self._line, self._times = attributes.get("PhonemeEntity", ""), line, []
        elif name == "Phone" and segments and attributes.get("PhoneEntity") not in OUTSIDE:
            try:
                self._times += [self._time(attributes, key) for key in ("PhoneStartTime", "PhoneEndTime")]
            except DataError as error:
                self._unknown(segments[-1].start, segments[-1].end, str(error))

    def _end(self, name: str) -> None:
        if name == "Phoneme" and self._times:
            self._add(self._label, min(self._times), max(self._times))

    def _add(self, label: str, start: int, end: int) -> None:
        """A phoneme; from its first phone's start to its last one's end."""
        channel, phones = self.found.segments[-1].channel, self.found.phones
        label_before, self._before = self._before, ""
        before = phones[-1] if phones and phones[-1].channel == channel else None
        if before is not None:
            start = max(start, before.end)
        if label in SILENT or end <= start:
            return
        if label == LONG:
            if before is not None and before.end == start:
                before.symbol += ":" * (before.symbol in VOWELS)
                before.end = end
        elif label in PHONES:
            if before is not None and label in VOWELS and label_before:
                before.symbol = phone_of(label_before, label)
            phones.append(PhoneTime(phone_of(label), start, end, channel))
            self._before = label
        else:
            known = " ".join((*PHONES, LONG, *SILENT))
            problem = f"PhonemeEntity {label!r} is not known; the known ones are {known}"
            self._unknown(start, end, f"{self.path}:{self._line}: {problem}")

    def _unknown(self, start: int, end: int, problem: str) -> None:
        self.found.phones.append(PhoneTime(UNKNOWN, start, end, self.found.segments[-1].channel))
        self.found.problems.append(problem)

    def _time(self, attributes: dict[str, str], key: str) -> int:
        try:
            return _samples(attributes[key])
        except (KeyError, ValueError):
            raise DataError(
                f"{self.path}:{self.parser.CurrentLineNumber}: {key} must be a time in seconds, found "
                f"{attributes.get(key)!r}. Restore the file from the corpus"
            ) from None
