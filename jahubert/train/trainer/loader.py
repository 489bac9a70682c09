"""Training data loading: micro-batches of one process, DataLoader workers, and the position in the data."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from jahubert.errors import ConfigError, UserError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.masking import seeded_rng
from jahubert.train.data.sampler import MicroBatch, Sampler
from jahubert.train.experiment import distributed
from jahubert.train.trainer.optim import TrainConfig

MicroBatches = Generator[tuple[MicroBatch, Any], None, None]

SHARED_MEMORY = Path("/dev/shm")
_PREFETCH = 4  # micro-batches per worker
_SHUTDOWN_SECONDS = 10.0  # before workers that have not exited are killed


class SharedMemoryError(UserError):
    """Shared memory is too small for the DataLoader workers."""

    exit_status = 1


class Data(Protocol):
    """A source of micro-batches."""

    sampler: Sampler

    def load(self, micro: MicroBatch) -> Any:
        """Load a batch: an object with `.to(device)` whose attributes are tensors or plain values."""
        ...

    def name(self, row: int) -> str:
        """The utterance id of a row, for messages."""
        ...


class _BatchDataset(Dataset):
    """Map-style dataset for `Data.load`; errors are returned as values to preserve their type."""

    def __init__(self, data: Data, config: TrainConfig):
        self.data, self.config = data, config

    def __getitem__(self, micro: MicroBatch) -> tuple[MicroBatch, Any]:
        try:
            batch = self.data.load(micro)
            if get_worker_info() is not None:
                _move_to_shared_memory(batch, self.config)
            return micro, batch
        except (UserError, OSError) as error:
            return micro, error


def _move_to_shared_memory(batch: Any, config: TrainConfig) -> None:
    """Move a batch to shared memory, in place.

    The worker's queue would do this in a background thread, where an error would lose the batch silently.
    """
    try:
        for value in vars(batch).values():
            if isinstance(value, Tensor):
                value.share_memory_()
    except RuntimeError as error:
        raise SharedMemoryError(
            f"not enough shared memory for a micro-batch ({error}); {_less_shared_memory(config)}"
        ) from None


def _less_shared_memory(config: TrainConfig) -> str:
    return (
        f"enlarge {SHARED_MEMORY}, or set train.workers below {config.workers} or train.micro_seconds below "
        f"{_micro_seconds(config):g}"
    )


def _micro_seconds(config: TrainConfig) -> float:
    return config.micro_seconds or config.batch_seconds  # not automatic: a stage has chosen it


def shared_memory_bytes(config: TrainConfig) -> int:
    """Upper bound on the shared memory (bytes) that the DataLoader workers of one process need."""
    in_flight = _PREFETCH * config.workers + 1  # one more is in use by the training step
    return int(in_flight * _micro_seconds(config) * SAMPLE_RATE * 4) if config.workers else 0


def check_shared_memory(config: TrainConfig) -> None:
    """Check that there is enough free shared memory for the DataLoader workers.

    Raises:
        ConfigError: there is too little.
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
    """The endless sequence of micro-batches of this process, starting at (`epoch`, `cursor`)."""

    def __init__(self, sampler: Sampler, epoch: int, cursor: int):
        self.sampler, self.epoch, self.cursor = sampler, epoch, cursor

    def __iter__(self) -> Iterator[MicroBatch]:
        position = DataState(self.sampler)
        position.load_state_dict({"epoch": self.epoch, "cursor": self.cursor})
        while True:
            yield from position.micro_batches()
            position.advance()


def ignore_signals(_: int = 0) -> None:
    """Ignore stop signals in a DataLoader worker.

    Launchers and schedulers send them to every process, but the run needs its workers to finish the current
    step and save a checkpoint.
    """
    for number in distributed.STOPPING:
        signal.signal(number, signal.SIG_IGN)


def micro_batches(
    data: Data, config: TrainConfig, device: torch.device, *, epoch: int, cursor: int
) -> MicroBatches:
    """Yield the micro-batches of this process in order, in pinned memory if `device` is a GPU.

    Close the generator to end the workers: they ignore SIGTERM, so Python cannot terminate them at exit.

    Raises:
        UserError, OSError: reading failed.
        RuntimeError: a worker died (raised by torch).
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # pinned memory is allocated through the current GPU (by default GPU 0)
    loader = DataLoader(
        _BatchDataset(data, config),
        batch_size=None,
        sampler=ShardedSampler(data.sampler, epoch, cursor),  # type: ignore[arg-type]
        num_workers=config.workers,
        prefetch_factor=_PREFETCH if config.workers else None,
        worker_init_fn=ignore_signals,
        # By default, the DataLoader draws from the global generator, which a resumed run would do once more.
        generator=torch.Generator(),
        pin_memory=device.type == "cuda",
    )
    others = multiprocessing.active_children()
    iterator = None
    try:
        iterator = _start_workers(loader, config)
        for micro, batch in iterator:
            if isinstance(batch, Exception):
                raise batch
            yield micro, batch
    finally:
        _close(iterator, [child for child in multiprocessing.active_children() if child not in others])


def _start_workers(loader: DataLoader, config: TrainConfig) -> Iterator[tuple[MicroBatch, Any]]:
    try:
        return iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise SharedMemoryError(
            f"not enough shared memory for the queues of DataLoader workers; {_less_shared_memory(config)}"
        ) from None


def _close(iterator: Any, workers: list[multiprocessing.process.BaseProcess]) -> None:
    """Terminate the workers of a DataLoader immediately.

    `del iterator` is not enough, because the traceback of an error keeps a reference to it. A worker that is
    blocked in a read is killed after a timeout. Meanwhile torch's SIGCHLD handler is disabled, because it
    would raise in the main thread.

    Args:
        iterator: None if it could not start all of its workers.
    """
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is None:
        _kill(workers)
        return
    handled = sys.platform != "win32" and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if handled else None
    timer = threading.Timer(_SHUTDOWN_SECONDS, _kill, [workers])
    timer.start()
    try:
        shutdown()
    finally:
        timer.cancel()
        if handled:
            signal.signal(signal.SIGCHLD, handler)


def _kill(workers: list[multiprocessing.process.BaseProcess]) -> None:
    for worker in workers:
        worker.kill()


class DataState:
    """Position in the data, equal in all processes: the epoch and the groups consumed in it."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.epoch, self.cursor = sampler, 0, 0
        self._sized_epoch, self._size = -1, 0  # computing the size of an epoch is expensive

    def micro_batches(self) -> list[MicroBatch]:
        """The micro-batches of the next update that this process computes."""
        world = distributed.world()
        return self.sampler.update(self.epoch, self.cursor, world)[distributed.rank() :: world]

    def advance(self, n_updates: int = 1) -> None:
        """Advance by whole updates, across epochs if necessary."""
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
    """Seed torch's random number generators for the dropout and layer drop of one micro-batch."""
    torch.manual_seed(int(seeded_rng(seed, *micro.key, 7).integers(2**62)))
