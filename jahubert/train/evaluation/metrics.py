"""Error rates with intervals, and how well units tell phones apart."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np

from jahubert.errors import DataError, MissingExtraError
from jahubert.frames import FrameGrid
from jahubert.train.data.manifest import Phone


@dataclass(frozen=True)
class Errors:
    """Counts of one comparison; `length` is that of the reference."""

    hits: int
    substitutions: int
    insertions: int
    deletions: int

    @property
    def length(self) -> int:
        return self.hits + self.substitutions + self.deletions

    @property
    def errors(self) -> int:
        return self.substitutions + self.insertions + self.deletions

    @property
    def rate(self) -> float:
        """Errors for each item of the reference; above 1 where much was inserted."""
        return self.errors / max(1, self.length)

    def __add__(self, other: Errors) -> Errors:
        return Errors(
            self.hits + other.hits,
            self.substitutions + other.substitutions,
            self.insertions + other.insertions,
            self.deletions + other.deletions,
        )


def count_errors(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Errors:
    """The edits of a shortest way from the hypothesis to the reference; items are compared whole."""
    if not reference or not hypothesis:
        return Errors(0, 0, len(hypothesis), len(reference))
    found = _compared(reference, hypothesis)
    return Errors(found.hits, found.substitutions, found.insertions, found.deletions)


def align(
    reference: Sequence[Hashable], hypothesis: Sequence[Hashable]
) -> list[tuple[Hashable | None, Hashable | None]]:
    """(said, heard) along the shortest way that `count_errors` counts; None for what the other side lacks."""
    if not reference or not hypothesis:
        return [*((said, None) for said in reference), *((None, heard) for heard in hypothesis)]
    pairs: list[tuple[Hashable | None, Hashable | None]] = []
    for part in _compared(reference, hypothesis).alignments[0]:
        said = reference[part.ref_start_idx : part.ref_end_idx]
        heard = hypothesis[part.hyp_start_idx : part.hyp_end_idx]
        pairs += zip_longest(said, heard)
    return pairs


def _compared(reference: Sequence[Hashable], hypothesis: Sequence[Hashable]) -> Any:
    """jiwer's comparison. It knows words of a string: every item becomes one, so that tuples stay whole."""
    try:
        import jiwer
    except ImportError as error:
        raise MissingExtraError("jiwer", "train") from error
    names: dict[Hashable, str] = {}
    said, heard = (
        " ".join(names.setdefault(item, str(len(names))) for item in items)
        for items in (reference, hypothesis)
    )
    return jiwer.process_words(said, heard)


def error_rate(references: Sequence[Sequence[Hashable]], hypotheses: Sequence[Sequence[Hashable]]) -> Errors:
    """Errors of a whole set: `.rate` is the PER of sequences of phones, the WER of sequences of words.

    A word is its tuple of phones: joined to a string, `k y o` and `ky o` would be the same.
    """
    if len(references) != len(hypotheses):
        raise DataError(
            f"{len(references)} references, but {len(hypotheses)} hypotheses: match them by id first"
        )
    pairs = zip(references, hypotheses, strict=True)
    return sum((count_errors(said, heard) for said, heard in pairs), Errors(0, 0, 0, 0))


def bootstrap_interval(
    errors: Sequence[int], lengths: Sequence[int], seed: int = 0, n: int = 1000, level: float = 0.95
) -> tuple[float, float]:
    """Interval of sum(errors) / sum(lengths) under resampling of utterances (Bisani and Ney 2004)."""
    if len(errors) != len(lengths) or not len(errors):
        raise DataError(f"errors of {len(errors)} and lengths of {len(lengths)} utterances: no interval")
    error_N, length_N = np.asarray(errors, float), np.asarray(lengths, float)
    rng = np.random.default_rng(seed)
    rates = np.empty(n)
    for sample in range(n):
        chosen = rng.integers(len(error_N), size=len(error_N))
        rates[sample] = error_N[chosen].sum() / max(1.0, length_N[chosen].sum())
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """Rate of one system less another's on the same utterances, its interval, and its share by chance."""

    difference: float
    low: float
    high: float
    p: float


