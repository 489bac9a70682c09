"""How a run ends before its time: by a signal to some or all of its processes, by an error in one of them.

As a script it is the victim: `FILE read FOLDER [ROW]`, `FILE killed-reader FOLDER STAGE`, or, as one of two
processes, `FILE alone FOLDER ERROR`.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fixtures import FIXTURES
from fixtures.resumable import learn, lines, make
from fixtures.toy import Data
from safetensors.torch import load_file

from jahubert import run
from jahubert.errors import DataError, JahubertError
from jahubert.train.data.batches import CropConfig
from jahubert.train.experiment import distributed
from jahubert.train.experiment.resource_errors import report_oom
from jahubert.train.pipeline import runner
from jahubert.train.pipeline.reporting import report_error
from jahubert.train.trainer.trainer import Stopped, train

TONES = FIXTURES / "tones"


class Watched(Data):
    """Its readers take their time and write down who they are."""

    def __init__(self, out: Path, bad: int | None):
        super().__init__(bad=bad)
        self.out = out

    def load(self, micro):
        (self.out / f"reader-{os.getpid()}").touch()
        time.sleep(0.02)
        return super().load(micro)


def read(out: Path, bad: int | None = None) -> int:
    """A training with two readers; `bad` is a row whose loss is no number."""
    module, _, config = make("toy")
    try:
        train(module, Watched(out, bad), replace(config, workers=2), out)
    except Stopped as stop:
        print(stop, file=sys.stderr)
        return stop.exit_status
    return 0


def started_reading(out: Path) -> subprocess.Popen:
    """A process in which `read` has come to its first checkpoint."""
    child = subprocess.Popen(
        [sys.executable, __file__, "read", str(out)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not (out / "checkpoints" / "step_0000004").exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)
    return child


@pytest.mark.parametrize(
    ("number", "each"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, False)]
)
def test_a_signal_to_the_readers_too_stops_the_run_and_breaks_nothing(tmp_path, number, each):
    """As a launcher and a scheduler send it: to the group of processes, or to each of them."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    stopped.mkdir()
    child = started_reading(stopped)
    if each:
        for path in stopped.glob("reader-*"):
            os.kill(int(path.name.removeprefix("reader-")), number)
        time.sleep(0.1)  # the first to hear of it are the readers
        os.kill(child.pid, number)
    else:
        os.killpg(child.pid, number)
    said = child.communicate(timeout=30)[1]  # comes to its end when the last reader is gone
    assert child.returncode == 75 and number.name in said, said
    learn(whole, "toy")
    learn(stopped, "toy")
    ends = [load_file(out / "end.safetensors") for out in (whole, stopped)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert lines(stopped) == lines(whole)


def test_an_error_does_not_wait_for_its_readers(tmp_path):
    done = subprocess.run(
        [sys.executable, __file__, "read", str(tmp_path), "11"], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 1 and "the loss is nan" in done.stderr


@pytest.mark.slow
def test_readers_leave_when_their_process_is_killed(tmp_path):
    child = started_reading(tmp_path)
    child.kill()
    child.communicate(timeout=30)
    assert len(list(tmp_path.glob("reader-*"))) == 2 and child.returncode == -signal.SIGKILL


class KillsReader(Data):
    """Its readers are killed in the third epoch, as the kernel does when memory is short."""

    def load(self, micro):
        if micro.epoch == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(micro)


def killed_reader(out: Path, stage: str) -> int:
    """A training whose readers are killed; the exit status of the error that it ends with."""
    module, _, config = make("toy")
    config = replace(config, workers=2)
    crop = {"crop": CropConfig()} if stage == "pretrain" else {}
    try:
        with report_oom(stage, SimpleNamespace(train=config, **crop)):
            train(module, KillsReader(), config, out)
    except JahubertError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_reader_names_the_settings_to_change(tmp_path, stage):
    """In a process of its own: torch raises a reader's death in the main thread, whatever that is doing."""
    command = [sys.executable, __file__, "killed-reader", str(tmp_path), stage]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert re.search(rf"{stage}, at .* step \d+: DataLoader worker \(pid.*\)", done.stderr), done.stderr
    assert f"{stage}.train.workers" in done.stderr
    assert ("pretrain.crop.keep_in_memory_hours=0" in done.stderr) == (stage == "pretrain")


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_outside_of_training_asks_for_the_same_command(tmp_path, number, processes):
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
    os.killpg(child.pid, number)  # as a scheduler does, to the one that started the others too
    said = child.communicate(timeout=30)[1]
    assert child.returncode == 75 and "Traceback" not in said, said
    assert said.count(f"received {number.name}: finished work is kept; rerun the same command") == 1, said
    assert run.main(command) == 0


@pytest.mark.parametrize("seconds", [0.3, 0.8, 1.5])
def test_a_signal_while_it_starts_asks_for_the_same_command(tmp_path, seconds):
    child = subprocess.Popen(
        [sys.executable, "-m", "jahubert.run", f"recipe={TONES}", "stage=prepare", f"exp={tmp_path / 'exp'}"],
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(seconds)
    child.send_signal(signal.SIGUSR1)
    said = child.communicate(timeout=30)[1]
    assert (child.returncode == 75 and "received SIGUSR1" in said) or child.returncode == 0, said
    assert "Traceback" not in said


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_signal_broke_off_may_fail_in_another_way_or_swallow_it(capsys, monkeypatch, fails):
    def broken(_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:  # as imports of extensions do
            if fails:
                raise AttributeError("half done") from None
        return {"processes": 1}

    monkeypatch.setattr(runner, "compose", broken)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        assert run.main(["recipe=demo", "stage=all"]) == 75
    finally:
        signal.signal(signal.SIGTERM, handler)
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert capsys.readouterr().err.startswith("jahubert: received SIGTERM: finished work is kept")


ERRORS: dict[str, Callable[[], BaseException]] = {
    "user": lambda: DataError("utterance 7 is broken"),
    "file": lambda: FileNotFoundError(2, "No such file or directory", "a.wav"),
    "bug": lambda: ZeroDivisionError("one of ours"),
}


def alone(folder: Path, error: str) -> None:
    """An error in the last process while the first waits for it; who takes the group apart waits for all."""
    dist.destroy_process_group = lambda: time.sleep(1000)  # as with NCCL
    with distributed.process_group(report_error):
        if distributed.rank() == 1:
            raise ERRORS[error]()
        distributed.barrier()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        ("user", 2, "jahubert: error: utterance 7 is broken"),
        ("file", 2, "jahubert: error: a.wav: No such file or directory"),
        ("bug", 1, "ZeroDivisionError: one of ours"),
    ],
)
def test_an_error_of_one_process_is_told_at_once_and_ends_all(
    tmp_path, capfd, monkeypatch, error, status, said
):
    started = time.monotonic()
    command = [sys.executable, __file__, "alone", str(tmp_path), error]
    assert (
        distributed.launch(command, 2) == status
    )  # though the first process notices, perhaps at the same moment
    assert time.monotonic() - started < 15
    told = capfd.readouterr().err
    assert told.count(said) == 1 and told.count("exiting because another rank failed") == 1, told
    assert ("Traceback" in told) == (error == "bug")


def test_processes_that_do_not_leave_are_waited_for_together(monkeypatch):
    monkeypatch.setattr(distributed, "_GRACE", 1.0)
    deaf = "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    command = [
        sys.executable,
        "-c",
        f"{deaf}; sys.exit(3) if os.environ['RANK'] == '0' else time.sleep(1000)",
    ]
    started = time.monotonic()
    assert distributed.launch(command, 6) == 3
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("number", "status", "advice"),
    [(signal.SIGKILL, 1, "memory"), (signal.SIGSEGV, 1, ""), (signal.SIGUSR1, 75, "")],
)
def test_a_process_that_dies_by_a_signal_is_named(capfd, monkeypatch, number, status, advice):
    """Which cannot say it itself, and whose status no table has. One to stop came while it was importing."""
    dies = f"import os, time; os.environ['RANK'] == '0' and time.sleep(1000); os.kill(os.getpid(), {number})"
    monkeypatch.setattr(distributed, "_GRACE", 0.2)
    assert distributed.launch([sys.executable, "-c", dies], 2) == status
    said = capfd.readouterr().err
    assert re.search(rf"jahubert: error: process 1 of 2 \(pid \d+\) was ended by {number.name}", said), said
    assert ("out of memory" in said) == bool(advice) and said.count("jahubert: ") == 1


def main(arguments: list[str]) -> int:
    kind, folder, *rest = arguments
    if kind == "read":
        return read(Path(folder), *map(int, rest))
    if kind == "killed-reader":
        return killed_reader(Path(folder), rest[0])
    alone(Path(folder), rest[0])
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
