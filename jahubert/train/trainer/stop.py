"""Stop signals of a training run, with a deadline for code that does not check them itself."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jahubert.errors import JahubertError, Stopped
from jahubert.train.experiment import distributed


class StopDeadlineError(JahubertError):
    """A stop signal was received, but the running code did not finish in time."""

    exit_status = Stopped.exit_status


class StopSignals:
    """Stop signals received so far; false until one is received."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.installed = False
        self._seconds: float | None = None  # length of the current deadline

    def __bool__(self) -> bool:
        return bool(self.names)

    def receive(self, number: int, frame: Any) -> None:
        """Signal handler for stop signals."""
        self.names.append(signal.Signals(number).name)
        self._start_timer()

    def expire(self, number: int, frame: Any) -> None:
        """Signal handler for the timer."""
        if self._seconds is not None:
            raise StopDeadlineError(f"received {self.names[0]}")

    @contextmanager
    def deadline(self, seconds: float) -> Iterator[None]:
        """Interrupt the body if it does not end within `seconds` of a stop signal, or of its own start.

        For code that waits (for data, for a file server): the caller never gets to check `names` otherwise.

        Raises:
            StopDeadlineError: the body was interrupted.
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
    """Record stop signals instead of acting on them; restore the previous handlers at the end.

    A signal that arrived too late for the caller to act on is then raised again for the previous handler.
    Outside of the main thread signals are left alone.
    """
    stop, previous = StopSignals(), {}
    try:
        previous = {number: signal.signal(number, stop.receive) for number in distributed.STOPPING}
        if hasattr(signal, "setitimer"):  # not on Windows
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
