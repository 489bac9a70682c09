"""Streaming feature extraction for a manifest, and centroid files with a description of their feature."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jahubert.errors import CheckpointError, ConfigError, DataError, quote
from jahubert.formats.atomic import atomic_path
from jahubert.formats.bundle import load_bundle, weights_hash
from jahubert.formats.typed_fields import typed
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import prefetch
from jahubert.train.clustering.features import Feature, HubertLayer
from jahubert.train.data.manifest import Manifest
from jahubert.train.data.workers import map_in_workers
from jahubert.train.experiment.checksums import file_crc32
from jahubert.train.experiment.registry import FEATURES, resolve, source_file

_IN_FLIGHT = 64  # maximum number of utterances (several batches) whose frames are being copied to the CPU
_HEADER_TYPES = {"feature": str, "dim": int, "layer": int, "model": str, "normalize": bool}
# Optional keys: CRC-32 of the Python file that defines a custom feature, and the precision if it is not fp32
_CODE, _PRECISION = "code", "precision"


def make_feature(
    kind: str, model: Path | None, layer: int | None, device: torch.device, precision: str = "fp32"
) -> Feature:
    """Create the feature extractor `kind`.

    Args:
        model, layer: HuBERT model (folder, file or Hub name) and number of the layer; only for `hubert`.
        precision: number format of the model's computation, fp32 or bf16; only for `hubert`.

    Raises:
        ConfigError: the feature is unknown, `model` or `layer` is missing, or `layer` is out of range.
        CheckpointError: the model cannot be loaded.
    """
    cls: Callable[..., Feature] = resolve(kind, FEATURES, "features.kind")
    if kind != "hubert":
        return cls(device=str(device))
    if model is None or layer is None:
        raise ConfigError("features.kind=hubert requires features.model (a trained model) and features.layer")
    hubert = load_bundle(model).model
    if not 1 <= layer <= hubert.config.layers:
        raise ConfigError(f"features.layer is {layer}, but {model} has layers 1 to {hubert.config.layers}")
    return cls(hubert, layer, device=str(device), precision=precision)


def feature_header(feature: Feature, kind: str, layer: int | None) -> dict[str, Any]:
    """Return a description of a feature, which is stored with the centroids derived from it."""
    model = feature.model if isinstance(feature, HubertLayer) else None
    precision = feature.precision if isinstance(feature, HubertLayer) else "fp32"
    file = source_file(kind)
    return {
        "feature": kind,
        "dim": feature.dim,
        "layer": None if model is None else layer,
        "model": None if model is None else weights_hash(model),
        "normalize": False if model is None else model.config.normalize,
        **({} if file is None else {_CODE: file_crc32(file)}),
        **({} if precision == "fp32" else {_PRECISION: precision}),
    }


def save_centroids(path: Path, centroids_KD: Tensor, header: dict[str, Any]) -> None:
    """Save centroids, with the `feature_header` of the clustered frames as metadata."""
    metadata = {"header": json.dumps(header)}
    with atomic_path(path) as temporary:
        save_file({"centroids_KD": centroids_KD.float().contiguous()}, temporary, metadata=metadata)


def load_centroids(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Load centroids, float32 (K, D), and the `feature_header` that was saved with them.

    Raises:
        DataError: the file is missing or is not a centroid file.
    """
    try:
        with safe_open(path, "pt") as file:
            centroids_KD = file.get_tensor("centroids_KD")
            header = json.loads((file.metadata() or {})["header"])
        if centroids_KD.dtype != torch.float32 or centroids_KD.dim() != 2 or not centroids_KD.numel():
            raise ValueError(
                "centroids_KD must be a nonempty float32 matrix, but has shape "
                f"{tuple(centroids_KD.shape)} and dtype {centroids_KD.dtype}"
            )
        if not isinstance(header, dict) or header.keys() - {_CODE, _PRECISION} != _HEADER_TYPES.keys():
            raise ValueError("the feature description is missing or incomplete")
        if header.get(_PRECISION, "bf16") != "bf16":
            raise ValueError(f"precision is {quote(header[_PRECISION])}, expected 'bf16' or no such key")
        for name, kind in _HEADER_TYPES.items():
            if header[name] is not None or name == "feature":
                typed(path, name, header[name], kind)
    except (OSError, SafetensorError, KeyError, ValueError, RecursionError, CheckpointError) as error:
        raise DataError(
            f"{path}: not a centroid file ({error}); delete {path.parent} and rerun stage=kmeans"
        ) from error
    return centroids_KD, header


def stream_features(
    manifest: Manifest,
    feature: Feature,
    parts: Iterable[Iterable[int]],
    batch_seconds: float,
    workers: int = 0,
) -> Generator[tuple[int, Tensor], None, None]:
    """Compute the features of utterances in order, while the next batches are read in the background.

    Args:
        parts: lists of manifest rows. A batch contains rows of only one part.
        batch_seconds: maximum audio per batch, excluding padding, unless an utterance is longer.
        workers: number of reading processes, or 0 for a few threads, which share the GIL with the caller.

    Yields:
        The manifest row and the frames (S, dim) of each utterance. S is 0 for an utterance shorter than one
        frame. On a GPU, the computation may not be finished yet (see `to_host`).
    """
    batches = (batch for rows in parts for batch in _batches(manifest, rows, batch_seconds))
    read = _Reader(manifest)
    if workers:
        advice = "enlarge /dev/shm, or lower workers or batch_seconds"
        stream = map_in_workers(read, batches, workers=workers, advice=advice)
    else:
        stream = prefetch(read, batches)
    with closing(stream):
        for batch, (wav_T, n_samples) in stream:
            yield from _compute(manifest, feature, batch, list(wav_T.split(n_samples)))


class _Reader:
    """Reader that returns a batch as one tensor, which processes exchange faster than many tensors."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest

    def __call__(self, rows: list[int]) -> tuple[Tensor, list[int]]:
        wavs = [self.manifest.load(row) for row in rows]
        return torch.cat(wavs), [len(wav_T) for wav_T in wavs]


def to_host(stream: Iterable[tuple[int, Tensor]]) -> Generator[tuple[int, Tensor], None, None]:
    """Copy the tensors in a stream to the CPU. Copies from a GPU overlap with computation."""
    pending: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
    for row, tensor in stream:
        event, device = None, tensor.device
        if device.type == "cuda":
            tensor, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()
            # Without a stream, the event would be recorded on the stream of the current GPU.
            event.record(torch.cuda.current_stream(device))
        pending.append((row, tensor, event))
        if event is None or len(pending) > _IN_FLIGHT:
            yield from _arrived(pending, 0 if event is None else _IN_FLIGHT)
    yield from _arrived(pending, 0)


def _arrived(
    pending: deque[tuple[int, Tensor, torch.cuda.Event | None]], remaining: int
) -> Iterator[tuple[int, Tensor]]:
    """Yield finished copies in order, waiting for each, until `remaining` copies are pending."""
    while len(pending) > remaining:
        row, tensor, event = pending.popleft()
        if event is not None:
            event.synchronize()
        yield row, tensor


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
                f"utterance {quote(manifest[row].id)}: feature {feature.name} returned {len(frames_SD)} "
                f"frames for {len(wav_T)} samples, but its grid specifies {n_frames}"
            )
        yield row, frames_SD
