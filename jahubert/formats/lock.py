"""Lock on an output folder, held by one run at a time.

The operating system releases the lock if a run is killed. On Windows and on a file system without locks,
several runs can use a folder at the same time.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from jahubert.errors import BusyError

if sys.platform != "win32":  # Windows has no POSIX locks
    import fcntl

LOCK_NAME = ".running"
_TRIES = 5


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` for this process; forked processes do not inherit the lock.

    Raises:
        BusyError: another process, on this machine or on one that shares the file system, holds the lock.
    """
    for _ in range(_TRIES):
        with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
            other = _try_lock(file)
            if other is None and _has_name(file, folder / LOCK_NAME):
                job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
                file.flush()
                try:
                    yield
                finally:
                    if sys.platform == "win32":  # an open file cannot be removed
                        file.close()
                    (folder / LOCK_NAME).unlink(missing_ok=True)
                return
        time.sleep(0.1)  # the other process may only be querying the owner, or be about to finish
    raise BusyError(
        f"{folder}: locked by another run ({other or 'unknown process'}); wait for it, or stop it and rerun "
        "the same command"
    )


def lock_owner(folder: Path) -> str | None:
    """Return a description of the process that holds the lock on a folder, or None if none is known."""
    if not (folder / LOCK_NAME).exists():
        return None
    try:
        with (folder / LOCK_NAME).open("r+", encoding="utf-8") as file:
            return _try_lock(file)
    except OSError:  # the lock file was deleted in the meantime or is not writable
        return None


def remove_stale_lock(folder: Path) -> None:
    """Delete the lock file that a killed run left in a finished folder."""
    if (folder / LOCK_NAME).exists() and lock_owner(folder) is None:
        with suppress(OSError):  # the folder may be read-only
            (folder / LOCK_NAME).unlink(missing_ok=True)


def _has_name(file: TextIO, path: Path) -> bool:
    """Return whether an open file still exists at `path`; the previous owner may have deleted it."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _try_lock(file: TextIO) -> str | None:
    """Try to lock a file. If another process holds the lock, return a description of that process.

    On Windows and on a file system without locks, every attempt succeeds.
    """
    if sys.platform == "win32":
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        file.seek(0)
        return file.read() or "unknown process"
    return None
