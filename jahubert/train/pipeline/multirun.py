"""Sweeps: one run per combination of swept settings, with a separate folder for each experiment."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from jahubert.errors import ConfigError, JahubertError
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.compose import compose
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.pipeline.overrides import expand_sweeps
from jahubert.train.pipeline.reporting import report_error
from jahubert.train.pipeline.signals import check_stop

log = logging.getLogger("jahubert")

# Settings that do not distinguish experiments. Runs that differ only in these settings share a folder.
_SELECTORS = ("stage", "iteration", "system", "decoding", "processes", "machines")
_MAX_NAME = 100  # maximum length of the swept settings in a folder name


class Run(NamedTuple):
    overrides: list[str]
    swept: dict[str, str]  # the settings that differ between runs


def run_all(arguments: Sequence[str]) -> int:
    """Run each combination locally, or submit all of them through a Hydra launcher.

    All settings are checked before the first run starts. If a local run fails with a `JahubertError` or an
    OSError, the later runs are still started.

    Returns:
        The first nonzero exit status of the local runs, or 0.
    """
    launcher = [word for word in arguments if word.startswith(("hydra/", "hydra."))]
    runs = expand([word for word in arguments if word not in launcher])
    for run in runs:
        configure_jobs(run.overrides)
    if launcher:
        return _launch(launcher, runs)
    status = 0
    for number, run in enumerate(runs, start=1):
        check_stop()
        log.info("run %d of %d: %s", number, len(runs), " ".join(f"{k}={v}" for k, v in run.swept.items()))
        try:
            failed = runner.start(run.overrides)
        except (JahubertError, OSError) as error:
            failed = report_error(error)
        status = status or failed
    return status


def expand(arguments: Sequence[str]) -> list[Run]:
    """Return all runs of a sweep in order.

    If several experiments would share a folder, the swept settings are appended to the folder name.
    """
    runs = [Run(*pair) for pair in expand_sweeps(arguments)]
    folders: dict[str, set[str]] = {}
    experiments = []
    for run in runs:
        exp = compose(run.overrides)["exp"]
        differing = {key: value for key, value in run.swept.items() if key not in _SELECTORS}
        suffix = _folder_suffix(differing)
        experiments.append((exp, suffix))
        folders.setdefault(exp, set()).add(suffix)
    return [
        Run([*run.overrides, f"exp='{exp}-{suffix}'"], run.swept) if len(folders[exp]) > 1 else run
        for run, (exp, suffix) in zip(runs, experiments, strict=True)
    ]


def _folder_suffix(swept: dict[str, str]) -> str:
    """Format swept settings as part of a folder name."""
    text = ",".join(f"{key}={value}" for key, value in swept.items())
    name = re.sub(r"[^\w.=,+-]", "_", text)
    if name != text or len(name) > _MAX_NAME:
        name = f"{name[:_MAX_NAME]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def _launch(launcher: list[str], runs: Sequence[Run]) -> int:
    """Submit the runs through a Hydra launcher, for example hydra/launcher=slurm."""
    import hydra

    from jahubert.train.experiment.registry import data_folder

    if other := [word for word in launcher if not word.startswith(("hydra/launcher=", "hydra.launcher."))]:
        raise ConfigError(f"{other[0]}: not supported; only hydra/launcher and hydra.launcher can be set")
    overrides = [run.overrides for run in runs]

    @hydra.main(config_path=str(data_folder("conf").resolve()), config_name="config", version_base="1.3")
    def submitted_job(config: Any) -> None:
        from jahubert.train.pipeline import command

        command.join_slurm(os.environ)
        if status := runner.start(overrides[int(config.job)]):
            sys.exit(status)

    numbers = ",".join(map(str, range(len(runs))))
    sys.argv = [sys.argv[0], "--multirun", *launcher, f"+job={numbers}"]
    submitted_job()
    return 0
