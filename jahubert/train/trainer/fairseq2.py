"""The second engine: fairseq2's Trainer, gangs, checkpoint manager and recorders around the same objects.

Bit-identical to `jahubert.train.trainer.trainer` where the number of processes is a power of two.
Two differences are left: a step whose float16 gradients overflow is repeated here, and a step there; and a
gradient that is no number under a loss that is one is found by the loss of the next step.

Its `run` of recipes, which logs every environment variable, and its data pipeline, which saves decoded
audio and not the random state, are not used.

Under `out`: `checkpoints_fairseq2/` (fairseq2's step_N folders, and run.json), `best.safetensors`,
`metrics.jsonl`. A checkpoint holds pickles, so continue your own runs only, and as many processes as saved
it must load it. Written against fairseq2 0.8.1; three of the names below are private there.
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

import soundfile  # noqa: F401  fairseq2 needs libsndfile, and finds the one that this has loaded
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from jahubert.errors import MissingExtraError, StaleError
from jahubert.train.data.sampler import MicroBatch
from jahubert.train.experiment import distributed
from jahubert.train.experiment.provenance import read_record, write_json
from jahubert.train.trainer.checkpoints import folder_of
from jahubert.train.trainer.metric_log import MetricLog, Window
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, lr_at, pick_precision
from jahubert.train.trainer.parallel import wrap_blocks
from jahubert.train.trainer.trainer import (
    Data,
    DataState,
    Micros,
    check_finite,
    micro_batches,
    overflowing,
    seed_micro,
    stop_signals,
    stopped,
)

_conda = os.environ.pop("CONDA_PREFIX", None)  # with it, fairseq2 looks for libsndfile in that folder only
try:
    import fairseq2.recipe  # noqa: F401  before the trainer, or their imports go round in a circle
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

SUMS = "total_sums"  # the Trainer resets a metric at every publication unless it is called total_...
AT_LEAST = 1e-30  # targets: a process without any would stay away from the sum over processes


def train(
    module: nn.Module,
    data: Data,
    config: TrainConfig,
    out: Path,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    best: str | None = None,
) -> dict[str, float]:
    """All as `engine.train`; and a checkpoint of another number of processes is a StaleError."""
    run = _Run(module, data, config, out, validate, best)
    with stop_signals() as signals, closing(run.reader):
        if run.step < config.max_steps:  # a Trainer that has nothing to do would do one step more
            run.steps(signals)
            if run.told:
                raise stopped(signals, run.step)
        else:
            run.manager.load_model_state(run.step, module)
        run.validate(run.step)
    run.write()
    distributed.barrier()
    run.journal.load(read_record(run.state))  # the line of the last step was computed on the first process
    return run.journal.close(best)


class _Run:
    """What one training run consists of, in our terms; the classes below hand it to fairseq2."""

    def __init__(
        self,
        module: nn.Module,
        data: Data,
        config: TrainConfig,
        out: Path,
        validation: Callable[[], dict[str, float]] | None,
        best: str | None,
    ):
        self.device = distributed.process_device(config.device)
        self.dtype = pick_precision(config, self.device)
        self.mine, self.folder = config.accumulation_steps(distributed.world()), folder_of(out, "fairseq2")
        self.module, self.data, self.config = module.to(self.device), data, config
        wrap_blocks(module.blocks, config.recompute, config.compile)  # type: ignore[arg-type]
        self.validation, self.best = validation, best
        self.journal, self.reader = MetricLog(module, config, out), _Reader(self)
        self.gangs = _gangs(self.device)
        files = NativeLocalFileSystem()
        tensors = _TorchTensorFileLoader(files), _TorchTensorFileDumper(files)
        self.manager = StandardCheckpointManager(
            out, self.gangs, files, *tensors, _StandardThreadPool(1), checkpoint_dir=self.folder
        )
        self.state = self.folder / "run.json"
        self.bag: MetricBag  # the Trainer's
        self.step = self.manager.maybe_get_last_step_number(exclude_model_only=True) or 0
        self.validated, self.window, self.overflows = 0, Window(), 0
        self._restore()

    def _restore(self) -> None:
        """Check the checkpoint that the Trainer will load, and load what stands beside it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        saved = len(list((self.folder / f"step_{self.step}" / "trainer").glob("rank_*.pt")))
        if self.step and saved != distributed.world():
            raise StaleError(
                f"{self.folder}: step {self.step} was saved by {saved} processes, but now there are "
                f"{distributed.world()}; start as many, or use engine=torch, whose checkpoints fit any number"
            )
        if self.step and self.state.exists():
            state = read_record(self.state)
            self.journal.load(state)
            self.validated = min(state["validated"], self.step)  # what came after it is done again
        self.journal.trim(self.step)
        distributed.barrier()

    def write(self) -> None:
        """Keep what fairseq2's checkpoints have no place for."""
        if distributed.rank() == 0:
            write_json(self.state, {"validated": self.validated, **self.journal.state()})

    def steps(self, signals: list[str]) -> None:
        """Let the Trainer work until the last step or a signal."""
        config, wrapped = self.config, self.module
        if distributed.world() > 1:  # leave its normalize_grads alone: False fails
            wrapped = to_ddp(
                self.module, self.gangs, find_unused_parameters=self.module.has_unused_parameters
            )
        optimizer = build_optimizer(self.module, config)
        fp16, unit = self.dtype is torch.float16, _Unit(self, wrapped, signals)
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
            validator=NOOP_VALIDATOR,  # it would come after saving; see _Unit.set_step_nr
            early_stopper=NOOP_EARLY_STOPPER,
            checkpoint_manager=self.manager,
            hg_exporter=NOOP_HG_EXPORTER,
            metric_recorder=_Recorder(self, unit),
            garbage_collector=NOOP_GARBAGE_COLLECTOR,
            profiler=NOOP_PROFILER,
            device_stat_tracker=NOOP_DEVICE_STAT_TRACKER,
            wall_watch=Stopwatch(),
            progress_reporter=NOOP_PROGRESS_REPORTER,
            seed=0,  # every micro-batch sets its own
            no_sync_grad_accumulation=distributed.world() > 1,
            max_grad_norm=config.clip_norm or None,
            max_num_steps=None,  # with a number, request_stop() does nothing
            checkpoint_every_n_steps=config.save_every,
            keep_last_n_checkpoints=config.keep_last,
            keep_checkpoint_every_n_steps=config.keep_every or None,
            # _Recorder writes the lines that are due.
            publish_metrics_every_n_steps=math.gcd(config.log_every, config.save_every),
        )
        unit.trainer = trainer
        try:
            trainer.run()
        except MinimumLossScaleReachedError as error:
            raise overflowing(trainer.step_nr) from error
        except TaskStopException:  # what always ends it
            pass
        self.step, self.told = trainer.step_nr, unit.told
        trainer.close()

    def validate(self, step: int) -> None:
        """Validate after `step` if that is due and was not done before the run was killed."""
        if self.validation is None or step <= self.validated or not self.journal.validation_due(step):
            return
        distributed.heartbeat(f"the validation after step {step}")
        started = time.perf_counter()
        self.journal.validate(step, self.validation, self.best)
        self.window.started += time.perf_counter() - started
        self.validated = step
        self.write()


