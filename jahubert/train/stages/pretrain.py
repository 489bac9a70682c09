"""HuBERT pretraining: masked prediction of units.

Reads   the manifest and its label store
Writes  checkpoints/, metrics.jsonl, tensorboard/ or wandb/, bundle/ (the model and its unit head after the
        last step, as in the paper)

    python -m jahubert.run recipe=demo stage=pretrain iteration=1 pretrain.train.max_steps=500

Every iteration starts from scratch (HuBERT paper, section IV-C) unless `init_from` is set.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from jahubert.errors import ConfigError
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.frames import SAMPLE_RATE, hubert_grid_errors
from jahubert.model.config import TRAINING_FIELDS
from jahubert.model.heads import UnitHead
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.data.augmentation import AugmentConfig
from jahubert.train.data.batches import CropConfig, MaskConfig, PretrainBatch, PretrainData
from jahubert.train.data.labels import LabelStore
from jahubert.train.data.manifest import Manifest
from jahubert.train.evaluation.unit_checks import accuracy_problem
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import (
    model_field,
    raise_config_errors,
    range_errors,
    seed_field,
    split_field,
)
from jahubert.train.experiment.registry import ENGINES, resolve
from jahubert.train.trainer.loader import seed_micro_batch, validation_batches
from jahubert.train.trainer.losses import unit_loss
from jahubert.train.trainer.micro_batch import with_micro_seconds
from jahubert.train.trainer.optim import TrainConfig, with_precision
from jahubert.train.trainer.trainer import Loss

log = logging.getLogger(__name__)

VERSION = 1
_CHANCE_FRAMES = 1 << 22  # frames (23 hours) for estimating chance level; reading all would be too slow


@dataclass(frozen=True)
class Config:
    manifest: Path  # manifest.arrow of the prepare stage
    labels: Path  # output folder of the label stage
    model: HubertConfig = field(default_factory=HubertConfig)
    init_from: Path | None = model_field(None)  # model with the initial encoder weights; null: random weights
    train: TrainConfig = field(default_factory=TrainConfig)
    crop: CropConfig = field(default_factory=CropConfig)
    mask: MaskConfig = field(default_factory=MaskConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    unit_dim: int = 256  # dimension of the unit embeddings (fairseq: final_dim)
    temperature: float = 0.1  # temperature of the cosine similarities between frames and units
    penalty_weight: float = 10.0  # weight of the feature penalty (mean square of the convolutional features)
    valid_split: str | None = split_field("dev")  # split for validation; null: no validation
    # Random seed for initial weights, batches, crops, masks, augmentation and dropout.
    seed: int = seed_field()

    def __post_init__(self) -> None:
        ranges = {"positive": ("temperature",), "at least 1": ("unit_dim",)}
        errors = range_errors(self, ranges | {"at least 0": ("penalty_weight",)})
        if not self.mask.prob:
            errors.append("mask.prob is 0, but must be positive: only masked frames are predicted")
        errors += hubert_grid_errors(self.model.grid, "model")
        if self.train.sharded and self.model.layer_drop:
            errors.append(
                "train.sharded=true requires model.layer_drop=0: all processes must run the same blocks"
            )
        if self.augment.speed_prob:
            errors.append(
                f"augment.speed_prob is {self.augment.speed_prob}, but must be 0: changing the speed would "
                "change the times of the units"
            )
        sizes = self.train.batch_sizes
        for name, limit in (("micro_seconds", sizes.micro_seconds), ("batch_seconds", sizes.group_seconds)):
            if limit is not None and self.crop.max_seconds > limit:
                per_group = (
                    f" / {sizes.groups} groups" if name == "batch_seconds" and sizes.groups > 1 else ""
                )
                errors.append(
                    f"crop.max_seconds is {self.crop.max_seconds}, but must be at most "
                    f"train.{name}{per_group} ({limit:g})"
                )
        raise_config_errors(errors)


class Pretrainer(nn.Module):
    """Trainable module of an encoder and a unit head, with fairseq's masked prediction loss and penalty."""

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
        self.updates = 0  # number of updates, including the current one
        self.has_unused_parameters = config.layer_drop > 0
        self.hubert = HubertModel(config)
        self.blocks = list(self.hubert.encoder.layers)
        self.head = UnitHead(config.width, n_units, unit_dim, temperature)

    def forward(self, batch: PretrainBatch, step: int) -> Loss:
        if self.training:
            self.updates = step + 1
        encoded = self.hubert(batch.wav_BT, batch.n_samples_B, mask_BS=batch.mask_BS, shape=batch.shape)
        # Frames are selected by index, because boolean indexing would synchronize the GPU.
        logits_NK = self.head(encoded.hidden_BSD.flatten(0, 1).index_select(0, batch.masked_index_N))
        loss, count = unit_loss(logits_NK, batch.unit_N), len(batch.unit_N)
        total, penalty = loss, torch.zeros_like(loss)
        if encoded.conv_penalty_B is not None:
            penalty = (encoded.conv_penalty_B * batch.penalty_count_B).sum()
            total = loss + self.penalty * penalty
        correct = (logits_NK.detach().argmax(-1) == batch.unit_N).sum()
        padded_seconds = batch.wav_BT.numel() / SAMPLE_RATE
        sums = {
            "nats": loss,
            "correct": correct,
            "penalty": penalty.detach(),
            "seconds": batch.seconds,
            "padded_seconds": padded_seconds,
        }
        return Loss(total, count, sums)

    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Compute loss (bits) and accuracy on masked frames, the feature penalty and the padding fraction."""
        return {
            "loss": sums["nats"] / count / math.log(2),
            "accuracy": sums["correct"] / count,
            "penalty": sums["penalty"] / count,
            "padding": 1 - sums["seconds"] / sums["padded_seconds"],
        }


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest, labels = Manifest(config.manifest), LabelStore(config.labels)
    train_config = with_precision(config.train, out)
    config = replace(config, train=with_micro_seconds(train_config, config.model, config.crop.max_seconds))
    data = _data(config, manifest, labels, "train", config.augment)
    valid = None
    if config.valid_split is not None:
        valid = _data(config, manifest, labels, config.valid_split)
    initial, model = None, config.model
    if config.init_from is not None:
        initial = _initial_model(config)
        model = replace(model, normalize_eps=initial.config.normalize_eps)
    torch.manual_seed(config.seed)
    module = Pretrainer(
        model,
        labels.header.n_units,
        unit_dim=config.unit_dim,
        temperature=config.temperature,
        penalty=config.penalty_weight,
        seed=config.seed,
    )
    if initial is not None:
        module.hubert.load_state_dict(initial.state_dict())
    train = resolve(config.train.engine, ENGINES, "pretrain.train.engine")

    def checked(metrics: dict[str, float]) -> dict[str, float]:
        check_accuracy(config, labels, metrics, module.updates)
        return metrics

    validate = None if valid is None else lambda: checked(evaluate(module, valid))
    metrics: dict[str, float] = train(module, data, config.train, out, validate=validate)
    if validate is None or not config.train.valid_every:  # validation includes the last step
        checked(metrics)
    if distributed.rank() == 0:
        _export(config, module, labels, metrics, out)
    distributed.barrier()
    return metrics


def check_accuracy(config: Config, labels: LabelStore, metrics: dict[str, float], updates: int) -> None:
    """Warn if the accuracy on masked frames is too low after the warm-up."""
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
    """Compute the loss and accuracy on a split over all processes, with the same masks every time."""
    device = next(module.parameters()).device
    sums: dict[str, Any] = dict.fromkeys(
        ("nats", "correct", "penalty", "seconds", "padded_seconds", "count"), 0.0
    )
    for micro, batch in validation_batches(data):
        seed_micro_batch(module.seed, micro)
        loss = module(batch.to(device), 0)
        for name in sums:
            sums[name] = sums[name] + (loss.count if name == "count" else loss.sums[name])
    totals = distributed.all_reduce_sums(sums, device)
    metrics = module.metrics(totals, totals["count"])
    return {name: metrics[name] for name in ("loss", "accuracy")}


def _data(
    config: Config, manifest: Manifest, labels: LabelStore, split: str, augment: AugmentConfig | None = None
) -> PretrainData:
    return PretrainData(
        manifest,
        labels,
        split=split,
        crop=config.crop,
        mask=config.mask,
        sizes=config.train.batch_sizes,
        seed=config.seed,
        augment=augment,
    )


def _initial_model(config: Config) -> HubertModel:
    """Load the model `init_from`, and check that it has the sizes in `model`."""
    initial = load_bundle(config.init_from).model
    differences = [
        f"{field.name} is {found}, not {expected}"
        for field in fields(HubertConfig)
        if field.name not in TRAINING_FIELDS
        and (found := getattr(initial.config, field.name)) != (expected := getattr(config.model, field.name))
    ]
    if differences:
        raise ConfigError(
            f"pretrain.init_from={config.init_from}: this model differs from `pretrain.model`: "
            f"{'; '.join(differences)}. Set the same values in `model`"
        )
    return initial


def _export(
    config: Config, module: Pretrainer, labels: LabelStore, metrics: dict[str, float], out: Path
) -> None:
    info = {"steps": config.train.max_steps, "metrics": metrics, "labels": vars(labels.header)}
    save_bundle(out / "bundle", model=module.hubert, unit_head=module.head, info={"pretraining": info})
