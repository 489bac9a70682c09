"""Confidence of recognized words, calibrated on a development set.

The confidence of a word is the estimated probability that it is correct. With a calibration, it is a logistic
function of the mean and the minimum of the log-probabilities of the word's labels in the forced alignment.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jahubert.errors import CheckpointError, DataError, quote

LOW_CONFIDENCE = 0.5  # below this confidence, a word is more likely wrong than correct
_FLOOR = -10.0  # lower log-probabilities are clipped to this value
_RIDGE = 1e-2  # regularization; keeps the fit finite if correct and wrong words are linearly separable


@dataclass(frozen=True)
class Calibration:
    """Coefficients of the logistic function, valid for one model and one search configuration.

    Attributes:
        bias, mean, lowest: intercept, weight of the mean and weight of the lowest log-probability.
    """

    bias: float
    mean: float
    lowest: float

    def confidence(self, scores: Sequence[float]) -> float:
        """Estimate the probability that a word is correct from the mean log-probability of each label."""
        mean, lowest = features(scores)
        return _sigmoid(self.bias + self.mean * mean + self.lowest * lowest)

    def to_json(self) -> dict[str, float]:
        """Return a JSON-serializable form, from which `from_json` restores the calibration."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> Calibration:
        """Restore a calibration from the output of `to_json`.

        Raises:
            CheckpointError: the content is not a calibration.
        """
        names = ("bias", "mean", "lowest")
        values = [data.get(name) for name in names] if isinstance(data, dict) else []
        numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v)]
        if len(numbers) != len(names):
            raise CheckpointError(
                f"a confidence calibration must have the finite numbers {', '.join(names)}; "
                f"found {quote(data)}"
            )
        return cls(*numbers)


def confidence(scores: Sequence[float], calibration: Calibration | None) -> float:
    """Estimate the confidence of a word from the log-probabilities of its labels.

    Without a calibration, the confidence is the geometric mean of the probabilities, which ranks words but is
    usually too high.
    """
    if calibration is not None:
        return calibration.confidence(scores)
    return math.exp(features(scores)[0])


def features(scores: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the minimum of a word's label log-probabilities, clipped to [`_FLOOR`, 0]."""
    clipped = [max(_FLOOR, min(0.0, score)) for score in scores]
    return sum(clipped) / len(clipped), min(clipped)


def fit_calibration(scores: Sequence[Sequence[float]], correct: Sequence[bool]) -> Calibration:
    """Fit the logistic function to words that are known to be correct or wrong, with Newton's method.

    Args:
        scores: log-probabilities of the labels of each word.
        correct: whether each word is correct.

    Raises:
        DataError: there are no words, or the numbers of words and judgments differ.
    """
    if not scores or len(scores) != len(correct):
        raise DataError(
            "calibration needs at least one word and one judgment per word, but found "
            f"(words, judgments) = {(len(scores), len(correct))}"
        )
    x_N3 = np.array([(1.0, *features(word)) for word in scores])
    y_N = np.array(correct, float)
    weight = np.zeros(3)
    for _ in range(50):
        p_N = 1 / (1 + np.exp(-np.clip(x_N3 @ weight, -30, 30)))
        gradient = x_N3.T @ (p_N - y_N) + _RIDGE * weight
        hessian = (x_N3 * (p_N * (1 - p_N))[:, None]).T @ x_N3 + _RIDGE * np.eye(3)
        step = np.linalg.solve(hessian, gradient)
        weight -= step
        if np.abs(step).max() < 1e-8:
            break
    return Calibration(*weight.tolist())


@dataclass(frozen=True)
class Reliability:
    """Agreement of confidences with the fraction of correct words.

    Attributes:
        words, accuracy, confidence: number of words, fraction of correct words, and mean confidence.
        calibration_error: absolute difference between the mean confidence and the accuracy of a bin, averaged
            over all words (ECE).
        bins: (mean confidence, accuracy, number of words) of each non-empty bin. All bins have equal widths.
    """

    words: int
    accuracy: float
    confidence: float
    calibration_error: float
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
    return Reliability(len(p_N), float(y_N.mean()), float(p_N.mean()), error, tuple(bins))


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-max(-30.0, min(30.0, x))))
