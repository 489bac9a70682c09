"""Table of measurements, and settings for the GPU benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peers import importable

from jahubert.model.hubert import HubertConfig

PEERS = ("transformers", "torchaudio")
MIXED = (2.0, 3.0, 5.0, 8.0, 15.0)
MICRO_BATCH = "base, micro-batch"  # name of the rows for 350 s

# The project's goals on an H100 or H200: lower (">=") or upper ("<=") limits of rows of the table.
GOALS = {
    f"{MICRO_BATCH}: jahubert": (">=", 7000.0),
    f"{MICRO_BATCH}: of peak": (">=", 40.0),
    f"{MICRO_BATCH}: speedup over transformers": (">=", 4.0),
    f"{MICRO_BATCH}: speedup over torchaudio": (">=", 6.0),
    f"{MICRO_BATCH}: memory of transformers": (">=", 4.0),
    "base, mixed: jahubert": (">=", 3500.0),
    "engine: share of the step's rate": (">=", 90.0),
    "engine: waiting for data": ("<=", 1.0),
    "engine: filler among the frames": ("<=", 4.0),
    "compiled engine: graphs compiled later": ("<=", 0.0),
    "large, mixed: of peak": (">=", 40.0),
    "stage label, HuBERT layer, fp32": (">=", 3000.0),
    "device tests failed": ("<=", 0.0),
}


class Skipped(Exception):
    """Raised if a section of the benchmark cannot run on this machine. The message states the reason."""


@dataclass
class Report:
    """The rows of the table, each of which is printed when it is measured."""

    has_goals: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, value: float | None, unit: str, **details: float | str) -> None:
        """Add a row. A value of None marks a failed peer or measurement, with the reason in `details`."""
        row = {"name": name, "value": value, "unit": unit, **details}
        if self.has_goals and value is not None and name in GOALS:
            row |= {"goal": show_goal(name), "reached": is_reached(name, value)}
        self.rows.append(row)
        print(format_row(row), flush=True)

    def value(self, name: str) -> float | None:
        """Return the value of an earlier row."""
        return next((row["value"] for row in self.rows if row["name"] == name), None)

    def goals(self) -> list[str]:
        """Return one line per goal, including those that were not measured."""
        lines = []
        for name in GOALS:
            value = self.value(name)
            outcome = {None: "not measured", True: "reached", False: "not reached"}[
                None if value is None else is_reached(name, value)
            ]
            shown = "-" if value is None else f"{value:,.4g}"
            lines.append(f"{name:<46}{shown:>10}   {show_goal(name):<12}{outcome}")
        return lines


def is_reached(name: str, value: float) -> bool:
    sign, goal = GOALS[name]
    return value >= goal if sign == ">=" else value <= goal


def show_goal(name: str) -> str:
    sign, goal = GOALS[name]
    return f"{sign} {goal:,.4g}"


def format_row(row: dict[str, Any]) -> str:
    value = "-" if row["value"] is None else f"{row['value']:,.4g}"
    goal = f"{row['goal']} {'reached' if row['reached'] else 'not reached'}" if "goal" in row else ""
    rest = {k: v for k, v in row.items() if k not in ("name", "value", "unit", "goal", "reached")}
    details = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rest.items())
    return f"{row['name']:<46}{value:>10} {row['unit']:<14}{goal:<22}{details}".rstrip()


@dataclass
class Settings:
    """Device, precision and sizes for a run of the benchmark."""

    device: torch.device
    small: bool
    folder: Path  # folder for temporary files

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def peers(self) -> list[str]:
        """The peer projects that can be imported. Importing them takes a long time."""
        return [] if self.small else list(filter(importable, PEERS))

    @property
    def repeats(self) -> int:
        return 2 if self.small else 8

    def model(self, size: str) -> HubertConfig:
        config = HubertConfig.large() if size == "large" else HubertConfig.base()
        tiny = {"conv_dims": (16,) * 7, "width": 64, "layers": 2, "heads": 2, "ffn": 64, "pos_conv_groups": 4}
        return replace(config, **tiny) if self.small else config

    def lengths(self, copies: int) -> list[float]:
        """Return mixed utterance lengths in seconds, 33 s per copy (2.3 s in total if small)."""
        return [0.5, 0.8, 1.0] if self.small else [*MIXED] * copies
