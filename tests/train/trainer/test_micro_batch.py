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
from jahubert.train.trainer.micro_batch import activation_bytes, automatic_micro_seconds
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
    for micro_seconds, processes in ((12.0, 1), (5.0, 1), (1.5, 1), (None, 3), (5.0, 8)):
        n, other_rows, other_loss, other = gradients(corpus, micro_seconds, processes)
        assert n % processes == 0 and (n > n_whole or micro_seconds == 12.0)
        assert other_rows == rows
        assert other_loss == pytest.approx(loss, rel=1e-5)
        assert float((other - whole).norm() / whole.norm()) < 1e-5


def test_training_does_not_depend_on_micro_seconds(corpus, tmp_path):
    curves = []
    for micro_seconds in (None, 3.0):
        torch.manual_seed(0)
        module = Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
        config = replace(CONFIG, batch_seconds=24.0, groups=2, micro_seconds=micro_seconds, log_every=1)
        out = tmp_path / str(micro_seconds)
        out.mkdir()
        train(module, noise_pretraining(corpus, micro_seconds), config, out)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        curves.append([[row[key] for key in ("loss", "penalty", "grad_norm")] for row in rows])
    assert len(curves[0]) == 4
    assert np.array(curves[1]) == pytest.approx(np.array(curves[0]), rel=1e-4)


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


@pytest.mark.parametrize(
    ("model", "batch_seconds", "gigabytes", "expected"),
    [
        (HubertConfig.base(), 2800.0, 80, 350.0),
        (HubertConfig.base(), 2800.0, 24, 350.0),
        (HubertConfig.base(), 2800.0, None, 87.5),  # a CPU
        (HubertConfig.large(), 7200.0, 80, 450.0),
        (HubertConfig.xlarge(), 5760.0, 80, 360.0),
        (HubertConfig.base(), 30.0, None, 30.0),
        (HubertConfig.xlarge(), 5760.0, 16, 15.6),  # length of the longest utterance, which may not fit
    ],
)
def test_automatic_micro_seconds(model, batch_seconds, gigabytes, expected):
    seconds = automatic_micro_seconds(
        TrainConfig(batch_seconds=batch_seconds),
        model,
        longest=15.6,
        memory_bytes=None if gigabytes is None else gigabytes * 1e9,
        precision=torch.bfloat16,
        n_devices=1,
    )
    assert seconds == pytest.approx(expected)


def test_automatic_micro_seconds_grow_with_memory():
    model, large = HubertConfig.large(), TrainConfig(batch_seconds=7200.0)
    sizes = [
        automatic_micro_seconds(
            large, model, longest=15.6, memory_bytes=gigabytes * 1e9, precision=torch.bfloat16, n_devices=8
        )
        for gigabytes in (16, 24, 40)
    ]
    assert sizes == sorted(sizes) and 50 < sizes[0] < sizes[1] < 450 == sizes[2]
