"""CTC fine-tuning of a pretrained encoder with a linear output layer.

Reads   the manifest, its targets, and a pretrained model unless training from scratch
Writes  checkpoints/, metrics.jsonl, tensorboard/ or wandb/, best_N.safetensors, bundle/

    python -m jahubert.run recipe=demo stage=finetune system=pretrained

By default, the convolutional front end stays frozen, and the first updates only train the CTC head (HuBERT
paper, section IV-D; fairseq's base_10h). Utterances are not cropped. The weights with the best result on the
development set are kept.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from jahubert.errors import DataError
from jahubert.formats.bundle import load_bundle, save_bundle
from jahubert.frames import SAMPLE_RATE, hubert_grid_errors
from jahubert.inference.ctc import greedy
from jahubert.model.heads import HubertForCtc
from jahubert.model.hubert import HubertConfig, HubertModel
from jahubert.train.data.augmentation import AugmentConfig
from jahubert.train.data.batches import CtcBatch, CtcData, MaskConfig
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.targets import TargetStore, labeled_in, split_words
from jahubert.train.evaluation.metrics import count_errors
from jahubert.train.evaluation.unit_checks import blank_problem
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import (
    model_field,
    raise_config_errors,
    range_errors,
    runtime_field,
    seed_field,
    split_field,
)
from jahubert.train.experiment.registry import ENGINES, resolve
from jahubert.train.trainer.loader import validation_batches
from jahubert.train.trainer.losses import ctc_loss
from jahubert.train.trainer.micro_batch import with_micro_seconds
from jahubert.train.trainer.optim import TrainConfig, with_precision
from jahubert.train.trainer.trainer import Loss

log = logging.getLogger(__name__)

VERSION = 1

# The settings of base_10h, fairseq's only configuration for fine-tuning HuBERT; conf/finetuning has other
# presets. The learning rate rises for 8,000 updates. It would then decay to 5 % within 72,000 updates, but
# training ends after 17,000 of them. Therefore, final_lr is 0.05 ** (17 / 72) = 0.493.
_TRAIN = TrainConfig(
    max_steps=25_000,
    batch_seconds=1600.0,
    lr=2e-5,
    schedule="tri_stage",
    warmup=0.32,
    hold=0.0,
    final_lr=0.493,
    eps=1e-8,
    weight_decay=0.0,
    clip_norm=0.0,
)
_MASK = MaskConfig(prob=0.75, min_spans=0, channel_prob=0.5)


# Fields of HubertConfig for which fine-tuning has its own settings.
_DROPPED = ("dropout", "attention_dropout", "activation_dropout", "input_dropout", "layer_drop")


@dataclass(frozen=True)
class Config:
    manifest: Path  # manifest.arrow of the prepare stage
    targets: Path  # output folder of the targets stage
    # Model to fine-tune (folder, file or Hub name); null: train from scratch, with the sizes in `model`.
    pretrained: Path | None = model_field(None)
    model: HubertConfig = field(default_factory=HubertConfig)
    train: TrainConfig = _TRAIN
    mask: MaskConfig = _MASK
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    fraction: float = 1.0  # fraction of the labeled training utterances to use (the first in the manifest)
    # Maximum hours of training audio. The utterances are drawn at random, after `fraction` is applied. null:
    # no limit.
    hours: float | None = None
    freeze_conv: bool = True  # whether to freeze the convolutional front end
    head_only_steps: int = 10_000  # number of updates at the start that train only the CTC head
    dropout: float = 0.0  # dropout; replaces the pretrained model's value or model.dropout
    # Attention dropout; replaces the pretrained model's value or model.attention_dropout.
    attention_dropout: float = 0.0
    # Activation dropout; replaces the pretrained model's value or model.activation_dropout.
    activation_dropout: float = 0.1
    input_dropout: float = 0.0  # input dropout; replaces the pretrained model's value or model.input_dropout
    layer_drop: float = 0.1  # layer drop; replaces the pretrained model's value or model.layer_drop
    dev_splits: tuple[str, ...] = split_field(("dev",))  # splits for validation
    # Metric that selects the best step on the development set; for characters, wer and per are both the CER.
    best: Literal["wer", "per", "loss"] = "wer"
    # If the training or development set has at most this many hours of audio, each data worker keeps its
    # decoded audio in memory (0.23 GB per hour).
    keep_in_memory_hours: float = runtime_field(4.0)
    seed: int = seed_field()  # random seed for `hours`, new weights, batches, masks, augmentation and dropout

    def __post_init__(self) -> None:
        ranges = {"in (0, 1]": ("fraction",), "positive": ("hours",), "in [0, 1)": _DROPPED}
        errors = range_errors(self, ranges | {"at least 0": ("keep_in_memory_hours",)})
        if self.train.sharded and self.layer_drop:
            errors.append("train.sharded=true requires layer_drop=0: all processes must run the same blocks")
        if self.pretrained is None and self.freeze_conv:
            errors.append(
                "pretrained=... is required: the model to fine-tune, given as a Hub name "
                "(rinna/japanese-hubert-base), a folder (exp/NAME/iter2/pretrain) or a model file. To train "
                "from scratch, set freeze_conv=false"
            )
        if self.pretrained is None:
            errors += hubert_grid_errors(self.model.grid, "model")
        if not 0 <= self.head_only_steps < self.train.max_steps:
            errors.append(
                f"head_only_steps is {self.head_only_steps}, but must be at least 0 and less than "
                f"train.max_steps ({self.train.max_steps}), so that the encoder is trained. Set it to 0, or "
                f"to {round(0.4 * self.train.max_steps)} (the same proportion as in fairseq's base_10h)"
            )
        raise_config_errors(errors)

    def unused_settings(self) -> tuple[str, ...]:
        """Return the settings that have no effect: a pretrained model has its own sizes."""
        return () if self.pretrained is None else ("model",)


class FineTuner(nn.Module):
    """Trainable module that consists of an encoder and a CTC head, with freezing, loss and metrics."""

    def __init__(self, ctc: HubertForCtc, *, freeze_conv: bool, head_only_steps: int, seed: int):
        super().__init__()
        self.ctc, self.head_only_steps, self.seed = ctc, head_only_steps, seed
        self.updates = 0  # number of updates, including the current one
        self.has_unused_parameters = head_only_steps > 0 or ctc.config.layer_drop > 0
        self.blocks = list(ctc.hubert.encoder.layers)
        if freeze_conv:
            for parameter in ctc.hubert.feature_extractor.parameters():
                parameter.requires_grad_(False)

    def forward(self, batch: CtcBatch, step: int) -> Loss:
        self.updates = step + 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and step >= self.head_only_steps):
            encoded = self.ctc.hubert(
                batch.wav_BT,
                batch.n_samples_B,
                mask_BS=batch.mask_BS,
                channel_mask_BD=batch.channel_mask_BD,
                shape=batch.shape,
            )
        logp_BSV = self.ctc.log_probs(encoded.hidden_BSD)
        # The frame counts are computed from lengths on the CPU, because reading them from the encoder's
        # output would synchronize the GPU.
        n_frames_B = self.ctc.config.grid.n_frames(batch.n_samples_B)
        total = ctc_loss(logp_BSV, n_frames_B, batch.target_L, batch.n_target_B)
        sums: dict[str, Tensor | float] = {
            "blanks": _blanks(logp_BSV, encoded.n_frames_B),
            "frames": int(n_frames_B.sum()),
            "symbols": len(batch.target_L),
            "seconds": batch.seconds,
        }
        return Loss(total, len(n_frames_B), sums)

    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Compute the loss (nats per symbol) and the fraction of frames whose best symbol is blank."""
        return {"loss": sums["total"] / sums["symbols"], "blank": sums["blanks"] / sums["frames"]}


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest, targets = Manifest(config.manifest), TargetStore(config.targets)
    targets.check(manifest)
    rows = choose_rows(manifest, targets, config)
    dev_rows = labeled_in(config.dev_splits, manifest, targets)
    if config.train.valid_every and not len(dev_rows):
        raise DataError(
            f"finetune.dev_splits={list(config.dev_splits)}: no utterance in these splits has a target, but "
            "targets are required to select the best step; choose other splits, or set "
            "finetune.train.valid_every=0"
        )
    torch.manual_seed(config.seed)
    module = FineTuner(
        build_model(config, len(targets.phonemes)),
        freeze_conv=config.freeze_conv,
        head_only_steps=config.head_only_steps,
        seed=config.seed,
    )
    max_lengths = config.augment.max_lengths(manifest.n_samples[rows])
    longest = int(max(max_lengths.max(), manifest.n_samples[dev_rows].max(initial=0)))
    train_config = with_precision(config.train, out)
    train_config = with_micro_seconds(train_config, module.ctc.config, longest / SAMPLE_RATE)
    sizes: dict[str, Any] = {
        "width": module.ctc.config.width,
        "sizes": train_config.batch_sizes,
        "seed": config.seed,
        "keep_in_memory_hours": config.keep_in_memory_hours,
    }
    data = CtcData(manifest, targets, rows, mask=config.mask, augment=config.augment, **sizes)
    dev = CtcData(manifest, targets, dev_rows, mask=None, **sizes) if len(dev_rows) else None

    def validate(dev: CtcData) -> dict[str, float]:
        metrics = evaluate(module, dev)
        problem = blank_problem(
            metrics["blank"],
            metrics["empty"],
            module.updates,
            max_steps=config.train.max_steps,
            head_only_steps=config.head_only_steps,
        )
        if problem and distributed.rank() == 0:
            log.warning("%s", problem)
        return metrics

    validation = None if dev is None else partial(validate, dev)
    train = resolve(config.train.engine, ENGINES, "finetune.train.engine")
    metrics: dict[str, float] = train(module, data, train_config, out, validate=validation, best=config.best)
    if distributed.rank() == 0:
        finetuning: dict[str, Any] = {"utterances": len(rows), "metrics": metrics}
        if config.pretrained is not None and not config.pretrained.exists():  # `pretrained` is a Hub name
            finetuning["base_model"] = str(config.pretrained)
        info = {"finetuning": finetuning}
        save_bundle(out / "bundle", ctc=module.ctc, phonemes=targets.phonemes, info=info)
    distributed.barrier()
    hours = float(manifest.n_samples[rows].sum()) / SAMPLE_RATE / 3600
    return metrics | {"utterances": len(rows), "hours": hours, "model": model_name(config.pretrained)}


