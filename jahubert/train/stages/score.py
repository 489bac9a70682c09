"""Error rates of the hypotheses: words as tuples of phones, phones, and kana characters.

Reads   the hypotheses of `decode`
Writes  scores.json: WER, PER and kana CER of each set with bootstrap intervals

    python -m jahubert.run recipe=demo stage=score system=pretrained
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, DataError
from jahubert.phonemes import phones_to_kana
from jahubert.train import ranks
from jahubert.train.metrics import bootstrap_interval, count_errors
from jahubert.train.provenance import write_json

VERSION = 1

Words = list[tuple[str, ...]]
# What is compared: joined labels are ambiguous (k y o, ky o), so words stay tuples and phones stay lists.
MEASURES: dict[str, Callable[[Words], Sequence]] = {
    "wer": lambda words: words,
    "per": lambda words: [phone for word in words for phone in word],
    "kana_cer": lambda words: "".join(phones_to_kana(word) for word in words),
}


@dataclass(frozen=True)
class Config:
    hypotheses: Path
    samples: int = 1000  # of the bootstrap over utterances
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ConfigError(f"samples is {self.samples}, but must be at least 1")


def run(config: Config, out: Path) -> dict[str, Any]:
    files = sorted(path for path in config.hypotheses.glob("*.jsonl") if path.name != "alignment.jsonl")
    if not files:
        raise DataError(f"{config.hypotheses}: no hypotheses here; run stage=decode first")
    scores = {path.stem: score_file(path, config) for path in files}
    if ranks.rank() == 0:
        write_json(out / "scores.json", scores)
    ranks.barrier()
    return {
        f"{split}_{name}": score[name]["rate"] for split, score in scores.items() for name in ("per", "wer")
    }


def score_file(path: Path, config: Config) -> dict[str, Any]:
    """All measures of one set: rate, interval, counts."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    pairs = [
        (
            [tuple(word.split()) for word in line["reference"]],
            [tuple(word.split()) for word in line["hypothesis"]],
        )
        for line in lines
    ]
    result: dict[str, Any] = {"utterances": len(pairs)}
    for name, view in MEASURES.items():
        counts = [count_errors(view(said), view(heard)) for said, heard in pairs]
        errors, lengths = [c.errors for c in counts], [c.length for c in counts]
        low, high = bootstrap_interval(errors, lengths, seed=config.seed, n=config.samples)
        result[name] = {
            "rate": sum(errors) / max(1, sum(lengths)),
            "low": low,
            "high": high,
            "errors": sum(errors),
            "length": sum(lengths),
            "substitutions": sum(c.substitutions for c in counts),
            "insertions": sum(c.insertions for c in counts),
            "deletions": sum(c.deletions for c in counts),
        }
    return result
