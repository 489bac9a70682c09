"""Scoring of hypotheses: WER, PER, kana CER or CER, depending on the vocabulary, and text CER with a lexicon.

Reads   the hypotheses written by the decode stage, and those of another system if `baseline` is set
Writes  scores.json: all measures by set (with confidence intervals), talk and speaker, confusions, the
        reliability of confidences and, with `baseline`, the significance test; <split>.txt: the same
        results as text, with an alignment of every utterance; table.txt: the printed table; with
        `calibration_splits`, also calibration.json: the calibration of confidences

    python -m jahubert.run recipe=demo stage=score system=pretrained
    python -m jahubert.run recipe=demo stage=score system=pretrained decoding=greedy \
        score.baseline=exp/demo/systems/pretrained/decode
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jahubert.errors import DataError, quote
from jahubert.formats.atomic import atomic_write
from jahubert.inference.confidence import Calibration, WordFeatures, fit_calibration
from jahubert.phonemes import PhonemeSet
from jahubert.train.evaluation.metrics import paired_bootstrap
from jahubert.train.evaluation.scoring import (
    TEXT_CER,
    Measure,
    ScoredUtterance,
    SetScore,
    details,
    has_text,
    measures_for,
    phone_wer,
    published_table,
    rates_table,
    read_hypotheses,
)
from jahubert.train.evaluation.word_confidence import evaluate_confidence, judge_words
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import raise_config_errors, range_errors, seed_field
from jahubert.train.experiment.provenance import read_record, write_json
from jahubert.train.report.results import result_label

log = logging.getLogger(__name__)

VERSION = 5
_N_CONFUSIONS = 30


@dataclass(frozen=True)
class Config:
    hypotheses: Path  # output folder of the decode stage
    baseline: Path | None = None  # decode folder of a baseline, for a paired significance test
    # Published WERs (%) to show for comparison, as name: {split: WER}.
    published: dict[str, Any] = field(default_factory=dict)
    calibration_splits: tuple[str, ...] = ()  # splits on which the word confidences are calibrated
    samples: int = 1000  # number of bootstrap samples
    seed: int = seed_field()  # random seed of the bootstrap

    def __post_init__(self) -> None:
        raise_config_errors(range_errors(self, {"at least 1": ("samples",)}))


def run(config: Config, out: Path) -> dict[str, Any]:
    measures = _measures(config.hypotheses)
    calibration = calibrate(config)
    scores = {}
    metrics = {}
    for path in _hypothesis_files(config.hypotheses):
        set_score = SetScore(list(read_hypotheses(path)), measures)
        _report_missing_texts(set_score, path.stem)
        score = score_set(set_score, config)
        if config.baseline:
            score["against"] = compare_with_baseline(set_score, config.baseline / path.name, config)
        judged = judge_words(set_score.utterances)
        if (found := evaluate_confidence(judged, calibration)) is not None:
            score["confidence"] = asdict(found) | {"calibrated_on": list(config.calibration_splits)}
        scores[path.stem] = score
        metrics |= {f"{path.stem}_{name}": score[name]["rate"] for name in set_score.counts}
        if distributed.rank() == 0:
            with atomic_write(out / f"{path.stem}.txt") as file:
                file.writelines(f"{line}\n" for line in details(path.stem, score, set_score))
    if distributed.rank() == 0:
        write_json(out / "scores.json", scores)
        if calibration is not None:
            write_json(out / "calibration.json", calibration.to_json())
        results = [(result_label(config.hypotheses), phone_wer(scores))]
        table = published_table(config.published, results) + rates_table(scores)
        with atomic_write(out / "table.txt") as file:
            file.write(table)
        print(table)
    distributed.barrier()
    return metrics


def calibrate(config: Config) -> Calibration | None:
    """Fit the calibration of confidences, or return None if no splits are set or no hypothesis has words.

    Raises:
        DataError: there are no hypotheses for a split.
    """
    judged: list[tuple[WordFeatures, bool]] = []
    for split in config.calibration_splits:
        path = config.hypotheses / f"{split}.jsonl"
        if not path.is_file():
            raise DataError(f"score.calibration_splits: {path} not found; add {split!r} to decode.splits")
        judged += judge_words(read_hypotheses(path))
    if not judged:
        if config.calibration_splits:
            log.warning(
                "score.calibration_splits: confidences are not calibrated, because all hypotheses are empty"
            )
        return None
    return fit_calibration(*zip(*judged, strict=True))


def _hypothesis_files(folder: Path) -> list[Path]:
    files = sorted(path for path in folder.glob("*.jsonl") if path.name != "alignment.jsonl")
    if not files:
        raise DataError(f"{folder}: no hypotheses (*.jsonl); run stage=decode first")
    return files


def _measures(folder: Path) -> tuple[Measure, ...]:
    return measures_for(PhonemeSet.from_json(read_record(folder / "phonemes.json")))


def _references_differ(ours: ScoredUtterance, theirs: ScoredUtterance) -> bool:
    texts = ours.reference_text, theirs.reference_text
    return ours.reference != theirs.reference or (None not in texts and texts[0] != texts[1])


def _report_missing_texts(set_score: SetScore, split: str) -> None:
    missing = sum(not has_text(utterance) for utterance in set_score.utterances)
    if TEXT_CER in set_score.measures and missing:
        log.warning(
            "%s: utterances without a text, which do not count for the text CER: %d of %d",
            split, missing, len(set_score.utterances),
        )  # fmt: skip


def score_set(set_score: SetScore, config: Config) -> dict[str, Any]:
    """Compute all measures for a set, its talks and its speakers, and the most frequent confusions."""
    return {
        "utterances": len(set_score.utterances),
        **set_score.rates(config.seed, config.samples),
        "talks": set_score.by(lambda utterance: utterance.talk),
        "speakers": set_score.by(lambda utterance: utterance.speaker),
        "confusions": set_score.confusions(_N_CONFUSIONS),
    }


def compare_with_baseline(set_score: SetScore, path: Path, config: Config) -> dict[str, Any]:
    """Compare each measure with a baseline on the same utterances, using a paired bootstrap test.

    Raises:
        DataError: the baseline has no hypotheses for the set, or has different utterances or references.
    """
    if not path.is_file():
        raise DataError(f"{path}: the baseline has no hypotheses for this set; decode the same splits")
    by_id = {utterance.id: utterance for utterance in read_hypotheses(path)}
    if by_id.keys() != {utterance.id for utterance in set_score.utterances}:
        raise DataError(
            f"{path}: the baseline has different utterances; decode the same splits of the same manifest"
        )
    paired = [by_id[utterance.id] for utterance in set_score.utterances]
    different = [
        ours.id
        for ours, theirs in zip(set_score.utterances, paired, strict=True)
        if _references_differ(ours, theirs)
    ]
    if different:
        raise DataError(
            f"{path}: the references of {len(different)} of {len(paired)} utterances differ from those of "
            f"the baseline, for example {quote(different[0])}; use the same targets for both systems"
        )
    baseline = SetScore(paired, set_score.vocabulary_measures)
    if set_score.measures != baseline.measures:
        log.warning("%s: the text CER is not compared, because only one system has it", path.stem)
    result = {}
    for name in set_score.counts:
        if name not in baseline.counts:
            continue
        counts = set_score.counts[name]
        errors = [count.errors for count in counts]
        baseline_errors = [count.errors for count in baseline.counts[name]]
        lengths = [count.length for count in counts]
        test = paired_bootstrap(errors, baseline_errors, lengths, config.seed, config.samples)
        result[name] = {"baseline": sum(baseline_errors) / max(1, sum(lengths)), **asdict(test)}
    return result
