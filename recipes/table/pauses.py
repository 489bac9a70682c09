"""Segmentation of long recordings at the quietest pauses."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from jahubert.audio import AudioSource, load_audio
from jahubert.frames import SAMPLE_RATE

_BLOCK = SAMPLE_RATE // 100  # number of samples per energy value
_PAUSE = 30  # number of energy values to average (0.3 s)


def cut_at_pauses(audio: AudioSource, start: int, end: int, max_samples: int) -> Iterator[tuple[int, int]]:
    """Split a recording into parts of at most `max_samples` samples, cutting at the quietest 0.3 s.

    A cut is always in the second half of the longest possible part, so only the last part can be very short.

    Yields:
        The start and the end of each part in 16 kHz samples.
    """
    while end - start > max_samples:
        wav_T = load_audio(audio, start=start, n_samples=max_samples)
        n_blocks = len(wav_T) // _BLOCK
        energy = wav_T[: n_blocks * _BLOCK].view(n_blocks, _BLOCK).square().mean(dim=1)
        first = n_blocks // 2
        smooth = F.avg_pool1d(energy[None, None, first:], _PAUSE, stride=1)[0, 0]
        cut = start + (first + int(torch.argmin(smooth)) + _PAUSE // 2) * _BLOCK
        yield start, cut
        start = cut
    yield start, end
