"""The training engine: plain PyTorch objects in, a trained module and its curves out.

It knows nothing of speech. It drives a `Trainable` module over micro-batches, one process or many:
gradients of summed losses are accumulated, divided by the number of targets over all processes, clipped
and applied. The random state is set anew for every micro-batch from (seed, epoch, index), so a run that
was killed and started again, or that has another number of processes or readers, computes the same.

Under `out`: `checkpoints/step_N/` (written beside, renamed), `best.safetensors`, `metrics.jsonl`.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import shutil
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

from jahubert.errors import ConfigError, JahubertError, UserError
from jahubert.train import ranks
from jahubert.train.masking import generator
from jahubert.train.optim import TrainConfig, build_optimizer, lr_at, pick_precision
from jahubert.train.provenance import read_record, write_json
from jahubert.train.sampler import MicroBatch, Sampler

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loss:
    """What a module says of one micro-batch: sums, to be divided by `count` over all micro-batches."""

    total: Tensor  # summed loss, with gradient
    count: Tensor | float  # targets it was summed over
    sums: dict[str, Tensor | float]  # further sums for the metrics


class Trainable(Protocol):
    """An `nn.Module` with a loss; `seed` makes its random choices repeatable."""

    seed: int

    def __call__(self, batch: Any, step: int) -> Loss: ...
    def metrics(self, sums: dict[str, float], count: float) -> dict[str, float]:
        """Readable numbers from summed ones; "loss" among them."""
        ...


class Data(Protocol):
    """Where micro-batches come from; `load` gives something with `.to(device)`."""

    sampler: Sampler

    def load(self, micro: MicroBatch) -> Any: ...


class Stopped(JahubertError):
    """The run was told to stop and has saved its state; the same command continues it."""

    exit_status = 75  # EX_TEMPFAIL: a scheduler may queue it again


class Reader(Dataset):
    """`Data.load` for a DataLoader; an error comes back as a value, so that its type survives a worker."""

    def __init__(self, data: Data):
        self.data = data

    def __getitem__(self, micro: MicroBatch) -> Any:
        try:
            return micro, self.data.load(micro)
        except UserError as error:
            return micro, error


class Mine:
    """The endless micro-batches of this process, from a state on."""

    def __init__(self, sampler: Sampler, epoch: int, cursor: int):
        self.sampler, self.state = sampler, (epoch, cursor)

    def __iter__(self) -> Iterator[MicroBatch]:
        return itertools.islice(self.sampler.stream(*self.state), ranks.rank(), None, ranks.world())


def micro_batches(
    data: Data, config: TrainConfig, epoch: int, cursor: int
) -> Iterator[tuple[MicroBatch, Any]]:
    """Loaded micro-batches of this process; raises what reading them raised."""
    loader = DataLoader(
        Reader(data),
        batch_size=None,
        sampler=Mine(data.sampler, epoch, cursor),  # type: ignore[arg-type]
        num_workers=config.workers,
        prefetch_factor=4 if config.workers else None,
        generator=torch.Generator(),  # or a resumed run would draw once more from the global one
    )
    for micro, batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield micro, batch


def seed_micro(seed: int, micro: MicroBatch) -> None:
    """Set torch's random state for dropout and layer drop of one micro-batch."""
    torch.manual_seed(int(generator(seed, micro.epoch, micro.index, 7).integers(2**62)))


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
        best: name of the validation metric that is to be small; the weights of its best step end in
            `best.safetensors` and, at the end, in the module.

    Returns:
        The last metrics, those of the best step where `best` is given.

    Raises:
        Stopped: SIGTERM, SIGUSR1 or SIGINT came; the state is saved.
        JahubertError: a loss that is not finite, naming the utterances; nothing was updated with it.
    """
    run = _Run(module, data, config, out)
    run.restore()
    with _stop_signals() as stop:
        while run.step < config.max_steps:
            run.advance()
            if config.valid_every and validate is not None:
                last = run.step == config.max_steps
                if run.step % config.valid_every == 0 or last:
                    run.validate(validate, best)
            if run.step % config.save_every == 0 or stop or run.step == config.max_steps:
                run.save()
            if stop and run.step < config.max_steps:
                raise Stopped(
                    f"told to stop by {stop[0]}: saved at step {run.step}; the same command continues"
                )
    if best is not None and (out / "best.safetensors").exists():
        module.load_state_dict(load_file(out / "best.safetensors"))
        return run.best_metrics
    return run.last_metrics


class _Run:
    """The state of one training run and the four things that happen to it."""

    def __init__(self, module: nn.Module, data: Data, config: TrainConfig, out: Path):
        self.device = ranks.pick_device(config.device)
        self.dtype = pick_precision(config, self.device)
        if config.per_step % ranks.world():
            raise ConfigError(
                f"one step takes {config.per_step} micro-batches, which {ranks.world()} processes cannot "
                "share evenly; change micro_seconds"
            )
        self.module, self.data, self.config, self.out = module.to(self.device), data, config, out
        self.wrapped: nn.Module = module
        if ranks.world() > 1:
            # Layer drop leaves blocks out of a backward pass, and frozen phases leave more.
            self.wrapped = DistributedDataParallel(module, find_unused_parameters=True)
        self.optimizer = build_optimizer(module, config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.step, self.epoch, self.cursor = 0, 0, 0
        self.best_value, self.best_metrics = math.inf, {}
        self.last_metrics: dict[str, float] = {}
        self.stream: Iterator[tuple[MicroBatch, Any]] | None = None
        self.window = _Window()

    def advance(self) -> None:
        """One step: gradients of all micro-batches, then one update."""
        if self.stream is None:
            self.stream = micro_batches(self.data, self.config, self.epoch, self.cursor)
            self.wrapped.train()
        config, sums, rows = self.config, {}, []
        self.optimizer.zero_grad(set_to_none=True)
        mine = config.per_step // ranks.world()
        for number in range(mine):
            started = time.perf_counter()
            micro, batch = next(self.stream)
            self.window.waiting += time.perf_counter() - started
            rows.append(micro.rows)
            loss = self._backward(micro, batch.to(self.device), last=number == mine - 1)
            for name, value in {"total": loss.total, "count": loss.count, **loss.sums}.items():
                value = value.detach() if isinstance(value, Tensor) else value
                sums[name] = sums.get(name, 0.0) + value
        totals = ranks.total(sums, self.device)
        if not math.isfinite(totals["total"]):
            names = ", ".join(str(row) for row in itertools.islice(itertools.chain(*rows), 8))
            raise JahubertError(
                f"step {self.step + 1}: the loss is {totals['total']}; rows of the manifest: {names} ..."
            )
        norm = self._update(totals.pop("count"), totals, self.module)
        self._forward_state(micro)
        self.window.add(totals, norm)
        if self.step % config.log_every == 0 or self.step == config.max_steps:
            self._log()

    def _backward(self, micro: MicroBatch, batch: Any, last: bool) -> Loss:
        seed_micro(self.module.seed, micro)  # type: ignore[arg-type]
        sync = nullcontext() if last or ranks.world() == 1 else self.wrapped.no_sync()  # type: ignore[operator]
        autocast = torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32)
        with sync:
            with autocast:
                loss = self.wrapped(batch, self.step)
            self.scaler.scale(loss.total).backward()
        return loss

    def _update(self, count: float, totals: dict[str, float], module: nn.Module) -> float:
        totals["count"] = count
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in module.parameters() if p.grad is not None]
        # Data-parallel gradients are means over processes; what is wanted is the sum over targets / targets.
        torch._foreach_mul_([cast(Tensor, p.grad) for p in parameters], ranks.world() / max(count, 1.0))
        limit = self.config.clip_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit) if parameters else torch.zeros(())
        rate = lr_at(self.step, self.config)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return float(norm)

    def _forward_state(self, micro: MicroBatch) -> None:
        """Where the data stands after this step, for all processes alike."""
        self.step += 1
        self.cursor += self.config.per_step
        while self.cursor >= (size := self._epoch_size(self.epoch)):
            self.epoch, self.cursor = self.epoch + 1, self.cursor - size

    def _epoch_size(self, epoch: int) -> int:
        if getattr(self, "_sized", None) != epoch:
            self._sized, self._size = epoch, len(self.data.sampler.epoch(epoch))
        return self._size

    def _log(self) -> None:
        sums, norm, timing = self.window.close()
        metrics = self.module.metrics(sums, sums["count"])  # type: ignore[operator]
        self.last_metrics = metrics
        if ranks.rank() == 0:
            row = {"step": self.step, **metrics, "grad_norm": norm, "lr": lr_at(self.step - 1, self.config)}
            self._write(row | {"timing": timing})
            seconds = sums.get("seconds", 0.0)
            speed = f"{seconds / max(timing['seconds'], 1e-9):.0f} audio-s/s"
            left = (self.config.max_steps - self.step) * timing["seconds"] / max(1, timing["steps"])
            shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            log.info("step %d/%d  %s  %s  %.0f s left", self.step, self.config.max_steps, shown, speed, left)

    def validate(self, validate: Callable[[], dict[str, float]], best: str | None) -> None:
        started = time.perf_counter()
        self.module.eval()
        with torch.no_grad():
            metrics = validate()
        self.module.train()
        self.window.started += time.perf_counter() - started
        if ranks.rank() == 0:
            self._write({"step": self.step, **{f"valid_{name}": value for name, value in metrics.items()}})
            log.info("step %d  valid  %s", self.step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if best is not None and metrics[best] < self.best_value:
            self.best_value = metrics[best]
            self.best_metrics = {**metrics, "best_step": float(self.step)}
            if ranks.rank() == 0:
                beside = self.out / "best.safetensors.tmp"
                save_file({k: v.detach().cpu().clone() for k, v in self.module.state_dict().items()}, beside)
                beside.replace(self.out / "best.safetensors")

    def _write(self, row: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self) -> None:
        """Write the checkpoint of this step beside the others, rename it, drop the oldest."""
        folder = self.out / "checkpoints"
        beside, final = folder / f"step_{self.step:07d}.tmp", folder / f"step_{self.step:07d}"
        if final.exists():
            return
        if ranks.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
        ranks.barrier()
        model, optimizer = get_state_dict(self.module, self.optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP says at length that there is one process
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=beside)
        if ranks.rank() == 0:
            write_json(beside / "run.json", self._run_state())
            beside.rename(final)
            for old in sorted(folder.glob("step_*[0-9]"))[: -self.config.keep_last]:
                shutil.rmtree(old)
        ranks.barrier()

    def _run_state(self) -> dict[str, Any]:
        names = ("step", "epoch", "cursor", "best_value", "best_metrics", "last_metrics")
        window = {name: getattr(self.window, name) for name in ("sums", "norm", "steps")}
        return {name: getattr(self, name) for name in names} | {
            "window": window,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self) -> None:
        """Continue from the newest checkpoint, if there is one."""
        found = sorted((self.out / "checkpoints").glob("step_*[0-9]"))
        if found:
            model, optimizer = get_state_dict(self.module, self.optimizer)
            state: dict[str, Any] = {"model": model, "optimizer": optimizer}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load(state, checkpoint_id=found[-1])
            set_state_dict(
                self.module,
                self.optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )
            run = read_record(found[-1] / "run.json")
            self.scaler.load_state_dict(run.pop("scaler"))
            for owner, values in ((self.window, run.pop("window")), (self, run)):
                for name, value in values.items():
                    setattr(owner, name, value)
            log.info("continuing at step %d", self.step)
        if ranks.rank() == 0:
            trim_metrics(self.out / "metrics.jsonl", self.step)


class _Window:
    """Sums since the last log line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.norm, self.steps, self.waiting, self.started = 0.0, 0, 0.0, time.perf_counter()

    def add(self, totals: dict[str, float], norm: float) -> None:
        for name, value in totals.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.norm, self.steps = self.norm + norm, self.steps + 1

    def close(self) -> tuple[dict[str, float], float, dict[str, float]]:
        seconds = time.perf_counter() - self.started
        timing = {"seconds": seconds, "steps": self.steps, "waiting": self.waiting / max(seconds, 1e-9)}
        result = self.sums, self.norm / max(1, self.steps), timing
        self.__init__()  # type: ignore[misc]
        return result


def trim_metrics(path: Path, step: int) -> None:
    """Drop the lines that a killed run wrote after the checkpoint that is continued."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for line in lines:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except ValueError:  # the line that was being written
            break
    beside = path.with_name(path.name + ".tmp")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    beside.replace(path)


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """A list that is empty until a signal to stop arrives; the handlers are put back at the end."""
    stop: list[str] = []
    wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    try:
        before = {
            number: signal.signal(number, lambda n, _: stop.append(signal.Signals(n).name))
            for number in wanted
        }
    except ValueError:  # not the main thread: its owner decides
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
