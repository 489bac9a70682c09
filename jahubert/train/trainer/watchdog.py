"""Which process hangs: each says in a store that all can reach what it is at, and for how long.

In a group of processes one that stands still (a dead file server, a stuck GPU) lets all others wait for
it inside a sum over processes, and none of them knows for whom. Here a thread of each process looks after
it. When its process has not moved for the limit, it reads what the others are at. One that others may wait
for long, because its share is the largest, still gives signs of life; who is behind and gives none is named,
with the place where it stands, and the processes end with the status that asks a scheduler to start them
again.
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

from jahubert import prefetch as ahead
from jahubert.errors import Stopped
from jahubert.train.experiment import distributed

_PATIENCE = timedelta(seconds=30)  # with the store


@dataclass(frozen=True)
class Status:
    """What a process is at, as it stands in the store."""

    name: str  # of the process
    number: int  # of its place; the smallest is behind
    place: str
    seconds: float  # without a sign of life
    alone: bool  # at work that has no limit
    stack: str  # where it stands in the code, once that is long ago


@contextmanager
def watchdog(minutes: float) -> Iterator[None]:
    """Look after the processes inside; all of them enter together.

    Args:
        minutes: without a sign of life, after which a process that is behind is named and all end. 0: never.
    """
    if distributed.world() == 1 or not minutes:
        yield
        return
    watcher = _Watcher(60 * minutes)
    thread = threading.Thread(target=watcher.look, name="hang-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watcher.over.set()
        thread.join()


class _Watcher:
    """Of this process, and the store in the first one where all say what they are at."""

    def __init__(self, limit: float):
        self.limit, self.every, self.over = limit, min(10.0, limit / 10), threading.Event()
        self.rank, self.world, self.main = distributed.rank(), distributed.world(), threading.get_ident()
        self.name = f"process {self.rank} of {self.world} (pid {os.getpid()} on {socket.gethostname()})"
        self.seen: dict[int, tuple[bytes, float]] = {}  # the last beat of each, and when it was first read

        def store(port: int) -> dist.TCPStore:
            host, first = os.environ["MASTER_ADDR"], self.rank == 0
            return dist.TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=_PATIENCE)

        server = store(0) if self.rank == 0 else None
        port = distributed.rank0_broadcast(lambda: server.port if server else 0)
        self.store = server or store(port)
        self._say()
        distributed.barrier()  # from here on there is a beat of each

    def look(self) -> None:
        """Until it is over: say what this process is at, and look at the others when it stands too long."""
        while not self.over.wait(self.every):
            late = time.monotonic() - distributed.last_heartbeat().moved > self.limit
            try:
                self._say()
                if late and (verdict := self._verdict()) and self.store.add("told", 1) == 1:
                    tqdm.write(f"jahubert: error: {verdict}", file=sys.stderr)
                    self.store.set("said", "")
                ends = self.store.check(["said"])
            except RuntimeError:  # the first process is gone, and the store with it
                ends = late
            if ends and self.rank == 0:  # the others read from its store that they end
                self.over.wait(2 * self.every)
            if ends and not self.over.is_set():
                os._exit(Stopped.exit_status)  # the main thread would not come back from where it is

    def _say(self) -> None:
        now = distributed.last_heartbeat()
        seconds = time.monotonic() - now.moved
        stack = self._stack() if seconds > self.limit / 2 else ""
        beat = Status(self.name, now.number, now.place, seconds, now.alone, stack)
        self.store.set(str(self.rank), json.dumps(asdict(beat)))

    def _beats(self) -> list[Status]:
        """Of all processes. One whose beat stays the same is dead, or so stuck that its thread is, too."""
        beats, now = [], time.monotonic()
        for rank, said in enumerate(self.store.multi_get([str(rank) for rank in range(self.world)])):
            if rank not in self.seen or self.seen[rank][0] != said:
                self.seen[rank] = said, now
            beat = Status(**json.loads(said))
            beats.append(replace(beat, seconds=beat.seconds + now - self.seen[rank][1]))
        return beats

    def _verdict(self) -> str:
        """Who hangs, or nothing."""
        beats = self._beats()
        least = min(beat.number for beat in beats)
        behind = [beat for beat in beats if beat.number == least]
        hang = [beat for beat in behind if beat.seconds > self.limit and not beat.alone]
        if not hang:
            return ""
        names = "; ".join(f"{beat.name} hangs: at {beat.place} for {beat.seconds:.0f} s" for beat in hang)
        return (
            f"{names}; {len(beats) - len(behind)} of {self.world} wait for it. The limit is "
            f"hang_timeout_minutes={self.limit / 60:g}; what was saved stays, the same command continues. "
            f"{hang[0].name} stands here:\n{hang[0].stack}"
        )

    def _stack(self) -> str:
        """Of the main thread, and of those that do its work ahead."""
        frames, shown = sys._current_frames(), []
        helping = [
            thread.ident for thread in threading.enumerate() if thread.name.startswith(ahead.THREAD_PREFIX)
        ]
        for thread in (self.main, *helping):
            if thread in frames:
                lines = traceback.format_stack(frames[thread])
                idle = thread != self.main and "work_queue.get" in lines[-1]
                shown += [] if idle else lines[-4:]
        return "".join(shown)
