"""Tests of runs that end early because of stop signals, killed DataLoader workers or failed processes.

The tests also run this file as a script: `FILE slow-workers FOLDER [ROW]`,
`FILE killed-worker FOLDER STAGE`, and with two processes `FILE failing-rank FOLDER ERROR`.
"""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.distributed as dist
from fixtures import FIXTURES
from fixtures.resumable import make_training, metric_rows, train_model
from fixtures.toy import Data
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException

from jahubert import run
from jahubert.errors import DataError, JahubertError
from jahubert.train.data.batches import CropConfig
from jahubert.train.experiment import distributed
from jahubert.train.experiment.resource_errors import report_oom
from jahubert.train.experiment.stopping import STOPPING
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.reporting import report_error
from jahubert.train.pipeline.signals import StopRequested, received_signal
from jahubert.train.pipeline.signals import stop_signals as stage_signals
from jahubert.train.trainer.stop import stop_signals as training_signals
from jahubert.train.trainer.trainer import Stopped, train

TONES = FIXTURES / "tones"


class SlowData(Data):
    """Data source with slow DataLoader workers, each of which creates a file named after its process ID."""

    def __init__(self, out: Path, bad: int | None):
        super().__init__(bad=bad)
        self.out = out

    def load(self, micro):
        (self.out / f"reader-{os.getpid()}").touch()
        time.sleep(0.02)
        return super().load(micro)


def slow_workers(out: Path, bad: int | None = None) -> int:
    """Train with two DataLoader workers, and return the exit status. Row `bad` has a non-finite loss."""
    module, _, config = make_training("toy")
    try:
        train(module, SlowData(out, bad), replace(config, workers=2), out)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_status
    return 0


def start_slow_workers(out: Path) -> subprocess.Popen:
    """Start `slow_workers` in a process, and wait for its first checkpoint."""
    child = subprocess.Popen(
        [sys.executable, __file__, "slow-workers", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "checkpoints" / "step_0000004").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    return child


@pytest.mark.parametrize(
    ("number", "each"),
    [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False), (signal.SIGHUP, False)],
)
def test_signal_to_main_process_and_workers_stops_the_run(tmp_path, number, each):
    """Launchers and schedulers send signals to the process group or to each process."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    stopped.mkdir()
    child = start_slow_workers(stopped)
    if each:
        for path in stopped.glob("reader-*"):
            os.kill(int(path.name.removeprefix("reader-")), number)
        time.sleep(0.1)  # workers receive the signal first
        os.kill(child.pid, number)
    else:
        os.killpg(child.pid, number)
    stderr = child.communicate(timeout=60)[1]  # returns after the last worker has ended
    assert child.returncode == 75 and number.name in stderr, stderr
    train_model(whole, "toy")
    train_model(stopped, "toy")
    ends = [load_file(out / "end.safetensors") for out in (whole, stopped)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert metric_rows(stopped) == metric_rows(whole)


def test_error_does_not_wait_for_the_workers(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, "slow-workers", str(tmp_path), "11"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1 and "non-finite loss" in done.stderr


@pytest.mark.slow
def test_workers_end_when_their_process_is_killed(tmp_path):
    child = start_slow_workers(tmp_path)
    child.kill()
    child.communicate(timeout=60)
    assert len(list(tmp_path.glob("reader-*"))) == 2 and child.returncode == -signal.SIGKILL


class KillsWorker(Data):
    """Data source whose workers are killed in the third epoch, as by the kernel if memory runs out."""

    def load(self, micro):
        if micro.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(micro)


def killed_worker(out: Path, stage: str) -> int:
    """Train with workers that are killed, and return the exit status for the resulting error."""
    module, _, config = make_training("toy")
    config = replace(config, workers=2)
    crop = {"crop": CropConfig()} if stage == "pretrain" else {}
    try:
        with report_oom(stage, SimpleNamespace(train=config, **crop)):
            train(module, KillsWorker(), config, out)
    except JahubertError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_worker_names_the_settings_to_change(tmp_path, stage):
    """The training runs in a separate process, because torch may raise the worker error at any moment."""
    command = [sys.executable, __file__, "killed-worker", str(tmp_path), stage]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"{stage}, .* step \d+: DataLoader worker \(pid.*\)", done.stderr), done.stderr
    assert f"{stage}.train.workers" in done.stderr
    assert ("pretrain.crop.keep_in_memory_hours=0" in done.stderr) == (stage == "pretrain")


def test_killed_worker_is_reported_while_a_checkpoint_is_saved():
    cause = RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")
    config = SimpleNamespace(train=SimpleNamespace(workers=2))
    with pytest.raises(JahubertError, match=r"finetune\.train\.workers"), report_oom("finetune", config):
        raise CheckpointException("saving", {0: (cause, traceback.extract_stack())})


SLOW = """
import time
from pathlib import Path
from jahubert.train.clustering.features import Mfcc

class Slow(Mfcc):
    def __call__(self, wavs):
        Path(__file__).with_suffix(".called").touch()
        time.sleep(0.5)
        return super().__call__(wavs)
