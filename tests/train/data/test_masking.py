"""Tests of span masks against fairseq's rule."""

import numpy as np
import pytest

from jahubert.train.data.masking import seeded_rng, span_mask


def test_masked_share_matches_fairseq():
    """A simulation of fairseq's rule masks 56.6 % of 781 frames and 57.3 % of 99 frames."""
    for length, share in ((781, 0.566), (99, 0.573)):
        shares = [span_mask(length, 0.8, 10, seeded_rng(seed), 2).mean() for seed in range(400)]
        assert np.mean(shares) == pytest.approx(share, abs=0.01)


@pytest.mark.parametrize("length", range(1, 40))
def test_short_utterances_keep_an_unmasked_frame(length):
    for seed in range(20):
        mask = span_mask(length, 0.8, 10, seeded_rng(seed), min_spans=2)
        assert mask.shape == (length,) and not mask.all()
        assert mask.any() or length < 2


def test_spans_are_contiguous_and_zero_probability_masks_nothing():
    mask = span_mask(100, 0.1, 10, np.random.default_rng(0))
    assert mask.sum() in (0, 10, *range(11, 21))
    runs = np.flatnonzero(np.diff(np.concatenate([[0], mask, [0]])))
    assert all(end - start >= 10 for start, end in runs.reshape(-1, 2))
    assert not span_mask(100, 0.0, 10, np.random.default_rng(0)).any()


def test_mask_is_a_function_of_the_key():
    assert np.array_equal(
        span_mask(300, 0.8, 10, seeded_rng(1, 2, 3)), span_mask(300, 0.8, 10, seeded_rng(1, 2, 3))
    )
    assert not np.array_equal(
        span_mask(300, 0.8, 10, seeded_rng(1, 2, 3)), span_mask(300, 0.8, 10, seeded_rng(1, 2, 4))
    )
