"""Hours, disk and memory of every stage before anything starts.

All hours are arithmetic on floating-point operations: those of the configured model follow from its sizes,
and what a device does in a second is measured here or assumed (`speeds`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jahubert import prefetch as ahead
from jahubert.errors import ConfigError
from jahubert.frames import HUBERT
from jahubert.model.hubert import HubertConfig
from jahubert.train.clustering.features import Mfcc
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.config import structure
from jahubert.train.experiment.registry import STAGES, by_subset, resolve
from jahubert.train.plan.flops import (
    GPUS,
    SHARE,
    Machine,
    forward_flops,
    from_table,
    n_parameters,
    probe,
    step_flops,
)
from jahubert.train.plan.memory import peak_bytes
from jahubert.train.trainer.optim import TrainConfig

_MEAN_SECONDS = 5.7  # of an utterance of ReazonSpeech: 35,000 h in 22 million
_ADAM = 16  # bytes a parameter: weight, gradient, two moments
_BUCKETS = 4  # bytes a parameter: where DDP sums the gradients of several processes
_COPY = 2  # bytes a parameter: autocast's copy of the weight in 16 bits, while a micro-batch is computed
_SAVED = 12  # bytes a parameter in a checkpoint
_TRAINED = ("pretrain", "finetune")
# Of the plan itself: the largest value, and what is asked for where another was found.
_NUMBERS = {
    "gpus": (1e6, "a whole number of GPUs, 1 or more"),
    "hours": (1e9, "a number of hours above 0"),
    "share": (1.0, "a share of the peak, above 0 and at most 1"),
}
_OWN = ("gpu", *_NUMBERS)


Job = tuple[str, Any, Path]  # stage, its config, its folder


@dataclass(frozen=True)
class Corpus:
    hours: float
    utterances: int
    source: str  # where the hours come from


@dataclass(frozen=True)
class Row:
    """One stage; None: not estimated."""

    stage: str
    hours: float | None
    disk: float | None  # bytes
    memory: float | None  # bytes of tensors on each device: the least that it takes
    note: str = ""


def split(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What of `key=value` settings is for the plan itself, and what is for the stages."""
    own = {key: value for key, _, value in (setting.partition("=") for setting in settings) if key in _OWN}
    overrides = [setting for setting in settings if setting.partition("=")[0] not in _OWN]
    if not any(setting.startswith("stage=") for setting in overrides):
        overrides.append("stage=all")
    return own, overrides


def make(tree: dict[str, Any], jobs: Sequence[Job], own: dict[str, str]) -> tuple[list[Row], Corpus, Machine]:
    """The plan of `jobs` as `jahubert.run` makes them.

    Raises:
        ConfigError: a number that is none, a GPU that is not in the table, a corpus of unknown size.
    """
    gpus, hours, share = (_number(name, own) for name in _NUMBERS)
    corpus = _corpus(Path(tree["exp"], "prepare", "manifest.arrow"), hours, tree)
    for name in ("processes", "machines"):
        if not isinstance(tree[name], int) or tree[name] < 1:
            raise ConfigError(f"{name}={tree[name]}: give a whole number, 1 or more")
    processes = tree["processes"] * tree["machines"]  # as many as the run will have
    if "gpu" in own:
        machine = from_table(own["gpu"], int(gpus or processes), share or SHARE)
    else:
        trained = [config for stage, config, _ in jobs if stage in _TRAINED]
        if not trained:
            raise ConfigError(
                "plan: these stages train nothing to measure; ask for stage=all, or give gpu=NAME"
            )
        machine = probe(trained[0].model, [config.train for config in trained], int(gpus or 1))
        if not gpus and machine.memory:  # several processes of a CPU share what was measured
            machine = replace(machine, n=processes)
    return plan(jobs, corpus, machine, _beside(tree, jobs)), corpus, machine


def _number(name: str, own: dict[str, str]) -> float | None:
    """A number for the plan itself, where it is given."""
    if name not in own:
        return None
    try:
        number = float(own[name])
    except ValueError:
        number = math.nan
    most, wanted = _NUMBERS[name]
    if not 0 < number <= most or (name == "gpus" and number % 1):
        raise ConfigError(f"{name}={own[name]}: give {wanted}")
    return number


def _beside(tree: dict[str, Any], jobs: Sequence[Job]) -> list[Job]:
    """What of an iteration is not asked for, but says what the one stage that is works on."""
    stage, _, out = jobs[0]
    if len(jobs) > 1 or stage not in ("features", "kmeans", "label"):
        return []
    others = [other for other in ("features", "kmeans", "pretrain") if other != stage]
    settings = {other: (tree[other] or {}, resolve(other, STAGES, "stage").Config) for other in others}
    return [(other, structure(*settings[other], other), out.parent / other) for other in others]


