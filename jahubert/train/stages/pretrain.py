"""HuBERT pretraining: predict the units of masked frames.

Reads   the manifest and its label store
Writes  checkpoints/, metrics.jsonl, tensorboard/, bundle/ (the model as it was after the last step, as in the
        paper, and its unit head)

    python -m jahubert.run recipe=demo stage=pretrain iteration=1 pretrain.train.max_steps=500

Every iteration starts from scratch (HuBERT paper section IV-C) unless `init_from` names a model.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jahubert.errors import ConfigError
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.frames import SAMPLE_RATE
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.prefetch import prefetch
from jahubert.train.data.batches import CropConfig, MaskConfig, PretrainBatch, PretrainData
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.unit_checks import accuracy_problem
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import model_field, raise_config_errors, range_errors, split_field
from jahubert.train.experiment.registry import ENGINES, resolve
from jahubert.train.trainer.loader import seed_micro_batch
from jahubert.train.trainer.losses import unit_loss
from jahubert.train.trainer.optim import TrainConfig
from jahubert.train.trainer.trainer import Loss

log = logging.getLogger(__name__)

VERSION = 1
_CHANCE_FRAMES = 1 << 22  # 23 hours; a look at all labels of a large corpus would delay every start


@dataclass(frozen=True)
class Config:
    manifest: Path
    labels: Path
    model: HubertConfig = field(default_factory=HubertConfig)
    init_from: Path | None = model_field(None)  # continue from a model's encoder instead of from scratch
    train: TrainConfig = field(default_factory=TrainConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    unit_dim: int = 256  # width of the codebook (final_dim)
    temperature: float = 0.1
    penalty_weight: float = 10.0  # of the mean square of the conv features
    valid_split: str | None = split_field("dev")  # null: no validation
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = {"positive": ("temperature",), "at least 1": ("unit_dim",)}
        wrong = range_errors(self, numbers | {"at least 0": ("penalty_weight",)})
        if self.train.sharded and self.model.layer_drop:
            wrong.append("train.sharded needs model.layer_drop=0: all processes must run the same blocks")
        if self.crop.max_seconds > self.train.micro_seconds:
            wrong.append(
                f"crop.max_seconds {self.crop.max_seconds} does not fit "
                f"train.micro_seconds {self.train.micro_seconds}"
            )
        raise_config_errors(wrong)


class Pretrainer(nn.Module):
    """Encoder, unit head, and the masked prediction loss with its feature penalty (fairseq criterion)."""

    def __init__(
        self,
        config: HubertConfig,
        n_units: int,
        *,
        unit_dim: int,
        temperature: float,
        penalty: float,
        seed: int,
    ):
        super().__init__()
        self.seed, self.penalty = seed, penalty
        self.updates = 0  # begun so far
        self.has_unused_parameters = config.layer_drop > 0
        self.hubert = HubertModel(config)
        self.blocks = list(self.hubert.encoder.layers)
        self.head = UnitHead(config.width, n_units, unit_dim, temperature)

    def forward(self, batch: PretrainBatch, step: int) -> Loss:
        if self.training:
            self.updates = step + 1
        encoded = self.hubert(batch.wav_BT, batch.n_samples_B, mask_BS=batch.mask_BS)
        # Not by the mask: a GPU would have to count its frames before the next line.
        logits_NK = self.head(encoded.hidden_BSD.flatten(0, 1).index_select(0, batch.masked_index_N))
        loss, count = unit_loss(logits_NK, batch.unit_N), len(batch.unit_N)
        total = loss
        if encoded.conv_penalty is not None:
            total = loss + self.penalty * count * encoded.conv_penalty
        correct = (logits_NK.detach().argmax(-1) == batch.unit_N).sum()
        penalty = 0.0 if encoded.conv_penalty is None else encoded.conv_penalty.detach() * count
        room = batch.wav_BT.numel() / SAMPLE_RATE
        sums = {"nats": loss, "correct": correct, "penalty": penalty, "seconds": batch.seconds, "room": room}
        return Loss(total, count, sums)

    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Loss in bits a masked frame, accuracy on masked frames, mean square of the conv features.

        And the share of the batches that is padding.
        """
        return {
            "loss": sums["nats"] / count / math.log(2),
            "accuracy": sums["correct"] / count,
            "penalty": sums["penalty"] / count,
            "padding": 1 - sums["seconds"] / sums["room"],
        }


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest, labels = Manifest(config.manifest), LabelStore(config.labels)
    data = _data(config, manifest, labels, "train")
    valid = None
    if config.valid_split is not None:
        valid = _data(config, manifest, labels, config.valid_split)
    torch.manual_seed(config.seed)
    module = Pretrainer(
        config.model,
        labels.header.n_units,
        unit_dim=config.unit_dim,
        temperature=config.temperature,
        penalty=config.penalty_weight,
        seed=config.seed,
    )
    if config.init_from is not None:
        _init_from(module.hubert, config.init_from)
    train = resolve(config.train.engine, ENGINES, "pretrain.train.engine")

    def watched(metrics: dict[str, float]) -> dict[str, float]:
        watch_accuracy(config, labels, metrics, module.updates)
        return metrics

    validate = None if valid is None else lambda: watched(evaluate(module, valid))
    metrics = watched(train(module, data, config.train, out, validate=validate))
    if distributed.rank() == 0:
        _export(config, module, labels, metrics, out)
    distributed.barrier()
    return metrics | {"padding": data.sampler.padding()}


