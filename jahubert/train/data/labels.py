"""Units of every utterance: packed integers at 50 Hz, memory-mapped, written shard by shard.

A finished store is `units.bin` (uint8 up to 256 units, else uint16), `offsets.npy` (first frame of each
utterance, and the end) and `header.json`, which says what the numbers mean. While it is being written the
shards lie in `shards/`; each takes its name only when it is whole and on the disk, so that a run that is
killed, or that fills the disk, loses one shard at most and ends in the same bytes when it is started again.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from jahubert.errors import DataError, StaleError
from jahubert.frames import HUBERT, FrameGrid
from jahubert.train.data.manifest import Manifest


@dataclass(frozen=True)
class LabelHeader:
    """What the units of a store are; two stores with one header were made from the same things."""

    n_units: int
    feature: str  # mfcc or hubert
    layer: int | None  # of the model, for hubert
    centroids: str  # sha256
    model: str | None  # sha256 of the weights, for hubert
    manifest: str  # fingerprint
    normalize: bool
    hop: int = HUBERT.hop  # samples
    window: int = HUBERT.window  # samples
    format: int = 1

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.n_units <= 256 else np.uint16)


class LabelWriter:
    """Writes a store in shards of `shard_size` utterances, in any order, by any number of processes."""

    def __init__(self, folder: Path, header: LabelHeader, n_frames: np.ndarray, shard_size: int = 2000):
        """`n_frames`: frames of every utterance of the manifest. A folder that was started with another
        `shard_size` keeps its own.

        Raises:
            StaleError: the folder holds units that were made from something else; names the field.
        """
        self.folder, self.header, self.n_frames = Path(folder), header, np.asarray(n_frames, np.int64)
        self.shards = self.folder / "shards"
        plan = asdict(header) | {"utterances": len(self.n_frames), "frames": int(self.n_frames.sum())}
        done, started = self.folder / "header.json", self.shards / "plan.json"
        self.shard_size = shard_size
        if done.exists():
            _refuse_other(self.folder, _read_json(done), plan)
        elif started.exists():
            before = _read_json(started)
            self.shard_size = before.pop("shard_size", shard_size)
            _refuse_other(self.folder, before, plan)
        else:
            self.shards.mkdir(parents=True, exist_ok=True)
            _write_json(started, plan | {"shard_size": shard_size})

    def __len__(self) -> int:
        """Number of shards."""
        return -(-len(self.n_frames) // self.shard_size)

    def rows(self, shard: int) -> range:
        """The utterances of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, len(self.n_frames)))

    def pending(self) -> list[int]:
        """Shards that are not written yet, or not whole."""
        if (self.folder / "header.json").exists():
            return []
        return [shard for shard in range(len(self)) if not self._is_whole(shard)]

    def write(self, shard: int, units: Sequence[np.ndarray]) -> None:
        """Write the units of all utterances of a shard.

        Raises:
            DataError: an utterance has another number of units than frames, or a unit that is not there; the
                disk is full.
        """
        rows = self.rows(shard)
        if len(units) != len(rows):
            raise DataError(f"shard {shard} has {len(rows)} utterances, but units of {len(units)} were given")
        packed = []
        for row, unit_S in zip(rows, units, strict=True):
            unit_S = np.asarray(unit_S)
            if len(unit_S) != self.n_frames[row]:
                raise DataError(f"utterance {row}: {len(unit_S)} units, but {self.n_frames[row]} frames")
            if len(unit_S) and not np.issubdtype(unit_S.dtype, np.integer):
                raise DataError(f"utterance {row}: units are integers, but these are {unit_S.dtype}")
            if len(unit_S) and not 0 <= np.min(unit_S) <= np.max(unit_S) < self.header.n_units:
                raise DataError(f"utterance {row}: units outside 0..{self.header.n_units - 1}")
            packed.append(unit_S.astype(self.header.dtype))
        content = np.concatenate(packed).tobytes()
        _write(self._path(shard), lambda out: out.write(content))

    def finish(self) -> None:
        """Join the shards; the header is written last and makes the store whole."""
        if not (self.folder / "header.json").exists():
            if missing := self.pending():
                raise DataError(f"{self.folder}: shards {missing[:5]} are missing; run stage=label again")
            offsets = np.concatenate([[0], np.cumsum(self.n_frames)]).astype(np.int64)
            _write(self.folder / "units.bin", self._join)
            _write(self.folder / "offsets.npy", lambda out: np.save(out, offsets))
            _write_json(self.folder / "header.json", asdict(self.header))
        for left_behind in self.folder.glob("*.tmp"):  # by a killed run
            left_behind.unlink(missing_ok=True)
        shutil.rmtree(self.shards, ignore_errors=True)

    def _join(self, out: BinaryIO) -> None:
        for shard in range(len(self)):
            with self._path(shard).open("rb") as file:
                shutil.copyfileobj(file, out)

    def _path(self, shard: int) -> Path:
        return self.shards / f"{shard:06d}.bin"

    def _is_whole(self, shard: int) -> bool:
        rows = self.rows(shard)
        size = int(self.n_frames[rows.start : rows.stop].sum()) * self.header.dtype.itemsize
        path = self._path(shard)
        return path.exists() and path.stat().st_size == size


