"""Twelve good recordings and one that is not, as `options.bad` says."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from jahubert.audio import AudioSource
from jahubert.errors import DataError
from jahubert.train.manifest import Rejected, Utterance

WAV = 0.1 * np.random.default_rng(0).standard_normal(16_000)


@dataclass(frozen=True)
class Config:
    bad: str = "nothing"
    n_samples: int = 0  # of the bad one; 0: as long as its file


def cut(path: Path, wav: np.ndarray) -> None:
    soundfile.write(path, wav, 16_000, subtype="PCM_16")
    path.write_bytes(path.read_bytes()[: len(wav)])


def with_nan(path: Path, wav: np.ndarray) -> None:
    soundfile.write(path, np.where(np.arange(len(wav)) == 777, np.nan, wav), 16_000, subtype="FLOAT")


MAKE: dict[str, Callable[[Path, np.ndarray], object]] = {
    "nothing": lambda path, wav: soundfile.write(path, wav, 16_000),
    "empty": lambda path, wav: path.write_bytes(b""),
    "silent header": lambda path, wav: soundfile.write(path, wav[:0], 16_000),
    "text": lambda path, wav: path.write_text("this is no audio"),
    "missing": lambda path, wav: path.unlink(missing_ok=True),
    "truncated": cut,
    "with NaN": with_nan,
    "short": lambda path, wav: soundfile.write(path, wav[:300], 16_000),
    "stereo": lambda path, wav: soundfile.write(path, np.stack([wav, wav], axis=1), 16_000),
    "8 kHz": lambda path, wav: soundfile.write(path, wav[:8_000], 8_000),
}


def prepare(data: Path | None, work: Path, config: Config, seed: int) -> Iterator[Utterance | Rejected]:
    if data is not None and not data.is_dir():
        raise DataError(f"{data}: no such folder; give data=FOLDER, the one with the recordings")
    for number in range(12):
        path = work / f"{number}.wav"
        soundfile.write(path, np.roll(WAV, number), 16_000)
        split = ("train", "train", "dev", "test")[number % 4]
        yield Utterance(str(number), AudioSource(str(path)), words=(("a", "i"),), split=split)
    path = work / "bad.wav"
    MAKE.get(config.bad, MAKE["nothing"])(path, WAV)
    text = "ﷲ ☃" if config.bad == "unreadable text" else "あめ"
    id = "3" if config.bad == "second 3" else "bad"
    yield Utterance(id, AudioSource(str(path)), n_samples=config.n_samples, text=text)
