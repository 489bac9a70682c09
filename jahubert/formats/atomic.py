"""Atomic writing of files and folders.

Content is written under a temporary name in the same folder, flushed to disk and renamed. Readers of a file
see either the old or the new content, even if the writer is killed or the disk is full. The temporary name
starts with `.tmp-` and is derived from the final name without exceeding the maximum length of file names. The
temporary file is locked while in use (except on Windows), so that concurrent writers do not interfere. The
next writer reuses the temporary file of a killed process. Links, and files that cannot be opened, are not
reused, because another user may have created them. If the final name is a symbolic link to a file, the link
is replaced, not the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal, TextIO, overload

from jahubert.errors import ConfigError, file_system_error

if sys.platform != "win32":
    import fcntl

PREFIX = ".tmp-"
_FOLDER, _REPLACED = ".new", ".old"  # suffixes of temporary folders for new and for replaced content
_DIGITS = 8  # number of hexadecimal digits in the name of a temporary file
_CONTENT = "content"  # name of a file in a temporary folder


@overload
def atomic_write(
    path: Path, mode: Literal["w"] = "w", errors: str | None = None
) -> AbstractContextManager[TextIO]: ...
@overload
def atomic_write(path: Path, mode: Literal["wb"]) -> AbstractContextManager[BinaryIO]: ...
@contextmanager
def atomic_write(path: Path, mode: str = "w", errors: str | None = None) -> Iterator[Any]:
    """Open a temporary file that replaces `path` after the `with` block, unless the block raises an error.

    Args:
        path: the file to write, whose folder must exist.
        mode: "w" for UTF-8 text, or "wb" for bytes.
        errors: error handler for characters that UTF-8 cannot encode, as in `open` (only in text mode).
    """
    with temporary_file(path) as temporary:
        encoding = None if "b" in mode else "utf-8"
        with temporary.open(mode, encoding=encoding, errors=errors) as file:
            yield file
        _flush(temporary)
        temporary.replace(path)


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path for libraries that open files by name. The file replaces `path` after the block.

    The temporary path is in a folder of its own, because some libraries create more files next to it.
    """
    with _new_folder(path) as (folder, mode):
        yield folder / _CONTENT
        _finish(folder / _CONTENT, mode)
        (folder / _CONTENT).replace(path)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder that is renamed to `path` after the `with` block, replacing an existing folder.

    Replacing a folder takes two renames. If the process is killed between them, the next write first restores
    the old folder.
    """
    path = path.resolve()  # for a symbolic link, the target is replaced
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    with _new_folder(path) as (folder, mode):
        replaced = folder.with_suffix(_REPLACED)
        try:
            yield folder
            for file in folder.rglob("*"):
                _finish(file, mode)
            _flush(folder)
            if path.exists():
                path.rename(replaced)
            folder.rename(path)
            _flush(path.parent)
        except BaseException:
            _restore(path, replaced)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


@contextmanager
def _new_folder(path: Path) -> Iterator[tuple[Path, int]]:
    """Create an empty temporary folder next to `path`, and yield it with the permissions for new files."""
    with temporary_file(path) as reserved:
        folder, replaced = (reserved.with_name(reserved.name + kind) for kind in (_FOLDER, _REPLACED))
        _restore(path, replaced)
        for leftover in (folder, replaced):
            if leftover.is_symlink() or leftover.is_file():
                leftover.unlink()
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir()
        try:
            yield folder, stat.S_IMODE(reserved.stat().st_mode)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _restore(path: Path, replaced: Path) -> None:
    """Undo the first of the two renames that replace a folder if the second one did not happen."""
    if replaced.exists() and not path.exists():
        replaced.rename(path)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove temporary files and folders that killed processes left in `folder`.

    If a process was killed while it replaced a folder, and the folder is now missing, its old content is
    kept, so that the next write restores it. Otherwise, the old content is removed.

    Args:
        name: the file or folder in `folder` that the processes were writing (default: any).
    """
    start = PREFIX if name is None else temporary_path(folder / name).name
    present = {temporary_path(path).name for path in folder.iterdir()} if folder.is_dir() else set()
    for temporary in folder.glob(start + "*"):
        if temporary.suffix in (_FOLDER, _REPLACED):
            continue
        with suppress(OSError), temporary.open("r+b") as file:
            if _lock(file.fileno()):
                shutil.rmtree(temporary.with_name(temporary.name + _FOLDER), ignore_errors=True)
                replaced = temporary.with_name(temporary.name + _REPLACED)
                if temporary.name[: len(PREFIX) + _DIGITS] in present:
                    shutil.rmtree(replaced, ignore_errors=True)
                if not replaced.exists():  # otherwise, the next writer uses the same temporary file
                    temporary.unlink()


