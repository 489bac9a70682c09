"""What the settings do not say of themselves: whether the command that they are for can end well.

A corpus is read for hours before a model is opened. What can be known of the model, of a word list, of the
device, the engine or the number of processes without any work is looked at before the first stage, the names
of splits as soon as there is a manifest, and all of it is said at once.
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
    """A sentence on each thing that a stage would stumble over.

    Args:
        jobs: (stage, its config, its folder).
        made: the folders that the command writes; what lies in them need not be there yet.
        processes: over which a training is shared.
    """
    made = [folder.absolute() for folder in made]
    found = [said for job in jobs for said in _of(*job, made, processes)]
    return found + split_errors(jobs)


def split_errors(jobs: Sequence[tuple[str, Any, Path]]) -> list[str]:
    """A sentence on each split that a stage is to read and its manifest, which is there, does not have."""
    found, known = [], {}
    for stage, config, out in jobs:
        path = getattr(config, "manifest", None)
        if path is None or not (path.parent / DONE).exists() or (out / DONE).exists():
            continue
        try:
            known[path] = known.get(path) or Manifest(path).counts["splits"]
        except DataError:  # the stages say what is wrong with it
            continue
        found += [
            f"{stage}.{name}={split}: {path} has no such split; its splits are {', '.join(known[path])}"
            for name, split in split_fields(config)
            if split not in known[path]
        ]
    return found


def check_splits(jobs: Sequence[tuple[str, Any, Path]]) -> None:
    """For all processes, when stage prepare has run: ConfigError for splits that it did not make."""
    with distributed.rank0_reports():
        raise_config_errors(split_errors(jobs))


def _of(stage: str, config: Any, out: Path, made: Sequence[Path], processes: int) -> Iterator[str]:
    for name, path, model in input_fields(config):
        place = path.absolute()
        if any(folder in (place, *place.parents) or place in folder.parents for folder in made):
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
        yield from _of_the_machine(stage, config, processes)


def _of_the_machine(stage: str, config: Any, processes: int) -> Iterator[str]:
    """What all processes find alike: which GPU is whose, each of them sees when it takes its own."""
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
