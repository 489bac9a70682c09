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
from jahubert.limits import ADVICE, STREAM_BYTES, limit

_BLOCK = 1 << 20  # bytes
UNNAMED_STREAM = "the stream"  # name in messages of streams that have none


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
        AudioError: the source is missing, unreadable, empty, a folder, a device or a text stream; the byte
            range is outside the file; or a pipe or non-seekable stream exceeds the size limit.
    """
    if hasattr(source, "read"):
        name = str(getattr(source, "name", UNNAMED_STREAM))
        yield _in_memory(name, _read_stream(source, name))
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
    mode = os.fstat(file.fileno()).st_mode
    if stat.S_ISCHR(mode) or stat.S_ISBLK(mode):
        raise AudioError(f"{name} is a device; only files and pipes can be read")
    if not stat.S_ISREG(mode):
        data = _read_stream(file, name)
        end = None if source.length < 0 else source.offset + source.length
        return _in_memory(name, data[source.offset : end])
    size = file.seek(0, os.SEEK_END)
    if whole:
        file.seek(0)
        if size == 0:
            raise AudioError(f"{name} is empty (0 bytes)")
        return AudioBytes(name, file, size)
    if source.offset > size or source.offset + source.length > size:
        raise AudioError(
            f"{name} exceeds the file size ({size} bytes): the file is truncated, or the byte range is from "
            "another file"
        )
    file.seek(source.offset)
    content = bytearray()
    while block := file.read(source.length - len(content)):  # an unbuffered read may return fewer bytes
        content += block
    return _in_memory(name, bytes(content))


def _read_stream(stream: Any, name: str) -> bytes:
    """Read a pipe or binary stream to its end.

    Raises:
        AudioError: the stream is a text stream, or is not seekable and exceeds the size limit, as an endless
            stream does.
    """
    max_bytes = limit(STREAM_BYTES)
    content = io.BytesIO()
    while block := stream.read(_BLOCK):
        if not isinstance(block, bytes):
            raise AudioError(f"{name} is a text stream: open the file in binary mode, or pass its path")
        n_bytes = content.tell() + len(block)
        if n_bytes > max_bytes:
            max_bytes = max(max_bytes, _end(stream))
        if n_bytes > max_bytes:
            raise AudioError(
                f"{name} has more than {max_bytes:,} bytes, the limit for streams that are not seekable; "
                f"write it to a file or, {ADVICE}"
            )
        content.write(block)
    return content.getvalue()


def _end(stream: Any) -> int:
    """Return the end position of a seekable stream, or 0 for pipes and endless devices."""
    try:
        position = stream.tell()
        stream.seek(0, os.SEEK_END)
        end: int = stream.tell()
        stream.seek(position)
    except (AttributeError, OSError, ValueError):
        return 0
    return end


def _in_memory(name: str, data: bytes) -> AudioBytes:
    if not data:
        raise AudioError(f"{name} is empty (0 bytes)")
    return AudioBytes(name, io.BytesIO(data), len(data))
