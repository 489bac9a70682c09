"""The default training engine, written in plain PyTorch, for one or several processes.

The engine is not specific to speech: it trains any `Trainable` module. Gradients of summed losses are
accumulated over micro-batches, divided by the sum of `Loss.count` in all processes, clipped and applied. The
random state of every micro-batch is seeded from its position in the data. Results therefore depend neither on
interruptions nor on the number of DataLoader workers. If the number of processes divides the number of
micro-batches, it changes only the order of additions, that is, the rounding.

The engine writes `checkpoints/step_N/`, `best_N.safetensors`, `metrics.jsonl`, and `tensorboard/` or `wandb/`
to `out`.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node

from jahubert.errors import JahubertError, Stopped
from jahubert.model import kernels
from jahubert.model.precision import autocast
from jahubert.train.data.sampler import MicroBatch
from jahubert.train.experiment import distributed
from jahubert.train.trainer.checkpoints import Checkpoints, checkpoint_folder
from jahubert.train.trainer.loader import (
    DataSource,
    DataState,
    DeviceCopy,
    MicroBatches,
    check_shared_memory,
    micro_batches,
    seed_micro_batch,
)
from jahubert.train.trainer.metric_log import MetricLog, Window
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, lr_at, pick_precision
from jahubert.train.trainer.parallel import Parallel, full_norm, wrap_blocks
from jahubert.train.trainer.stop import StopDeadlineError, StopSignals, stop_signals

log = logging.getLogger(__name__)

# An fp16 run ends when its loss scale falls below this value. From the initial scale, this takes about thirty
# consecutive overflows. fairseq uses the same value.
MIN_LOSS_SCALE = 1e-4
# Seconds to wait for data after a stop signal, with one process and with several. Several processes wait
# longer to finish the step, because all of them must take part in saving a checkpoint.
SINGLE_PROCESS_DATA_SECONDS, DATA_SECONDS = 1.0, 20.0
VALIDATION_SECONDS = 30.0  # maximum time for which validation continues after a stop signal


@dataclass(frozen=True)
class Loss:
    """The summed loss of one micro-batch and the sums from which metrics are computed."""

    total: Tensor  # summed loss of the micro-batch
    # Number of targets or, in CTC training, of utterances. Gradients are divided by its sum over a step.
    count: Tensor | float
    sums: dict[str, Tensor | float]  # additional sums for the metrics

    def discarded(self) -> Loss:
        """Return a loss of zero, with gradients of zero, for a filler micro-batch."""
        sums = {name: 0.0 * value for name, value in self.sums.items()}
        return Loss(0.0 * self.total, 0.0 * self.count, sums)


# In a module's output, FSDP2 of torch 2.9.1 finds only the tensors of pytree nodes. If it finds none and the
# blocks have no gradients, it does not reduce the gradients of the root module.
register_pytree_node(Loss, lambda loss: (list(vars(loss).values()), None), lambda values, _: Loss(*values))


class Trainable(Protocol):
    """Protocol of an `nn.Module` that computes its own loss."""

    seed: int  # random seed for dropout and layer drop
    has_unused_parameters: bool  # whether some parameters may get no gradient (layer drop, frozen phases)
    blocks: Sequence[nn.Module]  # units of sharding (FSDP2), activation checkpointing and torch.compile

    def __call__(self, batch: Any, step: int) -> Loss: ...
    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Compute metrics, including "loss", from the totals of `Loss.sums` and `Loss.count`."""
        ...


def check_finite_loss(
    total: float, step: int, losses: Sequence[tuple[MicroBatch, Tensor | float]], data: DataSource
) -> None:
    """Raise an error that names the utterances if the summed loss of a step is not finite.

    Args:
        total: loss summed over all processes.
        losses: the micro-batches of this process, with their losses.
    """
    if math.isfinite(total):
        return
    for micro, loss in losses:
        if not math.isfinite(loss):
            names = ", ".join(repr(data.name(row)) for row in micro.rows[:8])
            more = " ..." if len(micro.rows) > 8 else ""
            raise JahubertError(
                f"step {step}: non-finite loss {float(loss)} in micro-batch {micro.index} of epoch "
                f"{micro.epoch}; the step was skipped. Utterances: {names}{more}. Exclude broken recordings; "
                "if there are none, lower train.lr or set train.precision=fp32"
            )
    error = JahubertError(f"step {step}: non-finite loss {total} in another process")
    error.reported = True  # the other process reports the error and names the utterances
    raise error


