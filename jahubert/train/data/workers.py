"""Ordered map in DataLoader worker processes, which read and decode audio while a device computes."""

from __future__ import annotations

import errno
import multiprocessing
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from jahubert.errors import SharedMemoryError, UserError
from jahubert.train.experiment.stopping import STOPPING

T = TypeVar("T")
R = TypeVar("R")

PREFETCH = 4  # number of items that each worker computes ahead
_SHUTDOWN_SECONDS = 10.0  # seconds before workers that have not exited are killed


def map_in_workers(
    function: Callable[[T], R], items: Iterable[T], *, workers: int, advice: str, pin_memory: bool = False
) -> Generator[tuple[T, R], None, None]:
    """Yield (item, function(item)) in order; worker processes compute the results ahead of time.

    Close the generator to end the workers. They ignore SIGTERM, so Python cannot terminate them at exit.

    Args:
        function: function that returns a tensor, a tuple, or an object whose attributes are tensors or plain
            values.
        workers: number of worker processes. With 0, this process computes each item when it is needed.
        advice: advice for the error message if shared memory is too small.
        pin_memory: whether to return tensors in page-locked memory, allocated through the current GPU.

    Raises:
        SharedMemoryError: there is too little shared memory, or another program has filled it.
        UserError, OSError: raised by `function`.
        RuntimeError: a worker died.
    """
    loader = DataLoader(
        _Items(function, advice),
        batch_size=None,
        sampler=items,
        num_workers=workers,
        prefetch_factor=PREFETCH if workers else None,
        worker_init_fn=ignore_signals,
        # By default, DataLoader draws a seed from the global generator, which makes resumed runs differ.
        generator=torch.Generator(),
        pin_memory=pin_memory,
    )
    others = multiprocessing.active_children()
    iterator = None
    try:
        iterator = _start(loader, advice)
        for item, result in _received(iterator):
            if isinstance(result, Exception):
                raise result
            yield item, result
    finally:
        _close(iterator, [child for child in multiprocessing.active_children() if child not in others])


def _received(iterator: Any) -> Generator[tuple[Any, Any], None, None]:
    """Yield the results that the workers send.

    A worker that is killed while it passes a tensor breaks the connection, and torch does not report this as
    a dead worker.
    """
    while True:
        try:
            received = next(iterator)
        except StopIteration:
            return
        except (ConnectionError, EOFError) as error:
            raise RuntimeError(
                f"DataLoader worker (pid(s) unknown) exited unexpectedly: {error!r}"
            ) from error
        yield received


def ignore_signals(_: int = 0) -> None:
    """Ignore stop signals in a DataLoader worker.

    Launchers and schedulers send these signals to every process, but the run needs its workers until it has
    finished the current step and saved a checkpoint.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class _Items(Dataset[Any]):
    """Map-style dataset of function results.

    A UserError or OSError is returned instead of raised, because DataLoader would change its type.
    """

    def __init__(self, function: Callable[[Any], Any], advice: str):
        self.function, self.advice = function, advice

    def __getitem__(self, item: Any) -> tuple[Any, Any]:
        try:
            result = self.function(item)
            if get_worker_info() is not None:
                self._share(result)
            return item, result
        except (UserError, OSError) as error:
            return item, error

    def _share(self, result: Any) -> None:
        """Move the tensors in a result to shared memory, in place.

        Otherwise the queue of the worker would do this in another thread, where an error would silently lose
        the result.
        """
        values = result if isinstance(result, tuple) else getattr(result, "__dict__", {}).values()
        try:
            for value in (result, *values):
                if isinstance(value, Tensor):
                    value.share_memory_()
        except RuntimeError as error:
            raise SharedMemoryError(
                f"not enough shared memory for a batch ({error}); {self.advice}"
            ) from None


def _start(loader: DataLoader[Any], advice: str) -> Iterator[tuple[Any, Any]]:
    try:
        return iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        for frame, _ in traceback.walk_tb(error.__traceback__):
            if isinstance(partial := frame.f_locals.get("self"), _MultiProcessingDataLoaderIter):
                partial._shutdown = True  # its destructor would fail and print a traceback
        raise SharedMemoryError(
            f"not enough shared memory for the queues of DataLoader workers; {advice}"
        ) from None


def _close(iterator: Any, workers: list[multiprocessing.process.BaseProcess]) -> None:
    """Shut down the DataLoader workers, and kill those that do not exit in time.

    `del iterator` is not sufficient, because the traceback of an error keeps a reference to the iterator.
    During the shutdown, torch's SIGCHLD handler is disabled, because it would raise an error in the main
    thread.

    Args:
        iterator: the DataLoader iterator, or None if it could not start all of its workers.
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