"""


@pytest.mark.parametrize(
    ("number", "processes"),
    [
        (signal.SIGTERM, 1),
        (signal.SIGTERM, 2),
        (signal.SIGUSR1, 1),
        (signal.SIGUSR1, 2),
        (signal.SIGHUP, 2),
    ],
)
def test_signal_outside_of_training_exits_with_75(tmp_path, number, processes):
    (tmp_path / "slow.py").write_text(SLOW)
    command = [f"recipe={TONES}", f"exp={tmp_path / 'exp'}"]
    assert run.main([*command, "stage=prepare"]) == 0
    command += ["stage=features", "iteration=1", f"features.kind={tmp_path}/slow.py:Slow"]
    child = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "jahubert.run",
            *command,
            "features.batch_seconds=2",
            f"processes={processes}",
        ],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (tmp_path / "slow.called").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    os.killpg(child.pid, number)  # schedulers send the signal to the launcher, too
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 75 and "Traceback" not in stderr, stderr
    assert stderr.count(number.name) == 1, stderr
    assert run.main(command) == 0


def handles(pid: int, number: signal.Signals) -> bool:
    """Return whether a process has installed a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.parametrize("seconds", [0.0, 0.4, 1.0])
def test_signal_during_startup_exits_with_75(tmp_path, seconds):
    child = subprocess.Popen(
        [sys.executable, "-m", "jahubert.run", f"recipe={TONES}", "stage=prepare", f"exp={tmp_path / 'exp'}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not handles(child.pid, signal.SIGUSR1):
        assert child.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    child.send_signal(signal.SIGUSR1)
    stderr = child.communicate(timeout=60)[1]
    assert (child.returncode == 75 and "SIGUSR1" in stderr) or child.returncode == 0, stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize("fails", [True, False])
def test_signal_is_reported_even_if_interrupted_code_fails_or_swallows_it(capsys, monkeypatch, fails):
    def broken(_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # as some extension modules do during import
            if fails:
                raise AttributeError("partially initialized") from None
        return {"processes": 1}

    monkeypatch.setattr(runner, "compose", broken)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert run.main(["recipe=demo", "stage=all"]) == 75
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    assert "SIGTERM" in capsys.readouterr().err


def test_signal_in_a_callback_of_a_c_library_is_recorded_and_not_printed(monkeypatch):
    class Interrupting(io.BytesIO):
        def write(self, data):
            signal.raise_signal(signal.SIGTERM)
            return super().write(data)

    printed = []
    monkeypatch.setattr(sys, "unraisablehook", printed.append)
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    try:
        with stage_signals():
            with pytest.raises(soundfile.LibsndfileError):
                soundfile.write(Interrupting(), np.zeros(100_000), 16_000, format="FLAC")
            assert received_signal() == "SIGTERM"
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert not printed


def test_hangup_is_handled_unless_nohup_disabled_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with training_signals() as stop, stage_signals():
            signal.raise_signal(signal.SIGHUP)
        assert not stop
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        with pytest.raises(StopRequested), stage_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        for number in STOPPING:  # after a signal, a process ignores further ones
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, before)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "user": lambda: DataError("utterance 7 is broken"),
    "file": lambda: FileNotFoundError(2, "No such file or directory", "a.wav"),
    "bug": lambda: ZeroDivisionError("a bug"),
}


def failing_rank(folder: Path, error: str) -> None:
    """Raise an error on rank 1 while rank 0 waits at a barrier."""
    dist.destroy_process_group = lambda: time.sleep(1000)  # blocks, as it does with NCCL
    with distributed.process_group(report_error):
        if distributed.rank() == 1:
            raise ERRORS[error]()
        distributed.barrier()


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        ("user", 2, "jahubert: error: utterance 7 is broken"),
        ("file", 2, "jahubert: error: a.wav: No such file or directory"),
        ("bug", 1, "ZeroDivisionError: a bug"),
    ],
)
def test_error_in_one_process_ends_all_processes(tmp_path, capfd, error, status, message):
    started = time.monotonic()
    command = [sys.executable, __file__, "failing-rank", str(tmp_path), error]
    # Rank 0 may report the lost connection at the same moment.
    assert distributed.launch(command, 2) == status
    assert time.monotonic() - started < 60
    stderr = capfd.readouterr().err
    assert stderr.count(message) == 1, stderr
    assert ("Traceback" in stderr) == (error == "bug")


def test_processes_that_ignore_sigterm_are_killed_together(monkeypatch):
    monkeypatch.setattr(distributed, "_GRACE", 1.0)
    ignore = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    command = [
        sys.executable,
        "-c",
        f"{ignore}; sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(1000)",
    ]
    started = time.monotonic()
    assert distributed.launch(command, 6) == 3
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("number", "status", "advice"),
    [(signal.SIGKILL, 1, "memory"), (signal.SIGSEGV, 1, ""), (signal.SIGUSR1, 75, "")],
)
def test_process_killed_by_a_signal_is_named(capfd, monkeypatch, number, status, advice):
    """SIGUSR1 kills a process that has not yet installed its handlers."""
    dies = f"import os, time; os.environ['RANK'] == '0' and time.sleep(1000); os.kill(os.getpid(), {number})"
    monkeypatch.setattr(distributed, "_GRACE", 0.2)
    assert distributed.launch([sys.executable, "-c", dies], 2) == status
    stderr = capfd.readouterr().err
    assert re.search(rf"process 1 of 2 \(pid \d+\) .*{number.name}", stderr), stderr
    assert ("memory" in stderr) == bool(advice) and stderr.count("jahubert: ") == 1


def main(arguments: list[str]) -> int:
    kind, folder, *rest = arguments
    if kind == "slow-workers":
        return slow_workers(Path(folder), *map(int, rest))
    if kind == "killed-worker":
        return killed_worker(Path(folder), rest[0])
    failing_rank(Path(folder), rest[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
