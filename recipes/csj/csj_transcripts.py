"""Readers for CSJ transcripts: SDB and TRN (Shift_JIS) and XML.

A transcript is a list of segments, the timed units of the corpus: speech between pauses of at least 0.2 s.
The words of a segment are short unit words in SDB and XML, and phrases (bunsetsu) in TRN. They may contain
tags. A malformed line, which `Word.problem` describes, affects only the segments to which it may
belong.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

from csj_files import TALK_ID, decoded_lines
from csj_phonemes import LONG, OUTSIDE, PHONES, SILENT, phone_of

from jahubert.errors import DataError, quote
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import VOWELS
from jahubert.train.data.utterances import read_bytes

_TALK, _TIME, _ORTHOGRAPHY, _PRONUNCIATION = 2, 3, 5, 10  # columns of an SDB file, counted from 0
_SDB_TIME = re.compile(r"(\d+) (\d{1,9}\.\d+)-(\d{1,9}\.\d+) ([LR]):.*")
_TRN_TIME = re.compile(r"(\d{4,}) (\d{1,9}\.\d+)-(\d{1,9}\.\d+) ([LR]):.*")
_EVENT_TAGS = re.compile(r"(\s*<[^<>]*>)+\s*")
UNKNOWN = ""  # symbol of a phone with an unreadable label or time
# Signs of a wrong encoding: the replacement for bytes that cannot be decoded, and half-width kana.
_BAD = re.compile("[\ufffd\uff61-\uff9f]")
_TALK_ID = re.compile(TALK_ID, re.IGNORECASE)


@dataclass
class Word:
    """A word, including its tags."""

    line: int
    orthography: str
    pronunciation: str
    masked: bool = False
    problem: str = ""  # description of a problem in the pronunciation
    text_problem: str = ""  # description of a problem in the orthography


@dataclass
class Segment:
    """The words between two pauses."""

    start: int  # 16 kHz samples from the start of the talk
    end: int  # exclusive
    channel: str  # L or R
    words: list[Word] = field(default_factory=list)


@dataclass
class PhoneTime:
    """A phone with its start and end."""

    symbol: str  # one of the 40 phones, or UNKNOWN
    start: int  # 16 kHz samples from the start of the talk
    end: int  # exclusive
    channel: str


def read_sdb(path: Path) -> list[Segment]:
    """Read the segments of an SDB file in file order, with interleaved channels in dialogues.

    Raises:
        DataError: the file cannot be read, no line has a time, or the lines belong to another talk.
    """
    segments: dict[tuple[str, str], Segment] = {}
    latest: dict[str, Segment] = {}  # channel -> its last segment
    unplaced: list[Word] = []  # words from lines without a time, which may belong to the next segment
    numbers: dict[str, int] = {}  # content of a line -> number of its first occurrence
    talks: set[str] = set()
    for number, line in _lines(path):
        columns = line.split("\t")
        talks.update(columns[_TALK : _TALK + 1])
        match = _SDB_TIME.fullmatch(columns[_TIME]) if len(columns) > _TIME else None
        if match is None:
            found = repr(columns[_TIME]) if len(columns) > _TIME else f"no column {_TIME + 1}"
            problem = f"expected a time in column {_TIME + 1}, such as '0001 00000.113-00006.570 L:-001-001'"
            word = Word(number, "", "", problem=f"{problem}; found {found}")
            for segment in latest.values():
                segment.words.append(word)
            unplaced.append(word)
            continue
        name, start, end, channel = match.groups()
        times = (_samples(start), _samples(end))
        segment = segments.setdefault((name, channel), Segment(*times, channel))
        latest[channel] = segment
        segment.words += unplaced
        unplaced = []
        word = _sdb_word(number, columns)
        first = numbers.setdefault(line, number)
        if times != (segment.start, segment.end):
            word.problem = f"the times of segment {name} differ from those in line {segment.words[0].line}"
        elif first != number and not _is_event(word.orthography):
            word.problem = f"the line repeats line {first}"
        segment.words.append(word)
    if not segments:
        reason = unplaced[0].problem if unplaced else "the file is empty"
        raise DataError(f"{path}:{unplaced[0].line if unplaced else 1}: {reason}")
    _check_talk(path, talks)
    return _check_times(segments.values())


def _check_talk(path: Path, talks: Iterable[str]) -> None:
    """Raise DataError if a transcript, named after its talk, contains only ids of other talks."""
    own = _TALK_ID.match(path.name)
    others = {talk.upper() for talk in talks if _TALK_ID.fullmatch(talk)}
    if own and others and own[0].upper() not in others:
        raise DataError(f"{path}: the file contains the transcript of talk {min(others)}; rename it")


def _sdb_word(line: int, columns: list[str]) -> Word:
    padded = (*columns, *[""] * _PRONUNCIATION)
    word = Word(line, padded[_ORTHOGRAPHY], padded[_PRONUNCIATION])
    if len(columns) <= _PRONUNCIATION and not _is_event(word.orthography):
        word.problem = (
            f"found {len(columns)} columns, but the pronunciation is in column {_PRONUNCIATION + 1}"
        )
    return _check_encoding(word)


def read_trn(path: Path) -> list[Segment]:
    """Read the segments of a TRN (Form1) file, whose words are phrases.

    Raises:
        DataError: the file cannot be read, no segment has a usable time, or the header names another talk.
    """
    segments: list[Segment] = []
    numbers: dict[tuple[str, str], int] = {}  # (segment, channel) -> line
    for number, line in _lines(path):
        if line.startswith("%"):
            if line.startswith("%講演ID:"):
                _check_talk(path, [line.partition(":")[2].strip()])
            continue
        if match := _TRN_TIME.fullmatch(line):
            name, start, end, channel = match.groups()
            segments.append(Segment(_samples(start), _samples(end), channel))
            if (first := numbers.setdefault((name, channel), number)) != number:
                word = Word(number, "", "", problem=f"segment {name} already occurs in line {first}")
                segments[-1].words.append(word)
            continue
        if _EVENT_TAGS.fullmatch(line):
            continue
        orthography, ampersand, pronunciation = (part.strip() for part in line.partition("&"))
        is_header = not ampersand and re.match(r"\d{4,} ", line)
        if is_header or not segments:  # the line starts a segment whose time is unknown
            time = segments[-1].end if segments else 0
            problem = f"expected a time, such as '0001 00000.113-00006.570 L:'; found {quote(line)}"
            word = Word(number, "", "", problem=problem)
            segments.append(Segment(time, time, segments[-1].channel if segments else "L", [word]))
            continue
        word = Word(number, orthography, pronunciation)
        if not ampersand:
            word.problem = "the phrase has no & followed by a pronunciation"
        segments[-1].words.append(_check_encoding(word))
    if all(segment.end <= segment.start for segment in segments):
        raise DataError(f"{path}: no segment with a time, such as '0001 00000.113-00006.570 L:'")
    return _check_times(segments)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the non-empty lines as (number, line), with U+FFFD for bytes that are not Shift_JIS (CP932)."""
    for number, line in enumerate(decoded_lines(read_bytes(path)), 1):
        if line.strip():
            yield number, line


