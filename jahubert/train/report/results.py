"""What an experiment has scored: each decoding of each system, and what a table calls it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert.train.experiment.provenance import DONE, read_record
from jahubert.train.experiment.registry import decoding_of, stage_folder


@dataclass(frozen=True)
class Result:
    """A decoding of a system, and its scores."""

    exp: Path
    system: str
    decoding: str | None

    def folder(self, stage: str) -> Path:
        return self.exp / stage_folder(stage, None, self.system, self.decoding)

    @property
    def name(self) -> str:
        """Within its experiment."""
        return f"{self.system}, {self.decoding}" if self.decoding else self.system

    @property
    def label(self) -> str:
        """Anywhere: experiment, model, subset of the corpus, search."""
        return label_of(self.folder("decode"))

    def summary(self) -> dict[str, Any]:
        """Its scores, and what they were learnt from."""
        finetune = read_record(self.folder("finetune") / DONE)
        return {
            "label": self.label,
            "updates": finetune["settings"]["train.max_steps"],
            "hours": finetune["metrics"]["hours"],
            "utterances": finetune["metrics"]["utterances"],
            "scores": json.loads((self.folder("score") / "scores.json").read_text(encoding="utf-8")),
        }


def results_of(exp: Path) -> Iterator[Result]:
    """All that is scored in an experiment: systems by name, the plain decoding of each first."""
    for system in sorted((exp / "systems").glob("*")):
        for folder in sorted(system.glob("score*")):
            if (folder / DONE).exists():
                yield Result(exp, system.name, decoding_of(folder))


def label_of(decode: Path) -> str:
    """What hypotheses are of, by the records of the stages before them; their folder where there are none."""
    system, exp = decode.parent, decode.parent.parent.parent
    prepare, finetune, own = (
        read_record(folder / DONE) if (folder / DONE).exists() else {}
        for folder in (exp / "prepare", system / "finetune", decode)
    )
    if not own:
        return str(decode)
    settings = own["settings"]  # an earlier version did not describe its search
    before = f"beam {settings['beam']}" if settings["search"] == "beam" else settings["search"]
    search = own["metrics"].get("search", before)
    decoding = decoding_of(decode)
    parts = [
        exp.resolve().name,
        "" if system.name == "main" else system.name,
        finetune.get("metrics", {}).get("model"),
        prepare.get("settings", {}).get("options.subset"),
        None if decoding is None or decoding in search else decoding,
        search,
    ]
    return ", ".join(str(part) for part in parts if part)
