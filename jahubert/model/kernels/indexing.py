"""Index computation on the host, with non-blocking transfer to the device."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

BLOCK = 64  # row counts are rounded up to multiples of this, because oneDNN compiles a kernel per size


def length_list(lengths: Iterable[int] | Tensor) -> list[int]:
    """Return lengths as a list. A tensor on a GPU is copied once."""
    return [int(length) for length in (lengths.tolist() if isinstance(lengths, Tensor) else lengths)]


def round_up(n: int, multiple: int) -> int:
    """Round `n` up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def concat_ranges(starts: ArrayLike, counts: ArrayLike) -> np.ndarray:
    """Concatenate the ranges `starts[i], starts[i] + 1, ...`, which have lengths `counts[i]`."""
    count = np.asarray(counts, np.int64)
    end = count.cumsum()
    return np.repeat(np.asarray(starts, np.int64) - end + count, count) + np.arange(count.sum())


def index_tensors(device: torch.device, *parts: ArrayLike) -> list[Tensor]:
    """Transfer several index arrays to a device at once, as int64 tensors."""
    arrays = [np.asarray(part, np.int64) for part in parts]
    flat = to_device_async(torch.from_numpy(np.concatenate(arrays)), device)
    return list(flat.split([len(array) for array in arrays]))


def to_device_async(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device without making the host wait for a GPU.

    The tensor is copied from page-locked memory, because the host would wait for a copy from ordinary
    memory, which starts only after all queued work.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type not in ("cpu", "mps"))
