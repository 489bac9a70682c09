"""A bounded random sample of feature frames, for k-means.

Reads   the manifest; in iteration 2 and later the model of the iteration before
Writes  sample.npy (frames, dim) float32, header.json (which feature, layer and model)

    python -m jahubert.run recipe=demo stage=features iteration=1

The sample is uniform over the frames of the whole split, and the same for any number of processes: which
frames are taken is drawn once from the manifest's lengths. Memory is bounded by `sample_frames`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jahubert.errors import ConfigError, DataError
from jahubert.train import ranks
from jahubert.train.config import free
from jahubert.train.features import Feature
from jahubert.train.manifest import Manifest
from jahubert.train.masking import generator
from jahubert.train.provenance import write_json
from jahubert.train.streaming import feature_header, make_feature, stream_features

VERSION = 1
_PART = 500  # utterances between two saves


@dataclass(frozen=True)
class Config:
    manifest: Path
    kind: str = "mfcc"  # mfcc, hubert, or module:attribute
    model: Path | None = None  # for hubert: the folder of a trained model
    layer: int = 6  # for hubert: output of this block
    split: str = "train"
    sample_frames: int = 2_000_000
    seed: int = 0
    device: str = free("auto")
    batch_seconds: float = free(80.0)

    def __post_init__(self) -> None:
        if self.sample_frames < 1:
            raise ConfigError(f"sample_frames is {self.sample_frames}, but must be at least 1")


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest = Manifest(config.manifest)
    device = ranks.pick_device(config.device)
    feature = make_feature(config.kind, config.model, config.layer, device)
    chosen = choose_frames(manifest, feature, config)
    rows = sorted(chosen)
    parts = [rows[i : i + _PART] for i in range(0, len(rows), _PART)]
    for number in range(ranks.rank(), len(parts), ranks.world()):
        _write_part(
            out / f"part_{number:05d}.npy", manifest, feature, parts[number], chosen, config.batch_seconds
        )
    ranks.barrier()
    files = [out / f"part_{number:05d}.npy" for number in range(len(parts))]
    if ranks.rank() == 0:
        beside = out / "tmp_sample.npy"
        sample_ND = np.concatenate([np.load(file) for file in files])
        np.save(beside, sample_ND)
        beside.replace(out / "sample.npy")
        write_json(out / "header.json", feature_header(feature, config.kind, config.layer))
        for file in files:
            file.unlink()
    ranks.barrier()
    return {
        "frames": sum(len(taken) for taken in chosen.values()),
        "dim": feature.dim,
        "utterances": len(rows),
    }


def choose_frames(manifest: Manifest, feature: Feature, config: Config) -> dict[int, np.ndarray]:
    """For each row of the manifest that has any, the frames that are in the sample."""
    rows = manifest.indices(split=config.split)
    n_frames = feature.grid.n_frames(manifest.n_samples[rows])
    ends = np.cumsum(n_frames)
    if not len(rows) or not ends[-1]:
        raise DataError(f"{config.manifest}: no frame in split {config.split!r}")
    size = min(config.sample_frames, int(ends[-1]))
    taken = np.sort(generator(config.seed, 11).choice(int(ends[-1]), size=size, replace=False, shuffle=False))
    where = np.searchsorted(ends, taken, side="right")
    starts = ends - n_frames
    bounds = np.flatnonzero(np.diff(where)) + 1
    return {
        int(rows[w[0]]): t - starts[w[0]]
        for w, t in zip(np.split(where, bounds), np.split(taken, bounds), strict=True)
    }


def _write_part(
    path: Path,
    manifest: Manifest,
    feature: Feature,
    rows: list[int],
    chosen: dict[int, np.ndarray],
    seconds: float,
) -> None:
    if path.exists():
        return
    frames = [
        f_SD[chosen[row]].cpu().numpy() for row, f_SD in stream_features(manifest, feature, rows, seconds)
    ]
    beside = path.with_name("tmp_" + path.name)
    np.save(beside, np.concatenate(frames).astype(np.float32))
    beside.replace(path)