def _check_encoding(word: Word) -> Word:
    if _BAD.search(word.pronunciation) and not word.problem:
        word.problem = f"not Shift_JIS (CP932): {quote(word.pronunciation)}"
    if _BAD.search(word.orthography):
        word.text_problem = f"not Shift_JIS (CP932): {quote(word.orthography)}"
    return word


def _check_times(segments: Iterable[Segment]) -> list[Segment]:
    """Add a problem to each segment that does not end after its start, and set its length to 0.

    Segments that already have a problem remain unchanged.
    """
    result = list(segments)
    for segment in result:
        if segment.end <= segment.start and not any(word.problem for word in segment.words):
            start, end = segment.start / SAMPLE_RATE, segment.end / SAMPLE_RATE
            if segment.words:
                segment.words[0].problem = f"the segment ends at {end:.3f} s, but starts at {start:.3f} s"
            segment.end = segment.start
    return result


def _is_event(orthography: str) -> bool:
    """Return whether a word is empty or consists only of events, whose pronunciation may be missing."""
    return not _EVENT_TAGS.sub("", orthography).strip()


def _samples(seconds: str) -> int:
    return round(float(seconds) * SAMPLE_RATE)


# --- XML --------------------------------------------------------------------------------------------------


@dataclass
class XmlTranscript:
    """The content of an XML file."""

    segments: list[Segment] = field(default_factory=list)
    phones: list[PhoneTime] = field(default_factory=list)  # only core talks have phones
    problems: list[str] = field(default_factory=list)  # unreadable phone labels and times, with file:line


