"""How a training run moves: its length, batch, learning rate and optimiser. Both engines read this."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from jahubert.errors import ConfigError
from jahubert.model.precision import preferred_dtype
from jahubert.train.experiment.config import raise_config_errors, range_errors, runtime_field


@dataclass(frozen=True)
class TrainConfig:
    """One training run; the defaults are HuBERT BASE pretraining (facts: fairseq's base yaml)."""

    max_steps: int = 400_000
    batch_seconds: float = 2800.0  # audio of one step over all devices, kept by accumulation
    micro_seconds: float = 87.5  # audio that one device computes at once, with padding
    lr: float = 5e-4
    schedule: Literal["linear", "tri_stage"] = "linear"
    warmup: float = 0.08  # share of the steps
    hold: float = 0.4  # tri_stage: share of the steps at the full rate
    final_lr: float = 0.0  # share of lr at the last step
    betas: tuple[float, ...] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.01
    clip_norm: float = 10.0  # 0: no clipping
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: str = runtime_field("torch")
    sharded: bool = runtime_field(False)  # FSDP2 instead of DDP: for models that do not fit one device
    recompute: bool = runtime_field(
        False
    )  # activation checkpointing: a third more work, a fraction of the memory
    compile: bool = runtime_field(False)  # torch.compile of the Transformer blocks
    device: str = runtime_field("auto")
    workers: int = runtime_field(0)  # processes that read audio, for each device
    log_every: int = runtime_field(50)  # steps
    save_every: int = runtime_field(1000)  # steps
    keep_last: int = runtime_field(2)  # checkpoints
    keep_every: int = runtime_field(
        0
    )  # steps, a multiple of save_every; those checkpoints stay as well; 0: none
    valid_every: int = 1000  # steps; 0: never

    def __post_init__(self) -> None:
        wrong = range_errors(
            self,
            {
                "positive": ("batch_seconds", "micro_seconds", "lr"),
                "at least 1": ("max_steps", "log_every", "save_every", "keep_last"),
                "at least 0": ("eps", "weight_decay", "clip_norm", "workers", "keep_every", "valid_every"),
                "in [0, 1]": ("warmup", "hold", "final_lr"),
            },
        )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            wrong.append(f"betas is {list(self.betas)}, but must be two numbers in [0, 1)")
        if self.sharded and self.engine != "torch":
            wrong.append(f"sharded=true is for engine=torch, not engine={self.engine}")
        if self.save_every > 0 and self.keep_every % self.save_every:
            wrong.append(f"keep_every {self.keep_every} is no multiple of save_every {self.save_every}")
        if self.warmup + (self.hold if self.schedule == "tri_stage" else 0) > 1:
            wrong.append("warmup and hold are shares of the steps and cannot sum to more than 1")
        if self.micro_seconds > self.batch_seconds:
            wrong.append(
                f"micro_seconds {self.micro_seconds} is more than batch_seconds {self.batch_seconds}"
            )
        raise_config_errors(wrong)

    @property
    def per_step(self) -> int:
        """Micro-batches of one step."""
        return max(1, round(self.batch_seconds / self.micro_seconds))

    def share(self, processes: int) -> int:
        """Micro-batches of one update that each of so many processes computes.

        Raises:
            ConfigError: they cannot be shared evenly.
        """
        each, left = divmod(self.per_step, processes)
        if left:
            more = processes * (each + 1)
            raise ConfigError(
                f"train.micro_seconds: one update takes {self.per_step} micro-batches "
                f"({self.batch_seconds:g} / {self.micro_seconds:g} s), which {processes} processes cannot "
                f"share evenly; set it to {self.batch_seconds / more:.4g}, which makes {more} of them"
            )
        return each

    def notes(self, processes: int) -> list[str]:
        """A sentence on each setting that so many processes do not keep to the letter."""
        found, seconds = [], self.per_step * self.micro_seconds
        if abs(seconds / self.batch_seconds - 1) > 0.01:  # less is how a rounded micro_seconds is written
            found.append(
                f"an update takes {seconds:g} s of audio and not batch_seconds={self.batch_seconds:g}: "
                f"{self.per_step} times micro_seconds={self.micro_seconds:g}. To have it exact, set "
                f"micro_seconds={self.batch_seconds / self.per_step:.4g}, or another part of batch_seconds"
            )
        if self.sharded and processes == 1:
            found.append("sharded=true changes nothing: one process has nobody to share the model with")
        return found


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of a step, counted from 0.

    linear: up over the warm-up, then straight down to `final_lr` (fairseq polynomial_decay, power 1).
    tri_stage: from 1 % up, hold, then exponential decay to `final_lr` (SpecAugment paper; fairseq tri_stage).
    """
    warmup = max(1, round(config.warmup * config.max_steps))
    if config.schedule == "linear":
        if step < warmup:
            return config.lr * (step + 1) / warmup
        left = (config.max_steps - step) / max(1, config.max_steps - warmup)
        return config.lr * (config.final_lr + (1 - config.final_lr) * max(0.0, left))
    if step < warmup:
        return config.lr * (0.01 + 0.99 * step / warmup)
    decay_from = warmup + round(config.hold * config.max_steps)
    if step < decay_from:
        return config.lr
    share = min(1.0, (step - decay_from) / max(1, config.max_steps - decay_from))
    return config.lr * math.exp(math.log(max(config.final_lr, 1e-8)) * share)


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over everything that learns, in one fused kernel.

    Its moments are there from the start. AdamW makes those of a parameter at its first gradient, so a
    checkpoint of a phase in which an encoder is frozen, or layers were dropped, would lack some, and could
    not be read again.
    """
    optimizer = torch.optim.AdamW(
        [parameter for parameter in module.parameters() if parameter.requires_grad],
        lr=config.lr,
        betas=(config.betas[0], config.betas[1]),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                # where a fused one has it
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def pick_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """The autocast type; float32 means none.

    Raises:
        ConfigError: fp16 on a CPU, which is several times slower than float32 there.
    """
    if config.precision == "auto":
        return preferred_dtype(device)
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision=fp16 is slower than fp32 on a CPU; use precision=fp32 or bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
