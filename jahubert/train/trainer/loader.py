"""Data loading for training and validation: micro-batches, DataLoader workers and the data position."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from jahubert.errors import ConfigError
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch
from jahubert.train.data.masking import seeded_rng
from jahubert.train.data.sampler import MicroBatch, Sampler
from jahubert.train.data.workers import PREFETCH, map_in_workers
from jahubert.train.experiment import distributed
from jahubert.train.experiment.progress import progress
from jahubert.train.trainer.optim import TrainConfig

MicroBatches = Generator[tuple[MicroBatch, Any], None, None]

SHARED_MEMORY = Path("/dev/shm")
_MERGED_PADDING = 1.2  # the waveforms of merged groups are padded to the longest of all groups (see LOG.md)


class DataSource(Protocol):
    """A source of micro-batches."""

    sampler: Sampler

    def load(self, micro: MicroBatch) -> Any:
        """Load a batch as an object with `.to(device)` whose attributes are tensors or plain values."""
        ...

    def name(self, row: int) -> str:
        """Return the utterance id of a row, for error messages."""
        ...


def _less_shared_memory(config: TrainConfig) -> str:
    return (
        f"enlarge {SHARED_MEMORY}, or set train.workers below {config.workers} or train.micro_seconds below "
        f"{_micro_seconds(config):g}"
    )


def _micro_seconds(config: TrainConfig) -> float:
    return config.micro_seconds or config.batch_seconds  # stages replace null with a size


def shared_memory_bytes(config: TrainConfig) -> int:
    """Estimate the shared memory (bytes) that the DataLoader workers of one process need for audio."""
    in_flight = PREFETCH * config.workers + 1  # the training step holds one more micro-batch
    seconds = _micro_seconds(config)
    if seconds > config.batch_sizes.group_seconds:
        seconds *= _MERGED_PADDING
    return int(in_flight * seconds * SAMPLE_RATE * 4) if config.workers else 0


def check_shared_memory(config: TrainConfig) -> None:
    """Check that the free shared memory is sufficient for the DataLoader workers.

    Raises:
        ConfigError: the free shared memory is not sufficient.
    """
    if not config.workers or not SHARED_MEMORY.is_dir():
        return
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 0)) or min(
        distributed.world(), torch.cuda.device_count() or distributed.world()
    )
    need = processes * shared_memory_bytes(config)
    status = os.statvfs(SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise ConfigError(
            f"{SHARED_MEMORY} has {free / 1e6:.3g} MB free, but {processes} x {config.workers} DataLoader "
            f"workers need {need / 1e6:.3g} MB; {_less_shared_memory(config)}"
        )


class ShardedSampler:
    """Endless sequence of the micro-batches for this process, starting at (`epoch`, `cursor`)."""

    def __init__(self, sampler: Sampler, epoch: int, cursor: int):
        self.sampler, self.epoch, self.cursor = sampler, epoch, cursor

    def __iter__(self) -> Iterator[MicroBatch]:
        position = DataState(self.sampler)
        position.load_state_dict({"epoch": self.epoch, "cursor": self.cursor})
        while True:
            yield from position.micro_batches()
            position.advance()


def micro_batches(
    data: DataSource, config: TrainConfig, device: torch.device, *, epoch: int, cursor: int
) -> MicroBatches:
    """Iterate over the micro-batches for this process, in pinned memory if `device` is a GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory is allocated through the current GPU (by default GPU 0)
    return map_in_workers(
        data.load,
        ShardedSampler(data.sampler, epoch, cursor),
        workers=config.workers,
        advice=_less_shared_memory(config),
        pin_memory=device.type == "cuda",
    )


class DeviceCopy:
    """Function that copies micro-batches to a device, on a GPU in a stream of its own.

    The host prepares a micro-batch while the GPU computes the previous one. In its own stream, a copy from
    pinned memory does not wait for this computation.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Any) -> Any:
        if self.stream is None:
            return batch.to(self.device)
        computation = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.stream):
            batch = batch.to(self.device)
        computation.wait_stream(self.stream)
        for value in vars(batch).values():
            if isinstance(value, Tensor) and value.is_cuda:
                # Otherwise, the memory of the tensor could be reused before the computation has read it.
                value.record_stream(computation)
        return batch


def validation_batches(data: DataSource) -> MicroBatches:
    """Iterate once over this process's share of the data, and report the progress of the consumer."""
    share = list(data.sampler.single_pass(distributed.rank(), distributed.world()))
    with progress("validation", "utterances", sum(len(micro.rows) for micro in share)) as done:
        for micro, batch in prefetch(data.load, share):
            yield micro, batch
            done(len(micro.rows))


class DataState:
    """Data position, equal in all processes: the epoch, and the number of groups consumed in it."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.epoch, self.cursor = sampler, 0, 0
        self._sized_epoch, self._size = -1, 0  # computing the size of an epoch is expensive

    def micro_batches(self) -> list[MicroBatch]:
        """Return the micro-batches that this process computes in the next update."""
        world = distributed.world()
        return self.sampler.update(self.epoch, self.cursor, world)[distributed.rank() :: world]

    def advance(self, n_updates: int = 1) -> None:
        """Advance the position by whole updates, across epochs if necessary."""
        self.cursor += n_updates * self.sampler.sizes.groups
        while True:
            if self._sized_epoch != self.epoch:
                self._sized_epoch, self._size = self.epoch, len(self.sampler.epoch(self.epoch))
            if self.cursor < self._size:
                break
            self.epoch, self.cursor = self.epoch + 1, self.cursor - self._size

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def seed_micro_batch(seed: int, micro: MicroBatch) -> None:
    """Seed torch's random number generators for the dropout and layer drop in one micro-batch."""
    torch.manual_seed(int(seeded_rng(seed, *micro.key, 7).integers(2**62)))
