"""Packed representation of a padded batch: the concatenated valid frames of all utterances."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import ConfigError
from jahubert.frames import FrameGrid
from jahubert.model.kernels.indexing import BLOCK, concat_ranges, index_tensors, round_up, to_device_async

TILE = 8  # number of frames per tile of the front end; each utterance starts at a tile boundary
SPAN = 32  # frames; on a CPU, attention and positional convolution round lengths up to multiples of this


class PackedShape(NamedTuple):
    """Sizes to which every packed batch is padded, so that all batches of a training run have equal shapes.

    The number of windows of the positional convolution is not fixed, because a batch may have twice as many
    windows as the average batch.
    """

    n_utterances: int
    n_rows: int  # number of packed frames and filler rows
    n_tiles: int  # number of tiles in the front end
    longest: int  # number of frames in the longest utterance

    @classmethod
    def largest(
        cls, grid: FrameGrid, shortest: int, longest: int, capacity: int, n_batches: int = 1
    ) -> PackedShape:
        """Return the smallest shape that fits every batch of at most `capacity` samples, including padding.

        Args:
            shortest, longest: range of utterance lengths in samples.
            n_batches: number of such batches that are concatenated.
        """
        # A batch has at most `capacity // n` utterances if its longest one has n samples.
        n_samples = np.arange(shortest, longest + 1)
        n_utterances = np.maximum(1, capacity // n_samples)
        n_tiles = int((n_utterances * -(-n_samples // (grid.hop * TILE))).max())
        n_rows = int((n_utterances * grid.n_frames(n_samples)).max())
        return cls(
            n_batches * int(n_utterances.max()),
            round_up(n_batches * n_rows, BLOCK),
            round_up(n_batches * n_tiles, BLOCK // TILE),
            int(grid.n_frames(longest)),
        )


def padded_size(size: int, limit: int | None, what: str, multiple: int = 1) -> int:
    """Return the padded size of a dimension: `limit`, or without a limit, `size` rounded up to `multiple`.

    Raises:
        ConfigError: `size` exceeds the limit.
    """
    if limit is None:
        return round_up(size, multiple)
    if size > limit:
        raise ConfigError(f"a batch has {size} {what}, but its `PackedShape` has room for only {limit}")
    return limit


class Rectangle(NamedTuple):
    """Padded batch of utterances of similar length, gathered from packed frames."""

    index_P: Tensor  # packed row of each position
    shape: tuple[int, int]  # (number of utterances, number of frames)
    bias_U1S: Tensor  # attention bias, minus infinity after the end of an utterance


class Sequences(NamedTuple):
    """Sequences for variable-length attention kernels: one per utterance, and others with filler rows."""

    offsets: Tensor  # first row of each sequence, followed by the end of the last one, int32
    longest: int  # upper limit of the number of frames in a sequence

    @classmethod
    def of(cls, packing: Packing, shape: PackedShape | None = None) -> Sequences:
        longest = padded_size(max(packing.n_frames), shape and shape.longest, "frames in an utterance")
        n_utterances = padded_size(packing.n_utterances, shape and shape.n_utterances, "utterances")
        # Filler rows are cut into sequences of at most `longest` rows. If a shape is given, it determines the
        # number of sequences, and some of them may be empty.
        most_filler = packing.n_rows - (packing.n_valid if shape is None else 0)
        n_filler = -(-most_filler // longest) + n_utterances - packing.n_utterances
        ends = packing.n_valid + longest * np.arange(1, n_filler + 1)
        offsets = np.concatenate([[0], np.cumsum(packing.n_frames), np.minimum(ends, packing.n_rows)])
        device = packing.index_N.device
        return cls(to_device_async(torch.from_numpy(offsets.astype(np.int32)), device), longest)


def has_flash_attention(device: torch.device) -> bool:
    """Return whether torch has flash attention for a device and it is enabled."""
    if not _is_nvidia(device):
        return False
    cuda = torch.backends.cuda
    capable = torch.cuda.get_device_capability(device) >= (8, 0)
    return capable and cuda.is_flash_attention_available() and cuda.flash_sdp_enabled()


def has_efficient_attention(device: torch.device) -> bool:
    """Return whether torch has memory-efficient attention for a device and it is enabled."""
    return _is_nvidia(device) and torch.backends.cuda.mem_efficient_sdp_enabled()


def _is_nvidia(device: torch.device) -> bool:
    return device.type == "cuda" and torch.version.hip is None


class Packing:
    """Conversion between a padded batch (B, S, D) and packed frames (N, D).

    Packed tensors consist of the valid frames, followed by filler rows on which no result depends: up to
    `BLOCK` - 1 rows, or as many as a fixed shape requires.

    Args:
        n_frames: number of valid frames in each utterance.
        width: S, the number of frames in the padded batch.
        device: device of the packed tensors.
        shape: sizes to which the packed tensors are padded.
    """

    def __init__(
        self, n_frames: Sequence[int], width: int, device: torch.device, shape: PackedShape | None = None
    ):
        self.n_frames, self.width = list(n_frames), width
        self.n_utterances, self.n_valid = len(self.n_frames), sum(n_frames)
        index = concat_ranges(width * np.arange(self.n_utterances), n_frames)
        n_rows = padded_size(self.n_valid, shape and shape.n_rows, "frames", BLOCK)
        filler = np.full(n_rows - self.n_valid, index[0])
        self.index_N, n_frames_B = index_tensors(device, np.append(index, filler), n_frames)
        # These attributes for torch's fused attention are computed here, so that compiled blocks get only
        # tensors and numbers.
        self.fused_attention, self.mask_B11S = device.type != "cpu", None
        if self.fused_attention and min(n_frames) < width:
            self.mask_B11S = (torch.arange(width, device=device) < n_frames_B[:, None])[:, None, None]
        has_flash, has_efficient = has_flash_attention(device), has_efficient_attention(device)
        sequences = Sequences.of(self, shape) if has_flash or has_efficient else None
        self.flash = sequences if has_flash else None
        self.efficient = sequences if has_efficient else None

    @property
    def n_rows(self) -> int:
        """Number N of valid frames and filler rows."""
        return len(self.index_N)

    def pack(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.flatten(0, 1).index_select(0, self.index_N)

    def unpack(self, x_ND: Tensor) -> Tensor:
        """Return packed frames as a padded batch that is zero after the end of each utterance."""
        flat = x_ND.new_zeros(self.n_utterances * self.width, *x_ND.shape[1:])
        # `index_copy_` would store all of x for its backward pass.
        flat[self.index_N[: self.n_valid]] = x_ND[: self.n_valid]
        padded: Tensor = flat.unflatten(0, (self.n_utterances, self.width))
        return padded

    @cached_property
    def rectangles(self) -> tuple[list[Rectangle], Tensor]:
        """Utterances grouped by similar length, and the position of each packed row in their concatenation.

        All tensors are on the CPU.
        """
        starts = list(accumulate(self.n_frames, initial=0))
        order = sorted(range(self.n_utterances), key=lambda row: self.n_frames[row])
        rectangles, position, position_N = [], 0, [0] * self.n_rows
        for frames, members in groupby(order, key=lambda row: round_up(self.n_frames[row], SPAN)):
            rows = list(members)
            index = torch.zeros(len(rows), frames, dtype=torch.int64, device="cpu")
            bias = torch.zeros(len(rows), 1, frames, device="cpu")
            for i, row in enumerate(rows):
                start, n = starts[row], self.n_frames[row]
                index[i, :n] = torch.arange(start, start + n, device="cpu")
                bias[i, ..., n:] = float("-inf")
                position_N[start : start + n] = range(position, position + n)
                position += frames
            rectangles.append(Rectangle(index.flatten(), (len(rows), frames), bias))
        return rectangles, torch.tensor(position_N, device="cpu")
