"""The processes of a run: who am I, how many are we, sum something over all of us.

Started by torchrun (or a cluster's launcher with the same variables) there are several; otherwise one,
and every function here does the obvious without a process group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from jahubert.errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is this process's GPU where there is one, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device={name}: no such device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={name}: this machine shows no GPU to torch; use device=auto or device=cpu"
            )
        device = torch.device(
            "cuda", device.index if device.index is not None else int(os.environ.get("LOCAL_RANK", 0))
        )
    return device


@contextmanager
def process_group() -> Iterator[None]:
    """Join the other processes if a launcher started several; leave them at the end."""
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if several:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if backend == "nccl":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        dist.init_process_group(backend)
    try:
        yield
    finally:
        if several:
            dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(sums: dict[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Each value summed over all processes, in float64; keys must be the same everywhere."""
    values = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in sums.values()]
    )
    if dist.is_initialized():
        dist.all_reduce(values)
    return dict(zip(sums, values.tolist(), strict=True))
