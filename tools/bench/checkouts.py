"""Comparison of the CPU time of two checkouts of jahubert on the same work.

    git worktree add ../before COMMIT
    python tools/bench/checkouts.py ../before . transcribe --audio audio.wav
    python tools/bench/checkouts.py ../before . features --audio audio.wav
    python tools/bench/checkouts.py ../before . pretrain --lengths 4.4 4.4 4.3 4.3 --blocks 4

Each checkout runs in its own process. The processes take turns, and the order is reversed in every other
round, so that changes in the machine's speed affect both. The script prints the medians of
`time.process_time` over the rounds, their ratio (second checkout relative to the first) and the median of the
ratios per round. Pass the same checkout twice to determine the noise of the measurement.

`transcribe` and `features` (layer 6) process the recording `--audio` with the model `--model`, which both
checkouts must be able to load. The default model is the built-in model of the first checkout for
`transcribe`, and HuBERT base with random weights for `features`. `pretrain` runs a step of each checkout's
`tools/bench/pretrain_step.py`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

WORKLOADS = ("transcribe", "features", "pretrain")


class Process:
    """A process that imports jahubert from a checkout and measures the workload on request."""

    def __init__(self, checkout: Path, args: argparse.Namespace, model: str):
        self.checkout = checkout
        command = [sys.executable, __file__, str(checkout), str(checkout), args.workload, "--worker"]
        command += [
            "--precision",
            args.precision,
            "--threads",
            str(args.threads),
            "--passes",
            str(args.passes),
        ]
        command += ["--blocks", str(args.blocks), "--lengths", *map(str, args.lengths), "--model", model]
        command += ["--audio", str(args.audio)] if args.audio else []
        env = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(args.threads)}
        self.process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self) -> float:
        """Return the CPU time in seconds of `--passes` repetitions of the workload."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.checkout}: the process ended with exit status {self.process.wait()}")
        return float(line)


def worker(args: argparse.Namespace) -> None:
    """Measure the workload once for each line on standard input."""
    import torch

    import jahubert

    imported = Path(jahubert.__file__).resolve()
    if args.second.resolve() not in imported.parents:
        raise SystemExit(f"jahubert was imported from {imported}, not from the checkout {args.second}")
    torch.set_num_threads(args.threads)
    run = workload(args)
    run()  # the first run is a warm-up
    for _ in sys.stdin:
        started = time.process_time()
        for _ in range(args.passes):
            run()
        print(time.process_time() - started, flush=True)


def workload(args: argparse.Namespace) -> Callable[[], object]:
    """Return a function that performs the workload once."""
    import torch

    import jahubert

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    if args.workload == "transcribe":
        asr = jahubert.Transcriber.from_pretrained(args.model, device="cpu", dtype=dtype)
        return lambda: asr.transcribe(args.audio)
    if args.workload == "features":
        extractor = jahubert.FeatureExtractor.from_pretrained(args.model, layer=6, device="cpu", dtype=dtype)
        return lambda: extractor(args.audio)
    sys.path.insert(0, str(args.second / "tools" / "bench"))
    bench = importlib.import_module("pretrain_step")
    config = jahubert.HubertConfig.base(layers=args.blocks)
    trainer = bench.Trainer(next(iter(bench.KINDS)), config, torch.device("cpu"), dtype)
    batch = bench.make_batch(args.lengths, torch.device("cpu"))

    def step() -> None:
        torch.manual_seed(1)  # the same blocks are dropped in both checkouts
        trainer.step(batch)

    return step


def default_model(args: argparse.Namespace, folder: Path) -> str:
    """Return the path of the default model, which is written to `folder` if it has random weights."""
    import torch

    import jahubert

    if args.workload == "transcribe":
        configs = sorted((args.first / "jahubert" / "assets").glob("*/config.json"))
        if not configs:
            raise SystemExit(f"{args.first} has no built-in model; specify one with --model")
        return str(configs[0].parent)
    torch.manual_seed(0)
    return str(
        jahubert.save_bundle(folder / "base", model=jahubert.HubertModel(jahubert.HubertConfig.base()))
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("first", type=Path, help="folder of a checkout")
    parser.add_argument("second", type=Path, help="folder of another checkout")
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--audio", type=Path, help="recording for transcribe and features")
    parser.add_argument("--model", help="model for transcribe and features")
    parser.add_argument(
        "--lengths", type=float, nargs="+", default=[4.4, 4.4, 4.3, 4.3], help="lengths for pretrain (s)"
    )
    parser.add_argument("--blocks", type=int, default=4, help="Transformer blocks for pretrain")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--passes", type=int, default=1, help="repetitions per measurement")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.first, args.second = args.first.resolve(), args.second.resolve()
    if args.worker:
        return worker(args)
    if args.workload != "pretrain" and args.audio is None:
        parser.error(f"{args.workload} needs --audio")
    with tempfile.TemporaryDirectory() as folder:
        model = "" if args.workload == "pretrain" else args.model or default_model(args, Path(folder))
        processes = [Process(checkout, args, model) for checkout in (args.first, args.second)]
        rounds = []
        for number in range(args.rounds):
            order = (0, 1) if number % 2 == 0 else (1, 0)
            seconds = {index: processes[index].measure() for index in order}
            rounds.append((seconds[0], seconds[1]))
    medians = [statistics.median(column) for column in zip(*rounds, strict=True)]
    ratio = statistics.median(second / first for first, second in rounds)
    for checkout, median in zip((args.first, args.second), medians, strict=True):
        print(f"{checkout}: {median:.3f} s of CPU time")
    print(f"ratio of the medians {medians[1] / medians[0]:.3f}, median of the ratios {ratio:.3f}")


if __name__ == "__main__":
    main()
