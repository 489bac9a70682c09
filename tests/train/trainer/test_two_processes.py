"""Tests of training with two processes, and of choosing an engine without fairseq2.

The tests also run this file as a script: `torchrun --nproc-per-node 2 FILE FOLDER`.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.toy import Data, Toy
from safetensors.torch import load_file, save_file
from torch import Tensor

from jahubert.errors import MissingExtraError, StaleError
from jahubert.train.experiment import distributed
from jahubert.train.experiment.registry import ENGINES, resolve
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.trainer import Loss, Stopped, train

CONFIG = TrainConfig(
    max_steps=5, batch_seconds=24.0, groups=4, lr=0.01, precision="fp32", device="cpu", save_every=9
)

PER = itertools.count(9.0, -1.0)  # results of successive validations


class StopsAtStep(Toy):
    """Toy module that sends SIGTERM only to the last process, in step `stop_at`."""

    def __init__(self, stop_at: int | None):
        torch.manual_seed(0)
        super().__init__()
        self.stop_at = stop_at

    def forward(self, batch: Any, step: int) -> Loss:
        if step + 1 == self.stop_at and distributed.rank() == distributed.world() - 1:
            signal.raise_signal(signal.SIGTERM)
        return super().forward(batch, step)


def train_toy(out: Path, stop_at: int | None = None) -> dict[str, Tensor]:
    out.mkdir(exist_ok=True)
    module = StopsAtStep(stop_at)
    train(module, Data(groups=4), CONFIG, out)
    return module.state_dict()


def train_with_improving_validation(out: Path, stop_at: int | None = None) -> dict[str, float]:
    """Train with a validation after each step, whose result is better in each call within this process."""
    out.mkdir(exist_ok=True)
    config = replace(CONFIG, valid_every=1)
    return train(
        StopsAtStep(stop_at), Data(groups=4), config, out, validate=lambda: {"per": next(PER)}, best="per"
    )


def train_on_one_row(out: Path) -> dict[str, Tensor]:
    """Train without dropout on updates of a single utterance, and save the weights."""
    out.mkdir(exist_ok=True)
    torch.manual_seed(0)
    module = Toy()
    module.net[1].p = 0.0
    train(module, Data(groups=1, rows=1), replace(CONFIG, groups=1, log_every=1), out)
    return module.state_dict()


def test_missing_fairseq2_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fairseq2", None)  # simulates a missing package
    monkeypatch.delitem(sys.modules, "jahubert.train.trainer.fairseq2", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install '\.\[fairseq2\]'"):
        resolve("fairseq2", ENGINES, "engine")


def test_checkpoints_of_another_engine_are_rejected(tmp_path):
    (tmp_path / "checkpoints_fairseq2" / "step_3").mkdir(parents=True)
    with pytest.raises(StaleError, match="engine=fairseq2"):
        train_toy(tmp_path)


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory):
    """Folder with the results of `main` in two processes."""
    folder = tmp_path_factory.mktemp("two_processes")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "log").open("w") as log:
        torchrun = subprocess.Popen([*command, __file__, str(folder)], env=os.environ, stdout=log, stderr=log)
        try:
            status = torchrun.wait(timeout=180)
        except subprocess.TimeoutExpired:  # a hang fails the test
            torchrun.terminate()  # also ends its processes, which `kill` would leave running
            status = torchrun.wait(timeout=180)
    assert status == 0, (folder / "log").read_text()[-3000:]
    return folder


def test_signal_to_one_process_stops_all_at_the_same_step(shared_runs):
    assert (shared_runs / "stopped" / "checkpoints" / "step_0000002").is_dir()
    whole, stopped = (load_file(shared_runs / f"{name}.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)


def test_process_without_an_utterance_does_not_change_the_result(shared_runs, tmp_path):
    alone, shared = train_on_one_row(tmp_path), load_file(shared_runs / "shared.safetensors")
    assert all(torch.allclose(alone[name], shared[name], rtol=1e-6) for name in alone)
    losses = [
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").open()]
        for folder in (tmp_path, shared_runs / "shared")
    ]
    assert len(losses[0]) == CONFIG.max_steps and losses[0] == pytest.approx(losses[1])


def test_resumed_run_with_better_validation_keeps_the_best_weights(shared_runs):
    ends = [json.loads((shared_runs / f"improving_{rank}.json").read_text()) for rank in range(2)]
    assert ends == [{"per": 9.0 - (CONFIG.max_steps - 1), "best_step": CONFIG.max_steps}] * 2


def main(folder: Path) -> None:
    with distributed.process_group():
        try:
            train_toy(folder / "stopped", stop_at=2)
        except Stopped as stop:
            name = "SIGTERM" if distributed.rank() == 1 else "another process"
            if name not in str(stop) or "step 2" not in str(stop):
                raise
        else:
            raise SystemExit("the run did not stop")
        sums, all_reduce = [], distributed.all_reduce_
        distributed.all_reduce_ = lambda values: (sums.append(values), all_reduce(values))
        for name in ("stopped", "whole"):
            state = train_toy(folder / name)
            if distributed.rank() == 0:
                save_file(state, folder / f"{name}.safetensors")
        # Each step has one all-reduce for losses and stop requests. The stopped run needs three more steps.
        assert len(sums) == 3 + CONFIG.max_steps
        with suppress(Stopped):
            train_with_improving_validation(folder / "improving", stop_at=2)
        metrics = train_with_improving_validation(folder / "improving")
        (folder / f"improving_{distributed.rank()}.json").write_text(json.dumps(metrics))
        state = train_on_one_row(folder / "shared")
        if distributed.rank() == 0:
            save_file(state, folder / "shared.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
