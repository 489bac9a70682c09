"""Exception classes of jahubert.

Error messages should state what failed, where, what was found and what to do. `UserError` is the base class
of the errors that files, options or the setup of a machine can cause. File system errors for which it has no
subclass are `OSError`s that name the file. Commands print the message of either kind without a traceback and
exit with the status that `exit_status` returns. Functions may raise a ValueError or TypeError for invalid
arguments.
"""

from __future__ import annotations

import errno
import os
import re
import reprlib
import unicodedata
from typing import Any


class JahubertError(Exception):
    """Base class of jahubert's own exceptions.

    Attributes:
        exit_status: exit status of a command that ends with this error.
        reported: whether another process prints the message, in which case this process does not.
    """

    exit_status: int = 1
    reported: bool = False


class Stopped(JahubertError):
    """Raised if training stopped after a signal and saved a checkpoint from which the same command resumes.

    Attributes:
        signal: name of the signal, e.g. "SIGTERM", or None if another process received it.
    """

    exit_status = 75  # EX_TEMPFAIL: a scheduler may requeue the job

    def __init__(self, message: str = "", signal: str | None = None):
        super().__init__(message)
        self.signal = signal


class UserError(JahubertError):
    """An error that a user can fix by following its message, without reading code."""

    exit_status = 2


class ConfigError(UserError):
    """Raised for one or more invalid settings or arguments.

    Attributes:
        settings: one message per invalid setting, from which the errors of several stages can be merged.
            Empty if the error does not list settings.
    """

    settings: tuple[str, ...] = ()


class AudioError(UserError):
    """Raised if a file is missing, or if a file, stream or array contains no usable audio."""


class DataError(UserError):
    """Raised if input data, such as a corpus, manifest or lexicon, is missing, invalid or mismatched."""


class ReadError(DataError):
    """Raised if the file system still fails to read a file after several attempts.

    The file may be intact, so callers must not skip it as they skip damaged files.
    """


class CheckpointError(UserError):
    """Raised if a model folder or file cannot be read or converted, or is not of the required kind."""


class DiskFullError(UserError):
    """Raised if no space is left on a disk. Once there is space, rerunning the command resumes the work."""

    exit_status = 1


class SharedMemoryError(UserError):
    """Raised if shared memory is full. Once there is space, rerunning the command resumes the work."""

    exit_status = 1


class StaleError(UserError):
    """Raised if an existing output does not match the run, for example in its settings or engine."""


class BusyError(UserError):
    """Raised if another run is using a folder."""


class MissingExtraError(UserError, ImportError):
    """Raised if an optional package is not installed. The message names the extra that provides it."""

    def __init__(self, package: str, extra: str):
        super().__init__(
            f"{package} is not installed. Install the extra {extra} in a clone of jahubert: "
            f"pip install '.[{extra}]'"
        )
        self.package, self.extra = package, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.package, self.extra)


DISK_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC), errno.EFBIG)
# OSErrors that concern sockets and processes rather than files.
_NOT_FILES = (ConnectionError, BlockingIOError, InterruptedError, TimeoutError, ChildProcessError)
_RUST_ERROR = re.compile(r"\(os error (\d+)\)")  # occurs in messages from safetensors
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")  # numpy's message, which does not name the cause
_LIBSNDFILE_SYSTEM_ERROR = 2
MAX_MESSAGE = 10_000  # maximum length of a printed message in characters
_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = 100
_REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxdict = 10


def quote(value: Any) -> str:
    """Return the `repr` of a value from a file or setting, with limited length and depth, for messages."""
    try:
        return _REPR.repr(value)
    except ValueError:  # the value is an integer with thousands of digits
        return f"a huge {type(value).__name__}"


def shorten(text: str, length: int) -> str:
    """Replace the middle of a text that is longer than `length` with the number of omitted characters."""
    half = length // 2
    n_omitted = len(text) - 2 * half
    return f"{text[:half]} ... ({n_omitted:,} characters) ... {text[-half:]}" if n_omitted > 0 else text


def printable(text: str) -> str:
    """Escape formatting and control characters, which could manipulate a terminal, but not newlines."""
    escaped = []
    for character in text:
        if character != "\n" and unicodedata.category(character) in ("Cc", "Cf"):
            utf16 = character.encode("utf-16-be").hex()  # a JSON escape keeps JSON output valid
            character = "".join(f"\\u{utf16[i : i + 4]}" for i in range(0, len(utf16), 4))
        escaped.append(character)
    return "".join(escaped)


def exit_status(error: BaseException) -> int:
    """Return the exit status for an error.

    A `JahubertError` has its own status. An OSError has status 2, or 1 if a disk is full. All other errors
    are internal errors and have status 1.
    """
    if isinstance(error, JahubertError):
        return error.exit_status
    return UserError.exit_status if isinstance(error, OSError) and error.errno not in DISK_FULL else 1


def file_system_error(error: BaseException | None, path: str | os.PathLike[str]) -> OSError | None:
    """Return the file system error that `error` is or wraps, or None if it is an error of another kind.

    Some libraries raise file system errors without a file name, or wrap them in their own exception types.

    Args:
        path: the file or folder that the result names if `error` names none.
    """
    if isinstance(error, JahubertError):
        return None
    if isinstance(error, OSError) and not isinstance(error, _NOT_FILES):
        if error.filename is not None:
            return error
        if error.errno is not None:
            return OSError(error.errno, os.strerror(error.errno), os.fspath(path))
        if _SHORT_WRITE.search(str(error)):
            return OSError(
                errno.ENOSPC, f"incomplete write, probably on a full disk ({error})", os.fspath(path)
            )
    if match := _RUST_ERROR.search(str(error)):
        return OSError(int(match[1]), os.strerror(int(match[1])), os.fspath(path))
    if getattr(error, "code", None) == _LIBSNDFILE_SYSTEM_ERROR and type(error).__name__ == "LibsndfileError":
        return OSError(errno.EIO, f"{error}".rstrip(".").lower(), os.fspath(path))
    if isinstance(error, RuntimeError):  # torch's archive writer raises this for Python file objects
        return file_system_error(error.__cause__ or error.__context__, path)
    for failure, _ in getattr(error, "failures", {}).values():  # torch's CheckpointException has one per rank
        if found := file_system_error(failure, path):
            return found
    return None
