"""Tests of gradient synchronization with DDP, in a process group of one process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from fixtures.small_training import CONFIG, QUIET, UNITS, Noise
from torch.nn.parallel import DistributedDataParallel

from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer.trainer import _TrainingRun


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_a_block_are_complete_before_the_backward_pass_of_the_previous_block(
    process_group, tmp_path, precision
):
    """Otherwise, reducing them would not overlap with the backward pass."""
    torch.manual_seed(0)
    module = Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    run = _TrainingRun(module, Noise(), replace(CONFIG, precision=precision), tmp_path)
    run.parallel.wrapped = DistributedDataParallel(module)
    ready: list[int] = []
    for number, block in enumerate(module.blocks):
        for parameter in block.parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, number=number: ready.append(number))
    run.train_step()
    run.close()
    n_parameters = len(list(module.blocks[0].parameters()))
    steps = len(ready) // (n_parameters * len(module.blocks))
    assert steps == 2  # two micro-batches, of which the last one synchronizes gradients
    assert ready == [number for number in (2, 1, 0) for _ in range(n_parameters)] * steps
