"""Subcommands that train and evaluate n-gram language models: `ngram` and `perplexity`."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from jahubert.cli.console import check_output_file
from jahubert.errors import ConfigError
from jahubert.formats.text_lines import read_lines

if TYPE_CHECKING:
    from jahubert.cli.main import Command
    from jahubert.train.text.tokens import Tokenizer

UNITS = ("word", "phone", "kana", "character", "token")  # the same units as in train/text/tokens.py


def add_commands(command: Command) -> None:
    """Add the subcommands to the parser."""
    sub = command(ngram, "train an n-gram language model (modified Kneser-Ney) and write an ARPA file")
    _add_text_options(sub)
    sub.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="ARPA file, gzip-compressed if FILE ends in .gz"
    )
    sub.add_argument(
        "--order", type=int, default=4, metavar="N", help="length of the longest n-grams (default: 4)"
    )
    sub.add_argument(
        "--min-gain", type=float, default=0.0, metavar="NATS",
        help="prune n-grams that are estimated to raise the log-probability of the text by less than NATS, "
        "unless other n-grams need them (default: 0)",
    )  # fmt: skip
    sub.add_argument(
        "--lexicon", metavar="FILE", help="also write the words and their pronunciations (only --unit word)"
    )
    sub.add_argument(
        "--kana", action="store_true", help="write pronunciations in kana, for models with kana symbols"
    )

    sub = command(perplexity, "print the perplexity of an n-gram language model on a text")
    sub.add_argument("lm", metavar="LM", help="ARPA file, plain or gzip-compressed")
    _add_text_options(sub)


def _add_text_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "text", nargs="+", metavar="TEXT",
        help="UTF-8 text files with one sentence per line (.gz allowed, - for standard input), or experiment "
        "folders with training targets",
    )  # fmt: skip
    sub.add_argument(
        "--unit", choices=UNITS, default="word",
        help="word: words segmented by pyopenjtalk; phone or kana: the reading, with | between words; "
        "character: characters without spaces; token: tokens separated by spaces (default: word)",
    )  # fmt: skip
    sub.add_argument(
        "--punctuation", action="store_true", help="keep punctuation marks (only --unit character)"
    )


def ngram(args: argparse.Namespace) -> int:
    from jahubert.lm.arpa import write_arpa
    from jahubert.lm.kneser_ney import train_ngram
    from jahubert.lm.lexicon import write_lexicon

    if args.lexicon is not None and args.unit != "word":
        raise ConfigError(f"--lexicon requires --unit word, but the unit is {args.unit}")
    if args.kana and args.lexicon is None:
        raise ConfigError("--kana has no effect without --lexicon")
    if not 0 <= args.min_gain < math.inf:
        raise ConfigError(f"--min-gain is {args.min_gain}, but must be at least 0 and finite")
    check_output_file(args.output, args.text)
    if args.lexicon is not None:
        check_output_file(args.lexicon, args.text, "--lexicon")
        if os.path.realpath(args.lexicon) == os.path.realpath(args.output):
            raise ConfigError(f"-o and --lexicon are both {args.output}; give two names")
    tokenizer, sentences = _read_text(args)
    model = train_ngram(sentences, args.order, args.min_gain)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    write_arpa(model, Path(args.output))
    sizes = ", ".join(f"{count:,} {n}-grams" for n, count in enumerate(model.counts, 1))
    print(f"{args.output}: {sizes}", file=sys.stderr)
    if args.lexicon is not None:
        Path(args.lexicon).parent.mkdir(parents=True, exist_ok=True)
        n_lines = write_lexicon(tokenizer.lexicon(args.kana), Path(args.lexicon))
        print(f"{args.lexicon}: {n_lines:,} pronunciations", file=sys.stderr)
    return 0


def perplexity(args: argparse.Namespace) -> int:
    from jahubert.lm.arpa import read_arpa
    from jahubert.lm.ngram import perplexity as score

    model = read_arpa(Path(args.lm))
    _, sentences = _read_text(args)
    result = score(model, sentences)
    print(f"perplexity {result.including_unknown:.4g}")
    if result.unknown:
        share = 100 * result.unknown / result.words
        print(f"  without unknown words {result.excluding_unknown:.4g} ({share:.2f} % are unknown)")
    print(f"  of {result.sentences:,} sentences, {result.words:,} tokens")
    return 0


def _read_text(args: argparse.Namespace) -> tuple[Tokenizer, Iterable[list[str]]]:
    """Return the tokenizer and the tokenized sentences in the texts."""
    from jahubert.train.data.training_text import training_sentences
    from jahubert.train.text.tokens import Tokenizer

    if args.punctuation and args.unit != "character":
        raise ConfigError(f"--punctuation requires --unit character, but the unit is {args.unit}")
    tokenizer = Tokenizer(args.unit, args.punctuation)
    paths = [Path(text) for text in args.text]
    for path in paths:
        if path.is_dir() and not (path / "targets").is_dir():
            raise ConfigError(
                f"{path} is a folder, but not one of an experiment with targets; give the text files in it, "
                f"such as {path}/*.txt"
            )

    def sentences() -> Iterable[list[str]]:
        texts = [path for path in paths if not path.is_dir()]
        lines = (line.strip() for path in texts for _, line in read_lines(path, "text"))
        yield from tokenizer.sentences(line for line in lines if line)
        for path in paths:
            if path.is_dir():
                yield from training_sentences(path, tokenizer)

    return tokenizer, sentences()
