"""Experiment report: tables for the terminal, and an HTML page.

Reads   the finished stages of the experiment and of those in `compare_with`, and the audio
Writes  metrics.json, table.txt, report.html

    python -m jahubert.run recipe=demo stage=report report.language=ja
    python -m jahubert.run recipe=demo stage=report report.compare_with=[exp/demo-1,exp/demo-2]
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from jahubert.errors import AudioError, DataError
from jahubert.formats.atomic import atomic_write
from jahubert.train.data.manifest import Manifest, Phone
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import raise_config_errors, range_errors, seed_field
from jahubert.train.experiment.provenance import DONE, read_record, write_json
from jahubert.train.report import units
from jahubert.train.report.examples import Example, find_examples
from jahubert.train.report.html import PageData, render_page, stage_records
from jahubert.train.report.results import find_results, name_experiments, summarize_results
from jahubert.train.report.tables import text_tables

log = logging.getLogger(__name__)

VERSION = 1
KEEP = False  # the report is always regenerated, because it depends on all finished stages


@dataclass(frozen=True)
class Config:
    exp: Path  # folder of the experiment
    # Published WERs (%) to show for comparison, as name: {split: WER}.
    published: dict[str, Any] = field(default_factory=dict)
    compare_with: tuple[Path, ...] = ()  # folders of experiments to show in the same tables and figures
    language: Literal["en", "ja"] = "en"  # language of the HTML page
    # Maximum number of utterances per decoding in each of the groups worst, median and best. An utterance
    # adds about 0.2 MB to the page.
    examples: int = 2
    # Maximum number of frames with known phones on which units of every layer are evaluated; 0: no
    # evaluation.
    layer_frames: int = 20_000
    seed: int = seed_field()  # random seed for drawing the frames of `layer_frames` and for clustering them
    device: str = "auto"  # cpu, cuda, cuda:1, ...; auto: cuda if available, otherwise cpu

    def __post_init__(self) -> None:
        raise_config_errors(range_errors(self, {"at least 0": ("examples", "layer_frames")}))


def run(config: Config, out: Path) -> dict[str, Any]:
    if not (config.exp / "prepare" / DONE).exists():
        raise DataError(f"{config.exp}: nothing to report; run stage=prepare and the following stages first")
    manifest = Manifest(config.exp / "prepare" / "manifest.arrow")
    times, source = units.phone_times(config.exp, manifest)
    device = distributed.process_device(config.device)
    try:  # all processes call this and share the clustering
        layers = units.layer_quality(config.exp, times, config.layer_frames, config.seed, device)
    except AudioError as error:  # the corpus may have been moved; the report does not require audio
        log.warning("the report omits the PNMI of each layer: %s", error)
        layers = None
    if distributed.rank():
        return {}
    experiments = name_experiments(config.exp, config.compare_with)
    systems = summarize_results(experiments)
    counts = units.count_units(config.exp, times, source)
    summary = {
        "corpus": read_record(config.exp / "prepare" / DONE)["metrics"],
        "systems": systems,
        "units": units.unit_quality(config.exp, counts),
        "others": {name: {"units": units.measure_units(exp)} for name, exp in list(experiments.items())[1:]},
        "seconds": {folder: record["seconds"] for folder, record in stage_records(config.exp).items()},
        "layers": None if layers is None else asdict(layers),
        "published": config.published,
    }
    table = text_tables(summary)
    write_json(out / "metrics.json", summary)
    with atomic_write(out / "table.txt") as file:
        file.write(table + "\n")
    page = PageData(experiments, summary, counts, layers, system_examples(config, manifest, times))
    with atomic_write(out / "report.html") as file:
        file.write(render_page(page, config.language))
    print(f"{table}\n\nReport: {out / 'report.html'}")
    return {}


def system_examples(
    config: Config, manifest: Manifest, times: dict[int, tuple[Phone, ...]]
) -> dict[str, dict[str, list[Example]]]:
    """Return example utterances for every scored decoding, with the units of the last iteration."""
    stores = units.label_stores(config.exp)
    store = stores[max(stores)] if stores else None
    return {
        result.name: find_examples(result.folder("decode"), manifest, times, store, config.examples)
        for result in (find_results(config.exp) if config.examples else ())
    }
