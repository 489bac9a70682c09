"""Reader and writer for n-gram language models in ARPA format, plain or gzip-compressed."""

from __future__ import annotations

import codecs
import gzip
import math
import re
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from jahubert.errors import DataError, quote
from jahubert.formats.atomic import atomic_path
from jahubert.formats.gzip_files import open_maybe_gzip
from jahubert.lm.ngram import Entries, NGram, NGramError

MAX_LINE = 1 << 16  # maximum length of a line in bytes
MAX_ORDER = 20
_MAX_SKIPPED = 10_000  # maximum number of lines before the header, and of empty lines between sections
_LN10 = math.log(10.0)
# Base-10 logarithm that stands for a probability of zero in ARPA files (SRILM). It replaces smaller numbers,
# such as -inf, because differences and products of infinite scores can be NaN.
_ZERO = -99.0


def read_arpa(path: Path) -> NGram:
    """Read an ARPA file, using memory proportional to the number of n-grams.

    Raises:
        DataError: the file cannot be read or is not a valid ARPA file. A message about a line gives its
            number.
    """
    try:
        with path.open("rb") as raw:
            return _Reader(path, open_maybe_gzip(raw, path)).read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot read the language model ({error})") from error


class _Reader:
    """Parser for one ARPA file."""

    def __init__(self, path: Path, file: BinaryIO):
        self.path = path
        self.file = file
        self.number = 0  # number of the current line
        self.ahead: bytes | None = None  # the current line, if `_line` is to return it again
        self.words: list[str] = []
        self.index: dict[bytes, int] = {}

    def read(self) -> NGram:
        counts = self._header()
        entries, first_lines = [], []
        for order, count in enumerate(counts, 1):
            if order > 1 and (line := self._next_content()) != b"\\%d-grams:" % order:
                self._fail(f"expected \\{order}-grams:, found {_shown(line)}")
            first_lines.append(self.number + 1)
            entries.append(self._section(order, count, is_last=order == len(counts)))
        if self._next_content() != b"\\end\\":
            self._fail("expected \\end\\")
        self._read_to_end()
        try:
            return NGram(self.words, entries)
        except NGramError as error:
            raise DataError(f"{self.path}:{first_lines[error.order - 1] + error.row}: {error}") from error

    def _fail(self, message: str) -> NoReturn:
        raise DataError(f"{self.path}:{self.number}: {message}")

    def _line(self) -> bytes:
        """Return the next line without surrounding white space."""
        if self.ahead is not None:
            ahead, self.ahead = self.ahead, None
            return ahead
        line = self.file.readline(MAX_LINE)
        self.number += 1
        if not line:
            self._fail("the file ends before \\end\\; is it truncated, or not an ARPA file?")
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            self._fail(f"the line is longer than {MAX_LINE} bytes; is this an ARPA file?")
        return line.strip()

    def _next_content(self) -> bytes:
        """Return the next line that is not empty."""
        return next(line for line in self._skippable("only empty lines follow") if line)

    def _skippable(self, problem: str) -> Iterator[bytes]:
        """Yield lines until the caller stops, and raise a DataError with `problem` after too many lines."""

        for _ in range(_MAX_SKIPPED):
            yield self._line()
        self._fail(f"{problem}; is this an ARPA file?")

    def _read_to_end(self) -> None:
        """Check that nothing follows the model. In a gzip file, this also verifies the final checksum."""
        while block := self.file.read(MAX_LINE):
            if block.strip():
                self._fail(f"unexpected content after \\end\\: {_shown(block.strip())}")

    def _header(self) -> list[int]:
        """Read the header, and return the number of n-grams of each order."""
        start = (b"\\data\\", codecs.BOM_UTF8 + b"\\data\\")
        next(line for line in self._skippable("no line \\data\\ at the start") if line in start)
        counts: list[int] = []
        while (line := self._next_content()) != b"\\1-grams:":
            match = re.fullmatch(rb"ngram\s+(\d{1,9})\s*=\s*(\d{1,18})", line)
            if match is None or int(match[1]) != len(counts) + 1 or len(counts) == MAX_ORDER:
                self._fail(f"expected 'ngram {len(counts) + 1}=COUNT' or \\1-grams:, found {_shown(line)}")
            counts.append(int(match[2]))
        if not counts:
            self._fail("no line 'ngram 1=COUNT' before \\1-grams:")
        return counts

    def _section(self, order: int, count: int, is_last: bool) -> Entries:
        """Read the n-grams of one order, starting with the line after the section header."""
        ids, logps, backoffs = array("i"), array("f"), array("f")
        for parts in self._rows():
            if not order + 1 <= len(parts) <= order + 2:
                self._fail(
                    f"expected {order + 1} or {order + 2} fields (log-probability, n-gram and optional "
                    f"back-off weight), found {len(parts)}"
                )
            logps.append(self._number(parts[0], "log-probability", highest=1e-4))
            backoffs.append(self._number(parts[-1], "back-off weight") if len(parts) == order + 2 else 0.0)
            if order == 1:
                self._add_word(parts[1])
                ids.append(len(ids))
                continue
            try:
                ids.extend([self.index[word] for word in parts[1 : order + 1]])
            except KeyError as error:
                self._fail(f"{_shown(error.args[0])} is not among the 1-grams")
        if len(logps) != count:
            self._fail(
                f"according to the header, the number of {order}-grams is {count}, but the section has "
                f"{len(logps)}"
            )
        if is_last:
            backoffs = array("f", bytes(4 * len(logps)))
        words_Nn = np.frombuffer(ids, np.int32).reshape(-1, order) if ids else np.zeros((0, order), np.int32)
        return Entries(
            words_Nn, np.array(logps, np.float32) * np.float32(_LN10), np.array(backoffs) * np.float32(_LN10)
        )

    def _rows(self) -> Iterator[list[bytes]]:
        """Yield the fields of each line in a section, up to an empty line or the next header."""
        while (line := self._line()) and not line.startswith(b"\\"):
            yield line.split()
        self.ahead = line or None

    def _add_word(self, word: bytes) -> None:
        try:
            self.words.append(word.decode())
        except UnicodeDecodeError:
            self._fail(f"{quote(word)} is not UTF-8")
        if self.index.setdefault(word, len(self.index)) != len(self.words) - 1:
            self._fail(f"{_shown(word)} is a duplicate")

    def _number(self, text: bytes, name: str, highest: float = -_ZERO) -> float:
        try:
            value = float(text)
        except ValueError:
            self._fail(f"the {name} {_shown(text)} is not a number")
        if math.isnan(value) or value > highest:
            self._fail(f"the {name} {_shown(text)} is out of range")
        return max(value, _ZERO)


