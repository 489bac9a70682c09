"""Word list and n-gram training corpus from the training targets of an experiment.

    python tools/word_list.py exp/csj
    lmplz -o 3 < exp/csj/words/corpus.txt > exp/csj/words/3gram.arpa       # KenLM's
    python -m jahubert.run recipe=csj stage=decode decoding=words decode.lexicon.ngram_weight=0.5 \
        decode.lexicon.words=exp/csj/words/lexicon.txt decode.lexicon.ngram=exp/csj/words/3gram.arpa
    python -m jahubert.run recipe=csj stage=score decoding=words score.baseline=exp/csj/systems/main/decode

Writes `words/lexicon.txt` with one word and its symbols per line, and `words/corpus.txt` with one utterance
per line. Words are identified by their kana, so homophones count as one word, as in the error rates.
"""

import argparse
from collections import Counter
from pathlib import Path

from jahubert.phonemes import phones_to_kana
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.targets import TargetStore, vocabulary_kind


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("exp", type=Path)
    parser.add_argument("--least", type=int, default=1, help="minimum number of occurrences of a word")
    args = parser.parse_args()
    manifest, targets = Manifest(args.exp / "prepare/manifest.arrow"), TargetStore(args.exp / "targets")
    phones = vocabulary_kind(targets.phonemes) == "phones"
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    out = args.exp / "words"
    out.mkdir(exist_ok=True)
    with (out / "corpus.txt").open("w", encoding="utf-8") as corpus:
        for row in manifest.indices(split="train").tolist():
            words = targets.words(row)
            names = [phones_to_kana(word) if phones else "".join(word) for word in words]
            counts.update(zip(names, words, strict=True))
            if names:
                corpus.write(" ".join(names) + "\n")
    lexicon = sorted(word for word, n in counts.items() if n >= args.least)
    lines = (f"{name} {' '.join(spelled)}\n" for name, spelled in lexicon)
    (out / "lexicon.txt").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lexicon)} words with {counts.total()} occurrences written to {out}")


if __name__ == "__main__":
    main()
