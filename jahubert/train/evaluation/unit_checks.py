"""Is a run in order? What units and accuracies look like when it is not, with a sentence of advice each.

fairseq trained for a month on labels that were all one unit, without a word. Here every stage that makes or
learns units looks at them; a stage warns, or stops where it is asked to.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass

import numpy as np

from jahubert.errors import DataError
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest

log = logging.getLogger(__name__)

_USED = 0.9  # of the units should occur
_PERPLEXITY = 0.25  # of the number of units: fewer frames than that are spread over
_LARGEST = 0.3  # share of one unit; much silence gives 0.1 to 0.2
_ROUNDING = 1e-3  # share of the frames that another device may label otherwise
_SHIFTS = (-2, -1, 1, 2)  # frames
# Masked accuracy by what the units are of and by updates: HuBERT base on LibriSpeech (fairseq #4907).
_PUBLISHED = {
    ("mfcc", 100): {250_000: 0.365, 400_000: 0.390},
    ("hubert", 500): {250_000: 0.383, 400_000: 0.417},
}
_POOR = 0.8  # of the published accuracy


def unit_use(count_K: np.ndarray) -> dict[str, float]:
    """Of frames counted by unit (K,): units that occur, their entropy in bits, perplexity (units in even
    use, 2 to the entropy), largest share."""
    share_K = np.asarray(count_K) / max(1, np.sum(count_K))
    seen = share_K[share_K > 0]
    entropy = -float(np.sum(seen * np.log2(seen)))
    return {
        "used": len(seen),
        "entropy": entropy,
        "perplexity": 2**entropy,
        "largest_share": float(share_K.max()),
    }


def unit_problem(count_K: np.ndarray) -> str | None:
    """What is wrong with how often each unit occurs, and what to do; None if nothing is."""
    n_units, use = len(count_K), unit_use(count_K)
    if use["largest_share"] > max(_LARGEST, 3 / n_units):
        return (
            f"unit {int(np.argmax(count_K))} takes {use['largest_share']:.0%} of all frames. If that is "
            "silence, cut it out of the corpus; if not, look at the audio (all zeros?) and at whether "
            "the centroids belong to this feature, layer and normalisation"
        )
    if use["used"] < _USED * n_units or use["perplexity"] < _PERPLEXITY * n_units:
        return (
            f"only {use['used']} of {n_units} units occur (perplexity {use['perplexity']:.0f}). The "
            "centroids are of another feature, layer or normalisation than these frames, or were fitted to "
            "too few: see features.sample_frames and kmeans.n_init, or take fewer with kmeans.n_clusters"
        )
    return None


def check_units(count_K: np.ndarray, where: str, stop: bool) -> None:
    """Warn of poor units, or raise DataError where `stop` is set."""
    if problem := unit_problem(count_K):
        if stop:
            raise DataError(f"{where}: {problem}. To go on all the same, ask for on_bad_units=warn")
        log.warning("%s: %s", where, problem)


def accuracy_problem(
    accuracy: float, chance: float, step: int, feature: str = "", n_units: int = 0
) -> str | None:
    """What is wrong with the accuracy on masked frames after `step` updates; None if nothing is.

    Args:
        chance: the accuracy of always saying the most frequent unit, its share of the frames.
        feature, n_units: what the units are of; there are curves for ("mfcc", 100) and ("hubert", 500).
    """
    if accuracy <= 1.05 * chance:
        return (
            f"accuracy on masked frames is {accuracy:.3f} after {step} updates; always saying the most "
            f"frequent unit gives {chance:.3f}. Nothing was learnt: check the use of the units (label), "
            "whether the labels are of this audio, and try a lower pretrain.train.lr or a longer warmup"
        )
    curve = _PUBLISHED.get((feature, n_units), {})
    reached = [at for at in curve if at <= step]
    if reached and accuracy < _POOR * curve[max(reached)]:
        return (
            f"accuracy on masked frames is {accuracy:.3f} after {step} updates; the published run on "
            f"LibriSpeech had {curve[max(reached)]:.3f} after {max(reached)}. Check batch_seconds (2,800), "
            "the crop lengths and how much audio the manifest has"
        )
    return None


@dataclass(frozen=True)
class Difference:
    """Two stores of one manifest are not the same."""

    frames: int
    said: str  # where and probably why, and what to do
    harmless: bool  # no more than rounding on another device does


def label_difference(one: LabelStore, other: LabelStore, manifest: Manifest) -> Difference | None:
    """How the units of two stores of one manifest differ; None if nowhere.

    Raises:
        DataError: a store is of another manifest.
    """
    for store in (one, other):
        store.check(manifest)
    header, theirs = asdict(one.header), asdict(other.header)
    made = [f"{key} {header[key]!r} and {theirs[key]!r}" for key in header if header[key] != theirs[key]]
    differing, rows = 0, np.zeros(0, np.int64)
    for start in range(0, len(one.unit_N), 1 << 20):
        block = slice(start, start + (1 << 20))
        at = start + np.flatnonzero(one.unit_N[block] != other.unit_N[block])
        differing += len(at)
        rows = np.union1d(rows, np.searchsorted(one.offsets, at, side="right") - 1)
    if not differing:
        return None
    share = differing / len(one.unit_N)
    found = (
        f"{one.folder} and {other.folder} differ in {differing} frames ({share:.2%}) of {len(rows)} "
        f"utterances, the first of them {manifest[int(rows[0])].id!r}"
    )
    harmless = False
    if shift := _shift(one.unit_N, other.unit_N):
        when = "late" if shift > 0 else "early"
        said = f"{found}: the second is the first, {abs(shift)} frames {when}; find out which one is right"
    elif made:
        said = f"{found}; they were made from other things: {'; '.join(made)}"
    elif harmless := share < _ROUNDING:
        said = f"{found}, which rounding on another device does to frames between two centroids: harmless"
    else:
        said = f"{found}, though their headers agree: the audio changed, or one is damaged; make both again"
    return Difference(differing, said, harmless)


def check_difference(one: LabelStore, other: LabelStore, manifest: Manifest, stop: bool) -> None:
    """Warn where two stores differ, or raise DataError where `stop` is set and it is more than rounding."""
    if found := label_difference(one, other, manifest):
        if stop and not found.harmless:
            raise DataError(f"{found.said}. To go on all the same, ask for on_bad_units=warn")
        log.warning("%s", found.said)


def _shift(one_N: np.ndarray, other_N: np.ndarray) -> int:
    """By how many frames `other_N` is late, if that explains most of what differs; 0 if it does not."""
    one_N, other_N = one_N[: 1 << 20], other_N[: 1 << 20]
    reach = max(_SHIFTS)
    middle_N = one_N[reach : len(one_N) - reach]
    if not len(middle_N):
        return 0
    agreement = {
        shift: float(np.mean(middle_N == other_N[reach + shift : len(other_N) - reach + shift]))
        for shift in (0, *_SHIFTS)
    }
    best = max(_SHIFTS, key=lambda shift: agreement[shift])
    return best if 1 - agreement[best] < (1 - agreement[0]) / 2 else 0


_EMPTY = 0.5  # share of utterances that are answered with nothing
_PLATEAU = 0.1  # share of the updates over which nothing but blanks is no news


def blank_problem(
    blank: float, empty: float, step: int, *, max_steps: int, head_only_steps: int = 0
) -> str | None:
    """What is wrong when CTC says little but blanks after `step` updates, and what to do; None if nothing is.

    Every CTC model says only blanks at first, and one whose encoder is frozen stays there longer, so nothing
    is said until a tenth of the updates has passed with everything learning.

    Args:
        blank: share of frames whose best symbol is the blank.
        empty: share of utterances of the development set whose answer is empty.
    """
    if empty < _EMPTY or step < min(max_steps, head_only_steps + _PLATEAU * max_steps):
        return None
    freed = (
        f"{step - head_only_steps} of them with the whole network" if head_only_steps else "from the start"
    )
    return (
        f"after {step} updates ({freed}) {empty:.0%} of the development utterances get an empty answer and "
        f"{blank:.1%} of the frames say blank: the model is still on the plateau where silence is the best "
        "guess. Look whether targets belong to their audio (stage=targets, rejected.jsonl) and whether "
        "finetune.pretrained is the model you mean; then try twice the finetune.train.lr, fewer "
        "finetune.head_only_steps, a smaller finetune.mask.prob, or more updates. From scratch, thousands of "
        "updates on the plateau are usual"
    )
