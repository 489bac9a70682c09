"""Training settings, learning-rate schedules and optimizer, shared by both training engines."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from jahubert.errors import ConfigError
from jahubert.model.precision import DTYPES, preferred_dtype
from jahubert.train.data.sampler import BatchSizes, groups_per_update
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import raise_config_errors, range_errors, runtime_field
from jahubert.train.experiment.provenance import read_record, write_json

log = logging.getLogger(__name__)

PRECISION = "precision.json"  # file in the folder of a run with precision=auto


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run.

    The optimization defaults follow fairseq's HuBERT BASE pretraining; the finetune stage has its own.
    """

    max_steps: int = 400_000  # number of updates
    # Maximum seconds of audio per step over all devices, including padding. Gradients are accumulated if
    # necessary.
    batch_seconds: float = 2800.0
    # Number of groups per step, where a group consists of utterances with similar lengths; null: derived from
    # batch_seconds (8 for 2,800 s).
    groups: int | None = None
    # Maximum seconds of audio per device and forward pass, including the padding within each group; null:
    # derived from the memory of a GPU, or from fixed limits on a CPU.
    micro_seconds: float | None = runtime_field(None)
    lr: float = 5e-4  # peak learning rate
    # Learning-rate schedule. linear: warm-up and decay; tri_stage: warm-up, hold, decay.
    schedule: Literal["linear", "tri_stage"] = "linear"
    warmup: float = 0.08  # length of the warm-up, as a fraction of max_steps
    hold: float = 0.4  # tri_stage: length of the phase at the peak learning rate, as a fraction of max_steps
    final_lr: float = 0.0  # learning rate at the end of the decay, as a fraction of lr
    betas: tuple[float, ...] = (0.9, 0.98)  # AdamW betas
    eps: float = 1e-6  # AdamW epsilon
    weight_decay: float = 0.01  # AdamW weight decay
    clip_norm: float = 10.0  # maximum gradient norm; 0: no clipping
    # Number format in training. auto: bf16 where the device is faster with it, otherwise fp32.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: str = runtime_field("torch")  # training engine: torch, fairseq2, or an import path
    # Whether to use FSDP2 instead of DDP, for models that do not fit on one device.
    sharded: bool = runtime_field(False)
    # Whether to use activation checkpointing, which needs less memory but a third more computation.
    recompute: bool = runtime_field(False)
    # Whether to compile the Transformer blocks with torch.compile. All micro-batches are then padded to the
    # same shape, so that the blocks are compiled only once.
    compile: bool = runtime_field(False)
    device: str = runtime_field("auto")  # cpu, cuda, cuda:1, ...; auto: cuda if available, otherwise cpu
    workers: int = runtime_field(0)  # number of DataLoader workers per process; 0: no separate workers
    log_every: int = runtime_field(50)  # number of steps between log lines
    # Destination of training curves in addition to metrics.jsonl: TensorBoard event files, or a Weights &
    # Biases run (offline unless the environment variable WANDB_MODE is set).
    tracker: Literal["tensorboard", "wandb"] = runtime_field("tensorboard")
    save_every: int = runtime_field(1000)  # number of steps between checkpoints
    keep_last: int = runtime_field(2)  # number of newest checkpoints to keep
    # Also keep the checkpoints at multiples of this number of steps, which save_every must divide; 0: none.
    keep_every: int = runtime_field(0)
    valid_every: int = 1000  # number of steps between validations; 0: never validate

    def __post_init__(self) -> None:
        errors = range_errors(
            self,
            {
                "positive": ("batch_seconds", "micro_seconds", "lr"),
                "at least 1": ("max_steps", "groups", "log_every", "save_every", "keep_last"),
                "at least 0": ("eps", "weight_decay", "clip_norm", "workers", "keep_every", "valid_every"),
                "in [0, 1]": ("warmup", "hold", "final_lr"),
            },
        )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            errors.append(f"betas is {list(self.betas)}, but must be two numbers in [0, 1)")
        if self.sharded and self.engine != "torch":
            errors.append(f"sharded=true requires engine=torch, but engine is {self.engine}")
        if self.save_every > 0 and self.keep_every % self.save_every:
            errors.append(
                f"keep_every is {self.keep_every}, but must be a multiple of save_every ({self.save_every})"
            )
        if self.warmup + (self.hold if self.schedule == "tri_stage" else 0) > 1:
            errors.append("warmup and hold are fractions of max_steps and must not add up to more than 1")
        if self.micro_seconds is not None and self.micro_seconds > self.batch_seconds:
            errors.append(
                f"micro_seconds is {self.micro_seconds}, but must be at most batch_seconds "
                f"({self.batch_seconds})"
            )
        raise_config_errors(errors)

    @property
    def batch_sizes(self) -> BatchSizes:
        groups = self.groups or groups_per_update(self.batch_seconds)
        return BatchSizes(self.batch_seconds / groups, groups, self.micro_seconds, self.compile)

    def check_processes(self, processes: int, longest: float) -> None:
        """Check that an update of full groups has at least one utterance per process.

        Processes without an utterance would only compute fillers (see `MicroBatch`). In a few updates of a
        run, that is harmless, but here it would happen often.

        Args:
            longest: length of the longest utterance in seconds.

        Raises:
            ConfigError: there are too many processes.
        """
        sizes = self.batch_sizes
        fewest = max(1, sizes.groups * int(sizes.group_seconds / longest + 1e-6))  # tolerates rounding
        if processes > fewest:
            raise ConfigError(
                f"train.batch_seconds: an update of {sizes.groups} group{'s'[: sizes.groups > 1]} of "
                f"{sizes.group_seconds:g} s may have only {fewest} utterance{'s'[: fewest > 1]} for "
                f"{processes} processes; start fewer processes, or increase train.groups or "
                "train.batch_seconds"
            )


