"""A full disk, said in one sentence, whichever library noticed and whatever it called it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jahubert.errors import DiskFullError, JahubertError

# numpy says only how much it could write; "File too large" is a limit on the size of files.
_FULL = re.compile(
    r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written"
)
_NO_ROOM = 1 << 20  # bytes free: whatever failed, failed for want of room


@contextmanager
def report_disk_full(out: Path) -> Iterator[None]:
    """Raise DiskFullError for what a full disk under `out` does to the work inside."""
    try:
        yield
    except (DiskFullError, KeyboardInterrupt):
        raise
    except BaseException as error:  # torch's CheckpointException is no Exception
        if (isinstance(error, JahubertError) and not _FULL.search(str(error))) or not _is_full(error, out):
            raise
        raise DiskFullError(
            f"the disk is full while writing into {out}: free some space and run the same command again; "
            "what was finished is kept"
        ) from error


def _is_full(error: BaseException | None, out: Path) -> bool:
    """Whether the error, or one that it came from, speaks of a full disk, or there is no room left at all."""
    while error is not None:
        if _FULL.search(str(error)):
            return True
        for failure, _ in getattr(error, "failures", {}).values():  # of the processes that saved a checkpoint
            if _is_full(failure, out):
                return True
        error = error.__cause__ or error.__context__
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free < _NO_ROOM
