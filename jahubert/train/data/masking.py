"""Masks of randomly placed spans of frames or channels (wav2vec 2.0, section 3.1)."""

from __future__ import annotations

import numpy as np


def seeded_rng(*key: int) -> np.random.Generator:
    """Create a random generator that is determined by `key`, for example (seed, epoch, utterance)."""
    return np.random.default_rng(np.random.SeedSequence([number & 0xFFFFFFFF for number in key]))


def span_mask(
    length: int, prob: float, span: int, rng: np.random.Generator, min_spans: int = 0
) -> np.ndarray:
    """Draw a bool mask (length,) that is True inside randomly placed spans.

    The number of spans is `prob * length / span`, randomly rounded up or down, and at least `min_spans`. If
    `prob` is zero, there are no spans. Start positions are drawn without replacement. Because spans may
    overlap, `prob=0.8` with `span=10` masks about 57 % of the positions. The mask is drawn as in fairseq's
    `compute_mask_indices` with "static" spans, except that the rows of a batch may have different numbers of
    masked positions. At least one position remains unmasked: if the spans do not fit, they are shortened and
    reduced in number.
    """
    mask = np.zeros(length, dtype=bool)
    n_spans = max(min_spans, int(prob * length / span + rng.random()))
    n_spans = min(n_spans, length - 1)
    if prob <= 0 or n_spans <= 0:
        return mask
    span = min(span, length - n_spans)
    starts = rng.choice(length - span, size=min(n_spans, length - span), replace=False)
    for start in starts:
        mask[start : start + span] = True
    return mask
