"""Hours, disk and memory of every stage before anything starts.

All hours are arithmetic on floating-point operations: those of the configured model follow from its sizes,
and what a device does in a second is measured here or assumed (`speeds`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from jahubert import ahead
from jahubert.errors import ConfigError
from jahubert.frames import HUBERT
from jahubert.hubert import HubertConfig
from jahubert.train.activations import kept_bytes
from jahubert.train.features import Mfcc
from jahubert.train.lookup import by_subset
from jahubert.train.manifest import Manifest
from jahubert.train.optim import TrainConfig
from jahubert.train.speeds import SHARE, Machine, forward_flops, from_table, n_parameters, probe, step_flops

_MEAN_SECONDS = 5.7  # of an utterance of ReazonSpeech: 35,000 h in 22 million
_ADAM = 16  # bytes a parameter: weight, gradient, two moments
_COPY = 2  # bytes a parameter: autocast's copy of the weight in 16 bits, while a micro-batch is computed
_SAVED = 12  # bytes a parameter in a checkpoint
_TRAINED = ("pretrain", "finetune")
_OWN = ("gpus", "gpu", "hours", "share")


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
    memory: float | None  # bytes on each device
    note: str = ""


def split(settings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """What of `key=value` settings is for the plan itself, and what is for the stages."""
    own = {key: value for key, _, value in (setting.partition("=") for setting in settings) if key in _OWN}
    overrides = [setting for setting in settings if setting.partition("=")[0] not in _OWN]
    if not any(setting.startswith("stage=") for setting in overrides):
        overrides.append("stage=all")
    return own, overrides


def make(
    tree: dict[str, Any], jobs: Sequence[tuple[str, Any, Path]], own: dict[str, str]
) -> tuple[list[Row], Corpus, Machine]:
    """The plan of `jobs` as `jahubert.run` makes them: (stage, its config, its folder).

    Raises:
        ConfigError: a number that is none, a GPU that is not in the table, a corpus of unknown size.
    """
    numbers = {}
    for name in ("gpus", "hours", "share"):
        try:
            numbers[name] = float(own.get(name, 0))
        except ValueError:
            raise ConfigError(f"{name}={own[name]}: give a number") from None
        if numbers[name] < 0 or (name in own and not numbers[name]):
            raise ConfigError(f"{name}={own[name]}: give a number above 0")
    corpus = _corpus(
        Path(tree["exp"], "prepare", "manifest.arrow"),
        numbers["hours"],
        by_subset(tree.get("hours"), tree.get("subset")),
    )
    n = max(1, int(numbers["gpus"]))
    if "gpu" in own:
        machine = from_table(own["gpu"], n, numbers["share"] or SHARE)
    else:
        trained = [config for stage, config, _ in jobs if stage in _TRAINED]
        if not trained:
            raise ConfigError(
                "plan: these stages train nothing to measure; ask for stage=all, or give gpu=NAME"
            )
        machine = probe(trained[0].model, trained[0].train, n)
    return plan(jobs, corpus, machine), corpus, machine


def _corpus(manifest: Path, given: float, recipe: float | None) -> Corpus:
    """The corpus as it was prepared, unless its hours are given; else what the recipe says of it."""
    if manifest.exists() and not given:
        counts = Manifest(manifest).counts
        return Corpus(counts["hours"], counts["utterances"], str(manifest))
    hours = given or recipe
    if not hours:
        raise ConfigError(f"{manifest} does not exist yet; say how much speech there is, as in hours=19000")
    source = "hours=" if given else "the recipe's word"
    return Corpus(
        hours, round(hours * 3600 / _MEAN_SECONDS), f"{source}; utterances of {_MEAN_SECONDS} s assumed"
    )


def plan(jobs: Sequence[tuple[str, Any, Path]], corpus: Corpus, machine: Machine) -> list[Row]:
    """A row for each of `jobs`, (stage, its config, its folder) as `jahubert.run` makes them."""
    configs = {(stage, out.parent): config for stage, config, out in jobs}
    models = [config.model for stage, config, _ in jobs if stage in _TRAINED]
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
            rows.append(_label(name, config, features, kmeans, model, corpus, machine))
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
    precision = torch.float32 if train.precision == "fp32" else torch.bfloat16
    each, parameters = step_flops(config.model, seconds, train.recompute), n_parameters(config.model)
    flops = each * train.batch_seconds * train.max_steps
    if head_only := min(getattr(config, "head_only_steps", 0), train.max_steps):  # no backward pass there
        flops *= 1 - head_only / train.max_steps * 2 / 3
    shards = machine.n if train.sharded else 1
    kept = kept_bytes(config.model, seconds, train.recompute, precision, machine.memory is not None)
    copies = _COPY * parameters if precision is torch.bfloat16 else 0
    memory = _ADAM * parameters / shards + copies + kept * train.micro_seconds
    checkpoints = train.keep_last + (train.max_steps // train.keep_every if train.keep_every else 0)
    disk = (checkpoints * _SAVED + 2 * 4) * parameters  # and the bundle, and the best weights
    speed = machine.rate / each
    notes = [f"{speed * machine.n:.0f} audio-h/h", f"{math.ceil(speed / machine.decoding)} readers a device"]
    if machine.memory and memory > 0.9 * machine.memory:
        notes.append(
            "does not fit: lower train.micro_seconds, or train.recompute=true, or train.sharded=true"
        )
    if train.per_step % machine.n:
        notes.append(f"{machine.n} devices cannot share {train.per_step} micro-batches evenly")
    return Row(name, flops / machine.rate / machine.n / 3600, disk, memory, ", ".join(notes))


def _reading_hours(seconds: float, flops: float, machine: Machine) -> float:
    """Hours of one pass that decodes, and computes `flops` an audio-second (0: MFCCs) on each device."""
    computing = machine.rate / flops if flops else 1 / (1 / machine.mfcc + 1 / machine.decoding)
    return seconds / min(computing, ahead.MOST * machine.decoding) / machine.n / 3600


def _frame_cost(features: Any, model: HubertConfig) -> tuple[float, int]:
    """Operations an audio-second and numbers a frame of what k-means sees; 0 operations: MFCCs."""
    if features is None or features.kind == "mfcc":
        return 0.0, Mfcc.dim
    return sum(forward_flops(model, _MEAN_SECONDS, features.layer)), model.width


def _features(name: str, config: Any, model: HubertConfig, corpus: Corpus, machine: Machine) -> Row:
    flops, dim = _frame_cost(config, model)
    share = 1 - math.exp(-config.sample_frames / corpus.utterances)  # of the utterances hold a drawn frame
    size = 4.0 * dim * config.sample_frames
    return Row(name, _reading_hours(3600 * corpus.hours * share, flops, machine), size, None, "")


def _kmeans(name: str, config: Any, features: Any, model: HubertConfig, machine: Machine) -> Row:
    _, dim = _frame_cost(features, model)
    frames = features.sample_frames if features is not None else 2_000_000
    flops = 2.0 * frames * dim * config.n_clusters * (config.max_iter + 10) * config.n_init
    size = 4.0 * dim * config.n_clusters
    return Row(name, flops / machine.rate / machine.n / 3600, size, None, f"at most {config.max_iter} rounds")


def _label(
    name: str, config: Any, features: Any, kmeans: Any, model: HubertConfig, corpus: Corpus, machine: Machine
) -> Row:
    flops, _ = _frame_cost(features, model)
    n_units = kmeans.n_clusters if kmeans is not None else 500
    frames = 3600 * corpus.hours * HUBERT.rate
    disk = frames * (1 if n_units <= 256 else 2) + 8 * corpus.utterances
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
    lines = [("stage", "hours", "disk", "memory a device", "")]
    lines += [(row.stage, _hours(row.hours), _size(row.disk), _size(row.memory), row.note) for row in rows]
    total = sum(row.hours or 0 for row in rows)
    lines.append(("all", _hours(total), _size(sum(row.disk or 0 for row in rows)), "", ""))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    body = ["  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[4]]) for line in lines]
    return "\n".join([*head, "", *(line.rstrip() for line in body)])


def _hours(hours: float | None) -> str:
    if hours is None or hours >= 10:
        return "" if hours is None else f"{hours:,.0f}"
    return f"{hours:.2g}" if hours >= 0.01 else "0.01"


def _size(size: float | None) -> str:
    return "" if size is None else f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2g} MB"
