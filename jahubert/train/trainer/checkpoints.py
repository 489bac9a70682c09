"""Checkpoints of the default training engine.

`torch.distributed.checkpoint` (DCP) saves them from all processes and loads them on any number of processes,
sharded or not. A checkpoint gets its name `step_N` when it is complete. `run.json`, written last, holds the
sizes and checksums of all files, so that a checkpoint that was truncated or damaged later is not resumed.
"""

from __future__ import annotations

import logging
import math
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
from jahubert.formats.atomic import atomic_folder, remove_leftovers
from jahubert.train.experiment import distributed
from jahubert.train.experiment.checksums import content_crc32, describe_outputs, verify_outputs
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
                    state = run | {"files": describe_outputs(folder)}
                    write_json(folder / "run.json", state | {"crc32": content_crc32(state)})
        except BaseException:  # torch's CheckpointException is not an Exception
            if distributed.rank() == 0:
                intact = self.intact()
                kept = f"{intact[-1]} is kept" if intact else "there is no earlier checkpoint"
                log.error("saving the checkpoint of step %d failed; %s", step, kept)
            raise
        if distributed.rank() == 0:
            self._delete_old(final)
        distributed.barrier()

    def _delete_old(self, newest: Path) -> None:
        """Delete all but the newest `keep_last` and those of every `keep_every` steps, and leftovers.

        Args:
            newest: the checkpoint that was saved or loaded last; later ones are not counted.
        """
        remove_leftovers(self.folder)
        every = self.config.keep_every
        counted = [path for path in self.intact() if _step(path) <= _step(newest)]
        for old in counted[: -self.config.keep_last]:
            if not every or _step(old) % every:
                old.rename(
                    old.with_name(f"{old.name}.deleted")
                )  # never resumed if it is deleted only in part
        for deleted in self.folder.glob("step_*.deleted"):
            shutil.rmtree(deleted)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest intact checkpoint, if there is one, and return the `run` that was saved with it.

        Raises:
            DataError: the checkpoint could not be read.
        """
        newest = distributed.rank0_broadcast(self._newest)
        if newest is None:
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
            damage = _damage(path, contents=True)
            if not damage:
                self._delete_old(path)  # a killed run may not have come to it
                return path
            log.warning("%s: damaged checkpoint ignored (%s)", path, damage)
        return None


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*[0-9]"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def _damage(checkpoint: Path, contents: bool = False) -> str:
    """A description of the damage to a checkpoint, judged by file sizes; empty if it is intact.

    Args:
        contents: also compare checksums, which reads all files.
    """
    try:
        state = read_record(checkpoint / "run.json")
        crc32 = state.pop("crc32", None)
        if crc32 is not None and crc32 != content_crc32(state):
            return "run.json: checksum differs"
        verify_outputs(checkpoint, state.get("files", {}), max_bytes=math.inf if contents else 0)
    except (OSError, DataError) as error:
        return f"{error}"
    return ""
