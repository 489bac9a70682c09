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

from jahubert.train import ranks
from jahubert.train.optim import TrainConfig, lr_at
from jahubert.train.parallel import load_whole_state, whole_state

log = logging.getLogger(__name__)


class Journal:
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
        if ranks.rank() == 0:
            trim_metrics(self.out / "metrics.jsonl", step)
            self.board = _board(self.out / "tensorboard", step)

    def training(self, step: int, sums: dict[str, float], norm: float, timing: dict[str, float]) -> None:
        """The line of the steps since the last one: their sums, mean gradient norm and time."""
        self.last_metrics = self.module.metrics(sums, sums["count"])  # type: ignore[operator]
        if ranks.rank() == 0:
            row = {"step": step, **self.last_metrics, "grad_norm": norm, "lr": lr_at(step - 1, self.config)}
            self._write(row | {"timing": timing})
            speed = f"{sums.get('seconds', 0.0) / max(timing['seconds'], 1e-9):.0f} audio-s/s"
            left = (self.config.max_steps - step) * timing["seconds"] / max(1, timing["steps"])
            shown = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            log.info("step %d/%d  %s  %s  %.0f s left", step, self.config.max_steps, shown, speed, left)

    def validation_due(self, step: int) -> bool:
        every = self.config.valid_every
        return bool(every) and step > 0 and (step % every == 0 or step == self.config.max_steps)

    def validate(self, step: int, validate: Callable[[], dict[str, float]], best: str | None) -> None:
        """Validate the module as it is after `step`; keep its weights if `best` was never smaller."""
        self.module.eval()
        with torch.no_grad():
            metrics = validate()
        self.module.train()
        if ranks.rank() == 0:
            self._write({"step": step, **{f"valid_{name}": value for name, value in metrics.items()}})
            log.info("step %d  valid  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if best is not None and metrics[best] < self.best_value:
            self.best_value, self.best_metrics = metrics[best], {**metrics, "best_step": float(step)}
            state = whole_state(self.module)
            if ranks.rank() == 0:
                beside = self.out / "best.safetensors.tmp"
                save_file({name: value.cpu().clone() for name, value in state.items()}, beside)
                beside.replace(self.out / "best.safetensors")

    def close(self, best: str | None) -> dict[str, float]:
        """The metrics of the run; where `best` is given, the module gets its best weights back."""
        if self.board is not None:
            self.board.close()
        if best is not None and (self.out / "best.safetensors").exists():
            load_whole_state(self.module, load_file(self.out / "best.safetensors"))
            return self.best_metrics
        return self.last_metrics

    def _write(self, row: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.board is not None:
            for name, value in row.items():
                if name not in ("step", "timing"):
                    kind = "validation" if name.startswith("valid_") else "training"
                    self.board.add_scalar(f"{kind}/{name.removeprefix('valid_')}", value, row["step"])
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

    def add(self, totals: dict[str, float], norm: float) -> None:
        for name, value in totals.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.norm, self.steps = self.norm + norm, self.steps + 1

    def close(self) -> tuple[dict[str, float], float, dict[str, float]]:
        """Sums, mean norm and timing, as `Journal.training` wants them; the window is empty again."""
        seconds = time.perf_counter() - self.started
        timing = {"seconds": seconds, "steps": self.steps, "waiting": self.waiting / max(seconds, 1e-9)}
        result = self.sums, self.norm / max(1, self.steps), timing
        self.__init__()  # type: ignore[misc]
        return result

    def state(self) -> dict[str, Any]:
        return {"sums": self.sums, "norm": self.norm, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        self.sums, self.norm, self.steps = state["sums"], state["norm"], state["steps"]


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
