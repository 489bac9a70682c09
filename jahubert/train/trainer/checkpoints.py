"""Checkpoints of the default training engine.

Each process writes its part of a checkpoint with `torch.distributed.checkpoint` (DCP). The checkpoint can be
loaded by any number of processes, with or without sharding. Its folder is renamed to `step_N` once it is
complete. The last file to be written, `run.json`, contains the sizes and checksums of all other files, which
makes it possible to detect and skip truncated or damaged checkpoints.
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
    """Return the folder below `out` in which a training engine stores its checkpoints.

    Raises:
        StaleError: `out` contains checkpoints from another engine, which this engine cannot read.
    """
    folders = {"torch": out / "checkpoints", "fairseq2": out / "checkpoints_fairseq2"}
    for other, folder in folders.items():
        if other != engine and any(folder.glob("step_*[0-9]")):
            raise StaleError(
                f"{folder} was written by engine={other}; set train.engine={other} to resume, or delete "
                f"{out} to start again with engine={engine}"
            )
    return folders[engine]


class Checkpoints:
    """Store that saves, loads and deletes the checkpoints of a run.

    `save` and `load` must be called in all processes.
    """

    def __init__(self, folder: Path, config: TrainConfig):
        self.folder, self.config = folder, config
        self.damaged: set[Path] = set()  # checkpoints that `load` found damaged, set only on rank 0

    def intact(self) -> list[Path]:
        """Return the paths of the checkpoints that are not known to be damaged, oldest first.

        Only the sizes of the files are compared with those in `run.json`; `load` also verifies checksums.
        """
        return [p for p in _by_step(self.folder) if p not in self.damaged and not checkpoint_damage(p)]

    def states(self) -> list[dict[str, Any]]:
        """Return the engine state (see `save`) of each intact checkpoint."""
        return [read_record(path / "run.json") for path in self.intact()]

    def save(
        self, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, run: dict[str, Any]
    ) -> None:
        """Save a checkpoint unless there is an intact one of this step, and then delete old checkpoints.

        Args:
            run: JSON-serializable engine state other than the weights and the optimizer state.
        """
        final = self.folder / f"step_{step:07d}"
        if distributed.rank0_broadcast(
            lambda: final.exists() and not checkpoint_damage(final, contents=True)
        ):
            return
        try:
            with ExitStack() as stack:  # rank 0 creates and renames the folder; all ranks write into it
                folder = distributed.rank0_broadcast(lambda: stack.enter_context(atomic_folder(final)))
                weights, moments = get_state_dict(module, optimizer)
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # DCP warns if there is only one process
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
            self.damaged.discard(final)
            self._delete_old(final)
        distributed.barrier()

    def _delete_old(self, newest: Path) -> None:
        """Delete old checkpoints and the remains of interrupted saves and deletions.

        The newest `keep_last` checkpoints and those at multiples of `keep_every` steps are kept.

        Args:
            newest: the checkpoint that was saved or loaded last. Checkpoints of later steps are kept and do
                not count toward `keep_last`.
        """
        remove_leftovers(self.folder)
        every = self.config.keep_every
        counted = [path for path in self.intact() if _step(path) <= _step(newest)]
        for old in counted[: -self.config.keep_last]:
            if not every or _step(old) % every:
                # The folder is renamed first, so that a partially deleted checkpoint is never loaded.
                old.rename(old.with_name(f"{old.name}.deleted"))
        for deleted in self.folder.glob("step_*.deleted"):
            shutil.rmtree(deleted)

    def load(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest intact checkpoint.

        Returns:
            The contents of its `run.json`, which include the `run` argument of `save`, or None if there is no
            intact checkpoint.

        Raises:
            DataError: the newest intact checkpoint cannot be read.
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
        except (Exception, CheckpointException) as error:  # CheckpointException is not an Exception
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
            damage = checkpoint_damage(path, contents=True)
            if not damage:
                self._delete_old(path)  # a killed run may have left old checkpoints
                return path
            log.warning("%s: damaged checkpoint ignored (%s)", path, damage)
            self.damaged.add(path)
        return None


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob("step_*[0-9]"), key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step_"))


def checkpoint_damage(checkpoint: Path, contents: bool = False) -> str:
    """Return a description of the damage to a checkpoint, or an empty string if it is intact.

    Args:
        contents: whether to verify the checksums of all files in addition to their sizes.
    """
    try:
        state = read_record(checkpoint / "run.json")
        if state.pop("crc32", None) != content_crc32(state):
            return "run.json: checksum does not match"
        verify_outputs(checkpoint, state["files"], max_bytes=math.inf if contents else 0)
    except (OSError, DataError) as error:
        return f"{error}"
    return ""
