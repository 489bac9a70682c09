"""Writer for FLAC files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import soundfile

from jahubert.formats.atomic import atomic_write
from jahubert.frames import SAMPLE_RATE


def write_flac(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    """Write samples (T,) atomically to a 16-bit FLAC file.

    The samples are encoded in memory, because libsndfile ignores a write error while it completes the header.
    """
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format="FLAC", subtype="PCM_16")
    with atomic_write(path, "wb") as file:
        file.write(buffer.getbuffer())
