"""Sampling rate, and frame arithmetic for HuBERT and MFCC features.

Frame `t` of HuBERT's convolutional encoder covers the samples `[320 t, 320 t + 400)`, and MFCC frame `t`
covers `[160 t, 160 t + 400)`. Every second MFCC frame therefore coincides with a HuBERT frame. A crop that
starts at a multiple of 320 samples starts at a frame boundary of both grids, so its labels need no rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from jahubert.errors import ConfigError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

SAMPLE_RATE = 16_000  # Hz, the rate to which all audio is converted


@dataclass(frozen=True)
class FrameGrid:
    """Positions of frames in a waveform: frame `t` covers samples `[hop * t, hop * t + window)`."""

    window: int  # window length in samples
    hop: int  # hop length in samples

    @classmethod
    def from_convs(cls, kernels: Sequence[int], strides: Sequence[int]) -> FrameGrid:
        """Create the frame grid of a stack of unpadded convolutions, listed from first to last."""
        window, hop = 1, 1
        for kernel, stride in zip(kernels, strides, strict=True):
            window += (kernel - 1) * hop
            hop *= stride
        return cls(window, hop)

    @overload
    def n_frames(self, n_samples: int) -> int: ...
    @overload
    def n_frames(self, n_samples: Tensor) -> Tensor: ...
    @overload
    def n_frames(self, n_samples: NDArray[Any]) -> NDArray[Any]: ...
    def n_frames(self, n_samples: Any) -> Any:
        """Return the number of complete frames in `n_samples` (an int, or an integer array or tensor)."""
        frames = (n_samples - self.window) // self.hop + 1
        return frames * (frames > 0)

    def n_samples(self, n_frames: int) -> int:
        """Return the smallest number of samples that contains `n_frames` frames."""
        return 0 if n_frames == 0 else self.hop * (n_frames - 1) + self.window

    def start(self, frame: int) -> int:
        """Return the position of the first sample in a frame."""
        return frame * self.hop

    def center(self, frame: int) -> int:
        """Return the position of the middle sample in a frame."""
        return frame * self.hop + self.window // 2

    def floor(self, sample: int) -> int:
        """Return the position of the last frame start that is not after `sample`."""
        return sample - sample % self.hop

    def hop_ratio(self, finer: FrameGrid) -> int:
        """Return the ratio of the hop lengths: frame `t` of this grid is frame `t * ratio` of `finer`.

        Raises:
            ConfigError: the windows differ, or this grid's hop is not a multiple of the finer hop.
        """
        if finer.window != self.window or self.hop % finer.hop:
            raise ConfigError(
                f"{finer} does not subdivide {self}: the windows must be equal, and hop {self.hop} must be a "
                f"multiple of hop {finer.hop}"
            )
        return self.hop // finer.hop

    @property
    def rate(self) -> float:
        """Number of frames per second."""
        return SAMPLE_RATE / self.hop


HUBERT = FrameGrid(window=400, hop=320)
MFCC = FrameGrid(window=400, hop=160)


def hubert_grid_errors(grid: FrameGrid, name: str) -> list[str]:
    """Return an error message, or none, if the frames of a model are not HuBERT's, which the stages assume.

    Args:
        name: setting that selects the model, for the message.
    """
    if grid == HUBERT:
        return []
    return [
        f"{name}: the convolutions give frames of {grid.window} samples every {grid.hop} samples, but must "
        f"give frames of {HUBERT.window} samples every {HUBERT.hop}, as HuBERT's do"
    ]
