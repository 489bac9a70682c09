"""Fault injection at every file operation of every stage: a kill or a file system error.

    python tools/checks/fault_sweep.py                                   # all stages of a small recipe
    python tools/checks/fault_sweep.py --stages label pretrain --faults kill ENOSPC --every 5

Runs the stages of tests/fixtures/tones once without faults. Then it runs every stage in an empty folder for
each n, and at the n-th file operation (create, write, sync, rename or delete, by any library) the process is
killed or the operation fails. After the fault, the stage is rerun and must succeed; all files must equal
those of the run without faults, and no temporary files may remain. Prints the results per stage; the exit
status is 1 if any run differs. Needs Linux and a C compiler.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
FAULTS = {"kill": -1, "ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EACCES": errno.EACCES}
SETTINGS = [
    f"recipe={REPO / 'tests' / 'fixtures' / 'tones'}", "iterations=1", "workers=0", "device=cpu",
    "pretrain.train.max_steps=6", "pretrain.train.save_every=2", "pretrain.train.valid_every=3",
    "finetune.train.max_steps=6", "finetune.train.save_every=2", "finetune.train.valid_every=3",
    "finetune.train.log_every=2", "pretrain.train.log_every=2", "decode.beam=2",
]  # fmt: skip
TIMED = {"seconds", "finished", "timing", "window", "outputs", "record_crc32", "crc32", "files", "made_with"}


def run_child(work: Callable[[], Any], log: Path) -> int:
    """Run `work` in a forked child; returns 0 (success), 3 (reported error), 4 (bug) or -signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    from jahubert.errors import JahubertError

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    status = 0
    try:
        work()
    except (JahubertError, OSError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 3
    except BaseException:
        traceback.print_exc()
        status = 4
    sys.stderr.flush()
    os._exit(status)


def contents(folder: Path) -> dict[str, Any]:
    """Return the files of a stage by path; JSON without times, no TensorBoard events or report pages."""
    result: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name.startswith("tensorboard/"):
            continue
        data: Any = path.read_bytes()
        if path.suffix in (".json", ".jsonl"):
            data = [
                untimed(json.loads(line))
                for line in ([data] if path.suffix == ".json" else data.splitlines())
            ]
        elif path.name in ("report.html", ".metadata"):
            data = None  # compares only the existence: the content has times or an arbitrary order
        result[name] = data
    return result


def untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: untimed(inner) for key, inner in value.items() if key not in TIMED}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


class Sweep:
    """A reference experiment without faults, and runs with faults that must reproduce it."""

    def __init__(self, folder: Path, shim: ctypes.CDLL):
        from jahubert.train.pipeline.jobs import configure_jobs
        from jahubert.train.pipeline.runner import run_stage

        self.folder, self.shim, self.run_stage = folder, shim, run_stage
        self.exp = folder / "exp"
        self.jobs = configure_jobs([*SETTINGS, "stage=all", f"exp={self.exp}"])
        self.log = folder / "log"

    def check(self, status: int, name: str) -> None:
        if status:
            raise SystemExit(f"{name}: the run without faults failed\n{self.log.read_text()}")

    def stage(self, job: Any, faults: list[str], every: int) -> list[str]:
        """Test all faults in one stage whose inputs exist; returns a description of every failure."""
        name = str(job.out.relative_to(self.exp))
        counted = self.folder / "count"

        def count() -> None:
            self.shim.fault_arm(os.fsencode(job.out), 0, 0)
            self.run_stage(*job)
            counted.write_text(str(self.shim.fault_count()))

        self.check(run_child(count, self.log), name)
        operations, expected = int(counted.read_text()), contents(job.out)
        failures, results = [], Counter[str]()
        finished = job.out.with_name(job.out.name + ".finished")
        job.out.rename(finished)
        for fault in faults:
            for number in range(1, operations + 1, every):
                problem = self.trial(job, fault, number, expected)
                results[f"{fault} equal" if not problem else f"{fault} failed"] += 1
                if problem:
                    failures.append(f"{name}, {fault} at operation {number}: {problem}")
                shutil.rmtree(job.out, ignore_errors=True)
        finished.rename(job.out)
        shown = ", ".join(f"{result} {n}" for result, n in sorted(results.items()))
        print(f"{name}: {operations} file operations; {shown}", flush=True)
        return failures

    def trial(self, job: Any, fault: str, number: int, expected: dict[str, Any]) -> str:
        """Run a stage with one fault, rerun it and compare; returns a description of the failure, if any."""

        def faulty() -> None:
            self.shim.fault_arm(os.fsencode(job.out), number, FAULTS[fault])
            self.run_stage(*job)

        status = run_child(faulty, self.log)
        if status == 4 or (status < 0 and (fault != "kill" or status != -signal.SIGKILL)):
            return f"ended with {status}: {self.log.read_text()[-1500:]}"
        status = run_child(lambda: self.run_stage(*job), self.log)
        if status:
            return f"the rerun failed with {status}: {self.log.read_text()[-1500:]}"
        actual = contents(job.out)
        different = sorted(
            name for name in expected.keys() | actual.keys() if actual.get(name, 0) != expected.get(name, 0)
        )
        return f"different files: {', '.join(different)}" if different else ""


def compiled_shim(folder: Path) -> Path:
    path = folder / "fault_shim.so"
    source = Path(__file__).with_name("fault_shim.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", nargs="+", default=[], help="stages to test (default: all)")
    parser.add_argument("--faults", nargs="+", default=list(FAULTS), choices=list(FAULTS))
    parser.add_argument("--every", type=int, default=1, help="test only every n-th operation")
    args = parser.parse_args()
    if "FAULT_SHIM" not in os.environ:  # restart with the library loaded
        with tempfile.TemporaryDirectory() as folder:
            shim = str(compiled_shim(Path(folder)))
            environment = {**os.environ, "FAULT_SHIM": shim, "LD_PRELOAD": shim, "OMP_NUM_THREADS": "1"}
            return subprocess.run([sys.executable, *sys.argv], env=environment).returncode
    import torch

    torch.set_num_threads(1)
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        sweep = Sweep(Path(folder).resolve(), ctypes.CDLL(os.environ["FAULT_SHIM"]))
        for job in sweep.jobs:
            if args.stages and job.stage not in args.stages:
                sweep.check(run_child(lambda job=job: sweep.run_stage(*job), sweep.log), job.stage)
                continue
            failures += sweep.stage(job, args.faults, args.every)
    for failure in failures:
        print(failure)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
