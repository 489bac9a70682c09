"""Estimates of the hours, disk space and memory that the stages of a run need.

The duration of training and of k-means is the number of FLOPs divided by the FLOP/s of all devices. In
`features` and `label`, decoding the audio can be the limit instead, as it always is in `prepare`. The FLOPs
are computed from the sizes of the model (`flops`). The FLOP/s are measured on this machine or taken from a
table of GPUs (`machine`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from jahubert import prefetch
from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.bundle import load_bundle
from jahubert.frames import HUBERT
from jahubert.model.hubert import HubertConfig
from jahubert.train.clustering.features import Mfcc
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.utterances import DECODING_THREADS
from jahubert.train.experiment.config import structure
from jahubert.train.experiment.registry import STAGES, Job, resolve, value_for_subset
from jahubert.train.plan.flops import forward_flops, step_flops
from jahubert.train.plan.machine import GPUS, Machine, from_table, measure
from jahubert.train.plan.memory import peak_bytes
from jahubert.train.trainer.micro_batch import effective_micro_seconds, fixed_bytes, n_parameters
from jahubert.train.trainer.optim import TrainConfig

_MEAN_SECONDS = 5.7  # mean utterance length in ReazonSpeech: 35,000 h in 22 million utterances
_LONGEST_SECONDS = 30.0  # assumed length of the longest utterance in fine-tuning
_CHECKPOINT_BYTES = 12  # size of a checkpoint per parameter
_WEIGHT_BYTES = 4  # size of a file of weights per parameter
_MANIFEST_BYTES = 250.0  # typical size of a manifest per utterance
# Assumed cost of finding initial centroids on a small sample, `n_init` times, in passes over all frames.
_KMEANS_START = 10
_GPU_COUNTS = (1, 8, 32)  # numbers of GPUs for which the total time is printed
_TRAINING_STAGES = ("pretrain", "finetune")
# Sizes of models whose names on the Hub contain these words.
_SIZES = {"xlarge": HubertConfig.xlarge, "large": HubertConfig.large, "base": HubertConfig.base}
# Numeric settings of the estimate: the maximum, and a description of valid values for error messages.
_NUMBERS = {
    "gpus": (1e6, "a whole number of GPUs, 1 or more"),
    "hours": (1e9, "a number of hours above 0"),
    "utilization": (1.0, "a fraction of the peak, above 0 and at most 1"),
}
_SETTINGS = ("gpu", *_NUMBERS)


@dataclass(frozen=True)
class Corpus:
    hours: float
    utterances: int
    source: str  # source of `hours`


@dataclass(frozen=True)
class StageEstimate:
    """Estimated cost of one stage. A value of None means that this cost is not estimated."""

    stage: str
    hours: float | None
    disk_bytes: float | None
    memory_bytes: float | None  # size of the tensors on each device, a lower bound on the memory
    note: str = ""
    # For training: whether the rate is measured, interpolated, extrapolated or estimated
    rate_basis: str | None = None


@dataclass(frozen=True)
class Days:
    """Estimated duration of all stages on a number of GPUs."""

    days: float
    training_rates: tuple[str, ...]  # how the training rates are known (see `StageEstimate.rate_basis`)


@dataclass(frozen=True)
class Plan:
    """Estimates for all stages of a run with a given corpus on a given machine."""

    stages: list[StageEstimate]
    corpus: Corpus
    machine: Machine
    # Number of GPUs -> days for all stages; omits numbers that a training stage cannot use. Empty for a CPU.
    days: dict[int, Days]


def split_settings(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Separate the settings of the estimate from overrides, and add `stage=all` if no stage is given."""
    options: dict[str, str] = {}
    overrides = []
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in _SETTINGS:
            options[key] = value
        else:
            overrides.append(setting)
    if not any(setting.startswith("stage=") for setting in overrides):
        overrides.append("stage=all")
    return options, overrides


