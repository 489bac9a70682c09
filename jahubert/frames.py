"""Samples and frames: the one place where window and hop lengths live.

HuBERT's conv stack sees frame `t` through the samples `[320 t, 320 t + 400)`; an MFCC frame `t` sees
`[160 t, 160 t + 400)`. So every second MFCC frame is exactly a HuBERT frame, and a crop that starts on
a multiple of 320 samples starts on a frame of both: labels can be exact, without rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jahubert.errors import ConfigError

SAMPLE_RATE = 16_000  # Hz, of every waveform inside jahubert


@dataclass(frozen=True)
class FrameGrid:
    """A grid of frames over samples: frame `t` covers `[hop * t, hop * t + window)`."""

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
        """Frames that fit whole into `n_samples`: an int, or an integer array or tensor of any shape."""
        frames = (n_samples - self.window) // self.hop + 1
        return frames * (frames > 0)

    def n_samples(self, n_frames: int) -> int:
        """The fewest samples that hold `n_frames` frames."""
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

    def step_in(self, finer: FrameGrid) -> int:
        """How many frames of `finer` one frame here steps over: frame `t` is frame `t * step` there."""
        if finer.window != self.window or self.hop % finer.hop:
            raise ConfigError(
                f"{finer} does not subdivide {self}: windows must be equal and hops must divide"
            )
        return self.hop // finer.hop

    @property
    def rate(self) -> float:
        """Frames a second."""
        return SAMPLE_RATE / self.hop


HUBERT = FrameGrid(window=400, hop=320)
MFCC = FrameGrid(window=400, hop=160)
