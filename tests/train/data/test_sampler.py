"""Tests of the micro-batch sampler: one occurrence per row and epoch, little padding, little memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from jahubert.errors import ConfigError
from jahubert.frames import HUBERT
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.masking import seeded_rng
from jahubert.train.data.sampler import BatchSizes, MicroBatch, Sampler, groups_per_update
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.jobs import PlannedStage, configure_job


def reference_batches(rows, length, capacity, seed, epoch):
    """Sort by noisy length, fill groups, balance the last two and shuffle all groups, as a reference."""
    rng = seeded_rng(seed, epoch, 0)
    groups, longest = [[]], 0
    for position in np.argsort(length * rng.uniform(0.97, 1.03, len(rows)), kind="stable"):
        longest = max(longest, length[position])
        full = longest * (len(groups[-1]) + 1) > capacity
        if groups[-1] and full:
            groups.append([])
            longest = length[position]
        groups[-1].append(position)
    while len(groups) > 1 and len(groups[-2]) > len(groups[-1]) + 1:
        larger = [groups[-2][-1], *groups[-1]]
        if len(larger) * max(length[larger]) > capacity:
            break
        groups[-2:] = [groups[-2][:-1], larger]
    order = rng.permutation(len(groups))
    return [
        MicroBatch(epoch, index, tuple(int(row) for row in rows[groups[group]]))
        for index, group in enumerate(order)
    ]


def padding(sampler, number):
    """Return the fraction of padding in the groups of an epoch."""
    groups = [sampler.epoch(number).lengths(index) for index in range(len(sampler.epoch(number)))]
    return 1 - sum(lengths.sum() for lengths in groups) / sum(len(n) * n.max() for n in groups)


@pytest.mark.parametrize("n", [1, 7, 3000])
def test_batches_match_the_reference_implementation(n):
    rng = np.random.default_rng(n)
    rows, length = 100 + rng.permutation(n), rng.integers(5_000, 250_000, n)
    sampler = Sampler(rows, length, BatchSizes(20.0, 2), seed=1)
    for epoch in (0, 3):
        assert list(sampler.epoch(epoch)) == reference_batches(rows, length, 320_000, 1, epoch)


def test_every_row_occurs_once_with_little_padding():
    length = np.random.default_rng(0).integers(16_000, 160_000, 500)
    sampler = Sampler(np.arange(100, 600), length, BatchSizes(40.0, 2), seed=1)
    epoch = list(sampler.epoch(0))
    assert sorted(row for micro in epoch for row in micro.rows) == list(range(100, 600))
    padded = [max(length[row - 100] for row in micro.rows) * len(micro.rows) for micro in epoch]
    assert max(padded) <= 40 * 16_000
    assert padding(sampler, 0) == pytest.approx(1 - length.sum() / sum(padded)) and padding(sampler, 0) < 0.03
    assert list(sampler.epoch(1)) != epoch
    stream = sampler.stream(0, len(epoch) - 1)
    assert [next(stream), next(stream)] == [epoch[-1], sampler.epoch(1)[0]]
    assert [list(sampler.single_pass(rank, 3)) for rank in range(3)] == [epoch[r::3] for r in range(3)]


@pytest.mark.parametrize("sizes", [BatchSizes(1.0), BatchSizes(8.0, 1, 1.0)])
def test_too_long_utterance_is_rejected(sizes):
    with pytest.raises(ConfigError, match=r"(batch|micro)_seconds.*2.00 s"):
        Sampler(np.array([0]), np.array([32_000]), sizes, seed=0)


@pytest.mark.parametrize("n_samples", [16_002, 16_005, 262_143])
def test_size_equal_to_the_longest_utterance_is_accepted(n_samples):
    """The product of the seconds and the sampling rate is not always an integer."""
    seconds = n_samples / 16_000
    sampler = Sampler(np.array([0]), np.array([n_samples]), BatchSizes(seconds, 1, seconds), seed=0)
    assert sampler.group_capacity == sampler.capacity == n_samples


@pytest.mark.parametrize(
    ("batch_seconds", "groups"), [(2800, 8), (1600, 8), (7200, 16), (5760, 16), (200, 2), (30, 1), (0.5, 1)]
)
def test_number_of_groups(batch_seconds, groups):
    assert groups_per_update(batch_seconds) == groups


def test_update_does_not_depend_on_micro_batches_and_processes():
    rng = np.random.default_rng(0)
    length = np.clip(rng.lognormal(1.5, 0.5, 12_000) * 16_000, 32_000, 250_000).astype(int)
    whole = Sampler(np.arange(12_000), length, BatchSizes(350.0, 8), seed=1)
    for cursor in (0, 8, len(whole.epoch(0)) - 3):  # the last update continues in the next epoch
        rows = sorted(row for micro in whole.update(0, cursor) for row in micro.rows)
        for micro_seconds, processes in (
            (350.0, 1),
            (87.5, 1),
            (20.0, 1),
            (None, 32),
            (87.5, 3),
            (None, 100),
        ):
            sampler = Sampler(np.arange(12_000), length, BatchSizes(350.0, 8, micro_seconds), seed=1)
            micro_batches = sampler.update(0, cursor, processes)
            assert sorted(row for micro in micro_batches for row in micro.rows) == rows
            assert len(micro_batches) % processes == 0
            padded = [max(length[list(micro.rows)]) * len(micro.rows) for micro in micro_batches]
            assert max(padded) <= (micro_seconds or 350) * 16_000
            assert 1 - length[rows].sum() / sum(padded) < 0.04
            assert len({micro.key for micro in micro_batches}) == len(micro_batches)
            assert [micro.rows for micro in micro_batches if micro.groups is None and micro.part] == []


@pytest.mark.parametrize(
    ("micro_seconds", "processes", "merged"),
    [
        (699.0, 1, 1),
        (700.0, 1, 2),
        (1300.0, 1, 2),
        (1400.0, 1, 4),
        (2800.0, 1, 8),
        (700.0, 4, 2),
        (1400.0, 4, 2),
        (700.0, 3, 1),
        (700.0, 8, 1),
        (2800.0, 32, 1),
    ],
)
def test_groups_of_similar_lengths_are_merged(micro_seconds, processes, merged):
    rng = np.random.default_rng(0)
    length = np.clip(rng.lognormal(1.5, 0.5, 12_000) * 16_000, 32_000, 250_000).astype(int)
    whole = Sampler(np.arange(12_000), length, BatchSizes(350.0, 8), seed=1)
    sampler = Sampler(np.arange(12_000), length, BatchSizes(350.0, 8, micro_seconds), seed=1)
    assert sampler.sizes.groups_per_micro_batch(processes) == merged
    groups = {micro.rows for micro in whole.update(0, 8)}
    micro_batches = sampler.update(0, 8, processes)
    assert len(micro_batches) % processes == 0
    if merged > 1:
        assert [len(micro.groups) for micro in micro_batches] == [merged] * (8 // merged)
        assert {rows for micro in micro_batches for rows in micro.groups} == groups
        assert all(micro.rows == sum(micro.groups, ()) for micro in micro_batches)
        longest = [max(length[list(rows)]) for micro in micro_batches for rows in micro.groups]
        assert longest == sorted(longest)
        assert len({micro.key for micro in micro_batches}) == len(micro_batches)
    evaluated = [
        row for rank in range(processes) for m in sampler.single_pass(rank, processes) for row in m.rows
    ]
    assert sorted(evaluated) == list(range(12_000))


def test_groups_of_two_epochs_are_not_merged():
    """Crops and masks depend on the epoch, and a micro-batch has only one."""
    sampler = Sampler(np.arange(12), np.full(12, 16_000), BatchSizes(2.0, 4, 8.0), seed=1)
    for cursor, n in ((2, 1), (4, 4)):
        micro_batches = sampler.update(0, cursor)
        assert len(micro_batches) == n
        assert sum(len(micro.rows) for micro in micro_batches) == 8
    assert [len(micro.rows) for micro in sampler.single_pass()] == [8, 4]


def test_waveforms_of_merged_groups_have_little_padding():
    """The fractions are those in LOG.md. Only waveforms are padded: frames are packed."""
    rng = np.random.default_rng(0)
    length = np.clip(rng.lognormal(1.5, 0.5, 100_000) * 16_000, 32_000, 250_000).astype(int)
    for micro_seconds, expected in ((350.0, 0.028), (700.0, 0.136)):
        sampler = Sampler(np.arange(100_000), length, BatchSizes(350.0, 8, micro_seconds), seed=1)
        updates = [sampler.update(0, cursor) for cursor in range(0, len(sampler.epoch(0)) - 8, 8)]
        lengths = [length[list(micro.rows)] for update in updates for micro in update]
        padded = sum(len(n) * n.max() for n in lengths)
        assert 1 - sum(n.sum() for n in lengths) / padded == pytest.approx(expected, abs=0.005)


def test_processes_without_utterances_get_fillers():
    sampler = Sampler(np.arange(3), np.full(3, 32_000), BatchSizes(8.0), seed=1)
    *utterances, first, second = sampler.update(0, 0, 5)
    assert sorted(row for micro in utterances for row in micro.rows) == [0, 1, 2]
    assert not any(micro.is_filler for micro in utterances)
    assert first == second == replace(utterances[0], is_filler=True)
    assert not any(micro.is_filler for micro in sampler.update(0, 0, 3))


def bytes_per_row(n: int) -> tuple[float, float]:
    """Return the retained and the peak memory per row for an epoch with `n` rows."""
    length = np.random.default_rng(0).integers(16_000, 100_000, n)
    sampler = Sampler(np.arange(n), length, BatchSizes(350.0, 8), seed=1)
    tracemalloc.start()
    try:
        epoch = sampler.epoch(0)
        retained, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(epoch[index].rows) for index in range(0, len(epoch), 100)) > n // 200
    return retained / n, peak / n


def test_epoch_needs_little_memory():
    retained, peak = bytes_per_row(300_000)
    assert retained < 12 and peak < 32


@pytest.mark.slow
def test_epoch_of_five_million_rows_needs_little_memory():
    retained, peak = bytes_per_row(5_000_000)  # tuples of Python integers would need at least 40
    assert retained < 12 and peak < 32


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tofugu", "demo"])
def test_recipes_have_little_padding(recipe, tmp_path, request):
    """Padding is below 3 % for realistic length distributions and the batch sizes in the recipe."""
    overrides = [f"recipe={recipe}", f"exp={tmp_path}", "stage=prepare", "prepare.check_audio=false"]
    if recipe == "tofugu":
        data = request.getfixturevalue("shared_data") / "tofugu"
        overrides.append(f"data={data}")
    runner.run(overrides)
    manifest = Manifest(tmp_path / "prepare/manifest.arrow")
    for iteration in (1, 2):
        _, config, _ = configure_job(PlannedStage("pretrain", iteration), overrides)
        length = manifest.n_samples[manifest.indices(split="train")]
        length = length[length >= config.crop.min_seconds * 16_000]
        length = np.minimum(length, HUBERT.floor(int(config.crop.max_seconds * 16_000)))
        sampler = Sampler(np.arange(len(length)), length, config.train.batch_sizes, seed=config.seed)
        assert len(length) > 500 and max(padding(sampler, epoch) for epoch in range(3)) < 0.03


@pytest.mark.parametrize("n_rows", [7, 9, 13])
def test_last_group_is_not_a_single_utterance(n_rows):
    sampler = Sampler(np.arange(n_rows), np.full(n_rows, 16_000), BatchSizes(6.0, 1), seed=0)
    sizes = [len(sampler.epoch(0)[index].rows) for index in range(len(sampler.epoch(0)))]
    assert sum(sizes) == n_rows and min(sizes) >= 3 and max(sizes) <= 6
    for cursor in range(len(sizes)):
        assert len(sampler.update(0, cursor, processes=2)) % 2 == 0
