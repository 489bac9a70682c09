"""Handling of stop signals outside of training, except for SIGINT: Python raises KeyboardInterrupt for it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jahubert.errors import Stopped
from jahubert.train.experiment.stopping import stopping_signals

_received: list[str] = []  # recorded here, because interrupted code may replace or swallow the exception


class StopRequested(BaseException):
    """Raised after a stop signal outside of training; `except Exception` does not catch it."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Raise StopRequested in the main thread when a stop signal is received.

    Training installs its own handlers, which save a checkpoint first. If the signal arrives while a C library
    calls Python, the exception is lost, but `received_signal` returns the signal. Python's message about the
    lost exception is suppressed.
    """
    main_process, previous = os.getpid(), {}

    def stop(number: int, _: Any) -> None:
        if os.getpid() != main_process:  # this is a forked worker; the main process reports the signal
            os._exit(Stopped.exit_status)
        if not _received:  # the launcher and the scheduler may both send a signal
            _received.append(signal.Signals(number).name)
            raise StopRequested

    report_ignored = sys.unraisablehook

    def report(ignored: Any) -> None:
        if ignored.exc_type is not StopRequested:
            report_ignored(ignored)

    sys.unraisablehook = report
    if threading.current_thread() is threading.main_thread():
        numbers = set(stopping_signals()) - {signal.SIGINT}
        previous = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        sys.unraisablehook = report_ignored
        for number, handler in previous.items():
            signal.signal(number, signal.SIG_IGN if _received else handler)
        _received.clear()


def received_signal() -> str | None:
    """Return the name of the received stop signal, if any."""
    return _received[0] if _received else None


def check_stop() -> None:
    """Raise StopRequested if a stop signal was received. Call this before long steps."""
    if _received:
        raise StopRequested
