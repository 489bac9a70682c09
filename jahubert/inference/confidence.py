"""Confidence of recognized words, calibrated on development sets.

The confidence of a word is the estimated probability that it is correct. With a calibration, it is a logistic
function of the word's `WordFeatures`. The `decode` stage and `Transcriber` compute these with the same
functions: `align_best` aligns a hypothesis, and `word_features` computes the features of the aligned words.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from jahubert.errors import CheckpointError, DataError, quote
from jahubert.formats.typed_fields import read_json
from jahubert.inference.ctc import Hypothesis, Span, forced_align
from jahubert.inference.fusion import Fusion

LOW_CONFIDENCE = 0.5  # below this confidence, a word is more likely wrong than correct
_FLOOR = -10.0  # lower log-probabilities are clipped to this value
_RIDGE = 1e-2  # regularization; keeps the fit finite if correct and wrong words are linearly separable


class WordFeatures(NamedTuple):
    """Features of a recognized word. The log-probabilities are natural and clipped to [`_FLOOR`, 0]."""

    mean: float  # mean log-probability of the labels of the word
    utterance: float  # mean log-probability of the labels of all words in the utterance
    posterior: float  # share of the probability of the final beam that belongs to hypotheses with the word
    lm: float  # mean log-probability of the labels and the boundary according to the language model, or 0


@dataclass(frozen=True)
class Calibration:
    """Coefficients of the logistic function, valid for one model and one search configuration."""

    bias: float
    weights: WordFeatures

    def confidence(self, features: WordFeatures) -> float:
        """Estimate the probability that a word is correct."""
        return _sigmoid(self.bias + sum(w * x for w, x in zip(self.weights, features, strict=True)))

    def to_json(self) -> dict[str, float]:
        """Return a JSON-serializable form, from which `from_json` restores the calibration."""
        return {"bias": self.bias, **self.weights._asdict()}

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """Restore a calibration from the output of `to_json`.

        Raises:
            CheckpointError: the content is not a calibration.
        """
        names = ("bias", *WordFeatures._fields)
        values = [data.get(name) for name in names] if isinstance(data, dict) else []
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(numbers) != len(names):
            raise CheckpointError(
                f"a confidence calibration must have the finite numbers {', '.join(names)}; "
                f"found {quote(data)}"
            )
        return cls(numbers[0], WordFeatures(*numbers[1:]))


def read_calibration(path: Path) -> Calibration:
    """Read a calibration that the `score` stage has written.

    Raises:
        CheckpointError: the file is missing or is not a calibration.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: file not found; give the calibration.json of a score stage")
    content = read_json(path)
    try:
        return Calibration.from_json(content)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


def confidence(features: WordFeatures, calibration: Calibration | None) -> float:
    """Estimate the confidence of a word.

    Without a calibration, the confidence is the geometric mean of the probabilities of the labels, which
    ranks words but is usually too high.
    """
    return math.exp(features.mean) if calibration is None else calibration.confidence(features)


def align_best(
    logp_SV: Tensor, hypotheses: Sequence[Hypothesis], blank: int, boundary: int, fusion: Fusion | None = None
) -> list[Span]:
    """Align the best hypothesis, and set the posterior and the language model score of each label.

    Args:
        logp_SV: log-probabilities of one utterance.
        hypotheses: hypotheses of the final beam, best first.
        blank, boundary: indices of the blank and of the word boundary (negative if there is none).
        fusion: the fusion of the search, if any.
    """
    best = hypotheses[0]
    spans = forced_align(logp_SV, best.labels, blank)
    if not spans:
        return []
    posteriors = _posteriors(hypotheses, boundary)
    lm_logps = np.zeros(len(spans)) if fusion is None else fusion.label_logp(best.labels, best.words)
    return [
        replace(span, posterior=posterior, lm_logp=lm_logp)
        for span, posterior, lm_logp in zip(spans, posteriors, lm_logps.tolist(), strict=True)
    ]


def _posteriors(hypotheses: Sequence[Hypothesis], boundary: int) -> list[float]:
    """Return the posterior of the word of each label in the best hypothesis; that of boundaries is 1.

    A word belongs to another hypothesis if all words from the start up to this word, or from this word to the
    end, are equal. As the hypotheses of a beam usually differ in one place, an alignment is not needed.
    """
    best, *others = (_split(hypothesis.labels, boundary) for hypothesis in hypotheses)
    share_H = np.exp([hypothesis.score - hypotheses[0].score for hypothesis in hypotheses])
    share_H /= share_H.sum()
    posterior_W = np.full(len(best), share_H[0])
    for other, share in zip(others, share_H[1:], strict=True):
        shorter = min(len(best), len(other))
        first = _n_equal(best, other)
        last = min(_n_equal(best[::-1], other[::-1]), shorter - first)
        posterior_W[:first] += share
        posterior_W[len(best) - last :] += share
    of_label = iter(np.repeat(posterior_W, [len(word) for word in best]).clip(max=1.0).tolist())
    return [1.0 if label == boundary else next(of_label) for label in hypotheses[0].labels]


