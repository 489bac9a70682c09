"""Tests of the SLURM scripts in the documentation: sbatch options, signals, and requeueing."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from jahubert.train.experiment.registry import data_folder

REPO = Path(__file__).resolve().parents[3]
PAGES = [*REPO.glob("*.md"), *REPO.glob("docs/**/*.md"), *REPO.glob("recipes/*/*.md")]
SCRIPT = re.compile(r"^```\w+\n(#!/bin/bash\n#SBATCH .*?)^```", re.S | re.M)
SCRIPTS = {
    path.relative_to(REPO).as_posix(): script
    for path in PAGES
    for script in SCRIPT.findall(path.read_text(encoding="utf-8"))
}
REQUEUE_FUNCTION = re.compile(r"^requeue\(\).*?^}\n", re.S | re.M)

# Some of the options in sbatch(1). sbatch rejects unknown options, for example those that only srun has.
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
def test_script_options_are_valid_sbatch_options(page):
    assert options(SCRIPTS[page]) and options(SCRIPTS[page]) <= SBATCH


def test_launcher_options_are_valid_sbatch_options(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    from hydra import compose, initialize_config_dir
    from submitit.slurm.slurm import _make_sbatch_string

    with initialize_config_dir(str(data_folder("conf").resolve()), version_base="1.3"):
        tree = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True)
    launcher_only = (
        "_target_",
        "submitit_folder",
        "max_num_timeout",
        "timeout_min",
        "tasks_per_node",
        "name",
        "mem_gb",
    )
    sbatch_options = {
        name: value for name, value in dict(tree.hydra.launcher).items() if name not in launcher_only
    }
    text = _make_sbatch_string("python", folder=tmp_path, time=1440, ntasks_per_node=8, **sbatch_options)
    assert {"requeue", "signal", "nodes"} <= options(text) <= SBATCH, text


def test_all_scripts_share_the_requeue_function():
    assert {"docs/scale.md", "docs/tutorials/reazonspeech.md"} <= SCRIPTS.keys()
    functions = {tuple(REQUEUE_FUNCTION.findall(script)) for script in SCRIPTS.values()}
    assert len(functions) == 1 and () not in functions


@pytest.mark.parametrize("page", SCRIPTS)
def test_srun_signals_the_processes_without_torchrun(page):
    """If torchrun started the processes, SIGUSR1 would kill it and leave its processes running."""
    assert "--signal=USR1@" in SCRIPTS[page] and "torchrun" not in SCRIPTS[page]


@pytest.mark.parametrize("page", SCRIPTS)
@pytest.mark.parametrize(
    ("status", "count", "requeued"),
    [
        (0, None, False),
        (2, None, False),  # a user error would occur again
        (75, None, True),
        (75, "99", True),
        (75, "100", False),
        (1, "3", True),
        (137, None, True),  # a task was killed
    ],
)
def test_job_is_requeued_unless_its_settings_are_wrong(page, status, count, requeued, tmp_path):
    for tool, line in {
        "srun": f"exit {status}",
        "scontrol": f'echo "$@" >> {tmp_path}/scontrol_calls',
    }.items():
        (tmp_path / tool).write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/{tool}.log\n{line}\n')
        (tmp_path / tool).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "41"}
    env |= {} if count is None else {"SLURM_RESTART_COUNT": count}
    done = subprocess.run(["bash", "-c", SCRIPTS[page]], env=env, capture_output=True, text=True, timeout=30)
    assert done.returncode == status and not done.stderr
    calls = tmp_path / "scontrol_calls"
    assert (calls.read_text() if calls.exists() else "") == ("requeue 41\n" if requeued else "")
    started = (tmp_path / "srun.log").read_text().splitlines()
    assert all(line.startswith("--kill-on-bad-exit=0 --wait=60 python -m jahubert.run ") for line in started)
    assert status == 0 or len(started) == 1  # the script ends after a failed command


def test_multi_node_torchrun_commands_set_a_rendezvous():
    lines = [
        line
        for path in PAGES
        for line in path.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
        if "torchrun --nnodes" in line
    ]
    assert lines and all("--rdzv-backend c10d --rdzv-endpoint HOST:" in line for line in lines)
