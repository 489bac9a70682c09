"""Handling of stop signals during training, with a deadline for code that does not check for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jahubert.errors import JahubertError, Stopped
from jahubert.train.experiment.stopping import stopping_signals


class StopDeadlineError(JahubertError):
    """Raised if code does not finish within its deadline after a stop signal."""

    exit_status = Stopped.exit_status


class StopSignals:
    """The stop signals received so far; the object is false until the first signal."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.installed = False
        self._seconds: float | None = None  # duration of the current deadline

    def __bool__(self) -> bool:
        return bool(self.names)

    def receive(self, number: int, frame: Any) -> None:
        """Handle a stop signal."""
        self.names.append(signal.Signals(number).name)
        self._start_timer()

    def expire(self, number: int, frame: Any) -> None:
        """Handle the timer signal."""
        if self._seconds is not None:
            raise StopDeadlineError(f"received {self.names[0]}")

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Interrupt the `with` block if it runs longer than `seconds` after a stop signal.

        If a signal was received before the block, the time counts from the start of the block. Use this for
        code that may block (waiting for data or a file server) and therefore cannot check for signals itself.

        Raises:
            StopDeadlineError: the block was interrupted.
        """
        self._seconds = seconds
        self._start_timer()
        try:
            yield
        finally:
            self._seconds = None
            if self.installed and self.names:
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _start_timer(self) -> None:
        if self.installed and self.names and self._seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, self._seconds)


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """Record stop signals during the `with` block, and restore the previous handlers after it.

    If the block received a signal and ended without an error, the signal is raised again for the previous
    handler. Outside the main thread, signal handling is not changed.
    """
    stop, previous = StopSignals(), {}
    try:
        previous = {number: signal.signal(number, stop.receive) for number in stopping_signals()}
        if hasattr(signal, "setitimer"):  # missing on Windows
            previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, stop.expire)
            stop.installed = True
    except ValueError:  # not the main thread
        pass
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop and previous:
        signal.raise_signal(signal.Signals[stop.names[0]])
