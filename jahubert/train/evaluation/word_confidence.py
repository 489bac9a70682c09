"""Classification of hypothesis words as correct or wrong, to calibrate and evaluate confidences."""

from __future__ import annotations

from collections.abc import Iterable

from jahubert.inference.confidence import Calibration, Reliability, WordFeatures, confidence, reliability
from jahubert.train.evaluation.metrics import align
from jahubert.train.evaluation.scoring import ScoredUtterance

Judged = list[tuple[WordFeatures, bool]]  # features of words, and whether each is correct


def judge_words(utterances: Iterable[ScoredUtterance]) -> Judged:
    """Align hypotheses with references to judge each word, skipping utterances without word features."""
    judged: Judged = []
    for utterance in utterances:
        if utterance.word_features is None:
            continue
        pairs = align(utterance.reference, utterance.hypothesis)
        correct = [expected == word for expected, word in pairs if word is not None]
        judged += zip(utterance.word_features, correct, strict=True)
    return judged


def evaluate_confidence(judged: Judged, calibration: Calibration | None) -> Reliability | None:
    """Measure the reliability of the confidences of judged words, or return None if there are no words."""
    if not judged:
        return None
    confidences = [confidence(features, calibration) for features, _ in judged]
    return reliability(confidences, [correct for _, correct in judged])
