"""Target symbols of the utterances of a manifest: packed integers, an empty row where there are none."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from jahubert.errors import DataError
from jahubert.phonemes import PhonemeSet
from jahubert.train.provenance import read_record, write_json


def write_targets(folder: Path, rows: Iterable[Sequence[int]], phonemes: PhonemeSet) -> int:
    """Write the targets of all rows of a manifest; returns the number of symbols."""
    offsets, symbols = array("q", [0]), array("h")  # packed: a list would need many times the memory
    for row in rows:
        symbols.extend(row)
        offsets.append(len(symbols))
    for name, content in (("symbols", symbols), ("offsets", offsets)):
        beside = folder / f"tmp_{name}.npy"
        np.save(beside, np.array(content))
        beside.replace(folder / f"{name}.npy")
    write_json(folder / "phonemes.json", phonemes.to_json())
    return len(symbols)


class TargetStore:
    """The targets that `write_targets` wrote, memory-mapped."""

    def __init__(self, folder: Path):
        try:
            self.symbol_L = np.load(folder / "symbols.npy", mmap_mode="r")
            self.offsets = np.load(folder / "offsets.npy")
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: no targets here ({error}); run stage=targets first") from error
        self.phonemes = PhonemeSet.from_json(read_record(folder / "phonemes.json"))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.symbol_L[self.offsets[row] : self.offsets[row + 1]]

    def words(self, row: int) -> list[tuple[str, ...]]:
        """The words of an utterance, each a tuple of phones."""
        return self.phonemes.decode(self[row].tolist())

    @property
    def labelled(self) -> np.ndarray:
        """Rows that have a target."""
        return np.flatnonzero(np.diff(self.offsets))
