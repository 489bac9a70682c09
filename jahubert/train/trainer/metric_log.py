"""Metric logging and tracking of the best weights, for both training engines."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_path, atomic_write
from jahubert.train.experiment import distributed
from jahubert.train.experiment.checksums import file_crc32
from jahubert.train.trainer.optim import TrainConfig, lr_at
from jahubert.train.trainer.parallel import (
    compiled_graphs,
    failed_compilations,
    full_state,
    load_full_state,
    uncompiled,
)
from jahubert.train.trainer.tracker import Tracker, open_tracker

log = logging.getLogger(__name__)


_STATE = ("best_value", "best_metrics", "best_crc32", "last_metrics")


class MetricLog:
    """Writer for `metrics.jsonl`, `best_N.safetensors` and the curves of an experiment tracker.

    The weights of each new best step get a file of their own. The previous file is kept as long as a
    checkpoint refers to it, because a killed run resumes from that checkpoint.

    Only rank 0 writes files, but `validate` and `close` must be called in all processes.
    """

    def __init__(self, module: nn.Module, config: TrainConfig, out: Path):
        self.module, self.config, self.out = module, config, out
        self.best_value = math.inf
        self.best_metrics: dict[str, float] = {}  # including "best_step"; empty before validation
        self.best_crc32: str | None = None  # checksum of the best weights, equal in all processes
        self.last_metrics: dict[str, float] = {}
        self.tracker: Tracker | None = None
        self.graphs = compiled_graphs()  # number of compiled graphs at the last log line
        self.failures = failed_compilations()  # number of failed compilations at the last log line

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _STATE:
            setattr(self, name, state[name])

    def trim(self, step: int) -> None:
        """Drop the metrics that a killed run logged after `step`, and open the tracker."""
        if distributed.rank() == 0:
            trim_metrics(self.out / "metrics.jsonl", step)
            self.tracker = open_tracker(self.config, self.out, step)

    def training(
        self, step: int, sums: dict[str, float], norm: float, timing: dict[str, float], overflows: int
    ) -> None:
        """Log the training metrics since the last call.

        Args:
            step: the last step that the metrics cover.
            sums, norm, timing, overflows: as returned by `Window.close`.
        """
        self.last_metrics = self.module.metrics(sums, sums["count"])  # type: ignore[operator]
        if distributed.rank() == 0:
            row = {"step": step, **self.last_metrics, "grad_norm": norm, "lr": lr_at(step - 1, self.config)}
            row |= {"overflows": overflows} if overflows else {}
            remaining = (self.config.max_steps - step) * timing["seconds"] / max(1, timing["steps"])
            timing = timing | {"audio_hours_per_hour": sums.get("seconds", 0.0) / timing["seconds"]}
            if self.config.compile:
                before, self.graphs = self.graphs, compiled_graphs()
                timing["compiled_graphs"] = self.graphs - before
                self._warn_about_failed_compilations()
            self._write(row | {"timing": timing})
            line = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            line += f"  {timing['audio_hours_per_hour']:.4g} audio-h/h"
            line += f"  waiting for data {timing['waiting']:.1%}"
            line += f"  compiled graphs: {timing['compiled_graphs']}" if timing.get("compiled_graphs") else ""
            line += f"  {duration(remaining)} left"
            log.info("step %d/%d  %s", step, self.config.max_steps, line)

    def _warn_about_failed_compilations(self) -> None:
        before, self.failures = self.failures, failed_compilations()
        if self.failures > before:
            log.warning(
                "compile=true: torch.compile has given up on %d functions, which now run uncompiled and more "
                "slowly; the warnings of torch._dynamo state the reason",
                self.failures - before,
            )

    def validation_due(self, step: int) -> bool:
        every = self.config.valid_every
        return bool(every) and step > 0 and (step % every == 0 or step == self.config.max_steps)

    def validate(self, step: int, validate: Callable[[], dict[str, float]], best: str | None) -> None:
        """Validate the module after `step`, and save its weights if the metric `best` has a new minimum."""
        self.module.eval()
        with torch.no_grad(), uncompiled(self.config.compile):
            metrics = validate()
        self.module.train()
        if distributed.rank() == 0:
            self._write({"step": step, **{f"valid_{name}": value for name, value in metrics.items()}})
            log.info("step %d  valid  %s", step, "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        if best is not None and metrics[best] < self.best_value:
            self.best_value, self.best_metrics = metrics[best], {**metrics, "best_step": float(step)}
            state = full_state(self.module)
            self.best_crc32 = distributed.rank0_broadcast(lambda: self._save_best(state))

    def _save_best(self, state: dict[str, Tensor]) -> str:
        """Write the best weights to their file and return its checksum."""
        with atomic_path(best_path(self.out, self.best_metrics)) as temporary:
            save_file({name: value.cpu().clone() for name, value in state.items()}, temporary)
            return file_crc32(temporary)

    def delete_old_best(self, states: Iterable[dict[str, Any]]) -> None:
        """Delete best weights to which neither this log nor one of the saved `states` refers."""
        all_metrics = [self.best_metrics, *(state["best_metrics"] for state in states)]
        kept = {best_path(self.out, metrics) for metrics in all_metrics if metrics}
        for path in set(self.out.glob("best_*.safetensors")) - kept:
            path.unlink()

    def close(self, best: str | None) -> dict[str, float]:
        """Close the tracker, and return the last training metrics.

        If `best` is given and there was a validation, load the best weights and return their metrics instead.

        Raises:
            DataError: the file of the best weights is missing or damaged.
        """
        if self.tracker is not None:
            self.tracker.close()
        if best is not None and self.best_metrics:
            path = best_path(self.out, self.best_metrics)
            distributed.rank0_broadcast(lambda: self._check_best(path))
            load_full_state(self.module, load_file(path))
            return self.best_metrics
        return self.last_metrics

    def _check_best(self, path: Path) -> None:
        if not path.exists() or file_crc32(path) != self.best_crc32:
            raise DataError(f"{path}: missing or damaged; delete {self.out} and rerun its stage")

    def _write(self, row: dict[str, Any]) -> None:
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.tracker is not None:
            timing = {f"timing/{name}": value for name, value in row.get("timing", {}).items()}
            metrics = {_tag(name): value for name, value in row.items() if name not in ("step", "timing")}
            self.tracker.add_scalars(metrics | timing, row["step"])


def best_path(out: Path, best_metrics: dict[str, float]) -> Path:
    """Return the path of the best weights, whose metrics contain the step as "best_step"."""
    return out / f"best_{best_metrics['best_step']:07.0f}.safetensors"


def _tag(name: str) -> str:
    """Return the tag under which a tracker shows a metric."""
    if name.startswith("valid_"):
        return "validation/" + name.removeprefix("valid_")
    return f"training/{name}"


class Window:
    """Sums, gradient norms and timing since the last log line."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.norm, self.steps, self.waiting, self.started = 0.0, 0, 0.0, time.perf_counter()
        self.overflows = 0  # number of steps that were skipped because float16 gradients overflowed

    def add(self, totals: dict[str, float], norm: float) -> None:
        for name, value in totals.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.steps += 1
        if math.isfinite(norm):
            self.norm += norm
        else:
            self.overflows += 1

    def close(self) -> tuple[dict[str, float], float, dict[str, float], int]:
        """Return (sums, mean gradient norm, timing, overflows), and reset the window."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        timing = {"seconds": seconds, "steps": self.steps, "waiting": self.waiting / seconds}
        result = self.sums, self.norm / max(1, self.steps - self.overflows), timing, self.overflows
        self.__init__()  # type: ignore[misc]
        return result

    def state_dict(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        return {name: value for name, value in vars(self).items() if name != "started"} | {"seconds": seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in vars(self).keys() - {"started"}:
            setattr(self, name, state[name])
        self.started = time.perf_counter() - state["seconds"]


def duration(seconds: float) -> str:
    """Format a duration in seconds for display, e.g. `3 h 05 min`."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    if minutes >= 90:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if seconds >= 90 else f"{seconds:.0f} s"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics file up to the incomplete line that a running or killed process may have left."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def trim_metrics(path: Path, step: int) -> None:
    """Remove an incomplete last line and all lines after `step` from the metrics file of a killed run."""
    if not path.exists():
        return
    rows = read_metrics(path)
    with atomic_write(path) as file:
        file.writelines(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
