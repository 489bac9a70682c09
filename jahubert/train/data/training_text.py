"""Training text of an experiment as tokens for n-gram language models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import phones_to_kana
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.targets import TargetStore, vocabulary_kind
from jahubert.train.text.tokens import Tokenizer

_VOCABULARY = {"phone": "phones", "kana": "kana", "character": "characters"}  # token unit -> vocabulary


def training_sentences(exp: Path, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Yield the tokens of every utterance in split `train`.

    Phones, kana and characters are taken from the targets of the experiment. Words are taken from the text.
    If the corpus has no text, words are the kana of the words in the targets.

    Raises:
        ConfigError: the targets have a different unit.
        DataError: the experiment has no targets.
    """
    manifest, targets = Manifest(exp / "prepare/manifest.arrow"), TargetStore(exp / "targets")
    vocabulary = vocabulary_kind(targets.phonemes)
    if tokenizer.unit != "word" and _VOCABULARY.get(tokenizer.unit) != vocabulary:
        raise ConfigError(f"the targets of {exp} are {vocabulary}, but the unit is {tokenizer.unit}")
    for row in manifest.indices(split="train").tolist():
        if not len(labels := targets[row]):
            continue
        if tokenizer.unit != "word":
            yield [targets.phonemes.symbols[label] for label in labels]
            continue
        text = manifest[row].text
        if text:
            yield from tokenizer.sentences([text])
        elif vocabulary == "phones":
            yield [tokenizer.count(phones_to_kana(word), word) for word in targets.words(row)]
        else:
            raise DataError(f"{exp} has neither text nor words of phones; use --unit {vocabulary[:-1]}")
