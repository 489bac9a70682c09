"""Error messages for file system errors, exhausted memory and killed DataLoader workers."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jahubert.errors import (
    DISK_FULL,
    ConfigError,
    DiskFullError,
    JahubertError,
    SharedMemoryError,
    file_system_error,
)
from jahubert.train.experiment import distributed

# English messages. numpy only reports how many items it wrote, and "File too large" is caused by a limit on
# file sizes.
_DISK_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written"
)
_MIN_FREE_BYTES = 1 << 20  # if less space is free, any unexpected error is attributed to a full disk
_OOM_SUMMARY = re.compile(r".*? is free|[^\n]*")  # torch's message without the allocator details
_WORKER_KILLED = re.compile(
    r"DataLoader worker \(pid[^\n]*?\) (is killed by signal: \w+|exited unexpectedly)"
)


@contextmanager
def report_file_errors(out: Path) -> Iterator[None]:
    """Convert file system errors, including those wrapped in library exceptions, to clear errors.

    Args:
        out: output folder, which is named if the error does not name a file.

    Raises:
        DiskFullError: the error or one of its causes reports a full disk or a file over the size limit, or
            less than 1 MiB is free on the disk of `out`.
        OSError: any other file system error.
    """
    try:
        yield
    except (DiskFullError, SharedMemoryError, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is not an Exception
        if isinstance(error, JahubertError) and not _reports_full_disk(error):
            raise
        failure = file_system_error(error, out)
        if failure is not None and failure.errno == errno.EFBIG:
            raise DiskFullError(
                f"while writing to {out}, a file exceeds the maximum size (ulimit -f, or a limit of the file "
                "system): raise the limit and rerun the same command; finished work is kept"
            ) from error
        if _is_disk_full(error, failure, out):
            raise DiskFullError(
                f"the disk is full while writing to {out}: free some space and rerun the same command; "
                "finished work is kept"
            ) from error
        if failure is None or failure is error:
            raise
        raise failure from error


def _is_disk_full(error: BaseException | None, failure: OSError | None, out: Path) -> bool:
    """Return whether the error or one of its causes reports a full disk, or less than 1 MiB is free."""
    if failure is not None and failure.errno in DISK_FULL:
        return True
    while error is not None:
        if _reports_full_disk(error):
            return True
        error = error.__cause__ or error.__context__
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free < _MIN_FREE_BYTES


def _reports_full_disk(error: BaseException) -> bool:
    """Return whether the message of an error reports a full disk, in English or the current locale."""
    message = str(error)
    localized = any(os.strerror(code) in message for code in DISK_FULL)
    return localized or _DISK_FULL.search(message) is not None


@contextmanager
def report_oom(stage: str, config: Any) -> Iterator[None]:
    """Convert errors caused by exhausted memory to errors that name the setting to change.

    Raises:
        ConfigError: GPU memory is exhausted.
        JahubertError: a DataLoader worker was killed or exited unexpectedly.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = _OOM_SUMMARY.findall(str(error))[0].rstrip(".")
        raise ConfigError(f"{stage}: {message}. {_memory_advice(stage, config)}") from error
    except JahubertError:
        raise
    except BaseException as error:
        # torch raises the RuntimeError about a killed worker in a signal handler, so it can occur anywhere.
        # While saving a checkpoint, torch wraps it in a CheckpointException, which is not an Exception.
        match = _WORKER_KILLED.search(str(error))
        trained = getattr(config, "train", None)
        workers = getattr(trained or config, "workers", 0)
        if match is None or not workers:
            raise
        advice = f"set {stage}.{'train.' if trained else ''}workers below {workers}"
        if trained:
            group = "crop." if hasattr(config, "crop") else ""
            advice += f" or {stage}.{group}keep_in_memory_hours=0"
        raise JahubertError(
            f"{stage}, while {distributed.last_heartbeat().activity}: {match[0]}, probably because "
            f"the system ran out of memory: {advice}. Rerun the same command to resume"
        ) from error


def _memory_advice(stage: str, config: Any) -> str:
    """Return advice on how to reduce the GPU memory that a stage uses."""
    if hasattr(config, "train"):
        train = f"{stage}.train"
        seconds = config.train.micro_seconds
        limit = "a smaller number than the log reports" if seconds is None else f"less than {seconds:g}"
        return (
            f"Set {train}.micro_seconds to {limit}, or set {train}.recompute=true; neither changes the "
            "updates, so training resumes from the last checkpoint"
        )
    if hasattr(config, "batch_seconds"):
        return f"Set {stage}.batch_seconds below {config.batch_seconds:g}; finished work is kept"
    return f"Free memory on that GPU, or set {stage}.device=cpu"
