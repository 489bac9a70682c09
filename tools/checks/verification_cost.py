"""Benchmark of input file verification for each stage of a finished experiment.

    python tools/checks/verification_cost.py exp/demo recipe=demo
    python tools/checks/verification_cost.py exp/tofugu recipe=tofugu data=/path/to/corpus

For each finished stage, the script prints the size of its inputs in MB, the time to verify them (the shortest
of three runs, when the files are in the page cache), and this time as a fraction of the recorded time of
the stage.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest import mock

from jahubert.train.experiment import checksums
from jahubert.train.experiment.provenance import DONE, read_record
from jahubert.train.pipeline.jobs import configure_jobs
from jahubert.train.pipeline.runner import verify_inputs

REPEATS = 3


def main(exp: Path, overrides: list[str]) -> None:
    jobs = configure_jobs([*overrides, "stage=all", f"exp={exp}"])
    print(f"{'stage':28} {'MB':>8} {'verification s':>15} {'stage s':>9} {'share':>8}")
    for job in jobs:
        if not (job.out / DONE).exists():
            continue
        sizes: list[int] = []
        crc32 = checksums.file_crc32

        def counted(path: Path) -> str:
            sizes.append(path.stat().st_size)  # noqa: B023
            return crc32(path)  # noqa: B023

        with mock.patch.object(checksums, "file_crc32", counted):
            verify_inputs(job.config)
        seconds = min(_seconds(job.config) for _ in range(REPEATS))
        stage_seconds = read_record(job.out / DONE)["seconds"]
        share = seconds / max(stage_seconds, 0.05)
        name = str(job.out.relative_to(exp))
        print(f"{name:28} {sum(sizes) / 1e6:8.2f} {seconds:15.4f} {stage_seconds:9.1f} {share:8.2%}")


def _seconds(config: object) -> float:
    started = time.perf_counter()
    verify_inputs(config)
    return time.perf_counter() - started


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
