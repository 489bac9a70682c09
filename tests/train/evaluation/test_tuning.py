"""Tests of tuning the language model weight and the word bonus."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch

from jahubert.phonemes import PhonemeSet
from jahubert.train.evaluation import tuning
from jahubert.train.experiment import distributed


def test_every_batch_of_a_grid_point_updates_the_heartbeat(monkeypatch):
    """Decoding all batches with one combination may take longer than hang_timeout_minutes."""
    updated: list[float] = []

    def search(*_: Any, **__: Any) -> list[list[Any]]:
        updated.append(distributed.last_heartbeat().updated)
        return [[SimpleNamespace(labels=[3])]]

    monkeypatch.setattr(tuning, "beam_search", search)
    fusion: Any = SimpleNamespace(reweighted=lambda lm_weight, word_bonus: None)
    batch = tuning.TuningBatch(torch.zeros(1, 2, 5), torch.tensor([2]), [[3, 4]])
    points = tuning.search_grid(fusion, [batch] * 3, PhonemeSet.standard(), 2, [0.5], [0.0])
    assert points == [tuning.GridPoint(0.5, 0.0, 0.5)]
    assert len(updated) == 3 and all(before < after for before, after in pairwise(updated))