def check_finite_norm(norm: float, step: int) -> None:
    """Raise an error if the gradient norm is not finite."""
    if not math.isfinite(norm):
        raise JahubertError(
            f"step {step}: non-finite gradient norm {norm} although the loss is finite; the step was skipped "
            "and the last checkpoint is kept. Lower train.lr or set train.precision=fp32"
        )


def overflow_error(step: int) -> JahubertError:
    """Create the error that ends an fp16 run whose gradients overflow at every loss scale."""
    return JahubertError(
        f"step {step}: float16 gradients overflow at every loss scale; the last steps were skipped and the "
        "last checkpoint is kept. Lower train.lr, or set train.precision=bf16 or fp32"
    )


def stopped_error(stop: StopSignals, step: int) -> Stopped:
    """Create the error that ends a run after this or another process received a stop signal."""
    signal_name = stop.names[0] if stop else None
    cause = f"received {signal_name}" if signal_name else "another process received a stop signal"
    return Stopped(f"{cause}: checkpoint saved at step {step}; rerun the same command to resume", signal_name)


def train(
    module: nn.Module,
    data: DataSource,
    config: TrainConfig,
    out: Path,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    best: str | None = None,
) -> dict[str, float]:
    """Train `module` (a `Trainable`) up to `config.max_steps`, resuming from the newest checkpoint in `out`.

    Args:
        validate: function that computes validation metrics of the module. It is called in all processes.
        best: name of the validation metric to minimize. The weights with the lowest value are saved to
            `best_N.safetensors`, where N is the step, and loaded into the module at the end.

    Returns:
        The metrics of the best step if `best` is given and there was a validation, otherwise the last
        training metrics.

    Raises:
        Stopped: a stop signal was received, and a checkpoint was saved.
        ConfigError: the device is unavailable or does not support the precision, there is too little shared
            memory for the DataLoader workers, or the tracker cannot be started.
        MissingExtraError: the tracker is wandb, which is not installed.
        StaleError: `out` contains checkpoints from another engine.
        DataError: the newest intact checkpoint or the file of the best weights cannot be read.
        JahubertError: the loss or the gradient norm is not finite, float16 gradients overflow at every loss
            scale, or a stop signal was received and no checkpoint could be saved in time.

    Exceptions that `data` and `validate` raise propagate.
    """
    check_shared_memory(config)
    if config.sharded and distributed.world() == 1:
        log.warning("train.sharded=true has no effect with a single process")
    run = _TrainingRun(module, data, config, out)
    run.restore()
    with stop_signals() as run.stop, closing(run):
        while run.step < config.max_steps:
            run.train_step()
            if validate is not None and run.metric_log.validation_due(run.step):
                run.validate(validate, best)
            if run.step % config.save_every == 0 or run.step == config.max_steps or run.stop_requested:
                run.save()
            if run.stop_requested:  # checked after the last step too, so that the stage does not continue
                raise stopped_error(run.stop, run.step)
    metrics = run.metric_log.close(best)
    run.parallel.unshard_parameters()
    return metrics


