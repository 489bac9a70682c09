"""Benchmark of training, kernels, features and decoding on one GPU, which takes less than four minutes.

    tools/bench/gpu.sh                    # prints a table and writes gpu_bench.json
    tools/bench/gpu.sh --only step large  # runs only these sections
    tools/bench/gpu.sh --small            # quick check of the script on a CPU, whose figures are meaningless

The script requires torch, numpy, safetensors, soundfile and soxr. transformers and torchaudio are measured
for comparison if they can be imported. The device tests require pytest, and the training engine, labels and
k-means require the extra `train`. Sections whose packages are missing or that would take too long (--minutes)
are listed as skipped. Steps of all models are interleaved in one process, and times are medians. Memory is
the peak in addition to weights, gradients and optimizer state. "Of peak" is the FLOP/s required for the valid
frames, divided by the FLOP/s of a large matrix product in the same run. The column "goal" contains the
project's goals.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import extract
import numpy as np
import pretrain_step
import soundfile
import torch
from peers import importable
from pretrain_step import make_batch, matrix_peak, synchronize
from torch import nn

from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.inference.ctc import beam_search
from jahubert.model.hubert import HubertConfig, HubertModel

ROOT = Path(__file__).resolve().parents[2]
PEERS = ("transformers", "torchaudio")
MIXED = (2.0, 3.0, 5.0, 8.0, 15.0)
# Patterns that assign kernels to groups by name, by the first match. All other kernels are "between
# products".
GROUPS = {
    "attention": re.compile(r"flash|fmha|attention|softmax", re.IGNORECASE),
    "products": re.compile(r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|conv|addmm|\bmm\b|bmm|matmul", re.I),
}


class Skipped(Exception):
    """Raised if a section of the benchmark cannot run on this machine. The message states the reason."""


@dataclass
class Report:
    """The rows of the table, each of which is printed when it is measured."""

    has_goals: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, value: float | None, unit: str, goal: float | None = None, **details: float | str
    ) -> None:
        """Add a row. A value of None marks a failed peer or measurement, with the reason in `details`."""
        row = {"name": name, "value": value, "unit": unit, **details}
        if self.has_goals and goal is not None and value is not None:
            row |= {"goal": goal, "reached": value >= goal}
        self.rows.append(row)
        print(format_row(row), flush=True)

    def value(self, name: str) -> float | None:
        """Return the value of an earlier row."""
        return next((row["value"] for row in self.rows if row["name"] == name), None)


def format_row(row: dict[str, Any]) -> str:
    value = "-" if row["value"] is None else f"{row['value']:,.4g}"
    goal = f"{row['goal']:,.4g} {'reached' if row['reached'] else 'not reached'}" if "goal" in row else ""
    rest = {k: v for k, v in row.items() if k not in ("name", "value", "unit", "goal", "reached")}
    details = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    return f"{row['name']:<44}{value:>10} {row['unit']:<14}{goal:<22}{details}".rstrip()


@dataclass
class Settings:
    """Device, precision and sizes for a run of the benchmark."""

    device: torch.device
    small: bool
    folder: Path  # folder for temporary files

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def peers(self) -> list[str]:
        """The peer projects that can be imported. Importing them takes a long time."""
        return [] if self.small else list(filter(importable, PEERS))

    @property
    def repeats(self) -> int:
        return 2 if self.small else 8

    def model(self, size: str) -> HubertConfig:
        config = HubertConfig.large() if size == "large" else HubertConfig.base()
        tiny = {"conv_dims": (16,) * 7, "width": 64, "layers": 2, "heads": 2, "ffn": 64, "pos_conv_groups": 4}
        return replace(config, **tiny) if self.small else config

    def lengths(self, copies: int) -> list[float]:
        """Return mixed utterance lengths in seconds, 33 s per copy."""
        return [0.5, 0.8, 1.0] if self.small else [*MIXED] * copies


def device_tests(report: Report, run: Settings) -> None:
    if run.device.type == "cpu":
        raise Skipped("needs a GPU")
    if not importable("pytest"):
        raise Skipped("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/device_checks.py"]
    environment = os.environ | {"JAHUBERT_TEST_CUDA": str(run.device.index or 0)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|error)", done.stdout)}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    report.add("device tests passed", counts.get("passed", 0), "tests", failed=failed)
    if failed or done.returncode:
        print(done.stdout[-3000:], flush=True)


@cache
def cached_peak(device: torch.device, dtype: torch.dtype) -> float:
    return matrix_peak(device, dtype)


def peak_megabytes(trainer: pretrain_step.Trainer, batch: pretrain_step.Batch) -> float:
    """Measure the peak memory of a step's activations in MB, once gradients and moments exist."""
    if trainer.device.type == "cpu":
        return 0.0
    trainer.step(batch, keep_gradients=True)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    trainer.step(batch, keep_gradients=True)
    trainer.optimizer.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def compare_steps(
    report: Report, run: Settings, name: str, config: HubertConfig, lengths: list[float], **goals: float
) -> pretrain_step.Trainer:
    """Time training steps of all models in alternation, and return jahubert's trainer."""
    batch, peak = make_batch(lengths, run.device), cached_peak(run.device, run.dtype)
    trainers, failures = {}, {}
    for kind in ("jahubert", *PEERS):
        if kind != "jahubert" and kind not in run.peers:
            failures[kind] = "not compared"
            continue
        try:
            trainers[kind] = pretrain_step.Trainer(kind, config, run.device, run.dtype)
            trainers[kind].step(batch)
        except torch.OutOfMemoryError:
            failures[kind] = "out of memory"
            trainers.pop(kind, None)
            torch.cuda.empty_cache()
    memory = {kind: peak_megabytes(trainer, batch) for kind, trainer in trainers.items()}
    turns = [{kind: trainer.step(batch) for kind, trainer in trainers.items()} for _ in range(run.repeats)]
    seconds = {kind: statistics.median(turn[kind] for turn in turns) for kind in trainers}
    share = pretrain_step.flops(config, batch.n_samples) / seconds["jahubert"] / peak
    rate = batch.seconds / seconds["jahubert"]
    report.add(f"{name}: jahubert", rate, "audio-s/s", goals.get("rate"), megabytes=memory["jahubert"])
    report.add(f"{name}: of peak", 100 * share, "%", goals.get("share"), tflops=peak / 1e12)
    for kind in PEERS:
        if kind in failures:
            report.add(f"{name}: {kind}", None, "audio-s/s", reason=failures[kind])
            continue
        ratio = statistics.median(turn[kind] / turn["jahubert"] for turn in turns)
        report.add(f"{name}: {kind}", batch.seconds / seconds[kind], "audio-s/s", megabytes=memory[kind])
        report.add(f"{name}: speedup over {kind}", ratio, "times", goals.get(kind))
    return trainers["jahubert"]