def lr_at(step: int, config: TrainConfig) -> float:
    """Compute the learning rate of a step, counted from 0.

    The schedule "linear" consists of a linear warm-up and a linear decay to `final_lr * lr` (fairseq's
    polynomial_decay with power 1). The schedule "tri_stage" consists of a warm-up that starts at 1 % of `lr`,
    a constant phase, and an exponential decay to `final_lr * lr` (SpecAugment; fairseq's tri_stage).
    """
    warmup = max(1, round(config.warmup * config.max_steps))
    if config.schedule == "linear":
        if step < warmup:
            return config.lr * (step + 1) / warmup
        remaining = (config.max_steps - step) / max(1, config.max_steps - warmup)
        return config.lr * (config.final_lr + (1 - config.final_lr) * max(0.0, remaining))
    if step < warmup:
        return config.lr * (0.01 + 0.99 * step / warmup)
    decay_start = warmup + round(config.hold * config.max_steps)
    if step < decay_start:
        return config.lr
    progress = min(1.0, (step - decay_start) / max(1, config.max_steps - decay_start))
    return config.lr * math.exp(math.log(max(config.final_lr, 1e-8)) * progress)


def build_optimizer(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Create a fused AdamW optimizer for all trainable parameters, with moments initialized to zero.

    By default, AdamW creates the moments of a parameter when it gets its first gradient. A checkpoint that is
    saved while the encoder is frozen or layers are dropped would lack some moments and could not be loaded.
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
                # The fused kernel expects the step count on the device of the parameter.
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    return optimizer


def pick_precision(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the autocast dtype for `config.precision`; float32 disables autocast.

    Raises:
        ConfigError: fp16 was requested on a CPU, where it is several times slower than float32.
    """
    if config.precision == "auto":
        return preferred_dtype(device)
    if config.precision == "fp16" and device.type == "cpu":
        raise ConfigError("precision=fp16 is slower than fp32 on a CPU; use precision=fp32 or bf16")
    return DTYPES[config.precision]


def with_precision(config: TrainConfig, out: Path) -> TrainConfig:
    """Return `config` with a fixed precision, so that a resumed run keeps that in which it was started.

    With precision=auto, the precision is recorded in `out` when the run starts. The machine that resumes the
    run may prefer another one.
    """
    if config.precision != "auto":
        return config
    path, preferred = out / PRECISION, preferred_dtype(distributed.process_device(config.device))
    name = next(name for name, dtype in DTYPES.items() if dtype is preferred)

    def recorded() -> Any:
        if not path.exists():
            write_json(path, {"precision": name})
        return read_record(path)["precision"]

    saved = distributed.rank0_broadcast(recorded)
    if saved != name and distributed.rank() == 0:
        log.warning(
            "the run continues in %s, as it was started, although this machine would use %s; to change this, "
            "start another run with train.precision=%s",
            saved, name, name,
        )  # fmt: skip
    return replace(config, precision=saved)