def _split(labels: Sequence[int], boundary: int) -> list[tuple[int, ...]]:
    """Split labels into words; without a boundary, each label is a word."""
    if boundary < 0:
        return [(label,) for label in labels]
    words: list[list[int]] = [[]]
    for label in labels:
        if label == boundary:
            words.append([])
        else:
            words[-1].append(label)
    return [tuple(word) for word in words if word]


def _n_equal(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the number of equal items at the start of two sequences."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def word_features(words: Sequence[Sequence[Span]]) -> list[WordFeatures]:
    """Compute the features of all words of an utterance from spans that `align_best` returned."""
    utterance = _clipped_mean(span.score for word in words for span in word)
    return [
        WordFeatures(
            _clipped_mean(span.score for span in word),
            utterance,
            min(span.posterior for span in word),
            max(_FLOOR, sum(span.lm_logp for span in word) / (len(word) + 1)),
        )
        for word in words
    ]


def _clipped_mean(logps: Iterable[float]) -> float:
    clipped = [max(_FLOOR, min(0.0, logp)) for logp in logps]
    return sum(clipped) / max(1, len(clipped))


def fit_calibration(features: Sequence[WordFeatures], correct: Sequence[bool]) -> Calibration:
    """Fit the logistic function to words that are known to be correct or wrong, with Newton's method.

    Raises:
        DataError: there are no words, or the numbers of words and judgments differ.
    """
    if not len(features) or len(features) != len(correct):
        raise DataError(
            "calibration needs at least one word and one judgment per word, but found "
            f"(words, judgments) = {(len(features), len(correct))}"
        )
    x_NF = np.array([(1.0, *word) for word in features])
    y_N = np.array(correct, float)
    weight_F = np.zeros(x_NF.shape[1])
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-np.clip(x_NF @ weight_F, -30, 30)))
        gradient_F = x_NF.T @ (p_N - y_N) + _RIDGE * weight_F
        hessian_FF = (x_NF * (p_N * (1 - p_N))[:, None]).T @ x_NF + _RIDGE * np.eye(len(weight_F))
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        weight_F -= step_F
        if np.abs(step_F).max() < 1e-8:
            break
    bias, *weights = weight_F.tolist()
    return Calibration(bias, WordFeatures(*weights))


@dataclass(frozen=True)
class Reliability:
    """Agreement of confidences with the fraction of correct words.

    Attributes:
        words, accuracy, confidence: number of words, fraction of correct words, and mean confidence.
        calibration_error: absolute difference between the mean confidence and the accuracy of a bin, averaged
            over all words (ECE).
        auc: probability that a correct word has a higher confidence than a wrong one (area under the ROC
            curve), or None unless there are both.
        bins: (mean confidence, accuracy, number of words) of each non-empty bin. All bins have equal widths.
    """

    words: int
    accuracy: float
    confidence: float
    calibration_error: float
    auc: float | None
    bins: tuple[tuple[float, float, int], ...]


def reliability(confidences: Sequence[float], correct: Sequence[bool], n_bins: int = 10) -> Reliability:
    """Compare the confidences of words with their correctness.

    Raises:
        DataError: there are no words, or the numbers of confidences and judgments differ.
    """
    if not len(confidences) or len(confidences) != len(correct):
        raise DataError(
            "reliability needs at least one word, and a confidence and a judgment per word, but found "
            f"(confidences, judgments) = {(len(confidences), len(correct))}"
        )
    p_N, y_N = np.asarray(confidences, float), np.asarray(correct, float)
    bin_N = np.minimum((p_N * n_bins).astype(int), n_bins - 1)
    bins = []
    for index in range(n_bins):
        inside = bin_N == index
        if inside.any():
            bins.append((float(p_N[inside].mean()), float(y_N[inside].mean()), int(inside.sum())))
    error = sum(n * abs(p - y) for p, y, n in bins) / len(p_N)
    return Reliability(
        len(p_N), float(y_N.mean()), float(p_N.mean()), error, _auc(p_N[y_N > 0], p_N[y_N == 0]), tuple(bins)
    )


def _auc(correct_N: np.ndarray, wrong_M: np.ndarray) -> float | None:
    """Return the share of pairs in which the correct word is more confident. A tie counts as half a pair."""
    if not len(correct_N) or not len(wrong_M):
        return None
    wrong_M = np.sort(wrong_M)
    n_below = [np.searchsorted(wrong_M, correct_N, side).sum() for side in ("left", "right")]
    return float(sum(n_below)) / 2 / len(correct_N) / len(wrong_M)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, x))))
