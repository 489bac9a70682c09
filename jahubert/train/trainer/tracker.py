"""Experiment trackers: TensorBoard event files or a Weights & Biases run."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

from jahubert.errors import ConfigError, MissingExtraError
from jahubert.formats.atomic import atomic_write
from jahubert.train.experiment.config import result_fields
from jahubert.train.experiment.provenance import STARTED, read_record
from jahubert.train.trainer.event_file import EventFile
from jahubert.train.trainer.optim import TrainConfig


class Tracker(Protocol):
    """Interface for recording training curves. Only one process uses it."""

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Write the values of one step, keyed by tag."""
        ...

    def close(self) -> None: ...


class WandbRun:
    """A Weights & Biases run in `out/wandb`. Its id is stored, so that resumed training continues the run.

    The run is offline unless the environment variable WANDB_MODE is set; `wandb sync` uploads it later. Other
    environment variables of wandb, such as WANDB_PROJECT and WANDB_ENTITY, also apply.

    Args:
        out: folder of the stage.
        config: training settings, which the run records if `out` contains no record of the stage's settings.

    Raises:
        MissingExtraError: wandb is not installed.
        ConfigError: wandb could not start the run.
    """

    def __init__(self, out: Path, config: TrainConfig):
        wandb = _import_wandb()
        started = out / STARTED
        settings = read_record(started)["settings"] if started.exists() else result_fields(config)
        try:
            self._run = wandb.init(
                id=_run_id(out / "wandb" / "run_id.txt"),
                resume="allow",
                mode=os.environ.get("WANDB_MODE", "offline"),
                project=os.environ.get("WANDB_PROJECT", "jahubert"),
                # The default name is, for example, exp/demo/iter1/pretrain.
                name=os.environ.get("WANDB_NAME", "/".join(out.absolute().parts[-4:])),
                dir=str(out),
                config=settings,
                reinit="finish_previous",  # an earlier job of a sweep may have failed in this process
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(f"train.tracker=wandb: {error}") from error

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


def check_tracker(config: TrainConfig) -> None:
    """Raise MissingExtraError if the tracker is wandb and wandb is not installed.

    TensorBoard is optional: without it, `open_tracker` returns None.
    """
    if config.tracker == "wandb":
        _import_wandb()


def open_tracker(config: TrainConfig, out: Path, step: int) -> Tracker | None:
    """Open the configured tracker. Return None if it is TensorBoard and TensorBoard is not installed.

    Args:
        step: the last completed step. TensorBoard hides values of later steps, which a killed run logged.
    """
    if config.tracker == "wandb":
        return WandbRun(out, config)
    try:
        return EventFile(out / "tensorboard", step)
    except ImportError:
        return None


def _import_wandb() -> Any:
    """Import wandb, but not a folder named wandb in the current folder, which is importable too."""
    try:
        module = importlib.import_module("wandb")
    except ImportError as error:
        raise MissingExtraError("wandb", "wandb") from error
    if not hasattr(module, "init"):
        raise MissingExtraError("wandb", "wandb")
    return module


def _run_id(path: Path) -> str:
    """Return the run id that is stored in a file, and create the file if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            file.write(uuid4().hex[:8])
    return path.read_text(encoding="utf-8").strip()
