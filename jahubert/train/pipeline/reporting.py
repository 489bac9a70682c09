"""Log output, error messages and exit statuses of a run."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback

from jahubert.errors import (
    MAX_MESSAGE,
    JahubertError,
    MissingExtraError,
    Stopped,
    exit_status,
    printable,
    shorten,
)
from jahubert.streams import current_folder_error, failed_output, is_output_error
from jahubert.train.pipeline.signals import received_signal

INTERRUPTED = 130  # exit status after SIGINT
# Messages of the RuntimeErrors that gloo and NCCL raise when a connection is lost.
_LOST_RANK = re.compile(r"gloo/transport|Connection (reset|closed|refused)|Broken pipe|remote process exited")


def report_error(error: BaseException) -> int:
    """Print the error that ended the run, unless another process reports it. Return the exit status."""
    status, message = 1, ""
    reported = isinstance(error, JahubertError) and error.reported
    signal_name = received_signal()
    if not isinstance(error, JahubertError | KeyboardInterrupt):
        error = current_folder_error() or error
    if signal_name:
        status = Stopped.exit_status
        message = f"received {signal_name}: finished work is kept; rerun the same command to resume"
    elif isinstance(error, JahubertError):
        status, message = error.exit_status, f"error: {error}"
        if isinstance(error, Stopped):
            message = str(error)
            if error.signal == "SIGINT":
                status = INTERRUPTED
    elif isinstance(error, OSError) and error.filename is not None:
        status, message = exit_status(error), f"error: {os.fsdecode(error.filename)}: {error.strerror}"
    elif isinstance(error, OSError) and is_output_error(error):
        return failed_output(error)
    elif isinstance(error, RuntimeError) and is_distributed() and _LOST_RANK.search(str(error)):
        # Some launchers, such as srun, report the highest exit status of all ranks. This rank exits with
        # the lowest error status, so that these launchers report the status of the failed rank.
        message = "exiting because another rank failed; see that rank's log"
    elif isinstance(error, KeyboardInterrupt):
        status, message = INTERRUPTED, "interrupted: rerun the same command to resume"
    if not message:
        traceback.print_exception(error)
    elif not (reported or ((signal_name or isinstance(error, Stopped)) and not is_rank0())):
        print(f"jahubert: {printable(shorten(message, MAX_MESSAGE))}", file=sys.stderr)
    return status


def is_rank0() -> bool:
    return os.environ.get("RANK", "0") == "0"


def is_distributed() -> bool:
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def configure_logging(level: int) -> None:
    """Log to standard error through tqdm, so that lines and progress bars do not overlap."""
    try:
        from tqdm.contrib import DummyTqdmFile
    except ImportError as error:
        raise MissingExtraError("tqdm", "train") from error
    logging.basicConfig(level=level, format="%(message)s", stream=DummyTqdmFile(sys.stderr))
