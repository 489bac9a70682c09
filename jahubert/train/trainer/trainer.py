"""The training engine: plain PyTorch objects in, a trained module and its curves out.

It knows nothing of speech. It drives a `Trainable` module over micro-batches, one process or many:
gradients of summed losses are accumulated, divided by the number of targets over all processes, clipped
and applied. The random state is set anew for every micro-batch from (seed, epoch, index), so a run that
was killed and started again, or that has another number of processes or readers, computes the same.

Under `out`: `checkpoints/step_N/`, `best.safetensors`, and what `journal` writes.
"""

from __future__ import annotations

import itertools
import logging
import math
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from jahubert.errors import JahubertError, Stopped, UserError
from jahubert.model.precision import autocast
from jahubert.train.data.masking import seeded_rng
from jahubert.train.data.sampler import MicroBatch, Sampler
from jahubert.train.experiment import distributed
from jahubert.train.trainer.checkpoints import Checkpoints, folder_of
from jahubert.train.trainer.metric_log import MetricLog, Window
from jahubert.train.trainer.optim import TrainConfig, build_optimizer, lr_at, pick_precision
from jahubert.train.trainer.parallel import Parallel, full_norm, wrap_blocks

log = logging.getLogger(__name__)

SMALLEST_SCALE = 1e-4  # of a float16 loss, as in fairseq: from the first one, thirty overflows in a row
Micros = Generator[tuple[MicroBatch, Any], None, None]


@dataclass(frozen=True)
class Loss:
    """What a module says of one micro-batch: sums, to be divided by `count` over all micro-batches."""

    total: Tensor  # summed loss, with gradient
    count: Tensor | float  # targets it was summed over
    sums: dict[str, Tensor | float]  # further sums for the metrics


class Trainable(Protocol):
    """An `nn.Module` with a loss; `seed` makes its random choices repeatable."""

    seed: int
    has_unused_parameters: bool  # a step may leave parameters without a gradient (layer drop, frozen phases)
    blocks: Sequence[nn.Module]  # what FSDP2 shards one by one

    def __call__(self, batch: Any, step: int) -> Loss: ...
    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Readable numbers from summed ones; "loss" among them."""
        ...


class Data(Protocol):
    """Where micro-batches come from; `load` gives something with `.to(device)`."""

    sampler: Sampler

    def load(self, micro: MicroBatch) -> Any: ...
    def name(self, row: int) -> str:
        """What an utterance is called, for messages."""
        ...


class Reader(Dataset):
    """`Data.load` for a DataLoader; an error comes back as a value, so that its type survives a worker."""

    def __init__(self, data: Data):
        self.data = data

    def __getitem__(self, micro: MicroBatch) -> Any:
        try:
            return micro, self.data.load(micro)
        except UserError as error:
            return micro, error


class ShardedSampler:
    """The endless micro-batches of this process, from a state on."""

    def __init__(self, sampler: Sampler, epoch: int, cursor: int):
        self.sampler, self.state = sampler, (epoch, cursor)

    def __iter__(self) -> Iterator[MicroBatch]:
        return itertools.islice(
            self.sampler.stream(*self.state), distributed.rank(), None, distributed.world()
        )


def _deaf(_: int) -> None:
    """For a reader: launchers and schedulers signal every process, and one whose readers die cannot save."""
    for number in distributed.STOPPING:
        signal.signal(number, signal.SIG_IGN)


def micro_batches(
    data: Data, config: TrainConfig, device: torch.device, *, epoch: int, cursor: int
) -> Micros:
    """Loaded micro-batches of this process, on their way to `device`; raises what reading them raised.

    To be closed, which ends the readers: Python asks them by SIGTERM when it ends, and waits for ever.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # memory is page-locked by way of the current GPU, which would be 0
    loader = DataLoader(
        Reader(data),
        batch_size=None,
        sampler=ShardedSampler(data.sampler, epoch, cursor),  # type: ignore[arg-type]
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        worker_init_fn=_deaf,
        generator=torch.Generator(),  # or a resumed run would draw once more from the global one
        pin_memory=device.type == "cuda",
    )
    for micro, batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield micro, batch