def _corpus(manifest: Path, given: float | None, tree: dict[str, Any]) -> Corpus:
    """The corpus as it was prepared, unless its hours are given; else what the recipe says of it."""
    if manifest.exists() and not given:
        counts = Manifest(manifest).counts
        return Corpus(counts["hours"], counts["utterances"], str(manifest))
    subset = tree.get("subset")
    hours = given or by_subset(tree.get("hours"), subset)
    if not hours:
        which = f" and the recipe does not know the hours of subset={subset}" if tree.get("hours") else ""
        raise ConfigError(
            f"{manifest} does not exist yet{which}; say how much speech there is, as in hours=19000"
        )
    source = "hours=" if given else "the recipe's word"
    return Corpus(
        hours, round(hours * 3600 / _MEAN_SECONDS), f"{source}; utterances of {_MEAN_SECONDS} s assumed"
    )


def plan(jobs: Sequence[Job], corpus: Corpus, machine: Machine, beside: Sequence[Job] = ()) -> list[Row]:
    """A row for each of `jobs`; those `beside` them are not asked for, but say what these work on."""
    configs = {(stage, out.parent): config for stage, config, out in (*jobs, *beside)}
    models = [config.model for (stage, _), config in configs.items() if stage in _TRAINED]
    model = models[0] if models else HubertConfig()
    rows = []
    for stage, config, out in jobs:
        name = f"{out.parent.name}/{stage}" if out.parent.name.startswith("iter") else stage
        if "systems" in out.parts:
            name = f"{out.parent.name}/{stage}"
        if stage in _TRAINED:
            rows.append(_training(name, config, corpus, machine))
        elif stage == "features":
            rows.append(_features(name, config, model, corpus, machine))
        elif stage == "kmeans":
            rows.append(_kmeans(name, config, configs.get(("features", out.parent)), model, machine))
        elif stage == "label":
            features, kmeans = (configs.get((kind, out.parent)) for kind in ("features", "kmeans"))
            rows.append(_label(name, features, kmeans, model, corpus, machine))
        elif stage == "prepare":
            hours = corpus.hours / machine.decoding / 8 if config.check_audio else None
            rows.append(
                Row(name, hours, 250.0 * corpus.utterances, None, "decodes everything once, 8 threads")
            )
        else:
            rows.append(Row(name, None, None, None, "small beside the others"))
    return rows


