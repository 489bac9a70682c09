"""Progress reporting for long loops: a progress bar on a terminal, and heartbeats for the watchdog."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from jahubert.train.experiment import distributed


@contextmanager
def progress(description: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a progress bar while the `with` block runs.

    Rank 0 shows a bar for its own share of the work if standard error is a terminal. Output from `logging`
    and `tqdm.write` is printed above the bar.

    Yields:
        A function to be called with the number of units completed since the last call.
    """
    hidden = True if distributed.rank() else None  # None: hidden unless standard error is a terminal
    with tqdm(
        desc=description, total=total, unit=f" {unit}", disable=hidden, leave=False, dynamic_ncols=True
    ) as bar:

        def done(n: int) -> None:
            distributed.tick()
            bar.update(n)

        yield done
