"""What is written down of a training run, by either engine: metrics, and the best weights."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from jahubert.train.experiment import distributed
from jahubert.train.trainer.optim import TrainConfig, lr_at
from jahubert.train.trainer.parallel import full_state, load_full_state

log = logging.getLogger(__name__)


class MetricLog:
    """Lines of metrics, and the weights of the step that did best in validation.

    All processes call it alike; only the first one writes. `state()` belongs into a checkpoint.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, out: Path):
        self.module, self.config, self.out = module, config, out
        self.best_value, self.best_metrics = math.inf, {}
        self.last_metrics: dict[str, float] = {}
        self.board: Any = None

    def state(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("best_value", "best_metrics", "last_metrics")}

    def load(self, state: dict[str, Any]) -> None:
        for name in self.state():
            setattr(self, name, state[name])

    def trim(self, step: int) -> None:
        """Begin, or forget what a killed run wrote after the step that is continued."""
        if distributed.rank() == 0:
            for note in self.config.warnings(distributed.world()):
                log.warning("%s", note)
            trim_metrics(self.out / "metrics.jsonl", step)
            self.board = _board(self.out / "tensorboard", step)

    def training(
        self, step: int, sums: dict[str, float], norm: float, timing: dict[str, float], overflows: int
    ) -> None:
        """The line of the steps since the last one: their sums, mean gradient norm and time."""
        self.last_metrics = self.module.metrics(sums, sums["count"])  # type: ignore[operator]
        if distributed.rank() == 0:
            row = {"step": step, **self.last_metrics, "grad_norm": norm, "lr": lr_at(step - 1, self.config)}
            row |= {"overflows": overflows} if overflows else {}
            left = (self.config.max_steps - step) * timing["seconds"] / max(1, timing["steps"])
            timing = timing | {"audio_hours_an_hour": sums.get("seconds", 0.0) / timing["seconds"]}
            self._write(row | {"timing": timing})
            shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            shown += f"  {timing['audio_hours_an_hour']:.4g} audio-h/h"
            shown += f"  waiting for data {timing['waiting']:.1%}  {duration(left)} left"
            log.info("step %d/%d  %s", step, self.config.max_steps, shown)

    def validation_due(self, step: int) -> bool:
        every = self.config.valid_every
        return bool(every) and step > 0 and (step % every == 0 or step == self.config.max_steps)

    def validate(self, step: int, validate: Callable[[], dict[str, float]], best: str | None) -> None:
        """Validate the module as it is after `step`; keep its weights if `best` was never smaller."""
        self.module.eval()
        with torch.no_grad():
            metrics = validate()
        self.module.train()
        if distributed.rank() == 0:
            self._write({"step": step, **{f"valid_{name}": value for name, value in metrics.items()}})
            log.info("step %d  valid  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if best is not None and metrics[best] < self.best_value:
            self.best_value, self.best_metrics = metrics[best], {**metrics, "best_step": float(step)}
            state = full_state(self.module)
            if distributed.rank() == 0:
                beside = self.out / "best.safetensors.tmp"
                save_file({name: value.cpu().clone() for name, value in state.items()}, beside)
                beside.replace(self.out / "best.safetensors")

    def close(self, best: str | None) -> dict[str, float]:
        """The metrics of the run; where `best` is given, the module gets its best weights back."""
        if self.board is not None:
            self.board.close()
        if best is not None and (self.out / "best.safetensors").exists():
            load_full_state(self.module, load_file(self.out / "best.safetensors"))
            return self.best_metrics
        return self.last_metrics

    def _write(self, row: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            timing = {f"timing/{name}": value for name, value in row.get("timing", {}).items()}
            for name, value in (row | timing).items():
                if name not in ("step", "timing"):
                    kind = "validation/" if name.startswith("valid_") else "" if "/" in name else "training/"
                    self.board.add_scalar(kind + name.removeprefix("valid_"), value, row["step"])
            self.board.flush()


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed; it hides what was written after `step`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


class Window:
    """Sums, gradient norms and time since the last line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.norm, self.steps, self.waiting, self.started = 0.0, 0, 0.0, time.perf_counter()
        self.overflows = 0  # steps whose float16 gradients overflowed: they have no norm, and taught nothing

    def add(self, totals: dict[str, float], norm: float) -> None:
        for name, value in totals.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        if math.isfinite(norm):
            self.norm += norm
        else:
            self.overflows += 1

    def close(self) -> tuple[dict[str, float], float, dict[str, float], int]:
        """Sums, mean norm, timing and overflows, for `Journal.training`; the window is empty again."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        timing = {"seconds": seconds, "steps": self.steps, "waiting": self.waiting / seconds}
        result = self.sums, self.norm / max(1, self.steps - self.overflows), timing, self.overflows
        self.__init__()  # type: ignore[misc]
        return result

    def state(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        return {name: value for name, value in vars(self).items() if name != "started"} | {"seconds": seconds}

    def load(self, state: dict[str, Any]) -> None:
        for name in vars(self).keys() - {"started"}:
            setattr(self, name, state[name])
        self.started = time.perf_counter() - state["seconds"]


def duration(seconds: float) -> str:
    """A time to wait for, in the two largest units that matter."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 90:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


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
