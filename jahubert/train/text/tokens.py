"""Tokenization of text for n-gram language models: words, phones, kana or characters."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from jahubert.errors import DataError
from jahubert.phonemes import BOUNDARY, phones_to_kana
from jahubert.train.text.japanese import Word, text_to_words
from jahubert.train.text.normalization import recognized_characters

log = logging.getLogger(__name__)

Unit = Literal["word", "phone", "kana", "character", "token"]


class Tokenizer:
    """Tokenizer for lines of text. For the unit `word`, it also collects the pronunciations of the words.

    Units:
        word: words as written, except that numbers are in kanji. pyopenjtalk-plus determines their boundaries
            and readings.
        phone, kana: phones or kana of the words, with `|` between words.
        character: letters and digits after NFKC, without spaces. With `punctuation`, also punctuation marks.
        token: the parts of the line between spaces, unchanged.

    Args:
        unit: one of the units above.
        punctuation: whether to keep punctuation marks (only for characters).
    """

    def __init__(self, unit: Unit, punctuation: bool = False):
        self.unit = unit
        self.punctuation = punctuation
        self.pronunciations: dict[tuple[str, tuple[str, ...]], int] = {}  # (word, phones) -> occurrences

    def __call__(self, line: str) -> list[str]:
        """Convert a line to tokens.

        Raises:
            DataError: the line has no words, or a word has no reading (for word, phone and kana tokens).
        """
        if self.unit == "token":
            return line.split()
        if self.unit == "character":
            return list(recognized_characters(line, self.punctuation))
        words = text_to_words(line)
        if self.unit == "word":
            return [self.count(written_form(word), word.phones) for word in words]
        tokens: list[str] = []
        for word in words:
            if tokens:
                tokens.append(BOUNDARY)
            tokens.extend(phones_to_kana(word.phones) if self.unit == "kana" else word.phones)
        return tokens

    def count(self, word: str, phones: tuple[str, ...]) -> str:
        """Count one occurrence of a word with its pronunciation for the lexicon, and return the word."""
        self.pronunciations[word, phones] = self.pronunciations.get((word, phones), 0) + 1
        return word

    def sentences(self, lines: Iterable[str]) -> Iterator[list[str]]:
        """Yield the tokens of each line. Lines without words or a reading are skipped with a warning."""
        n_skipped = 0
        first = ""
        for line in lines:
            try:
                tokens = self(line)
            except DataError as error:
                n_skipped += 1
                first = first or str(error)
                continue
            if tokens:
                yield tokens
        if n_skipped:
            log.warning("skipped lines without words or a reading: %d (first reason: %s)", n_skipped, first)

    def lexicon(self, kana: bool = False) -> Iterator[tuple[str, Sequence[str]]]:
        """Yield the words in sorted order with their phones or kana."""
        for word, phones in sorted(self.pronunciations):
            yield word, phones_to_kana(phones) if kana else phones


def written_form(word: Word) -> str:
    """Return the NFKC spelling of a word without spaces, which separate words in ARPA files and lexicons."""
    return "".join(unicodedata.normalize("NFKC", word.surface).split()) or word.kana
