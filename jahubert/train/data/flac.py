"""Writer for 16-bit FLAC files of generated and converted audio."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile

from jahubert.formats.atomic import atomic_write
from jahubert.frames import SAMPLE_RATE

Samples = np.ndarray | Iterator[np.ndarray]  # (T,), or blocks of samples


def write_flac(path: Path, samples: Samples, rate: int = SAMPLE_RATE) -> int:
    """Write samples (T,) as 16-bit FLAC, atomically; the folder is created if it does not exist.

    Args:
        path: the file to write.
        samples: int16, or floating-point numbers with full scale 1, which are clipped. Unmodified samples of
            16-bit audio are written without loss. Blocks are encoded one by one, so that only one block is in
            memory.
        rate: sampling rate (Hz).

    Returns:
        The number of samples.
    """
    blocks = iter([samples]) if isinstance(samples, np.ndarray) else samples
    n_samples = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        output = _Output(file)
        try:
            with soundfile.SoundFile(output, "w", rate, 1, "PCM_16", format="FLAC") as encoder:
                for block_T in blocks:
                    encoder.write(block_T)
                    n_samples += len(block_T)
        finally:
            if output.error is not None:
                raise output.error
    return n_samples


class _Output:
    """Binary file for libsndfile that records the first exception.

    soundfile prints exceptions of file objects without raising them, and libsndfile ignores a write error
    when it completes the header.
    """

    def __init__(self, file: BinaryIO):
        self.file = file
        self.tell = file.tell
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        return self._call(self.file.write, data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._call(self.file.seek, offset, whence)

    def _call(self, method: Callable[..., int], *args: Any) -> int:
        try:
            return method(*args)
        except BaseException as error:
            self.error = self.error or error
            return 0


def flac_length(path: Path) -> int | None:
    """Return the number of samples in a file written by `write_flac`; None if it is missing or unreadable."""
    try:
        return int(soundfile.info(path).frames)
    except (OSError, RuntimeError):
        return None


def write_flac_once(path: Path, make: Callable[[], Samples]) -> int:
    """Write the 16 kHz samples that `make` returns (see `write_flac`), unless a readable file exists.

    Returns:
        The number of samples.
    """
    n_samples = flac_length(path)
    if n_samples is None:
        n_samples = write_flac(path, make())
    return n_samples
