"""Checkpoints of a run of `engine`: written beside the others, renamed when whole, the oldest dropped.

`torch.distributed.checkpoint` writes them, every process its share, and reads them again on any other
number of processes, sharded or not. What a kill or a full disk left has another name than `step_N`; what a
power failure cut short is known by the sizes in `run.json`, which is written last. Neither is continued.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from jahubert.errors import DataError, StaleError
from jahubert.train.experiment import distributed
from jahubert.train.experiment.provenance import read_record, write_json
from jahubert.train.trainer.optim import TrainConfig

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
        return [path for path in _by_step(self.folder) if not _damage(path)]

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
    ) -> None:
        """Write the checkpoint of a step; `run` is what the engine knows besides weights and moments."""
        beside, final = (self.folder / f"step_{step:07d}{end}" for end in (".tmp", ""))
        if distributed.rank0_broadcast(lambda: final.exists() and not _damage(final)):
            return
        if distributed.rank() == 0:
            for old in (beside, final):
                shutil.rmtree(old, ignore_errors=True)
        distributed.barrier()
        try:
            weights, moments = get_state_dict(module, optimizer)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # DCP says at length that there is one process
                dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=beside)
            if distributed.rank() == 0:
                sizes = {path.name: path.stat().st_size for path in beside.iterdir()}
                write_json(beside / "run.json", run | {"sizes": sizes})
                _to_disk(beside)
                beside.rename(final)
                _to_disk(self.folder)
        except BaseException:  # torch's CheckpointException is no Exception
            if distributed.rank() == 0:
                shutil.rmtree(beside, ignore_errors=True)  # a full disk has room again
                last = f"{self.found()[-1]} stays" if self.found() else "there is no earlier one"
                log.error("the checkpoint of step %d could not be written; %s", step, last)
            raise
        if distributed.rank() == 0:
            self._drop()
        distributed.barrier()

    def _drop(self) -> None:
        """Delete all but the newest `keep_last` and those of every `keep_every` steps."""
        every = self.config.keep_every
        for old in self.found()[: -self.config.keep_last]:
            if not every or int(old.name.removeprefix("step_")) % every:
                shutil.rmtree(old)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest checkpoint, if there is one, and give back what `save` was given as `run`."""
        if (newest := distributed.rank0_broadcast(self._newest)) is None:
            return None
        weights, moments = get_state_dict(module, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(state, checkpoint_id=newest)
        except (Exception, CheckpointException) as error:  # which is no Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise DataError(
                f"{newest}: this checkpoint cannot be read ({reason.strip()}); delete the folder to continue "
                "from the one before it, or from the beginning where there is none"
            ) from error
        set_state_dict(
            module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return read_record(newest / "run.json")

    def _newest(self) -> Path | None:
        for path in reversed(_by_step(self.folder)):
            if not (damage := _damage(path)):
                return path
            log.warning("%s is left out, it is damaged: %s", path, damage)
        return None


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*[0-9]"), key=lambda path: int(path.name.removeprefix("step_")))


def _damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, if anything: files are looked at, not read."""
    try:
        sizes = json.loads((checkpoint / "run.json").read_text(encoding="utf-8")).get("sizes", {})
        for name, size in sizes.items():
            if (there := (checkpoint / name).stat().st_size) != size:
                return f"{name} has {there} bytes instead of {size}"
    except (OSError, ValueError) as error:
        return f"{error}"
    return ""


def _to_disk(folder: Path) -> None:
    """Names in a folder outlive a power failure only once the folder is written, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
