"""Creation of target symbols for CTC: phones or kana with word boundaries, or characters.

Reads   the manifest and, if configured, the user dictionary. Phones and kana are derived from the words of an
        utterance, or from its text if it has no words. Characters are derived from the text.
Writes  symbols.npy, offsets.npy, phonemes.json, header.json, rejected.jsonl (rejected utterances)

    python -m jahubert.run recipe=demo stage=targets
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jahubert.errors import ConfigError, DataError, quote
from jahubert.formats.atomic import atomic_write
from jahubert.frames import HUBERT
from jahubert.inference.ctc import frames_needed
from jahubert.phonemes import PhonemeSet, phones_to_kana
from jahubert.train.data.manifest import Manifest, Utterance
from jahubert.train.data.targets import UNKNOWN, character_set, kana_set, write_targets
from jahubert.train.experiment import distributed
from jahubert.train.experiment.progress import progress
from jahubert.train.text.normalization import recognized_characters
from jahubert.train.text.user_dictionary import read_words

log = logging.getLogger(__name__)

VERSION = 5


@dataclass(frozen=True)
class Config:
    manifest: Path  # manifest.arrow of the prepare stage
    vocabulary: Literal["phones", "kana", "characters"] = "phones"  # kind of symbols to predict
    punctuation: bool = False  # whether to keep punctuation marks (only for vocabulary=characters)
    user_dictionary: Path | None = None  # file of words with their readings

    def __post_init__(self) -> None:
        if self.punctuation and self.vocabulary != "characters":
            raise ConfigError(
                f"punctuation=true requires vocabulary=characters, but vocabulary is {self.vocabulary}"
            )


def run(config: Config, out: Path) -> dict[str, Any]:
    return distributed.rank0_broadcast(lambda: make_targets(config, out))


def make_targets(config: Config, out: Path) -> dict[str, Any]:
    """Convert the words or text of all utterances, and write the targets. Only rank 0 calls this."""
    manifest = Manifest(config.manifest)
    if config.user_dictionary:
        read_words(config.user_dictionary)  # raises an error early if the dictionary is invalid
    symbols = symbol_set(config, manifest)
    reasons: Counter[str] = Counter()
    sources: Counter[str] = Counter()

    def rows() -> Iterator[list[int]]:
        for index in range(len(manifest)):
            utterance, row = manifest[index], []
            if utterance.words or utterance.text:
                try:
                    row = target_of(utterance, symbols, config)
                    sources["words" if utterance.words else "text"] += 1
                except DataError as error:
                    reasons[str(error).split(":")[0]] += 1
                    line = {"id": utterance.id, "reason": str(error)}
                    rejected.write(json.dumps(line, ensure_ascii=False) + "\n")
            done(1)
            yield row

    with (
        atomic_write(out / "rejected.jsonl") as rejected,
        progress("reading text", "utterances", len(manifest)) as done,
    ):
        n_symbols = write_targets(out, rows(), symbols, manifest)
    for reason, n in reasons.most_common():
        log.warning("rejected utterances: %d (%s); see %s", n, reason, out / "rejected.jsonl")
    if not sources:
        raise DataError(f"{config.manifest}: no utterance has usable text; see {out}/rejected.jsonl")
    return {
        "utterances": sources.total(),
        "symbols": n_symbols,
        "vocabulary": len(symbols),
        "made_of": dict(sources),
        "rejected": dict(reasons),
    }


def symbol_set(config: Config, manifest: Manifest) -> PhonemeSet:
    """Create the vocabulary, which consists of phones, kana, or the characters in the training text."""
    if config.vocabulary == "phones":
        return PhonemeSet.standard()
    if config.vocabulary == "kana":
        return kana_set()
    rows = manifest.indices(split="train").tolist()
    texts = (recognized_characters(manifest[row].text, config.punctuation) for row in rows)
    symbols = character_set(char for text in texts for char in text)
    if len(symbols) > 2**15:
        raise DataError(f"the training text yields {len(symbols)} symbols, but the maximum is {2**15}")
    return symbols


def target_of(utterance: Utterance, symbols: PhonemeSet, config: Config) -> list[int]:
    """Convert the words or the text of an utterance to symbols.

    Raises:
        DataError: the text has no reading or no letters, a symbol is not in the vocabulary, or CTC needs more
            frames than there are. The message starts with the reason and a colon, because rejections are
            counted per reason.
    """
    if config.vocabulary == "characters":
        vocabulary = set(symbols.symbols)
        plain = recognized_characters(utterance.text, config.punctuation)
        if not plain:
            raise DataError(f"text without letters: {quote(utterance.text)}")
        row = symbols.encode([[char if char in vocabulary else UNKNOWN for char in plain]])
    else:
        words = utterance.words or _text_to_phones(utterance.text, config.user_dictionary)
        if config.vocabulary == "kana":
            words = tuple(tuple(phones_to_kana(word)) for word in words)
        try:
            row = symbols.encode(words)
        except DataError as error:
            raise DataError(f"symbol outside the vocabulary: {error}") from error
    needed, frames = frames_needed(row), HUBERT.n_frames(utterance.n_samples)
    if needed > frames:
        raise DataError(f"target longer than its audio: {needed} frames needed, {frames} available")
    return row


def _text_to_phones(text: str, user_dictionary: Path | None) -> tuple[tuple[str, ...], ...]:
    """Convert a text to the phones of its words. Raise DataError if the text has no reading."""
    from jahubert.train.text.japanese import text_to_words

    try:
        return tuple(word.phones for word in text_to_words(text, user_dictionary))
    except DataError as error:
        raise DataError(f"text without a reading: {error}") from error