class LabelStore:
    """A finished store, memory-mapped; cheap to send to a worker process."""

    def __init__(self, folder: Path):
        """Raises DataError where there is none, or its files do not fit each other."""
        self.folder = Path(folder)
        try:
            self.header = LabelHeader(**_read_json(self.folder / "header.json"))
            self.offsets: np.ndarray = np.asarray(np.load(self.folder / "offsets.npy", mmap_mode="r"))
            size = (self.folder / "units.bin").stat().st_size
        except FileNotFoundError as error:
            raise DataError(
                f"{self.folder}: no finished label store ({error.filename} is missing); run stage=label"
            ) from None
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.folder}: not a label store ({error}); run stage=label again") from error
        if self.header.format != LabelHeader.format:
            raise DataError(f"{self.folder}: format {self.header.format}, but this version reads 1")
        if size != self.offsets[-1] * self.header.dtype.itemsize:
            raise DataError(
                f"{self.folder}/units.bin: {size} bytes, but offsets.npy asks for {self.offsets[-1]} units "
                f"of {self.header.dtype.itemsize}; run stage=label again"
            )
        # An empty file cannot be mapped. The plain view saves memmap's bookkeeping for every utterance.
        self.unit_N: np.ndarray = np.zeros(0, self.header.dtype)
        if size:
            self.unit_N = np.asarray(np.memmap(self.folder / "units.bin", self.header.dtype, "r"))

    def __reduce__(self) -> tuple[Any, ...]:
        return LabelStore, (self.folder,)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Units of an utterance, uint8 or uint16 (S,), read-only."""
        if not 0 <= row < len(self):
            raise IndexError(f"utterance {row} of a label store of {len(self)}")
        return self.unit_N[self.offsets[row] : self.offsets[row + 1]]

    def units(self, row: int, n_frames: int) -> np.ndarray:
        """The units of an utterance that has `n_frames` frames.

        Raises:
            DataError: there are more or fewer units than frames.
        """
        unit_S = self[row]
        if len(unit_S) != n_frames:
            raise DataError(f"{self.folder}: utterance {row} has {len(unit_S)} units, but {n_frames} frames")
        return unit_S

    def check(self, manifest: Manifest) -> None:
        """Raises DataError if the units are not of this manifest and HuBERT's grid, with what differs."""
        if len(self) != len(manifest) or self.header.manifest != manifest.fingerprint:
            raise DataError(
                f"{self.folder}: units of another manifest ({len(self)} utterances, made from "
                f"{self.header.manifest[:8]}; asked for {len(manifest)}, {manifest.fingerprint[:8]}); "
                "run stage=label again"
            )
        grid = FrameGrid(self.header.window, self.header.hop)
        if grid != HUBERT:
            raise DataError(
                f"{self.folder}: a unit every {grid.hop} samples from windows of {grid.window}, but "
                f"HuBERT has one every {HUBERT.hop} from {HUBERT.window}; run stage=label again"
            )
        expected = grid.n_frames(torch.tensor(manifest.n_samples)).numpy()
        wrong = np.flatnonzero(np.diff(self.offsets) != expected)
        if len(wrong):
            row = int(wrong[0])
            raise DataError(
                f"{self.folder}: utterance {manifest[row].id!r} (number {row}) has {len(self[row])} units, "
                f"but {expected[row]} frames, and so {len(wrong)} utterances in all; run stage=label again"
            )

    def unit_counts(self) -> np.ndarray:
        """How often each unit occurs, (K,) int64."""
        counts_K = np.zeros(self.header.n_units, np.int64)
        for start in range(0, len(self.unit_N), 1 << 20):
            counts_K += np.bincount(self.unit_N[start : start + (1 << 20)], minlength=self.header.n_units)
        return counts_K


def _refuse_other(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    wrong = [f"{key} was {old!r}, now {now.get(key)!r}" for key, old in before.items() if old != now.get(key)]
    if wrong:
        raise StaleError(f"{folder}: holds other units: {'; '.join(wrong)}; delete it to make it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(
            f"{path}: not JSON ({error}); delete {path.parent} and run stage=label again"
        ) from error


def _write_json(path: Path, content: dict[str, Any]) -> None:
    data = json.dumps(content, indent=2).encode()
    _write(path, lambda out: out.write(data))


def _write(path: Path, fill: Callable[[BinaryIO], Any]) -> None:
    """Write beside, to the disk, then rename: the name stands for a whole file, whatever happens."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")  # several processes may write one file
    try:
        with beside.open("wb") as out:
            fill(out)
            out.flush()
            os.fsync(out.fileno())
        beside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}. What was written before is kept: mend that and "
            "start the stage again"
        ) from error
    finally:
        beside.unlink(missing_ok=True)
