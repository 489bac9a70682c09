"""Tests that the validation of pretraining and fine-tuning reports progress to the watchdog."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from fixtures.small_training import MODEL, QUIET, UNITS, Noise

from jahubert.model.heads import HubertForCtc
from jahubert.phonemes import PhonemeSet
from jahubert.train.data.batches import CtcBatch
from jahubert.train.data.sampler import MicroBatch
from jahubert.train.experiment import distributed
from jahubert.train.stages import finetune, pretrain


class Targets:
    """Targets of a single word per utterance."""

    phonemes = PhonemeSet.standard()

    def words(self, row: int) -> list[tuple[str, ...]]:
        return [("a",)]


class LabeledNoise(Noise):
    """Data source of noise utterances that have one symbol each."""

    targets = Targets()

    def load(self, micro: MicroBatch) -> CtcBatch:  # type: ignore[override]
        batch = super().load(micro)
        n = len(micro.rows)
        symbol_L = torch.full((n,), 3)
        return CtcBatch(
            batch.wav_BT, batch.n_samples_B, None, None, symbol_L, torch.ones(n, dtype=torch.int64)
        )


def pretraining() -> tuple[Any, Any, Any]:
    module = pretrain.Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    return pretrain.evaluate, module, Noise()


def finetuning() -> tuple[Any, Any, Any]:
    ctc = HubertForCtc(MODEL, len(PhonemeSet.standard()))
    module = finetune.FineTuner(ctc, freeze_conv=False, head_only_steps=0, seed=0)
    return finetune.evaluate, module, LabeledNoise()


@pytest.mark.parametrize("stage", [pretraining, finetuning])
def test_every_batch_of_a_validation_updates_the_heartbeat(stage):
    """The watchdog would otherwise end a validation that is longer than hang_timeout_minutes."""
    torch.manual_seed(0)
    evaluate, module, data = stage()
    module.eval()
    updated: list[float] = []
    for block in module.blocks[:1]:
        block.register_forward_pre_hook(lambda *_: updated.append(distributed.last_heartbeat().updated))
    with torch.no_grad():
        evaluate(module, data)
    n_batches = len(list(data.sampler.single_pass()))
    assert n_batches > 2 and len(updated) == n_batches
    assert all(before < after for before, after in pairwise(updated))
