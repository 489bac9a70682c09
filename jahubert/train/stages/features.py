"""Random sample of feature frames for k-means.

Reads   the manifest; for kind=hubert, also a model (by default, that of the previous iteration)
Writes  sample.npy, float32 (frames, dim); header.json: description of the feature

    python -m jahubert.run recipe=demo stage=features iteration=1

The sample is drawn uniformly from the frames of the split. The positions of the sampled frames depend only on
the settings and on the lengths in the manifest, not on the number of processes. All processes write their
frames to the same file, so that the sample need not fit in memory.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.formats.atomic import atomic_write, remove_folder
from jahubert.frames import HUBERT
from jahubert.model.kernels.indexing import to_device_async
from jahubert.train.clustering.features import Feature
from jahubert.train.clustering.frames import draw_rows
from jahubert.train.clustering.streaming import feature_header, make_feature, stream_features, to_host
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.masking import seeded_rng
from jahubert.train.experiment import distributed
from jahubert.train.experiment.config import (
    model_field,
    raise_config_errors,
    range_errors,
    runtime_field,
    seed_field,
    split_field,
)
from jahubert.train.experiment.progress import progress
from jahubert.train.experiment.provenance import write_json

VERSION = 2
_PART_SIZE = 500  # number of utterances per part; a killed process loses at most the current part


@dataclass(frozen=True)
class Config:
    manifest: Path  # manifest.arrow of the prepare stage
    kind: str = "mfcc"  # mfcc, hubert, or a feature extractor as module:attribute or file.py:attribute
    model: Path | None = model_field(None)  # for hubert: the trained model
    layer: int = 6  # for hubert: number of the Transformer layer, counted from 1
    precision: Literal["fp32", "bf16"] = "fp32"  # for hubert: number format of the computation
    split: str = split_field("train")  # split from which frames are sampled
    sample_frames: int = 2_000_000  # number of frames to sample; all frames if the split has fewer
    seed: int = seed_field()  # random seed for drawing the frames
    device: str = runtime_field("auto")  # cpu, cuda, cuda:1, ...; auto: cuda if available, otherwise cpu
    # Maximum seconds of audio per batch. A longer utterance is a batch of its own.
    batch_seconds: float = runtime_field(80.0)
    workers: int = runtime_field(0)  # number of reading processes per device; 0: threads in this process

    def __post_init__(self) -> None:
        errors = range_errors(
            self,
            {
                "at least 1": ("layer", "sample_frames"),
                "at least 0": ("workers",),
                "positive": ("batch_seconds",),
            },
        )
        if self.kind != "hubert" and self.precision != "fp32":
            errors.append(
                f"precision is {self.precision}, but only features of kind hubert can be computed in another "
                f"precision than fp32, and kind is {self.kind}"
            )
        raise_config_errors(errors)

    def unused_settings(self) -> tuple[str, ...]:
        """Return the settings that have no effect: only features of HuBERT have a model and a layer."""
        return () if self.kind == "hubert" else ("model", "layer")


def run(config: Config, out: Path) -> dict[str, Any]:
    manifest = Manifest(config.manifest)
    device = distributed.process_device(config.device)
    feature = make_feature(config.kind, config.model, config.layer, device, config.precision)
    HUBERT.hop_ratio(feature.grid)  # raises an error for features that `label` could not use
    sample = draw_sample(manifest, feature, config)
    temporary = out / "tmp_sample.npy"
    final = out / "sample.npy"
    if not distributed.rank0_broadcast(final.exists):
        data_start = distributed.rank0_broadcast(
            lambda: _allocate(temporary, (len(sample.frames), feature.dim))
        )
        starts = data_start + 4 * feature.dim * sample.bounds  # byte offset of each utterance
        _marker(out, 0).parent.mkdir(exist_ok=True)
        parts = {}
        for part in range(distributed.rank(), -(-len(sample.rows) // _PART_SIZE), distributed.world()):
            chosen = range(part * _PART_SIZE, min((part + 1) * _PART_SIZE, len(sample.rows)))
            if not _is_written(temporary, starts[chosen.start], starts[chosen.stop], _marker(out, part)):
                parts[part] = chosen
        with progress("features", "utterances", sum(map(len, parts.values()))) as done:
            rows = (sample.rows[chosen.start : chosen.stop].tolist() for chosen in parts.values())
            with closing(
                stream_features(manifest, feature, rows, config.batch_seconds, config.workers)
            ) as stream:
                frames = to_host(_sampled_frames(sample, chain.from_iterable(parts.values()), stream))
                for part, chosen in parts.items():
                    crc32 = _write_part(temporary, starts[chosen.start], islice(frames, len(chosen)), done)
                    with atomic_write(_marker(out, part)) as marker:
                        marker.write(crc32)
        distributed.barrier()
    if distributed.rank() == 0:
        write_json(out / "header.json", feature_header(feature, config.kind, config.layer))
        if not final.exists():
            temporary.replace(final)
        remove_folder(_marker(out, 0).parent)
    distributed.barrier()
    return {"frames": len(sample.frames), "dim": feature.dim, "utterances": len(sample.rows)}


@dataclass(frozen=True)
class Sample:
    """Positions of the sampled frames, sorted by utterance."""

    rows: np.ndarray  # (U,) manifest rows of the utterances that have sampled frames, ascending
    bounds: np.ndarray  # (U + 1,) frames[bounds[i] : bounds[i + 1]] belong to utterance i
    frames: np.ndarray  # (N,) index of each frame within its utterance


def draw_sample(manifest: Manifest, feature: Feature, config: Config) -> Sample:
    """Draw `sample_frames` frames (or all, if there are fewer) from the split without replacement."""
    rows = manifest.indices(split=config.split)
    ends = np.cumsum(feature.grid.n_frames(manifest.n_samples[rows]))
    if not len(rows) or not ends[-1]:
        raise DataError(
            f"features.split: split {config.split!r} of {config.manifest} has no frames; choose another split"
        )
    size = min(config.sample_frames, int(ends[-1]))
    taken = draw_rows(int(ends[-1]), size, seeded_rng(config.seed, 11))
    where = np.searchsorted(ends, taken, side="right")
    utterances, firsts = np.unique(where, return_index=True)
    starts = np.concatenate([[0], ends])[where]
    return Sample(rows[utterances], np.append(firsts, size), taken - starts)


def _allocate(path: Path, shape: tuple[int, int]) -> int:
    """Create or reuse a .npy file for a float32 array of `shape`, and return the byte offset of its data."""
    path.touch()
    with path.open("r+b") as file:
        layout = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, layout)
        start = file.tell()
        file.truncate(start + 4 * shape[0] * shape[1])
    return start


def _sampled_frames(
    sample: Sample, numbers: Iterable[int], stream: Iterable[tuple[int, Tensor]]
) -> Iterator[tuple[int, Tensor]]:
    """Yield (number, sampled frames) for each utterance in a stream of complete utterances.

    Args:
        numbers: indices of the utterances in the sample, in the order of the stream.
    """
    for number, (_, f_SD) in zip(numbers, stream, strict=True):
        index_N = torch.from_numpy(sample.frames[sample.bounds[number] : sample.bounds[number + 1]])
        yield number, f_SD.index_select(0, to_device_async(index_N, f_SD.device)).float()


def _marker(out: Path, part: int) -> Path:
    """Return the file that marks a part as finished and contains its CRC-32."""
    return out / "parts" / f"{part:06d}"


def _is_written(path: Path, start: int, stop: int, marker: Path) -> bool:
    """Return whether the bytes from `start` to `stop` match the checksum in the marker of their part."""
    if not marker.exists():
        return False
    with path.open("rb") as file:
        file.seek(start)
        return f"{zlib.crc32(file.read(stop - start)):08x}".encode() == marker.read_bytes()


def _write_part(
    path: Path, start: int, frames: Iterable[tuple[int, Tensor]], done: Callable[[int], None]
) -> str:
    """Write the sampled frames of some utterances at byte offset `start`, and return their CRC-32.

    Args:
        frames: pairs (index of an utterance in the sample, sampled frames of the utterance).
        done: progress callback, which is called with 1 after each utterance.
    """
    crc32 = 0
    with path.open("r+b") as file:
        file.seek(start)
        for _, f_ND in frames:
            content = f_ND.numpy().astype("<f4").tobytes()
            file.write(content)
            crc32 = zlib.crc32(content, crc32)
            done(1)
        file.flush()
        os.fsync(file.fileno())
    return f"{crc32:08x}"
