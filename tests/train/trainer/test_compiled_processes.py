"""Tests of compiled blocks together with activation checkpointing, DDP and FSDP2.

The test also runs this file as a script: `torchrun --nproc-per-node 2 FILE FOLDER`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.small_training import CONFIG, QUIET, UNITS, noise_corpus, noise_pretraining
from fixtures.traceable_flash import by_mask
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from jahubert.model.kernels import attention, packing
from jahubert.train.experiment import distributed
from jahubert.train.stages.pretrain import Pretrainer
from jahubert.train.trainer.trainer import train

VARIANTS = {
    "plain": {},
    "ddp": {"compile": True},
    "ddp-recompute": {"compile": True, "recompute": True},
    "fsdp": {"compile": True, "sharded": True},
    "fsdp-recompute": {"compile": True, "sharded": True, "recompute": True},
}


def pretrain(corpus: Any, out: Path, name: str) -> dict[str, Tensor]:
    """Train for two updates of several micro-batches. The initial weights are equal in all processes."""
    out.mkdir(exist_ok=True)
    sizes = {"batch_seconds": 24.0, "groups": 2, "micro_seconds": 5.0}
    config = replace(CONFIG, **sizes, max_steps=2, log_every=1, precision="bf16", **VARIANTS[name])
    torch.manual_seed(0)
    module = Pretrainer(QUIET, UNITS, unit_dim=8, temperature=0.1, penalty=10.0, seed=3)
    train(module, noise_pretraining(corpus, 5.0, config.batch_sizes.one_shape), config, out)
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.slow
def test_compiled_blocks_with_checkpointing_in_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = str(Path(__file__).parents[2])
    done = subprocess.run(
        [*command, __file__, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = load_file(tmp_path / "plain.safetensors")
    losses = [row["loss"] for row in metrics(tmp_path / "plain")]
    for name in list(VARIANTS)[1:]:
        rows = metrics(tmp_path / name)
        graphs = [row["timing"]["compiled_graphs"] for row in rows]
        assert graphs[0] > 0 and graphs[1:] == [0], (name, graphs)
        assert [row["loss"] for row in rows] == pytest.approx(losses, rel=2e-3)
        weights = load_file(tmp_path / f"{name}.safetensors")
        assert weights.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(weights[key], value, rtol=0.02, atol=5e-3)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main(folder: Path) -> None:
    packing.has_flash_attention = lambda device: True
    attention.flash_attention = by_mask
    compile, backend = torch.compile, CompileCounterWithBackend("aot_eager")
    torch.compile = lambda model, **options: compile(model, backend=backend)
    with distributed.process_group():
        corpus_folder = folder / f"corpus-{distributed.rank()}"
        corpus_folder.mkdir()
        corpus = noise_corpus(corpus_folder)
        for name in VARIANTS:
            torch._dynamo.reset()
            weights = pretrain(corpus, folder / name, name)
            if distributed.rank() == 0:
                save_file(weights, folder / f"{name}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
