"""Check of the stages features, label, pretrain, finetune and decode with a small or full /dev/shm.

    python tools/checks/shared_memory_sweep.py
    python tools/checks/shared_memory_sweep.py --workers 2 --only label

Each of these stages of a tiny experiment runs with a private /dev/shm of 64 kB, 2 MB or 64 MB, and with a
full one. The stage must end within a minute, either with the same files as without a limit or with exit
status 1 or 2 and a message that names /dev/shm, without a traceback. The script prints the results, and its
exit status is 1 if a run ended in another way. The script requires Linux and permission to mount a file
system.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import logging
import shutil
import sys
import tempfile
import time
from pathlib import Path

from small_experiment import contents, overrides_of, run_child, run_stages, stage_jobs

from jahubert import run
from jahubert.train.experiment.registry import Job

SIZES = ("64k", "2m", "64m", "full")
READS_AUDIO = ("features", "label", "pretrain", "finetune", "decode")
MAX_SECONDS = 60.0
_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000  # constants of Linux


def limit_shared_memory(size: str) -> None:
    """Mount an empty /dev/shm of a given size, or a full one, that only this process and its children see."""
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={'2m' if size == 'full' else size}".encode()
    if (
        libc.unshare(_CLONE_NEWNS)
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
        or libc.mount(b"none", b"/dev/shm", b"tmpfs", 0, options)
    ):
        raise SystemExit(f"cannot mount /dev/shm (errno {ctypes.get_errno()}); run this script as root")
    if size == "full":
        with contextlib.suppress(OSError), open("/dev/shm/other", "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass


def trial(job: Job, size: str, workers: int, log: Path, expected: dict) -> tuple[bool, str]:
    """Run a stage with a limited /dev/shm, and return whether it ended as required and how it ended."""

    def work() -> int:
        limit_shared_memory(size)
        return run.main([*overrides_of(job), f"workers={workers}"])

    started = time.monotonic()
    status = run_child(work, log)
    seconds, output = time.monotonic() - started, log.read_text(errors="replace")
    if seconds > MAX_SECONDS:
        return False, f"{seconds:.0f} s"
    if status == 0:
        is_equal = contents(job.out) == expected
        return is_equal, "finished" if is_equal else "finished with different files"
    if status in (1, 2) and "/dev/shm" in output and "Traceback" not in output:
        return True, "rejected"
    return False, f"status {status}: {output[-2000:]}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[2, 8], help="numbers of workers; not used by decode"
    )
    parser.add_argument("--only", nargs="+", default=READS_AUDIO, choices=READS_AUDIO, help="stages to run")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    n_failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        run_stages(folder / "exp")
        for job in stage_jobs(folder / "exp"):
            if job.stage not in args.only:
                continue
            finished, expected = job.out.with_name(job.out.name + ".finished"), contents(job.out)
            job.out.rename(finished)
            for size in SIZES:
                for workers in args.workers:
                    passed, how = trial(job, size, workers, folder / "log", expected)
                    shutil.rmtree(job.out, ignore_errors=True)
                    n_failures += not passed
                    name = job.out.relative_to(folder / "exp")
                    print(
                        f"{name}, {size}, {workers} workers: {'' if passed else 'FAILED, '}{how}", flush=True
                    )
            finished.rename(job.out)
    return 1 if n_failures else 0


if __name__ == "__main__":
    sys.exit(main())
