"""Tests of micro-batches: updates that do not depend on them, and automatic sizes."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from fixtures.small_training import CONFIG, QUIET, UNITS, noise_corpus, noise_pretraining

from jahubert.model.hubert import HubertConfig
from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer.loader import seed_micro_batch
from jahubert.train.trainer.micro_batch import activation_bytes, effective_micro_seconds
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.trainer import train


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return noise_corpus(tmp_path_factory.mktemp("corpus"))


def gradients(corpus, micro_seconds: float | None, processes: int = 1):
    """Return the number of micro-batches, sorted rows, mean loss and gradients of the second update."""
    torch.manual_seed(0)
    module = Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    data = noise_pretraining(corpus, micro_seconds)
    micro_batches = data.sampler.update(0, 2, processes)
    total, count = 0.0, 0
    for micro in micro_batches:
        seed_micro_batch(module.seed, micro)
        loss = module(data.load(micro), 0)
        loss.total.backward()
        total, count = total + loss.total.item(), count + loss.count
    rows = sorted(row for micro in micro_batches for row in micro.rows)
    values = torch.cat([p.grad.flatten() / count for p in module.parameters() if p.grad is not None])
    return len(micro_batches), rows, total / count, values


def test_update_and_gradients_do_not_depend_on_micro_seconds(corpus):
    n_whole, rows, loss, whole = gradients(corpus, None)
    assert n_whole == 2 and len(rows) > 15
    for micro_seconds, processes, expected in (
        (24.0, 1, 1),  # two groups are merged
        (24.0, 2, 2),
        (12.0, 1, 2),
        (5.0, 1, 6),
        (1.5, 1, 23),
        (None, 3, 3),
        (5.0, 8, 8),
    ):
        n, other_rows, other_loss, other = gradients(corpus, micro_seconds, processes)
        assert n == expected
        assert other_rows == rows
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert float((other - whole).norm() / whole.norm()) < 1e-5


def test_training_does_not_depend_on_micro_seconds(corpus, tmp_path):
    curves = []
    for micro_seconds in (None, 3.0, 24.0):
        torch.manual_seed(0)
        module = Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
        config = replace(CONFIG, batch_seconds=24.0, groups=2, micro_seconds=micro_seconds, log_every=1)
        out = tmp_path / str(micro_seconds)
        out.mkdir()
        train(module, noise_pretraining(corpus, micro_seconds), config, out)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves.append([[row[key] for key in ("loss", "penalty", "grad_norm")] for row in rows])
    assert len(curves[0]) == 4
    for curve in curves[1:]:
        assert np.array(curve) == pytest.approx(np.array(curves[0]), rel=1e-4)


@pytest.mark.parametrize(
    ("model", "recompute", "counted"),
    [
        (HubertConfig.base(), False, 18.2),
        (HubertConfig.base(), True, 11.5),
        (HubertConfig.large(), False, 47.6),
        (HubertConfig.large(), True, 19.0),
        (HubertConfig.xlarge(), False, 96.4),
        (HubertConfig.xlarge(), True, 23.5),
    ],
)
def test_activation_bytes_match_the_counted_ones(model, recompute, counted):
    """`counted` is in MB per second of audio in bfloat16, as computed by `plan.memory.peak_bytes`."""
    assert activation_bytes(model, torch.bfloat16, recompute) / 1e6 == pytest.approx(counted, rel=0.06)


def micro_seconds(model, gigabytes, longest=15.6, precision=torch.bfloat16, n_devices=1, flash=True, **train):
    return effective_micro_seconds(
        TrainConfig(**train),
        model,
        longest=longest,
        memory_bytes=None if gigabytes is None else gigabytes * 1e9,
        has_flash=flash,
        precision=precision,
        n_devices=n_devices,
    )


@pytest.mark.parametrize(
    ("model", "batch_seconds", "gigabytes", "expected"),
    [
        (HubertConfig.base(), 2800.0, 80, 700.0),
        (HubertConfig.base(), 2800.0, 24, 700.0),
        (HubertConfig.base(), 2800.0, 16, 350.0),
        (HubertConfig.base(), 1600.0, 80, 400.0),
        (HubertConfig.base(), 2800.0, None, 87.5),  # a CPU
        (HubertConfig.large(), 7200.0, 80, 450.0),
        (HubertConfig.xlarge(), 5760.0, 80, 360.0),
        (HubertConfig.base(), 30.0, None, 30.0),
        (HubertConfig.xlarge(), 5760.0, 16, 15.6),  # length of the longest utterance, which may not fit
    ],
)
def test_automatic_micro_seconds(model, batch_seconds, gigabytes, expected):
    assert micro_seconds(model, gigabytes, batch_seconds=batch_seconds) == pytest.approx(expected)


def test_automatic_micro_seconds_grow_with_memory():
    large = HubertConfig.large()
    sizes = [micro_seconds(large, gigabytes, n_devices=8, batch_seconds=7200.0) for gigabytes in (16, 24, 40)]
    assert sizes == sorted(sizes) and 50 < sizes[0] < sizes[1] < 450 == sizes[2]


def test_groups_are_merged_only_if_this_is_useful():
    """Groups cannot be shared by the processes, or attention would be computed for padding."""
    base = HubertConfig.base()
    assert [micro_seconds(base, 80, n_devices=n) for n in (1, 2, 3, 4, 8, 32)] == [
        700,
        700,
        350,
        700,
        350,
        350,
    ]
    assert micro_seconds(base, 80, flash=False) == 350
    assert micro_seconds(base, 80, precision=torch.float32) == 350
    assert micro_seconds(replace(base, heads=2), 80) == 350  # too wide for flash attention
    assert micro_seconds(base, None, batch_seconds=60.0, groups=2) == 30  # a CPU


def test_given_micro_seconds_are_reduced_to_whole_groups():
    base = HubertConfig.base()
    for given, expected in ((100.0, 100), (400.0, 350), (800.0, 700), (1500.0, 1400), (2800.0, 2800)):
        assert micro_seconds(base, 80, micro_seconds=given) == expected
    assert micro_seconds(base, 80, micro_seconds=800.0, n_devices=8) == 350
