"""Target store: the symbols to recognize in every utterance of a manifest, and their vocabulary."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_write
from jahubert.phonemes import BLANK, BOUNDARY, KANA, PhonemeSet
from jahubert.train.experiment.provenance import read_record, write_json

UNKNOWN = "<unk>"  # a character that does not occur in training: in a reference it is always an error


def kana_set() -> PhonemeSet:
    """Blank, word boundary, and the kana that spell phones."""
    return PhonemeSet((BLANK, BOUNDARY, *KANA))


def character_set(characters: Iterable[str]) -> PhonemeSet:
    """Blank, the given characters and `<unk>`. Japanese text has no spaces, so there is no word boundary."""
    return PhonemeSet((BLANK, UNKNOWN, *sorted(set(characters))))


def vocabulary_kind(symbols: PhonemeSet) -> str:
    """The kind of a vocabulary: phones, kana or characters."""
    if symbols.are_phones:
        return "phones"
    return "kana" if set(symbols.symbols) <= {BLANK, BOUNDARY, *KANA} else "characters"


def split_words(symbols: PhonemeSet, labels: Sequence[int]) -> list[tuple[str, ...]]:
    """Split labels into words, tuples of symbols; without a word boundary, every symbol is a word."""
    words = symbols.decode(labels)
    return words if symbols.boundary >= 0 else [(symbol,) for word in words for symbol in word]


def write_targets(folder: Path, rows: Iterable[Sequence[int]], phonemes: PhonemeSet) -> int:
    """Write the targets of all rows of a manifest; return the number of symbols."""
    offsets, symbols = array("q", [0]), array("h")  # packed: lists would need many times the memory
    for row in rows:
        symbols.extend(row)
        offsets.append(len(symbols))
    for name, content in (("symbols", symbols), ("offsets", offsets)):
        with atomic_write(folder / f"{name}.npy", "wb") as file:
            np.save(file, np.array(content))
    write_json(folder / "phonemes.json", phonemes.to_json())
    return len(symbols)


class TargetStore:
    """The targets that `write_targets` wrote, memory-mapped."""

    def __init__(self, folder: Path):
        try:
            self.symbol_L = np.load(folder / "symbols.npy", mmap_mode="r")
            self.offsets = np.load(folder / "offsets.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: targets not found ({error}); run stage=targets first") from error
        self.phonemes = PhonemeSet.from_json(read_record(folder / "phonemes.json"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.symbol_L[self.offsets[row] : self.offsets[row + 1]]

    def words(self, row: int) -> list[tuple[str, ...]]:
        """The words of an utterance, each a tuple of symbols, as in `split_words`."""
        return split_words(self.phonemes, self[row].tolist())

    @property
    def labeled_rows(self) -> np.ndarray:
        """Rows with a target."""
        return np.flatnonzero(np.diff(self.offsets))
