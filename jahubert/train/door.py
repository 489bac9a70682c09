"""What the settings do not say of themselves: whether the command that they are for can end well.

A corpus is read for hours before a model is opened. What can be known of the model, of a word list or of the
number of processes without any work is looked at before the first stage, and all of it is said at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jahubert.errors import UserError
from jahubert.hub import check
from jahubert.train.config import inputs
from jahubert.train.provenance import DONE, input_fingerprint


def mistakes(jobs: Sequence[tuple[str, Any, Path]], made: Sequence[Path], processes: int) -> list[str]:
    """A sentence on each thing that a stage would stumble over.

    Args:
        jobs: (stage, its config, its folder).
        made: the folders that the command writes; what lies in them need not be there yet.
        processes: over which a training is shared.
    """
    made = [folder.absolute() for folder in made]
    return [said for job in jobs for said in _of(*job, made, processes)]


def _of(stage: str, config: Any, out: Path, made: Sequence[Path], processes: int) -> Iterator[str]:
    for name, path, model in inputs(config):
        place = path.absolute()
        if any(folder in (place, *place.parents) or place in folder.parents for folder in made):
            continue
        setting = f"{stage}.{name}"
        try:
            input_fingerprint(setting, path, model)
        except UserError as error:
            yield str(error)
            continue
        try:
            if model:
                check(path)
        except UserError as error:
            yield f"{setting}: {error}"
    try:
        if hasattr(config, "train") and not (out / DONE).exists():  # else nothing is left to share
            config.train.share(processes)
    except UserError as error:
        yield f"{stage}.{error}"
