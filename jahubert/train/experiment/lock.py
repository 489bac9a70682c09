"""One run at a time in a folder: who works there holds a lock, which the system takes back when it dies."""

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

if sys.platform != "win32":  # which has no such locks
    import fcntl

LOCK_NAME = ".running"
_TRIES = 5


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold `folder` for this process; processes that it forks hold nothing.

    Raises:
        BusyError: another process holds it, here or on any machine that shares the file system.
    """
    for _ in range(_TRIES):
        with (folder / LOCK_NAME).open("a+", encoding="utf-8") as file:
            other = _held(file)
            if other is None and _is(file, folder / LOCK_NAME):
                job = f", job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}{job}")
                file.flush()
                try:
                    yield
                finally:
                    (folder / LOCK_NAME).unlink(missing_ok=True)
                return
        time.sleep(0.1)  # somebody may only have looked, or be at the end
    raise BusyError(
        f"{folder}: another run is at work there ({other}); wait for it, or stop it and give the same "
        "command again"
    )


def lock_owner(folder: Path) -> str | None:
    """Who works in the folder at this moment, if anybody does."""
    if not (folder / LOCK_NAME).exists():
        return None
    try:
        with (folder / LOCK_NAME).open("r+", encoding="utf-8") as file:
            return _held(file)
    except OSError:  # gone, or not ours to write
        return None


def remove_stale_lock(folder: Path) -> None:
    """Delete the lock file that a killed run left in a finished folder."""
    if (folder / LOCK_NAME).exists() and lock_owner(folder) is None:
        with suppress(OSError):  # a folder that only others may write
            (folder / LOCK_NAME).unlink(missing_ok=True)


def _is(file: TextIO, path: Path) -> bool:
    """Whether an open file still has its name: who held it before took the name away."""
    return path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat())


def _held(file: TextIO) -> str | None:
    """Lock a file; what it says where somebody else has it. A file system without locks gives all."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            return None
        file.seek(0)
        return file.read() or "of which nothing more is known"
    return None