class DataState:
    """Where the data stands, for all processes alike: an epoch and how much of it was taken."""

    def __init__(self, sampler: Sampler):
        self.sampler, self.epoch, self.cursor = sampler, 0, 0
        self.sized, self.size = -1, 0  # the epoch whose size is known: counting one is work

    def forward(self, n: int) -> None:
        self.cursor += n
        while True:
            if self.sized != self.epoch:
                self.sized, self.size = self.epoch, len(self.sampler.epoch(self.epoch))
            if self.cursor < self.size:
                break
            self.epoch, self.cursor = self.epoch + 1, self.cursor - self.size

    def state(self) -> dict[str, int]:
        return {"epoch": self.epoch, "cursor": self.cursor}

    def load(self, state: dict[str, Any]) -> None:
        self.epoch, self.cursor = state["epoch"], state["cursor"]


def seed_micro(seed: int, micro: MicroBatch) -> None:
    """Set torch's random state for dropout and layer drop of one micro-batch."""
    torch.manual_seed(int(seeded_rng(seed, micro.epoch, micro.index, 7).integers(2**62)))


def check_finite(
    total: float, step: int, mine: Sequence[tuple[MicroBatch, Tensor | float]], data: Data
) -> None:
    """Refuse to learn from a summed loss that is no number.

    Args:
        total: over all processes.
        mine: micro-batches of this process and their losses.
    """
    if math.isfinite(total):
        return
    wrong = [(micro, float(loss)) for micro, loss in mine if not math.isfinite(loss)]
    if not wrong:
        error = JahubertError(f"step {step}: the loss of another process is {total}")
        error.reported = True  # by that process
        raise error
    micro, loss = wrong[0]
    names = ", ".join(repr(data.name(row)) for row in micro.rows[:8])
    raise JahubertError(
        f"step {step}: the loss is {loss}, and nothing was learnt from it; micro-batch {micro.index} of "
        f"epoch {micro.epoch}, utterances {names}{' ...' * (len(micro.rows) > 8)}. Listen to them and leave "
        "a broken one out; if they are in order, take a lower train.lr or train.precision=fp32"
    )


def check_norm(norm: float, step: int) -> None:
    """Refuse an update whose loss is a number but whose gradient is none."""
    if not math.isfinite(norm):
        raise JahubertError(
            f"step {step}: the norm of the gradient is {norm} though the loss is a number, and nothing was "
            "learnt from it; the last checkpoint stays. Take a lower train.lr or train.precision=fp32"
        )


def overflowing(step: int) -> JahubertError:
    """What ends a float16 run that no scale of the loss can help, by either engine."""
    return JahubertError(
        f"step {step}: the float16 gradients overflow whatever the loss is scaled by, and the last steps "
        "taught nothing; the last checkpoint stays. Take a lower train.lr, or train.precision=bf16 or fp32"
    )


def stopped(signals: list[str], step: int) -> Stopped:
    by = signals[0] if signals else "a signal to another process"
    return Stopped(f"told to stop by {by}: saved at step {step}; the same command continues")


def train(
    module: nn.Module,
    data: Data,
    config: TrainConfig,
    out: Path,
    *,
    validate: Callable[[], dict[str, float]] | None = None,
    best: str | None = None,
) -> dict[str, float]:
    """Train `module` (a `Trainable`) up to `config.max_steps`, continuing what lies in `out`.

    Args:
        validate: gives metrics of the module as it is, on all processes at once.
        best: name of the validation metric that is to be small; the weights of its best step are kept in
            `best.safetensors`, and at the end the module has those, and not its last ones.

    Returns:
        The last metrics, or those of the best step where it was taken.

    Raises:
        Stopped: SIGTERM, SIGUSR1 or SIGINT came; the state is saved.
        JahubertError: a loss that is not finite, naming the utterances; nothing was updated with it.
    """
    run = _Run(module, data, config, out)
    run.restore()
    with stop_signals() as run.signals, closing(run):
        while run.step < config.max_steps:
            run.advance()
            if validate is not None and run.journal.validation_due(run.step):
                distributed.heartbeat(f"the validation after step {run.step}")
                run.validate(validate, best)
            last = run.step == config.max_steps
            if run.step % config.save_every == 0 or run.told or last:
                run.save()
            if run.told:  # in the last step too, behind which other work would begin
                raise stopped(run.signals, run.step)
    metrics = run.journal.close(best)
    run.parallel.gather()
    return metrics


