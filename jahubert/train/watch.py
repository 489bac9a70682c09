"""Which process hangs: each says in a store that all can reach what it is at, and for how long.

In a group of processes one that stands still (a dead file server, a stuck GPU) lets all others wait for
it inside a sum over processes, and none of them knows for whom. Here a thread of each process looks after
it. When its process has not moved for the limit, it reads what the others are at: who is behind is named,
with the place where it stands, and the processes end, so that a scheduler can start them again.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from jahubert.train import ranks

_STATUS = 1  # exit status: not one that asks for a restart, since somebody should look at that machine
_PATIENCE = timedelta(seconds=30)  # with the store


@dataclass(frozen=True)
class Beat:
    """What a process is at. Counts rise alike in all processes, so the smallest is behind."""

    name: str  # of the process
    count: int
    place: str
    seconds: float  # since it came there
    stack: str  # where it stands in the code, once that is long ago


@contextmanager
def watch(minutes: float) -> Iterator[Callable[[str], None]]:
    """A function to call with what this process is at now; in all processes as often, in the same order.

    Args:
        minutes: without such a call, after which a process that is behind is named and all end. 0: never.
    """
    if ranks.world() == 1 or not minutes:
        yield lambda place: None
        return
    process = _Process(60 * minutes)
    thread = threading.Thread(target=process.look, name="hang-watch", daemon=True)
    thread.start()
    try:
        yield process.at
    finally:
        process.over.set()
        thread.join()


class _Process:
    """This process, and the store in the first one where all say what they are at."""

    def __init__(self, limit: float):
        self.limit, self.over = limit, threading.Event()
        self.now = (0, "the start", time.monotonic())  # one assignment, since two threads use it
        self.rank, self.world, self.main = ranks.rank(), ranks.world(), threading.get_ident()
        self.name = f"process {self.rank} of {self.world} (pid {os.getpid()} on {socket.gethostname()})"

        def store(port: int) -> dist.TCPStore:
            host, first = os.environ["MASTER_ADDR"], self.rank == 0
            return dist.TCPStore(host, port, is_master=first, wait_for_workers=False, timeout=_PATIENCE)

        server = store(0) if self.rank == 0 else None
        port = ranks.from_first(lambda: server.port if server else 0)
        self.store = server or store(port)

    def at(self, place: str) -> None:
        self.now = (self.now[0] + 1, place, time.monotonic())

    def look(self) -> None:
        """Until it is over: say what this process is at, and look at the others when it stands too long."""
        while not self.over.wait(min(10.0, self.limit / 10)):
            count, place, since = self.now
            seconds = time.monotonic() - since
            stack = self._stack() if seconds > self.limit / 2 else ""
            late = seconds > self.limit
            try:
                beat = Beat(self.name, count, place, seconds, stack)
                self.store.set(str(self.rank), json.dumps(asdict(beat)))
                if late and self.store.add("told", 1) == 1:
                    print(f"jahubert: error: {self._verdict()}", file=sys.stderr, flush=True)
                    self.store.set("said", "")
                elif late and self.rank == 0:  # whoever tells reads from its store
                    self.store.wait(["said"], _PATIENCE)
            except RuntimeError:  # the first process is gone, and the store with it
                pass
            if late and not self.over.is_set():
                os._exit(_STATUS)  # the main thread would not come back from where it is

    def _verdict(self) -> str:
        said = [str(rank) for rank in range(self.world) if self.store.check([str(rank)])]
        beats = [Beat(**json.loads(self.store.get(rank))) for rank in said]
        least = min(beat.count for beat in beats)
        behind = [beat for beat in beats if beat.count == least]
        names = "; ".join(f"{beat.name} hangs: at {beat.place} for {beat.seconds:.0f} s" for beat in behind)
        return (
            f"{names}; {len(beats) - len(behind)} others wait. The limit is train.hang_minutes="
            f"{self.limit / 60:g}; the last checkpoint stays, and the same command continues it. "
            f"{behind[0].name} stands here:\n{behind[0].stack}"
        )

    def _stack(self) -> str:
        frame = sys._current_frames().get(self.main)
        return "".join(traceback.format_stack(frame)[-4:]) if frame else ""
