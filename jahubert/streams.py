"""Standard streams of a command, which may be closed, full or connected to a pipe that ends early."""

from __future__ import annotations

import os
import sys

from jahubert.errors import exit_status

BROKEN_PIPE = 141  # exit status if the reader of standard output ends early


def open_standard_streams() -> None:
    """Replace closed standard output by a stream whose writes fail, and closed standard error by os.devnull.

    The descriptors of closed streams are occupied as well. Otherwise, an output file could get one of them
    and receive what a library prints.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (descriptor := os.open(os.devnull, os.O_RDONLY)) <= 2:
        pass
    if sys.stdout is None:
        sys.stdout = open(descriptor, "w", encoding="utf-8")  # noqa: SIM115
    else:
        os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def failed_output(error: OSError) -> int:
    """Report that standard output cannot be written, and return the exit status."""
    # Otherwise, Python would report the error of standard output again at exit.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    where = "standard output: " if error.errno else ""  # numpy's errors about files have no errno
    print(f"jahubert: error: {where}{error.strerror or error}", file=sys.stderr)
    return exit_status(error)