def model_name(source: Path | None) -> str:
    """Return a model name for tables: the relevant end of its path, such as demo/iter2, or "from scratch"."""
    if source is None:
        return "from scratch"
    parts = [part for part in source.parts if part not in ("/", "bundle", "pretrain")]
    return "/".join(parts[-2:])


def choose_rows(manifest: Manifest, targets: TargetStore, config: Config) -> np.ndarray:
    """Select the manifest rows for training, in ascending order.

    `fraction` selects the first labeled utterances of the training split. `hours` draws a random subset of
    them, so that a subset of ten minutes does not come from a single talk. With the same seed and
    `fraction`, larger subsets contain the smaller ones.

    Raises:
        DataError: no utterance of the training split has a target.
    """
    rows = labeled_in(["train"], manifest, targets)
    if not len(rows):
        raise DataError(
            f"finetune: no utterance of split 'train' in {config.manifest} has a target (see "
            f"{config.targets / 'rejected.jsonl'}); provide transcripts and rerun stage=prepare and "
            "stage=targets"
        )
    rows = rows[: max(1, round(config.fraction * len(rows)))]
    if config.hours is None:
        return rows
    drawn = np.random.default_rng([config.seed, 9]).permutation(rows)
    within_limit = np.cumsum(manifest.n_samples[drawn]) <= config.hours * 3600 * SAMPLE_RATE
    return np.sort(drawn[: max(1, int(within_limit.sum()))])