def read_xml(path: Path) -> XmlTranscript:
    """Read the segments and phone times of an XML file.

    Raises:
        DataError: the file cannot be read, is not in its declared encoding, is not well-formed XML, has no
            segment, or contains another talk.
    """
    reader = _XmlReader(path)
    try:
        reader.parser.Parse(_utf8_xml(path), True)
    except expat.ExpatError as error:
        raise DataError(f"{path}:{error.lineno}: not well-formed XML ({error})") from error
    if not reader.result.segments:
        raise DataError(f"{path}: no segment (IPU)")
    _check_times(reader.result.segments)
    return reader.result


def _utf8_xml(path: Path) -> bytes:
    """Read an XML file as UTF-8, converting it from its declared encoding if it is not UTF-8 already.

    expat does not support Shift_JIS and EUC-JP.
    """
    raw = read_bytes(path)
    with suppress(UnicodeDecodeError):
        raw.decode()
        return raw
    declaration = re.match(rb"\s*<\?xml[^>]*encoding\s*=\s*[\"']([\w.:-]+)", raw)
    encoding = declaration[1].decode("ascii") if declaration else "utf-8"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding = "utf-16"
    is_shift_jis = encoding.lower().replace("-", "_") in ("shift_jis", "sjis", "windows_31j")
    try:
        return raw.decode("cp932" if is_shift_jis else encoding).encode()
    except (UnicodeDecodeError, LookupError) as error:
        raise DataError(f"{path}: not in the declared encoding {encoding} ({error})") from error


class _XmlReader:
    def __init__(self, path: Path):
        self.path, self.result = path, XmlTranscript()
        self._label, self._line = "", 0  # label and line of the current phoneme
        self._before = ""  # label of the previous phone
        self._times: list[int] = []
        self._lines: dict[tuple[str, str], int] = {}  # (IPUID, channel) -> line
        self.parser = expat.ParserCreate("utf-8")
        self.parser.StartElementHandler = self._start
        self.parser.EndElementHandler = self._end

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        segments, line = self.result.segments, self.parser.CurrentLineNumber
        if name == "Talk":
            _check_talk(self.path, [attributes.get("TalkID", "")])
        elif name == "IPU":
            self._add_segment(attributes, line)
            self._before = ""
        elif name == "SUW" and segments:
            orthography = attributes.get("OrthographicTranscription", "")
            word = Word(line, orthography, attributes.get("PhoneticTranscription", ""))
            if "PhoneticTranscription" not in attributes and not _is_event(orthography):
                word.problem = "the SUW has no PhoneticTranscription"
            segments[-1].words.append(word)
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

    def _add_segment(self, attributes: dict[str, str], line: int) -> None:
        segments = self.result.segments
        segment = Segment(0, 0, attributes.get("Channel", "L"))
        try:
            segment.start, segment.end = (
                self._time(attributes, f"IPU{edge}Time") for edge in ("Start", "End")
            )
        except DataError as error:
            segment.start = segment.end = segments[-1].end if segments else 0
            segment.words.append(Word(line, "", "", problem=str(error).partition(": ")[2]))
        name = attributes.get("IPUID", f"line {line}")
        if (first := self._lines.setdefault((name, segment.channel), line)) != line:
            problem = f"IPU {name} already occurs in line {first}"
            segment.words.append(Word(line, "", "", problem=problem))
        segments.append(segment)

    def _end(self, name: str) -> None:
        if name == "Phoneme" and self._times:
            self._add(self._label, min(self._times), max(self._times))

    def _add(self, label: str, start: int, end: int) -> None:
        """Add a phoneme that lasts from the start of its first phone to the end of its last phone."""
        channel, phones = self.result.segments[-1].channel, self.result.phones
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
            labels = " ".join((*PHONES, LONG, *SILENT))
            problem = f"unknown PhonemeEntity {quote(label)}; known labels: {labels}"
            self._unknown(start, end, f"{self.path}:{self._line}: {problem}")

    def _unknown(self, start: int, end: int, problem: str) -> None:
        self.result.phones.append(PhoneTime(UNKNOWN, start, end, self.result.segments[-1].channel))
        self.result.problems.append(problem)

    def _time(self, attributes: dict[str, str], key: str) -> int:
        try:
            return _samples(attributes[key])
        except (KeyError, ValueError, OverflowError):  # OverflowError: the time is infinite
            raise DataError(
                f"{self.path}:{self.parser.CurrentLineNumber}: {key} must be a time in seconds; found "
                f"{quote(attributes.get(key))}"
            ) from None
