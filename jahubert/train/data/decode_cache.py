"""Marks of the recordings of archives that were decoded once, so that no later run decodes them again.

A mark is a JSON file an archive, below the folder that is given: the offsets that were decoded, and which of
them were of no use and why. It counts as long as the archive keeps its size and time. `stage=prepare` keeps
its marks in `work/decoded`: a run that was killed, or that takes in archives which came later, goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from jahubert.train.data.utterances import Rejected, Utterance, Utterances
from jahubert.train.experiment.provenance import write_json

VERSION = 1  # of the check that a mark stands for


class DecodeCache:
    """All marks of a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def lookup(self, items: Utterances) -> tuple[Utterances, list[Rejected]] | None:
        """The sound recordings of `items`, and the others, if all were decoded before; else None."""
        mark = self._read(items.path)
        if not np.isin(items.offset_N, mark["offsets"]).all():
            return None
        broken = mark["broken"]
        sound = [row for row, offset in enumerate(items.offset_N.tolist()) if str(offset) not in broken]
        rejected = [Rejected(*broken[str(o)]) for o in items.offset_N.tolist() if str(o) in broken]
        return items.take(np.array(sound, np.int64)), rejected

    def add(self, path: str, offsets: list[int], broken: dict[str, list[str]]) -> None:
        mark = self._read(path)
        mark["offsets"] = sorted({*mark["offsets"], *offsets})
        mark["broken"] |= broken
        write_json(self._file(path), mark)

    def _read(self, path: str) -> dict[str, Any]:
        state = [VERSION]
        with contextlib.suppress(OSError):  # an archive that is gone: each of its rows will say so
            status = Path(path).stat()
            state += [status.st_size, status.st_mtime_ns]
        try:
            mark = json.loads(self._file(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            mark = {}
        return mark if mark.get("state") == state else {"state": state, "offsets": [], "broken": {}}

    def _file(self, path: str) -> Path:
        return self.folder / f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}.json"


class DecodeRecorder:
    """Collects what becomes of the rows of one `Utterances`, in their order; written after the last one."""

    def __init__(self, marks: DecodeCache, items: Utterances):
        self.marks, self.items = marks, items
        self.done = 0
        self.broken: dict[str, list[str]] = {}

    def add(self, result: Utterance | Rejected) -> None:
        offsets = self.items.offset_N
        if isinstance(result, Rejected):
            self.broken[str(int(offsets[self.done]))] = [result.id, result.reason, result.detail]
        self.done += 1
        if self.done == len(offsets):
            self.marks.add(self.items.path, offsets.tolist(), self.broken)
