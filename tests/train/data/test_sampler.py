"""Tests of the micro-batch sampler: every row once per epoch, little padding, little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from jahubert.errors import ConfigError
from jahubert.frames import HUBERT
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.masking import seeded_rng
from jahubert.train.data.sampler import MicroBatch, Sampler
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.jobs import PlannedStage, configure_job


def reference_batches(rows, length, capacity, seed, epoch, max_rows=0):
    """Reference implementation: sort by noisy length, fill micro-batches, shuffle them."""
    rng = seeded_rng(seed, epoch, 0)
    groups, longest = [[]], 0
    for position in np.argsort(length * rng.uniform(0.97, 1.03, len(rows)), kind="stable"):
        longest = max(longest, length[position])
        full = longest * (len(groups[-1]) + 1) > capacity
        if groups[-1] and (full or len(groups[-1]) == max_rows):
            groups.append([])
            longest = length[position]
        groups[-1].append(int(rows[position]))
    order = rng.permutation(len(groups))
    return [MicroBatch(epoch, index, tuple(groups[group])) for index, group in enumerate(order)]


@pytest.mark.parametrize("max_rows", [0, 5])
@pytest.mark.parametrize("n", [1, 7, 3000])
def test_batches_match_the_reference_implementation(n, max_rows):
    rng = np.random.default_rng(n)
    rows, length = 100 + rng.permutation(n), rng.integers(5_000, 250_000, n)
    sampler = Sampler(rows, length, micro_seconds=20.0, micro_batches_per_step=2, seed=1, max_rows=max_rows)
    for epoch in (0, 3):
        assert list(sampler.epoch(epoch)) == reference_batches(rows, length, 320_000, 1, epoch, max_rows)


def test_every_row_occurs_once_with_little_padding():
    length = np.random.default_rng(0).integers(16_000, 160_000, 500)
    sampler = Sampler(np.arange(100, 600), length, micro_seconds=40.0, micro_batches_per_step=2, seed=1)
    epoch = list(sampler.epoch(0))
    assert sorted(row for micro in epoch for row in micro.rows) == list(range(100, 600))
    padded = [max(length[row - 100] for row in micro.rows) * len(micro.rows) for micro in epoch]
    assert max(padded) <= 40 * 16_000
    assert sampler.padding() == pytest.approx(1 - length.sum() / sum(padded)) and sampler.padding() < 0.03
    assert list(sampler.epoch(1)) != epoch
    stream = sampler.stream(0, len(epoch) - 1)
    assert [next(stream), next(stream)] == [epoch[-1], sampler.epoch(1)[0]]
    assert [list(sampler.epoch(0).for_rank(rank, 3)) for rank in range(3)] == [epoch[r::3] for r in range(3)]


def test_too_long_utterance_is_rejected():
    with pytest.raises(ConfigError, match=r"micro_seconds=1.0.*2.00 s"):
        Sampler(np.array([0]), np.array([32_000]), micro_seconds=1.0, micro_batches_per_step=1, seed=0)


def bytes_per_row(n: int) -> tuple[float, float]:
    """Return the retained and the peak memory per row of an epoch with `n` rows."""
    length = np.random.default_rng(0).integers(16_000, 100_000, n)
    sampler = Sampler(np.arange(n), length, micro_seconds=87.5, micro_batches_per_step=32, seed=1)
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
    retained, peak = bytes_per_row(5_000_000)  # tuples of Python integers need 40 or more
    assert retained < 12 and peak < 32


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["tofugu", "demo"])
def test_recipes_have_little_padding(recipe, tmp_path, request):
    """Padding is below 3 % for real length distributions and the recipe's batch sizes."""
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
        sizes = {
            "micro_seconds": config.train.micro_seconds,
            "micro_batches_per_step": config.train.micro_batches_per_step,
        }
        sampler = Sampler(np.arange(len(length)), length, seed=config.seed, **sizes)
        assert len(length) > 500 and max(sampler.padding(epoch) for epoch in range(3)) < 0.03
