"""Checkpoints of a run of `engine`: written beside the others, renamed when whole, the oldest dropped.

`torch.distributed.checkpoint` writes them, every process its share, and reads them again on any other
number of processes, sharded or not. A folder `step_N` is whole: what a kill or a full disk left has another
name.
"""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from jahubert.errors import StaleError
from jahubert.train import ranks
from jahubert.train.optim import TrainConfig
from jahubert.train.provenance import read_record, write_json

log = logging.getLogger(__name__)


def folder_of(out: Path, engine: str) -> Path:
    """The folder of an engine's checkpoints under `out`.

    Raises:
        StaleError: another engine began there; neither can read what the other one wrote.
    """
    folders = {"torch": out / "checkpoints", "fairseq2": out / "checkpoints_fairseq2"}
    for other, folder in folders.items():
        if other != engine and any(folder.glob("step_*[0-9]")):
            raise StaleError(
                f"{folder}: this run was begun with engine={other}; continue it with that one, or delete "
                f"{out} to begin again with engine={engine}"
            )
    return folders[engine]


class Checkpoints:
    """The checkpoints of one run; all processes call its functions together."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config = folder, config

    def found(self) -> list[Path]:
        """Those that are whole, the newest last."""
        return sorted(self.folder.glob("step_*[0-9]"))

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
    ) -> None:
        """Write the checkpoint of a step; `run` is what the engine knows besides weights and moments."""
        beside, final = (self.folder / f"step_{step:07d}{end}" for end in (".tmp", ""))
        if final.exists():
            return
        if ranks.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        ranks.barrier()
        try:
            weights, moments = get_state_dict(module, optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # DCP says at length that there is one process
                dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)
            if ranks.rank() == 0:
                write_json(beside / "run.json", run)
                beside.rename(final)
        except BaseException:  # torch's CheckpointException is no Exception
            if ranks.rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)  # a full disk has room again
                last = f"{self.found()[-1]} stays" if self.found() else "there is no earlier one"
                log.error("the checkpoint of step %d could not be written; %s", step, last)
            raise
        if ranks.rank() == 0:
            self._drop()
        ranks.barrier()

    def _drop(self) -> None:
        """Delete all but the newest `keep_last` and those of every `keep_every` steps."""
        every = self.config.keep_every
        for old in self.found()[: -self.config.keep_last]:
            if not every or int(old.name.removeprefix("step_")) % every:
                shutil.rmtree(old)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest checkpoint, if there is one, and give back what `save` was given as `run`."""
        if not (found := self.found()):
            return None
        weights, moments = get_state_dict(module, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=found[-1])
        set_state_dict(
            module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return read_record(found[-1] / "run.json")