def make_plan(tree: dict[str, Any], jobs: Sequence[Job], options: dict[str, str]) -> Plan:
    """Estimate the cost of running jobs on a machine.

    Args:
        tree: the composed configuration.
        jobs: the jobs that `jahubert.run` would run.
        options: settings of the estimate (see `split_settings`).

    Raises:
        ConfigError: a number is invalid, the GPU or the size of the corpus is unknown, or `gpu` is not given
            and no job trains a model that could be measured.
        DataError: the manifest is damaged.
    """
    numbers = {name: _number(name, options) for name in _NUMBERS}
    corpus = _corpus(Path(tree["exp"], "prepare", "manifest.arrow"), numbers["hours"], tree)
    for name in ("processes", "machines"):
        if not isinstance(tree[name], int) or tree[name] < 1:
            raise ConfigError(f"{name}={tree[name]}: must be a whole number, 1 or more")
    processes = tree["processes"] * tree["machines"]
    gpus = numbers["gpus"]
    if "gpu" in options:
        machine = from_table(options["gpu"], int(gpus or processes), numbers["utilization"])
    else:
        trained = [job.config for job in jobs if job.stage in _TRAINING_STAGES]
        if not trained:
            raise ConfigError(
                "plan: none of these stages trains a model that could be measured; use stage=all or gpu=NAME"
            )
        machine = measure(trained[0].model, [config.train for config in trained], int(gpus or 1))
        if not gpus and machine.memory_bytes:  # processes on a CPU share the measured speed
            machine = replace(machine, n_devices=processes)
    context = _context_jobs(tree, jobs)
    days = {}
    for n in _GPU_COUNTS if machine.memory_bytes else ():
        rows = estimate_stages(jobs, corpus, replace(machine, n_devices=n), context)
        if not any(row.hours is None and row.memory_bytes is not None for row in rows):
            bases = dict.fromkeys(row.rate_basis for row in rows if row.rate_basis is not None)
            days[n] = Days(sum(row.hours or 0 for row in rows) / 24, tuple(bases))
    return Plan(estimate_stages(jobs, corpus, machine, context), corpus, machine, days)


def _number(name: str, options: dict[str, str]) -> float | None:
    """Parse a numeric setting of the estimate, or return None if it is not given."""
    if name not in options:
        return None
    try:
        number = float(options[name])
    except ValueError:
        number = math.nan
    largest, expected = _NUMBERS[name]
    if not 0 < number <= largest or (name == "gpus" and number % 1):
        raise ConfigError(f"{name}={options[name]}: must be {expected}")
    return number


def _context_jobs(tree: dict[str, Any], jobs: Sequence[Job]) -> list[Job]:
    """Return the other stages whose settings are needed to estimate a `features`, `kmeans` or `label` stage.

    The result is empty unless such a stage is the only job.
    """
    if len(jobs) > 1 or jobs[0].stage not in ("features", "kmeans", "label"):
        return []
    context = []
    for stage in ("features", "kmeans", "pretrain"):
        if stage != jobs[0].stage:
            config = structure(tree[stage] or {}, resolve(stage, STAGES, "stage").Config, stage)
            context.append(Job(stage, config, jobs[0].out.parent / stage))
    return context


def _corpus(manifest: Path, given_hours: float | None, tree: dict[str, Any]) -> Corpus:
    """Determine the size of the corpus from `hours=`, the prepared manifest or the recipe, in this order."""
    if manifest.exists() and not given_hours:
        counts = Manifest.verified(manifest).counts
        return Corpus(counts["hours"], counts["utterances"], str(manifest))
    subset = tree.get("subset")
    hours = given_hours or value_for_subset(tree.get("hours"), subset)
    if not hours:
        unknown = f" and the recipe has no hours for subset={subset or 'null'}" if tree.get("hours") else ""
        raise ConfigError(
            f"{manifest} does not exist yet{unknown}; set the hours of speech, for example hours=19000"
        )
    source = "hours=" if given_hours else "from the recipe"
    return Corpus(
        hours, round(hours * 3600 / _MEAN_SECONDS), f"{source}; assuming {_MEAN_SECONDS} s per utterance"
    )


