"""A corpus whose every phone is a chord of its own: learnt in seconds, with phone times known exactly."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from jahubert.audio import AudioSource
from jahubert.errors import DataError
from jahubert.train.manifest import Phone, Rejected, Utterance

PHONES = ("a", "i", "u", "k", "s", "t", "n", "N")
LETTERS = dict(zip(PHONES, "亜伊宇加左多奈无", strict=True))  # one for each: a text to learn characters from
LENGTH = 1600  # samples of a phone


@dataclass(frozen=True)
class Config:
    utterances: int = 60


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    if data is not None and not data.is_dir():
        raise DataError(f"{data}: no such folder; give the folder of the corpus with data=...")
    yield Rejected("broken-0", "made to be rejected")
    for number in range(config.utterances):
        rng = np.random.default_rng([seed, number])
        words = [tuple(rng.choice(PHONES, rng.integers(2, 4))) for _ in range(rng.integers(3, 6))]
        wav, alignment = [], []
        for word in words:
            for phone in word:
                start = sum(map(len, wav))
                wav.append(_chord(PHONES.index(phone), rng))
                alignment.append(Phone(phone, start, start + LENGTH))
            start = sum(map(len, wav))
            wav.append(0.003 * rng.standard_normal(LENGTH))
            alignment.append(Phone("pau", start, start + LENGTH))
        path = work / f"{number:03d}.wav"
        soundfile.write(path, np.concatenate(wav), 16_000, subtype="PCM_16")
        yield Utterance(
            id=f"tone-{number:03d}",
            audio=AudioSource(str(path)),
            n_samples=sum(map(len, wav)),
            text="".join(LETTERS[phone] for word in words for phone in word),
            words=tuple(words),
            split="test" if number % 6 == 0 else "dev" if number % 6 == 1 else "train",
            alignment=tuple(alignment),
        )


def _chord(index: int, rng: np.random.Generator) -> np.ndarray:
    time_T = np.arange(LENGTH) / 16_000
    wav_T = sum(
        np.sin(2 * np.pi * hz * time_T + rng.uniform(0, 6)) for hz in (200 + 90 * index, 3500 - 350 * index)
    )
    return 0.1 * wav_T * np.hanning(LENGTH) + 0.003 * rng.standard_normal(LENGTH)
