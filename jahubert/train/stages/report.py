"""What a run came to: one table on the terminal, one HTML page.

Reads   everything under the experiment's folder that is done
Writes  metrics.json, table.txt, report.html

    python -m jahubert.run recipe=demo stage=report
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jahubert.errors import ConfigError, DataError
from jahubert.train import ranks, report
from jahubert.train.manifest import Manifest
from jahubert.train.provenance import DONE, write_json, written_beside

VERSION = 1
KEEP = False  # it reads whatever is there, so it is made anew every time


@dataclass(frozen=True)
class Config:
    exp: Path
    published: dict[str, Any] = field(default_factory=dict)  # name -> {split: WER %}, shown beside ours
    layer_frames: int = 20_000  # on which units of each layer are measured; 0: not at all
    seed: int = 0  # which frames those are
    device: str = "auto"

    def __post_init__(self) -> None:
        if self.layer_frames < 0:
            raise ConfigError(f"layer_frames is {self.layer_frames}, but must be 0 or more")


def run(config: Config, out: Path) -> dict[str, Any]:
    if ranks.rank():
        return {}
    counted, summary = measure(config)
    table = report.table(summary)
    write_json(out / "metrics.json", summary)
    with written_beside(out / "table.txt") as file:
        file.write(table + "\n")
    with written_beside(out / "report.html") as file:
        file.write(report.page(config.exp, summary, table, counted))
    print(f"{table}\n\nReport: {out / 'report.html'}")
    return {}


def measure(config: Config) -> tuple[report.UnitCounts, dict[str, Any]]:
    """What the units are, and all numbers of the experiment."""
    if not (config.exp / "prepare" / DONE).exists():
        raise DataError(
            f"{config.exp}: nothing to report yet; run stage=prepare and the stages after it first"
        )
    manifest = Manifest(config.exp / "prepare" / "manifest.arrow")
    times, source = report.phone_times(config.exp, manifest)
    counted = report.unit_counts(config.exp, times, source)
    layers = report.layer_curves(
        config.exp, times, config.layer_frames, config.seed, ranks.pick_device(config.device)
    )
    summary = report.summarize(config.exp, counted)
    return counted, summary | {"layers": layers, "published": config.published}
