"""Synthetic corpus of sentences composed from the project's word lists and spoken by Open JTalk.

Nothing is downloaded. The voice is part of pyopenjtalk-plus (HTS voice "Mei", CC BY 3.0, MMDAgent Project
Team). All phone times are exact: at speed 1.0, the number of 5 ms frames of a phone depends only on its
context label, so a copy of the voice with a frame length of one sample yields the frame counts of labels
almost instantly. A speaker is a copy of the voice with its own pitch, frame length (which scales all
durations) and frequency warping (which changes the vocal tract length).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from noise import add_noise
from words import sentences

from jahubert.audio import AudioSource
from jahubert.errors import ConfigError, DataError, JahubertError
from jahubert.frames import SAMPLE_RATE
from jahubert.phonemes import VOWELS
from jahubert.prefetch import usable_cores
from jahubert.train.data.flac import flac_length, write_flac
from jahubert.train.data.manifest import Phone, Rejected, Utterance
from jahubert.train.experiment.script_processes import run_in_processes, run_items
from jahubert.train.text.japanese import Word, analyze, features_to_words, openjtalk

VERSION = 1  # version of the generated audio, hashed into the name of every file
_VOICE_RATE = 48_000  # sampling rate of the voice in Hz
_STEP = _VOICE_RATE // SAMPLE_RATE


@dataclass(frozen=True)
class Speaker:
    """A variant of the voice with its own speaking rate, pitch and vocal tract length."""

    name: str
    frame: int  # frame length in 48 kHz samples (original: 240); a multiple of 3, for exact 16 kHz times
    half_tones: float  # pitch shift in semitones
    warping: float  # frequency warping (original: 0.55); larger values mean a longer vocal tract


SPEAKERS = (
    Speaker("mei", 240, 0.0, 0.550),
    Speaker("calm", 264, -2.0, 0.565),
    Speaker("quick", 216, 2.0, 0.540),
    Speaker("deep", 228, -8.0, 0.595),
    Speaker("low", 252, -6.0, 0.585),
    Speaker("hasty", 204, -1.0, 0.555),
    Speaker("slow", 276, 1.0, 0.550),
    Speaker("small", 222, 4.0, 0.525),
)


@dataclass(frozen=True)
class Config:
    minutes: float = 35.0  # total duration of all splits
    dev_share: float = 0.085  # fraction of the minutes in dev
    test_share: float = 0.115  # fraction of the minutes in test
    processes: int = 0  # number of processes; 0: one per core, at most 8


@dataclass(frozen=True)
class Line:
    """A line to be spoken: all parameters that determine the audio of an utterance."""

    text: str
    speaker: int  # index into SPEAKERS
    lead: int  # number of frames removed from the silence at the start
    tail: int  # number of frames removed from the silence at the end
    level_db: float  # RMS level of the speech (dBFS)
    snr_db: float
    tilt: float  # spectral slope of the noise; 0 is white, 1 is pink
    noise: int  # random seed for the noise

    def path(self, work: Path) -> Path:
        key = json.dumps([VERSION, asdict(self), asdict(SPEAKERS[self.speaker])], ensure_ascii=False)
        return work / SPEAKERS[self.speaker].name / f"{hashlib.sha256(key.encode()).hexdigest()[:20]}.flac"


def prepare(data: None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    """Yield the utterances `demo-<split>-NNNNN` of the splits train, dev and test, which share no sentences.

    Audio is written to `work` as 16 kHz FLAC. Existing files are kept.

    Raises:
        ConfigError: durations or shares are out of range.
        DataError: the voice of pyopenjtalk-plus has an unexpected format.
        MissingExtraError: pyopenjtalk-plus is not installed.
        JahubertError: labels of pyopenjtalk-plus have an unexpected format or differ from the phones of the
            text, or a process failed.
    """
    shares = (config.dev_share, config.test_share)
    if config.minutes <= 0 or min(shares) < 0 or sum(shares) >= 1:
        raise ConfigError(
            f"demo: minutes must be above 0, dev_share and test_share at least 0, and their sum below 1; "
            f"found {config}"
        )
    yield from synthesize(sentences(seed), work, config, seed)


def synthesize(texts: Iterable[str], work: Path, config: Config, seed: int) -> Iterator[Utterance]:
    """Synthesize texts with alternating speakers until `minutes` are reached or the texts end."""
    plan: list[tuple[Line, Utterance]] = list(_plan(texts, work, config, seed))
    missing = [line for line, item in plan if flac_length(line.path(work)) != item.n_samples]
    processes = config.processes or min(8, usable_cores())
    run_in_processes(Path(__file__), missing, work, processes, _write)
    for _, item in plan:
        yield item


def _plan(texts: Iterable[str], work: Path, config: Config, seed: int) -> Iterator[tuple[Line, Utterance]]:
    """Yield the parameters and the utterance of each sentence for test, dev and train, in this order.

    The utterances have a total duration of `minutes`, unless the texts end first.
    """
    total = config.minutes * 60 * SAMPLE_RATE
    left = {"test": total * config.test_share, "dev": total * config.dev_share}
    left["train"] = total - left["test"] - left["dev"]
    counts = dict.fromkeys(left, 0)
    split = next(name for name in left if left[name] > 0)
    for i, text in enumerate(texts):
        rng = random.Random(f"line {seed} {i}")
        words, labels = _labels(text)
        frames = frames_of(labels)
        line = Line(
            text=text,
            speaker=i % len(SPEAKERS),
            lead=max(0, frames[0] - rng.randint(12, 50)),
            tail=max(0, frames[-1] - rng.randint(12, 50)),
            level_db=round(rng.uniform(-32, -20), 1),
            snr_db=round(rng.uniform(20, 50), 1),
            tilt=round(rng.uniform(0, 1), 2),
            noise=rng.getrandbits(32),
        )
        samples = SPEAKERS[line.speaker].frame // _STEP
        frames = [frames[0] - line.lead, *frames[1:-1], frames[-1] - line.tail]
        item = Utterance(
            id=f"demo-{split}-{counts[split]:05d}",
            audio=AudioSource(str(line.path(work))),
            n_samples=sum(frames) * samples,
            speaker=SPEAKERS[line.speaker].name,
            text=text,
            words=tuple(word.phones for word in words),
            split=split,
            alignment=align(words, labels, [n * samples for n in frames]),
        )
        yield line, item
        counts[split] += 1
        left[split] -= item.n_samples
        if left[split] <= 0:
            later = list(left)[list(left).index(split) + 1 :]
            split = next((name for name in later if left[name] > 0), "")
            if not split:
                return


def _labels(text: str) -> tuple[list[Word], list[str]]:
    """Analyze a sentence, and return its words and its full-context labels."""
    features = analyze(text)
    return features_to_words(features), openjtalk().make_label(features)


def _phone_of(label: str) -> str:
    match = re.search(r"-(\w+)\+", label)
    if match is None:
        raise JahubertError(f"label from pyopenjtalk has an unexpected format: {label}")
    return match[1]


def align(words: Sequence[Word], labels: Sequence[str], samples: Sequence[int]) -> tuple[Phone, ...]:
    """Align the phones of words with labels. A long vowel has two labels. The phone of a silence is `pau`.

    Args:
        samples: number of samples for each label.

    Raises:
        JahubertError: the phones of the labels and of the words differ.
    """
    label_phones = [_phone_of(label) for label in labels]
    kana = " ".join(word.kana for word in words)
    phones: list[Phone] = []
    remaining = (phone for word in words for phone in word.phones)
    i = start = 0
    while i < len(labels):
        if label_phones[i] in ("sil", "pau"):
            symbol, parts = "pau", ["pau"]
        else:
            symbol = next(remaining, "none")
            parts = [symbol[0]] * 2 if symbol.endswith(":") else [symbol]
        actual = label_phones[i : i + len(parts)]
        if [_phone_class(phone) for phone in actual] != [_phone_class(phone) for phone in parts]:
            expected = "end" if symbol == "none" else f"have the phone {symbol}"
            raise JahubertError(f"the labels have {' '.join(actual)} where the words {kana} {expected}")
        end = start + sum(samples[i : i + len(parts)])
        phones.append(Phone(symbol, start, end))
        start, i = end, i + len(parts)
    if (missing := next(remaining, None)) is not None:
        raise JahubertError(f"the labels end before the phone {missing} in the words {kana}")
    return tuple(phones)


def _phone_class(phone: str) -> str:
    """Map a phone of Open JTalk (devoiced I and U, cl, sil) or of the 40 phones to a common class."""
    if phone in ("sil", "pau", "none"):
        return phone.replace("sil", "pau")
    if phone in ("cl", "q"):
        return "q"
    return phone.lower() if phone.lower() in VOWELS else "N" if phone == "N" else "consonant"


# --- synthesis ------------------------------------------------------------------------------------------


@cache
def _engine(frame: int, warping: float) -> Any:
    """Create an HTS engine with a copy of the voice that has the given frame length and warping."""
    pyopenjtalk = openjtalk()
    voice = Path(os.fsdecode(pyopenjtalk.DEFAULT_HTS_VOICE)).read_bytes()
    voice, n_frame = re.subn(rb"FRAME_PERIOD:\d+", b"FRAME_PERIOD:%d" % frame, voice, count=1)
    voice, n_warping = re.subn(rb"ALPHA=[\d.]+", b"ALPHA=%.3f" % warping, voice, count=1)
    if not n_frame or not n_warping or b"SAMPLING_FREQUENCY:%d\n" % _VOICE_RATE not in voice:
        raise DataError("the voice of pyopenjtalk-plus has an unexpected format; install version 0.4.1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "voice.htsvoice"
        path.write_bytes(voice)
        return pyopenjtalk.HTSEngine(os.fsencode(path))


def frames_of(labels: Sequence[str]) -> list[int]:
    """Return the number of frames for each label, which is the same for all speakers."""
    engine = _engine(1, 0.55)
    return [len(engine.synthesize([label])) for label in labels]


def waveform(line: Line) -> np.ndarray:
    """Synthesize a line, and return int16 (T,) at 16 kHz."""
    speaker = SPEAKERS[line.speaker]
    engine = _engine(speaker.frame, speaker.warping)
    engine.add_half_tone(speaker.half_tones)
    wave = engine.synthesize(_labels(line.text)[1]).astype(np.float32)
    wave = wave[line.lead * speaker.frame : len(wave) - line.tail * speaker.frame]
    wave_T = soxr.resample(wave, _VOICE_RATE, SAMPLE_RATE)
    return add_noise(wave_T, level_db=line.level_db, snr_db=line.snr_db, tilt=line.tilt, seed=line.noise)


def _write(line: Line, work: Path) -> None:
    write_flac(line.path(work), waveform(line))


if __name__ == "__main__":
    run_items(lambda fields: Line(**fields), _write)
