"""Conversion of the preferred transcript and the audio of a talk to utterances."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
from csj_files import DIFFERENT_COPIES, Talk, compare_copies
from csj_speech import JoinOptions, SpokenSegment, join_segments, resolve_segments
from csj_tags import TagOptions
from csj_transcripts import UNKNOWN, PhoneTime, Segment, read_sdb, read_trn, read_xml

from jahubert.audio import AudioSource, audio_length
from jahubert.errors import AudioError, DataError, ReadError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.flac import write_flac
from jahubert.train.data.manifest import Phone, Rejected, Utterance
from jahubert.train.data.utterances import UNUSABLE_AUDIO, read_reliably

# Reasons for rejection
BROKEN, NO_TIMES = "broken transcript", "broken phone times"
NO_AUDIO, NO_TRANSCRIPT = "no audio", "no transcript"
_TOLERANCE = SAMPLE_RATE // 10  # maximum number of samples by which a segment may exceed the audio


@dataclass(frozen=True)
class TalkOptions(TagOptions, JoinOptions):
    """Options that determine the utterances of a talk."""


@dataclass
class Transcript:
    """The preferred transcript of a talk, with the phone times from its XML file."""

    path: Path
    segments: list[Segment]
    phones: list[PhoneTime] = field(default_factory=list)
    phone_problems: list[str] = field(default_factory=list)

    @property
    def channels(self) -> list[str]:
        return sorted({segment.channel for segment in self.segments})


def read_transcript(talk: Talk, phones: bool = True) -> Transcript | None:
    """Read the SDB, XML or TRN file of a talk, in this order of preference, or return None if it has none.

    Args:
        phones: whether to read the phone times of core talks. Errors in phone times are recorded, not raised.

    Raises:
        DataError: the transcript is unreadable.
    """
    files, xml = talk.transcripts, None
    if "sdb" in files:
        transcript = Transcript(files["sdb"], read_sdb(files["sdb"]))
    elif "xml" in files:
        xml = read_xml(files["xml"])
        transcript = Transcript(files["xml"], xml.segments)
    elif "trn" in files:
        transcript = Transcript(files["trn"], read_trn(files["trn"]))
    else:
        return None
    if phones and talk.core and "xml" in files:
        try:
            xml = xml or read_xml(files["xml"])
            transcript.phones, transcript.phone_problems = xml.phones, xml.problems
        except ReadError:
            raise
        except DataError as error:
            transcript.phone_problems = [str(error)]
    return transcript


@dataclass
class TalkCheck:
    """Result of checking the transcript and the files of a talk."""

    n_segments: int = 0
    n_broken: int = 0  # number of segments that cannot be read
    problems: list[str] = field(default_factory=list)  # problems in the pronunciation, with file:line
    # Problems in the orthography, which does not affect the phones.
    text_problems: list[str] = field(default_factory=list)
    rejected: Rejected | None = None  # the reason, if the whole talk is unusable
    duplicates: list[Rejected] = field(default_factory=list)  # identical copies of files, which are not used


def check_talk(talk: Talk, options: TagOptions) -> TalkCheck:
    """Check the files and the transcript of a talk without decoding its audio."""
    check = TalkCheck()
    for copy in compare_copies(talk):
        if copy.reason == DIFFERENT_COPIES:
            check.rejected = copy
            return check
        check.duplicates.append(copy)
    try:
        transcript = read_transcript(talk, phones=False)
    except ReadError:
        raise
    except DataError as error:
        check.rejected = Rejected(talk.id, BROKEN, str(error))
        return check
    if transcript is None or not talk.audio:
        check.rejected = _missing(talk)
        return check
    for segment in resolve_segments(transcript.segments, transcript.path, options):
        check.n_segments += not segment.event_only
        check.n_broken += bool(segment.problems)
        check.problems += segment.problems
        check.text_problems += segment.text_problems
    return check


def _missing(talk: Talk) -> Rejected:
    """Reject a talk without a transcript or without audio."""
    found = next(iter((*talk.transcripts.values(), *talk.audio.values())))
    return Rejected(talk.id, NO_AUDIO if talk.transcripts else NO_TRANSCRIPT, f"found {found}")


def read_talk(talk: Talk, work: Path, options: TalkOptions) -> Iterator[Utterance | Rejected]:
    """Yield the utterances and rejected items of a talk that passed `check_talk`, without setting splits."""
    transcript = read_transcript(talk)
    if transcript is None:
        yield _missing(talk)
        return
    if problems := transcript.phone_problems:
        more = f"; and {len(problems) - 1} more" if len(problems) > 1 else ""
        yield Rejected(f"{talk.id}.xml", NO_TIMES, problems[0] + more)
    channels = transcript.channels
    is_dialogue = len(channels) > 1 or len(talk.audio) > 1 or talk.id.startswith("D")
    joined = join_segments(resolve_segments(transcript.segments, transcript.path, options), options)
    for channel in channels:
        speaker = f"{talk.id}-{channel}" if is_dialogue else talk.id
        try:
            audio, n_samples = _channel_audio(talk, channel, len(channels), work)
        except AudioError as error:
            yield Rejected(speaker, UNUSABLE_AUDIO, str(error))
            continue
        phones = [phone for phone in transcript.phones if phone.channel == channel]
        phones.sort(key=lambda phone: phone.start)
        for segment in joined:
            if segment.channel == channel:
                yield _utterance(segment, speaker, audio, n_samples, phones)


def _channel_audio(talk: Talk, channel: str, n_channels: int, work: Path) -> tuple[AudioSource, int]:
    """Return the mono audio of a channel and its length in 16 kHz samples.

    Raises:
        AudioError: the file is missing, its audio is unusable, or it contains only one channel of a dialogue.
        ReadError: the file system still fails after several attempts.
    """
    file = talk.audio.get(channel) or talk.audio.get("")
    if file is None:
        raise AudioError(f"talk {talk.id}: no audio file found for channel {channel}")
    path = file
    n_file_channels = read_reliably(lambda: _n_channels(file), file)
    if channel not in talk.audio:
        if n_file_channels > 1:
            target = work / f"{talk.id}-{channel}.flac"
            path = read_reliably(lambda: _extract_channel(file, "LR".index(channel), target), file)
        elif n_channels > 1:
            raise AudioError(
                f"{path} contains only one channel of a dialogue; provide both {talk.id}-L.wav and "
                f"{talk.id}-R.wav"
            )
    source = AudioSource(str(path))
    return source, read_reliably(lambda: audio_length(source), source)


def _n_channels(path: Path) -> int:
    """Return the number of channels of an audio file.

    Raises:
        AudioError: the file is unreadable, or its format is not that of the corpus, which indicates a damaged
            header.
    """
    try:
        info = soundfile.info(path)
    except RuntimeError as error:
        raise AudioError(f"{path}: cannot be read as audio ({error})") from error
    found = (info.samplerate, info.subtype)
    if found != (SAMPLE_RATE, "PCM_16") or info.channels not in (1, 2):
        raise AudioError(
            f"{path}: expected one or two channels of 16-bit audio at {SAMPLE_RATE} Hz, as in the corpus; "
            f"found {info.subtype} at {info.samplerate} Hz, number of channels: {info.channels}"
        )
    return info.channels


def _extract_channel(path: Path, index: int, target: Path) -> Path:
    """Write one channel of a stereo file to `target`, unless `target` exists."""
    if not target.is_file():
        try:
            frames_TC, rate = soundfile.read(path, dtype="int16", always_2d=True)
        except RuntimeError as error:
            raise AudioError(f"{path}: cannot be read as audio ({error})") from error
        write_flac(target, frames_TC[:, index], rate)
    return target


def _utterance(
    segment: SpokenSegment, speaker: str, audio: AudioSource, n_samples: int, phones: Sequence[PhoneTime]
) -> Utterance | Rejected:
    per_ms = SAMPLE_RATE / 1000
    name = f"{speaker}_{round(segment.start / per_ms):07d}_{round(segment.end / per_ms):07d}"
    if segment.problems:
        return Rejected(name, BROKEN, "; ".join(segment.problems))
    if segment.masked:
        return Rejected(name, "masked name")
    if not segment.words:
        return Rejected(name, "no words")
    end = min(segment.end, n_samples)
    if segment.end > n_samples + _TOLERANCE or end <= segment.start:
        return Rejected(
            name, "after the end of the audio", f"{audio} ends at {n_samples / SAMPLE_RATE:.3f} s"
        )
    return Utterance(
        id=name,
        audio=audio,
        start=segment.start,
        n_samples=end - segment.start,
        speaker=speaker,
        text=segment.text,
        words=segment.words,
        alignment=_alignment(phones, segment.start, end),
    )


def _alignment(times: Sequence[PhoneTime], start: int, end: int) -> tuple[Phone, ...]:
    """Return the phones between two samples, clipped and relative to `start`, or () if one is UNKNOWN."""
    phones: list[Phone] = []
    for time in times[max(0, bisect_left(times, start, key=lambda time: time.start) - 1) :]:
        if time.start >= end:
            break
        first = max(time.start, start, phones[-1].end + start if phones else 0)
        if first < min(time.end, end):
            if time.symbol == UNKNOWN:
                return ()
            phones.append(Phone(time.symbol, first - start, min(time.end, end) - start))
    return tuple(phones)
