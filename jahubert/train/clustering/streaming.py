"""Streaming feature extraction for a manifest, and the centroid file with its feature header."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jahubert.errors import CheckpointError, ConfigError, DataError
from jahubert.formats.atomic import atomic_path
from jahubert.formats.bundle import load_bundle, weights_hash
from jahubert.formats.typed_fields import typed
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch
from jahubert.train.clustering.features import Feature, HubertLayer
from jahubert.train.data.manifest import Manifest
from jahubert.train.experiment.registry import FEATURES, resolve

_HEADER_TYPES = {"feature": str, "dim": int, "layer": int, "model": str, "normalize": bool}


def make_feature(kind: str, model: Path | None, layer: int | None, device: torch.device) -> Feature:
    """Create the feature `kind`.

    Args:
        model, layer: the folder of the HuBERT model and the number of its layer; only for `hubert`.

    Raises:
        ConfigError: the feature is unknown, `model` or `layer` is missing, or `layer` is out of range.
    """
    cls = resolve(kind, FEATURES, "features.kind")
    if kind != "hubert":
        return cls(device=str(device))
    if model is None or layer is None:
        raise ConfigError(
            "features.kind=hubert requires features.model (the folder of a trained model) and features.layer"
        )
    hubert = load_bundle(model).model
    if not 1 <= layer <= hubert.config.layers:
        raise ConfigError(f"features.layer is {layer}, but {model} has layers 1 to {hubert.config.layers}")
    return cls(hubert, layer, device=str(device))


def feature_header(feature: Feature, kind: str, layer: int | None) -> dict[str, Any]:
    """Describe a feature; the description is stored with the centroids and labels derived from it."""
    model = feature.model if isinstance(feature, HubertLayer) else None
    return {
        "feature": kind,
        "dim": feature.dim,
        "layer": None if model is None else layer,
        "model": None if model is None else weights_hash(model),
        "normalize": False if model is None else model.config.normalize,
    }


def save_centroids(path: Path, centroids_KD: Tensor, header: dict[str, Any]) -> None:
    """Save centroids with the `feature_header` of their frames as metadata."""
    metadata = {"header": json.dumps(header)}
    with atomic_path(path) as temporary:
        save_file({"centroids_KD": centroids_KD.float().contiguous()}, temporary, metadata=metadata)


def load_centroids(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Load centroids, float32 (K, D), and the `feature_header` of their feature.

    Raises:
        DataError: the file is missing or is not a centroid file.
    """
    try:
        with safe_open(path, "pt") as file:
            centroids_KD = file.get_tensor("centroids_KD")
            header = json.loads((file.metadata() or {})["header"])
        if centroids_KD.dtype != torch.float32 or centroids_KD.dim() != 2 or not centroids_KD.numel():
            raise ValueError(f"centroids_KD is {tuple(centroids_KD.shape)}, {centroids_KD.dtype}")
        if not isinstance(header, dict) or header.keys() != _HEADER_TYPES.keys():
            raise ValueError("unknown header")
        for name, kind in _HEADER_TYPES.items():
            if header[name] is not None or name == "feature":
                typed(path, name, header[name], kind)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError, CheckpointError) as error:
        raise DataError(
            f"{path}: not a centroid file ({error}); delete its folder and rerun stage=kmeans"
        ) from error
    return centroids_KD, header


def stream_features(
    manifest: Manifest, feature: Feature, rows: Iterable[int], batch_seconds: float
) -> Generator[tuple[int, Tensor], None, None]:
    """Compute the features of utterances in order, while the next batches are read in the background.

    Args:
        rows: row numbers in the manifest.
        batch_seconds: audio per batch, excluding padding.

    Yields:
        The row number and its frames (S, dim); S is 0 for an utterance shorter than a frame.
    """

    def read(batch: list[int]) -> list[Tensor]:
        return [manifest.load(row) for row in batch]

    for batch, wavs in prefetch(read, _batches(manifest, rows, batch_seconds)):
        yield from _compute(manifest, feature, batch, wavs)


def _batches(manifest: Manifest, rows: Iterable[int], batch_seconds: float) -> Iterator[list[int]]:
    batch: list[int] = []
    limit, used = batch_seconds * SAMPLE_RATE, 0
    for row in rows:
        n_samples = int(manifest.n_samples[row])
        if batch and used + n_samples > limit:
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
                f"utterance {manifest[row].id!r}: feature {feature.name} returned {len(frames_SD)} frames "
                f"for {len(wav_T)} samples, but its grid specifies {n_frames}"
            )
        yield row, frames_SD
