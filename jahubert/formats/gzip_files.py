"""Gzip decompression with a limit on the decompressed size, so that a small file cannot fill the memory."""

from __future__ import annotations

import gzip
import io
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from jahubert.errors import DataError
from jahubert.limits import ADVICE, GZIP_BYTES, GZIP_EXPANSION, limit


class _LimitedGzip(io.RawIOBase):
    """Decompressed stream that raises a DataError after too many bytes."""

    def __init__(self, raw: BinaryIO, path: Path):
        self.path = path
        raw.seek(0, os.SEEK_END)
        self.limit = limit(max(GZIP_BYTES, GZIP_EXPANSION * raw.tell()))
        raw.seek(0)
        self.file = gzip.GzipFile(fileobj=raw, mode="rb")
        self.n_bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n_bytes = cast(io.BufferedIOBase, self.file).readinto1(buffer)
        self.n_bytes += n_bytes
        if self.n_bytes > self.limit:
            raise DataError(f"{self.path}: decompresses to more than {self.limit:,} bytes; {ADVICE}")
        return n_bytes


def open_maybe_gzip(raw: io.BufferedReader, path: Path) -> BinaryIO:
    """Return a file, or its decompressed content if it starts like a gzip file (see `open_gzip`).

    The file may be a pipe, unless it is compressed.
    """
    return open_gzip(raw, path) if raw.peek(2)[:2] == b"\x1f\x8b" else raw


def open_gzip(raw: BinaryIO, path: Path) -> BinaryIO:
    """Open a gzip file for buffered reading.

    Args:
        raw: seekable compressed file, which is not closed with the returned one.
        path: path of the file, for messages.

    Raises:
        DataError: raised by reads if the decompressed size exceeds the limit (see `GZIP_EXPANSION`).
    """
    return cast(BinaryIO, io.BufferedReader(_LimitedGzip(raw, path), 1 << 16))
