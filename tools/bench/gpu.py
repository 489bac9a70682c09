"""Benchmark of training, kernels, features and decoding on one GPU in less than four minutes.

    tools/bench/gpu.sh                    # prints a table and writes gpu_bench.json
    tools/bench/gpu.sh --only step large  # runs only these sections
    tools/bench/gpu.sh --small            # quick check of the script on a CPU; the figures are meaningless

The script requires torch, numpy, safetensors, soundfile and soxr. transformers and torchaudio are measured
for comparison if they can be imported. The device tests require pytest. The device tests and the sections
engine, labels, kmeans and compiled require the extra `train`. Sections whose packages are missing, and
sections that are expected to end after `--minutes`, are listed as skipped. Steps of all models are
interleaved in one process, and their times are medians. Memory is the peak above the memory of weights,
gradients and optimizer state. "Of peak" is the FLOP/s required for the valid frames, divided by the FLOP/s of
a large matrix product in the same run. The column "goal" contains the project's goals, which are lower or
upper limits. A list of all goals, including those that were not measured, follows the table. The JSON file is
written after each section. The exit status is 1 if a section or a device test failed.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import extract
import numpy as np
import pretrain_step
import torch
from gpu_report import MICRO_BATCH, PEERS, Report, Settings, Skipped, format_row
from gpu_stages import check_train_extra, engine, labels
from kernel_profile import by_group, profile_steps
from peers import importable
from pretrain_step import make_batch, matrix_peak, synchronize
from torch import nn

from jahubert.frames import SAMPLE_RATE
from jahubert.inference.ctc import beam_search
from jahubert.model.hubert import HubertConfig

ROOT = Path(__file__).resolve().parents[2]


def device_tests(report: Report, run: Settings) -> None:
    if run.device.type == "cpu":
        raise Skipped("needs a GPU")
    if not importable("pytest"):
        raise Skipped("pytest is not installed")
    check_train_extra()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/device_checks.py"]
    index, visible = run.device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    environment = os.environ | {"JAHUBERT_TEST_CUDA": visible.split(",")[index] if visible else str(index)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    if counts:
        report.add("device tests passed", counts.get("passed", 0), "tests")
        report.add("device tests failed", counts.get("failed", 0) + counts.get("error", 0), "tests")
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-1000:], flush=True)
        raise RuntimeError(f"the device tests ended with exit status {done.returncode}")


@cache
def cached_peak(device: torch.device, dtype: torch.dtype) -> float:
    return matrix_peak(device, dtype)


def free_memory(device: torch.device) -> None:
    gc.collect()  # optimizers and models may be in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_megabytes(trainer: pretrain_step.Trainer, batch: pretrain_step.Batch) -> float:
    """Measure the peak memory of a step's activations in MB, once gradients and moments exist (CPU: 0)."""
    if trainer.device.type == "cpu":
        return 0.0
    trainer.step(batch, keep_gradients=True)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    trainer.step(batch, keep_gradients=True)
    trainer.optimizer.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def compare_steps(
    report: Report, run: Settings, name: str, config: HubertConfig, lengths: list[float]
) -> pretrain_step.Trainer:
    """Time training steps of all models in alternation, and return jahubert's trainer."""
    batch, peak = make_batch(lengths, run.device), cached_peak(run.device, run.dtype)
    trainers, failures = {}, {}
    for kind in ("jahubert", *PEERS):
        if kind != "jahubert" and kind not in run.peers:
            failures[kind] = "not compared" if run.small else "cannot be imported"
            continue
        try:
            trainers[kind] = pretrain_step.Trainer(kind, config, run.device, run.dtype)
            trainers[kind].step(batch)
        except Exception as error:  # a peer may be incompatible or need too much memory
            if kind == "jahubert":
                raise
            failures[kind] = f"{type(error).__name__}: {str(error)[:80]}"
            trainers.pop(kind, None)
        if kind in failures:  # after the `except` block, no traceback refers to the activations any more
            free_memory(run.device)
    memory = {kind: peak_megabytes(trainer, batch) for kind, trainer in trainers.items()}
    turns = [{kind: trainer.step(batch) for kind, trainer in trainers.items()} for _ in range(run.repeats)]
    seconds = {kind: statistics.median(turn[kind] for turn in turns) for kind in trainers}
    share = pretrain_step.flops(config, batch.n_samples) / seconds["jahubert"] / peak
    rate = batch.seconds / seconds["jahubert"]
    details = {"seconds": batch.seconds, "megabytes": memory["jahubert"]}
    report.add(f"{name}: jahubert", rate, "audio-s/s", **details)
    report.add(f"{name}: of peak", 100 * share, "%", peak_tflops=peak / 1e12)
    for kind in PEERS:
        if kind in failures:
            report.add(f"{name}: {kind}", None, "audio-s/s", reason=failures[kind])
            continue
        ratio = statistics.median(turn[kind] / turn["jahubert"] for turn in turns)
        report.add(f"{name}: {kind}", batch.seconds / seconds[kind], "audio-s/s", megabytes=memory[kind])
        report.add(f"{name}: speedup over {kind}", ratio, "times")
        less = memory[kind] / max(1.0, memory["jahubert"])
        report.add(f"{name}: memory of {kind}", less, "times ours")
    return trainers["jahubert"]


