"""CSJ, the Corpus of Spontaneous Japanese (NINJAL): fine-tuning and the three test sets.

Reads the USB, DVD and merl layouts (csj_files.py); SDB where it is, else XML, else TRN
(csj_transcripts.py); tags become phones by the options of csj_tags.py. Segments with little silence between
them are joined to utterances. Words are short units as phones; splits are train, dev, eval1, eval2, eval3.
Where a talk has an XML with phone times (the core), they become the alignment of its utterances.
"""

from __future__ import annotations

import logging
import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import soundfile
from csj_files import EVALS, Talk, find_talks, read_list, sets_of
from csj_speech import Joining, Spoken, join, speech_of
from csj_tags import Options
from csj_transcripts import PhoneTime, Segment, read_sdb, read_trn, read_xml

from jahubert.audio import AudioSource, audio_length
from jahubert.errors import AudioError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.manifest import Phone, Rejected, Utterance

log = logging.getLogger(__name__)

_BROKEN = ("broken transcript", "broken phone times")  # reasons that stop, unless broken=drop
_SHOWN = 20  # places that an error lists
# Figures of other recipes, to compare with. Utterances of egs/csj/s5, joined by the rule of join=kaldi, those
# with masked names left out; hours and utterances of lhotse's development set; hours of the paper's training.
KALDI = {"eval1": 1272, "eval2": 1292, "eval3": 1385}
LHOTSE_DEV = (3743, 6 + 40 / 60 + 15 / 3600)
PAPER_HOURS = {"core": 32.0, "all": 552.0}


@dataclass(frozen=True)
class Config(Options, Joining):
    subset: str = "core"  # core, all, or a file with the talks to train on, one a line
    dev: Literal["lhotse", "kaldi"] = "lhotse"  # 39 talks, or the first 4,000 utterances of the training data
    broken: Literal["stop", "drop"] = "stop"  # where a transcript cannot be read


