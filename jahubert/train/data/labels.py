"""Label store: the 50 Hz units of every utterance, packed and memory-mapped.

A finished store consists of `units.bin` (uint8 for up to 256 units, otherwise uint16), `offsets.npy` (the
first frame of each utterance, followed by the total number of frames) and `header.json`, which describes the
units. While labels are computed, each shard is written atomically, followed by its CRC-32, to a file in
`shards/`. A run that is killed or fills the disk therefore loses at most one shard per process, and rerunning
it produces the same bytes.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from jahubert.errors import DataError, StaleError, quote
from jahubert.formats.atomic import atomic_write, remove_folder, remove_leftovers
from jahubert.frames import HUBERT, FrameGrid
from jahubert.train.data.manifest import Manifest

MAX_UNITS = 1 << 16  # units are stored in at most 16 bits


@dataclass(frozen=True)
class LabelHeader:
    """Description of the units in a store. Stores with equal headers have the same origin."""

    n_units: int
    feature: str  # name of the feature, e.g. mfcc or hubert
    layer: int | None  # number of the HuBERT layer, or None for other features
    centroids: str  # SHA-256 of the centroids, or of the files from which the units were imported
    model: str | None  # SHA-256 of the HuBERT weights, or None for other features
    manifest: str  # fingerprint of the manifest
    normalize: bool  # whether the HuBERT model normalizes each waveform
    hop: int = HUBERT.hop  # samples
    window: int = HUBERT.window  # samples
    format: int = 1
    precision: str = "fp32"  # number format in which the HuBERT model computed the features

    def __post_init__(self) -> None:
        if self.n_units > MAX_UNITS:
            raise DataError(f"n_units is {self.n_units}, but a label store supports at most {MAX_UNITS}")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.n_units <= 256 else np.uint16)


class LabelWriter:
    """Writer of a label store. Any number of processes can write its shards, in any order."""

    def __init__(self, folder: Path, header: LabelHeader, n_frames: np.ndarray, shard_size: int = 2000):
        """Create a store, or resume an unfinished one.

        Args:
            n_frames: number of frames of every utterance in the manifest.
            shard_size: number of utterances per shard. An unfinished store keeps its shard size.

        Raises:
            StaleError: the folder contains units with a different header.
            DataError: a file of the store is damaged or cannot be written.
        """
        self.folder, self.header, self.n_frames = Path(folder), header, np.asarray(n_frames, np.int64)
        self.shards = self.folder / "shards"
        plan = asdict(header) | {"utterances": len(self.n_frames), "frames": int(self.n_frames.sum())}
        done, started = self.folder / "header.json", self.shards / "plan.json"
        self.shard_size = shard_size
        if done.exists():
            _check_header(done, _read_json(done), plan)
        elif started.exists():
            before = _read_json(started)
            self.shard_size = before.pop("shard_size", shard_size)
            _check_header(started, before, plan)
        else:
            self.shards.mkdir(parents=True, exist_ok=True)
            _write_json(started, plan | {"shard_size": shard_size})

    def __len__(self) -> int:
        """Return the number of shards."""
        return -(-len(self.n_frames) // self.shard_size)

    def rows(self, shard: int) -> range:
        """Return the manifest rows of the utterances in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.n_frames)))

    def pending(self) -> list[int]:
        """Return the indices of the shards that are missing or incomplete."""
        if (self.folder / "header.json").exists():
            return []
        return [shard for shard in range(len(self)) if not self._is_complete(shard)]

    def write(self, shard: int, units: Sequence[np.ndarray]) -> None:
        """Write the units of all utterances in a shard.

        Raises:
            DataError: the number of utterances is wrong, an utterance does not have one unit per frame, a
                unit is out of range or not an integer, or the shard cannot be written.
        """
        rows = self.rows(shard)
        if len(units) != len(rows):
            raise DataError(
                f"shard {shard}: wrong number of utterances (expected {len(rows)}, found {len(units)})"
            )
        packed = []
        for row, unit_S in zip(rows, units, strict=True):
            unit_S = np.asarray(unit_S)
            if len(unit_S) != self.n_frames[row]:
                raise DataError(f"utterance {row}: {len(unit_S)} units, but {self.n_frames[row]} frames")
            if len(unit_S) and not np.issubdtype(unit_S.dtype, np.integer):
                raise DataError(f"utterance {row}: units must be integers, found {unit_S.dtype}")
            if len(unit_S) and not 0 <= np.min(unit_S) <= np.max(unit_S) < self.header.n_units:
                raise DataError(f"utterance {row}: units must be in 0..{self.header.n_units - 1}")
            packed.append(unit_S.astype(self.header.dtype))
        content = np.concatenate(packed).tobytes()
        _write(self._path(shard), lambda out: out.write(content + _crc32(content)))

    def finish(self) -> None:
        """Concatenate the shards and write the header, which marks the store as complete."""
        if not (self.folder / "header.json").exists():
            if missing := self.pending():
                raise DataError(
                    f"{self.folder}: number of missing or incomplete shards: {len(missing)} (the first is "
                    f"shard {missing[0]}); rerun stage=label"
                )
            offsets = np.concatenate([[0], np.cumsum(self.n_frames)]).astype(np.int64)
            _write(self.folder / "units.bin", self._concatenate)
            _write(self.folder / "offsets.npy", lambda out: np.save(out, offsets))
            _write_json(self.folder / "header.json", asdict(self.header))
        remove_leftovers(self.folder)
        remove_folder(self.shards)

    def _concatenate(self, out: BinaryIO) -> None:
        for shard in range(len(self)):
            out.write(self._path(shard).read_bytes()[: -len(_crc32(b""))])

    def _path(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.bin"

    def _is_complete(self, shard: int) -> bool:
        rows = self.rows(shard)
        size = int(self.n_frames[rows.start : rows.stop].sum()) * self.header.dtype.itemsize
        path = self._path(shard)
        if not path.exists():
            return False
        stored = path.read_bytes()
        return stored[size:] == _crc32(stored[:size])


class LabelStore:
    """A finished label store. It is memory-mapped, and therefore cheap to send to a worker process."""

    def __init__(self, folder: Path):
        """Open a store.

        Raises:
            DataError: `folder` does not contain a finished store, or its files are inconsistent.
        """
        self.folder = Path(folder)
        try:
            self.header = LabelHeader(**_read_json(self.folder / "header.json"))
            self.offsets: np.ndarray = np.asarray(np.load(self.folder / "offsets.npy", mmap_mode="r"))
            size = (self.folder / "units.bin").stat().st_size
        except FileNotFoundError as error:
            raise DataError(
                f"{self.folder}: no finished label store ({error.filename} not found); run stage=label"
            ) from None
        except (OSError, ValueError, TypeError, EOFError) as error:
            raise DataError(f"{self.folder}: not a label store ({error}); rerun stage=label") from error
        if self.header.format != LabelHeader.format:
            raise DataError(
                f"{self.folder}: the store has format {self.header.format}, but this version reads "
                f"format {LabelHeader.format}; rerun stage=label"
            )
        if size != self.offsets[-1] * self.header.dtype.itemsize:
            raise DataError(
                f"{self.folder}/units.bin: size is {size} bytes, but according to offsets.npy it must be "
                f"{self.offsets[-1] * self.header.dtype.itemsize}; rerun stage=label"
            )
        # An empty file cannot be mapped. A plain array avoids the overhead of np.memmap on every access.
        self.unit_N: np.ndarray = np.zeros(0, self.header.dtype)
        if size:
            self.unit_N = np.asarray(np.memmap(self.folder / "units.bin", self.header.dtype, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        return LabelStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the units of an utterance, uint8 or uint16 (S,), read-only."""
        if not 0 <= row < len(self):
            raise IndexError(f"utterance {row} is out of range for a label store of {len(self)} utterances")
        return self.unit_N[self.offsets[row] : self.offsets[row + 1]]

    def units(self, row: int, n_frames: int) -> np.ndarray:
        """Return the units of an utterance after checking that there is one per frame.

        Raises:
            DataError: the number of units is not `n_frames`.
        """
        unit_S = self[row]
        if len(unit_S) != n_frames:
            raise DataError(f"{self.folder}: utterance {row} has {len(unit_S)} units, but {n_frames} frames")
        return unit_S

    def check(self, manifest: Manifest) -> None:
        """Raise DataError unless the units were computed for this manifest and on HuBERT's frame grid."""
        if len(self) != len(manifest) or self.header.manifest != manifest.fingerprint:
            raise DataError(
                f"{self.folder}: the labels were computed for a different manifest ({len(self)} utterances, "
                f"fingerprint {self.header.manifest[:8]}) than {manifest.path} ({len(manifest)} utterances, "
                f"fingerprint {manifest.fingerprint[:8]}); rerun stage=label"
            )
        grid = FrameGrid(self.header.window, self.header.hop)
        if grid != HUBERT:
            raise DataError(
                f"{self.folder}: the units have a hop of {grid.hop} and a window of {grid.window} samples, "
                f"but HuBERT's frames have {HUBERT.hop} and {HUBERT.window}; rerun stage=label"
            )
        expected = grid.n_frames(torch.tensor(manifest.n_samples)).numpy()
        wrong = np.flatnonzero(np.diff(self.offsets) != expected)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self.folder}: the numbers of units and frames differ in {len(wrong)} of {len(self)} "
                f"utterances, for example {quote(manifest[row].id)} (row {row}): {len(self[row])} units, "
                f"{expected[row]} frames; rerun stage=label"
            )

    def unit_counts(self) -> np.ndarray:
        """Count the occurrences of each unit, int64 (K,)."""
        counts_K = np.zeros(self.header.n_units, np.int64)
        for start in range(0, len(self.unit_N), 1 << 20):
            counts_K += np.bincount(self.unit_N[start : start + (1 << 20)], minlength=self.header.n_units)
        return counts_K


def _crc32(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "little")


def _check_header(path: Path, before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = [
        f"{key} was {quote(old)}, now {quote(after.get(key))}"
        for key, old in before.items()
        if old != after.get(key)
    ]
    if changed:
        raise StaleError(
            f"{path} describes different units: {'; '.join(changed)}. Delete the folder of the stage to "
            "compute the units again"
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return content
    except ValueError as error:
        raise DataError(
            f"{path}: invalid JSON ({error}); delete {path.parent} and rerun stage=label"
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    data = json.dumps(content, indent=2).encode()
    _write(path, lambda out: out.write(data))


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write a file atomically.

    Raises:
        DataError: the file cannot be written, for example because the disk is full.
    """
    try:
        with atomic_write(path, "wb") as out:
            fill(out)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}. Fix this and rerun the stage"
        ) from error
