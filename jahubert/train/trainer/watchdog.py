"""Watchdog that ends a distributed run when one of its processes hangs, and names that process.

When one process of a group hangs (a dead file server, a stuck GPU), all others wait for it in a collective
operation without knowing for whom. A thread in every process therefore publishes the last heartbeat of its
process in a key-value store on rank 0. When its own process has made no progress for the time limit, the
thread reads the heartbeats of all. A process that is behind the others and gave no sign of life is reported
with its stack, and all processes exit with the status that asks a scheduler to restart them. A process that
is only slow, because its share of the work is the largest, still ticks and is left alone.

A second thread covers the case that rank 0 itself, and with it the store, no longer responds.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch.distributed as dist
from tqdm import tqdm

from jahubert import prefetch
from jahubert.errors import Stopped
from jahubert.train.experiment import distributed

_STORE_TIMEOUT = timedelta(seconds=30)
_RESUME = "what was saved is kept; rerun the same command to resume"


@dataclass(frozen=True)
class Status:
    """The state of a process as published in the store."""

    name: str  # of the process
    number: int  # of its heartbeat; the process with the smallest number is behind
    place: str
    seconds: float  # since the last sign of life
    alone: bool  # doing work of rank 0 that has no time limit
    stack: str  # of the main thread; only published once the process seems to hang


@contextmanager
def watchdog(minutes: float) -> Iterator[None]:
    """Watch the processes inside the block, which all of them enter together.

    Args:
        minutes: without a sign of life until a process that is behind is reported and all exit; 0: never.
    """
    if distributed.world() == 1 or not minutes:
        yield
        return
    watcher = _Watcher(60 * minutes)
    threads = [
        threading.Thread(target=work, name="watchdog", daemon=True)
        for work in (watcher.watch, watcher.watch_store)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        watcher.done.set()
        for thread in threads:
            thread.join(timeout=_STORE_TIMEOUT.total_seconds())  # the thread may be blocked on the store


class _Watcher:
    """The watchdog of one process and its connection to the store on rank 0."""

    def __init__(self, limit: float):
        self.limit, self.interval, self.done = limit, min(10.0, limit / 10), threading.Event()
        self.rank, self.world = distributed.rank(), distributed.world()
        self.main_thread = threading.get_ident()
        self.name = f"process {self.rank} of {self.world} (pid {os.getpid()} on {socket.gethostname()})"
        self.seen: dict[int, tuple[bytes, float]] = {}  # rank: its last status, and when it was first read
        self.unanswered = 0  # intervals since the store last responded

        def store(port: int) -> dist.TCPStore:
            host, server = os.environ["MASTER_ADDR"], self.rank == 0
            return dist.TCPStore(host, port, is_master=server, wait_for_workers=False, timeout=_STORE_TIMEOUT)

        server = store(0) if self.rank == 0 else None
        port = distributed.rank0_broadcast(lambda: server.port if server else 0)
        self.store = server or store(port)
        self._publish()
        distributed.barrier()  # wait until all processes have published a status

    def watch(self) -> None:
        """Publish this process's status; check the others once this process has waited too long."""
        while not self.done.wait(self.interval):
            waiting = time.monotonic() - distributed.last_heartbeat().updated > self.limit
            try:
                self._publish()
                if waiting and (report := self._report()) and self.store.add("reports", 1) == 1:
                    tqdm.write(f"jahubert: error: {report}", file=sys.stderr)
                    self.store.set("exit", "")
                ending = self.store.check(["exit"])
                self.unanswered = 0
            except RuntimeError:  # the store ended with rank 0
                ending = waiting
            if ending and self.rank == 0:  # the other ranks read the request to exit from its store
                self.done.wait(2 * self.interval)
            if ending:
                self._exit()

    def watch_store(self) -> None:
        """Exit when rank 0 no longer responds: `watch` then blocks on its store, which has no timeout.

        Counts intervals, not seconds: a group of processes that was suspended as a whole goes on.
        """
        while not self.done.wait(self.interval):
            self.unanswered += 1
            if self.unanswered * self.interval <= self.limit + 2 * self.interval:
                continue
            if self.rank == 1:  # one report is enough
                tqdm.write(
                    f"jahubert: error: process 0 of {self.world} hangs: no response from it for "
                    f"{self.unanswered * self.interval:.0f} s; {distributed.last_heartbeat().activity} in "
                    f"{self.name}. The limit is hang_timeout_minutes={self.limit / 60:g}; {_RESUME}",
                    file=sys.stderr,
                )
            self._exit()

    def _exit(self) -> None:
        if not self.done.is_set():
            os._exit(Stopped.exit_status)  # the main thread is blocked and would never return

    def _publish(self) -> None:
        heartbeat = distributed.last_heartbeat()
        seconds = time.monotonic() - heartbeat.updated
        stack = self._stack() if seconds > self.limit / 2 else ""
        status = Status(self.name, heartbeat.number, heartbeat.activity, seconds, heartbeat.rank0_only, stack)
        self.store.set(str(self.rank), json.dumps(asdict(status)))

    def _statuses(self) -> list[Status]:
        """Statuses of all processes. The age of a status that is no longer updated keeps growing."""
        statuses, now = [], time.monotonic()
        for rank, text in enumerate(self.store.multi_get([str(rank) for rank in range(self.world)])):
            if rank not in self.seen or self.seen[rank][0] != text:
                self.seen[rank] = text, now
            status = Status(**json.loads(text))
            statuses.append(replace(status, seconds=status.seconds + now - self.seen[rank][1]))
        return statuses

    def _report(self) -> str:
        """Describe the processes that hang; empty if none do."""
        statuses = self._statuses()
        least = min(status.number for status in statuses)
        behind = [status for status in statuses if status.number == least]
        hanging = [status for status in behind if status.seconds > self.limit and not status.alone]
        if not hanging:
            return ""
        names = "; ".join(
            f"{status.name} hangs: at {status.place} for {status.seconds:.0f} s" for status in hanging
        )
        return (
            f"{names}; {len(statuses) - len(behind)} of {self.world} processes wait. The limit is "
            f"hang_timeout_minutes={self.limit / 60:g}; {_RESUME}. "
            f"Stack of {hanging[0].name}:\n{hanging[0].stack}"
        )

    def _stack(self) -> str:
        """The innermost frames of the main thread and of busy prefetching threads."""
        frames = sys._current_frames()
        threads = [
            thread.ident for thread in threading.enumerate() if thread.name.startswith(prefetch.THREAD_PREFIX)
        ]
        lines = []
        for thread in (self.main_thread, *threads):
            if thread not in frames:
                continue
            stack = traceback.format_stack(frames[thread])
            idle = thread != self.main_thread and "work_queue.get" in stack[-1]
            if not idle:
                lines += stack[-4:]
        return "".join(lines)
