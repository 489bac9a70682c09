"""A corpus folder becomes a manifest, through the recipe's own reader.

Reads   the corpus, with `prepare()` of `recipes/<recipe>/prepare.py`
Writes  manifest.arrow, rejected.jsonl (what was dropped and why), work/ (audio that the recipe made)

    python -m jahubert.run recipe=tofugu stage=prepare data=/path/to/japanese-vocabulary-pronunciation-audio
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.train import ranks
from jahubert.train.config import structure
from jahubert.train.lookup import recipe_folder, resolve
from jahubert.train.manifest import write_manifest

VERSION = 1


@dataclass(frozen=True)
class Config:
    recipe: str  # a name under recipes/, or a folder with a prepare.py
    data: str | None = None  # the corpus folder
    options: dict[str, Any] = field(default_factory=dict)  # fields of the recipe's own Config
    seed: int = 0


def run(config: Config, out: Path) -> dict[str, Any]:
    return ranks.from_first(lambda: prepare(config, out))


def prepare(config: Config, out: Path) -> dict[str, Any]:
    """The work of the stage, which one process does."""
    file = recipe_folder(config.recipe) / "prepare.py"
    options = structure(config.options, resolve(f"{file}:Config", {}, "recipe"), "prepare.options")
    read = resolve(f"{file}:prepare", {}, "recipe")
    data = None if config.data is None else Path(config.data).expanduser()
    work = out / "work"
    work.mkdir(exist_ok=True)
    counts = write_manifest(out / "manifest.arrow", read(data, work, options, config.seed))
    if not counts["utterances"]:
        raise DataError(f"{config.data or config.recipe}: no usable utterance; {out}/rejected.jsonl says why")
    return counts
