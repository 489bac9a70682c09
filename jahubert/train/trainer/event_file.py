"""Writer for TensorBoard event files that does not use a background thread.

The background thread in the writers of torch and TensorBoard prints a traceback when the disk is full.
"""

from __future__ import annotations

import itertools
import os
import socket
import time
from pathlib import Path
from typing import Any

_number = itertools.count()  # running number of the event files that this process creates


class EventFile:
    """A TensorBoard event file for scalar values.

    Args:
        folder: log directory, which is created if necessary.
        step: the last completed step. TensorBoard hides values of later steps in older files of the folder.

    Raises:
        ImportError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{next(_number)}"
        self._file = (folder / name).open("xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Write the scalar values of one step, keyed by tag."""
        scalars = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=scalars))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())
