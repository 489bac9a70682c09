"""What the host works out, indices above all, on a device that need not be waited for."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

BLOCK = 64  # rows; batches come in few sizes, as oneDNN compiles a kernel for every new one


def round_up(n: int, multiple: int) -> int:
    """The next multiple at or above `n`."""
    return -(-n // multiple) * multiple


def concat_ranges(starts: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """`counts[i]` numbers from `starts[i]` on, for every i, end to end."""
    count = np.asarray(counts, np.int64)
    end = count.cumsum()
    return np.repeat(np.asarray(starts, np.int64) - end + count, count) + np.arange(count.sum())


def index_tensors(device: torch.device, *parts: ArrayLike) -> list[Tensor]:
    """int64 tensors of these numbers, sent together."""
    arrays = [np.asarray(part, np.int64) for part in parts]
    flat = to_device_async(torch.from_numpy(np.concatenate(arrays)), device)
    return list(flat.split([len(array) for array in arrays]))


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; a GPU copies it when it comes to it.

    That takes page-locked memory. Any other copy begins when all work before it is done, and the host waits.
    """
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