def build_model(config: Config, n_symbols: int) -> HubertForCtc:
    """Create a model with the pretrained or a new encoder, a new head, and the dropout for fine-tuning."""
    changes = {name: getattr(config, name) for name in _DROPPED}
    if config.pretrained is None:
        return HubertForCtc(replace(config.model, conv_grad_scale=1.0, **changes), n_symbols)
    bundle = load_bundle(config.pretrained)
    raise_config_errors(hubert_grid_errors(bundle.config.grid, f"finetune.pretrained={config.pretrained}"))
    hubert = HubertModel(replace(bundle.config, conv_grad_scale=1.0, **changes))
    hubert.load_state_dict(bundle.model.state_dict())
    return HubertForCtc(hubert.config, n_symbols, hubert)


def evaluate(module: FineTuner, data: CtcData) -> dict[str, float]:
    """Compute validation metrics over all processes, with greedy decoding.

    Returns:
        The metrics "loss" (nats per symbol), "per", "wer", "blank" (fraction of frames) and "empty" (fraction
        of hypotheses).
    """
    device = next(module.parameters()).device
    phonemes = data.targets.phonemes
    names = ["loss", "symbols", "phone_errors", "phones", "word_errors", "words"]
    sums: dict[str, Any] = dict.fromkeys([*names, "blanks", "frames", "empty", "rows"], 0.0)
    for micro, batch in validation_batches(data):
        batch = batch.to(device)
        logp_BSV, device_frames_B = module.ctc(batch.wav_BT, batch.n_samples_B, shape=batch.shape)
        n_frames_B = module.ctc.config.grid.n_frames(batch.n_samples_B)
        sums["loss"] += ctc_loss(logp_BSV, n_frames_B, batch.target_L, batch.n_target_B).double()
        sums["symbols"] += len(batch.target_L)
        sums["blanks"] += _blanks(logp_BSV, device_frames_B)
        sums["frames"] += int(n_frames_B.sum())
        sums["rows"] += len(micro.rows)
        for row, best in zip(micro.rows, greedy(logp_BSV, n_frames_B), strict=True):
            reference, hypothesis = data.targets.words(row), split_words(phonemes, best.labels)
            phones = sum(reference, ())
            sums["empty"] += not hypothesis
            sums["word_errors"] += count_errors(reference, hypothesis).errors
            sums["words"] += len(reference)
            sums["phone_errors"] += count_errors(phones, sum(hypothesis, ())).errors
            sums["phones"] += len(phones)
    totals = distributed.all_reduce_sums(sums, device)
    return {
        "loss": totals["loss"] / totals["symbols"],
        "per": totals["phone_errors"] / totals["phones"],
        "wer": totals["word_errors"] / totals["words"],
        "blank": totals["blanks"] / totals["frames"],
        "empty": totals["empty"] / totals["rows"],
    }


def _blanks(logp_BSV: Tensor, n_frames_B: Tensor) -> Tensor:
    """Count the frames whose most probable symbol is blank, as a tensor on the same device."""
    valid_BS = torch.arange(logp_BSV.shape[1], device=logp_BSV.device) < n_frames_B[:, None]
    return (valid_BS & (logp_BSV.detach().argmax(-1) == 0)).sum(dtype=torch.float64)
