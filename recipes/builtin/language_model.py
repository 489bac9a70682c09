"""Phone n-gram model for the built-in model, from its training texts and optional other sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from jahubert.lm.arpa import write_arpa
from jahubert.lm.kneser_ney import train_ngram
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.targets import TargetStore
from jahubert.train.experiment.registry import recipe_module
from jahubert.train.text.normalization import recognized_characters
from jahubert.train.text.tokens import Tokenizer

ORDER = 8
MIN_GAIN = 2.0  # threshold for pruning in nats
DIGITS = 4  # significant digits in the ARPA file

read_sentences = recipe_module("voices").read_sentences


def write_language_model(exp: Path, texts: Iterable[Path], target: Path) -> None:
    """Estimate the n-gram model, and write it to an ARPA file.

    Each distinct sentence is counted once, although it may occur in several voices and at several speeds.
    Sentences in the development and test splits are omitted.

    Args:
        exp: experiment folder with the finished stages prepare and targets.
        texts: files with additional sentences, in one of the formats that the voices recipe reads.
        target: path of the ARPA file, which is compressed if the name ends in .gz.
    """
    manifest = Manifest(exp / "prepare" / "manifest.arrow")
    held_out = held_out_sentences(manifest)
    sentences = set(training_sentences(manifest, TargetStore(exp / "targets"), held_out))
    for path in texts:
        lines = [line for line in read_sentences(path) if recognized_characters(line) not in held_out]
        sentences.update(map(tuple, Tokenizer("phone").sentences(lines)))
    write_arpa(train_ngram(sorted(sentences), ORDER, MIN_GAIN), target, DIGITS)


def training_sentences(
    manifest: Manifest, targets: TargetStore, held_out: set[str]
) -> Iterator[tuple[str, ...]]:
    """Yield the phones and word boundaries of the training utterances whose texts are not in `held_out`."""
    for row in manifest.indices(split="train").tolist():
        labels = targets[row]
        if len(labels) and recognized_characters(manifest[row].text) not in held_out:
            yield tuple(targets.phonemes.symbols[label] for label in labels)


def held_out_sentences(manifest: Manifest) -> set[str]:
    """Return the texts of all splits except `train`, each reduced to its letters and digits."""
    training = set(manifest.indices(split="train").tolist())
    rows = (row for row in range(len(manifest)) if row not in training)
    return {recognized_characters(manifest[row].text) for row in rows}
