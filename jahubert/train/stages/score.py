"""Error rates of the hypotheses: words as tuples of phones, phones, and kana characters.

Reads   the hypotheses of `decode`, and those of another system where `baseline` names them
Writes  scores.json: all measures of each set, talk and speaker, intervals, confusions, tests against the
        baseline; <split>.txt: the same to read, with every utterance aligned; table.txt, which it prints

    python -m jahubert.run recipe=demo stage=score system=pretrained
    python -m jahubert.run recipe=demo stage=score system=pretrained decoding=greedy \
        score.baseline=exp/demo/systems/pretrained/decode
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.targets import vocabulary_kind
from jahubert.train.evaluation.metrics import paired_bootstrap
from jahubert.train.evaluation.scoring import (
    MEASURES,
    Scored,
    SetScore,
    details,
    phone_wer,
    published_table,
    rates_table,
)
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import raise_config_errors, range_errors
from jahubert.train.experiment.provenance import atomic_text, read_record, write_json
from jahubert.train.report.results import label_of

VERSION = 2
_CONFUSIONS = 30


@dataclass(frozen=True)
class Config:
    hypotheses: Path
    baseline: Path | None = None  # hypotheses of another system, for a paired test
    published: dict[str, Any] = field(default_factory=dict)  # name -> {split: WER %}, shown beside ours
    samples: int = 1000  # of the bootstrap over utterances
    seed: int = 0

    def __post_init__(self) -> None:
        raise_config_errors(range_errors(self, {"at least 1": ("samples",)}))


def run(config: Config, out: Path) -> dict[str, Any]:
    scores = {}
    for path in _files(config.hypotheses):
        found = SetScore(list(read_hypotheses(path)), _measures(config.hypotheses))
        score = score_set(found, config)
        if config.baseline:
            score["against"] = against(found, config.baseline / path.name, config)
        scores[path.stem] = score
        if distributed.rank() == 0:
            with atomic_text(out / f"{path.stem}.txt") as file:
                file.writelines(f"{line}\n" for line in details(path.stem, score, found))
    if distributed.rank() == 0:
        write_json(out / "scores.json", scores)
        ours = [(label_of(config.hypotheses), phone_wer(scores))]
        table = published_table(config.published, ours) + rates_table(scores)
        with atomic_text(out / "table.txt") as file:
            file.write(table)
        print(table)
    distributed.barrier()
    return {
        f"{split}_{measure.name}": score[measure.name]["rate"]
        for split, score in scores.items()
        for measure in _measures(config.hypotheses)
    }


def _files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.jsonl") if path.name != "alignment.jsonl")
    if not files:
        raise DataError(f"{folder}: no hypotheses here; run stage=decode first")
    return files


def _measures(folder: Path) -> Any:
    return MEASURES[vocabulary_kind(PhonemeSet.from_json(read_record(folder / "phonemes.json")))]


def read_hypotheses(path: Path) -> Iterator[Scored]:
    """The utterances of a file that `decode` wrote."""
    for line in path.read_text(encoding="utf-8").splitlines():
        item = json.loads(line)
        said, heard = (
            [tuple(word.split(" ")) for word in item[name]] for name in ("reference", "hypothesis")
        )
        yield Scored(item["id"], item["talk"], item["speaker"], said, heard)


def score_set(found: SetScore, config: Config) -> dict[str, Any]:
    """All measures of one set, of its talks and of its speakers, and its most frequent errors."""
    return {
        "utterances": len(found.utterances),
        **found.rates(config.seed, config.samples),
        "talks": found.by(lambda item: item.talk),
        "speakers": found.by(lambda item: item.speaker),
        "confusions": found.confusions(_CONFUSIONS),
    }


def against(found: SetScore, path: Path, config: Config) -> dict[str, Any]:
    """Each measure's paired test against another system's hypotheses of the same utterances.

    Raises:
        DataError: they are not of the same utterances, or the references differ.
    """
    if not path.is_file():
        raise DataError(f"{path}: the baseline has no hypotheses of this set; decode the same splits with it")
    others = {item.id: item for item in read_hypotheses(path)}
    if others.keys() != {item.id for item in found.utterances}:
        raise DataError(
            f"{path}: the baseline is of other utterances; decode the same splits of one manifest"
        )
    paired = [others[item.id] for item in found.utterances]
    if differing := [a.id for a, b in zip(found.utterances, paired, strict=True) if a.said != b.said]:
        raise DataError(
            f"{path}: the baseline has another reference for {differing[0]!r} and {len(differing) - 1} more; "
            "both need the same targets"
        )
    baseline = SetScore(paired, found.measures)
    result = {}
    for name, counts in found.counts.items():
        theirs = baseline.counts[name]
        lengths = [c.length for c in counts]
        test = paired_bootstrap(
            [c.errors for c in counts], [c.errors for c in theirs], lengths, config.seed, config.samples
        )
        rate = sum(c.errors for c in theirs) / max(1, sum(lengths))
        result[name] = {"baseline": rate, **asdict(test)}
    return result