def estimate_stages(
    jobs: Sequence[Job], corpus: Corpus, machine: Machine, context: Sequence[Job] = ()
) -> list[StageEstimate]:
    """Estimate each job. The settings of `context` are used as well (see `_context_jobs`)."""
    configs = {(job.stage, job.out.parent): job.config for job in (*jobs, *context)}
    models = [config.model for (stage, _), config in configs.items() if stage in _TRAINING_STAGES]
    model = models[0] if models else HubertConfig()
    planned = {job.out for job in jobs if job.stage == "pretrain"}
    estimates = []
    for job in jobs:
        name = job.stage
        if job.out.parent.name.startswith("iter") or "systems" in job.out.parts:
            name = f"{job.out.parent.name}/{job.stage}"
        features, kmeans = (configs.get((stage, job.out.parent)) for stage in ("features", "kmeans"))
        if job.stage == "prepare":
            estimate = _prepare(name, job.config, corpus, machine)
        elif job.stage == "features":
            estimate = _features(name, job.config, model, corpus, machine)
        elif job.stage == "kmeans":
            estimate = _kmeans(name, job.config, features, model, machine)
        elif job.stage == "label":
            estimate = _label(name, features, kmeans, model, corpus, machine)
        elif job.stage == "pretrain":
            estimate = _pretraining(name, job.config, corpus, machine)
        elif job.stage == "finetune":
            estimate = _finetuning(name, job.config, planned, corpus, machine)
        else:
            estimate = StageEstimate(name, None, None, None, "short compared with other stages")
        estimates.append(estimate)
    return estimates


def _prepare(name: str, config: Any, corpus: Corpus, machine: Machine) -> StageEstimate:
    hours, note = None, "does not decode audio"
    if config.check_audio:
        hours = corpus.hours / machine.decode_speed / DECODING_THREADS
        note = f"decodes all audio, with {DECODING_THREADS} threads"
    return StageEstimate(name, hours, _MANIFEST_BYTES * corpus.utterances, None, note)


def _pretraining(name: str, config: Any, corpus: Corpus, machine: Machine) -> StageEstimate:
    longest = config.crop.max_seconds
    return _training(name, config, corpus, machine, longest=longest, head_only_steps=0, n_weight_files=1)


@lru_cache(maxsize=16)
def _pretrained_sizes(source: Path, default: HubertConfig) -> tuple[HubertConfig, str]:
    """Return the sizes of a pretrained model and, if they are assumed, a note."""
    if source.exists():
        with suppress(CheckpointError):  # pretraining has not finished
            return load_bundle(source).config, ""
    for size, config in _SIZES.items():
        if size in source.name.lower():
            return config(), f", assuming that {source} has the sizes of {size}"
    return default, f", assuming that {source} has the sizes in `model`"


def _finetuning(
    name: str, config: Any, planned: Collection[Path], corpus: Corpus, machine: Machine
) -> StageEstimate:
    """Estimate fine-tuning.

    Args:
        planned: folders of models that this plan pretrains, whose sizes are `config.model`.
    """
    model, note = config.model, ""
    if config.pretrained is not None and config.pretrained not in planned:
        model, note = _pretrained_sizes(config.pretrained, model)
    estimate = _training(
        name,
        replace(config, model=model),
        corpus,
        machine,
        longest=_LONGEST_SECONDS,
        head_only_steps=config.head_only_steps,
        n_weight_files=2,  # the best weights in addition to the bundle
    )
    return replace(estimate, note=estimate.note + note)


