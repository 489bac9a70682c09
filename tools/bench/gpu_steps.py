"""Measurement of training steps: jahubert, without and with compilation, transformers and torchaudio."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from unittest import mock

import torch
from gpu_report import LARGE, MICRO_BATCH, PEERS, TWO_GROUPS, Report, Settings, Skipped
from kernel_profile import by_group, profile_steps
from pretrain_step import Batch, Trainer, flops, make_batch, matrix_peak

from jahubert.model.hubert import HubertConfig
from jahubert.model.kernels import attention, packing
from jahubert.train.trainer.parallel import can_compile, compiled_graphs, failed_compilations, wrap_blocks

TURNS = 2  # number of times that each model has its turn


def free_memory(device: torch.device) -> None:
    gc.collect()  # optimizers and models may be in reference cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


@cache
def cached_peak(device: torch.device, dtype: torch.dtype) -> float:
    return matrix_peak(device, dtype)


def peak_megabytes(trainer: Trainer, batch: Batch) -> float:
    """Measure the peak memory of a step's activations in MB, once gradients and moments exist (CPU: 0)."""
    if trainer.device.type == "cpu":
        return 0.0
    trainer.step(batch, keep_gradients=True)
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    trainer.step(batch, keep_gradients=True)
    trainer.optimizer.zero_grad(set_to_none=True)
    return (torch.cuda.max_memory_allocated() - base) / 2**20