class _Held:
    """A micro-batch for the Trainer, which calls `to` just before it computes: it is read only then."""

    def __init__(self, reader: _Reader):
        self.reader = reader
        self.micro: MicroBatch
        self.batch: Any

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        self.micro, batch = self.reader.read()
        self.batch = batch.to(device)


class _Reader(DataReader):
    """This process's micro-batches of one step at each `next`, without end; its state is two integers."""

    def __init__(self, run: _Run):
        self.run, self.position = run, DataState(run.data.sampler)
        self.stream: Micros | None = None

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def __iter__(self) -> Iterator[list[_Held]]:
        return self

    def __next__(self) -> list[_Held]:
        run = self.run
        if self.stream is None:
            self.stream = micro_batches(run.data, run.config, run.device, **self.position.state())
        self.position.forward(run.config.micro_batches_per_step)
        return [_Held(self) for _ in range(run.mine)]

    def read(self) -> tuple[MicroBatch, Any]:
        assert self.stream is not None  # __next__ made it
        distributed.heartbeat("the reading of audio")
        started = time.perf_counter()
        found = next(self.stream)
        self.run.window.waiting += time.perf_counter() - started
        distributed.heartbeat("the computation of a step")
        return found

    def reset(self) -> None: ...  # at the end of the data, which never comes

    def state_dict(self) -> dict[str, object]:
        # The Trainer forgets its norms; recent: since the last publication.
        window, recent = self.run.window, self.run.bag.get("grad_norm", Mean)
        norm, steps = window.norm + float(recent.weighted_sum), window.steps + int(recent.weights)
        return {**self.position.state(), "norm": norm, "steps": steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.position.load(state_dict)
        if self.run.step % self.run.config.log_every:
            self.run.window.norm, self.run.window.steps = state_dict["norm"], state_dict["steps"]

    @property
    def num_accumulate(self) -> int:
        return self.run.mine


class _Schedule(LRScheduler):
    """`lr_at` itself: a LambdaLR would multiply, and round."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: TrainConfig):
        self.config = config
        super().__init__(optimizer)

    def get_lr(self) -> list[float | Tensor]:
        return [lr_at(self.last_epoch, self.config)] * len(self.optimizer.param_groups)

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}


class _Sums(Metric):
    """Named sums since the last log line, over all processes; kept in checkpoints, unlike other metrics."""

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
    """One micro-batch, and what stands around a step: validation, a check of the loss, the wish to stop."""

    def __init__(self, run: _Run, wrapped: nn.Module, signals: list[str]):
        self.run, self.wrapped, self.signals = run, wrapped, signals
        self.trainer: Trainer
        self.step, self.stopping, self.told = -1, False, False  # after this step; by a signal

    def prepare_metric_bag(self, metric_bag: MetricBag) -> None:
        self.run.bag = metric_bag
        metric_bag.add(SUMS, _Sums())

    def set_step_nr(self, step_nr: int) -> None:
        """Called before the first micro-batch of a step, counted from 1; again where it is repeated."""
        self.run.overflows += self.step == step_nr - 1
        self.step = step_nr - 1  # validated here: no checkpoint is ahead of its validation
        self.run.validate(self.step)
        if self.step % self.run.config.log_every == 0:
            self.run.bag.get(SUMS, _Sums).reset()
        self.micros: list[tuple[MicroBatch, Tensor]] = []
        self.total: Tensor | float = 0.0

    def process_batch(self, batch: _Held, metric_bag: MetricBag) -> tuple[Tensor, float]:
        seed_micro(self.run.module.seed, batch.micro)  # type: ignore[arg-type]
        loss = self.wrapped(batch.batch, self.step)
        metric_bag.get(SUMS, _Sums).update({"total": loss.total, "count": loss.count, **loss.sums})
        self.total = self.total + loss.total.detach()
        self.micros.append((batch.micro, loss.total.detach()))
        if len(self.micros) == self.run.mine:
            self._agree()
        return loss.total, max(float(loss.count), AT_LEAST)

    def _agree(self) -> None:
        """All processes learn from this step, and go on after it, or none."""
        run = self.run
        totals = distributed.all_reduce_sums({"total": self.total, "stop": len(self.signals)}, run.device)
        check_finite(totals["total"], self.step + 1, self.micros, run.data)
        self.told = totals["stop"] > 0
        self.stopping = self.told or self.step + 1 >= run.config.max_steps
        if self.stopping:
            self.trainer.request_stop()  # after this step


class _Recorder(MetricRecorder):
    """fairseq2's published metrics into our journal; only the first process calls it."""

    def __init__(self, run: _Run, unit: _Unit):
        self.run, self.unit = run, unit

    def record_metric_values(self, category: str, values: Any, step_nr: int | None = None) -> None:
        run, config = self.run, self.run.config
        assert step_nr is not None  # the Trainer always gives it
        window, steps, run.step = run.window, step_nr - run.step, step_nr
        window.norm, window.steps = window.norm + steps * float(values["grad_norm"]), window.steps + steps
        if step_nr % config.log_every == 0 or step_nr == config.max_steps:
            window.sums = {name: float(value) for name, value in values[SUMS].items()}
            window.steps, window.overflows, run.overflows = window.steps + run.overflows, run.overflows, 0
            run.journal.training(step_nr, *window.close())
        if self.unit.stopping:
            run.write()

    def close(self) -> None: ...


class _KeptGangs(Gangs):
    """Trainer.run() closes its gangs, and that ends the process group, which is not its own here."""

    def close(self) -> None: ...


def _gangs(device: torch.device) -> Gangs:
    if distributed.world() == 1:
        gangs = create_fake_gangs(device)
    else:  # its own way to make a group refuses one that is there
        gangs = create_parallel_gangs(ProcessGroupGang(dist.group.WORLD, device))
    return _KeptGangs(**{field.name: getattr(gangs, field.name) for field in fields(gangs)})