@dataclass
class _Count:
    """What the summary says of a split."""

    talks: set[str] = field(default_factory=set)
    utterances: int = 0
    n_samples: int = 0
    words: int = 0

    @property
    def hours(self) -> float:
        return self.n_samples / SAMPLE_RATE / 3600

    def add(self, item: Utterance, talk: str) -> None:
        self.talks.add(talk)
        self.utterances += 1
        self.n_samples += item.n_samples
        self.words += len(item.words)


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield `<talk>_<start>_<end>` (milliseconds; `<talk>-L` in dialogues), and what had to be left out.

    The test sets come first, then dev, then the training talks in random order, so that the first part of
    the training data is a fair sample of it. The two channels of a stereo file go to `work`, one FLAC each.
    Logs talks, utterances, hours and words of every split.

    Raises:
        DataError: no corpus; a talk in two sets, or a held-out one in training; and, at the end, transcripts
            that could not be read, unless broken=drop.
    """
    if data is None:
        raise DataError("recipe csj needs data=FOLDER, a copy of the Corpus of Spontaneous Japanese")
    talks = find_talks(data)
    sets = sets_of(talks, config.subset, config.dev)
    if phrases := [talk for talk in sets if list(talks[talk].transcripts) == ["trn"]]:
        shown = " ".join(phrases[:5])
        log.warning("csj: %d talks have only a TRN, whose words are phrases: %s ...", len(phrases), shown)
    first = int(read_list("dev-kaldi")[0]) if config.dev == "kaldi" else 0
    counts = {name: _Count() for name in ("train", "dev", *EVALS)}
    dropped: Counter[str] = Counter()
    problems: list[str] = []
    for talk in _in_order(sets, seed, shuffled=lambda: counts["dev"].utterances >= first):
        for item in read_talk(talks[talk], work, config):
            if isinstance(item, Rejected):
                dropped[item.reason] += 1
                problems += [item.detail] if item.reason in _BROKEN else []
                yield item
                continue
            split = "dev" if sets[talk] == "train" and counts["dev"].utterances < first else sets[talk]
            counts[split].add(item, talk)
            yield replace(item, split=split)
    if problems and config.broken == "stop":
        shown = "\n  ".join(problems[:_SHOWN])
        raise DataError(
            f"transcripts of {len(problems)} utterances or talks cannot be read:\n  {shown}\n"
            + "  ...\n" * (len(problems) > _SHOWN)
            + "Mend the files, or leave these utterances out with prepare.options.broken=drop"
        )
    _log_summary(counts, dropped, config)


def _in_order(sets: dict[str, str], seed: int, shuffled: Callable[[], bool]) -> Iterator[str]:
    """Talks: test sets, dev, then training talks, by their ids and, once `shuffled` says so, at random."""
    for name in (*EVALS, "dev"):
        yield from (talk for talk in sets if sets[talk] == name)
    waiting = sorted((talk for talk in sets if sets[talk] == "train"), reverse=True)
    while waiting and not shuffled():
        yield waiting.pop()
    random.Random(f"talks {seed}").shuffle(waiting)
    yield from waiting


def _log_summary(counts: dict[str, _Count], dropped: Counter[str], config: Config) -> None:
    for name, count in counts.items():
        log.info(
            f"csj {name}: {len(count.talks):,} talks, {count.utterances:,} utterances, "
            f"{count.hours:.2f} h, {count.words:,} words{_beside(name, count, config)}"
        )
    for reason, n in dropped.most_common():
        log.info(f"csj dropped, {reason}: {n:,}")
    if missing := [name for name, count in counts.items() if not count.utterances]:
        log.warning("csj: nothing is in %s; a stage that needs it will say so", ", ".join(missing))


def _beside(name: str, count: _Count, config: Config) -> str:
    """How a split compares with what other recipes have of it; "" where none is comparable."""
    known = []
    if name in KALDI and config.join == "kaldi":
        known.append(("Kaldi", f"{KALDI[name]:,} utterances", count.utterances / KALDI[name]))
    if name == "dev" and config.dev == "lhotse":
        utterances, hours = LHOTSE_DEV  # its rule of joining is another one, so the hours are what compares
        known.append(("lhotse", f"{utterances:,} utterances, {hours:.2f} h", count.hours / hours))
    if name == "train" and config.subset in PAPER_HOURS:
        hours = PAPER_HOURS[config.subset]
        known.append(("the paper", f"{hours:.0f} h", count.hours / hours))
    return "".join(f"; {who}: {figure}, here {share:.1%} of that" for who, figure, share in known)


# --- a talk -----------------------------------------------------------------------------------------------


def read_talk(talk: Talk, work: Path, config: Config) -> Iterator[Utterance | Rejected]:
    """Utterances of a talk, channel by channel; their split is left open."""
    try:
        path, segments = _transcript(talk)
    except DataError as error:
        yield Rejected(talk.id, "broken transcript", str(error))
        return
    if path is None or not talk.audio:
        yield Rejected(talk.id, "no audio" if path else "no transcript")
        return
    phones: list[PhoneTime] = []
    if talk.core and "xml" in talk.transcripts:
        try:
            phones = read_xml(talk.transcripts["xml"])[1]
        except DataError as error:
            yield Rejected(f"{talk.id}.xml", "broken phone times", str(error))
    channels = sorted({segment.channel for segment in segments})
    dialogue = len(channels) > 1 or len(talk.audio) > 1 or talk.id.startswith("D")
    for channel in channels:
        speaker = f"{talk.id}-{channel}" if dialogue else talk.id
        try:
            audio, n_samples = _audio(talk, channel, len(channels), work)
        except AudioError as error:
            yield Rejected(speaker, "unusable audio", str(error))
            continue
        own = [segment for segment in segments if segment.channel == channel]
        times = sorted((phone for phone in phones if phone.channel == channel), key=lambda phone: phone.start)
        for said in join(speech_of(own, path, config), config):
            yield _utterance(said, speaker, audio, n_samples, times)


def _transcript(talk: Talk) -> tuple[Path | None, list[Segment]]:
    """The best transcript of a talk, and its segments."""
    files = talk.transcripts
    if "sdb" in files:
        return files["sdb"], read_sdb(files["sdb"])
    if "xml" in files:
        return files["xml"], read_xml(files["xml"])[0]
    if "trn" in files:
        return files["trn"], read_trn(files["trn"])
    return None, []


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
        beside = made.with_name(f"tmp-{made.name}")
        soundfile.write(beside, frames_TC[:, number], rate, format="FLAC", subtype="PCM_16")
        beside.replace(made)
    return made


def _utterance(
    said: Spoken, speaker: str, audio: AudioSource, n_samples: int, times: Sequence[PhoneTime]
) -> Utterance | Rejected:
    per_ms = SAMPLE_RATE / 1000
    name = f"{speaker}_{round(said.start / per_ms):07d}_{round(said.end / per_ms):07d}"
    if said.problems:
        return Rejected(name, "broken transcript", "; ".join(said.problems))
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
    """Phones between two samples of the talk, cut there, and counted from the first."""
    phones: list[Phone] = []
    for time in times[max(0, bisect_left(times, start, key=lambda time: time.start) - 1) :]:
        if time.start >= end:
            break
        first = max(time.start, start, phones[-1].end + start if phones else 0)
        if first < min(time.end, end):
            phones.append(Phone(time.symbol, first - start, min(time.end, end) - start))
    return tuple(phones)