def _shown(text: bytes) -> str:
    """Format text from the file for error messages."""
    return quote(text.decode(errors="replace"))


def write_arpa(model: NGram, path: Path, digits: int = 7) -> None:
    """Write an ARPA file, compressed if its name ends in `.gz`.

    Args:
        digits: number of significant digits of the logarithms (base 10). With fewer than the 7 digits of
            float32, a compressed file is smaller.

    Raises:
        ValueError: `digits` is less than 1.
    """
    if digits < 1:
        raise ValueError(f"digits is {digits}, but must be at least 1")
    with atomic_path(path) as temporary, temporary.open("wb") as raw:
        if path.suffix != ".gz":
            raw.writelines(_lines(model, digits))
            return
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0) as file:
            file.writelines(_lines(model, digits))


def _lines(model: NGram, digits: int) -> Iterator[bytes]:
    yield b"\\data\\\n"
    for order, count in enumerate(model.counts, 1):
        yield b"ngram %d=%d\n" % (order, count)
    words = [word.encode() for word in model.words]
    n_words = len(words)
    first = 0
    for order, count in enumerate(model.counts, 1):
        yield b"\n\\%d-grams:\n" % order
        for start in range(first, first + count, 10_000):
            position = np.arange(start, min(start + 10_000, first + count))
            columns = []
            node = position + 1
            for _ in range(order):
                node, word = np.divmod(model.key_N[node - 1], n_words)
                columns.append(word.tolist())
            logps = (model.logp_N[position] / _LN10).tolist()
            backoffs = (model.backoff_M[position + 1] / _LN10).tolist()
            for row, (logp, backoff) in enumerate(zip(logps, backoffs, strict=True)):
                text = b" ".join([words[column[row]] for column in reversed(columns)])
                weight = b"\t%.*g" % (digits, backoff) if backoff else b""
                yield b"%.*g\t%b%b\n" % (digits, logp, text, weight)
        first += count
    yield b"\n\\end\\\n"
