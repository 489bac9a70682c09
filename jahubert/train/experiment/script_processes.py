"""Worker processes that run a script of a recipe, each on a share of the work.

The script receives its job as JSON on standard input, so that neither the script nor its classes need to be
importable by name, and each process only imports what the job needs. When the script is executed, it calls
`run_job` or `run_items`.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from jahubert.errors import DataError, JahubertError, UserError, exit_status

_START = (
    "import runpy, sys; file, *sys.path[:] = sys.argv[1:]; sys.argv[:] = [file]; "
    "runpy.run_path(file, run_name='__main__')"
)
T = TypeVar("T")

# Minimum number of items per process. Starting a process takes as long as synthesizing this many sentences.
_MIN_SHARE = 8


class ScriptProcess:
    """A Python process that runs a script with the module search path of this process.

    In a `with` statement, the process is killed at the end of the block if it is still running.

    Args:
        script: the script, which may import other files in its folder.
        job: JSON-compatible value, which the script receives through `run_job`.
    """

    def __init__(self, script: Path, job: Any) -> None:
        self._script = script
        # The job and the error output use files, because long ones would fill up a pipe.
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
            json.dump(job, file)
            file.seek(0)
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(script), str(script.parent), *sys.path],
                stdin=file,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
        assert self._process.stdout is not None  # it is a pipe
        self._output = self._process.stdout

    def readline(self) -> str:
        """Return the next line that the script prints, or "" after the process has ended successfully.

        Raises:
            DataError: the process ended with a user error, whose message is passed on.
            JahubertError: the process failed otherwise; the message contains the end of its error output.
        """
        line = self._output.readline().rstrip("\n")
        if not line and self._process.wait():
            self._raise()
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._output.close()
        self._errors.close()

    def __enter__(self) -> ScriptProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _raise(self) -> NoReturn:
        status = self._process.wait()
        self._errors.seek(0)
        message = self._errors.read().decode("utf-8", "replace")[-2000:].strip()
        if status == UserError.exit_status:
            raise DataError(message)
        cause = f"was killed by {signal.Signals(-status).name}" if status < 0 else "failed"
        advice = "; the system may have run out of memory, so use fewer processes" if status < 0 else ""
        raise JahubertError(f"a process that runs {self._script} {cause}{advice}\n{message}".rstrip())


def run_job(function: Callable[[Any], Iterable[object]]) -> None:
    """Run a job in a process started by `ScriptProcess`.

    Args:
        function: receives the job; each value that it yields is printed as a line.
    """
    try:
        for result in function(json.load(sys.stdin)):
            print(result, flush=True)  # fails, and so ends this process, if the parent process has ended
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(exit_status(error))


def run_items(read: Callable[[dict[str, Any]], T], write: Callable[[T, Path], None]) -> None:
    """Write the items that `run_in_processes` has assigned to this process.

    Args:
        read: creates an item from its fields.
        write: called with each item and the folder of the output.
    """

    def write_all(job: Any) -> Iterator[str]:
        folder, items = job
        for fields in items:
            write(read(fields), Path(folder))
            yield "written"

    run_job(write_all)


def run_in_processes(
    script: Path, items: Sequence[Any], folder: Path, processes: int, write: Callable[[Any, Path], None]
) -> None:
    """Call `write(item, folder)` for each item, in this process or, if there are many, in several processes.

    Args:
        script: the script to run, which calls `run_items`.
        items: dataclasses whose fields are JSON-compatible.
        folder: folder of the output.
        processes: maximum number of processes.
        write: function to call in this process.

    Raises:
        DataError, JahubertError: see `ScriptProcess.readline`.
    """
    processes = min(processes, len(items) // _MIN_SHARE)
    if processes <= 1:
        for item in items:
            write(item, folder)
        return
    with ExitStack() as stack:
        started = []
        for i in range(processes):
            job = [str(folder), [asdict(item) for item in items[i::processes]]]
            started.append(stack.enter_context(ScriptProcess(script, job)))
        for process in started:
            while process.readline():
                pass
