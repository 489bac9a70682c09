"""Process group of a run: rank, world size, device, collectives, heartbeat and local launcher.

There are several processes if torchrun, or a launcher that sets the same variables, started them; without a
process group every function acts on the single process.
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
from jahubert.model.device import pick_device

T = TypeVar("T")

# The signals that ask a run to stop; Windows has no SIGUSR1.
STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
_GRACE = 10.0  # seconds between asking processes to leave and making them


def process_device(name: str) -> torch.device:
    """The device of this process: `cuda` is the GPU with its local rank, `auto` that GPU or else the CPU.

    `auto` never picks an Apple GPU, because training sums losses in float64, which MPS lacks.

    Raises:
        ConfigError: unknown or unavailable device, or a single GPU for several processes.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and world() > 1:
        raise ConfigError(
            f"device={name}: {world()} processes would share one GPU; with device=cuda each has its own"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and 0 < n_gpus <= local_rank:
        raise ConfigError(
            f"device={name}: process {local_rank} of this machine needs GPU {local_rank}, but torch sees "
            f"{n_gpus}; start one process per GPU, or set device=cpu"
        )
    return pick_device(f"cuda:{local_rank}" if name == "cuda" else name)


def _traced(error: BaseException) -> int:
    traceback.print_exception(error)
    return 1


@contextmanager
def process_group(tell: Callable[[BaseException], int] = _traced) -> Iterator[None]:
    """Join the other processes if a launcher started several; leave them at the end.

    Args:
        tell: says what is wrong when the work inside failed, and gives the exit status with which a process
            of several ends here. Others may wait for it inside a sum, so the group is not taken apart: with
            NCCL that waits for them. Its launcher, or the connection that it lost, ends each of them.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    _end_with_parent()  # torchrun does not arrange this
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # a stage may run on the CPU, and Python objects always do
        number = int(os.environ.get("LOCAL_RANK", 0))
        if number < torch.cuda.device_count():
            torch.cuda.set_device(number)
    # Processes wait for each other's share of a stage, and while the first one prepares a corpus; NCCL
    # would give up after ten minutes. Who hangs is `watch`'s to say.
    dist.init_process_group(backend, timeout=timedelta(days=7))
    try:
        yield
    except (Stopped, SystemExit):  # in all of them
        dist.destroy_process_group()
        raise
    except BaseException as error:
        status = tell(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class Heartbeat(NamedTuple):
    """What this process is at, for `watch`."""

    number: int  # of the place: all processes come to the same ones, so the smallest is behind
    place: str
    moved: float  # when it last gave a sign of life, of time.monotonic()
    alone: bool  # at work that only the first process does, and that may take as long as it takes


_pulse = Heartbeat(0, "the start", time.monotonic(), alone=False)  # one assignment, since two threads use it


def last_heartbeat() -> Heartbeat:
    return _pulse


def heartbeat(place: str) -> None:
    """Say what this process comes to: all processes say it as often, in the same order."""
    global _pulse
    _pulse = Heartbeat(_pulse.number + 1, place, time.monotonic(), alone=False)


def tick() -> None:
    """A sign of life on the way to the next place, from a loop that is another one in each process."""
    global _pulse
    _pulse = _pulse._replace(moved=time.monotonic())


@contextmanager
def _alone() -> Iterator[None]:
    global _pulse
    _pulse = _pulse._replace(alone=True)
    yield
    _pulse = _pulse._replace(alone=False, moved=time.monotonic())


@contextmanager
def _meeting() -> Iterator[None]:
    """Around what waits for all processes."""
    place = _pulse.place
    heartbeat(f"{place}, waiting for the others")
    yield
    heartbeat(place)


def barrier() -> None:
    if dist.is_initialized():
        with _meeting():
            dist.barrier()


def rank0_broadcast(work: Callable[[], T]) -> T:
    """What `work` gives in the first process, in all processes; an error of the user's is raised in all."""
    if not dist.is_initialized():
        return work()
    box: list[Any] = [None, None]
    if rank() == 0:
        try:
            with _alone():
                box[0] = work()
        except (UserError, OSError) as error:
            box[1] = error
    with _meeting():
        dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        failure = box[1]
        if rank() != 0:  # the first process reports it
            if isinstance(failure, OSError):
                failure = (UserError if failure.filename else JahubertError)(str(failure))
            failure.reported = True
        raise failure
    return box[0]


@contextmanager
def rank0_reports() -> Iterator[None]:
    """For what all processes do alike: an error of the user's is raised in all, and the first one tells."""
    try:
        yield
    except UserError as error:
        error.reported = rank() != 0
        raise


def gather_interleaved(mine: list[T]) -> list[T]:
    """What the processes made of things that were dealt out to them in turn, in the order of the things."""
    if not dist.is_initialized():
        return mine
    parts: list[Any] = [None] * world()
    with _meeting():
        dist.all_gather_object(parts, mine)
    return [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]


def launch(command: Sequence[str], n: int) -> int:
    """Run `command` as `n` processes of one group on this machine; the exit status of the first that fails.

    Of several that failed at one moment, the highest: whoever only lost another one leaves with 1.

    What torchrun does for one machine, without its report on top of ours. Signals to stop go to all.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threads = str(max(1, (os.cpu_count() or 1) // n))
    shared = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    children: list[subprocess.Popen] = []

    def forward(number: int, _: Any) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in STOPPING}
    try:
        for number in range(n):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)}
            environment = {"OMP_NUM_THREADS": threads, **os.environ, **shared, **own}
            children.append(
                subprocess.Popen(
                    command, env=environment, preexec_fn=_end_with_parent if sys.platform == "linux" else None
                )
            )
        while not any(ends := [child.poll() or 0 for child in children]):
            if all(child.returncode == 0 for child in children):
                break
            time.sleep(0.1)
        status = max(
            _status(end, f"process {i} of {n} (pid {children[i].pid})") for i, end in enumerate(ends)
        )
        _end(children)  # they may wait for the one that is gone
        return status
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _status(end: int, name: str) -> int:
    """The exit status that stands for how a process ended; says what it cannot have said itself."""
    if end >= 0:
        return end
    by = signal.Signals(-end)
    status, why = 1, ""
    if by in STOPPING:
        status = 128 + by if by == signal.SIGINT else Stopped.exit_status
        why = " while it was starting; rerun the same command to resume"
    elif by == signal.SIGKILL:
        why = (
            ". Unless someone killed it, the system ran out of memory: use fewer workers or processes, or "
            "crop.keep_in_memory_hours=0, and rerun the same command to resume"
        )
    print(f"jahubert: error: {name} was ended by {by.name}{why}", file=sys.stderr)
    return status


def _end_with_parent() -> None:
    """In a child: be told to stop when its parent dies, which by kill -9 cannot tell."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end(children: Sequence[subprocess.Popen]) -> None:
    """Give processes time to leave, ask them to, and make them: inside a sum over processes none hears it."""
    for action in (lambda _: None, subprocess.Popen.terminate, subprocess.Popen.kill):
        for child in children:
            action(child)
        until = time.monotonic() + _GRACE
        for child in children:
            with suppress(subprocess.TimeoutExpired):
                child.wait(timeout=max(0.0, until - time.monotonic()))


def all_reduce_(values: torch.Tensor) -> None:
    """Sum a tensor over all processes, in place."""
    if dist.is_initialized():
        with _meeting():
            dist.all_reduce(values)


def all_reduce_sums(sums: dict[str, torch.Tensor | float], device: torch.device) -> dict[str, float]:
    """Each value summed over all processes, in float64; keys must be the same everywhere."""
    values = torch.stack(
        [torch.as_tensor(value, dtype=torch.float64, device=device).detach() for value in sums.values()]
    )
    all_reduce_(values)
    return dict(zip(sums, values.tolist(), strict=True))
