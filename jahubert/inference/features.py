"""Frames from audio: features of one layer or several, and units (the nearest centroid of each frame)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, overload

import torch
from torch import Tensor, nn

from jahubert.audio import AudioLike, load_audio, stream_audio
from jahubert.errors import CheckpointError, ConfigError
from jahubert.formats.bundle import Bundle, load_bundle
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference.chunking import chunk_size, encode_all, encode_stream
from jahubert.model.device import pick_device
from jahubert.model.hubert import HubertModel
from jahubert.model.precision import PRECISIONS, autocast
from jahubert.prefetch import prefetch

Layers = int | Sequence[int] | Literal["all"] | None
STREAM_SECONDS = 30.0  # of a chunk, where none was asked for
READ_AHEAD = 32  # recordings


def prefetch_audio(
    audio: Iterable[AudioLike], sample_rate: int | None = None
) -> Iterator[tuple[AudioLike, Tensor | Exception]]:
    """Each recording and its 16 kHz waveform (T,), or why there is none, in order; read in the background."""

    def read(item: AudioLike) -> Tensor | Exception:
        try:
            return load_audio(item, sample_rate)
        except Exception as error:
            return error

    return prefetch(read, audio, READ_AHEAD)


class LayerFeatures(nn.Module):
    """One layer of an encoder, several, or their weighted sum, as a module to train with.

    A model of another project takes it in as it is: `self.speech = LayerFeatures(hubert, "all", "learn")`.
    Parameters are those of the encoder, and `mix_L`, the logits of the weights, if they are to be learned
    (SUPERB, Yang et al. 2021, section 3). Early exit: no block above the last layer is computed.

    Args:
        model: the encoder, in whatever mode it is in.
        layer: 1-based block whose output is taken, after residual and norm (Hugging Face and s3prl:
            `hidden_states[layer]`); 0 is the input of block 1. A sequence of them, or "all", 0 to the last.
            Default: the encoder's output, behind the closing norm of large models.
        weights: one factor a layer, or "learn": their softmax, equal at first. Default: no sum.
    """

    def __init__(
        self,
        model: HubertModel,
        layer: Layers = None,
        weights: Sequence[float] | Literal["learn"] | None = None,
    ):
        super().__init__()
        top = model.config.layers
        chosen = range(top + 1) if layer == "all" else [] if layer is None else layer
        self.layers: list[int] = [chosen] if isinstance(chosen, int) else list(chosen)  # type: ignore[arg-type]
        self.single = isinstance(layer, int) or layer is None
        wrong = [n for n in self.layers if not isinstance(n, int) or not 0 <= n <= top]
        if wrong or (not self.single and not self.layers):
            asked = f"layer {wrong[0]}" if wrong else "no layer"
            raise ConfigError(f"{asked} was asked for, but the model has layers 0 to {top}")
        if weights is not None and self.single:
            raise ConfigError("weights are for several layers; give layer as a list, or 'all'")
        self.hubert = model
        self.mix_L: Tensor | None = None
        self.register_buffer("factors_L", None)
        if isinstance(weights, str):
            if weights != "learn":
                raise ConfigError(f"weights is {weights!r}; give one number a layer, or 'learn'")
            self.mix_L = nn.Parameter(torch.zeros(len(self.layers)))
        elif weights is not None:
            if len(weights) != len(self.layers):
                raise ConfigError(f"{len(weights)} weights were given for {len(self.layers)} layers")
            self.factors_L = torch.tensor([float(w) for w in weights])

    @property
    def weights_L(self) -> Tensor | None:
        """The factor of each layer in the sum, or None if there is no sum."""
        return self.factors_L if self.mix_L is None else self.mix_L.softmax(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one frame: (D,), or (L, D) for several layers that are not summed."""
        width = self.hubert.config.width
        return (width,) if self.single or self.weights_L is not None else (len(self.layers), width)

    def forward(
        self, wav_BT: Tensor, n_samples_B: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (B, S, D), or (B, S, L, D), zero behind each utterance, and valid frames (B,).

        Arguments and errors are those of `HubertModel`.
        """
        last = max(self.layers) if self.layers else None
        encoded = self.hubert(
            wav_BT, n_samples_B, last_layer=last, keep_layers=() if self.single else self.layers
        )
        if self.single:
            return encoded.hidden_BSD, encoded.n_frames_B
        hidden_BSLD = torch.stack([encoded.layers[number] for number in self.layers], dim=2)
        weights_L = self.weights_L
        if weights_L is None:
            return hidden_BSLD, encoded.n_frames_B
        return torch.einsum("bsld,l->bsd", hidden_BSLD, weights_L.to(hidden_BSLD)), encoded.n_frames_B


class FeatureExtractor:
    """Features of encoder layers: `extractor("a.wav")` -> float32 (frames, dim) on the CPU, without gradient.

    Several layers give (frames, layers, dim), a weighted sum of them (frames, dim).

    Args:
        model: the encoder; it is put into eval mode and moved to `device`.
        layer, weights: as for `LayerFeatures`.
        device: default is the GPU where there is one.
        dtype: of the matrix products (autocast): torch.float32, bfloat16 or float16. Results are float32.
        chunk_seconds: encode longer recordings in overlapping chunks of this length, which bounds the memory.
            Default: every recording as a whole.
    """

    def __init__(
        self,
        model: HubertModel,
        layer: Layers = None,
        *,
        weights: Sequence[float] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        chunk_seconds: float | None = None,
    ):
        if dtype not in PRECISIONS:
            raise ConfigError(f"dtype is {dtype}; choose torch.float32, torch.bfloat16 or torch.float16")
        self.device, self.dtype, self.chunk_seconds = pick_device(device), dtype, chunk_seconds
        self.features = LayerFeatures(model, layer, weights).eval().to(self.device)
        if chunk_seconds is not None:
            chunk_size(self.grid, chunk_seconds)  # refuses lengths that cannot be

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, layer: Layers = None, **options) -> FeatureExtractor:
        """From anything `HubertModel.from_pretrained` opens; `options` as in the constructor."""
        return cls(HubertModel.from_pretrained(source), layer, **options)

    @property
    def model(self) -> HubertModel:
        return self.features.hubert

    @property
    def grid(self) -> FrameGrid:
        """Which samples each frame sees."""
        return self.model.config.grid

    @property
    def dim(self) -> int:
        return self.model.config.width

    def times(self, n_frames: int) -> Tensor:
        """Seconds (frames,), float64, of the middle of what each frame sees."""
        return (
            torch.arange(n_frames, dtype=torch.float64) * self.grid.hop + self.grid.center(0)
        ) / SAMPLE_RATE

    @overload
    def __call__(self, audio: AudioLike, sample_rate: int | None = None) -> Tensor: ...
    @overload
    def __call__(self, audio: list | tuple, sample_rate: int | None = None) -> list[Tensor]: ...
    def __call__(self, audio, sample_rate=None):
        """Features of a file or array, or a list of them for a list.

        `sample_rate` is that of arrays (16 kHz if not given); files know theirs. The result for one recording
        does not depend on the others in the list.
        """
        if isinstance(audio, list | tuple):
            return self.encode([load_audio(item, sample_rate) for item in audio])
        return self.encode([load_audio(audio, sample_rate)])[0]

    def many(
        self,
        audio: Iterable[AudioLike],
        sample_rate: int | None = None,
        *,
        batch_seconds: float = 60.0,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Tensor | Exception]:
        """Features of many files or arrays, in order, while the next ones are read in the background.

        Recordings are encoded together until they last `batch_seconds`. With `errors="return"` a recording
        that cannot be read gives its exception in place of features, and the others go on.
        """
        waiting: list[Tensor | Exception] = []
        seconds = 0.0
        for _, wav in prefetch_audio(audio, sample_rate):
            if isinstance(wav, Exception) and errors == "raise":
                raise wav
            waiting.append(wav)
            seconds += 0 if isinstance(wav, Exception) else len(wav) / SAMPLE_RATE
            if seconds >= batch_seconds or len(waiting) == READ_AHEAD:
                yield from self._encode_read(waiting)
                waiting, seconds = [], 0.0
        yield from self._encode_read(waiting)

    def _encode_read(self, read: list[Tensor | Exception]) -> Iterator[Tensor | Exception]:
        found = iter(self.encode([wav for wav in read if isinstance(wav, Tensor)]))
        for wav in read:
            yield wav if isinstance(wav, Exception) else next(found)

    def stream(self, audio: AudioLike, sample_rate: int | None = None) -> Iterator[Tensor]:
        """Features of one recording of any length, piece by piece, in memory that does not grow with it.

        The pieces laid end to end are what the extractor gives with the same `chunk_seconds` (30 if none).
        """
        blocks = stream_audio(audio, sample_rate)
        return encode_stream(blocks, self._forward, self.grid, self.chunk_seconds or STREAM_SECONDS)

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Features of 16 kHz waveforms (T,)."""
        return encode_all(wavs, self._forward, self.grid, self.features.shape, self.chunk_seconds)

    def _forward(self, wav_BT: Tensor, n_samples: list[int]) -> tuple[Tensor, Tensor]:
        with autocast(self.dtype, self.device):
            features, n_frames_B = self.features(wav_BT.to(self.device), n_samples)
        return features.float(), n_frames_B


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

    def many(self, audio: Iterable[AudioLike], sample_rate: int | None = None, **options) -> Iterator:
        """Units of many files or arrays, in order; as `FeatureExtractor.many`."""
        for found in self.features.many(audio, sample_rate, **options):
            yield found if isinstance(found, Exception) else self.nearest(found)

    def nearest(self, frames_SD: Tensor) -> Tensor:
        """Index of the nearest centroid of each frame; the frame's own norm does not matter for that."""
        bias_K = self.centroids_KD.pow(2).sum(1) / 2
        blocks = [(bias_K - block @ self.centroids_KD.T).argmin(1) for block in frames_SD.split(16_384)]
        return torch.cat(blocks)
