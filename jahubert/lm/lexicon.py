"""Lexicons: the words that decoding may output, with their pronunciations.

A lexicon has one pronunciation per line: a word as it is written in the output, followed by its symbols,
separated by white space (`東京 t o: ky o:`). A word with several pronunciations has several lines.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from jahubert.errors import DataError, quote
from jahubert.formats.atomic import atomic_write
from jahubert.formats.text_lines import read_lines
from jahubert.phonemes import PhonemeSet

Entry = tuple[str, tuple[str, ...]]  # a word and its symbols


def read_lexicon(path: Path, symbols: PhonemeSet) -> list[Entry]:
    """Read a lexicon, ignoring repeated lines.

    Raises:
        DataError: the file cannot be read or has no words, or a line is not UTF-8, has no symbols, or has
            symbols outside the vocabulary. The message about a line gives its number.
    """
    entries: dict[Entry, None] = {}
    for number, line in read_lines(path, "lexicon"):
        if not line.strip():
            continue
        word, *spelling = line.split()
        if not spelling:
            raise DataError(
                f"{path}:{number}: {quote(word)} has no symbols; add them after the word, separated by spaces"
            )
        try:
            symbols.encode([spelling])
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from error
        entries[word, tuple(spelling)] = None
    if not entries:
        raise DataError(f"{path}: the lexicon is empty")
    return list(entries)


def write_lexicon(entries: Iterable[tuple[str, Sequence[str]]], path: Path) -> int:
    """Write a lexicon, and return the number of lines."""
    n_lines = 0
    with atomic_write(path) as file:
        for word, spelling in entries:
            file.write(f"{word}\t{' '.join(spelling)}\n")
            n_lines += 1
    return n_lines
