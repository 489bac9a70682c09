"""Tests of robustness against kill -9, a full disk and hanging processes.

The tests also run this file as a script: `FILE kill FOLDER TRIALS MODEL`, `FILE fill FOLDER`, and with
two processes `FILE hang FOLDER` or `FILE stage FOLDER`.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from fixtures.resumable import TOY, make_training, metric_rows, train_model
from fixtures.toy import Data, Toy
from safetensors.torch import load_file

from jahubert.formats.atomic import PREFIX
from jahubert.train.experiment import distributed
from jahubert.train.experiment.resource_errors import report_file_errors
from jahubert.train.pipeline import runner
from jahubert.train.trainer.trainer import train
from jahubert.train.trainer.watchdog import watchdog

WORKERS = (0, 2, 1)


def forked(work: Callable[[], None]) -> int:
    """Run `work` in a forked child, which need not import torch again, and return the process ID."""
    if pid := os.fork():
        return pid
    try:
        work()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def status_of(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def train_until_fsync(out: Path, model: str, last: int) -> None:
    """Train, and kill the process in fsync call number `last`, while it saves a checkpoint."""
    calls, fsync = iter(range(1, 10_000)), os.fsync

    def killing(number: int) -> None:
        if next(calls) == last:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(number)

    os.fsync = killing
    train_model(out, model)


def kill(folder: Path, trials: int, model: str) -> None:
    """Kill runs at random moments and while they save checkpoints, and print the number of kills per run."""
    started = time.monotonic()
    assert status_of(forked(lambda: train_model(folder / "whole", model))) == 0
    whole = time.monotonic() - started
    rng = random.Random(trials)
    for trial in range(trials):
        out, killed = folder / str(trial), 0
        if trial % 4 == 3:  # kill while the second or a later checkpoint is saved
            last = rng.randrange(4, 16)
            killed += status_of(forked(partial(train_until_fsync, out, model, last))) == -signal.SIGKILL
        for attempt in range(3):
            workers = WORKERS[(trial + attempt) % 3]
            pid = forked(partial(train_model, out, model, workers))
            if attempt < 2:
                time.sleep(rng.uniform(0.05, 0.7) * whole)
                os.kill(pid, signal.SIGKILL)
            killed += status_of(pid) == -signal.SIGKILL
        parts = len(list((out / "checkpoints").glob(PREFIX + "*.new")))
        print(json.dumps({"trial": trial, "killed": killed, "unfinished": parts}), flush=True)


def check_kills(folder: Path, trials: int, model: str) -> None:
    done = subprocess.run(
        [sys.executable, __file__, "kill", str(folder), str(trials), model], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    killed = [json.loads(line)["killed"] for line in done.stdout.splitlines()]
    assert len(killed) == trials and sum(killed) >= trials, done.stdout
    whole = load_file(folder / "whole" / "end.safetensors")
    for trial in range(trials):
        end = load_file(folder / str(trial) / "end.safetensors")
        assert all(torch.equal(end[name], value) for name, value in whole.items()), f"trial {trial}"
        assert metric_rows(folder / str(trial)) == metric_rows(folder / "whole"), f"trial {trial}"


def test_killed_run_resumes_bit_identically(tmp_path):
    """Runs are also killed while saving a checkpoint, and resumed with a different number of workers."""
    check_kills(tmp_path, 4, "toy")


@pytest.mark.slow
def test_killed_run_of_the_real_model_resumes_bit_identically(tmp_path):
    check_kills(tmp_path, 20, "hubert")


class Filling(Data):
    """Data source that fills the disk with another file during step 7."""

    def __init__(self, out: Path):
        super().__init__()
        self.other, self.reads = out / "other.bin", 0

    def load(self, micro):
        self.reads += 1
        if self.reads == 13:
            with self.other.open("wb", buffering=0) as other, suppress(OSError):
                while other.write(bytes(1024)):
                    pass
        return super().load(micro)


def fill(out: Path) -> None:
    with report_file_errors(out):
        train(make_training("toy")[0], Filling(out), replace(TOY, log_every=100), out)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of 512 KiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs permission to mount a tmpfs")
    yield tmp_path
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_full_disk_during_a_checkpoint_keeps_the_previous_one(small_disk):
    done = subprocess.run([sys.executable, __file__, "fill", str(small_disk)], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"checkpoint of step 8 .*step_0000004 .*disk is full", done.stderr, re.S), done.stderr
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step_0000004"]
    (small_disk / "other.bin").unlink()
    module, data, config = make_training("toy")
    train(module, data, replace(config, max_steps=8), small_disk)  # resumes the run
    assert (small_disk / "checkpoints" / "step_0000008").is_dir()


def test_file_size_limit_while_saving_a_checkpoint_is_named(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (3000, -1))"
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_kill_and_resume; {limit}"
    work = f"sys.exit(test_kill_and_resume.main(['fill', {str(tmp_path)!r}]))"
    done = subprocess.run([sys.executable, "-c", f"{code}; {work}"], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"checkpoint of step 4 .*ulimit -f", done.stderr, re.S), done.stderr
    assert not list((tmp_path / "checkpoints").iterdir())


class Stuck(Data):
    """Data source that hangs on rank 1 in the third step."""

    reads = 0

    def load(self, micro):
        self.reads += 1
        if distributed.rank() == 1 and self.reads == 5:
            time.sleep(1000)
        return super().load(micro)


def hang(out: Path) -> None:
    config = replace(TOY, batch_seconds=24.0, save_every=1)
    with distributed.process_group():
        # The first run performs the slow imports before the watchdog starts.
        train(Toy(), Data(groups=4), replace(config, max_steps=1), out / "before")
        with watchdog(2 / 60):
            train(Toy(), Stuck(groups=4), config, out)


def test_hanging_process_is_named(tmp_path, capfd):
    started = time.monotonic()
    assert distributed.launch([sys.executable, __file__, "hang", str(tmp_path)], 2) == 75
    assert time.monotonic() - started < 60
    stderr = capfd.readouterr().err
    assert stderr.count("jahubert: error: ") == 1
    assert re.search(r"error: process 1 of 2 \(pid \d+ on .+\) hangs: .* step 3 ", stderr), stderr
    assert "hang_timeout_minutes=0.033" in stderr and "time.sleep(1000)" in stderr
    assert (tmp_path / "checkpoints" / "step_0000002").is_dir()


LIMIT = 4.0  # hang timeout in seconds


def hang_in_a_stage(folder: Path) -> None:
    """Make rank 1 read slowly, then rank 0 work while rank 1 waits, and finally rank 1 hang."""
    from fixtures.unit_stages import stages

    from jahubert.train.data.manifest import Manifest
    from jahubert.train.stages import features

    delay, load = LIMIT / 4, Manifest.load

    def slow(self, row):
        if distributed.rank() == 1:
            time.sleep(delay)
        return load(self, row)

    Manifest.load, features._PART_SIZE = slow, 2  # type: ignore[method-assign]
    configs = stages(folder, folder)
    with distributed.process_group(), watchdog(LIMIT / 60):
        runner.run_stage("features", configs["features"], folder / "features")
        distributed.rank0_broadcast(lambda: time.sleep(1.5 * LIMIT))
        runner.run_stage("kmeans", configs["kmeans"], folder / "kmeans")
        print("no hang reported", file=sys.stderr)
        delay = 1000
        runner.run_stage("label", configs["label"], folder / "label")


def test_hanging_process_in_a_stage_is_named_and_a_slow_one_is_not(tmp_path, capfd):
    from fixtures.unit_stages import make_corpus

    make_corpus(tmp_path)
    assert distributed.launch([sys.executable, __file__, "stage", str(tmp_path)], 2) == 75
    stderr = capfd.readouterr().err
    assert stderr.count("no hang reported") == 2 and stderr.count("jahubert: error: ") == 1
    assert re.search(
        rf"error: process 1 of 2 \(.+\) hangs: running stage {tmp_path}/label for \d+ s", stderr
    ), stderr
    assert "time.sleep(delay)" in stderr
    assert (tmp_path / "label/shards/000000.bin").exists()  # the other process wrote this shard


def main(arguments: list[str]) -> int:
    from jahubert.errors import DiskFullError

    kind, folder, *rest = arguments
    if kind == "kill":
        kill(Path(folder), int(rest[0]), rest[1])
    elif kind in ("hang", "stage"):
        {"hang": hang, "stage": hang_in_a_stage}[kind](Path(folder))
    else:
        try:
            fill(Path(folder))
        except DiskFullError as error:
            print(f"jahubert: error: {error}", file=sys.stderr)
            return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