class _TrainingRun:
    """The state of one training run."""

    def __init__(self, module: nn.Module, data: DataSource, config: TrainConfig, out: Path):
        self.device = distributed.process_device(config.device)
        self.dtype = pick_precision(config, self.device)
        self.module, self.data, self.config = module.to(self.device), data, config
        wrap_blocks(module.blocks, config.recompute, config.compile)  # type: ignore[arg-type]
        self.parallel = Parallel(self.module, config.sharded)
        self.optimizer = build_optimizer(module, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.checkpoints = Checkpoints(checkpoint_folder(out, "torch"), config)
        self.step = 0
        self.data_state = DataState(data.sampler)
        self.metric_log = MetricLog(module, config, out)
        self.micro_batches: MicroBatches | None = None
        self.to_device = DeviceCopy(self.device)
        self.window = Window()
        self.stop = StopSignals()  # the signals that this process has received
        self.stop_requested = False  # True if any process has received a stop signal

    def close(self) -> None:
        if self.micro_batches is not None:
            self.micro_batches.close()
        self.parallel.release()

    def train_step(self) -> None:
        """Compute the gradients of all micro-batches of a step and update the weights."""
        if self.micro_batches is None:
            self.micro_batches = micro_batches(
                self.data, self.config, self.device, **self.data_state.state_dict()
            )
            self.module.train()
        step = self.step + 1
        sums: dict[str, Any] = {}
        losses = []
        self.optimizer.zero_grad(set_to_none=True)
        accumulation_steps = len(self.data_state.micro_batches())
        # Sharded weights are gathered block by block: shared copies would keep all of them in memory.
        with kernels.shared_weight_copies(not self.config.sharded):
            for number in range(accumulation_steps):
                micro, batch = self._next_micro_batch(self.micro_batches)
                distributed.heartbeat(f"computing step {step}")
                last = number == accumulation_steps - 1
                loss = self._backward(micro, self.to_device(batch), last)
                for name, value in {"total": loss.total, "count": loss.count, **loss.sums}.items():
                    value = value.detach() if isinstance(value, Tensor) else value
                    sums[name] = sums.get(name, 0.0) + value
                losses.append((micro, loss.total.detach()))
        totals = distributed.all_reduce_sums(sums | {"stop": len(self.stop.names)}, self.device)
        self.stop_requested = totals.pop("stop") > 0
        check_finite_loss(totals["total"], step, losses, self.data)
        norm = self._update(totals["count"])
        self.step = step
        self.data_state.advance()
        self.window.add(totals, norm)
        if self.step % self.config.log_every == 0 or self.step == self.config.max_steps:
            self.metric_log.training(self.step, *self.window.close())

    def _next_micro_batch(self, stream: MicroBatches) -> tuple[MicroBatch, Any]:
        """Return the next micro-batch, unless a stop signal interrupts a long wait for it."""
        distributed.heartbeat(f"reading the audio of step {self.step + 1}")
        started = time.perf_counter()
        single_process = distributed.world() == 1
        try:
            with self.stop.deadline(SINGLE_PROCESS_DATA_SECONDS if single_process else DATA_SECONDS):
                micro_batch = next(stream)
        except StopDeadlineError as error:
            if single_process and self.step:  # the gradients so far are dropped; resuming repeats the step
                self.save()
                raise stopped_error(self.stop, self.step) from None
            raise StopDeadlineError(
                f"{error} while waiting for the data of step {self.step + 1}; rerun the same command to "
                "resume from the last checkpoint"
            ) from None
        self.window.waiting += time.perf_counter() - started
        return micro_batch

    def _backward(self, micro: MicroBatch, batch: Any, last: bool) -> Loss:
        seed_micro_batch(self.module.seed, micro)  # type: ignore[arg-type]
        with self.parallel.accumulating(last):
            with autocast(self.dtype, self.device):
                loss: Loss = self.parallel(batch, self.step)
            loss = loss.discarded() if micro.is_filler else loss
            self.scaler.scale(loss.total).backward()
        return loss

    def _update(self, count: float) -> float:
        """Apply the accumulated gradients and return their norm before clipping."""
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.module.parameters() if p.grad is not None]
        # Data parallelism averages gradients over processes, but the loss is sum / global count.
        torch._foreach_mul_([cast(Tensor, p.grad) for p in parameters], distributed.world() / max(count, 1.0))
        limit = self.config.clip_norm or math.inf
        norm = full_norm(torch.nn.utils.clip_grad_norm_(parameters, limit) if parameters else torch.zeros(()))
        if not self.scaler.is_enabled():  # with fp16, the scaler itself skips such steps
            check_finite_norm(norm, self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, self.config)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < MIN_LOSS_SCALE:
            raise overflow_error(self.step + 1)
        return norm

    def validate(self, validate: Callable[[], dict[str, float]], best: str | None) -> None:
        distributed.heartbeat(f"validating after step {self.step}")
        started = time.perf_counter()
        try:
            with self.stop.deadline(VALIDATION_SECONDS), self.parallel.unsharded():
                self.metric_log.validate(self.step, validate, best)
        except StopDeadlineError as error:
            raise StopDeadlineError(
                f"{error} during the validation after step {self.step}; rerun the same command to resume "
                "from the last checkpoint"
            ) from None
        self.window.started += time.perf_counter() - started

    def save(self) -> None:
        distributed.heartbeat(f"saving the checkpoint of step {self.step}")
        state = {
            "step": self.step,
            **self.data_state.state_dict(),
            **self.metric_log.state_dict(),
            "window": self.window.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        self.checkpoints.save(self.step, self.module, self.optimizer, state)
        if distributed.rank() == 0:
            self.metric_log.delete_old_best(self.checkpoints.states())

    def restore(self) -> None:
        """Load the newest intact checkpoint, if any."""
        if state := self.checkpoints.load(self.module, self.optimizer):
            self.step = state["step"]
            self.data_state.load_state_dict(state)
            self.metric_log.load_state_dict(state)
            self.scaler.load_state_dict(state["scaler"])
            self.window.load_state_dict(state["window"])
            log.info("resuming at step %d", self.step)
        self.metric_log.trim(self.step)
