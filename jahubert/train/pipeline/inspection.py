"""Output of `--cfg job` and `--info`: the settings and stages of a command, without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError
from jahubert.train.experiment.config import structure, untyped
from jahubert.train.experiment.provenance import DONE, STARTED
from jahubert.train.experiment.registry import STAGES, Job, resolve
from jahubert.train.pipeline.compose import CommandSettings, compose
from jahubert.train.pipeline.jobs import configure_jobs

# Settings that `compose` has converted or that remain text.
_TEXT = {
    "data",
    "vocabulary",
    "device",
    "engine",
    "subset",
    *CommandSettings.__dataclass_fields__,
}


def settings_yaml(overrides: Sequence[str]) -> str:
    """Format the settings of a command as YAML.

    The settings of each stage include the defaults of its dataclass. If both `recipe=` and `stage=` are set,
    the last key is `jobs`, which has the settings of every selected stage.
    """
    import yaml

    content = compose(overrides)
    for key, value in content.items():
        if key in STAGES:
            content[key] = _complete(key, value)
        elif key not in _TEXT:
            content[key] = untyped(value)
    if content["recipe"] is not None and content["stage"] is not None:
        jobs = configure_jobs(overrides)
        content["jobs"] = {str(job.out): {job.stage: plain(job.config)} for job in jobs}
    text: str = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    return text


def _complete(stage: str, settings: Any) -> Any:
    """Return all settings of a stage including defaults, or only the given ones if some are invalid."""
    try:
        return plain(structure(settings or {}, resolve(stage, STAGES, "stage").Config, stage))
    except ConfigError:  # this error is reported if the stage is one of the jobs
        return untyped(settings)


def plain(value: Any) -> Any:
    """Convert a config to plain mappings, lists and scalars."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def stage_list(overrides: Sequence[str]) -> str:
    """List the stages of a command in order of execution, one per line with its state."""
    return "".join(f"{job.out}  {_state(job)}\n" for job in configure_jobs(overrides))


def _state(job: Job) -> str:
    if (job.out / DONE).exists():
        return "done"
    return "started" if (job.out / STARTED).exists() else "not started"