def remove_folder(folder: Path) -> None:
    """Delete a folder and its content if it exists. For a symbolic link, only the link is deleted.

    Raises:
        OSError: part of the folder could not be deleted. The error names `folder`.
    """
    try:
        if folder.is_symlink():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:  # the error names only a file inside the folder
        raise OSError(error.errno, os.strerror(error.errno or errno.EIO), str(folder)) from error


def temporary_path(path: Path) -> Path:
    """Return the temporary path for a file or folder. Writers add a random suffix if the path is in use."""
    return path.with_name(PREFIX + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:_DIGITS])


@contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Create and lock an empty temporary file for `path`; remove it after the block unless it was renamed.

    File system errors in the `with` block, including those wrapped in library exceptions, are raised as
    OSErrors that name `path` instead of the temporary file, which users do not know.

    Raises:
        OSError: `path` is a device, FIFO or socket, or is in `/dev`, or another file system error occurred.
    """
    temporary = temporary_path(path)
    try:
        if _is_special(path):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        while (descriptor := _open_locked(temporary)) is None:
            temporary = path.with_name(f"{temporary_path(path).name}-{secrets.token_hex(3)}")
        try:
            if os.fstat(descriptor).st_size:
                os.ftruncate(descriptor, 0)
            if sys.platform == "win32":  # an open file can be neither renamed nor removed
                os.close(descriptor)
            yield temporary
        finally:
            if sys.platform == "win32":
                temporary.unlink(missing_ok=True)
            else:
                _release(descriptor, temporary)
    except BaseException as error:  # torch's CheckpointException is not an Exception
        failure = file_system_error(error, path)
        if failure is None:
            raise
        if str(temporary) in os.fsdecode(failure.filename):
            failure.filename, failure.filename2 = str(path), None
        if failure is error:
            raise
        raise failure from error


def _is_special(path: Path) -> bool:
    """Return whether `path` must not be replaced: it is a device, FIFO or socket, or is in `/dev`."""
    in_dev = str(path.absolute().parent) == "/dev"
    return in_dev or (path.exists() and not path.is_file() and not path.is_dir())


def _open_locked(temporary: Path) -> int | None:
    """Create or reuse a temporary file, and lock it. Return None if its name is in use.

    Links are not opened, because the content of another file would be overwritten.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(temporary, flags, 0o666)
    except OSError:
        if os.path.lexists(temporary):
            return None
        raise
    status = os.fstat(descriptor)
    reusable = stat.S_ISREG(status.st_mode) and not (status.st_size and status.st_nlink > 1)
    # The previous writer may have renamed or removed the file between open and lock.
    if reusable and _lock(descriptor) and _has_name(descriptor, temporary):
        return descriptor
    os.close(descriptor)
    return None


def _release(descriptor: int, temporary: Path) -> None:
    """Remove a temporary file, unless it was renamed, and unlock it."""
    try:
        if _has_name(descriptor, temporary):
            temporary.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock an open file if locks are supported. Return False if another writer holds the lock, else True."""
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


def _has_name(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _finish(path: Path, mode: int) -> None:
    """Flush a new file and set its permissions, which some libraries restrict to the owner."""
    if path.is_file() and stat.S_IMODE(path.stat().st_mode) != mode:
        path.chmod(mode)
    _flush(path)


def _flush(path: Path) -> None:
    """Flush the content of a file or the entries of a folder to disk."""
    if sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(folder: Path) -> Iterator[None]:
    """Create a folder for the files that the `with` block writes, and remove the folder if the block fails.

    Unlike with `atomic_folder`, files may contain the path of the folder. A file marks the folder as
    incomplete, so that the next call can replace what a killed process has left.

    Raises:
        ConfigError: the folder exists, is complete and is not empty.
    """
    marker = folder / ".incomplete"
    if marker.exists():
        remove_folder(folder)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists already and is not an empty folder; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    marker.touch()
    try:
        yield
    except BaseException:
        with suppress(OSError):
            remove_folder(folder)
        raise
    marker.unlink()