def step(report: Report, run: Settings) -> None:
    """Time training steps of HuBERT base on three batches, and profile the kernels for the largest batch."""
    base = run.model("base")
    similar = [0.9, 1.0] if run.small else [4.4] * 20
    compare_steps(report, run, "base, similar", base, similar)
    compare_steps(report, run, "base, mixed", base, run.lengths(3))
    lengths = run.lengths(10) if run.small else [*run.lengths(10), 15.0, 5.0]  # 350 s, one micro-batch
    trainer = compare_steps(report, run, MICRO_BATCH, base, lengths)
    kernels(report, run, trainer, make_batch(lengths, run.device))


def large(report: Report, run: Settings) -> None:
    compare_steps(report, run, "large, mixed", run.model("large"), run.lengths(5))


def kernels(
    report: Report, run: Settings, trainer: pretrain_step.Trainer, batch: pretrain_step.Batch
) -> None:
    """Profile jahubert's training step by group of GPU kernels, or of operators on a CPU."""

    def same_step() -> float:
        torch.manual_seed(1)  # layer drop selects the same blocks
        return trainer.step(batch)

    milliseconds = 1e3 * statistics.median(same_step() for _ in range(3))
    times = profile_steps(same_step, run.device.type == "cuda")
    groups = by_group(times)
    total = sum(groups.values())
    if not total:  # for example, if users may not read the GPU's performance counters
        return report.add("kernels: products", None, "ms", reason="the profiler recorded no kernels")
    for group, ms in groups.items():
        report.add(f"kernels: {group}", ms, "ms", share=f"{ms / total:.0%}")
    report.add("kernels: none running", max(0.0, milliseconds - total), "ms", step_ms=milliseconds)
    longest = sorted(times.items(), key=lambda item: -item[1])[:25]
    report.rows[-1]["kernels"] = {name[:120]: round(ms, 3) for name, ms in longest}


def features(report: Report, run: Settings) -> None:
    """Time feature extraction from 291 s of audio in one batch, with the same weights in all models."""
    blocks, layers = (1, (1,)) if run.small else (12, (6, 12))
    options = argparse.Namespace(blocks=blocks)
    lengths = [0.5, 0.9] if run.small else np.linspace(3.0, 15.2, 32).tolist()
    n_samples = [round(SAMPLE_RATE * seconds) for seconds in sorted(lengths, reverse=True)]
    generator = torch.Generator().manual_seed(0)
    wavs = [0.1 * torch.randn(n, generator=generator) for n in n_samples]
    wav_BT = nn.utils.rnn.pad_sequence(wavs, batch_first=True).to(run.device)
    torch.manual_seed(0)
    models = {"jahubert": extract.build_jahubert(options).eval()}
    for kind in run.peers:
        try:
            model = extract.BUILDERS[kind](options).eval()
            extract.load(model, models["jahubert"].state_dict())
        except (Exception, SystemExit) as error:  # a peer may be incompatible
            report.add(f"features: {kind}", None, "audio-s/s", reason=f"{type(error).__name__}: {error}"[:80])
        else:
            models[kind] = model
    for model in models.values():
        model.to(run.device)
    for layer, dtype in [(layer, torch.float32) for layer in layers] + [(layers[0], torch.bfloat16)]:
        if run.small and dtype is torch.bfloat16:
            continue
        turns = []
        for _ in range(run.repeats):
            turn = {}
            for kind, model in models.items():
                synchronize(run.device)
                started = time.perf_counter()
                with (
                    torch.inference_mode(),
                    torch.autocast(run.device.type, dtype, enabled=dtype is not torch.float32),
                ):
                    extract.features(kind, model, wav_BT, n_samples, layer)
                synchronize(run.device)
                turn[kind] = time.perf_counter() - started
            turns.append(turn)
        name = f"features, layer {layer}, {'fp32' if dtype is torch.float32 else 'bf16'}"
        audio = sum(n_samples) / SAMPLE_RATE
        ratios = {
            f"speedup_over_{kind}": statistics.median(turn[kind] / turn["jahubert"] for turn in turns)
            for kind in models
            if kind != "jahubert"
        }
        ours = statistics.median(turn["jahubert"] for turn in turns)
        report.add(name, audio / ours, "audio-s/s", **ratios)


