"""What a run came to: one table on the terminal, one HTML page.

Reads   everything under the experiment's folder that is done
Writes  summary.json, table.txt, report.html

    python -m jahubert.run recipe=demo stage=report report.language=ja
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jahubert.errors import ConfigError
from jahubert.train import ranks, report
from jahubert.train.labels import LabelStore
from jahubert.train.manifest import Manifest
from jahubert.train.page import Run, page
from jahubert.train.provenance import DONE, write_json, written_beside
from jahubert.train.worst import Example, worst

VERSION = 1
KEEP = False  # it reads whatever is there, so it is made anew every time


@dataclass(frozen=True)
class Config:
    exp: Path
    published: dict[str, Any] = field(default_factory=dict)  # name -> {split: WER %}, shown beside ours
    language: Literal["en", "ja"] = "en"  # of the page
    worst: int = 4  # utterances of each system that are shown with their sound, about 0.2 MB each

    def __post_init__(self) -> None:
        if self.worst < 0:
            raise ConfigError(f"worst is {self.worst}, but must not be negative")


def run(config: Config, out: Path) -> dict[str, Any]:
    if ranks.rank():
        return {}
    counted = report.phone_counts(config.exp)
    summary = report.summarize(config.exp, counted) | {"published": config.published}
    table = report.table(summary)
    write_json(out / "summary.json", summary)
    with written_beside(out / "table.txt") as file:
        file.write(table + "\n")
    with written_beside(out / "report.html") as file:
        stores = report.label_stores(config.exp)
        usage = {name: store.usage() for name, store in stores.items()}
        phones, counts = ([], {}) if counted is None else (counted.phones, counted.counts)
        shown = Run(config.exp, summary, usage, phones, counts, examples(config, stores))
        file.write(page(shown, config.language))
    print(f"{table}\n\nReport: {out / 'report.html'}")
    return {}


def examples(config: Config, stores: dict[str, LabelStore]) -> dict[str, list[Example]]:
    """The worst utterances of every system that has been scored, with the units of the last labelling."""
    manifest = Manifest(config.exp / "prepare" / "manifest.arrow")
    times, _ = report.phone_times(config.exp, manifest)
    store = stores[max(stores)] if stores else None
    return {
        folder.name: worst(folder / "decode", manifest, times, store, config.worst)
        for folder in sorted((config.exp / "systems").glob("*"))
        if config.worst and (folder / "score" / DONE).exists()
    }
