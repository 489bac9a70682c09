"""Benchmark of stage prepare on ReazonSpeech as tar shards and as Parquet files: speed and peak memory.

    python tools/bench/shards.py
    python tools/bench/shards.py --rows 100000 --shards 8 --repeats 1

Both forms contain the same synthetic rows. Their audio consists of a FLAC header and is not decoded. Each
run is a separate process with an empty work folder and is followed by a second run that uses the stored index
or conversion. The forms alternate. The script prints the medians; CPU time includes worker processes and
depends least on the load of the machine.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tests"))
from fixtures.reazonspeech_tree import write_headers, write_parquet_headers

FORMS = {"tar": write_headers, "Parquet": write_parquet_headers}


def prepare(data: str, out: str, processes: str) -> None:
    """Run stage prepare in this process, and print rows, wall time, CPU time and peak memory as JSON."""
    from jahubert.train.stages import prepare as stage

    options = {"subset": "all", "processes": int(processes)}
    config = stage.Config(recipe="reazonspeech", data=data, options=options, check_audio=False)
    started, cpu_before = time.perf_counter(), cpu_seconds()
    rows = stage.run(config, Path(out))["utterances"]
    seconds, cpu = time.perf_counter() - started, cpu_seconds() - cpu_before
    # The peak memory of this process. Its ru_maxrss would also include the memory of its parent before exec.
    status = Path("/proc/self/status").read_text().splitlines()
    own = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(json.dumps([rows, seconds, cpu, (own + workers) / 1024**2]))


def cpu_seconds() -> float:
    """Return the CPU time of this process and its finished worker processes."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def measure(data: Path, out: Path, processes: int) -> list[float]:
    command = [sys.executable, __file__, "--prepare", str(data), str(out), str(processes)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--prepare"]:
        prepare(*sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--shards", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="worker processes for tar shards")
    args = parser.parse_args()
    results: dict[tuple[str, str], list[list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for form, write in FORMS.items():
            write(folder / form, args.shards, args.rows // args.shards)
        for number in range(args.repeats):
            for form in FORMS:
                out = folder / f"{form} {number}"
                out.mkdir()
                for run in ("first run", "second run"):
                    result = measure(folder / form, out, args.processes)
                    results.setdefault((form, run), []).append(result)
    print("| form | run | rows | rows per second | CPU time | peak memory |\n|---|---|---|---|---|---|")
    for (form, run), values in results.items():
        rows, seconds, cpu, gib = map(statistics.median, zip(*values, strict=True))
        print(
            f"| {form} | {run} | {rows:,.0f} | {rows / seconds:,.0f} | {cpu:.1f} s | {gib:.2f} GiB |",
            flush=True,
        )


if __name__ == "__main__":
    main()
