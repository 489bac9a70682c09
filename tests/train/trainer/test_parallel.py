"""Tests of gradient synchronization with DDP.

One test also runs this file as a script: `torchrun --nproc-per-node 3 FILE FOLDER`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fixtures.small_training import CONFIG, QUIET, UNITS, Noise
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

from jahubert.train.experiment import distributed
from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer.trainer import _TrainingRun, train


def pretrainer() -> Pretrainer:
    torch.manual_seed(0)
    return Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_of_a_block_are_complete_before_the_backward_pass_of_the_previous_block(
    process_group, tmp_path, precision
):
    """The all-reduce of a gradient overlaps with the backward pass only if the gradient is complete early."""
    module = pretrainer()
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


@pytest.mark.slow
def test_resumed_run_of_three_processes_is_bit_identical(tmp_path):
    """The order in which the gradients of three processes are added must not change after the first step."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, resumed = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "resumed"))
    assert whole and all(torch.equal(whole[name], resumed[name]) for name in whole)


def main(folder: Path) -> None:
    config = replace(CONFIG, save_every=1, keep_last=CONFIG.max_steps)
    with distributed.process_group():
        for name in ("whole", "resumed"):
            out, module = folder / name, pretrainer()
            out.mkdir(exist_ok=True)
            if name == "resumed" and distributed.rank() == 0:
                step = Path("checkpoints") / "step_0000001"
                shutil.copytree(folder / "whole" / step, out / step)
            distributed.barrier()
            train(module, Noise(groups=3), config, out)
            if distributed.rank() == 0:
                save_file(module.state_dict(), folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