def kmeans(report: Report, run: Settings) -> None:
    check_train_extra()
    from kmeans import mixture

    from jahubert.model.centroids import NearestCentroid
    from jahubert.train.clustering.kmeans import fit_kmeans
    from jahubert.train.clustering.lloyd import KmeansOptions

    sizes = [(2_000, 39, 10)] if run.small else [(2_000_000, 39, 100), (500_000, 768, 500)]
    for frames, dim, clusters in sizes:
        x_ND = torch.from_numpy(mixture(min(frames, 200_000), dim)).repeat(max(1, frames // 200_000), 1)
        x_ND += 0.01 * torch.randn(x_ND.shape)
        options = KmeansOptions(clusters, n_init=1, max_iter=100, seed=0, device=str(run.device))
        started = time.perf_counter()
        fit = fit_kmeans(x_ND, options)
        synchronize(run.device)
        name = f"k-means, {frames:,} x {dim}, {clusters} clusters"
        report.add(f"{name}: fit", time.perf_counter() - started, "s")
        nearest, on_device_ND = NearestCentroid(fit.centroids_KD.to(run.device)), x_ND.to(run.device)
        nearest.labels(on_device_ND)
        synchronize(run.device)
        started = time.perf_counter()
        nearest.labels(on_device_ND)
        synchronize(run.device)
        seconds = time.perf_counter() - started
        report.add(f"{name}: labels", 1e3 * seconds, "ms", tflops=2e-12 * frames * dim * clusters / seconds)


def mostly_blank(rows: int, frames: int, symbols: int = 42) -> torch.Tensor:
    """Create peaked log-probabilities (B, S, V) with blank in 60 % of the frames."""
    generator = torch.Generator().manual_seed(7)
    best_BS = torch.randint(1, symbols, (rows, frames), generator=generator)
    best_BS[torch.rand(rows, frames, generator=generator) < 0.6] = 0
    logits_BSV = torch.randn(rows, frames, symbols, generator=generator)
    return (logits_BSV + 6 * nn.functional.one_hot(best_BS, symbols)).log_softmax(-1)


def beam(report: Report, run: Settings) -> None:
    """Time CTC beam search with a beam of 20 on mostly blank log-probabilities."""
    frames = 50 if run.small else 500
    for device, rows in ((torch.device("cpu"), 32), (run.device, 32), (run.device, 128)):
        if run.small:
            rows //= 32
        logp_BSV = mostly_blank(rows, frames).to(device)
        times = []
        for _ in range(3):
            synchronize(run.device)
            started = time.perf_counter()
            beam_search(logp_BSV, [frames] * len(logp_BSV), beam=20)
            synchronize(run.device)
            times.append(time.perf_counter() - started)
        report.add(
            f"beam search, {rows} rows, {device.type}", 1e3 * min(times) / len(logp_BSV), "ms/utterance"
        )


# The sections in order of importance, each with the number of seconds that it is expected to take on a GPU.
SECTIONS: dict[str, tuple[Callable[[Report, Settings], None], int]] = {
    "step": (step, 60),
    "engine": (engine, 35),
    "labels": (labels, 35),
    "large": (large, 35),
    "tests": (device_tests, 30),
    "features": (features, 25),
    "kmeans": (kmeans, 10),
    "beam": (beam, 10),
    "compiled": (partial(engine, compiled=True), 75),
}


def environment(run: Settings) -> dict[str, Any]:
    device = run.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__}
    for peer in run.peers:
        versions[peer] = sys.modules[peer].__version__
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "device": name,
        "cores": os.cpu_count(),
        "commit": commit.stdout.strip(),
        **versions,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_section(name: str, report: Report, device: torch.device, small: bool) -> str:
    """Run a section, and return its outcome. An error does not prevent the following sections."""
    try:
        free_memory(device)
        with tempfile.TemporaryDirectory() as folder:
            SECTIONS[name][0](report, Settings(device, small, Path(folder)))
    except Skipped as reason:
        return f"skipped: {reason}"
    except (Exception, SystemExit) as error:
        return f"failed: {type(error).__name__}: {str(error)[:500]}"
    return "done"


def print_table(report: Report, outcomes: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'measurement':<46}{'value':>10} {'unit':<14}{'goal':<22}details")
    for row in report.rows:
        print(format_row({key: value for key, value in row.items() if key != "kernels"}))
    for name, section in outcomes.items():
        if section["outcome"] != "done":
            print(f"{name}: {section['outcome']}")
    if report.has_goals:
        print("\n" + "\n".join(report.goals()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="use tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument(
        "--minutes", type=float, default=4.0, help="start only sections that are expected to end in this time"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_bench.json"))
    args = parser.parse_args()
    device = torch.device("cpu" if args.small else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision for all models
    started, report, outcomes = time.monotonic(), Report(has_goals=not args.small), {}
    about = environment(Settings(device, args.small, Path()))
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    for name in args.only:
        section_started = time.monotonic()
        expected_end = section_started - started + SECTIONS[name][1]
        if expected_end > 60 * args.minutes and not args.small:
            outcome = f"skipped: expected to end after {expected_end / 60:.1f} minutes"
        else:
            outcome = run_section(name, report, device, args.small)
        outcomes[name] = {"outcome": outcome, "seconds": round(time.monotonic() - section_started, 1)}
        print(f"-- {name}: {outcome} ({outcomes[name]['seconds']} s)", flush=True)
        # The file is complete up to this section even if the process is killed later.
        result = {"environment": about, "sections": outcomes, "rows": report.rows}
        args.out.write_text(json.dumps(result, indent=1))
    print_table(report, outcomes)
    print(f"\n{args.out}: {len(report.rows)} rows, {time.monotonic() - started:.0f} s in total")
    if any(section["outcome"].startswith("failed") for section in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
