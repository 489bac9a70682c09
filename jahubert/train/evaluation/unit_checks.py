"""Sanity checks of unit usage, label stores, masked accuracy and the CTC blank plateau.

Functions named `*_problem` return a message with advice, or None. Functions named `check_*` log the message
as a warning, or raise an error if `on_bad_units` is "error". Without these checks, training on degenerate
labels may go unnoticed for weeks.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np

from jahubert.errors import DataError, quote
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest

log = logging.getLogger(__name__)

OnBadUnits = Literal["warn", "error"]

_MIN_USED = 0.9  # minimum fraction of units that occur
_MIN_PERPLEXITY = 0.25  # minimum perplexity, as a fraction of the number of units
# Maximum share of the most frequent unit, unless 3 / n_units is higher. Silence usually has 0.1 to 0.2.
_MAX_SHARE = 0.3
_ROUNDING = 1e-3  # fraction of frames that may differ because of rounding on different devices
_SHIFTS = (-2, -1, 1, 2)  # shifts to test, in frames
_SCAN = 1 << 20  # number of frames to compare at a time
# Masked accuracy of HuBERT base on LibriSpeech by feature, number of units and updates (fairseq issue 4907).
_PUBLISHED_ACCURACY = {
    ("mfcc", 100): {250_000: 0.365, 400_000: 0.390},
    ("hubert", 500): {250_000: 0.383, 400_000: 0.417},
}
_POOR = 0.8  # runs below this fraction of the published accuracy are reported


def usage_statistics(count_K: np.ndarray) -> dict[str, float]:
    """Compute the number of used units, the entropy (bits), the perplexity and the largest share of frames.

    Args:
        count_K: number of frames with each unit.
    """
    share_K = np.asarray(count_K) / max(1, np.sum(count_K))
    nonzero = share_K[share_K > 0]
    entropy = -float(np.sum(nonzero * np.log2(nonzero)))
    return {
        "used": len(nonzero),
        "entropy": entropy,
        "perplexity": 2**entropy,
        "largest_share": float(share_K.max()),
    }


def usage_problem(count_K: np.ndarray) -> str | None:
    """Return a message if units are used too rarely or too unevenly, otherwise None."""
    n_units, usage = len(count_K), usage_statistics(count_K)
    if usage["largest_share"] > max(_MAX_SHARE, 3 / n_units):
        return (
            f"unit {int(np.argmax(count_K))} has {usage['largest_share']:.0%} of all frames. If it "
            "represents silence, remove silence from the corpus. Otherwise check that the audio is not all "
            "zeros, and that the centroids belong to this feature, layer and normalization"
        )
    if usage["used"] < _MIN_USED * n_units or usage["perplexity"] < _MIN_PERPLEXITY * n_units:
        return (
            f"units are used too rarely or too unevenly: {usage['used']} of {n_units} occur (perplexity "
            f"{usage['perplexity']:.0f}). The centroids may belong to a different feature, layer or "
            "normalization, or may have been fitted to too few frames: check features.sample_frames and "
            "kmeans.n_init, or lower kmeans.n_clusters"
        )
    return None


def check_units(count_K: np.ndarray, name: str, on_bad_units: OnBadUnits) -> None:
    """Warn about poor unit usage, or raise DataError if `on_bad_units` is "error"."""
    if problem := usage_problem(count_K):
        _report(f"{name}: {problem}", on_bad_units)


def _report(problem: str, on_bad_units: OnBadUnits) -> None:
    if on_bad_units == "error":
        raise DataError(f"{problem}. To continue anyway, set on_bad_units=warn")
    log.warning("%s", problem)


def accuracy_problem(
    accuracy: float, chance: float, step: int, feature: str = "", n_units: int = 0
) -> str | None:
    """Return a message if the masked accuracy is at chance level or far below that of published runs.

    Args:
        accuracy: masked accuracy after `step` updates.
        chance: accuracy of always predicting the most frequent unit.
        feature, n_units: source of the labels. Published accuracies exist for ("mfcc", 100) and ("hubert",
            500).
    """
    if accuracy <= 1.05 * chance:
        return (
            f"accuracy on masked frames is {accuracy:.3f} after {step} updates; predicting the most frequent "
            f"unit everywhere has an accuracy of {chance:.3f}. The model has not learned anything: check the "
            "unit usage (logged by stage=label) and that the labels belong to this audio, and try a lower "
            "pretrain.train.lr or a longer warm-up"
        )
    published = _PUBLISHED_ACCURACY.get((feature, n_units), {})
    reached = [updates for updates in published if updates <= step]
    if reached and accuracy < _POOR * published[max(reached)]:
        return (
            f"accuracy on masked frames is {accuracy:.3f} after {step} updates; the published run on "
            f"LibriSpeech reached {published[max(reached)]:.3f} after {max(reached)} updates. Check "
            "pretrain.train.batch_seconds (2,800 in the published run), the crop lengths and the amount of "
            "audio in the manifest"
        )
    return None


@dataclass(frozen=True)
class LabelDifference:
    """Difference between the units of two label stores."""

    frames: int
    message: str  # description of the difference, the probable reason, and advice
    harmless: bool  # whether the difference can be explained by rounding on different devices


def label_difference(first: LabelStore, second: LabelStore, manifest: Manifest) -> LabelDifference | None:
    """Compare the units in two stores for the same manifest. Return None if they are equal.

    Raises:
        DataError: a store belongs to a different manifest.
    """
    for store in (first, second):
        store.check(manifest)
    n_different, rows = 0, np.zeros(0, np.int64)
    for start in range(0, len(first.unit_N), _SCAN):
        block = slice(start, start + _SCAN)
        frames = start + np.flatnonzero(first.unit_N[block] != second.unit_N[block])
        n_different += len(frames)
        rows = np.union1d(rows, np.searchsorted(first.offsets, frames, side="right") - 1)
    if not n_different:
        return None
    share = n_different / len(first.unit_N)
    summary = (
        f"{first.folder} and {second.folder} differ in {share:.2%} of all frames ({n_different}) and in "
        f"{len(rows)} of {len(manifest)} utterances, first in {quote(manifest[int(rows[0])].id)}"
    )
    headers = asdict(first.header), asdict(second.header)
    different_fields = [
        f"{key} {quote(headers[0][key])} and {quote(headers[1][key])}"
        for key in headers[0]
        if headers[0][key] != headers[1][key]
    ]
    shift = _shift(first.unit_N, second.unit_N)
    if shift:
        distance = "1 frame" if abs(shift) == 1 else f"{abs(shift)} frames"
        direction = "late" if shift > 0 else "early"
        reason = f": the second equals the first, but {distance} {direction}; find out which one is correct"
    elif different_fields:
        reason = f"; they were computed from different inputs: {'; '.join(different_fields)}"
    elif share < _ROUNDING:
        reason = ", as expected from rounding on different devices (harmless)"
        return LabelDifference(n_different, summary + reason, harmless=True)
    else:
        reason = ", but their headers agree: the audio has changed or a store is damaged; recompute both"
    return LabelDifference(n_different, summary + reason, harmless=False)


def check_label_difference(
    first: LabelStore, second: LabelStore, manifest: Manifest, on_bad_units: OnBadUnits
) -> None:
    """Warn if two stores differ, or raise DataError for a harmful difference if `on_bad_units` is "error"."""
    difference = label_difference(first, second, manifest)
    if difference is not None:
        _report(difference.message, "warn" if difference.harmless else on_bad_units)


def _shift(first_N: np.ndarray, second_N: np.ndarray) -> int:
    """Return the delay of `second_N` in frames if a shift explains most differences, otherwise 0."""
    first_N, second_N = first_N[:_SCAN], second_N[:_SCAN]
    reach = max(_SHIFTS)
    middle_N = first_N[reach : len(first_N) - reach]
    if not len(middle_N):
        return 0
    agreement = {
        shift: float(np.mean(middle_N == second_N[reach + shift : len(second_N) - reach + shift]))
        for shift in (0, *_SHIFTS)
    }
    best = max(_SHIFTS, key=lambda shift: agreement[shift])
    return best if 1 - agreement[best] < (1 - agreement[0]) / 2 else 0


_MAX_EMPTY = 0.5  # models with at least this fraction of empty hypotheses are reported
_PLATEAU = 0.1  # fraction of updates during which it is normal that a model emits only blanks


def blank_problem(
    blank: float, empty: float, step: int, *, max_steps: int, head_only_steps: int = 0
) -> str | None:
    """Return a message if at least half of a CTC model's hypotheses are still empty after `step` updates.

    Every CTC model starts on a plateau where it emits only blanks, and stays there longer while its encoder
    is frozen. Before the last update, the check therefore reports nothing until the whole network has been
    trained for a tenth of all updates.

    Args:
        blank: fraction of frames whose most probable symbol is blank.
        empty: fraction of development utterances with an empty hypothesis.
    """
    if empty < _MAX_EMPTY or step < min(max_steps, head_only_steps + _PLATEAU * max_steps):
        return None
    trained = f" ({step - head_only_steps} of them with the whole network)" if head_only_steps else ""
    return (
        f"after {step} updates{trained}, {empty:.0%} of the development utterances have an empty hypothesis "
        f"and {blank:.1%} of the frames are blank: the model is still on the blank plateau. Check that the "
        "targets match the audio (stage=targets, rejected.jsonl) and that finetune.pretrained is the right "
        "model; then try twice the finetune.train.lr, fewer finetune.head_only_steps, a smaller "
        "finetune.mask.prob, or more updates. From scratch, thousands of updates on the plateau are normal"
    )
