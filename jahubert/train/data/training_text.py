"""Tokenized training text from an experiment, for n-gram language models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import kana_to_phones, phones_to_kana
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.targets import TargetStore, vocabulary_kind
from jahubert.train.experiment.provenance import verify_files
from jahubert.train.text.japanese import text_to_words
from jahubert.train.text.normalization import recognized_characters
from jahubert.train.text.tokens import Tokenizer, written_form

_VOCABULARY = {"phone": "phones", "kana": "kana", "character": "characters"}  # token unit -> vocabulary


def training_sentences(exp: Path, tokenizer: Tokenizer) -> Iterator[list[str]]:
    """Yield the tokens of every utterance in the `train` split that has targets.

    All tokens are taken from the targets of the experiment. Words are written as in the text if the text has
    the same words, and otherwise in kana.

    Raises:
        ConfigError: the targets consist of other units than those of `tokenizer`, or word tokens are
            requested but the targets are characters.
        DataError: the experiment has no targets or manifest, they do not match, or a file is damaged.
    """
    verify_files(exp / "targets")
    manifest, targets = Manifest.verified(exp / "prepare/manifest.arrow"), TargetStore(exp / "targets")
    targets.check(manifest)
    vocabulary = vocabulary_kind(targets.phonemes)
    if tokenizer.unit == "word":
        fits = vocabulary != "characters"
    else:
        fits = _VOCABULARY.get(tokenizer.unit) == vocabulary
    if not fits:
        raise ConfigError(
            f"the targets of {exp} are {vocabulary}, but the unit of the language model is {tokenizer.unit}; "
            "choose a unit that matches the targets"
        )
    for row in manifest.indices(split="train").tolist():
        if not len(labels := targets[row]):
            continue
        if tokenizer.unit != "word":
            yield [targets.phonemes.symbols[label] for label in labels]
            continue
        words = targets.words(row)
        if vocabulary == "kana":
            words = [tuple(kana_to_phones("".join(word))) for word in words]
        names = _written_words(manifest[row].text, words)
        yield [tokenizer.count(name, word) for name, word in zip(names, words, strict=True)]


def _written_words(text: str, words: Sequence[tuple[str, ...]]) -> list[str]:
    """Return words as written in the text, or in kana if the text is split into other words."""
    if len(words) == 1 and (written := recognized_characters(text)):
        return [written]
    try:
        text_words = text_to_words(text) if text else []
    except DataError:
        text_words = []
    if [word.phones for word in text_words] == list(words):
        return [written_form(word) for word in text_words]
    return [phones_to_kana(word) for word in words]
