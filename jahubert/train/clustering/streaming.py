"""Features by name, features of many utterances with one batch in memory at a time, and centroids of them."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jahubert.errors import ConfigError, DataError
from jahubert.formats.atomic import atomic_path
from jahubert.formats.bundle import load_bundle, weights_hash
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch
from jahubert.train.clustering.features import Feature, HubertLayer
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.registry import FEATURES, resolve


def make_feature(kind: str, model: Path | None, layer: int | None, device: torch.device) -> Feature:
    """The feature called `kind`; a HuBERT layer needs the folder of its model.

    Raises:
        ConfigError: no such feature, no model given, or a layer that the model does not have.
    """
    cls = resolve(kind, FEATURES, "features.kind")
    if kind != "hubert":
        return cls(device=str(device))
    if model is None or layer is None:
        raise ConfigError(
            "features.kind=hubert needs features.model (the folder of a trained model) and a layer"
        )
    hubert = load_bundle(model).model
    if not 1 <= layer <= hubert.config.layers:
        raise ConfigError(f"features.layer={layer}, but {model} has blocks 1 to {hubert.config.layers}")
    return cls(hubert, layer, device=str(device))


def feature_header(feature: Feature, kind: str, layer: int | None) -> dict[str, Any]:
    """What centroids and labels must know of the feature they were made from."""
    model = feature.model if isinstance(feature, HubertLayer) else None
    return {
        "feature": kind,
        "dim": feature.dim,
        "layer": None if model is None else layer,
        "model": None if model is None else weights_hash(model),
        "normalize": False if model is None else model.config.normalize,
    }


def save_centroids(path: Path, centroids_KD: Tensor, header: dict[str, Any]) -> None:
    """Centroids of frames with this `feature_header`, which goes into the file's metadata."""
    metadata = {"header": json.dumps(header)}
    with atomic_path(path) as temporary:
        save_file({"centroids_KD": centroids_KD.float().contiguous()}, temporary, metadata=metadata)


def load_centroids(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """float32 (K, D), and the `feature_header` of the frames that they were fitted to.

    Raises:
        DataError: no such file, or not one that stage kmeans wrote.
    """
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("centroids_KD"), json.loads((file.metadata() or {})["header"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DataError(
            f"{path}: no centroids that stage=kmeans wrote ({error}); delete its folder to make them again"
        ) from error


def stream_features(
    manifest: Manifest, feature: Feature, rows: Iterable[int], batch_seconds: float
) -> Generator[tuple[int, Tensor], None, None]:
    """(row, frames (S, dim)) for every row, in order; an utterance shorter than a frame gives (0, dim).

    The next batches are read meanwhile, until it is closed.
    """

    def read(batch: list[int]) -> list[Tensor]:
        return [manifest.load(row) for row in batch]

    for batch, wavs in prefetch(read, _batches(manifest, rows, batch_seconds)):
        yield from _compute(manifest, feature, batch, wavs)


def _batches(manifest: Manifest, rows: Iterable[int], batch_seconds: float) -> Iterator[list[int]]:
    batch: list[int] = []
    room, used = batch_seconds * SAMPLE_RATE, 0
    for row in rows:
        n_samples = int(manifest.n_samples[row])
        if batch and used + n_samples > room:
            yield batch
            batch, used = [], 0
        batch.append(row)
        used += n_samples
    if batch:
        yield batch


def _compute(
    manifest: Manifest, feature: Feature, batch: list[int], wavs: list[Tensor]
) -> Iterator[tuple[int, Tensor]]:
    long_enough = [wav_T for wav_T in wavs if feature.grid.n_frames(len(wav_T))]
    frames = iter(feature(long_enough) if long_enough else [])
    for row, wav_T in zip(batch, wavs, strict=True):
        n_frames = feature.grid.n_frames(len(wav_T))
        frames_SD = next(frames) if n_frames else torch.zeros(0, feature.dim)
        if len(frames_SD) != n_frames:
            raise DataError(
                f"utterance {manifest[row].id!r}: the feature {feature.name} gives {len(frames_SD)} frames "
                f"of {len(wav_T)} samples, but its grid says {n_frames}: one of them is wrong"
            )
        yield row, frames_SD