def step(report: Report, run: Settings) -> None:
    """Time training steps of HuBERT base on three batches, and profile the kernels for the largest batch."""
    base = run.model("base")
    similar = [0.9, 1.0] if run.small else [4.4] * 20
    compare_steps(report, run, "base, similar, 88 s", base, similar)
    compare_steps(report, run, "base, mixed, 99 s", base, run.lengths(3), rate=3500)
    lengths = run.lengths(10) if run.small else [*run.lengths(10), 15.0, 5.0]
    goals = {"rate": 7000, "share": 40, "transformers": 4, "torchaudio": 6}
    trainer = compare_steps(report, run, "base, mixed, 350 s", base, lengths, **goals)
    kernels(report, run, trainer, make_batch(lengths, run.device))


def large(report: Report, run: Settings) -> None:
    compare_steps(report, run, "large, mixed, 165 s", run.model("large"), run.lengths(5), share=40)


def kernels(
    report: Report, run: Settings, trainer: pretrain_step.Trainer, batch: pretrain_step.Batch
) -> None:
    """Profile the CUDA time of jahubert's training step by kernel group, or by operator on a CPU."""
    on_gpu = run.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    seconds = statistics.median(trainer.step(batch) for _ in range(3))
    with torch.profiler.profile(activities=activities) as profile:
        trainer.step(batch)
    times: dict[str, float] = {}
    for event in profile.key_averages():
        if on_gpu and event.device_type is torch.autograd.DeviceType.CUDA:
            times[event.key] = times.get(event.key, 0.0) + event.self_device_time_total / 1e3
        elif not on_gpu:
            times[event.key] = times.get(event.key, 0.0) + event.self_cpu_time_total / 1e3
    groups = dict.fromkeys(("products", "attention", "between products"), 0.0)
    for name, milliseconds in times.items():
        group = next((group for group, pattern in GROUPS.items() if pattern.search(name)), "between products")
        groups[group] += milliseconds
    total = sum(groups.values())
    for group, milliseconds in groups.items():
        report.add(f"kernels: {group}", milliseconds, "ms", share=f"{milliseconds / max(total, 1e-9):.0%}")
    report.add("kernels: none running", max(0.0, 1e3 * seconds - total), "ms", step_ms=1e3 * seconds)
    longest = sorted(times.items(), key=lambda item: -item[1])[:25]
    report.rows[-1]["kernels"] = {name[:120]: round(ms, 3) for name, ms in longest}