def _training(name: str, config: Any, corpus: Corpus, machine: Machine) -> Row:
    train: TrainConfig = config.train
    longest = config.crop.max_seconds if hasattr(config, "crop") else 30.0
    seconds = min(longest, 3600 * corpus.hours / corpus.utterances)
    precision = _precision(train, machine)
    rate = machine.float32 if precision is torch.float32 else machine.rate
    each, parameters = step_flops(config.model, seconds, train.recompute), n_parameters(config.model)
    flops = each * train.batch_seconds * train.max_steps
    if head_only := min(getattr(config, "head_only_steps", 0), train.max_steps):  # no backward pass there
        flops *= 1 - head_only / train.max_steps * 2 / 3
    hours: float | None = flops / rate / machine.n / 3600
    memory = _memory(config.model, train, seconds, precision, machine)
    checkpoints = train.keep_last + (train.max_steps // train.keep_every if train.keep_every else 0)
    weights = 1 + hasattr(config, "dev_splits")  # the bundle, and of a fine-tuning those of the best step
    disk = (checkpoints * _SAVED + weights * 4) * parameters
    speed = rate / each
    readers = math.ceil(speed / machine.decoding)
    notes = [f"{speed * machine.n:.0f} audio-h/h", f"{readers} reader{'s'[: readers > 1]} a device"]
    if machine.memory and memory > 0.9 * machine.memory:
        notes.append(
            "does not fit: lower train.micro_seconds, or train.recompute=true, or train.sharded=true"
        )
    if machine.memory and not machine.bfloat16 and train.precision in ("auto", "bf16"):
        notes.append(f"in float32: {machine.name} has no bfloat16; set train.precision=fp16")
    try:
        train.accumulation_steps(machine.n)
    except ConfigError as error:  # such a run does not start
        hours, notes = None, [str(error)]
    return Row(name, hours, disk, memory, ", ".join(notes))


def _precision(train: TrainConfig, machine: Machine) -> torch.dtype:
    """What a training will compute in on that machine: `optim.pick_precision` asks a device that is here."""
    if train.precision == "fp16":
        return torch.float16
    return torch.bfloat16 if train.precision != "fp32" and machine.bfloat16 else torch.float32


def _memory(
    model: HubertConfig, train: TrainConfig, seconds: float, precision: torch.dtype, machine: Machine
) -> float:
    """Bytes that tensors take on one device. CUDA's own and what lies between tensors are not among them."""
    parameters = n_parameters(model)
    memory = _ADAM * parameters / (machine.n if train.sharded else 1)
    if machine.n > 1 and not train.sharded:
        memory += _BUCKETS * parameters
    if precision is not torch.float32:
        memory += _COPY * parameters
    gpu = machine.memory is not None
    return memory + train.micro_seconds * peak_bytes(model, seconds, train.recompute, precision, gpu)


def _reading_hours(seconds: float, flops: float, machine: Machine) -> float:
    """Hours of one pass that decodes, and computes `flops` an audio-second (0: MFCCs) on each device."""
    computing = machine.float32 / flops if flops else 1 / (1 / machine.mfcc + 1 / machine.decoding)
    return seconds / min(computing, ahead.MAX_THREADS * machine.decoding) / machine.n / 3600


def _frame_cost(features: Any, model: HubertConfig) -> tuple[float, int]:
    """Operations an audio-second and numbers a frame of what k-means sees; 0 operations: MFCCs."""
    if features.kind == "mfcc":
        return 0.0, Mfcc.dim
    return sum(forward_flops(model, _MEAN_SECONDS, features.layer)), model.width


def _features(name: str, config: Any, model: HubertConfig, corpus: Corpus, machine: Machine) -> Row:
    flops, dim = _frame_cost(config, model)
    share = 1 - math.exp(-config.sample_frames / corpus.utterances)  # of the utterances hold a drawn frame
    size = 4.0 * dim * config.sample_frames
    return Row(name, _reading_hours(3600 * corpus.hours * share, flops, machine), size, None, "")


def _kmeans(name: str, config: Any, features: Any, model: HubertConfig, machine: Machine) -> Row:
    _, dim = _frame_cost(features, model)
    flops = 2.0 * features.sample_frames * dim * config.n_clusters * (config.max_iter + 10) * config.n_init
    size = 4.0 * dim * config.n_clusters
    hours = flops / machine.float32 / machine.n / 3600
    return Row(name, hours, size, None, f"at most {config.max_iter} rounds")


def _label(
    name: str, features: Any, kmeans: Any, model: HubertConfig, corpus: Corpus, machine: Machine
) -> Row:
    flops, _ = _frame_cost(features, model)
    frames = 3600 * corpus.hours * HUBERT.rate
    disk = frames * (1 if kmeans.n_clusters <= 256 else 2) + 8 * corpus.utterances
    return Row(name, _reading_hours(3600 * corpus.hours, flops, machine), disk, None, "")


def as_json(rows: Sequence[Row], corpus: Corpus, machine: Machine) -> dict[str, Any]:
    return {"corpus": asdict(corpus), "machine": asdict(machine), "stages": [asdict(row) for row in rows]}


def table(rows: Sequence[Row], corpus: Corpus, machine: Machine) -> str:
    """The plan for a reader."""
    head = [
        f"{machine.n} x {machine.name}: {machine.source}",
        f"corpus: {corpus.hours:,.1f} h, {corpus.utterances:,} utterances ({corpus.source})",
        f"one core here decodes {machine.decoding:,.0f} and computes MFCCs of {machine.mfcc:,.0f} "
        "audio-seconds a second",
    ]
    if machine.memory is None:
        head.append(f"for a GPU that is not here give gpu=NAME: {', '.join(GPUS)}")
    lines = [("stage", "hours", "disk", "memory a device, at least", "")]
    lines += [(row.stage, _hours(row.hours), _size(row.disk), _size(row.memory), row.note) for row in rows]
    missing = [row.stage for row in rows if row.hours is None and row.memory is not None]
    left_out = f"without the hours of {', '.join(missing)}" if missing else ""
    total = sum(row.hours or 0 for row in rows)
    lines.append(("all", _hours(total or None), _size(sum(row.disk or 0 for row in rows)), "", left_out))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    body = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[4]]) for line in lines]
    return "\n".join([*head, "", *(line.rstrip() for line in body)])


def _hours(hours: float | None) -> str:
    if hours is None or hours >= 10:
        return "" if hours is None else f"{hours:,.0f}"
    return f"{hours:.2g}" if hours >= 0.01 else "0.01"


def _size(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
