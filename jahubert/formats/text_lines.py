"""Line reader for text files from users: lexicons, dictionaries and texts, plain or gzip-compressed."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

from jahubert.errors import DataError
from jahubert.formats.gzip_files import open_maybe_gzip

MAX_LINE = 1 << 20  # maximum length of a line in bytes


def read_lines(path: Path, content: str) -> Iterator[tuple[int, str]]:
    """Yield (number, line) for each line of a UTF-8 file, skipping a byte order mark.

    Args:
        path: a text file, which may be compressed with gzip; `-` is standard input.
        content: what the file contains, for messages, such as "lexicon".

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8 or too long. The message about a line gives
            its number.
    """
    try:
        with _open(path) as file:
            for number, line in enumerate(iter(partial(file.readline, MAX_LINE), b""), 1):
                if len(line) == MAX_LINE and not line.endswith(b"\n"):
                    raise DataError(
                        f"{path}:{number}: the line is longer than {MAX_LINE} bytes; check that the "
                        f"{content} is a text file"
                    )
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise DataError(f"{path}:{number}: not UTF-8; convert the {content} to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path}: cannot read the {content} ({reason})") from error


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    if str(path) == "-":
        yield sys.stdin.buffer
        return
    with path.open("rb") as file:
        yield open_maybe_gzip(file, path)
