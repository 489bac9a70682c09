"""Checkpoints of the default training engine.

`torch.distributed.checkpoint` (DCP) saves them from all processes and loads them on any number of processes,
sharded or not. A checkpoint gets its name `step_N` when it is complete. `run.json`, written
last, holds the size of every file, so that a checkpoint truncated by a power failure is recognized.
"""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from jahubert.errors import DataError, StaleError
from jahubert.formats.atomic import atomic_folder
from jahubert.train.experiment import distributed
from jahubert.train.experiment.provenance import read_record, write_json
from jahubert.train.trainer.checkpoint_reader import CheckpointPlanner, CheckpointReader
from jahubert.train.trainer.optim import TrainConfig

log = logging.getLogger(__name__)


def checkpoint_folder(out: Path, engine: str) -> Path:
    """The folder of an engine's checkpoints under `out`.

    Raises:
        StaleError: it has checkpoints of another engine, which this one cannot read.
    """
    folders = {"torch": out / "checkpoints", "fairseq2": out / "checkpoints_fairseq2"}
    for other, folder in folders.items():
        if other != engine and any(folder.glob("step_*[0-9]")):
            raise StaleError(
                f"{folder}: checkpoints of engine={other}; set train.engine={other} to resume, or delete "
                f"{out} to start again with engine={engine}"
            )
    return folders[engine]


class Checkpoints:
    """The checkpoints of one run; methods are called in all processes together."""

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config = folder, config

    def intact(self) -> list[Path]:
        """Complete and undamaged checkpoints, the newest last."""
        return [path for path in _by_step(self.folder) if not _damage(path)]

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
    ) -> None:
        """Save a checkpoint and delete those that are no longer kept.

        Args:
            run: JSON-ready state of the engine besides weights and optimizer state.
        """
        final = self.folder / f"step_{step:07d}"
        if distributed.rank0_broadcast(lambda: final.exists() and not _damage(final)):
            return
        try:
            with ExitStack() as stack:  # rank 0 makes and renames the folder that all ranks write into
                folder = distributed.rank0_broadcast(lambda: stack.enter_context(atomic_folder(final)))
                weights, moments = get_state_dict(module, optimizer)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # DCP warns when there is a single process
                    dcp.save({"model": weights, "optimizer": moments}, checkpoint_id=folder)
                if distributed.rank() == 0:
                    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
                    write_json(folder / "run.json", run | {"sizes": sizes})
        except BaseException:  # torch's CheckpointException is not an Exception
            if distributed.rank() == 0:
                intact = self.intact()
                kept = f"{intact[-1]} is kept" if intact else "there is no earlier checkpoint"
                log.error("saving the checkpoint of step %d failed; %s", step, kept)
            raise
        if distributed.rank() == 0:
            self._delete_old()
        distributed.barrier()

    def _delete_old(self) -> None:
        """Delete all but the newest `keep_last` and those of every `keep_every` steps."""
        every = self.config.keep_every
        for old in self.intact()[: -self.config.keep_last]:
            if not every or int(old.name.removeprefix("step_")) % every:
                shutil.rmtree(old)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest intact checkpoint, if there is one, and return the `run` that was saved with it.

        Raises:
            DataError: the checkpoint could not be read.
        """
        if (newest := distributed.rank0_broadcast(self._newest)) is None:
            return None
        weights, moments = get_state_dict(module, optimizer)
        state: dict[str, Any] = {"model": weights, "optimizer": moments}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                reader = CheckpointReader(newest)
                dcp.load(state, storage_reader=reader, planner=CheckpointPlanner())
        except (Exception, CheckpointException) as error:  # the latter is not an Exception
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise DataError(
                f"{newest}: unreadable checkpoint ({reason.strip()}); delete this folder to resume from the "
                "previous checkpoint"
            ) from error
        set_state_dict(
            module, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        return read_record(newest / "run.json")

    def _newest(self) -> Path | None:
        for path in reversed(_by_step(self.folder)):
            if not (damage := _damage(path)):
                return path
            log.warning("%s: damaged checkpoint ignored (%s)", path, damage)
        return None


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*[0-9]"), key=lambda path: int(path.name.removeprefix("step_")))


def _damage(checkpoint: Path) -> str:
    """A description of the damage to a checkpoint, judged by file sizes; empty if it is intact."""
    try:
        sizes = json.loads((checkpoint / "run.json").read_text(encoding="utf-8")).get("sizes", {})
        for name, size in sizes.items():
            actual = (checkpoint / name).stat().st_size
            if actual != size:
                return f"{name} has {actual} bytes instead of {size}"
    except (OSError, ValueError) as error:
        return f"{error}"
    return ""
