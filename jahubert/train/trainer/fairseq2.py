"""Alternative training engine based on fairseq2's Trainer, gangs and checkpoint manager.

If the number of processes is a power of two, results are bit-identical to those of the default engine
(`trainer.py`), with two exceptions. fairseq2 repeats a step whose float16 gradients overflow, while the
default engine skips it. If the gradient is not finite but the loss is, the error is detected only through the
loss of the next step.

Two parts of fairseq2 are not used: the recipe runner, because it logs all environment variables, and the data
pipeline, because its checkpoints contain decoded audio but no random state.

The engine writes `checkpoints_fairseq2/` (fairseq2's step_N folders and run.json), `best_N.safetensors`,
`metrics.jsonl`, and `tensorboard/` or `wandb/` to `out`. The checkpoints contain pickles, so resume only your
own runs. Resuming requires the same number of processes. The engine was written for fairseq2 0.8.1 and
imports three private names from it.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import soundfile  # noqa: F401  this import loads the libsndfile that fairseq2 needs
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from jahubert.errors import MissingExtraError, StaleError
from jahubert.train.data.sampler import MicroBatch
from jahubert.train.experiment import distributed
from jahubert.train.experiment.provenance import read_record, write_json
from jahubert.train.trainer.checkpoints import checkpoint_folder
from jahubert.train.trainer.loader import (
    DataSource,
    DataState,
    MicroBatches,
    check_shared_memory,
    micro_batches,
    seed_micro_batch,
)
from jahubert.train.trainer.metric_log import MetricLog, Window
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, lr_at, pick_precision
from jahubert.train.trainer.parallel import finds_unused_parameters, wrap_blocks
from jahubert.train.trainer.stop import StopDeadlineError, StopSignals, stop_signals
from jahubert.train.trainer.trainer import (
    DATA_SECONDS,
    check_finite_loss,
    overflow_error,
    stopped_error,
)

# If CONDA_PREFIX is set, fairseq2 does not use the system's search path for libsndfile.
_conda = os.environ.pop("CONDA_PREFIX", None)
try:
    import fairseq2.recipe  # noqa: F401  imported before fairseq2.trainer to avoid a circular import
    from fairseq2.checkpoint import NOOP_HG_EXPORTER, StandardCheckpointManager
    from fairseq2.datasets import DataReader
    from fairseq2.early_stopper import NOOP_EARLY_STOPPER
    from fairseq2.file_system import NativeLocalFileSystem
    from fairseq2.gang import Gangs, ProcessGroupGang, create_fake_gangs, create_parallel_gangs
    from fairseq2.io import _TorchTensorFileDumper, _TorchTensorFileLoader
    from fairseq2.metrics import Mean, MetricBag
    from fairseq2.metrics.recorders import MetricRecorder
    from fairseq2.nn.ddp import to_ddp
    from fairseq2.optim.fp16_loss_scaler import NOOP_FP16_LOSS_SCALER, StandardFloat16LossScaler
    from fairseq2.profilers import NOOP_PROFILER
    from fairseq2.task import TaskStopException
    from fairseq2.trainer import MinimumLossScaleReachedError, Trainer, TrainUnit
    from fairseq2.utils.device_stat import NOOP_DEVICE_STAT_TRACKER
    from fairseq2.utils.gc import NOOP_GARBAGE_COLLECTOR
    from fairseq2.utils.progress import NOOP_PROGRESS_REPORTER
    from fairseq2.utils.stopwatch import Stopwatch
    from fairseq2.utils.threading import _StandardThreadPool
    from fairseq2.validator import NOOP_VALIDATOR
    from torcheval.metrics import Metric
except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] not in ("fairseq2", "fairseq2n", "torcheval"):
        raise
    raise MissingExtraError("fairseq2", "fairseq2") from error
finally:
    if _conda is not None:
        os.environ["CONDA_PREFIX"] = _conda

SUMS = "total_sums"  # the Trainer resets every metric at each publication unless its name starts with total_
MIN_TARGETS = 1e-30  # a process that reports zero targets would not take part in the all-reduce


def train(
    module: nn.Module,
    data: DataSource,
    config: TrainConfig,
    out: Path,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    best: str | None = None,
) -> dict[str, float]:
    """Train `module`, as a drop-in replacement for `jahubert.train.trainer.trainer.train`.

    Raises:
        StaleError: the checkpoints were saved by another engine or by a different number of processes.
        Stopped, ConfigError, DataError, JahubertError: as in the default engine.
    """
    check_shared_memory(config)
    run = _TrainingRun(module, data, config, out, validate, best)
    with stop_signals() as run.stop, closing(run.reader):
        if run.step < config.max_steps:  # a Trainer that resumes at the last step trains one more step
            run.train_steps()
            if run.stop_requested:
                raise stopped_error(run.stop, run.step)
        else:
            run.manager.load_model_state(run.step, module)
        run.validate(run.step)
    run.save_state()
    distributed.barrier()
    run.metric_log.load_state_dict(read_record(run.state_path))  # rank 0 computed the last training metrics
    return run.metric_log.close(best)


class _TrainingRun:
    """The state of one training run. The classes below adapt it to fairseq2's interfaces."""

    def __init__(
        self,
        module: nn.Module,
        data: DataSource,
        config: TrainConfig,
        out: Path,
        validation: Callable[[], dict[str, float]] | None,
        best: str | None,
    ):
        self.device = distributed.process_device(config.device)
        self.dtype = pick_precision(config, self.device)
        self.accumulation_steps = 0  # number of micro-batches that this process computes in the current step
        self.folder = checkpoint_folder(out, "fairseq2")
        self.module, self.data, self.config = module.to(self.device), data, config
        wrap_blocks(module.blocks, config.recompute, config.compile)  # type: ignore[arg-type]
        self.validation, self.best = validation, best
        self.metric_log, self.reader = MetricLog(module, config, out), _Reader(self)
        self.gangs = _gangs(self.device)
        files = NativeLocalFileSystem()
        tensors = _TorchTensorFileLoader(files), _TorchTensorFileDumper(files)
        self.manager = StandardCheckpointManager(
            out, self.gangs, files, *tensors, _StandardThreadPool(1), checkpoint_dir=self.folder
        )
        self.state_path = self.folder / "run.json"
        self.stop = StopSignals()  # the signals that this process has received
        self.stop_requested = False  # True if any process has received a stop signal
        self.metric_bag: MetricBag  # set by the Trainer
        self.step = self.manager.maybe_get_last_step_number(exclude_model_only=True) or 0
        self.validated, self.window, self.overflows = 0, Window(), 0
        self._restore()

    def _restore(self) -> None:
        """Check the checkpoint that the Trainer will load, and load state that fairseq2 does not store."""
        self.folder.mkdir(parents=True, exist_ok=True)
        n_saved = len(list((self.folder / f"step_{self.step}" / "trainer").glob("rank_*.pt")))
        if self.step and n_saved != distributed.world():
            raise StaleError(
                f"{self.folder}: the number of processes is {distributed.world()}, but was {n_saved} when "
                f"step {self.step} was saved; change it to {n_saved}, or start again with "
                "train.engine=torch, whose checkpoints can be loaded by any number of processes"
            )
        if self.step and self.state_path.exists():
            state = read_record(self.state_path)
            self.metric_log.load_state_dict(state)
            self.validated = min(state["validated"], self.step)  # validations after this step are repeated
        self.metric_log.trim(self.step)
        distributed.barrier()

    def save_state(self) -> None:
        """Save the state that fairseq2's checkpoints do not contain."""
        if distributed.rank() == 0:
            write_json(self.state_path, {"validated": self.validated, **self.metric_log.state_dict()})
            self.metric_log.delete_old_best([])

    def train_steps(self) -> None:
        """Run fairseq2's Trainer until the last step or until a stop signal is received."""
        config, wrapped = self.config, self.module
        if distributed.world() > 1:  # normalize_grads keeps its default True, because False fails
            wrapped = to_ddp(
                self.module, self.gangs, find_unused_parameters=finds_unused_parameters(self.module)
            )
        optimizer = build_optimizer(self.module, config)
        fp16, unit = self.dtype is torch.float16, _Unit(self, wrapped)
        trainer = Trainer(
            model=wrapped,
            unit=unit,
            data_reader=self.reader,
            gangs=self.gangs,
            amp=self.dtype is not torch.float32,
            amp_dtype=self.dtype,
            optimizer=optimizer,
            lr_scheduler=_Schedule(optimizer, config),
            fp16_loss_scaler=StandardFloat16LossScaler(self.gangs) if fp16 else NOOP_FP16_LOSS_SCALER,
            validator=NOOP_VALIDATOR,  # a validator would run after saving; see _Unit.set_step_nr
            early_stopper=NOOP_EARLY_STOPPER,
            checkpoint_manager=self.manager,
            hg_exporter=NOOP_HG_EXPORTER,
            metric_recorder=_Recorder(self, unit),
            garbage_collector=NOOP_GARBAGE_COLLECTOR,
            profiler=NOOP_PROFILER,
            device_stat_tracker=NOOP_DEVICE_STAT_TRACKER,
            wall_watch=Stopwatch(),
            progress_reporter=NOOP_PROGRESS_REPORTER,
            seed=0,  # unused: every micro-batch is seeded
            no_sync_grad_accumulation=distributed.world() > 1,
            max_grad_norm=config.clip_norm or None,
            max_num_steps=None,  # with a limit, request_stop() would have no effect
            checkpoint_every_n_steps=config.save_every,
            keep_last_n_checkpoints=config.keep_last,
            keep_checkpoint_every_n_steps=config.keep_every or None,
            # _Recorder logs only those steps that are due
            publish_metrics_every_n_steps=math.gcd(config.log_every, config.save_every),
        )
        unit.trainer = trainer
        try:
            trainer.run()
        except MinimumLossScaleReachedError as error:
            raise overflow_error(trainer.step_nr) from error
        except TaskStopException:  # raised because every run ends with request_stop()
            pass
        self.step = trainer.step_nr
        trainer.close()

    def validate(self, step: int) -> None:
        """Validate after `step` if a validation is due and was not completed before a restart."""
        if self.validation is None or step <= self.validated or not self.metric_log.validation_due(step):
            return
        distributed.heartbeat(f"validating after step {step}")
        started = time.perf_counter()
        self.metric_log.validate(step, self.validation, self.best)
        self.window.started += time.perf_counter() - started
        self.validated = step
        self.save_state()


