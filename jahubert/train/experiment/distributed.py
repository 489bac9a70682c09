"""Process group of a run: ranks, device selection, collectives, heartbeats and a local launcher.

A run is distributed if torchrun, or a launcher that sets the same environment variables, started several
processes. Without a process group, all functions behave as in a group of one process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from jahubert.errors import ConfigError, JahubertError, Stopped, UserError
from jahubert.model import device as devices
from jahubert.prefetch import usable_cores
from jahubert.train.experiment.stopping import STOPPING, stopping_signals

T = TypeVar("T")

_GRACE = 10.0  # grace period in seconds before SIGTERM is sent, and again before SIGKILL


def process_device(name: str) -> torch.device:
    """Select the device for this process.

    `cuda` selects the GPU of the local rank; `auto` selects the same GPU if available, otherwise the CPU.
    `auto` never selects an Apple GPU, because training sums losses in float64, which MPS does not support.

    Raises:
        ConfigError: the device is unknown or unavailable, or several processes would share one GPU.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and world() > 1:
        raise ConfigError(
            f"device={name}: {world()} processes would share one GPU; set device=cuda to use one GPU each"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and 0 < n_gpus <= local_rank:
        raise ConfigError(
            f"device={name}: process {local_rank} on this machine needs GPU {local_rank}, but the number of "
            f"GPUs is {n_gpus}; start one process per GPU, or set device=cpu"
        )
    return devices.pick_device(f"cuda:{local_rank}" if name == "cuda" else name)


def _print_traceback(error: BaseException) -> int:
    traceback.print_exception(error)
    return 1


@contextmanager
def process_group(report: Callable[[BaseException], int] = _print_traceback) -> Iterator[None]:
    """Initialize the process group if a launcher started several processes, and destroy it after the block.

    A process that fails exits immediately without destroying the group. Other ranks may be waiting for it in
    a collective, and destroying an NCCL group would wait for them. The launcher or the lost connection ends
    the other ranks.

    Args:
        report: function that prints an error raised in the block and returns the exit status.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    _stop_with_parent()  # torchrun does not stop its processes if it is killed
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # gloo serves stages on the CPU and transfers Python objects
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(local_rank)
    # NCCL's default timeout of ten minutes is too short, because ranks may wait for hours, for example while
    # rank 0 prepares a corpus. The watchdog detects hanging ranks.
    dist.init_process_group(backend, timeout=timedelta(days=7))
    try:
        yield
    except (Stopped, SystemExit):  # all ranks raise these exceptions
        dist.destroy_process_group()
        raise
    except BaseException as error:
        status = report(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Heartbeat(NamedTuple):
    """Progress of one process; the watchdog compares the heartbeats of all ranks."""

    number: int  # number of `heartbeat` calls so far; the rank with the lowest number is the slowest
    activity: str  # current activity, e.g. "computing step 7"
    updated: float  # value of time.monotonic() when progress was last recorded
    rank0_only: bool  # whether only rank 0 is working, which suspends the hang timeout


# The tuple is always replaced as a whole, because the watchdog thread reads it.
_heartbeat = Heartbeat(0, "starting", time.monotonic(), rank0_only=False)


def last_heartbeat() -> Heartbeat:
    return _heartbeat


def heartbeat(activity: str) -> None:
    """Record the start of an activity; all ranks must record the same activities in the same order."""
    global _heartbeat
    _heartbeat = Heartbeat(_heartbeat.number + 1, activity, time.monotonic(), rank0_only=False)


def tick() -> None:
    """Record progress within an activity; call this in loops whose length may differ between ranks."""
    global _heartbeat
    _heartbeat = _heartbeat._replace(updated=time.monotonic())


@contextmanager
def _rank0_only() -> Iterator[None]:
    """Suspend the hang timeout while only rank 0 is working."""
    global _heartbeat
    _heartbeat = _heartbeat._replace(rank0_only=True)
    yield
    _heartbeat = _heartbeat._replace(rank0_only=False, updated=time.monotonic())


@contextmanager
def _waiting_for_ranks() -> Iterator[None]:
    """Record a heartbeat before and after a collective operation."""
    activity = _heartbeat.activity
    heartbeat(f"{activity}, waiting for the other ranks")
    yield
    heartbeat(activity)


def barrier() -> None:
    if dist.is_initialized():
        with _waiting_for_ranks():
            dist.barrier()


def rank0_broadcast(work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its result on all ranks.

    Raises:
        UserError, OSError: `work` raised this error on rank 0. The other ranks raise a copy that is marked as
            reported. For an OSError, the copy is a UserError if the error names a file, otherwise a
            JahubertError.
    """
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            with _rank0_only():
                box[0] = work()
        except (UserError, OSError) as error:
            box[1] = error
    with _waiting_for_ranks():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        failure = box[1]
        if rank() != 0:  # rank 0 reports the error
            if isinstance(failure, OSError):
                failure = (UserError if failure.filename else JahubertError)(str(failure))
            failure.reported = True
        raise failure
    result: T = box[0]
    return result


@contextmanager
def rank0_reports() -> Iterator[None]:
    """Mark a UserError as reported on all ranks except rank 0, in code that raises it on all ranks."""
    try:
        yield
    except UserError as error:
        error.reported = rank() != 0
        raise


def gather_interleaved(items: list[T]) -> list[T]:
    """Gather items that were distributed over the ranks in round-robin order, in their original order."""
    if not dist.is_initialized():
        return items
    parts: list[Any] = [None] * world()
    with _waiting_for_ranks():
        dist.all_gather_object(parts, items)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def launch(command: Sequence[str], n: int) -> int:
    """Run `command` as a process group of `n` processes on this machine, like torchrun on a single node.

    Stop signals are forwarded to all processes. If a process fails, all other processes are stopped.

    Returns:
        0 if all processes succeed, otherwise the exit status of the process that failed first. If several
        processes failed at the same time, this is the highest status, because a process that only lost its
        connection exits with status 1.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, usable_cores() // n))
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children: list[subprocess.Popen[bytes]] = []

    def forward(signum: int, _: Any) -> None:
        for child in children:
            child.send_signal(signum)

    previous = {signum: signal.signal(signum, forward) for signum in stopping_signals()}
    try:
        for i in range(n):
            ranks = {"RANK": str(i), "LOCAL_RANK": str(i)}
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, **ranks}
            stop_with_parent = _stop_with_parent if sys.platform == "linux" else None
            children.append(subprocess.Popen(command, env=environment, preexec_fn=stop_with_parent))
        while True:
            return_codes = [child.poll() for child in children]
            if any(return_codes) or all(code == 0 for code in return_codes):
                break
            time.sleep(0.1)
        status = max(
            _exit_status(code or 0, f"process {i} of {n} (pid {children[i].pid})")
            for i, code in enumerate(return_codes)
        )
        _terminate(children)  # the remaining processes may be waiting in a collective
        return status
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _exit_status(return_code: int, name: str) -> int:
    """Convert the return code of a child to an exit status, and report the signal if one killed the child."""
    if return_code >= 0:
        return return_code
    signum = signal.Signals(-return_code)
    status = 1
    advice = ""
    if signum in STOPPING:
        status = 128 + signum if signum == signal.SIGINT else Stopped.exit_status
        advice = " during startup; rerun the same command to resume"
    elif signum == signal.SIGKILL:
        advice = (
            ", probably because the system ran out of memory: use fewer workers or processes, or set "
            "pretrain.crop.keep_in_memory_hours=0 or finetune.keep_in_memory_hours=0, and rerun the same "
            "command to resume"
        )
    print(f"jahubert: error: {name} was killed by {signum.name}{advice}", file=sys.stderr)
    return status


def _stop_with_parent() -> None:
    """Make Linux send SIGTERM to this process when its parent dies, even if SIGKILL ended the parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _terminate(children: Sequence[subprocess.Popen[bytes]]) -> None:
    """Wait for processes to exit, then send SIGTERM and, to end processes that are blocked, SIGKILL."""
    for action in (lambda _: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            action(child)
        deadline = time.monotonic() + _GRACE
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, deadline - time.monotonic()))


def all_reduce_(values: torch.Tensor) -> None:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        with _waiting_for_ranks():
            dist.all_reduce(values)


def all_reduce_sums(sums: dict[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Sum each value over all ranks in float64. All ranks must pass the same keys in the same order."""
    values = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in sums.values()]
    )
    all_reduce_(values)
    return dict(zip(sums, values.tolist(), strict=True))
