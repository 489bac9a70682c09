"""Classification of hypothesis words as correct or wrong, to calibrate and evaluate confidences."""

from __future__ import annotations

from collections.abc import Iterable

from jahubert.inference.confidence import Calibration, Reliability, confidence, reliability
from jahubert.train.evaluation.metrics import align
from jahubert.train.evaluation.scoring import ScoredUtterance

# (log-probabilities of the labels in each word, whether each word is correct)
Judged = tuple[list[list[float]], list[bool]]


def judge_words(utterances: Iterable[ScoredUtterance]) -> Judged:
    """Align hypotheses with references to judge each word, skipping utterances without word scores."""
    scores: list[list[float]] = []
    correct: list[bool] = []
    for utterance in utterances:
        if utterance.word_scores is None:
            continue
        pairs = align(utterance.reference, utterance.hypothesis)
        scores += utterance.word_scores
        correct += [expected == word for expected, word in pairs if word is not None]
    return scores, correct


def evaluate_confidence(judged: Judged, calibration: Calibration | None) -> Reliability | None:
    """Measure the reliability of the confidences of judged words, or return None if there are no words."""
    scores, correct = judged
    if not scores:
        return None
    return reliability([confidence(word, calibration) for word in scores], correct)