class _LazyBatch:
    """A micro-batch that is loaded only when the Trainer moves it to the device."""

    def __init__(self, reader: _Reader):
        self.reader = reader
        self.micro: MicroBatch
        self.batch: Any

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        self.micro, batch = self.reader.read()
        self.batch = batch.to(device)


class _Reader(DataReader):
    """Endless iterator over training steps. Each item is the list of micro-batches for this process."""

    def __init__(self, run: _TrainingRun):
        self.run, self.data_state = run, DataState(run.data.sampler)
        self.micro_batches: MicroBatches | None = None

    def close(self) -> None:
        if self.micro_batches is not None:
            self.micro_batches.close()

    def __iter__(self) -> Iterator[list[_LazyBatch]]:
        return self

    def __next__(self) -> list[_LazyBatch]:
        run = self.run
        if self.micro_batches is None:
            state = self.data_state.state_dict()
            self.micro_batches = micro_batches(run.data, run.config, run.device, **state)
        run.accumulation_steps = len(self.data_state.micro_batches())
        self.data_state.advance()
        return [_LazyBatch(self) for _ in range(run.accumulation_steps)]

    def read(self) -> tuple[MicroBatch, Any]:
        assert self.micro_batches is not None  # set by __next__
        distributed.heartbeat("reading audio")
        started = time.perf_counter()
        try:
            with self.run.stop.deadline(DATA_SECONDS):
                micro_batch = next(self.micro_batches)
        except StopDeadlineError as error:
            raise StopDeadlineError(
                f"{error} while waiting for data; rerun the same command to resume from the last checkpoint"
            ) from None
        self.run.window.waiting += time.perf_counter() - started
        distributed.heartbeat("computing a step")
        return micro_batch

    def reset(self) -> None: ...  # called at the end of the data, which is never reached

    def state_dict(self) -> dict[str, object]:
        # The Trainer does not save gradient norms. `recent` contains the norms since the last publication.
        window, recent = self.run.window, self.run.metric_bag.get("grad_norm", Mean)
        norm = window.norm + float(recent.weighted_sum)
        steps = window.steps + int(recent.weights)
        return {**self.data_state.state_dict(), "norm": norm, "steps": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.data_state.load_state_dict(state_dict)
        if self.run.step % self.run.config.log_every:
            self.run.window.norm = state_dict["norm"]
            self.run.window.steps = state_dict["steps"]

    @property
    def num_accumulate(self) -> int:
        return self.run.accumulation_steps


class _Schedule(LRScheduler):
    """Learning-rate schedule of `lr_at`. LambdaLR would multiply by a factor and round differently."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig):
        self.config = config
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [lr_at(self.last_epoch, self.config)] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}


class _Sums(Metric):
    """Named sums over all processes since the last log line, which are saved in checkpoints."""

    def __init__(self, *, device: torch.device | None = None):
        super().__init__(device=device)
        self.sums: dict[str, Tensor]
        self._add_state("sums", {})

    @torch.inference_mode()
    def update(self, values: Mapping[str, Tensor | float]) -> _Sums:
        for name, value in values.items():
            value = torch.as_tensor(value, dtype=torch.float64, device=self.device).detach()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        return self

    @torch.inference_mode()
    def compute(self) -> dict[str, Tensor]:
        return dict(self.sums)

    @torch.inference_mode()
    def merge_state(self, metrics: Sequence[_Sums]) -> _Sums:
        for metric in metrics:
            self.update(metric.sums)
        return self


class _Unit(TrainUnit):
    """Training unit that validates before a step, and checks losses and stop requests before the update."""

    def __init__(self, run: _TrainingRun, wrapped: nn.Module):
        self.run, self.wrapped = run, wrapped
        self.trainer: Trainer
        self.step = -1
        self.stopping = False  # True if this step is the last one or a stop was requested

    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        self.run.metric_bag = metric_bag
        metric_bag.add(SUMS, _Sums())

    def set_step_nr(self, step_nr: int) -> None:
        """Prepare for step `step_nr`, counted from 1."""
        if self.step == step_nr - 1:
            self.run.overflows += 1  # the Trainer repeats the step
        self.step = step_nr - 1
        self.run.validate(self.step)
        if self.step % self.run.config.log_every == 0:
            self.run.metric_bag.get(SUMS, _Sums).reset()
        self.losses: list[tuple[MicroBatch, Tensor]] = []
        self.total: Tensor | float = 0.0

    def process_batch(self, batch: _LazyBatch, metric_bag: MetricBag) -> tuple[Tensor, float]:
        seed_micro_batch(self.run.module.seed, batch.micro)  # type: ignore[arg-type]
        loss = self.wrapped(batch.batch, self.step)
        loss = loss.discarded() if batch.micro.is_filler else loss
        metric_bag.get(SUMS, _Sums).update({"total": loss.total, "count": loss.count, **loss.sums})
        self.total = self.total + loss.total.detach()
        self.losses.append((batch.micro, loss.total.detach()))
        if len(self.losses) == self.run.accumulation_steps:
            self._synchronize()
        return loss.total, max(float(loss.count), MIN_TARGETS)

    def _synchronize(self) -> None:
        """Combine the losses and stop requests of all processes, so that all make the same decision."""
        run = self.run
        totals = distributed.all_reduce_sums({"total": self.total, "stop": len(run.stop.names)}, run.device)
        check_finite_loss(totals["total"], self.step + 1, self.losses, run.data)
        run.stop_requested = totals["stop"] > 0
        self.stopping = run.stop_requested or self.step + 1 >= run.config.max_steps
        if self.stopping:
            self.trainer.request_stop()  # takes effect after this step


class _Recorder(MetricRecorder):
    """Passes the metrics that the Trainer publishes on rank 0 to the metric log."""

    def __init__(self, run: _TrainingRun, unit: _Unit):
        self.run, self.unit = run, unit

    def record_metric_values(self, category: str, values: Any, step_nr: int | None = None) -> None:
        run, config = self.run, self.run.config
        assert step_nr is not None  # the Trainer always passes it
        window, steps = run.window, step_nr - run.step
        run.step = step_nr
        window.norm += steps * float(values["grad_norm"])
        window.steps += steps
        if step_nr % config.log_every == 0 or step_nr == config.max_steps:
            window.sums = {name: float(value) for name, value in values[SUMS].items()}
            window.steps += run.overflows
            window.overflows = run.overflows
            run.overflows = 0
            run.metric_log.training(step_nr, *window.close())
        if self.unit.stopping:
            run.save_state()

    def close(self) -> None: ...


class _SharedGangs(Gangs):
    """Gangs that keep the process group when Trainer.run() closes them."""

    def close(self) -> None: ...


def _gangs(device: torch.device) -> Gangs:
    if distributed.world() == 1:
        gangs = create_fake_gangs(device)
    else:  # ProcessGroupGang.create_default_process_group refuses an existing group
        gangs = create_parallel_gangs(ProcessGroupGang(dist.group.WORLD, device))
    return _SharedGangs(**{field.name: getattr(gangs, field.name) for field in fields(gangs)})
