"""Jobs of a SLURM cluster: what sbatch is given, and when a job puts itself into the queue again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from jahubert.train.lookup import home

REPO = Path(__file__).resolve().parent.parent
PAGES = [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("recipes/*/*.md")]
SCRIPT = re.compile(r"^```\w+\n(#!/bin/bash\n#SBATCH .*?)^```", re.S | re.M)
SCRIPTS = {
    path.relative_to(REPO).as_posix(): script
    for path in PAGES
    for script in SCRIPT.findall(path.read_text(encoding="utf-8"))
}

# Of sbatch(1); one that it does not know, as those of srun, rejects the job.
SBATCH = {
    "account", "array", "comment", "constraint", "cpus-per-gpu", "cpus-per-task", "dependency", "error",
    "exclude", "exclusive", "gpus-per-node", "gpus-per-task", "gres", "job-name", "mem", "mem-per-cpu",
    "mem-per-gpu", "nodelist", "nodes", "ntasks-per-node", "open-mode", "output", "partition", "qos",
    "requeue", "signal", "time", "wckey",
}  # fmt: skip


def options(script: str) -> set[str]:
    lines = re.findall(r"^#SBATCH (.*)$", script, re.M)
    return {name for line in lines for name in re.findall(r"(?:^|\s)--([\w-]+)", line)}


@pytest.mark.parametrize("page", SCRIPTS)
def test_sbatch_knows_the_options_of_the_scripts(page):
    assert options(SCRIPTS[page]) and options(SCRIPTS[page]) <= SBATCH


def test_sbatch_knows_the_options_of_the_launcher(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(str(home("conf").resolve()), version_base="1.3"):
        tree = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True)
    own = (
        "_target_",
        "submitit_folder",
        "max_num_timeout",
        "timeout_min",
        "tasks_per_node",
        "name",
        "mem_gb",
    )
    given = {name: value for name, value in dict(tree.hydra.launcher).items() if name not in own}
    text = _make_sbatch_string("python", folder=tmp_path, time=1440, ntasks_per_node=8, **given)
    assert {"requeue", "signal", "nodes"} <= options(text) <= SBATCH, text
