"""What a run came to: one table on the terminal, one HTML page.

Reads   everything under the experiment's folder that is done
Writes  metrics.json, table.txt, report.html

    python -m jahubert.run recipe=demo stage=report report.language=ja
    python -m jahubert.run recipe=demo stage=report report.compare_with=[exp/demo-1,exp/demo-2]
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from jahubert.errors import AudioError, DataError
from jahubert.formats.atomic import atomic_write
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import raise_config_errors, range_errors
from jahubert.train.experiment.provenance import DONE, write_json
from jahubert.train.report import tables
from jahubert.train.report.examples import Example, worst_examples
from jahubert.train.report.html import PageData, render_page
from jahubert.train.report.results import results_of

log = logging.getLogger(__name__)

VERSION = 1
KEEP = False  # it reads whatever is there, so it is made anew every time


@dataclass(frozen=True)
class Config:
    exp: Path
    published: dict[str, Any] = field(default_factory=dict)  # name -> {split: WER %}, beside ours of phones
    compare_with: tuple[Path, ...] = ()  # experiments whose scores stand in the same tables
    language: Literal["en", "ja"] = "en"  # of the page
    examples: int = 4  # utterances of each system that are shown with their sound, about 0.2 MB each
    layer_frames: int = 20_000  # on which units of each layer are measured; 0: not at all
    seed: int = 0  # which frames those are
    device: str = "auto"

    def __post_init__(self) -> None:
        raise_config_errors(range_errors(self, {"at least 0": ("examples", "layer_frames")}))


def run(config: Config, out: Path) -> dict[str, Any]:
    if not (config.exp / "prepare" / DONE).exists():
        raise DataError(
            f"{config.exp}: nothing to report yet; run stage=prepare and the stages after it first"
        )
    manifest = Manifest(config.exp / "prepare" / "manifest.arrow")
    times, source = tables.phone_times(config.exp, manifest)
    device = distributed.process_device(config.device)
    try:  # in all processes, which share the clustering
        layers = tables.layer_curves(config.exp, times, config.layer_frames, config.seed, device)
    except AudioError as error:  # a corpus may have moved since; the rest of the report needs no audio
        log.warning("PNMI by layer is left out: %s", error)
        layers = {}
    if distributed.rank():
        return {}
    counted = tables.unit_counts(config.exp, times, source)
    summary = tables.summarize(config.exp, counted, config.compare_with) | {
        "layers": layers,
        "published": config.published,
    }
    table = tables.table(summary)
    write_json(out / "metrics.json", summary)
    with atomic_write(out / "table.txt") as file:
        file.write(table + "\n")
    found = examples(config, manifest, times)
    shown = PageData(config.exp, summary, counted.usage, counted.phones, counted.counts, found)
    with atomic_write(out / "report.html") as file:
        file.write(render_page(shown, config.language))
    print(f"{table}\n\nReport: {out / 'report.html'}")
    return {}


def examples(
    config: Config, manifest: Manifest, times: dict[int, tuple[Phone, ...]]
) -> dict[str, list[Example]]:
    """The worst utterances of every system that has been scored, with the units of the last labelling."""
    stores = tables.label_stores(config.exp)
    store = stores[max(stores)] if stores else None
    return {
        result.name: worst_examples(result.folder("decode"), manifest, times, store, config.examples)
        for result in (results_of(config.exp) if config.examples else ())
    }
