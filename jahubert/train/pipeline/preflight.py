"""Preflight checks: inputs, model, device, engine and process count, before any stage runs.

A corpus is read for hours before a model is opened, so everything that can be checked without work is
checked before the first stage, and the names of splits as soon as there is a manifest. All errors are
reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from jahubert.errors import DataError, UserError
from jahubert.formats.hub import check_exists
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import input_fields, raise_config_errors, split_fields
from jahubert.train.experiment.provenance import DONE, input_fingerprint
from jahubert.train.experiment.registry import ENGINES, resolve
from jahubert.train.trainer.optim import pick_precision


def preflight_errors(
    jobs: Sequence[tuple[str, Any, Path]], made: Sequence[Path], processes: int
) -> list[str]:
    """One message per error that would end a stage.

    Args:
        jobs: (stage, its config, its folder).
        made: the folders that the command writes; inputs in them need not exist yet.
        processes: the number of processes that share the training.
    """
    made = [folder.absolute() for folder in made]
    errors = [error for job in jobs for error in _job_errors(*job, made, processes)]
    return errors + split_errors(jobs)


def split_errors(jobs: Sequence[tuple[str, Any, Path]]) -> list[str]:
    """One message per split that a stage reads and that its existing manifest does not contain."""
    found, known = [], {}
    for stage, config, out in jobs:
        path = getattr(config, "manifest", None)
        if path is None or not (path.parent / DONE).exists() or (out / DONE).exists():
            continue
        try:
            known[path] = known.get(path) or Manifest(path).counts["splits"]
        except DataError:  # reported by the stages
            continue
        found += [
            f"{stage}.{name}={split}: {path} has no such split; its splits are {', '.join(known[path])}"
            for name, split in split_fields(config)
            if split not in known[path]
        ]
    return found


def check_splits(jobs: Sequence[tuple[str, Any, Path]]) -> None:
    """Raise ConfigError in all processes for splits that stage prepare did not make."""
    with distributed.rank0_reports():
        raise_config_errors(split_errors(jobs))


def _job_errors(stage: str, config: Any, out: Path, made: Sequence[Path], processes: int) -> Iterator[str]:
    for name, path, model in input_fields(config):
        absolute = path.absolute()
        if any(folder in (absolute, *absolute.parents) or absolute in folder.parents for folder in made):
            continue
        setting = f"{stage}.{name}"
        try:
            input_fingerprint(setting, path, model)
        except UserError as error:
            yield str(error)
            continue
        try:
            if model:
                check_exists(path)
        except UserError as error:
            yield f"{setting}: {error}"
    if not (out / DONE).exists():  # else nothing is left to compute
        yield from _machine_errors(stage, config, processes)


def _machine_errors(stage: str, config: Any, processes: int) -> Iterator[str]:
    """Errors of device, engine and batch; the GPU of each process is checked when it is taken."""
    train = getattr(config, "train", None)
    device = getattr(config if train is None else train, "device", None)
    kind = None
    if device is not None:
        try:
            own = device in ("auto", "cuda") and torch.cuda.is_available()
            kind = distributed.process_device("cuda:0" if own else device)
        except UserError as error:
            yield str(error)
    if train is None:
        return
    for where, look in (
        (f"{stage}.", lambda: train.accumulation_steps(processes)),
        ("", lambda: resolve(train.engine, ENGINES, "engine")),
        (f"{stage}.train.", lambda: kind and pick_precision(train, kind)),
    ):
        try:
            look()
        except UserError as error:
            yield f"{where}{error}"
