"""Error rates and cluster quality against truth worked out by hand or by brute force."""

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
    Errors,
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


def test_pairs_are_both_sequences_along_a_shortest_way():
    rng = np.random.default_rng(1)
    for _ in range(60):
        said, heard = (tuple(rng.choice(list("aiueo"), rng.integers(0, 9))) for _ in range(2))
        steps = align(said, heard)
        assert tuple(a for a, _ in steps if a is not None) == said
        assert tuple(b for _, b in steps if b is not None) == heard
        assert sum(a != b for a, b in steps) == brute_distance(said, heard)


def test_edits_equal_brute_force_and_jiwer():
    rng = np.random.default_rng(0)
    for _ in range(150):
        said, heard = (tuple(rng.choice(list("aiueoN"), rng.integers(0, 12))) for _ in range(2))
        found = count_errors(said, heard)
        assert found.errors == brute_distance(said, heard)
        assert found.length == len(said)
        assert found.hits + found.substitutions + found.insertions == len(heard)
        if said and heard:
            assert found.rate == pytest.approx(jiwer.wer(" ".join(said), " ".join(heard)))


def test_words_are_compared_as_tuples_of_phones():
    said, heard = [("k", "y", "o"), ("a",)], [("ky", "o"), ("a",)]
    assert count_errors(said, heard) == Errors(1, 1, 0, 0)
    assert count_errors([("a b",), (" ",)], [("a b",), (" ",)]) == Errors(2, 0, 0, 0)


def test_a_set_is_counted_by_items_and_not_by_utterances():
    total = error_rate([list("aaaa"), list("b"), []], [list("aaaa"), list("c"), list("d")])
    assert total == Errors(hits=4, substitutions=1, insertions=1, deletions=0)
    assert total.rate == pytest.approx(2 / 5)
    assert count_errors([], []).rate == 0
    assert error_rate([list("ab")], [[]]) == Errors(0, 0, 0, 2)
    with pytest.raises(DataError, match="2 references, but 1 hypotheses"):
        error_rate([["a"], ["b"]], [["a"]])


def test_bootstrap_covers_the_truth_as_often_as_it_says():
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
    with pytest.raises(DataError, match="no interval"):
        bootstrap_interval([], [])


def test_cluster_quality_of_a_table_worked_out_by_hand():
    # frames        unit 0   unit 1   unit 2
    # phone 0          6        2        0
    # phone 1          1        1        2
    table = [[6, 2, 0], [1, 1, 2]]
    phones = np.array([p for p in range(2) for k in range(3) for _ in range(table[p][k])])
    units = np.array([k for p in range(2) for k in range(3) for _ in range(table[p][k])])
    assert joint_counts(phones, units, 2, 3).tolist() == table
    found = cluster_quality(joint_counts(phones, units, 2, 3))
    assert found["phone_purity"] == pytest.approx((6 + 2 + 2) / 12)
    assert found["cluster_purity"] == pytest.approx((6 + 2) / 12)
    cells = {(8, 7): 6, (8, 3): 2, (4, 7): 1, (4, 3): 1, (4, 2): 2}
    mutual = sum(n / 12 * math.log(n * 12 / (p * k)) for (p, k), n in cells.items())
    entropy = -(8 / 12 * math.log(8 / 12) + 4 / 12 * math.log(4 / 12))
    assert found["pnmi"] == pytest.approx(mutual / entropy)


def test_cluster_quality_at_its_ends():
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


def test_phone_at_the_middle_of_each_frame():
    alignment = [Phone("k", 300, 640), Phone("a", 640, 900), Phone("N", 1300, 5000)]
    # middles of HuBERT frames: 200, 520, 840, 1160, 1480
    assert phone_frames(alignment, 5, HUBERT) == [None, "k", "a", None, "N"]
    assert phone_frames(alignment, 10, MFCC)[::2] == phone_frames(alignment, 5, HUBERT)
    assert phone_frames([Phone("a", 200, 520)], 2, HUBERT) == ["a", None]  # the end is exclusive
    assert phone_frames([], 2, HUBERT) == [None, None]
