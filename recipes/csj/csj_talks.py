"""One talk: its best transcript, its audio, and the utterances that both make."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import soundfile
from csj_files import Talk
from csj_speech import Joining, Spoken, join, speech_of
from csj_tags import Options
from csj_transcripts import UNKNOWN, PhoneTime, Segment, read_sdb, read_trn, read_xml

from jahubert.audio import AudioSource, audio_length
from jahubert.errors import AudioError, DataError
from jahubert.formats.atomic import atomic_path
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.manifest import Phone, Rejected, Utterance

BROKEN, NO_TIMES = "broken transcript", "broken phone times"  # reasons


@dataclass(frozen=True)
class Reading(Options, Joining):
    """How a talk becomes utterances."""


@dataclass
class Transcript:
    """The best transcript of a talk; when each phone is said, from its XML, and what is wrong there."""

    path: Path
    segments: list[Segment]
    phones: list[PhoneTime] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def channels(self) -> list[str]:
        return sorted({segment.channel for segment in self.segments})

    def spoken(self, channel: str, options: Options) -> list[Spoken]:
        own = [segment for segment in self.segments if segment.channel == channel]
        return speech_of(own, self.path, options)


def read_transcript(talk: Talk, phones: bool = True) -> Transcript | None:
    """SDB where it is, else XML, else TRN; None without any. `phones`: with phone times, in the core.

    Phone times are an extra: what is wrong with them is noted, and stops nobody.

    Raises:
        DataError: a transcript that cannot be read.
    """
    files, xml = talk.transcripts, None
    if "sdb" in files:
        found = Transcript(files["sdb"], read_sdb(files["sdb"]))
    elif "xml" in files:
        xml = read_xml(files["xml"])
        found = Transcript(files["xml"], xml.segments)
    elif "trn" in files:
        found = Transcript(files["trn"], read_trn(files["trn"]))
    else:
        return None
    if phones and talk.core and "xml" in files:
        try:
            xml = xml or read_xml(files["xml"])
            found.phones, found.problems = xml.phones, xml.problems
        except DataError as error:
            found.problems = [str(error)]
    return found


def problems_of(talk: Talk, options: Options) -> list[str]:
    """What cannot be read in a talk's transcript, as file:line; the audio is not touched."""
    try:
        read = read_transcript(talk, phones=False)
    except DataError as error:
        return [str(error)]
    spoken = [said for name in read.channels for said in read.spoken(name, options)] if read else []
    return [problem for said in spoken for problem in said.problems]


def read_talk(talk: Talk, work: Path, options: Reading) -> Iterator[Utterance | Rejected]:
    """Utterances of a talk, channel by channel; their split is left open."""
    try:
        read = read_transcript(talk)
    except DataError as error:
        yield Rejected(talk.id, BROKEN, str(error))
        return
    if read is None or not talk.audio:
        yield Rejected(talk.id, "no audio" if read else "no transcript")
        return
    if read.problems:
        more = f"; and at {len(read.problems) - 1} more places" * (len(read.problems) > 1)
        yield Rejected(f"{talk.id}.xml", NO_TIMES, read.problems[0] + more)
    dialogue = len(read.channels) > 1 or len(talk.audio) > 1 or talk.id.startswith("D")
    for channel in read.channels:
        speaker = f"{talk.id}-{channel}" if dialogue else talk.id
        try:
            audio, n_samples = _audio(talk, channel, len(read.channels), work)
        except AudioError as error:
            yield Rejected(speaker, "unusable audio", str(error))
            continue
        own = (phone for phone in read.phones if phone.channel == channel)
        times = sorted(own, key=lambda phone: phone.start)
        for said in join(read.spoken(channel, options), options):
            yield _utterance(said, speaker, audio, n_samples, times)


def _audio(talk: Talk, channel: str, n_channels: int, work: Path) -> tuple[AudioSource, int]:
    """The mono file of a channel, and its length in 16 kHz samples; AudioError where there is none."""
    path = talk.audio.get(channel) or talk.audio.get("")
    if path is None:
        raise AudioError(f"talk {talk.id} has no file for its channel {channel}")
    if channel not in talk.audio:
        try:
            n_heard = soundfile.info(path).channels
        except (OSError, RuntimeError) as error:
            raise AudioError(f"{path} is not audio that can be read: {error}") from error
        if n_heard > 1:
            path = _one_channel(path, "LR".index(channel), work / f"{talk.id}-{channel}.flac")
        elif n_channels > 1:
            raise AudioError(
                f"{path} holds one channel of a dialogue; {talk.id}-L.wav and {talk.id}-R.wav are needed"
            )
    source = AudioSource(str(path))
    return source, audio_length(source)


def _one_channel(path: Path, number: int, made: Path) -> Path:
    """A channel of a stereo file as a file of its own, made once."""
    if not made.is_file():
        frames_TC, rate = soundfile.read(path, dtype="int16", always_2d=True)
        with atomic_path(made) as temporary:
            soundfile.write(temporary, frames_TC[:, number], rate, format="FLAC", subtype="PCM_16")
    return made


def _utterance(
    said: Spoken, speaker: str, audio: AudioSource, n_samples: int, times: Sequence[PhoneTime]
) -> Utterance | Rejected:
    per_ms = SAMPLE_RATE / 1000
    name = f"{speaker}_{round(said.start / per_ms):07d}_{round(said.end / per_ms):07d}"
    if said.problems:
        return Rejected(name, BROKEN, "; ".join(said.problems))
    if said.masked:
        return Rejected(name, "masked name")
    if not said.words:
        return Rejected(name, "no words")
    end = min(said.end, n_samples)
    if end <= said.start:
        return Rejected(name, "behind the end of the audio", f"{audio} has {n_samples / SAMPLE_RATE:.3f} s")
    return Utterance(
        id=name,
        audio=audio,
        start=said.start,
        n_samples=end - said.start,
        speaker=speaker,
        text=said.text,
        words=said.words,
        alignment=_alignment(times, said.start, end),
    )


def _alignment(times: Sequence[PhoneTime], start: int, end: int) -> tuple[Phone, ...]:
    """Phones between two samples of the talk, cut there, and counted from the first; () if one is UNKNOWN."""
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
