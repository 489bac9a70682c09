"""Tests that a run locks its folder, and that launched processes end with their launcher."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fixtures.lock_holder import start_lock_holder

from jahubert.errors import BusyError
from jahubert.formats.lock import LOCK_NAME, lock_owner, run_lock
from jahubert.train.experiment.distributed import launch


def test_folder_is_locked_until_its_process_ends(tmp_path):
    child = start_lock_holder(tmp_path)
    try:
        assert f"process {child.pid}" in str(lock_owner(tmp_path))
        message = f"locked by another run .process {child.pid} on"
        with pytest.raises(BusyError, match=message), run_lock(tmp_path):
            pass
    finally:
        child.kill()
        child.wait()
    assert lock_owner(tmp_path) is None  # the kill released the lock
    with run_lock(tmp_path):
        pass
    assert not (tmp_path / LOCK_NAME).exists()


def test_forked_child_does_not_hold_the_lock(tmp_path):
    with run_lock(tmp_path):
        if not (child := os.fork()):
            time.sleep(60)
            os._exit(0)
    try:
        with run_lock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_second_run_of_a_stage_is_rejected(tmp_path, repo):
    folder = tmp_path / "prepare"
    folder.mkdir(parents=True)
    child = start_lock_holder(folder)
    try:
        stage = [f"recipe={repo / 'tests/fixtures/tones'}", "stage=prepare", f"exp={tmp_path}"]
        command = [sys.executable, "-m", "jahubert.run", *stage]
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        child.kill()
        child.wait()
    assert done.returncode == 2 and "locked by another run" in done.stderr, done.stderr
    assert [path.name for path in folder.iterdir()] == [LOCK_NAME]


@pytest.mark.skipif(sys.platform != "linux", reason="needs a Linux system call")
def test_launched_processes_end_with_their_launcher(tmp_path):
    pids = tmp_path / "pids"
    pids.mkdir()
    inner = f"import os, time; open(r'{pids}/' + str(os.getpid()), 'w').close(); time.sleep(60)"
    if not (launcher := os.fork()):
        launch([sys.executable, "-c", inner], 2)
        os._exit(0)
    deadline = time.monotonic() + 30
    while len(children := [int(path.name) for path in pids.iterdir()]) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(launcher, signal.SIGKILL)
    os.waitpid(launcher, 0)
    while any(map(alive, children)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(children) == 2 and not any(map(alive, children))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] != "Z"
    except OSError:
        return False
