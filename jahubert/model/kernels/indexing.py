"""Index computation on the host, with non-blocking transfer to the device."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

BLOCK = 64  # row counts are rounded up to multiples of it: oneDNN compiles a kernel for every new size


def round_up(n: int, multiple: int) -> int:
    """The next multiple at or above `n`."""
    return -(-n // multiple) * multiple


def concat_ranges(starts: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """The ranges `starts[i], starts[i] + 1, ...` of length `counts[i]`, concatenated."""
    count = np.asarray(counts, np.int64)
    end = count.cumsum()
    return np.repeat(np.asarray(starts, np.int64) - end + count, count) + np.arange(count.sum())


def index_tensors(device: torch.device, *parts: ArrayLike) -> list[Tensor]:
    """int64 tensors of the given numbers, in one transfer."""
    arrays = [np.asarray(part, np.int64) for part in parts]
    flat = to_device_async(torch.from_numpy(np.concatenate(arrays)), device)
    return list(flat.split([len(array) for array in arrays]))


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; on a GPU the host does not wait for the copy.

    That takes page-locked memory: any other copy starts only after all queued work, and the host waits.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
