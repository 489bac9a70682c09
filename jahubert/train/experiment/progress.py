"""Progress of the long loops of a stage: a bar on a terminal, and heartbeats for the watchdog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from jahubert.train.experiment import distributed


@contextmanager
def progress(doing: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Context manager that yields a function to call with the number of units completed since its last call.

    Rank 0 shows a bar of its own share if standard error is a terminal. Lines of `logging` and `tqdm.write`
    are printed above it.
    """
    hidden = True if distributed.rank() else None  # None: unless standard error is a terminal
    with tqdm(
        desc=doing, total=total, unit=f" {unit}", disable=hidden, leave=False, dynamic_ncols=True
    ) as bar:

        def done(n: int) -> None:
            distributed.tick()
            bar.update(n)

        yield done
