"""Measurement of the training engine and of the `label` stage on generated FLAC files."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import soundfile
import torch
from gpu_report import MICRO_BATCH, Report, Settings, Skipped
from gpu_steps import compilation
from peers import importable

from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.model.hubert import HubertModel
from jahubert.model.kernels import Packing


def write_flac(path: Path, seconds: float, seed: int) -> None:
    n_samples, rng = int(seconds * SAMPLE_RATE), np.random.default_rng(seed)
    noise_T = rng.standard_normal(n_samples)
    envelope_T = np.repeat(rng.uniform(0.005, 0.1, n_samples // 800 + 1), 800)
    soundfile.write(path, noise_T * envelope_T[:n_samples], SAMPLE_RATE)


def make_corpus(run: Settings, rows: int) -> Path:
    """Write a manifest of `rows` utterances in 800 FLAC files of noise (8 if small), and return its path."""
    from jahubert.audio import AudioSource
    from jahubert.train.data.manifest import Utterance, write_manifest

    manifest = run.folder / f"manifest-{rows}.arrow"
    n_files = 8 if run.small else 800
    shortest, longest = run.utterance_seconds
    seconds = np.clip(np.random.default_rng(0).lognormal(1.6, 0.55, n_files), shortest, longest)
    seconds[:2] = run.utterance_seconds
    paths = [run.audio / f"{number}.flac" for number in range(n_files)]
    missing = [number for number, path in enumerate(paths) if not path.exists()]
    with ThreadPoolExecutor(max(1, workers(run))) as pool:
        list(pool.map(lambda number: write_flac(paths[number], seconds[number], number), missing))
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
    """Time 20 updates of 2,800 s (10 if shortened) in the training engine, after 5 warm-up updates."""
    check_train_extra()
    from jahubert.train.data.batches import CropConfig, MaskConfig, PretrainData
    from jahubert.train.data.labels import LabelHeader, LabelStore, LabelWriter
    from jahubert.train.data.manifest import Manifest
    from jahubert.train.stages.pretrain import Pretrainer
    from jahubert.train.trainer.micro_batch import with_micro_seconds
    from jahubert.train.trainer.optim import TrainConfig
    from jahubert.train.trainer.parallel import compiled_graphs, failed_compilations
    from jahubert.train.trainer.trainer import train

    manifest = Manifest(make_corpus(run, 8 if run.small else 8_000))
    n_frames = HUBERT.n_frames(np.asarray(manifest.n_samples))
    rng = np.random.default_rng(1)
    header = LabelHeader(500, "mfcc", None, "c", None, manifest.fingerprint, False)
    writer = LabelWriter(run.folder / "units", header, n_frames, shard_size=len(n_frames))
    writer.write(0, [rng.integers(500, size=n) for n in n_frames])
    writer.finish()
    model = run.model("base")
    every, (_, longest) = 1 if run.small else 5, run.utterance_seconds
    config = TrainConfig(
        max_steps=(3 if run.shortened else 5) * every,
        compile=compiled,
        batch_seconds=run.group_seconds if run.small else 2800.0,
        precision="bf16" if compiled else "fp32" if run.small else "auto",
        device=str(run.device),
        workers=workers(run),
        log_every=every,
        valid_every=0,
        save_every=10**6,
    )
    config = with_micro_seconds(config, model, longest)
    data = PretrainData(
        manifest,
        LabelStore(run.folder / "units"),
        split="train",
        crop=CropConfig(min_seconds=0.5, max_seconds=longest, keep_in_memory_hours=0.0),
        mask=MaskConfig(),
        sizes=config.batch_sizes,
        seed=0,
    )
    out = run.folder / "pretrain"
    out.mkdir()
    module = Pretrainer(model, 500, unit_dim=256, temperature=0.1, penalty=10.0, seed=0)
    graphs_before, failures_before = compiled_graphs(), failed_compilations()
    with compilation(run) if compiled else nullcontext():
        train(module, data, config, out)
    graphs = compiled_graphs() - graphs_before
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][1:]
    seconds = sum(row["timing"]["seconds"] for row in rows)
    audio = sum(row["timing"]["audio_hours_per_hour"] * row["timing"]["seconds"] for row in rows)
    waiting = sum(row["timing"]["waiting"] * row["timing"]["seconds"] for row in rows) / seconds
    name, rate = "compiled engine" if compiled else "engine", audio / seconds
    report.add(
        f"{name}, {config.batch_seconds:,.0f} s per update",
        rate,
        "audio-h/h",
        micro_seconds=config.micro_seconds or 0.0,
    )
    if step_rate := report.value(f"{MICRO_BATCH}{', compiled' if compiled else ''}: jahubert"):
        report.add(f"{name}: share of the step's rate", 100 * rate / step_rate, "%")
    report.add(f"{name}: waiting for data", 100 * waiting, "%", workers=str(config.workers))
    frames, packed = 0, 0
    for micro in data.sampler.update(0, 0):
        n_frames = [int(n_frames) for n_frames in HUBERT.n_frames(manifest.n_samples[list(micro.rows)])]
        frames += sum(n_frames)
        packed += Packing(n_frames, max(n_frames), torch.device("cpu"), data.sampler.shape).n_rows
    report.add(f"{name}: filler among the frames", 100 * (1 - frames / packed), "%")
    report.add(f"{name}: padding of the waveforms", 100 * rows[-1]["padding"], "%")
    later = sum(row["timing"]["compiled_graphs"] for row in rows) if compiled else graphs
    report.add(f"{name}: recompilations", later, "graphs", warm_up=str(graphs - later))
    report.add(f"{name}: not compiled", failed_compilations() - failures_before, "functions")


def labels(report: Report, run: Settings) -> None:
    """Time the `label` stage for layer 6 in float32 on FLAC files.

    The rate is computed from the difference between a long and a short run, because the time for starting the
    workers and saving the bundle does not depend on the amount of audio.
    """
    check_train_extra()
    from jahubert.formats.bundle import save_bundle
    from jahubert.train.clustering.features import HubertLayer
    from jahubert.train.clustering.streaming import feature_header, save_centroids

    layer = 1 if run.small else 6
    torch.manual_seed(0)
    model = HubertModel(run.model("base"))
    save_bundle(run.folder / "bundle", model=model)
    (run.folder / "kmeans").mkdir()
    header = feature_header(HubertLayer(model, layer), "hubert", layer)
    save_centroids(run.folder / "kmeans/centroids.safetensors", torch.randn(500, model.config.width), header)
    short, long = (
        label_run(run, rows) for rows in ((4, 8) if run.small else (500, 4_000 if run.shortened else 7_500))
    )
    audio, seconds = (long[i] - short[i] for i in range(2))
    rate = audio / max(seconds, 1e-3)
    report.add(
        "stage label, HuBERT layer, fp32",
        rate,
        "audio-s/s",
        layer=str(layer),
        hours=audio / 3600,
        with_start_and_end=long[0] / long[1],
    )


def label_run(run: Settings, rows: int) -> tuple[float, float]:
    """Label `rows` utterances, and return the amount of audio and the time of the stage in seconds."""
    from jahubert.train.data.manifest import Manifest
    from jahubert.train.stages import label

    path, out = make_corpus(run, rows), run.folder / f"label-{rows}"
    config = label.Config(
        manifest=path,
        centroids=run.folder / "kmeans",
        model=run.folder / "bundle",
        device=str(run.device),
        workers=workers(run),
    )
    manifest = Manifest(path)
    audio = manifest.n_samples[np.arange(len(manifest))].sum() / SAMPLE_RATE
    out.mkdir()
    started = time.perf_counter()
    label.write_units(config, manifest, out)
    return audio, time.perf_counter() - started
