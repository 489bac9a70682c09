"""Frames from audio: features of any layer, and units (the nearest centroid of each frame)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor

from jahubert.audio import AudioLike, load_audio
from jahubert.checkpoint import Bundle, load_bundle
from jahubert.errors import CheckpointError, ConfigError
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.hubert import HubertModel

OVERLAP_SECONDS = 4.0  # of two chunks of a long recording; each half of it is context that is thrown away
BATCH_SECONDS = 120.0  # of padded audio that goes through the encoder at once

# Encodes a padded batch: (wav_BT, n_samples) -> (frames (B, S, D), n_frames_B).
Encode = Callable[[Tensor, list[int]], tuple[Tensor, Tensor]]


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, or the GPU where there is one, or the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {str(device)!r} cannot be used here ({reason}); try 'cpu'") from error
    return picked


def chunk_starts(n_samples: int, grid: FrameGrid, seconds: float | None) -> list[tuple[int, int]]:
    """Cut a recording into (start, samples), overlapping, each starting on a frame."""
    if seconds is None:
        return [(0, n_samples)]
    overlap = grid.floor(round(OVERLAP_SECONDS * SAMPLE_RATE))
    chunk = grid.floor(round(seconds * SAMPLE_RATE))
    if chunk < 2 * overlap:
        raise ConfigError(
            f"chunks of {seconds} s are too short: they overlap by {OVERLAP_SECONDS} s; take 8 or more"
        )
    chunks, start = [], 0
    while start + chunk < n_samples:
        chunks.append((start, chunk))
        start += chunk - overlap
    return [*chunks, (start, n_samples - start)]


def encode_all(
    wavs: Sequence[Tensor], encode: Encode, grid: FrameGrid, dim: int, chunk_seconds: float | None
) -> list[Tensor]:
    """Frames (S, dim) of each waveform, on the CPU; long ones in chunks joined in the middle of the overlap.

    A waveform that is shorter than one frame has no frames.
    """
    chunks = [
        (index, start, n)
        for index, wav in enumerate(wavs)
        for start, n in chunk_starts(len(wav), grid, chunk_seconds)
        if grid.n_frames(n)
    ]
    parts: dict[tuple[int, int], Tensor] = {}
    with torch.inference_mode():
        for batch in _batches(sorted(chunks, key=lambda chunk: -chunk[2])):
            lengths = [n for _, _, n in batch]
            wav_BT = torch.zeros(len(batch), lengths[0])
            for row, (index, start, n) in zip(wav_BT, batch, strict=True):
                row[:n] = wavs[index][start : start + n]
            frames_BSD, n_frames_B = encode(wav_BT, lengths)
            frames_BSD = frames_BSD.cpu()
            for frames_SD, n_frames, (index, start, _) in zip(frames_BSD, n_frames_B, batch, strict=True):
                parts[index, start] = frames_SD[: int(n_frames)].clone()
    return [_join(len(wav), index, parts, grid, dim, chunk_seconds) for index, wav in enumerate(wavs)]


def _batches(chunks: list[tuple[int, int, int]]) -> Iterator[list[tuple[int, int, int]]]:
    """Chunks, longest first, gathered while their padded length fits."""
    batch: list[tuple[int, int, int]] = []
    for chunk in chunks:
        if batch and (len(batch) + 1) * batch[0][2] > BATCH_SECONDS * SAMPLE_RATE:
            yield batch
            batch = []
        batch.append(chunk)
    if batch:
        yield batch


def _join(
    n_samples: int,
    index: int,
    parts: dict[tuple[int, int], Tensor],
    grid: FrameGrid,
    dim: int,
    seconds: float | None,
) -> Tensor:
    """The frames of one waveform from those of its chunks."""
    starts = [start for start, _ in chunk_starts(n_samples, grid, seconds) if (index, start) in parts]
    if not starts:
        return torch.zeros(0, dim)
    half = grid.floor(round(OVERLAP_SECONDS * SAMPLE_RATE)) // grid.hop // 2
    kept = []
    for place, start in enumerate(starts):
        part = parts[index, start]
        first = half if place else 0
        if place + 1 < len(starts):  # the next chunk takes over `half` frames behind its own start
            part = part[: (starts[place + 1] - start) // grid.hop + half]
        kept.append(part[first:])
    return torch.cat(kept)


class FeatureExtractor:
    """Features of one encoder layer: `extractor("a.wav")` -> float32 (frames, dim) on the CPU.

    Args:
        model: the encoder; it is put into eval mode and moved to `device`.
        layer: 1-based block whose output is taken, after residual and norm (Hugging Face and s3prl:
            `hidden_states[layer]`); 0 is the input of block 1. Default: the encoder's output.
        device: default is the GPU where there is one.
        chunk_seconds: encode longer recordings in overlapping chunks of this length, which bounds the memory.
            Default: every recording as a whole.
    """

    def __init__(
        self,
        model: HubertModel,
        layer: int | None = None,
        *,
        device: str | torch.device | None = None,
        chunk_seconds: float | None = None,
    ):
        if layer is not None and not 0 <= layer <= model.config.layers:
            raise ConfigError(
                f"layer {layer} was asked for, but the model has layers 0 to {model.config.layers}"
            )
        self.device = pick_device(device)
        self.model = model.eval().to(self.device)
        self.layer, self.chunk_seconds = layer, chunk_seconds
        chunk_starts(0, self.grid, chunk_seconds)  # refuses lengths that cannot be

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike, layer: int | None = None, **options
    ) -> FeatureExtractor:
        """From anything `HubertModel.from_pretrained` opens; `options` as in the constructor."""
        return cls(HubertModel.from_pretrained(source), layer, **options)

    @property
    def grid(self) -> FrameGrid:
        """Which samples each frame sees."""
        return self.model.config.grid

    @property
    def dim(self) -> int:
        return self.model.config.width

    @overload
    def __call__(self, audio: AudioLike, sample_rate: int | None = None) -> Tensor: ...
    @overload
    def __call__(self, audio: list | tuple, sample_rate: int | None = None) -> list[Tensor]: ...
    def __call__(self, audio, sample_rate=None):
        """Features (frames, dim) of a file or array, or a list of them for a list.

        `sample_rate` is that of arrays (16 kHz if not given); files know theirs. The result for one recording
        does not depend on the others in the list.
        """
        if isinstance(audio, list | tuple):
            return self.encode([load_audio(item, sample_rate) for item in audio])
        return self.encode([load_audio(audio, sample_rate)])[0]

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Features of 16 kHz waveforms (T,)."""
        return encode_all(wavs, self._forward, self.grid, self.dim, self.chunk_seconds)

    def _forward(self, wav_BT: Tensor, n_samples: list[int]) -> tuple[Tensor, Tensor]:
        encoded = self.model(wav_BT.to(self.device), n_samples, last_layer=self.layer)
        return encoded.hidden_BSD.float(), encoded.n_frames_B


