"""How far a long loop of a stage is: a line on standard error for a person, a sign of life for `watch`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from jahubert.train.experiment import distributed


@contextmanager
def progress(doing: str, unit: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of units that were done since.

    The first process shows a bar of its own share while it lasts; where standard error is no terminal there
    is none. It makes way for what `logging` and `tqdm.write` say.
    """
    hidden = True if distributed.rank() else None  # None: as standard error is
    with tqdm(
        desc=doing, total=total, unit=f" {unit}", disable=hidden, leave=False, dynamic_ncols=True
    ) as bar:

        def done(n: int) -> None:
            distributed.tick()
            bar.update(n)

        yield done