def features(report: Report, run: Settings) -> None:
    """Time feature extraction from 292 s of audio in one batch, with the same weights in all models."""
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
        models[kind] = extract.BUILDERS[kind](options).eval()
        extract.load(models[kind], models["jahubert"].state_dict())
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

    from jahubert.train.clustering.kmeans import fit_kmeans
    from jahubert.train.clustering.lloyd import KmeansOptions, NearestCentroid

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
        if run.small and rows > 32:
            continue
        logp_BSV = mostly_blank(4 if run.small else rows, frames).to(device)
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


def write_flac(path: Path, seconds: float, seed: int) -> int:
    n_samples = int(seconds * SAMPLE_RATE)
    noise_T = np.random.default_rng(seed).standard_normal(n_samples)
    envelope_T = np.repeat(np.random.default_rng(seed).uniform(0.005, 0.1, n_samples // 800 + 1), 800)
    soundfile.write(path, noise_T * envelope_T[:n_samples], SAMPLE_RATE)
    return n_samples


def make_corpus(run: Settings, rows: int) -> Path:
    """Write a manifest of `rows` utterances from about a hundred noise FLAC files, and return its path."""
    from jahubert.audio import AudioSource
    from jahubert.train.data.manifest import Utterance, write_manifest

    manifest = run.folder / f"manifest-{rows}.arrow"
    rng = np.random.default_rng(0)
    n_files = 8 if run.small else 800
    longest = 2.0 if run.small else 15.6
    seconds = np.clip(rng.lognormal(1.6, 0.55, n_files), 0.8 if run.small else 2.0, longest).tolist()
    paths = [run.folder / f"{number}.flac" for number in range(n_files)]
    if not paths[-1].exists():
        if run.small:
            [write_flac(*job) for job in zip(paths, seconds, range(n_files), strict=True)]
        else:
            with ProcessPoolExecutor(min(14, os.cpu_count() or 1)) as pool:
                list(pool.map(write_flac, paths, seconds, range(n_files), chunksize=20))
    lengths = [int(value * SAMPLE_RATE) for value in seconds]
    items = (
        Utterance(id=str(row), audio=AudioSource(str(paths[row % n_files])), n_samples=lengths[row % n_files])
        for row in range(rows)
    )
    write_manifest(manifest, items)
    return manifest


def workers(run: Settings) -> int:
    return 0 if run.small else max(1, min(14, (os.cpu_count() or 2) - 2))


def check_train_extra() -> None:
    for name in ("pyarrow", "tqdm"):
        if not importable(name):
            raise Skipped(f"needs the extra train ({name} is not installed)")


def engine(report: Report, run: Settings, compiled: bool = False) -> None:
    """Time 20 updates of 2,800 s in the training engine after 5 warm-up updates; 5 updates if compiled."""
    check_train_extra()
    from jahubert.train.data.batches import CropConfig, MaskConfig, PretrainData
    from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
    from jahubert.train.data.manifest import Manifest
    from jahubert.train.stages.pretrain import Pretrainer
    from jahubert.train.trainer.micro_batch import with_micro_seconds
    from jahubert.train.trainer.optim import TrainConfig
    from jahubert.train.trainer.parallel import compiled_graphs
    from jahubert.train.trainer.trainer import train

    manifest = Manifest(make_corpus(run, 8 if run.small else 8_000))
    n_frames = HUBERT.n_frames(np.asarray(manifest.n_samples))
    rng = np.random.default_rng(1)
    header = LabelHeader(500, "mfcc", None, "c", None, manifest.fingerprint, False)
    writer = LabelWriter(run.folder / "units", header, n_frames, shard_size=len(n_frames))
    writer.write(0, [rng.integers(500, size=n) for n in n_frames])
    writer.finish()
    model = run.model("base")
    every = 1 if run.small else 5
    config = TrainConfig(
        max_steps=(2 if compiled else 5) * every,
        compile=compiled,
        batch_seconds=4.0 if run.small else 2800.0,
        precision="fp32" if run.small else "auto",
        device=str(run.device),
        workers=workers(run),
        log_every=every,
        valid_every=0,
        save_every=10**6,
    )
    config = with_micro_seconds(config, model, 2.0 if run.small else 15.6)
    data = PretrainData(
        manifest,
        LabelStore(run.folder / "units"),
        split="train",
        crop=CropConfig(min_seconds=0.5, max_seconds=2.0 if run.small else 15.6, keep_in_memory_hours=0.0),
        mask=MaskConfig(),
        sizes=config.batch_sizes,
        seed=0,
    )
    out = run.folder / "pretrain"
    out.mkdir()
    module = Pretrainer(model, 500, unit_dim=256, temperature=0.1, penalty=10.0, seed=0)
    graphs_before = compiled_graphs()
    with torch.compiler.set_stance("force_eager" if run.small else "default"):  # a CPU compiles for minutes
        train(module, data, config, out)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = sum(row["timing"]["seconds"] for row in rows)
    audio = sum(row["timing"]["audio_hours_an_hour"] * row["timing"]["seconds"] for row in rows)
    waiting = sum(row["timing"]["waiting"] * row["timing"]["seconds"] for row in rows) / seconds
    step_rate = report.value("base, mixed, 350 s: jahubert")
    goal = 0.9 * step_rate if step_rate else None
    name = "compiled engine" if compiled else "engine"
    report.add(
        f"{name}, {config.batch_seconds:,.0f} s per update",
        audio / seconds,
        "audio-h/h",
        goal,
        micro_seconds=config.micro_seconds or 0.0,
    )
    report.add(f"{name}: waiting for data", 100 * waiting, "%", workers=str(config.workers))
    report.add(f"{name}: padding", 100 * rows[-1]["padding"], "%")
    recompiled = sum(row["timing"].get("compiled_graphs", 0) for row in rows)
    report.add(f"{name}: compiled graphs", compiled_graphs() - graphs_before, "graphs", recompiled=recompiled)


def labels(report: Report, run: Settings) -> None:
    """Time the stage `label` for layer 6 in float32 on FLAC files."""
    check_train_extra()
    from jahubert.formats.bundle import save_bundle
    from jahubert.train.clustering.features import HubertLayer
    from jahubert.train.clustering.streaming import feature_header, save_centroids
    from jahubert.train.data.manifest import Manifest
    from jahubert.train.stages import label

    layer = 1 if run.small else 6
    path = make_corpus(run, 8 if run.small else 7_000)
    torch.manual_seed(0)
    model = HubertModel(run.model("base"))
    save_bundle(run.folder / "bundle", model=model)
    (run.folder / "kmeans").mkdir()
    header = feature_header(HubertLayer(model, layer), "hubert", layer)
    save_centroids(run.folder / "kmeans/centroids.safetensors", torch.randn(500, model.config.width), header)
    config = label.Config(
        manifest=path,
        centroids=run.folder / "kmeans",
        model=run.folder / "bundle",
        device=str(run.device),
        workers=workers(run),
    )
    manifest = Manifest(path)
    seconds = manifest.n_samples[np.arange(len(manifest))].sum() / SAMPLE_RATE
    started = time.perf_counter()
    (run.folder / "label").mkdir()
    label.write_units(config, manifest, run.folder / "label")
    elapsed = time.perf_counter() - started
    goal = None if run.small else 3000
    report.add(
        f"stage label, layer {layer}, fp32", seconds / elapsed, "audio-s/s", goal, hours=seconds / 3600
    )


SECTIONS: dict[str, Callable[[Report, Settings], None]] = {
    "step": step,
    "engine": engine,
    "labels": labels,
    "large": large,
    "features": features,
    "kmeans": kmeans,
    "beam": beam,
    "compiled": partial(engine, compiled=True),
    "tests": device_tests,
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="use tiny sizes on the CPU")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--minutes", type=float, default=3.5, help="start no section after this time")
    parser.add_argument("--out", type=Path, default=Path("gpu_bench.json"))
    args = parser.parse_args()
    device = torch.device("cpu" if args.small else args.device)
    torch.backends.cudnn.allow_tf32 = False  # full float32 precision for all models
    started, report, sections = time.monotonic(), Report(has_goals=not args.small), {}
    about = environment(Settings(device, args.small, Path()))
    print("  ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    for name in args.only:
        section_started = time.monotonic()
        try:
            if section_started - started > 60 * args.minutes:
                raise Skipped(f"more than {args.minutes:g} minutes have passed")
            with tempfile.TemporaryDirectory() as folder:
                SECTIONS[name](report, Settings(device, args.small, Path(folder)))
            outcome = "done"
        except Skipped as reason:
            outcome = f"skipped: {reason}"
        except Exception as error:  # the remaining sections still run
            outcome = f"failed: {type(error).__name__}: {str(error)[:500]}"
        seconds = time.monotonic() - section_started
        sections[name] = {"outcome": outcome, "seconds": round(seconds, 1)}
        print(f"-- {name}: {outcome} ({seconds:.1f} s)", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(f"\n{'measurement':<44}{'value':>10} {'unit':<14}{'goal':<22}details")
    for row in report.rows:
        print(format_row({key: value for key, value in row.items() if key != "kernels"}))
    args.out.write_text(
        json.dumps({"environment": about, "sections": sections, "rows": report.rows}, indent=1)
    )
    print(f"\n{args.out}: {len(report.rows)} rows, {time.monotonic() - started:.0f} s in total")
    if any(section["outcome"].startswith("failed") for section in sections.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
