"""Preflight checks of inputs, model, device, engine, tracker and process count, before any stage runs.

A stage may use an input only after hours of work, for example when it reads a corpus before it opens a model.
Everything that can be checked quickly is therefore checked before the first stage. Split names are checked as
soon as the manifest exists. All errors are reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from jahubert.errors import ConfigError, DataError, UserError
from jahubert.formats.hub import check_exists
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import input_fields, raise_config_errors, split_fields
from jahubert.train.experiment.provenance import DONE, input_fingerprint
from jahubert.train.experiment.registry import ENGINES, Job, resolve
from jahubert.train.trainer.optim import TrainConfig, pick_precision
from jahubert.train.trainer.parallel import can_compile
from jahubert.train.trainer.tracker import check_tracker


def preflight_errors(jobs: Sequence[Job], outputs: Sequence[Path], processes: int) -> list[str]:
    """Return one message per detected error that would make a stage fail.

    Args:
        outputs: output folders of the command. Inputs in these folders need not exist yet.
        processes: number of training processes.
    """
    outputs = [folder.absolute() for folder in outputs]
    errors = [error for job in jobs for error in _job_errors(*job, outputs, processes)]
    return errors + split_errors(jobs)


def split_errors(jobs: Sequence[Job]) -> list[str]:
    """Return one message for each split that a stage reads but its manifest does not contain.

    Finished stages, and manifests that do not exist yet or are damaged, are skipped.
    """
    errors: list[str] = []
    splits_of: dict[Path, Any] = {}
    for stage, config, out in jobs:
        path = getattr(config, "manifest", None)
        if path is None or not (path.parent / DONE).exists() or (out / DONE).exists():
            continue
        try:
            splits_of[path] = splits_of.get(path) or Manifest(path).counts["splits"]
        except DataError:  # the stage itself reports a damaged manifest
            continue
        errors += [
            f"{stage}.{name}={split}: {path} has no such split; available splits: "
            f"{', '.join(splits_of[path])}"
            for name, split in split_fields(config)
            if split not in splits_of[path]
        ]
    return errors


def check_splits(jobs: Sequence[Job]) -> None:
    """Raise ConfigError on all ranks if a stage reads splits that its manifest does not contain."""
    with distributed.rank0_reports():
        raise_config_errors(split_errors(jobs))


def _job_errors(stage: str, config: Any, out: Path, outputs: Sequence[Path], processes: int) -> Iterator[str]:
    for name, path, model in input_fields(config):
        absolute = path.absolute()
        if any(folder in (absolute, *absolute.parents) or absolute in folder.parents for folder in outputs):
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
    if not (out / DONE).exists():  # a finished stage needs no device
        yield from _machine_errors(stage, config, processes)


def _check_compiler(train: TrainConfig, device: torch.device | None) -> None:
    """Raise ConfigError if `compile` is set on a GPU, but there is no C compiler."""
    if train.compile and device is not None and not can_compile(device):
        raise ConfigError("compile=true on a GPU requires a C compiler; install gcc, or set compile=false")


def _machine_errors(stage: str, config: Any, processes: int) -> Iterator[str]:
    """Yield errors in the device and training settings of a stage. Each process checks its own GPU later."""
    train = getattr(config, "train", None)
    device = getattr(config if train is None else train, "device", None)
    kind = None
    if device is not None:
        try:
            any_gpu = device in ("auto", "cuda") and torch.cuda.is_available()
            kind = distributed.process_device("cuda:0" if any_gpu else device)
        except UserError as error:
            yield str(error)
    if train is None:
        return
    # In fine-tuning, the longest utterance is unknown until the manifest exists; 1 s is an optimistic guess.
    longest = config.crop.max_seconds if hasattr(config, "crop") else 1.0
    for prefix, check in (
        (f"{stage}.", lambda: train.check_processes(processes, longest)),
        ("", lambda: resolve(train.engine, ENGINES, "engine")),
        (f"{stage}.train.", lambda: _check_compiler(train, kind)),
        (f"{stage}.train.", lambda: kind and pick_precision(train, kind)),
        (f"{stage}.train.tracker={train.tracker}: ", lambda: check_tracker(train)),
    ):
        try:
            check()
        except UserError as error:
            yield f"{prefix}{error}"
