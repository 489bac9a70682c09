"""Injection of faults (a kill or a file system error) at every file operation of every stage and command.

    python tools/checks/fault_sweep.py                                  # every operation, every fault
    python tools/checks/fault_sweep.py --points 2                       # two trials per task
    python tools/checks/fault_sweep.py --only label pretrain --faults kill ENOSPC

A task is a stage of a tiny experiment or a command that writes files (see `small_experiment.py`). Each task
first runs without faults, which counts its file operations (for example create, write, sync, rename and
delete, by any library). The task then runs in an empty folder once for each operation and fault: at this
operation, the process is killed or the operation fails. With `--points N`, there are only N runs, with evenly
spaced operations and the faults in turn. Unless the failed operation is optional, the task must end with a
message without a traceback, and for a full disk (ENOSPC) with exit status 1. The task is then rerun and must
succeed, or refuse an output that is already complete. All files must then equal those of the run without
faults, and no temporary files may remain. The script prints the results for each task and exits with status 1
if any run differs. The script requires Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

FAULTS = {"kill": -1, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
# Allowed exit statuses of a run for each fault. 0 is allowed for errors because some operations are optional.
STATUSES = {"kill": (-signal.SIGKILL,), "ENOSPC": (0, 1), "EIO": (0, 1, 2), "EACCES": (0, 1, 2)}


def compiled_shim(folder: Path) -> Path:
    path = folder / "fault_shim.so"
    source = Path(__file__).with_name("fault_shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True)
    return path


def trials(n_operations: int, faults: list[str], points: int | None, first: int) -> list[tuple[str, int]]:
    """Return all pairs (fault, operation), with operations counted from 1, or `points` evenly spaced pairs.

    Args:
        first: index of the fault of the first evenly spaced pair. Later pairs use the next faults in turn.
    """
    if points is None:
        return [(fault, operation) for fault in faults for operation in range(1, n_operations + 1)]
    spaced = [1 + int((point + 0.5) * n_operations / points) for point in range(points)]
    return [(faults[(first + i) % len(faults)], operation) for i, operation in enumerate(spaced)]


class Sweep:
    """Sweep over tasks with faults, which compares the results with those of a run without faults."""

    def __init__(self, shim: ctypes.CDLL, folder: Path):
        self.shim, self.log, self.counted = shim, folder / "log", folder / "count"
        self.n_tasks = 0

    def count(self, task: Any) -> int:
        """Run a task without faults, and return the number of file operations."""
        from small_experiment import run_child

        def work() -> int:
            self.shim.fault_arm(os.fsencode(task.out), 0, 0)
            status = task.work()
            self.counted.write_text(str(self.shim.fault_count()))
            return status or 0

        status = run_child(work, self.log)
        if status:
            raise SystemExit(f"{task.name}: status {status} without faults\n{self.log.read_text()}")
        return int(self.counted.read_text())

    def run(self, task: Any, faults: list[str], points: int | None) -> int:
        """Sweep one task, print its figures and failures, and return the number of failures."""
        from small_experiment import contents

        started, failures, results = time.monotonic(), [], Counter[str]()
        n_operations, expected = self.count(task), contents(task.out)
        if not n_operations:  # the command writes no files
            print(f"{task.name}: no file operations")
            return 0
        finished = task.out.with_name(task.out.name + ".finished")
        task.out.rename(finished)
        for fault, operation in trials(n_operations, faults, points, self.n_tasks):
            problem = self.trial(task, fault, operation, expected)
            results[f"{fault} {'failed' if problem else 'equal'}"] += 1
            if problem:
                failures.append(f"{task.name}, {fault} at operation {operation}: {problem}")
            shutil.rmtree(task.out, ignore_errors=True)
        self.n_tasks += 1
        finished.rename(task.out)
        shown = ", ".join(f"{result} {n}" for result, n in sorted(results.items()))
        seconds = time.monotonic() - started
        print(f"{task.name}: {n_operations} file operations; {shown}; {seconds:.0f} s", *failures, sep="\n")
        sys.stdout.flush()
        return len(failures)

    def trial(self, task: Any, fault: str, operation: int, expected: dict[str, Any]) -> str:
        """Run a task with one fault, rerun it, compare the results, and return a description of a failure."""
        from small_experiment import contents, run_child

        def work() -> int:
            self.shim.fault_arm(os.fsencode(task.out), operation, FAULTS[fault])
            return task.work() or 0

        status = run_child(work, self.log)
        first_log = self.log.read_text(errors="replace")
        where = next((line for line in first_log.splitlines() if line.startswith("fault at ")), "")
        allowed = STATUSES[fault] if where else (0,)  # `where` is empty if the fault did not occur
        if status not in allowed or "Traceback" in first_log:
            return f"{where}\nended with status {status}: {first_log[-2500:]}"
        status = run_child(task.work, self.log)
        found = contents(task.out)
        different = sorted(
            name for name in expected.keys() | found.keys() if found.get(name, 0) != expected.get(name, 0)
        )
        if status and (different or not task.refuses_existing):
            return f"{where}\nthe rerun ended with status {status}: {self.log.read_text()[-2500:]}"
        return f"{where}\ndifferent files: {', '.join(different)}" if different else ""


def sweep_all(args: argparse.Namespace) -> int:
    from small_experiment import command_tasks, run_stages, stage_tasks

    def selected(task: Any) -> bool:
        chosen = not args.only or any(word in task.name for word in args.only)
        return chosen and task.name not in args.omit

    logging.disable(logging.WARNING)
    n_failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        exp = folder / "exp"
        run_stages(folder / "warm-up")
        sweep = Sweep(ctypes.CDLL(os.environ["FAULT_SHIM"]), folder)
        for task in stage_tasks(exp):
            if selected(task):
                n_failures += sweep.run(task, args.faults, args.points)
            else:
                sweep.count(task)
        for task in filter(selected, command_tasks(exp, folder / "out")):
            n_failures += sweep.run(task, args.faults, args.points)
    return 1 if n_failures else 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], help="parts of task names (default: all)")
    parser.add_argument("--omit", nargs="+", default=[], help="names of tasks to leave out")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--points", type=int, help="number of trials per task (default: all)")
    args = parser.parse_args()
    if "FAULT_SHIM" not in os.environ:  # restarts the script with the library loaded
        with tempfile.TemporaryDirectory() as folder:
            shim = str(compiled_shim(Path(folder)))
            environment = {**os.environ, "FAULT_SHIM": shim, "LD_PRELOAD": shim, "OMP_NUM_THREADS": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    return sweep_all(args)


if __name__ == "__main__":
    sys.exit(main())
