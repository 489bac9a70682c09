"""Tests that no run waits forever if shared memory is full, data is late, or processes stop or are orphaned.

The tests also run this file as a script with the arguments `KIND FOLDER [WORKERS]` (see `main`).
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from fixtures.resumable import TOY, metric_rows, train_model
from fixtures.toy import Batch, Data, Toy
from safetensors.torch import load_file

from jahubert.errors import JahubertError
from jahubert.train.experiment import distributed
from jahubert.train.experiment.resource_errors import report_file_errors
from jahubert.train.trainer import trainer
from jahubert.train.trainer.stop import StopDeadlineError, stop_signals
from jahubert.train.trainer.trainer import train
from jahubert.train.trainer.watchdog import watchdog

SHORT = 60  # time limit of a run in seconds


@dataclass
class LargeBatch(Batch):
    """A batch with 200 kB of waveforms."""

    wav_BT: torch.Tensor


class LargeData(Data):
    """Data source whose micro-batches take 200 kB of shared memory each. A few fill a small /dev/shm."""

    def load(self, micro):
        return LargeBatch(super().load(micro).x_BD, torch.zeros(50_000))


class FillingData(LargeData):
    """Data source that fills /dev/shm in the third step, as another program could."""

    def load(self, micro):
        if micro.index == 4:
            with suppress(OSError), open("/dev/shm/other", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
        return super().load(micro)


class LateData(Data):
    """Data source that blocks in the second epoch until the file `out/resume` exists."""

    def __init__(self, out: Path):
        super().__init__()
        self.out = out

    def load(self, micro):
        if (micro.epoch, micro.index) >= (0, 8):
            (self.out / "waiting").touch()
            while not (self.out / "resume").exists():
                time.sleep(0.1)
        return super().load(micro)


def start(*arguments: object, shm: str = "") -> subprocess.Popen:
    """Start this file as a script, with a private /dev/shm of size `shm` if it is given."""
    command = [sys.executable, __file__, *map(str, arguments)]
    if shm:
        mount = f"mount -t tmpfs -o size={shm} none /dev/shm && exec " + " ".join(map(repr, command))
        command = ["unshare", "-rm", "sh", "-c", mount]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def can_mount() -> bool:
    mount = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs -o size=64k none /dev/shm"]
    return bool(shutil.which("unshare")) and subprocess.run(mount, capture_output=True).returncode == 0


needs_mount = pytest.mark.skipif(not can_mount(), reason="needs permission to mount a tmpfs")


def wait_for(path: Path, child: subprocess.Popen) -> None:
    while not path.exists():
        assert child.poll() is None, child.communicate()[1]
        time.sleep(0.02)


@needs_mount
@pytest.mark.parametrize(("size", "workers"), [("64k", 8), ("2m", 8), ("64m", 48)])
def test_small_shared_memory_is_rejected_before_the_start(tmp_path, size, workers):
    child = start("shm", tmp_path, workers, shm=size)
    stderr = child.communicate(timeout=SHORT)[1]
    assert child.returncode == 2, stderr
    assert "/dev/shm" in stderr and "train.workers" in stderr and "train.micro_seconds" in stderr
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
@needs_mount
@pytest.mark.parametrize("size", ["64k", "2m"])
def test_full_shared_memory_ends_the_run(tmp_path, size):
    """The check is disabled, as if another program filled the shared memory after the check."""
    child = start("full-shm", tmp_path, 4, shm=size)
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 1, stderr
    assert "shared memory" in stderr and "train.workers" in stderr, stderr
    assert "Traceback" not in stderr


@needs_mount
def test_shared_memory_that_fills_up_during_a_run_is_named(tmp_path):
    """Full shared memory is not mistaken for a full disk."""
    child = start("fill-shm", tmp_path, 2, shm="64m")
    stderr = child.communicate(timeout=60)[1]
    assert child.returncode == 1 and "Traceback" not in stderr, stderr
    assert "/dev/shm" in stderr and "train.workers" in stderr and str(tmp_path) not in stderr, stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("workers", [0, 2])
def test_signal_while_waiting_for_data_saves_the_last_step(tmp_path, number, workers):
    complete, stopped = tmp_path / "complete", tmp_path / "stopped"
    stopped.mkdir()
    child = start("late", stopped, workers)
    wait_for(stopped / "waiting", child)
    time.sleep(1.0)
    child.send_signal(number)
    stderr = child.communicate(timeout=SHORT)[1]
    assert child.returncode == 75 and number.name in stderr and "at step 3" in stderr, stderr
    train_model(complete, "toy")
    train_model(stopped, "toy")
    ends = [load_file(out / "end.safetensors") for out in (complete, stopped)]
    assert all(torch.equal(ends[1][name], value) for name, value in ends[0].items())
    assert metric_rows(stopped) == metric_rows(complete)


def test_deadline_interrupts_only_after_a_signal():
    with stop_signals() as stop:
        with stop.deadline(0.05):
            time.sleep(0.2)
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(StopDeadlineError), stop.deadline(0.05):
            time.sleep(10)
        time.sleep(0.1)  # shows that no timer is left
        stop.names.clear()


def test_stopped_rank_0_is_reported_by_another_rank(tmp_path, capfd):
    started = time.monotonic()
    status = distributed.launch([sys.executable, __file__, "stop-rank-0", str(tmp_path)], 2)
    assert status == 75 and time.monotonic() - started < 90
    stderr = capfd.readouterr().err
    assert stderr.count("jahubert: error: ") == 1 and "process 0 of 2 hangs" in stderr, stderr
    assert "hang_timeout_minutes" in stderr


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["jahubert", "torchrun"])
def test_processes_of_a_killed_launcher_end(tmp_path, launcher):
    """When the launcher is killed, rank 0 is computing and rank 1 is waiting for data."""
    child = start(launcher, tmp_path)
    pids = []
    for rank in range(2):
        wait_for(tmp_path / f"rank-{rank}", child)
        pids.append(int((tmp_path / f"rank-{rank}").read_text()))
    child.kill()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline
        time.sleep(0.1)


class Stopping(Data):
    """Data source that stops rank 0 with SIGSTOP in the third step."""

    reads = 0

    def load(self, micro):
        self.reads += 1
        if distributed.rank() == 0 and self.reads == 5:
            os.kill(os.getpid(), signal.SIGSTOP)
        return super().load(micro)


class Announcing(LateData):
    """Data source that writes the process ID of its rank to a file in the third step, where rank 1 blocks."""

    def load(self, micro):
        if micro.index >= 4:
            path = self.out / f"rank-{distributed.rank()}"
            path.with_suffix(".tmp").write_text(str(os.getpid()))
            path.with_suffix(".tmp").rename(path)
            if distributed.rank() == 1:
                time.sleep(1000)
        return Data.load(self, micro)


def main(kind: str, folder: str, workers: str = "0") -> int:
    out, config = Path(folder), replace(TOY, workers=int(workers))
    torch.manual_seed(0)
    if kind in ("jahubert", "torchrun"):
        command = [sys.executable, __file__, "announce", folder]
        if kind == "jahubert":
            return distributed.launch(command, 2)
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        os.execv(sys.executable, [sys.executable, *torchrun, *command[1:]])
    if kind == "full-shm":
        trainer.check_shared_memory = lambda config: None
    data = {
        "shm": LargeData,
        "full-shm": LargeData,
        "fill-shm": FillingData,
        "late": lambda: LateData(out),
        "stop-rank-0": lambda: Stopping(groups=4),
        "announce": lambda: Announcing(out),
    }[kind]()
    try:
        with distributed.process_group(), report_file_errors(out):
            if kind == "stop-rank-0":
                config = replace(config, batch_seconds=24.0)
                train(Toy(), Data(groups=4), replace(config, max_steps=1), out / "before")
                with watchdog(2 / 60):
                    train(Toy(), data, config, out)
            else:
                train(Toy(), data, config, out)
    except JahubertError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
