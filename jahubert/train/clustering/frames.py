"""Frame sources for k-means: .npy files that may be larger than memory, subsets of rows, and a GPU cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError

# Frames (N, D): a tensor, an array, or an instance of a class below. All of these can be indexed with slices,
# and all except CachedFrames with arrays of row numbers.
Frames = Any


class FrameFile:
    """Frames in a .npy file, which is memory-mapped again for each read.

    The mapping is not kept, so that the pages of a large file do not accumulate in the process.

    Raises:
        DataError: the file is not a .npy file.
    """

    ndim = 2

    def __init__(self, path: Path):
        self.path = path
        self.shape: tuple[int, ...] = self._map().shape
        self.dtype = self._map().dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(self._map()[index])

    def _map(self) -> np.ndarray:
        try:
            frames_ND: np.ndarray = np.load(self.path, mmap_mode="r")
            return frames_ND
        except (ValueError, EOFError) as error:
            raise DataError(
                f"{self.path}: not a .npy file ({error}); delete {self.path.parent} and rerun its stage"
            ) from error


class Subset:
    """Selected rows of a frame source, gathered on access."""

    ndim = 2

    def __init__(self, frames_ND: Frames, rows: np.ndarray):
        self.frames_ND, self.rows = frames_ND, rows
        self.shape = (len(rows), frames_ND.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self.rows[index]
        if isinstance(self.frames_ND, Tensor):
            return self.frames_ND[torch.from_numpy(rows).to(self.frames_ND.device)]
        return self.frames_ND[rows]


class CachedFrames:
    """Frame source that caches slices on a device after their first read, up to `max_bytes` in total."""

    ndim = 2

    def __init__(self, frames_ND: Frames, device: torch.device, max_bytes: int):
        self.frames_ND, self.device, self.free_bytes = frames_ND, device, max_bytes
        self.shape = frames_ND.shape
        self.cache: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.frames_ND)

    def __getitem__(self, index: slice) -> Any:
        key = (index.start, index.stop)
        if key not in self.cache:
            part_ND = self.frames_ND[index]
            size = 4 * len(part_ND) * self.shape[1]
            if size > self.free_bytes:
                return part_ND
            self.free_bytes -= size
            self.cache[key] = load_frames(part_ND, self.device)
        return self.cache[key]


def load_frames(frames_ND: Frames, device: torch.device) -> Tensor:
    """Load all frames into one float32 tensor on `device`."""
    if isinstance(frames_ND, Tensor):
        return frames_ND.to(device, torch.float32)
    return torch.from_numpy(np.asarray(frames_ND[:], dtype=np.float32)).to(device)


def draw_rows(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """Draw `size` distinct row numbers below `n`, in ascending order.

    Memory is proportional to `size`, unless more than half of the rows are drawn.
    """
    if 2 * size > n:
        keep = np.ones(n, bool)
        keep[draw_rows(n, n - size, rng)] = False
        return np.flatnonzero(keep)
    rows = np.zeros(0, np.int64)
    while len(rows) < size:  # duplicates are drawn again
        rows = np.unique(np.concatenate([rows, rng.integers(n, size=size - len(rows))]))
    return rows
