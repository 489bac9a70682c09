"""Benchmark of training, kernels, features and decoding on one GPU in less than four minutes.

    tools/bench/gpu.sh                    # prints a table and writes gpu_bench.json
    tools/bench/gpu.sh --only step large  # runs only these sections
    tools/bench/gpu.sh --small            # quick check of the script on a CPU; the figures are meaningless

The script requires torch, numpy, safetensors, soundfile and soxr. transformers and torchaudio are measured
for comparison if they can be imported. The device tests require pytest. The device tests and the sections
engine, compiled-engine, labels and kmeans require the extra `train`. Sections whose packages are missing are
listed as skipped. A section has fewer repetitions if the following sections would otherwise not end within
`--minutes`, and is listed as skipped if it is not expected to end in time itself.

Steps of all models are measured in turns in one process, and their times are medians. A peer that has too
little memory for a batch computes a half or a quarter of it. Memory is the peak above the memory of weights,
gradients and optimizer state; ratios of memory are per second of audio. The sections compiled and
compiled-engine measure blocks that are compiled for one shape, to which all micro-batches are padded. The
column "goal" contains the project's goals, which are lower or upper limits. A list of all goals, including
those that were not measured, and the definition of "of peak" follow the table. The JSON file is written after
each section. The exit status is 1 if a section or a device test failed.
"""

import argparse
import importlib.metadata
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import extract
import numpy as np
import torch
from gpu_report import OF_PEAK, PEERS, Report, Settings, Skipped, format_row
from gpu_stages import check_train_extra, engine, labels
from gpu_steps import compiled, compiled_trainer, free_memory, large, step
from peers import importable
from pretrain_step import synchronize
from torch import nn

from jahubert.frames import SAMPLE_RATE
from jahubert.inference.ctc import beam_search
from jahubert.model.kernels.dispatch import triton_kernels_for
from jahubert.train.experiment.environment import git_commit

ROOT = Path(__file__).resolve().parents[2]


def device_tests(report: Report, run: Settings) -> None:
    """Run the device tests in another process, while this one imports the peers and compiles blocks."""
    if run.device.type == "cpu":
        raise Skipped("needs a GPU")
    if not importable("pytest"):
        raise Skipped("pytest is not installed")
    check_train_extra()
    files = ("tests/gpu/device_checks.py", "tests/gpu/triton_checks.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    index, visible = run.device.index or 0, os.environ.get("CUDA_VISIBLE_DEVICES")
    environment = os.environ | {"JAHUBERT_TEST_CUDA": visible.split(",")[index] if visible else str(index)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        _ = run.peers
        started = time.perf_counter()
        with suppress(Exception):  # the section `compiled` reports the error
            for n_groups in (1, 2):  # on disk, torch.compile keeps kernels for sections with these shapes
                compiled_trainer(run, n_groups)
            report.add("first steps with compilation", time.perf_counter() - started, "s")
        try:
            output, _ = process.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", output)}
    if counts:
        report.add("device tests passed", counts.get("passed", 0), "tests")
        report.add("device tests failed", counts.get("failed", 0) + counts.get("error", 0), "tests")
    if process.returncode:
        print(output[-4000:], flush=True)
        raise RuntimeError(f"the device tests ended with exit status {process.returncode}")


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
        distinct_ND = torch.from_numpy(mixture(min(frames, 200_000), dim))
        x_ND = distinct_ND.repeat(-(-frames // len(distinct_ND)), 1)[:frames]
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


class Section(NamedTuple):
    measure: Callable[[Report, Settings], None]
    seconds: float  # expected time on a GPU
    shortened: float  # expected time with fewer repetitions


# In order of importance. The tests are first because blocks are compiled for other sections meanwhile.
SECTIONS = {
    "tests": Section(device_tests, 70, 70),
    "step": Section(step, 35, 25),
    "compiled": Section(compiled, 28, 22),
    "engine": Section(engine, 25, 18),
    "compiled-engine": Section(partial(engine, compiled=True), 26, 19),
    "large": Section(large, 30, 20),
    "labels": Section(labels, 24, 16),
    "features": Section(features, 16, 11),
    "kmeans": Section(kmeans, 10, 10),
    "beam": Section(beam, 5, 5),
}


def schedule(names: list[str], elapsed: float, budget: float) -> str:
    """Return whether the first of some sections should run "in full" or "shortened", or be "skipped".

    Args:
        elapsed, budget: time since the start and time for all sections, in seconds.
    """
    first, *following = (SECTIONS[name] for name in names)
    if elapsed + first.shortened > budget:
        return "skipped"
    in_full = elapsed + first.seconds + sum(section.shortened for section in following) <= budget
    return "in full" if in_full or first.seconds == first.shortened else "shortened"


def environment(device: torch.device) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    versions = {"torch": torch.__version__}
    for peer in PEERS:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[peer] = importlib.metadata.version(peer)
    return {
        "device": name,
        "cores": os.cpu_count(),
        "commit": git_commit() or "unknown",
        **versions,
        "triton_kernels": triton_kernels_for(torch.zeros(1, dtype=torch.bfloat16, device=device)) is not None,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def run_section(name: str, report: Report, run: Settings) -> str:
    """Run a section, and return its outcome. An error does not prevent the following sections."""
    try:
        free_memory(run.device)
        SECTIONS[name].measure(report, run)
    except Skipped as reason:
        return f"skipped: {reason}"
    except (Exception, SystemExit) as error:
        return f"failed: {type(error).__name__}: {str(error)[:500]}"
    return "done with fewer repetitions" if run.shortened else "done"


def print_table(report: Report, outcomes: dict[str, dict[str, Any]]) -> None:
    print(f"\n{'measurement':<46}{'value':>10} {'unit':<14}{'goal':<22}details")
    for row in report.rows:
        print(format_row({key: value for key, value in row.items() if key != "kernels"}))
    for name, section in outcomes.items():
        if section["outcome"] != "done":
            print(f"{name}: {section['outcome']}")
    print(f"\n{OF_PEAK}")
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
        "--minutes", type=float, help="time for all sections; default: 4, unlimited if --small"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_bench.json"))
    args = parser.parse_args()
    minutes = args.minutes if args.minutes is not None else math.inf if args.small else 4.0
    device = torch.device("cpu" if args.small else args.device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision for all models
    started, report, outcomes = time.monotonic(), Report(has_goals=not args.small), {}
    about = environment(device)
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for number, name in enumerate(args.only):
            section_started = time.monotonic()
            elapsed = section_started - started
            extent = schedule(args.only[number:], elapsed, 60 * minutes)
            if extent == "skipped":
                outcome = f"skipped: {minutes:g} minutes are too short, {elapsed:.0f} s have passed"
            else:
                folder, audio = Path(temporary, name), Path(temporary, "audio")
                folder.mkdir()
                audio.mkdir(exist_ok=True)
                run = Settings(device, args.small, folder, audio, extent == "shortened")
                outcome = run_section(name, report, run)
            outcomes[name] = {"outcome": outcome, "seconds": round(time.monotonic() - section_started, 1)}
            print(f"-- {name}: {outcome} ({outcomes[name]['seconds']} s)", flush=True)
            # The file is complete up to this section even if the process is killed later.
            result = {"environment": about, "of_peak": OF_PEAK, "sections": outcomes, "rows": report.rows}
            args.out.write_text(json.dumps(result, indent=1))
    print_table(report, outcomes)
    print(f"\n{args.out}: {len(report.rows)} rows, {time.monotonic() - started:.0f} s in total")
    if any(section["outcome"].startswith("failed") for section in outcomes.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