def step_seconds(
    trainers: dict[str, Trainer], batches: dict[str, Batch], run: Settings
) -> dict[str, list[float]]:
    """Time the steps of all models in turns, and return the mean duration of a step in each turn.

    The first step of a turn, which allocates memory, is not timed. The others follow one another as in
    training, without waiting for the GPU, and their mean includes steps with different numbers of dropped
    layers. Between turns, unused memory is returned to the GPU, so that each model can use all of it.
    """
    seconds: dict[str, list[float]] = {kind: [] for kind in trainers}
    for _ in range(TURNS):
        for kind, trainer in trainers.items():
            free_memory(run.device)
            trainer.step(batches[kind])
            seconds[kind].append(trainer.mean_step(batches[kind], max(1, run.repeats // TURNS)))
    return seconds


def build_trainers(run: Settings, config: HubertConfig) -> tuple[dict[str, Trainer], dict[str, str]]:
    """Create a trainer for each model, and return the reasons why others are missing."""
    trainers, failures = {}, {}
    for kind in ("jahubert", *PEERS):
        if kind != "jahubert" and kind not in run.peers:
            failures[kind] = "not compared" if run.small else "cannot be imported"
            continue
        try:
            trainers[kind] = Trainer(kind, config, run.device, run.dtype)
        except Exception as error:  # a peer may be incompatible
            if kind == "jahubert":
                raise
            failures[kind] = describe(error)
    return trainers, failures


def describe(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:80]}"


def fitting_batch(kind: str, trainer: Trainer, lengths: list[float]) -> tuple[Batch, float]:
    """Return a batch, and the peak memory of a step in MB. It is halved if a peer has too little memory."""
    while True:
        batch = make_batch(lengths, trainer.device)
        try:
            trainer.step(batch)
            return batch, peak_megabytes(trainer, batch)
        except torch.OutOfMemoryError:
            if kind == "jahubert" or len(lengths) == 1:
                raise
        # After the `except` block, no traceback refers to the activations any more.
        trainer.optimizer.zero_grad(set_to_none=True)
        free_memory(trainer.device)
        lengths = lengths[::2]


def compare_steps(
    report: Report,
    run: Settings,
    name: str,
    models: tuple[dict[str, Trainer], dict[str, str]],
    lengths: list[float],
) -> None:
    """Compare jahubert with the peers on one batch, or on a part of it if a peer needs too much memory."""
    trainers, failures = dict(models[0]), dict(models[1])
    batches, memory = {}, {}
    for kind, trainer in models[0].items():
        free_memory(run.device)
        try:
            batches[kind], memory[kind] = fitting_batch(kind, trainer, lengths)
        except Exception as error:  # a peer may be incompatible
            if kind == "jahubert":
                raise
            failures[kind] = describe(error)
            del trainers[kind]
    seconds = step_seconds(trainers, batches, run)
    rates = {kind: batches[kind].seconds / statistics.mean(seconds[kind]) for kind in trainers}
    ours = "jahubert"
    add_rate(report, run, name, trainers[ours], batches[ours], rates[ours], memory[ours])
    for kind in PEERS:
        if kind in failures:
            report.add(f"{name}: {kind}", None, "audio-s/s", reason=failures[kind])
            continue
        details = {"seconds": batches[kind].seconds, "megabytes": memory[kind]}
        report.add(f"{name}: {kind}", rates[kind], "audio-s/s", **details)
        report.add(f"{name}: speedup over {kind}", rates[ours] / rates[kind], "times")
        less, more = (memory[each] / batches[each].seconds for each in (ours, kind))
        report.add(f"{name}: memory of {kind}", more / max(less, 1e-3), "times ours")


def add_rate(
    report: Report,
    run: Settings,
    name: str,
    trainer: Trainer,
    batch: Batch,
    rate: float,
    megabytes: float,
) -> None:
    """Report the rate of jahubert's step in seconds of audio per second, and its share of the peak."""
    seconds, peak = batch.seconds / rate, cached_peak(run.device, run.dtype)
    share = flops(trainer.config, batch.n_samples) / seconds / peak
    details = {"seconds": batch.seconds, "step_ms": 1e3 * seconds, "megabytes": megabytes}
    report.add(f"{name}: jahubert", rate, "audio-s/s", **details)
    report.add(f"{name}: of peak", 100 * share, "%", peak_tflops=peak / 1e12)


def step(report: Report, run: Settings) -> None:
    """Time training steps of HuBERT base on three batches, and profile the kernels for the largest batch."""
    models = build_trainers(run, run.model("base"))
    similar = [0.9, 1.0] if run.small else [4.4] * 20
    compare_steps(report, run, "base, similar", models, similar)
    compare_steps(report, run, "base, mixed", models, run.lengths(3))
    compare_steps(report, run, MICRO_BATCH, models, run.micro_lengths)
    kernels(
        report, f"{MICRO_BATCH}: kernels", models[0]["jahubert"], make_batch(run.micro_lengths, run.device)
    )


def large(report: Report, run: Settings) -> None:
    """Time training steps of HuBERT large on the default micro-batch of a GPU with at least 40 GB."""
    compare_steps(report, run, LARGE, build_trainers(run, run.model("large")), run.large_lengths)


@contextmanager
def compilation(run: Settings) -> Iterator[None]:
    """Use flash attention and compilation without inductor on a CPU, where inductor would take minutes."""
    if not can_compile(run.device):
        raise Skipped("needs a C compiler")
    if run.device.type != "cpu":
        yield
        return
    from fixtures.traceable_flash import by_mask

    with (
        mock.patch.object(torch, "compile", partial(torch.compile, backend="aot_eager")),
        mock.patch.object(packing, "has_flash_attention", lambda device: True),
        mock.patch.object(attention, "flash_attention", by_mask),
    ):
        yield


def one_shape_batch(run: Settings, lengths: list[float], n_groups: int) -> Batch:
    return replace(make_batch(n_groups * lengths, run.device), shape=run.shape(n_groups))


def compiled_trainer(run: Settings, n_groups: int) -> Trainer:
    """Create a trainer with compiled blocks in bfloat16, and run a step of one shape, which compiles them."""
    trainer = Trainer("jahubert", run.model("base"), run.device, torch.bfloat16)
    wrap_blocks(trainer.module.hubert.encoder.layers, recompute=False, compiled=True)
    trainer.step(one_shape_batch(run, run.micro_lengths, n_groups))
    return trainer


def compiled(report: Report, run: Settings) -> None:
    """Compare steps with compiled blocks and one shape with steps without compilation, for two sizes."""
    with compilation(run):
        compare_with_compiled(report, run, MICRO_BATCH, 1)
        compare_with_compiled(report, run, TWO_GROUPS, 2)


def compare_with_compiled(report: Report, run: Settings, name: str, n_groups: int) -> None:
    graphs, failures = compiled_graphs(), failed_compilations()
    eager = Trainer("jahubert", run.model("base"), run.device, torch.bfloat16)
    trainers = {"eager": eager, "compiled": compiled_trainer(run, n_groups)}
    warmed_up = compiled_graphs()
    batch = make_batch(n_groups * run.micro_lengths, run.device)
    batches = {"eager": batch, "compiled": one_shape_batch(run, run.micro_lengths, n_groups)}
    memory = {kind: peak_megabytes(trainer, batches[kind]) for kind, trainer in trainers.items()}
    seconds = step_seconds(trainers, batches, run)
    for length in run.utterance_seconds:  # micro-batches with the most and the fewest utterances
        lengths = [length] * int(run.group_seconds / length)
        trainers["compiled"].step(one_shape_batch(run, lengths, n_groups))
    recompilations = compiled_graphs() - warmed_up
    rates = {kind: batch.seconds / statistics.mean(seconds[kind]) for kind in trainers}
    for kind, row in (("eager", name), ("compiled", f"{name}, compiled")):
        if report.value(f"{row}: jahubert") is None:  # the section `step` may have measured the eager step
            add_rate(report, run, row, trainers[kind], batches[kind], rates[kind], memory[kind])
    name = f"{name}, compiled"
    report.add(f"{name}: over eager", rates["compiled"] / rates["eager"], "times")
    warm_up = str(warmed_up - graphs)
    report.add(f"{name}: recompilations", recompilations, "graphs", warm_up=warm_up)
    report.add(f"{name}: not compiled", failed_compilations() - failures, "functions")
    kernels(report, f"{name}: kernels", trainers["compiled"], batches["compiled"])


def kernels(report: Report, name: str, trainer: Trainer, batch: Batch) -> None:
    """Profile jahubert's training step by group of GPU kernels, or of operators on a CPU."""

    def same_step() -> float:
        torch.manual_seed(1)  # layer drop selects the same blocks
        return trainer.step(batch)

    milliseconds = 1e3 * statistics.median(same_step() for _ in range(3))
    times = profile_steps(same_step, trainer.device.type == "cuda")
    groups = by_group(times)
    total = sum(groups.values())
    if not total:  # for example, if users may not read the GPU's performance counters
        return report.add(f"{name}, products", None, "ms", reason="the profiler recorded no kernels")
    for group, ms in groups.items():
        report.add(f"{name}, {group}", ms, "ms", share=f"{ms / total:.0%}")
    report.add(f"{name}, none running", max(0.0, milliseconds - total), "ms", step_ms=milliseconds)
    longest = sorted(times.items(), key=lambda item: -item[1])[:25]
    report.rows[-1]["kernels"] = {name[:120]: round(ms, 3) for name, ms in longest}