class _Run:
    """The state of one training run and what happens to it."""

    def __init__(self, module: nn.Module, data: Data, config: TrainConfig, out: Path):
        self.device = distributed.process_device(config.device)
        self.dtype = pick_precision(config, self.device)
        self.mine = config.accumulation_steps(distributed.world())
        self.module, self.data, self.config = module.to(self.device), data, config
        wrap_blocks(module.blocks, config.recompute, config.compile)  # type: ignore[arg-type]
        self.parallel = Parallel(self.module, config.sharded)
        self.optimizer = build_optimizer(module, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.checkpoints = Checkpoints(folder_of(out, "torch"), config)
        self.step, self.position = 0, DataState(data.sampler)
        self.journal = MetricLog(module, config, out)
        self.stream: Micros | None = None
        self.window = Window()
        self.signals: list[str] = []  # to stop, that this process has heard
        self.told = False  # whether any had when the step was computed: saving is done together

    def close(self) -> None:
        if self.stream is not None:
            self.stream.close()

    def advance(self) -> None:
        """One step: gradients of all micro-batches, then one update."""
        if self.stream is None:
            self.stream = micro_batches(self.data, self.config, self.device, **self.position.state())
            self.module.train()
        config, sums, micros = self.config, {}, []
        step = self.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        for number in range(self.mine):
            distributed.heartbeat(f"reading the audio of step {step}")
            started = time.perf_counter()
            micro, batch = next(self.stream)
            self.window.waiting += time.perf_counter() - started
            distributed.heartbeat(f"the computation of step {step}")
            loss = self._backward(micro, batch.to(self.device), last=number == self.mine - 1)
            for name, value in {"total": loss.total, "count": loss.count, **loss.sums}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                sums[name] = sums.get(name, 0.0) + value
            micros.append((micro, loss.total.detach()))
        totals = distributed.all_reduce_sums(sums | {"stop": len(self.signals)}, self.device)
        self.told = totals.pop("stop") > 0
        check_finite(totals["total"], step, micros, self.data)
        norm = self._update(totals.pop("count"), totals, self.module)
        self.step = step
        self.position.forward(config.micro_batches_per_step)
        self.window.add(totals, norm)
        if self.step % config.log_every == 0 or self.step == config.max_steps:
            self.journal.training(self.step, *self.window.close())

    def _backward(self, micro: MicroBatch, batch: Any, last: bool) -> Loss:
        seed_micro(self.module.seed, micro)  # type: ignore[arg-type]
        with self.parallel.accumulating(last):
            with autocast(self.dtype, self.device):
                loss = self.parallel(batch, self.step)
            self.scaler.scale(loss.total).backward()
        return loss

    def _update(self, count: float, totals: dict[str, float], module: nn.Module) -> float:
        totals["count"] = count
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in module.parameters() if p.grad is not None]
        # Data-parallel gradients are means over processes; what is wanted is the sum over targets / targets.
        torch._foreach_mul_([cast(Tensor, p.grad) for p in parameters], distributed.world() / max(count, 1.0))
        limit = self.config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit) if parameters else torch.zeros(())
        size = full_norm(norm)
        if not self.scaler.is_enabled():  # which leaves such an update out, and goes on
            check_norm(size, self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, self.config)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            raise overflowing(self.step + 1)
        return size

    def validate(self, validate: Callable[[], dict[str, float]], best: str | None) -> None:
        started = time.perf_counter()
        with self.parallel.whole():
            self.journal.validate(self.step, validate, best)
        self.window.started += time.perf_counter() - started

    def save(self) -> None:
        distributed.heartbeat(f"the checkpoint of step {self.step}")
        state = {
            "step": self.step,
            **self.position.state(),
            **self.journal.state(),
            "window": self.window.state(),
            "scaler": self.scaler.state_dict(),
        }
        self.checkpoints.save(self.step, self.module, self.optimizer, state)

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        if run := self.checkpoints.load(self.module, self.optimizer):
            self.step = run["step"]
            self.position.load(run)
            self.journal.load(run)
            self.scaler.load_state_dict(run["scaler"])
            self.window.load(run["window"])
            log.info("continuing at step %d", self.step)
        self.journal.trim(self.step)


@contextmanager
def stop_signals() -> Iterator[list[str]]:
    """A list that is empty until a signal to stop arrives; the handlers are put back at the end.

    One that came too late to be acted upon is then handed to the handler that was there before.
    """
    stop: list[str] = []
    try:
        before = {
            number: signal.signal(number, lambda n, _: stop.append(signal.Signals(n).name))
            for number in distributed.STOPPING
        }
    except ValueError:  # not the main thread: its owner decides
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stop:
        signal.raise_signal(signal.Signals[stop[0]])
