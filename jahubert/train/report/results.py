"""Scored systems of an experiment, with the labels used for them in tables."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jahubert.errors import DataError
from jahubert.train.experiment.provenance import DONE, read_record
from jahubert.train.experiment.registry import decoding_of, stage_folder


@dataclass(frozen=True)
class Result:
    """The scores of one decoding of a system."""

    exp: Path
    system: str
    decoding: str | None

    def folder(self, stage: str) -> Path:
        return self.exp / stage_folder(stage, None, self.system, self.decoding)

    @property
    def name(self) -> str:
        """Name of the result, which is unique in the experiment."""
        return f"{self.system}, {self.decoding}" if self.decoding else self.system

    def summary(self) -> dict[str, Any]:
        """Read the label, the scores, the amount of fine-tuning data and the number of updates."""
        finetune = read_record(self.folder("finetune") / DONE)
        return {
            "label": result_label(self.folder("decode")),
            "updates": finetune["settings"]["train.max_steps"],
            "hours": finetune["metrics"]["hours"],
            "utterances": finetune["metrics"]["utterances"],
            "scores": json.loads((self.folder("score") / "scores.json").read_text(encoding="utf-8")),
        }


def find_results(exp: Path) -> Iterator[Result]:
    """Iterate over the scored decodings of an experiment, sorted by system, default decoding first."""
    for system in sorted((exp / "systems").glob("*")):
        for folder in sorted(system.glob("score*")):
            if (folder / DONE).exists():
                yield Result(exp, system.name, decoding_of(folder))


def name_experiments(exp: Path, others: Sequence[Path] = ()) -> dict[str, Path]:
    """Map unique names to experiments, `exp` first. Names are folder names, or paths if necessary."""
    by_path = {path.resolve(): path for path in (exp, *others)}
    names = [path.name for path in by_path]
    return {
        path.name if names.count(path.name) == 1 else str(given): given for path, given in by_path.items()
    }


def summarize_results(experiments: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """Collect the summaries of all systems.

    The keys are names of systems for the first experiment, and "experiment: system" for all others.

    Raises:
        DataError: an experiment other than the first has no scores.
    """
    (_, exp), *others = experiments.items()
    systems = {result.name: result.summary() for result in find_results(exp)}
    for name, other in others:
        summaries = {f"{name}: {result.name}": result.summary() for result in find_results(other)}
        if not summaries:
            raise DataError(f"report.compare_with: {other} has no scores; run its stage=score first")
        systems |= summaries
    return systems


def result_label(decode: Path) -> str:
    """Return a label for the hypotheses in a decode folder.

    The label names the experiment, system, model, subset, decoding and search, according to the records of
    the stages. Without a record of the decode stage, it is the path of the folder.
    """
    system, exp = decode.parent, decode.parent.parent.parent
    prepare_record, finetune_record, decode_record = (
        read_record(folder / DONE) if (folder / DONE).exists() else {}
        for folder in (exp / "prepare", system / "finetune", decode)
    )
    if not decode_record:
        return str(decode)
    search = decode_record["metrics"]["search"]
    decoding = decoding_of(decode)
    parts = [
        exp.resolve().name,
        "" if system.name == "main" else system.name,
        finetune_record.get("metrics", {}).get("model"),
        prepare_record.get("settings", {}).get("options.subset"),
        None if decoding is None or decoding in search else decoding,
        search,
    ]
    return ", ".join(str(part) for part in parts if part)
