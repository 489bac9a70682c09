"""A GPU that is too small for a stage, said in one sentence with the setting that asks less of it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from jahubert.errors import ConfigError

_SAID = re.compile(r".*? is free|[^\n]*")  # of torch's message, which goes on about its allocator


@contextmanager
def full_memory_said(stage: str, config: Any) -> Iterator[None]:
    """Raise ConfigError where the work of a stage does not fit its GPU."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        said = _SAID.findall(str(error))[0].rstrip(".")
        raise ConfigError(f"{stage}: {said}. {_less(stage, config)}") from error


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
