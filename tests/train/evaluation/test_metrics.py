"""Tests of error rates and cluster quality against values computed by hand or by brute force."""

from __future__ import annotations

import functools
import math

import jiwer
import numpy as np
import pytest

from jahubert.errors import DataError
from jahubert.frames import HUBERT, MFCC
from jahubert.train.data.manifest import Phone
from jahubert.train.evaluation.metrics import (
    ErrorCounts,
    align,
    bootstrap_interval,
    cluster_quality,
    count_errors,
    error_rate,
    joint_counts,
    phone_frames,
)


def brute_distance(a: tuple, b: tuple) -> int:
    @functools.cache
    def distance(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        )

    return distance(len(a), len(b))


def test_alignment_has_minimum_distance():
    rng = np.random.default_rng(1)
    for _ in range(60):
        reference, hypothesis = (tuple(rng.choice(list("aiueo"), rng.integers(0, 9))) for _ in range(2))
        pairs = align(reference, hypothesis)
        counts = count_errors(reference, hypothesis)
        assert tuple(a for a, _ in pairs if a is not None) == reference
        assert tuple(b for _, b in pairs if b is not None) == hypothesis
        assert sum(a != b for a, b in pairs) == brute_distance(reference, hypothesis)
        assert sum(a is None for a, _ in pairs) == counts.insertions
        assert sum(b is None for _, b in pairs) == counts.deletions
        assert sum(a == b for a, b in pairs) == counts.hits


def test_error_counts_equal_brute_force_and_jiwer():
    rng = np.random.default_rng(0)
    for _ in range(150):
        reference, hypothesis = (tuple(rng.choice(list("aiueoN"), rng.integers(0, 12))) for _ in range(2))
        counts = count_errors(reference, hypothesis)
        assert counts.errors == brute_distance(reference, hypothesis)
        assert counts.length == len(reference)
        assert counts.hits + counts.substitutions + counts.insertions == len(hypothesis)
        if reference and hypothesis:
            assert counts.rate == pytest.approx(jiwer.wer(" ".join(reference), " ".join(hypothesis)))


def test_words_are_compared_as_tuples_of_phones():
    reference, hypothesis = [("k", "y", "o"), ("a",)], [("ky", "o"), ("a",)]
    assert count_errors(reference, hypothesis) == ErrorCounts(1, 1, 0, 0)
    assert count_errors([("a b",), (" ",)], [("a b",), (" ",)]) == ErrorCounts(2, 0, 0, 0)


def test_rate_of_a_set_is_weighted_by_reference_length():
    total = error_rate([list("aaaa"), list("b"), []], [list("aaaa"), list("c"), list("d")])
    assert total == ErrorCounts(hits=4, substitutions=1, insertions=1, deletions=0)
    assert total.rate == pytest.approx(2 / 5)
    assert count_errors([], []).rate == 0
    assert error_rate([list("ab")], [[]]) == ErrorCounts(0, 0, 0, 2)
    with pytest.raises(DataError, match=r"references \(2\)"):
        error_rate([["a"], ["b"]], [["a"]])


def test_bootstrap_interval_has_nominal_coverage():
    rng = np.random.default_rng(1)
    inside = 0
    for trial in range(120):
        lengths = rng.integers(5, 40, 200)
        errors = rng.binomial(lengths, 0.1)
        low, high = bootstrap_interval(errors, lengths, seed=trial, n=300)
        assert low < errors.sum() / lengths.sum() < high
        inside += low <= 0.1 <= high
    assert 0.88 <= inside / 120 <= 0.99
    assert bootstrap_interval(errors, lengths, 5) == bootstrap_interval(errors, lengths, 5)
    assert bootstrap_interval(errors, lengths, 5) != bootstrap_interval(errors, lengths, 6)
    assert bootstrap_interval([1, 1], [10, 10]) == (0.1, 0.1)
    with pytest.raises(DataError, match="interval"):
        bootstrap_interval([], [])


def test_cluster_quality_of_a_small_table_is_correct():
    # Frames:       unit 0   unit 1   unit 2
    # phone 0          6        2        0
    # phone 1          1        1        2
    table = [[6, 2, 0], [1, 1, 2]]
    phones = np.array([p for p in range(2) for k in range(3) for _ in range(table[p][k])])
    units = np.array([k for p in range(2) for k in range(3) for _ in range(table[p][k])])
    assert joint_counts(phones, units, 2, 3).tolist() == table
    quality = cluster_quality(joint_counts(phones, units, 2, 3))
    assert quality["phone_purity"] == pytest.approx((6 + 2 + 2) / 12)
    assert quality["cluster_purity"] == pytest.approx((6 + 2) / 12)
    cells = {(8, 7): 6, (8, 3): 2, (4, 7): 1, (4, 3): 1, (4, 2): 2}
    mutual = sum(n / 12 * math.log(n * 12 / (p * k)) for (p, k), n in cells.items())
    entropy = -(8 / 12 * math.log(8 / 12) + 4 / 12 * math.log(4 / 12))
    assert quality["pnmi"] == pytest.approx(mutual / entropy)


def test_cluster_quality_reaches_its_limits():
    rng = np.random.default_rng(0)
    phones = rng.integers(0, 40, 20_000)
    assert cluster_quality(joint_counts(phones, 39 - phones, 40, 41)) == pytest.approx(
        {"phone_purity": 1, "cluster_purity": 1, "pnmi": 1}
    )
    assert cluster_quality(joint_counts(phones, rng.integers(0, 5, 20_000), 40, 5))["pnmi"] < 0.01
    assert cluster_quality(joint_counts(np.zeros(9), np.arange(9), 1, 9))["pnmi"] == 0
    for wrong in (
        (phones, phones[:-1]),
        (phones[:0], phones[:0]),
        (phones - 1, phones),
        (phones, phones + 1),
    ):
        with pytest.raises(DataError):
            joint_counts(*wrong, 40, 40)


def test_phone_frames_take_the_phone_at_the_frame_center():
    alignment = [Phone("k", 300, 640), Phone("a", 640, 900), Phone("N", 1300, 5000)]
    # The centers of HuBERT frames are 200, 520, 840, 1160 and 1480.
    assert phone_frames(alignment, 5, HUBERT) == [None, "k", "a", None, "N"]
    assert phone_frames(alignment, 10, MFCC)[::2] == phone_frames(alignment, 5, HUBERT)
    assert phone_frames([Phone("a", 200, 520)], 2, HUBERT) == ["a", None]  # phone ends are exclusive
    assert phone_frames([], 2, HUBERT) == [None, None]
