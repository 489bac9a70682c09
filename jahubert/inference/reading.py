"""Background reading and batch processing of recordings for feature extraction and transcription."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import TypeVar

import numpy as np
from torch import Tensor

from jahubert.audio import AudioLike, AudioSource, is_recording, load_audio
from jahubert.errors import AudioError, ConfigError
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch

R = TypeVar("R")
Item = TypeVar("Item")

PREFETCH = 32  # number of recordings to decode ahead
MAX_SAMPLES = 600 * SAMPLE_RATE  # number of decoded samples (10 minutes, 38 MB) at which reading ahead pauses


def check_many(audio: Iterable[AudioLike], errors: str) -> None:
    """Check the arguments of a method that processes many recordings.

    Raises:
        AudioError: `audio` is a single recording.
        ConfigError: `errors` is neither "raise" nor "return".
    """
    if errors not in ("raise", "return"):
        raise ConfigError(f"errors is {errors!r}, but must be 'raise' or 'return'")
    if isinstance(audio, np.ndarray):
        is_single = np.issubdtype(audio.dtype, np.number)  # other arrays contain paths or recordings
    elif isinstance(audio, list | tuple):
        is_single = is_recording(audio)
    else:
        is_single = isinstance(audio, str | bytes | os.PathLike | AudioSource | Mapping | Tensor)
        is_single = is_single or hasattr(audio, "read")
    if is_single:
        raise AudioError(
            f"audio is a single recording of type {type(audio).__name__}, but must be a list of recordings; "
            "use [audio] for one recording"
        )


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

    return read_ahead(read, audio, PREFETCH, lambda wav: 0 if isinstance(wav, Exception) else len(wav))


def read_ahead(
    read: Callable[[AudioLike], R], audio: Iterable[AudioLike], n: int, n_samples: Callable[[R], int]
) -> Generator[tuple[AudioLike, R], None, None]:
    """Yield recordings in order, each with the result of `read`, which is called in background threads.

    While the results that were read ahead have `MAX_SAMPLES` or more samples, no further recording is read
    ahead. Open streams, FIFOs and devices, which may block, are read when they are reached, in the caller's
    thread.

    Args:
        n: number of recordings to read ahead.
        n_samples: function that returns the number of decoded samples in a result.
    """
    lock = threading.Lock()
    n_waiting = 0  # number of samples in results that were read ahead and are not yet reached

    def count(change: int) -> None:
        nonlocal n_waiting
        with lock:
            n_waiting += change

    def counted(item: AudioLike) -> R:
        result = read(item)
        count(n_samples(result))
        return result

    ahead = prefetch(counted, audio, n, lambda item: n_waiting >= MAX_SAMPLES or _may_block(item))
    with closing(ahead):
        for item, result in ahead:
            count(-n_samples(result))
            yield item, result


def run_batch(
    items: list[Item], work: Callable[[list[Item]], Sequence[R]], errors: str
) -> list[R | Exception]:
    """Process a batch. If this fails and errors are returned, process each item by itself.

    Args:
        items: the items of the batch, such as waveforms.
        work: function that returns one result for each item in a list.
        errors: "raise" passes on the exception of a failed batch. "return" returns the exception of a failed
            item in its place.
    """
    try:
        return list(work(items))
    except Exception as error:
        if errors == "raise":
            raise
        if len(items) == 1:
            return [error]
    return [result for item in items for result in run_batch([item], work, errors)]


def _may_block(item: AudioLike) -> bool:
    """Return whether reading a recording may wait for another process."""
    if hasattr(item, "read"):
        return True
    path = item.path if isinstance(item, AudioSource) else item
    if not isinstance(path, str | os.PathLike):
        return False
    try:
        return not stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError):  # a missing file or an invalid name, which is reported when it is opened
        return False