def watch_accuracy(config: Config, labels: LabelStore, metrics: dict[str, float], updates: int) -> None:
    """Warn, once the warm-up is over, when the accuracy on masked frames says that too little was learnt."""
    if (
        distributed.rank()
        or "accuracy" not in metrics
        or updates <= config.train.warmup * config.train.max_steps
    ):
        return
    count_K = np.bincount(labels.unit_N[:_CHANCE_FRAMES])
    chance = float(count_K.max()) / int(count_K.sum())
    header = labels.header
    if problem := accuracy_problem(metrics["accuracy"], chance, updates, header.feature, header.n_units):
        log.warning("%s", problem)


def evaluate(module: Pretrainer, data: PretrainData) -> dict[str, float]:
    """Loss and accuracy on a split whose masks are the same every time, over all processes."""
    device = next(module.parameters()).device
    sums: dict[str, Any] = dict.fromkeys(("nats", "correct", "penalty", "seconds", "room", "count"), 0.0)
    for micro, batch in prefetch(
        data.load, data.sampler.epoch(0).for_rank(distributed.rank(), distributed.world())
    ):
        seed_micro_batch(module.seed, micro)
        loss = module(batch.to(device), 0)
        for name in sums:
            sums[name] = sums[name] + (loss.count if name == "count" else loss.sums[name])
    totals = distributed.all_reduce_sums(sums, device)
    metrics = module.metrics(totals, totals["count"])
    return {name: metrics[name] for name in ("loss", "accuracy")}


def _data(config: Config, manifest: Manifest, labels: LabelStore, split: str) -> PretrainData:
    return PretrainData(
        manifest,
        labels,
        split=split,
        crop=config.crop,
        mask=config.mask,
        micro_seconds=config.train.micro_seconds,
        micro_batches_per_step=config.train.micro_batches_per_step,
        seed=config.seed,
    )


def _init_from(model: HubertModel, source: Path) -> None:
    weights, own = load_bundle(source).model.state_dict(), model.state_dict()
    wrong = [name for name in own if name not in weights or weights[name].shape != own[name].shape]
    if wrong or len(weights) != len(own):
        raise ConfigError(
            f"init_from={source}: its sizes are not those of `model` (see {(wrong or ['layers'])[0]}); give "
            "`model` the same ones"
        )
    model.load_state_dict(weights)


def _export(
    config: Config, module: Pretrainer, labels: LabelStore, metrics: dict[str, float], out: Path
) -> None:
    info = {"steps": config.train.max_steps, "metrics": metrics, "labels": vars(labels.header)}
    save_bundle(out / "bundle", model=module.hubert, unit_head=module.head, info={"pretraining": info})
