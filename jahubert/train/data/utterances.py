"""What a recipe yields: an utterance, many of one archive in columns, or what had to be dropped.

And the audio of one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from jahubert.audio import AudioSource, load_audio
from jahubert.errors import AudioError


@dataclass(frozen=True)
class Phone:
    """A phone of a known alignment; samples relative to the utterance's first sample, end exclusive."""

    symbol: str
    start: int
    end: int


@dataclass(frozen=True)
class Utterance:
    """A stretch of audio, and what is known about it."""

    id: str
    audio: AudioSource
    start: int = 0  # 16 kHz samples into the source
    n_samples: int = 0  # 16 kHz samples; a recipe may leave it to stage=prepare: up to the end of the audio
    speaker: str = ""
    text: str = ""
    words: tuple[tuple[str, ...], ...] = ()  # words as phones
    split: str = "train"
    alignment: tuple[Phone, ...] = ()

    @property
    def location(self) -> str:
        """Where its audio is, for messages."""
        return f"{self.audio}" + (f", from sample {self.start}" if self.start else "")


@dataclass(frozen=True)
class Utterances:
    """Whole recordings inside one archive, in columns: for millions of rows, which objects would slow down.

    All columns have one row an utterance. Lengths must be given.
    """

    path: str
    ids: Sequence[str]
    offset_N: np.ndarray  # int64, bytes into the archive
    length_N: np.ndarray  # int64, bytes
    n_samples_N: np.ndarray  # int64, 16 kHz samples
    texts: Sequence[str]
    split: str = "train"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Utterance:
        audio = AudioSource(self.path, int(self.offset_N[i]), int(self.length_N[i]))
        return Utterance(
            self.ids[i], audio, n_samples=int(self.n_samples_N[i]), text=self.texts[i], split=self.split
        )

    def __iter__(self) -> Iterator[Utterance]:
        return (self[i] for i in range(len(self)))

    def take(self, rows: Sequence[int] | np.ndarray, split: str | None = None) -> Utterances:
        """Some of the rows, perhaps for another split."""
        return Utterances(
            self.path,
            [self.ids[i] for i in rows],
            self.offset_N[rows],
            self.length_N[rows],
            self.n_samples_N[rows],
            [self.texts[i] for i in rows],
            self.split if split is None else split,
        )


@dataclass(frozen=True)
class Rejected:
    """What had to be dropped. Reasons are counted, so what is particular belongs into the detail."""

    id: str
    reason: str
    detail: str = ""
    missing: str = ""  # a file that was not there, and may come: stage=prepare then says how to take it in


def load_utterance(item: Utterance, start: int = 0, n_samples: int | None = None) -> torch.Tensor:
    """The audio of an utterance, or `n_samples` samples of it from its sample `start` on, float32 (T,)."""
    wanted = item.n_samples - start if n_samples is None else n_samples
    wav_T = load_audio(item.audio, start=item.start + start, n_samples=wanted)
    if len(wav_T) != wanted:
        raise AudioError(
            f"{item.location} has {start + len(wav_T)} samples, but the manifest says {item.n_samples}: the "
            "audio was changed after stage=prepare"
        )
    return wav_T
