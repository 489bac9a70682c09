"""Cache of decoding checks, so that an archive need not be decoded again after it has been checked.

One JSON file per archive lists the offsets of the decoded recordings and the reasons for rejecting some of
them. It is valid as long as the size and modification time of the archive do not change. `stage=prepare`
keeps the cache in `work/decoded`, so that it can resume an interrupted run and add new archives later.
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

VERSION = 1  # version of the decoding check; changing it invalidates all caches


class DecodeCache:
    """A folder of cache files, one per archive."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def lookup(self, items: Utterances) -> tuple[Utterances, list[Rejected]] | None:
        """Return the usable and the rejected recordings of `items`, or None if some were never decoded."""
        entry = self._read(items.path)
        if not np.isin(items.offset_N, entry["offsets"]).all():
            return None
        broken = entry["broken"]
        offsets = [str(offset) for offset in items.offset_N.tolist()]
        usable = [row for row, offset in enumerate(offsets) if offset not in broken]
        rejected = [Rejected(*broken[offset]) for offset in offsets if offset in broken]
        return items.take(np.array(usable, np.int64)), rejected

    def add(self, path: str, offsets: list[int], broken: dict[str, list[str]]) -> None:
        """Add the offsets of the recordings that were decoded in an archive.

        Args:
            broken: mapping from the offset of a rejected recording to the fields of its `Rejected`.
        """
        entry = self._read(path)
        entry["offsets"] = sorted({*entry["offsets"], *offsets})
        entry["broken"] |= broken
        write_json(self._file(path), entry)

    def _read(self, path: str) -> dict[str, Any]:
        state = [VERSION]
        with contextlib.suppress(OSError):  # a missing archive is reported when its recordings are read
            status = Path(path).stat()
            state += [status.st_size, status.st_mtime_ns]
        try:
            entry = json.loads(self._file(path).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            entry = {}
        return entry if entry.get("state") == state else {"state": state, "offsets": [], "broken": {}}

    def _file(self, path: str) -> Path:
        return self.folder / f"{Path(path).stem}-{hashlib.sha256(path.encode()).hexdigest()[:8]}.json"


class DecodeRecorder:
    """Collects the decoding results for the recordings of one archive in order, and saves them at the end."""

    def __init__(self, cache: DecodeCache, items: Utterances):
        self.cache, self.items = cache, items
        self.n_decoded = 0
        self.broken: dict[str, list[str]] = {}

    def add(self, result: Utterance | Rejected) -> None:
        offsets = self.items.offset_N
        if isinstance(result, Rejected):
            self.broken[str(int(offsets[self.n_decoded]))] = [result.id, result.reason, result.detail]
        self.n_decoded += 1
        if self.n_decoded == len(offsets):
            self.cache.add(self.items.path, offsets.tolist(), self.broken)
