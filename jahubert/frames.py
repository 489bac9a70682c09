"""Sampling rate and frame arithmetic: the only module that spells out window and hop lengths.

Frame `t` of HuBERT's convolutional encoder covers the samples `[320 t, 320 t + 400)`, an MFCC frame
`[160 t, 160 t + 400)`. Every second MFCC frame therefore coincides with a HuBERT frame, and a crop that
starts on a multiple of 320 samples starts on a frame of both, so labels need no rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jahubert.errors import ConfigError

SAMPLE_RATE = 16_000  # Hz, of every waveform inside jahubert


@dataclass(frozen=True)
class FrameGrid:
    """Frames over samples: frame `t` covers `[hop * t, hop * t + window)`."""

    window: int  # samples
    hop: int  # samples

    @classmethod
    def from_convs(cls, kernels: Sequence[int], strides: Sequence[int]) -> FrameGrid:
        """The grid of a stack of unpadded convolutions, first layer first."""
        window, hop = 1, 1
        for kernel, stride in zip(kernels, strides, strict=True):
            window += (kernel - 1) * hop
            hop *= stride
        return cls(window, hop)

    def n_frames(self, n_samples):
        """Number of complete frames in `n_samples`: an int, or an integer array or tensor of any shape."""
        frames = (n_samples - self.window) // self.hop + 1
        return frames * (frames > 0)

    def n_samples(self, n_frames: int) -> int:
        """The smallest number of samples that contains `n_frames` frames."""
        return 0 if n_frames == 0 else self.hop * (n_frames - 1) + self.window

    def start(self, frame: int) -> int:
        """First sample of a frame."""
        return frame * self.hop

    def center(self, frame: int) -> int:
        """Middle sample of a frame."""
        return frame * self.hop + self.window // 2

    def floor(self, sample: int) -> int:
        """The last frame start at or before `sample`."""
        return sample - sample % self.hop

    def hop_ratio(self, finer: FrameGrid) -> int:
        """Hops of `finer` per hop of this grid: frame `t` of this grid is frame `t * ratio` of `finer`.

        Raises:
            ConfigError: the windows differ, or the hops do not divide.
        """
        if finer.window != self.window or self.hop % finer.hop:
            raise ConfigError(
                f"{finer} does not subdivide {self}: windows must be equal and hops must divide"
            )
        return self.hop // finer.hop

    @property
    def rate(self) -> float:
        """Frames per second."""
        return SAMPLE_RATE / self.hop


HUBERT = FrameGrid(window=400, hop=320)
MFCC = FrameGrid(window=400, hop=160)
