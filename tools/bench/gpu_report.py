"""Table of measurements, and settings for the GPU benchmark."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peers import importable

from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.model.hubert import HubertConfig
from jahubert.model.kernels import PackedShape

PEERS = ("transformers", "torchaudio")
MIXED = (2.0, 3.0, 5.0, 8.0, 15.0)
# Names of the rows for micro-batches of 350 s, of two groups of 350 s, and of 450 s with the large model.
MICRO_BATCH, TWO_GROUPS, LARGE = "base, micro-batch", "base, two groups", "large, micro-batch"

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
    "engine: recompilations": ("<=", 0.0),
    f"{MICRO_BATCH}, compiled: recompilations": ("<=", 0.0),
    f"{TWO_GROUPS}, compiled: recompilations": ("<=", 0.0),
    "compiled engine: recompilations": ("<=", 0.0),
    f"{LARGE}: of peak": (">=", 40.0),
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


# How the rows "of peak" are computed.
OF_PEAK = (
    '"of peak": FLOP/s of the step divided by those of a matrix product of size 8,192 in the same run. The\n'
    "FLOPs of a step are those of the matrix products and convolutions of the encoder for the valid frames:\n"
    "the forward pass, and twice as many for the backward pass. Layer drop counts with its expected value,\n"
    "the positional convolution as a direct convolution. Recomputation, loss and AdamW are not counted."
)


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
    folder: Path  # folder for temporary files of a section
    audio: Path  # folder for generated audio, which several sections use
    shortened: bool = False  # whether to run with fewer repetitions

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else torch.bfloat16

    @property
    def peers(self) -> list[str]:
        """The peer projects that can be imported. Importing them takes a long time."""
        return [] if self.small else list(filter(importable, PEERS))

    @property
    def repeats(self) -> int:
        """Number of timed repetitions, an even number."""
        return 2 if self.small else 4 if self.shortened else 8

    def model(self, size: str) -> HubertConfig:
        config = HubertConfig.large() if size == "large" else HubertConfig.base()
        if not self.small:
            return config
        tiny = {"conv_dims": (16,) * 7, "width": 64, "layers": 2, "heads": 2, "ffn": 64, "pos_conv_groups": 4}
        # The dropout of a CPU cannot be compiled.
        return replace(config, **tiny, dropout=0.0, attention_dropout=0.0)

    def lengths(self, copies: int) -> list[float]:
        """Return mixed utterance lengths in seconds, 33 s per copy (2.3 s in total if small)."""
        return [0.5, 0.8, 1.0] if self.small else [*MIXED] * copies

    @property
    def micro_lengths(self) -> list[float]:
        """Mixed utterance lengths of a group of base in seconds, 350 s in total (2.3 s if small)."""
        return self.lengths(10) if self.small else [*self.lengths(10), 15.0, 5.0]

    @property
    def large_lengths(self) -> list[float]:
        """Mixed utterance lengths of a micro-batch of large: 449 s of at most 450 s (2.3 s if small)."""
        return self.lengths(13) if self.small else [*self.lengths(13), 15.0, 5.0]

    @property
    def group_seconds(self) -> float:
        """Maximum length of a group of base in seconds."""
        return 4.0 if self.small else 350.0

    @property
    def utterance_seconds(self) -> tuple[float, float]:
        """Lengths of the shortest and the longest utterance in the generated corpus."""
        return (0.5, 2.0) if self.small else (2.0, 15.6)

    def shape(self, n_groups: int) -> PackedShape:
        """Return the shape to which the engine pads micro-batches of the generated corpus for compilation."""
        samples = (round(SAMPLE_RATE * x) for x in (*self.utterance_seconds, self.group_seconds))
        return PackedShape.largest(HUBERT, *samples, n_groups)