class UnitExtractor:
    """Discrete units: `units("a.wav")` -> int64 (frames,), the nearest centroid of each frame's features."""

    def __init__(self, features: FeatureExtractor, centroids_KD: Tensor):
        if centroids_KD.dim() != 2 or centroids_KD.shape[1] != features.dim:
            raise CheckpointError(
                f"centroids have shape {tuple(centroids_KD.shape)}, but the features have {features.dim} "
                "dimensions: they belong to another model"
            )
        self.features = features
        self.centroids_KD = centroids_KD.float().cpu()

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, **options) -> UnitExtractor:
        """From a bundle with centroids; `options` as for `FeatureExtractor`, without `layer`."""
        return cls.from_bundle(load_bundle(source), os.fspath(source), **options)

    @classmethod
    def from_bundle(cls, bundle: Bundle, name: str = "this model", **options) -> UnitExtractor:
        if bundle.centroids_KD is None or bundle.centroid_layer is None:
            raise CheckpointError(
                f"{name} has no centroids of one of its layers, so it has no units; take a bundle that was "
                "saved with centroids (stage kmeans on the layer of a model), or use FeatureExtractor"
            )
        return cls(FeatureExtractor(bundle.model, bundle.centroid_layer, **options), bundle.centroids_KD)

    @property
    def n_units(self) -> int:
        return self.centroids_KD.shape[0]

    @overload
    def __call__(self, audio: AudioLike, sample_rate: int | None = None) -> Tensor: ...
    @overload
    def __call__(self, audio: list | tuple, sample_rate: int | None = None) -> list[Tensor]: ...
    def __call__(self, audio, sample_rate=None):
        """Units (frames,) of a file or array, or a list of them for a list."""
        found = self.features(audio, sample_rate)
        return [self.nearest(x) for x in found] if isinstance(found, list) else self.nearest(found)

    def nearest(self, frames_SD: Tensor) -> Tensor:
        """Index of the nearest centroid of each frame; the frame's own norm does not matter for that."""
        bias_K = self.centroids_KD.pow(2).sum(1) / 2
        blocks = [(bias_K - block @ self.centroids_KD.T).argmin(1) for block in frames_SD.split(16_384)]
        return torch.cat(blocks)
