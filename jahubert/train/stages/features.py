"""A bounded random sample of feature frames, for k-means.

Reads   the manifest; in iteration 2 and later the model of the iteration before
Writes  sample.npy (frames, dim) float32, header.json (which feature, layer and model)

    python -m jahubert.run recipe=demo stage=features iteration=1

The sample is uniform over the frames of the whole split, and the same for any number of processes: which
frames are taken is drawn once from the manifest's lengths. Every process writes its frames to their places in
the one file, so nobody ever holds the sample.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.train.clustering.features import Feature
from jahubert.train.clustering.kmeans import draw_rows
from jahubert.train.clustering.streaming import feature_header, make_feature, stream_features
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.masking import seeded_rng
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import (
    model_field,
    raise_config_errors,
    range_errors,
    runtime_field,
    split_field,
)
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import write_json

VERSION = 2
_PART = 500  # utterances between two saves


@dataclass(frozen=True)
class Config:
    manifest: Path
    kind: str = "mfcc"  # mfcc, hubert, or module:attribute
    model: Path | None = model_field(None)  # for hubert: the folder of a trained model
    layer: int = 6  # for hubert: output of this block
    split: str = split_field("train")
    sample_frames: int = 2_000_000
    seed: int = 0
    device: str = runtime_field("auto")
    batch_seconds: float = runtime_field(80.0)

    def __post_init__(self) -> None:
        raise_config_errors(
            range_errors(self, {"at least 1": ("layer", "sample_frames"), "positive": ("batch_seconds",)})
        )


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest = Manifest(config.manifest)
    device = distributed.process_device(config.device)
    feature = make_feature(config.kind, config.model, config.layer, device)
    sample = draw_sample(manifest, feature, config)
    marks, beside, final = out / "parts", out / "tmp_sample.npy", out / "sample.npy"
    if not distributed.rank0_broadcast(final.exists):
        data_start = distributed.rank0_broadcast(lambda: _reserve(beside, (len(sample.frames), feature.dim)))
        parts = {
            part: range(part * _PART, min((part + 1) * _PART, len(sample.rows)))
            for part in range(distributed.rank(), -(-len(sample.rows) // _PART), distributed.world())
            if not (marks / f"{part:06d}").exists()
        }
        with progress("features", "utterances", sum(map(len, parts.values()))) as done:
            for part, chosen in parts.items():
                rows = sample.rows[chosen.start : chosen.stop].tolist()
                start = data_start + 4 * feature.dim * int(sample.bounds[chosen.start])
                with closing(stream_features(manifest, feature, rows, config.batch_seconds)) as found:
                    frames = ((number, f_SD) for number, (_, f_SD) in zip(chosen, found, strict=True))
                    _write_part(beside, start, sample, frames, done)
                marks.mkdir(exist_ok=True)
                (marks / f"{part:06d}").touch()
        distributed.barrier()
    if distributed.rank() == 0:
        write_json(out / "header.json", feature_header(feature, config.kind, config.layer))
        if not final.exists():
            beside.replace(final)
        shutil.rmtree(marks, ignore_errors=True)
    distributed.barrier()
    return {"frames": len(sample.frames), "dim": feature.dim, "utterances": len(sample.rows)}


@dataclass(frozen=True)
class Sample:
    """The frames that were drawn, utterance by utterance."""

    rows: np.ndarray  # (U,) of the manifest: utterances that hold any, ascending
    bounds: np.ndarray  # (U + 1,): those of utterance i are frames[bounds[i] : bounds[i + 1]]
    frames: np.ndarray  # (N,), counted within each utterance


def draw_sample(manifest: Manifest, feature: Feature, config: Config) -> Sample:
    """Which frames are taken: all choices of `sample_frames` frames of the split are equally likely."""
    rows = manifest.indices(split=config.split)
    ends = np.cumsum(feature.grid.n_frames(manifest.n_samples[rows]))
    if not len(rows) or not ends[-1]:
        raise DataError(f"{config.manifest}: no frame in split {config.split!r}")
    size = min(config.sample_frames, int(ends[-1]))
    taken = draw_rows(int(ends[-1]), size, seeded_rng(config.seed, 11))
    where = np.searchsorted(ends, taken, side="right")
    utterances, firsts = np.unique(where, return_index=True)
    starts = np.concatenate([[0], ends])[where]
    return Sample(rows[utterances], np.append(firsts, size), taken - starts)


def _reserve(path: Path, shape: tuple[int, int]) -> int:
    """An array of this shape on the disk, whatever a broken-off run left in it; where its data begin."""
    path.touch()
    with path.open("r+b") as file:
        layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, layout)
        start = file.tell()
        file.truncate(start + 4 * shape[0] * shape[1])
    return start


def _write_part(
    path: Path, start: int, sample: Sample, frames: Iterable[tuple[int, Tensor]], done: Callable[[int], None]
) -> None:
    """What was drawn of utterances that come as (number in the sample, all frames), from byte `start` of the
    file on, and safely onto the disk."""
    with path.open("r+b") as file:
        file.seek(start)
        for number, f_SD in frames:
            wanted = torch.from_numpy(sample.frames[sample.bounds[number] : sample.bounds[number + 1]])
            file.write(f_SD[wanted.to(f_SD.device)].float().cpu().numpy().astype("<f4").tobytes())
            done(1)
        file.flush()
        os.fsync(file.fileno())
