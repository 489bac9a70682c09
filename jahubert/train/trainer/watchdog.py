"""Watchdog that ends a distributed run when one of its processes hangs, and reports that process.

If one process hangs, for example because of a dead file server or a stuck GPU, all other processes block in a
collective operation and cannot determine which process they are waiting for. Therefore a thread in every
process publishes the latest heartbeat of the process in a key-value store on rank 0. If the process makes no
progress within the time limit, the thread compares the heartbeats of all processes. A process that is behind
and inactive is reported with its stack, and all processes exit with the status that asks a scheduler to
restart the job. A process that is only slow still updates its heartbeat and is not reported.

A second thread handles the case in which rank 0, and with it the store, stops responding.
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
_RESUME = "saved files are kept; rerun the same command to resume"


@dataclass(frozen=True)
class Status:
    """The state of one process, as published in the store."""

    name: str  # rank, process id and host of the process
    number: int  # heartbeat counter; the processes with the smallest number are behind
    activity: str  # current activity, e.g. "computing step 7"
    seconds: float  # time since the heartbeat was last updated
    rank0_only: bool  # rank 0 is doing work that has no time limit while the others wait
    stack: str  # stacks of the main thread and of prefetching threads; empty unless the process seems to hang


@contextmanager
def watchdog(minutes: float) -> Iterator[None]:
    """Watch for hanging processes during the `with` block, which all processes must enter.

    Args:
        minutes: time without activity after which a process is considered hanging; 0 disables the watchdog.
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
    """The watchdog of one process, with a connection to the store on rank 0."""

    def __init__(self, limit: float):
        self.limit, self.interval, self.done = limit, min(10.0, limit / 10), threading.Event()
        self.rank, self.world = distributed.rank(), distributed.world()
        self.main_thread = threading.get_ident()
        self.name = f"process {self.rank} of {self.world} (pid {os.getpid()} on {socket.gethostname()})"
        # The last status of each rank, and the time at which it was first read.
        self.last_read: dict[int, tuple[bytes, float]] = {}
        self.unanswered = 0  # number of intervals since the last response of the store

        def store(port: int) -> dist.TCPStore:
            host, server = os.environ["MASTER_ADDR"], self.rank == 0
            return dist.TCPStore(host, port, is_master=server, wait_for_workers=False, timeout=_STORE_TIMEOUT)

        server = store(0) if self.rank == 0 else None
        port = distributed.rank0_broadcast(lambda: server.port if server else 0)
        self.store = server or store(port)
        self._publish()
        distributed.barrier()  # waits until all processes have published a status

    def watch(self) -> None:
        """Publish the status of this process, and check all processes once this one has waited too long."""
        while not self.done.wait(self.interval):
            waiting = time.monotonic() - distributed.last_heartbeat().updated > self.limit
            try:
                self._publish()
                if waiting and (report := self._report()) and self.store.add("reports", 1) == 1:
                    tqdm.write(f"jahubert: error: {report}", file=sys.stderr)
                    self.store.set("exit", "")
                ending = self.store.check(["exit"])
                self.unanswered = 0
            except RuntimeError:  # rank 0 has exited, and the store with it
                ending = waiting
            if ending and self.rank == 0:  # keeps the store until the other ranks have read the exit request
                self.done.wait(2 * self.interval)
            if ending:
                self._exit()

    def watch_store(self) -> None:
        """Exit if rank 0 stops responding. In this case, `watch` blocks on the store without a timeout.

        The method counts intervals instead of seconds, so that a run is not ended after it was suspended.
        """
        while not self.done.wait(self.interval):
            self.unanswered += 1
            if self.unanswered * self.interval <= self.limit + 2 * self.interval:
                continue
            if self.rank == 1:  # only one process reports the failure
                tqdm.write(
                    f"jahubert: error: process 0 of {self.world} hangs: it has not responded for "
                    f"{self.unanswered * self.interval:.0f} s, while {self.name} was "
                    f"{distributed.last_heartbeat().activity}. "
                    f"The limit is hang_timeout_minutes={self.limit / 60:g}; {_RESUME}",
                    file=sys.stderr,
                )
            self._exit()

    def _exit(self) -> None:
        if not self.done.is_set():
            os._exit(Stopped.exit_status)  # a regular exit would wait for the blocked main thread

    def _publish(self) -> None:
        heartbeat = distributed.last_heartbeat()
        seconds = time.monotonic() - heartbeat.updated
        stack = self._stack() if seconds > self.limit / 2 else ""
        status = Status(self.name, heartbeat.number, heartbeat.activity, seconds, heartbeat.rank0_only, stack)
        self.store.set(str(self.rank), json.dumps(asdict(status)))

    def _statuses(self) -> list[Status]:
        """Read the statuses of all processes, and add the age of each status to its `seconds`."""
        statuses, now = [], time.monotonic()
        for rank, text in enumerate(self.store.multi_get([str(rank) for rank in range(self.world)])):
            if rank not in self.last_read or self.last_read[rank][0] != text:
                self.last_read[rank] = text, now
            status = Status(**json.loads(text))
            statuses.append(replace(status, seconds=status.seconds + now - self.last_read[rank][1]))
        return statuses

    def _report(self) -> str:
        """Return a description of the hanging processes, or an empty string if there are none."""
        statuses = self._statuses()
        least = min(status.number for status in statuses)
        behind = [status for status in statuses if status.number == least]
        hanging = [status for status in behind if status.seconds > self.limit and not status.rank0_only]
        if not hanging:
            return ""
        names = "; ".join(
            f"{status.name} hangs: {status.activity} for {status.seconds:.0f} s" for status in hanging
        )
        return (
            f"{names}; waiting processes: {len(statuses) - len(behind)} of {self.world}. "
            f"The limit is hang_timeout_minutes={self.limit / 60:g}; {_RESUME}. "
            f"Stack of {hanging[0].name}:\n{hanging[0].stack}"
        )

    def _stack(self) -> str:
        """Format the innermost stack frames of the main thread and of the busy prefetching threads."""
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
