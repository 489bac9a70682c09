"""Target store: the target symbols of every utterance in a manifest, and the vocabulary."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_write
from jahubert.phonemes import BLANK, BOUNDARY, KANA, PhonemeSet
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.provenance import read_record, write_json

HEADER = "header.json"
UNKNOWN = "<unk>"  # replaces characters that do not occur in the training data; the model never learns it


def kana_set() -> PhonemeSet:
    """Create the kana vocabulary: blank, word boundary and kana."""
    return PhonemeSet((BLANK, BOUNDARY, *KANA))


def character_set(characters: Iterable[str]) -> PhonemeSet:
    """Create a character vocabulary: blank, `<unk>` and `characters`.

    The vocabulary has no word boundary, because Japanese text has no spaces.
    """
    return PhonemeSet((BLANK, UNKNOWN, *sorted(set(characters))))


def vocabulary_kind(symbols: PhonemeSet) -> str:
    """Return the kind of a vocabulary: phones, kana or characters."""
    if symbols.are_phones:
        return "phones"
    return "kana" if set(symbols.symbols) <= {BLANK, BOUNDARY, *KANA} else "characters"


def split_words(symbols: PhonemeSet, labels: Sequence[int]) -> list[tuple[str, ...]]:
    """Split labels into words (tuples of symbols). Without a word boundary, each symbol is a word."""
    words = symbols.decode(labels)
    return words if symbols.boundary >= 0 else [(symbol,) for word in words for symbol in word]


def write_targets(
    folder: Path, rows: Iterable[Sequence[int]], phonemes: PhonemeSet, manifest: Manifest
) -> int:
    """Write the targets for all rows of a manifest, and return the total number of symbols."""
    offsets, symbols = array("q", [0]), array("h")  # lists would need far more memory
    for row in rows:
        symbols.extend(row)
        offsets.append(len(symbols))
    for name, content in (("symbols", symbols), ("offsets", offsets)):
        with atomic_write(folder / f"{name}.npy", "wb") as file:
            np.save(file, np.array(content))
    write_json(folder / "phonemes.json", phonemes.to_json())
    write_json(folder / HEADER, {"manifest": manifest.fingerprint})
    return len(symbols)


def labeled_in(splits: Iterable[str], manifest: Manifest, targets: TargetStore) -> np.ndarray:
    """Return the ascending manifest rows of the utterances in `splits` that have targets, int64.

    Raises:
        DataError: the manifest does not contain one of the splits.
    """
    rows = [manifest.indices(split=split) for split in splits]
    return np.intersect1d(np.concatenate([np.empty(0, np.int64), *rows]), targets.labeled_rows)


class TargetStore:
    """Memory-mapped targets, as written by `write_targets`."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.symbol_L = np.load(folder / "symbols.npy", mmap_mode="r")
            self.offsets = np.load(folder / "offsets.npy")
        except (OSError, ValueError, EOFError) as error:
            raise DataError(f"{folder}: no readable targets ({error}); run stage=targets first") from error
        self.phonemes = PhonemeSet.from_json(read_record(folder / "phonemes.json"))

    def __reduce__(self) -> tuple[Any, ...]:
        return TargetStore, (self.folder,)  # each worker maps the files into its own memory

    def check(self, manifest: Manifest) -> None:
        """Raise DataError unless the targets were created for this manifest."""
        recorded = read_record(self.folder / HEADER).get("manifest")
        if len(self) != len(manifest) or recorded != manifest.fingerprint:
            raise DataError(
                f"{self.folder}: the targets were created for a different manifest than {manifest.path} "
                f"({len(self)} and {len(manifest)} utterances); rerun stage=targets"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        symbols_L: np.ndarray = self.symbol_L[self.offsets[row] : self.offsets[row + 1]]
        return symbols_L

    def words(self, row: int) -> list[tuple[str, ...]]:
        """Return the words of an utterance as tuples of symbols (see `split_words`)."""
        return split_words(self.phonemes, self[row].tolist())

    @property
    def labeled_rows(self) -> np.ndarray:
        """Manifest rows of the utterances that have targets."""
        return np.flatnonzero(np.diff(self.offsets))
