"""Evaluation metrics: error rates with confidence intervals, and agreement of clusters with phones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from jahubert.errors import DataError, MissingExtraError
from jahubert.frames import FrameGrid
from jahubert.train.data.manifest import Phone

Pair = tuple[Hashable | None, Hashable | None]  # (reference, hypothesis); None if the item is missing


@dataclass(frozen=True)
class ErrorCounts:
    """Numbers of hits, substitutions, insertions and deletions in one or more alignments."""

    hits: int
    substitutions: int
    insertions: int
    deletions: int

    @property
    def length(self) -> int:
        """Number of items in the reference."""
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors per reference item, which may exceed 1; for an empty reference, the number of errors."""
        return self.errors / max(1, self.length)

    def __add__(self, other: ErrorCounts) -> ErrorCounts:
        return ErrorCounts(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


def count_errors(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> ErrorCounts:
    """Count hits and errors in a minimum-distance alignment. Items are compared for equality."""
    if not reference or not hypothesis:
        return ErrorCounts(0, 0, len(hypothesis), len(reference))
    aligned = _jiwer_alignment(reference, hypothesis)
    return ErrorCounts(aligned.hits, aligned.substitutions, aligned.insertions, aligned.deletions)


def align(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> list[Pair]:
    """Align two sequences, and return pairs (reference item, hypothesis item).

    The alignment is the same as in `count_errors`. The missing item in an insertion or deletion is None.
    """
    if not reference or not hypothesis:
        return [*((item, None) for item in reference), *((None, item) for item in hypothesis)]
    pairs: list[Pair] = []
    for chunk in _jiwer_alignment(reference, hypothesis).alignments[0]:
        reference_items = reference[chunk.ref_start_idx : chunk.ref_end_idx]
        hypothesis_items = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
        pairs += zip_longest(reference_items, hypothesis_items)
    return pairs


def _jiwer_alignment(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Any:
    """Align with jiwer. It compares words in strings, so each distinct item is replaced with a number."""
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError("jiwer", "train") from error
    numbers: dict[Hashable, str] = {}
    texts = [
        " ".join(numbers.setdefault(item, str(len(numbers))) for item in items)
        for items in (reference, hypothesis)
    ]
    return jiwer.process_words(texts[0], texts[1])


def error_rate(
    references: Sequence[Sequence[Hashable]], hypotheses: Sequence[Sequence[Hashable]]
) -> ErrorCounts:
    """Count the errors in all utterances of a set.

    The `rate` of the result is the PER for phone sequences and the WER for word sequences. Words should be
    tuples of phones, because `k y o` and `ky o` would be equal if they were joined.

    Raises:
        DataError: the numbers of references and hypotheses differ.
        MissingExtraError: jiwer is not installed.
    """
    if len(references) != len(hypotheses):
        raise DataError(
            f"the numbers of references ({len(references)}) and hypotheses ({len(hypotheses)}) differ: match "
            "them by id first"
        )
    pairs = zip(references, hypotheses, strict=True)
    counts = (count_errors(reference, hypothesis) for reference, hypothesis in pairs)
    return sum(counts, ErrorCounts(0, 0, 0, 0))


def bootstrap_interval(
    errors: Sequence[int], lengths: Sequence[int], seed: int = 0, n: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Estimate a confidence interval of sum(errors) / sum(lengths) by bootstrap (Bisani and Ney 2004).

    Args:
        errors, lengths: number of errors and reference length of each utterance, or of each speaker for an
            interval that reflects the variation between speakers.
        n: number of bootstrap samples.

    Raises:
        DataError: there are no utterances, or the numbers of errors and lengths differ.
    """
    if len(errors) != len(lengths) or not len(errors):
        raise DataError(
            f"bootstrap interval: {len(errors)} error counts and {len(lengths)} lengths, but "
            "both sequences must have the same nonzero length"
        )
    error_N, length_N = np.asarray(errors, float), np.asarray(lengths, float)
    rates = _resampled_rates(error_N, length_N, seed, n)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _resampled_rates(error_N: np.ndarray, length_N: np.ndarray, seed: int, n: int) -> np.ndarray:
    """Compute sum(errors) / sum(lengths) for `n` bootstrap samples of utterances."""
    rng = np.random.default_rng(seed)
    rates = np.empty(n)
    for sample in range(n):
        chosen = rng.integers(len(error_N), size=len(error_N))
        rates[sample] = error_N[chosen].sum() / max(1.0, length_N[chosen].sum())
    return rates


@dataclass(frozen=True)
class PairedTest:
    """Difference between the error rates of two systems, with its confidence interval and p-value."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    errors: Sequence[int],
    baseline_errors: Sequence[int],
    lengths: Sequence[int],
    seed: int = 0,
    n: int = 1000,
    level: float = 0.95,
) -> PairedTest:
    """Compare two systems on the same utterances with a paired bootstrap test (Bisani and Ney 2004).

    The p-value is two-sided: (e + 1) / (n + 1), where e of n bootstrap differences deviate from the measured
    difference by at least the absolute value of that difference (Efron and Tibshirani 1993, chapter 16).

    Raises:
        DataError: there are no utterances, or the sequences have different lengths.
    """
    if not len(errors) == len(baseline_errors) == len(lengths) or not len(errors):
        raise DataError(
            f"paired bootstrap: {len(errors)} and {len(baseline_errors)} error counts and {len(lengths)} "
            "lengths, but all three sequences must have the same nonzero length"
        )
    difference_N = np.asarray(errors, float) - np.asarray(baseline_errors, float)
    length_N = np.asarray(lengths, float)
    measured = difference_N.sum() / max(1.0, length_N.sum())
    differences = _resampled_rates(difference_N, length_N, seed, n)
    low, high = np.quantile(differences, [(1 - level) / 2, (1 + level) / 2])
    n_extreme = (np.abs(differences - measured) >= abs(measured)).sum()
    return PairedTest(float(measured), float(low), float(high), float((n_extreme + 1) / (n + 1)))


def phone_frames(alignment: Sequence[Phone], n_frames: int, grid: FrameGrid) -> list[str | None]:
    """Return the phone at the center of each frame, or None where the alignment has no phone."""
    symbols: list[str | None] = []
    index = 0
    for frame in range(n_frames):
        center = grid.center(frame)
        while index < len(alignment) and alignment[index].end <= center:
            index += 1
        inside = index < len(alignment) and alignment[index].start <= center
        symbols.append(alignment[index].symbol if inside else None)
    return symbols


def joint_counts(phone_N: np.ndarray, unit_N: np.ndarray, n_phones: int, n_units: int) -> np.ndarray:
    """Count the frames for each pair of phone and unit, int64 (P, K), given the phone and unit of each frame.

    Raises:
        DataError: there are no frames, `phone_N` and `unit_N` differ in length, or an index is out of range.
    """
    phone_N, unit_N = np.asarray(phone_N, np.int64), np.asarray(unit_N, np.int64)
    if phone_N.shape != unit_N.shape or not len(phone_N):
        raise DataError(
            f"{len(phone_N)} phones and {len(unit_N)} units, but both sequences must have the same nonzero "
            "length"
        )
    for name, index_N, n in (("phones", phone_N, n_phones), ("units", unit_N, n_units)):
        if index_N.min() < 0 or index_N.max() >= n:
            raise DataError(
                f"{name} range from {index_N.min()} to {index_N.max()}, but must be between 0 and {n - 1}"
            )
    counts = np.bincount(phone_N * n_units + unit_N, minlength=n_phones * n_units)
    return counts.reshape(n_phones, n_units)


def cluster_quality(count_PK: np.ndarray) -> dict[str, float]:
    """Compute phone purity, cluster purity and PNMI from `joint_counts` as in the HuBERT paper.

    Phone purity is the fraction of frames whose phone is the most frequent phone of their unit. Cluster
    purity is the fraction of frames whose unit is the most frequent unit of their phone. PNMI is
    I(phone; unit) / H(phone).
    """
    joint_PK = count_PK / count_PK.sum()
    phone_P, unit_K = joint_PK.sum(1), joint_PK.sum(0)
    nonzero = joint_PK > 0
    expected_PK = np.outer(phone_P, unit_K)
    mutual = float(np.sum(joint_PK[nonzero] * np.log(joint_PK[nonzero] / expected_PK[nonzero])))
    entropy = -float(np.sum(phone_P[phone_P > 0] * np.log(phone_P[phone_P > 0])))
    return {
        "phone_purity": float(joint_PK.max(0).sum()),
        "cluster_purity": float(joint_PK.max(1).sum()),
        "pnmi": mutual / entropy if entropy else 0.0,
    }
