"""Writer for 16-bit FLAC files of generated and converted audio."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from jahubert.formats.atomic import atomic_write
from jahubert.frames import SAMPLE_RATE


def write_flac(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write samples (T,) as 16-bit FLAC, atomically; the folder is created if it does not exist.

    The file is encoded in memory, because libsndfile ignores a write error when it completes the header.

    Args:
        path: the file to write.
        samples: int16, or floating-point numbers with full scale 1, which are clipped. Audio that was loaded
            from 16 bits is written without loss.
        rate: sampling rate (Hz).
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())


def flac_length(path: Path) -> int | None:
    """Return the number of samples in a file written by `write_flac`; None if it is missing or unreadable."""
    try:
        return int(soundfile.info(path).frames)
    except (OSError, RuntimeError):
        return None


def write_flac_once(path: Path, make: Callable[[], np.ndarray]) -> int:
    """Write the 16 kHz waveform that `make` returns (see `write_flac`), unless a readable file exists.

    Returns:
        The number of samples.
    """
    n_samples = flac_length(path)
    if n_samples is None:
        wave_T = make()
        write_flac(path, wave_T)
        n_samples = len(wave_T)
    return n_samples