def paired_bootstrap(
    errors: Sequence[int],
    others: Sequence[int],
    lengths: Sequence[int],
    seed: int = 0,
    n: int = 1000,
    level: float = 0.95,
) -> Difference:
    """Two systems on the same utterances, resampled together (Bisani and Ney 2004).

    `p`: how often a resampled difference lies as far from the measured one as that lies from zero, which is
    how often chance alone would show so much (two-sided; Efron and Tibshirani 1993, chapter 16).
    """
    if not len(errors) == len(others) == len(lengths) or not len(errors):
        raise DataError(
            f"errors of {len(errors)} and {len(others)}, lengths of {len(lengths)} utterances: no pairs"
        )
    gap_N, length_N = np.asarray(errors, float) - np.asarray(others, float), np.asarray(lengths, float)
    measured = gap_N.sum() / max(1.0, length_N.sum())
    rng = np.random.default_rng(seed)
    found = np.empty(n)
    for sample in range(n):
        chosen = rng.integers(len(gap_N), size=len(gap_N))
        found[sample] = gap_N[chosen].sum() / max(1.0, length_N[chosen].sum())
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    as_far = np.abs(found - measured) >= abs(measured)
    return Difference(float(measured), float(low), float(high), float((as_far.sum() + 1) / (n + 1)))


def phone_frames(alignment: Sequence[Phone], n_frames: int, grid: FrameGrid) -> list[str | None]:
    """The phone at the middle of each frame; None where the alignment says nothing."""
    names: list[str | None] = []
    at = 0
    for frame in range(n_frames):
        center = grid.center(frame)
        while at < len(alignment) and alignment[at].end <= center:
            at += 1
        inside = at < len(alignment) and alignment[at].start <= center
        names.append(alignment[at].symbol if inside else None)
    return names


def joint_counts(phone_N: np.ndarray, unit_N: np.ndarray, n_phones: int, n_units: int) -> np.ndarray:
    """How many frames have each phone and unit, int64 (P, K), of frame-wise phones and units (N,).

    Raises:
        DataError: no frames, not one phone for each unit, or numbers out of range.
    """
    phone_N, unit_N = np.asarray(phone_N, np.int64), np.asarray(unit_N, np.int64)
    if phone_N.shape != unit_N.shape or not len(phone_N):
        raise DataError(
            f"{len(phone_N)} phones and {len(unit_N)} units: one of each is needed for every frame"
        )
    for name, index_N, n in (("phones", phone_N, n_phones), ("units", unit_N, n_units)):
        if index_N.min() < 0 or index_N.max() >= n:
            raise DataError(f"{name} lie in {index_N.min()}..{index_N.max()}, but must lie in 0..{n - 1}")
    counts = np.bincount(phone_N * n_units + unit_N, minlength=n_phones * n_units)
    return counts.reshape(n_phones, n_units)


def cluster_quality(count_PK: np.ndarray) -> dict[str, float]:
    """Phone purity, cluster purity and PNMI of `joint_counts` (HuBERT paper section IV-D).

    phone purity: share of frames whose phone is the most frequent one of their unit; cluster purity: share
    whose unit is the most frequent one of their phone; PNMI: I(phone; unit) / H(phone).
    """
    joint_PK = count_PK / count_PK.sum()
    phone_P, unit_K = joint_PK.sum(1), joint_PK.sum(0)
    seen = joint_PK > 0
    mutual = float(np.sum(joint_PK[seen] * np.log(joint_PK[seen] / np.outer(phone_P, unit_K)[seen])))
    entropy = -float(np.sum(phone_P[phone_P > 0] * np.log(phone_P[phone_P > 0])))
    return {
        "phone_purity": float(joint_PK.max(0).sum()),
        "cluster_purity": float(joint_PK.max(1).sum()),
        "pnmi": mutual / entropy if entropy else 0.0,
    }
