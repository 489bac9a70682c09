"""A GPU or a machine with too little memory for a stage, said in one sentence with what asks less of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jahubert.errors import ConfigError, JahubertError
from jahubert.train.experiment import distributed

_SAID = re.compile(r".*? is free|[^\n]*")  # of torch's message, which goes on about its allocator
_READER = re.compile(r"DataLoader worker \(pid[^\n]*?\) (is killed by signal: \w+|exited unexpectedly)")


@contextmanager
def report_oom(stage: str, config: Any) -> Iterator[None]:
    """Raise ConfigError where a stage does not fit its GPU, JahubertError where a reader was killed."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = _SAID.findall(str(error))[0].rstrip(".")
        raise ConfigError(f"{stage}: {said}. {_less(stage, config)}") from error
    except RuntimeError as error:  # torch raises nothing more particular, wherever the main thread is
        if not (said := _READER.search(str(error))) or not hasattr(config, "train"):
            raise
        fewer = f"set {stage}.train.workers below {config.train.workers}"
        fewer += f" or {stage}.crop.keep_in_memory_hours=0" if hasattr(config, "crop") else ""
        raise JahubertError(
            f"{stage}, at {distributed.last_heartbeat().place}: {said[0]}. If nobody did, the system did so "
            f"for want of memory: {fewer}. The same command continues from the last checkpoint"
        ) from error


def _less(stage: str, config: Any) -> str:
    """What to do about it."""
    if hasattr(config, "train"):
        train = f"{stage}.train"
        return (
            f"Set {train}.micro_seconds below {config.train.micro_seconds:g}; an update stays as large. A "
            f"run that has steps behind it keeps that setting, and goes on with {train}.recompute=true"
        )
    if hasattr(config, "batch_seconds"):
        return f"Set {stage}.batch_seconds below {config.batch_seconds:g}; what was finished is kept"
    return f"Make room on that GPU, or set {stage}.device=cpu"
