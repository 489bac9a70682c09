"""Background prefetching with a thread pool (audio decoding releases the GIL)."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREAD_PREFIX = "prefetch"
MAX_THREADS = 4  # one core decodes 80 s of FLAC in 60 to 80 ms; a GPU encodes this audio in 30 ms


def usable_cores() -> int:
    """Return the number of CPU cores in the affinity mask of this process, or of all cores without one."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


N_THREADS = max(1, min(MAX_THREADS, usable_cores() // 2))  # the other cores are left for computation


def prefetch(
    function: Callable[[T], R],
    items: Iterable[T],
    n: int = 4,
    defer: Callable[[T], bool] = lambda item: False,
) -> Generator[tuple[T, R], None, None]:
    """Map `function` over `items` in background threads.

    Closing the generator waits for all threads to end.

    Args:
        n: number of items to process ahead of the consumer.
        defer: function that returns whether to postpone an item. It is called in a background thread before
            the item is processed. For a postponed item, it is called again whenever the consumer takes a
            result. An item that is still postponed when the consumer reaches it is processed in the thread of
            the consumer.

    Yields:
        Pairs (item, result) in order. If `function` raises an exception for an item, the consumer gets the
        exception when it reaches the item.
    """

    def work(item: T) -> tuple[R] | None:
        return None if defer(item) else (function(item),)

    items = iter(items)
    pool = ThreadPoolExecutor(N_THREADS, THREAD_PREFIX)
    pending: deque[tuple[T, Future[tuple[R] | None]]] = deque()
    try:
        while True:
            for position, (item, future) in enumerate(pending):  # postponed items precede new ones
                if future.done() and future.exception() is None and future.result() is None:
                    pending[position] = (item, pool.submit(work, item))
            for item in islice(items, n + 1 - len(pending)):
                pending.append((item, pool.submit(work, item)))
            if not pending:
                return
            item, future = pending.popleft()
            result = future.result()
            yield item, function(item) if result is None else result[0]
    finally:
        pool.shutdown(cancel_futures=True)
