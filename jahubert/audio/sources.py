"""Access to the bytes of audio files, byte ranges, pipes and open streams as seekable binary files."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

from jahubert.errors import AudioError


@dataclass(frozen=True)
class AudioSource:
    """An audio file, or a byte range of a file such as an uncompressed tar or zip archive."""

    path: str
    offset: int = 0  # start of the byte range
    length: int = -1  # length of the byte range; -1: to the end of the file

    def __str__(self) -> str:
        if self.offset == 0 and self.length < 0:
            return self.path
        end = "end" if self.length < 0 else str(self.offset + self.length)
        return f"{self.path} (bytes {self.offset} to {end})"


class AudioBytes(NamedTuple):
    """Encoded recording as a seekable binary file."""

    name: str  # name of the source, for error messages
    file: BinaryIO  # seekable file: an open regular file, or the bytes in memory
    size: int  # size in bytes


@contextmanager
def open_bytes(source: Any) -> Iterator[AudioBytes]:
    """Open the bytes of a file, a byte range or a binary stream.

    Pipes, streams and byte ranges are read into memory.

    Raises:
        AudioError: the source is missing, unreadable or empty, the byte range is outside the file, or the
            stream is a text stream.
    """
    if hasattr(source, "read"):
        name = str(getattr(source, "name", "the stream"))
        data = source.read()
        if not isinstance(data, bytes):
            raise AudioError(f"{name} is a text stream: open the file in binary mode, or pass its path")
        yield _in_memory(name, data)
        return
    if not isinstance(source, AudioSource):
        source = AudioSource(os.fsdecode(source))
    name = str(source)
    try:
        # The file is not buffered, because decoders move the position of its descriptor.
        file = cast(BinaryIO, open(source.path, "rb", buffering=0))  # noqa: SIM115
    except FileNotFoundError as error:
        raise AudioError(f"no such audio file: {source.path}") from error
    except IsADirectoryError:
        raise AudioError(f"{name} is a folder, not an audio file") from None
    except (OSError, ValueError) as error:  # a NUL in the path causes a ValueError
        reason = getattr(error, "strerror", None) or error
        raise AudioError(f"{name} cannot be read: {reason}") from error
    with file:
        try:
            yield _range(file, source, name)
        except OSError as error:
            raise AudioError(f"{name} cannot be read: {error.strerror or error}") from error


def _range(file: BinaryIO, source: AudioSource, name: str) -> AudioBytes:
    """Return the part of an open file that `source` specifies."""
    whole = source.offset == 0 and source.length < 0
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        data = file.read()
        end = None if source.length < 0 else source.offset + source.length
        return _in_memory(name, data[source.offset : end])
    size = file.seek(0, os.SEEK_END)
    if whole:
        file.seek(0)
        if size == 0:
            raise AudioError(f"{name} is empty (0 bytes)")
        return AudioBytes(name, file, size)
    file.seek(source.offset)
    data = file.read(source.length)
    if source.offset > size or len(data) < source.length:
        raise AudioError(
            f"{name} exceeds the file size ({size} bytes): the archive is truncated, or the manifest belongs "
            "to another archive"
        )
    return _in_memory(name, data)


def _in_memory(name: str, data: bytes) -> AudioBytes:
    if not data:
        raise AudioError(f"{name} is empty (0 bytes)")
    return AudioBytes(name, io.BytesIO(data), len(data))
