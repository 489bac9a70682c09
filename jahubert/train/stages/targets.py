"""Target symbols for recognition: phones with a boundary between words.

Reads   the manifest: the words of an utterance where the corpus gives them, else its text
Writes  symbols.npy, offsets.npy, phonemes.json, rejected.jsonl (utterances left out, and why)

    python -m jahubert.run recipe=demo stage=targets
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.frames import HUBERT
from jahubert.phonemes import PhonemeSet
from jahubert.train import ranks
from jahubert.train.manifest import Manifest, Utterance
from jahubert.train.provenance import written_beside
from jahubert.train.targets import write_targets

VERSION = 1


@dataclass(frozen=True)
class Config:
    manifest: Path


def run(config: Config, out: Path) -> dict[str, Any]:
    return ranks.from_first(lambda: write(config, out))


def write(config: Config, out: Path) -> dict[str, Any]:
    """The work of the stage, which one process does."""
    manifest, phonemes = Manifest(config.manifest), PhonemeSet.standard()
    reasons: Counter[str] = Counter()
    labelled = 0

    def rows() -> Iterator[list[int]]:
        nonlocal labelled
        for index in range(len(manifest)):
            utterance, row = manifest[index], []
            if utterance.words or utterance.text:
                try:
                    row = target_of(utterance, phonemes)
                    labelled += 1
                except DataError as error:
                    reasons[str(error).split(":")[0]] += 1
                    line = {"id": utterance.id, "reason": str(error)}
                    rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
            yield row

    with written_beside(out / "rejected.jsonl") as rejected:
        symbols = write_targets(out, rows(), phonemes)
    if not labelled:
        raise DataError(f"{config.manifest}: no utterance has a usable text; {out}/rejected.jsonl says why")
    return {"utterances": labelled, "symbols": symbols, "rejected": dict(reasons)}


def target_of(utterance: Utterance, phonemes: PhonemeSet) -> list[int]:
    """Symbols of an utterance.

    Raises:
        DataError: the text has no reading, or the symbols do not fit into the frames. What stands before the
            colon is one of few reasons, which can be counted.
    """
    words = utterance.words
    if not words:
        from jahubert.train.text import text_to_words

        try:
            words = tuple(word.phones for word in text_to_words(utterance.text))
        except DataError as error:
            raise DataError(f"text without a reading: {error}") from error
    row = phonemes.encode(words)
    # CTC needs a blank between equal neighbours.
    needed = len(row) + sum(a == b for a, b in pairwise(row))
    frames = HUBERT.n_frames(utterance.n_samples)
    if needed > frames:
        raise DataError(f"target longer than its audio: {needed} frames are needed, {frames} are there")
    return row
