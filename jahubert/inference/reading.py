"""Background reading of recordings for feature extraction and transcription."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import TypeVar

from torch import Tensor

from jahubert.audio import AudioLike, load_audio
from jahubert.prefetch import prefetch

R = TypeVar("R")

PREFETCH = 32  # number of recordings to decode ahead


def prefetch_audio(
    audio: Iterable[AudioLike], sample_rate: int | None = None
) -> Generator[tuple[AudioLike, Tensor | Exception], None, None]:
    """Yield recordings in order, each with its 16 kHz waveform (T,) or the exception raised by reading it.

    The next `PREFETCH` recordings are decoded in background threads (see `read_ahead`).
    """

    def read(item: AudioLike) -> Tensor | Exception:
        try:
            return load_audio(item, sample_rate)
        except Exception as error:
            return error

    return read_ahead(read, audio, PREFETCH)


def read_ahead(
    read: Callable[[AudioLike], R], audio: Iterable[AudioLike], n: int
) -> Generator[tuple[AudioLike, R], None, None]:
    """Yield recordings in order, each with the result of `read`, which is called in background threads.

    Open streams, which may block, are read when they are reached.

    Args:
        n: number of recordings to read ahead.
    """
    ahead = prefetch(lambda item: None if hasattr(item, "read") else (read(item),), audio, n)
    with closing(ahead):
        for item, result in ahead:
            yield item, read(item) if result is None else result[0]
