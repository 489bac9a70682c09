"""Work done ahead in a few threads: decoding lets go of the interpreter, so a GPU need not wait."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")

NAME = "ahead"  # of the threads
MAX_THREADS = 4  # threads: 80 s of FLAC take a core 60 to 80 ms, and a GPU's model 30
THREADS = max(1, min(MAX_THREADS, (os.cpu_count() or 1) // 2))  # a CPU also has to compute


def prefetch(work: Callable[[A], B], items: Iterable[A], n: int = 4) -> Generator[tuple[A, B], None, None]:
    """(item, `work(item)`) in order, while the next `n` items are being worked on.

    What `work` raises is raised at its place. No thread outlives the iterator.
    """
    items, pool = iter(items), ThreadPoolExecutor(THREADS, NAME)
    waiting: deque[tuple[A, Future[B]]] = deque()
    try:
        while True:
            waiting.extend((item, pool.submit(work, item)) for item in islice(items, n + 1 - len(waiting)))
            if not waiting:
                return
            item, future = waiting.popleft()
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
