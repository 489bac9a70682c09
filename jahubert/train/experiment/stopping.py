"""Signals that stop a run.

Schedulers send SIGTERM or SIGUSR1, Ctrl-C sends SIGINT, and a closed terminal or SSH connection sends SIGHUP.
"""

from __future__ import annotations

import signal

_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
STOPPING = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))  # Windows lacks some


def stopping_signals() -> tuple[signal.Signals, ...]:
    """Return the stop signals that this process should handle: all but SIGHUP if nohup has disabled it."""
    return tuple(
        number
        for number in STOPPING
        if number.name != "SIGHUP" or signal.getsignal(number) is not signal.SIG_IGN
    )
