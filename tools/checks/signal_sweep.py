"""Check of stop signals that are sent to each stage of a tiny experiment while it reads its input.

    python tools/checks/signal_sweep.py            # SIGTERM and SIGINT in every stage
    python tools/checks/signal_sweep.py --in-turn  # one signal per stage, in turn

Opening an input file, which is named in `FIRST_INPUT` or else is the first audio file, is delayed by 1.5
seconds, during which the process receives the signal. The process must end within 30 seconds, with status 75
(after SIGINT: 75 or 130) and without a traceback. The stage is then rerun, and all files must equal those of
an uninterrupted run. The exit status of the script is 1 if any run differs. The script requires Linux.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from small_experiment import NGRAM, contents, overrides_of, run_child, run_stages, stage_jobs

from jahubert import run
from jahubert.train.experiment.registry import Job

SIGNALS = {signal.SIGTERM: (75,), signal.SIGINT: (130, 75)}  # accepted exit statuses
# First input of the stages that read no audio, and of the decoding that reads a language model first.
FIRST_INPUT = {
    "kmeans": "sample.npy",
    "targets": "manifest.arrow",
    "score": "test.jsonl",
    f"score-{NGRAM}": "test.jsonl",
    f"decode-{NGRAM}": "words.arpa.gz",
}
READ_SECONDS, DEADLINE_SECONDS = 1.5, 30.0


def slow_reads(ending: str, marker: Path) -> None:
    """Delay the first opening of a file whose name ends with `ending`, and create `marker` at that point."""

    def hook(event: str, arguments: tuple) -> None:
        if event != "open" or marker.exists() or not isinstance(arguments[0], (str, bytes)):
            return
        if arguments[1] in ("r", "rb") and os.fsdecode(arguments[0]).endswith(ending):
            marker.touch()
            time.sleep(READ_SECONDS)

    sys.addaudithook(hook)


def interrupted(job: Job, number: signal.Signals, folder: Path) -> tuple[int, str]:
    """Run a stage, send it a signal while it reads, and return its exit status and output."""
    marker, log = folder / "reading", folder / "log"
    marker.unlink(missing_ok=True)

    def work() -> int:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore SIGINT by default
        slow_reads(FIRST_INPUT.get(job.out.name, ".wav"), marker)
        return run.main(overrides_of(job))

    sender = os.fork()
    if not sender:  # run_child waits for the stage, so it must not run in the process that sends the signal
        os._exit(run_child(work, log) % 256)
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    children = Path(f"/proc/{sender}/task/{sender}/children").read_text().split()
    for child in children:
        os.kill(int(child), number)
    status = os.waitstatus_to_exitcode(os.waitpid(sender, 0)[1])
    return status, log.read_text(errors="replace")


def trial(job: Job, number: signal.Signals, folder: Path, expected: dict) -> str:
    """Interrupt a stage, rerun it and compare the results. Return a description of any failure."""
    started = time.monotonic()
    status, output = interrupted(job, number, folder)
    seconds = time.monotonic() - started
    if status not in SIGNALS[number] or "Traceback" in output or seconds > DEADLINE_SECONDS:
        return f"ended with status {status} after {seconds:.0f} s: {output[-2000:]}"
    status = run_child(lambda: run.main(overrides_of(job)), folder / "log")
    if status:
        return f"the rerun ended with status {status}: {(folder / 'log').read_text()[-2000:]}"
    actual = contents(job.out)
    different = sorted(
        name for name in expected.keys() | actual.keys() if actual.get(name, 0) != expected.get(name, 0)
    )
    return f"different files: {', '.join(different)}" if different else ""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--in-turn", action="store_true", help="send only one signal per stage, in turn")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    n_failures = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        run_stages(folder / "exp")
        for index, job in enumerate(stage_jobs(folder / "exp")):
            finished, expected = job.out.with_name(job.out.name + ".finished"), contents(job.out)
            numbers = [list(SIGNALS)[index % 2]] if args.in_turn else list(SIGNALS)
            for number in numbers:
                job.out.rename(finished)
                problem = trial(job, number, folder, expected)
                shutil.rmtree(job.out, ignore_errors=True)
                finished.rename(job.out)
                n_failures += bool(problem)
                name = job.out.relative_to(folder / "exp")
                print(f"{name}, {number.name}: {problem or 'stopped, and equal after the rerun'}", flush=True)
    return 1 if n_failures else 0


if __name__ == "__main__":
    sys.exit(main())