def _training(
    name: str,
    config: Any,
    corpus: Corpus,
    machine: Machine,
    *,
    longest: float,
    head_only_steps: int,
    n_weight_files: int,
) -> StageEstimate:
    """Estimate the cost of pretraining or fine-tuning.

    Args:
        longest: duration of the longest crop or utterance in seconds.
        head_only_steps: number of updates without a backward pass of the encoder.
        n_weight_files: number of files with all weights, in addition to the checkpoints.
    """
    train: TrainConfig = config.train
    seconds = min(longest, 3600 * corpus.hours / corpus.utterances)
    precision = _precision(train, machine)
    flops_per_second = step_flops(config.model, seconds, train.recompute)
    parameters = n_parameters(config.model)
    flops = flops_per_second * train.batch_seconds * train.max_steps
    flops *= 1 - head_only_steps / train.max_steps * 2 / 3  # a backward pass costs two forward passes
    micro_seconds = effective_micro_seconds(
        train,
        config.model,
        longest=longest,
        memory_bytes=machine.memory_bytes,
        has_flash=machine.has_bfloat16,
        precision=precision,
        n_devices=machine.n_devices,
    )
    micro_seconds = min(micro_seconds, train.batch_seconds / machine.n_devices)
    lower = precision is not torch.float32
    rate = machine.training_flops(micro_seconds) if lower else machine.flops_fp32
    hours: float | None = flops / rate / machine.n_devices / 3600
    is_gpu = machine.memory_bytes is not None
    memory = fixed_bytes(parameters, precision, machine.n_devices, train.sharded)
    memory += micro_seconds * peak_bytes(config.model, seconds, train.recompute, precision, is_gpu)
    checkpoints = train.keep_last + (train.max_steps // train.keep_every if train.keep_every else 0)
    disk = (checkpoints * _CHECKPOINT_BYTES + n_weight_files * _WEIGHT_BYTES) * parameters
    speed = rate / flops_per_second
    readers = math.ceil(speed / machine.decode_speed)
    notes = [
        f"{speed * machine.n_devices:.0f} audio-h/h",
        f"micro-batches of {micro_seconds:.4g} s",
        f"{readers} {'reader' if readers == 1 else 'readers'} per device",
    ]
    basis = "estimated"
    if _is_measured(config.model, precision, machine):
        basis = machine.rate_basis(micro_seconds)
    notes.append(f"rate {basis}")
    if machine.memory_bytes and memory > 0.9 * machine.memory_bytes:
        notes.append(
            "does not fit: lower train.micro_seconds, or set train.recompute=true or train.sharded=true"
        )
    if machine.memory_bytes and not machine.has_bfloat16 and train.precision in ("auto", "bf16"):
        notes.append(f"runs in float32: {machine.name} has no bfloat16; set train.precision=fp16")
    try:
        train.check_processes(machine.n_devices, longest)
    except ConfigError as error:  # the run itself would fail with the same error
        hours, notes = None, [str(error)]
    return StageEstimate(name, hours, disk, memory, ", ".join(notes), basis)


def _is_measured(model: HubertConfig, precision: torch.dtype, machine: Machine) -> bool:
    """Return whether the training speed was measured for these sizes and this precision."""
    measured = machine.measured_model
    if measured is None or (machine.memory_bytes is not None and precision is torch.float32):
        return False
    return step_flops(model, _MEAN_SECONDS, False) == step_flops(measured, _MEAN_SECONDS, False)


def _precision(train: TrainConfig, machine: Machine) -> torch.dtype:
    """Return the training dtype on `machine`, which need not be this computer (cf. `pick_precision`)."""
    if train.precision == "fp16":
        return torch.float16
    lower = machine.has_bfloat16 if train.precision == "auto" else machine.computes_bfloat16
    return torch.bfloat16 if train.precision != "fp32" and lower else torch.float32


def _pass_hours(seconds: float, flops_per_second: float, machine: Machine, features: Any) -> float:
    """Estimate the hours for one pass over audio, which is limited by decoding or by computation.

    Args:
        seconds: duration of the audio.
        flops_per_second: FLOPs per second of audio, or 0 for MFCCs.
        features: config of the `features` stage.
    """
    if flops_per_second:
        flops = machine.flops_fp32
        if features.precision == "bf16" and machine.computes_bfloat16:
            flops = machine.features_16bit or machine.flops_16bit
        compute_speed = flops / flops_per_second
    else:
        compute_speed = 1 / (1 / machine.mfcc_speed + 1 / machine.decode_speed)
    speed = min(compute_speed, (features.workers or prefetch.MAX_THREADS) * machine.decode_speed)
    return seconds / speed / machine.n_devices / 3600


def _feature_cost(features: Any, model: HubertConfig) -> tuple[float, int]:
    """Return the FLOPs per second of audio (0 for MFCCs) and the dimension of the clustered features."""
    if features.kind == "mfcc":
        return 0.0, Mfcc.dim
    return sum(forward_flops(model, _MEAN_SECONDS, features.layer)), model.width


def _features(name: str, config: Any, model: HubertConfig, corpus: Corpus, machine: Machine) -> StageEstimate:
    flops_per_second, dim = _feature_cost(config, model)
    sampled = 1 - math.exp(-config.sample_frames / corpus.utterances)  # fraction of utterances to read
    hours = _pass_hours(3600 * corpus.hours * sampled, flops_per_second, machine, config)
    return StageEstimate(name, hours, 4.0 * dim * config.sample_frames, None)


def _kmeans(name: str, config: Any, features: Any, model: HubertConfig, machine: Machine) -> StageEstimate:
    _, dim = _feature_cost(features, model)
    n_frames = all_frames = features.sample_frames
    if config.backend == "torch":
        n_frames = min(n_frames, config.lloyd_frames)
    n_distances = n_frames * (config.max_iter + _KMEANS_START)
    if n_frames < all_frames:  # a mini-batch pass and an assignment
        n_distances += 2 * all_frames
    flops = 2.0 * n_distances * dim * config.n_clusters
    hours = flops / machine.flops_fp32 / machine.n_devices / 3600
    note = f"for max_iter={config.max_iter} passes"
    return StageEstimate(name, hours, 4.0 * dim * config.n_clusters, None, note)


def _label(
    name: str, features: Any, kmeans: Any, model: HubertConfig, corpus: Corpus, machine: Machine
) -> StageEstimate:
    flops_per_second, _ = _feature_cost(features, model)
    frames = 3600 * corpus.hours * HUBERT.rate
    disk = frames * (1 if kmeans.n_clusters <= 256 else 2) + 8 * corpus.utterances
    hours = _pass_hours(3600 * corpus.hours, flops_per_second, machine, features)
    return StageEstimate(name, hours, disk, None)


def plan_table(plan: Plan) -> str:
    """Format a plan as a text table."""
    corpus, machine = plan.corpus, plan.machine
    head = [
        f"{machine.n_devices} x {machine.name}: {machine.source}",
        f"corpus: {corpus.hours:,.1f} h, {corpus.utterances:,} utterances ({corpus.source})",
        f"one core of this machine decodes {machine.decode_speed:,.0f} s of audio per second, or computes "
        f"the MFCCs of {machine.mfcc_speed:,.0f} s",
    ]
    if machine.memory_bytes is None:
        head.append(f"to estimate for another GPU, set gpu=NAME: {', '.join(GPUS)}")
    lines = [("stage", "hours", "disk", "memory per device, at least", "")]
    for row in plan.stages:
        sizes = (_hours(row.hours), _size(row.disk_bytes), _size(row.memory_bytes))
        lines.append((row.stage, *sizes, row.note))
    hours = sum(row.hours or 0 for row in plan.stages)
    disk = sum(row.disk_bytes or 0 for row in plan.stages)
    missing = [row.stage for row in plan.stages if row.hours is None and row.memory_bytes is not None]
    note = f"excludes the hours of {', '.join(missing)}" if missing else ""
    lines.append(("all", _hours(hours or None), _size(disk), "", note))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    body = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
        body.append("  ".join([*cells, line[4]]).rstrip())
    tail = []
    if plan.days:
        tail = [
            "",
            "days of all stages by number of GPUs:",
            *map(_days, *zip(*plan.days.items(), strict=True)),
        ]
        tail += [
            "These are estimates: the rate of several GPUs (the rate of one GPU times their number, without",
            "communication), the disk and memory columns, and every rate that is not listed as measured.",
        ]
    return "\n".join([*head, "", *body, *tail])


def plan_json(plan: Plan) -> dict[str, Any]:
    """Convert a plan to JSON-serializable values."""
    return asdict(plan)


def _days(n: int, days: Days) -> str:
    duration = f"{days.days:.2g}" if days.days >= 0.01 else "under 0.01"
    rates = f"  (training rates: {', '.join(days.training_rates)})" if days.training_rates else ""
    return f"{n:>4}  {duration}{rates}"


def _hours(hours: float | None) -> str:
    if hours is None:
        return ""
    if hours >= 10:
        return f"{hours:,.0f}"
    return f"{hours:.2g}" if hours >= 0.01 else "0.01"


def _size(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
