"""Features by name, and features of many utterances with one batch in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.checkpoint import load_bundle, weights_hash
from jahubert.errors import ConfigError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.features import Feature, HubertLayer
from jahubert.train.lookup import FEATURES, resolve
from jahubert.train.manifest import Manifest


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


def stream_features(
    manifest: Manifest, feature: Feature, rows: Iterable[int], batch_seconds: float
) -> Iterator[tuple[int, Tensor]]:
    """(row, frames (S, dim)) for every row, in order; an utterance shorter than a frame gives (0, dim)."""
    batch: list[tuple[int, Tensor]] = []
    room, used = batch_seconds * SAMPLE_RATE, 0
    for row in rows:
        wav_T = manifest.load(row)
        if batch and used + len(wav_T) > room:
            yield from _compute(feature, batch)
            batch, used = [], 0
        batch.append((row, wav_T))
        used += len(wav_T)
    yield from _compute(feature, batch)


def _compute(feature: Feature, batch: list[tuple[int, Tensor]]) -> Iterator[tuple[int, Tensor]]:
    long_enough = [wav_T for _, wav_T in batch if feature.grid.n_frames(len(wav_T))]
    frames = iter(feature(long_enough) if long_enough else [])
    for row, wav_T in batch:
        yield row, next(frames) if feature.grid.n_frames(len(wav_T)) else torch.zeros(0, feature.dim)
