"""Standard streams and current folder of a command.

The streams may be closed, full or connected to a pipe that ends early, and the folder may have been deleted.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

from jahubert.errors import DISK_FULL, UserError, exit_status

BROKEN_PIPE = 141  # exit status if the reader of standard output ends early


class _StandardError(io.FileIO):
    """Standard error whose failed writes are ignored, so that a lost message does not end the work."""

    def write(self, data: Any) -> int:
        try:
            written: int | None = super().write(data)
        except OSError:
            written = None
        return len(data) if written is None else written  # None if a non-blocking stream is full


def open_standard_streams() -> None:
    """Replace standard output or standard error if it is closed, and ignore failed writes to standard error.

    Writes to the new standard output fail, and those to the new standard error are discarded. The descriptors
    of closed streams are occupied as well. Otherwise, an output file could get one of them and receive what a
    library prints.
    """
    is_console = sys.platform == "win32" and sys.stderr is not None and sys.stderr.isatty()
    # Python writes to a console of Windows as Unicode characters, not as bytes.
    if sys.stderr is not None and sys.stderr is sys.__stderr__ and not is_console:
        raw = io.BufferedWriter(_StandardError(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
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


def check_current_folder() -> None:
    """Raise UserError if the current folder cannot be accessed, for example because it was deleted."""
    try:
        os.getcwd()
    except OSError as error:
        raise UserError(
            f"the current folder cannot be accessed ({error.strerror}); change to an existing folder and "
            "rerun the command"
        ) from error


def current_folder_error() -> UserError | None:
    """Return the error of `check_current_folder`, which may be the cause of other errors, or None."""
    try:
        check_current_folder()
    except UserError as error:
        return error
    return None


def is_output_error(error: OSError) -> bool:
    """Return whether an error comes from writing to standard output. File errors contain a file name."""
    return error.filename is None and error.errno in (errno.EPIPE, errno.EBADF, *DISK_FULL)


def failed_output(error: OSError) -> int:
    """Return the exit status after an error on standard output, and report it unless a pipe was closed."""
    # Otherwise, Python would fail to flush standard output at exit, and report a second error.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    print(f"jahubert: error: standard output: {error.strerror or error}", file=sys.stderr)
    return exit_status(error)
