"""Frame-level features from one or more encoder layers, and discrete units (nearest centroids)."""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from numbers import Integral
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from jahubert.audio import AudioLike, is_recording, load_audio, stream_audio
from jahubert.errors import CheckpointError, ConfigError, quote
from jahubert.formats.bundle import Bundle, load_bundle
from jahubert.formats.hub import model_name
from jahubert.frames import SAMPLE_RATE, FrameGrid
from jahubert.inference.chunking import chunk_size, encode_all, encode_stream
from jahubert.inference.reading import PREFETCH, check_many, prefetch_audio, run_batch
from jahubert.model.centroids import NearestCentroid
from jahubert.model.device import pick_device
from jahubert.model.hubert import HubertModel
from jahubert.model.precision import PRECISIONS, autocast, check_parameter_dtypes

Layers = int | Sequence[int] | Literal["all"] | None
STREAM_SECONDS = 30.0  # default chunk length of `FeatureExtractor.stream`


class LayerFeatures(nn.Module):
    """Trainable module that returns the output of one encoder layer, several layers or their weighted sum.

    Use it as a submodule of a downstream model: `self.speech = LayerFeatures(hubert, "all", "learn")`. Its
    parameters are those of the encoder and, for learned weights, the logits `mix_L` (SUPERB, Yang et al.
    2021, section 3). Blocks above the highest requested layer are not computed.

    Args:
        model: the encoder, which remains in its current mode (train or eval).
        layer: number of the block, counted from 1, whose output is returned; 0 is the input of block 1. A
            sequence selects several layers, and "all" selects 0 to the last. By default, the output of the
            encoder is returned, which, unlike that of the last block, includes the closing norm of pre-norm
            models. The number is the index in `hidden_states` of Hugging Face and s3prl, where the last
            entry includes the closing norm.
        weights: one factor per layer, or "learn" for a learned softmax, which is uniform at initialization.
            By default, layers are stacked and not summed.

    Raises:
        ConfigError: the model lacks a layer, the sequence of layers is empty, or the weights are invalid or
            do not match the layers.
    """

    def __init__(
        self,
        model: HubertModel,
        layer: Layers = None,
        weights: Sequence[float] | Literal["learn"] | None = None,
    ):
        super().__init__()
        self.single = layer is None or isinstance(layer, Integral)
        self.layers = [] if layer is None else _layer_numbers(layer, model.config.layers)
        if weights is not None and self.single:
            raise ConfigError("weights need several layers: give layer as a list, or 'all'")
        self.hubert = model
        self.mix_L: Tensor | None = None
        self.register_buffer("factors_L", None)
        if isinstance(weights, str):
            if weights != "learn":
                raise ConfigError(f"weights is {weights!r}, but must be one number per layer or 'learn'")
            self.mix_L = nn.Parameter(torch.zeros(len(self.layers)))
        elif weights is not None:
            if len(weights) != len(self.layers):
                raise ConfigError(
                    f"weights and layers differ in number ({len(weights)} and {len(self.layers)}); give one "
                    "weight per layer"
                )
            self.factors_L = torch.tensor([float(w) for w in weights])
            if not self.factors_L.isfinite().all():
                raise ConfigError(f"weights is {list(weights)}, but must consist of finite numbers")

    @property
    def weights_L(self) -> Tensor | None:
        """Weights of the layers in the weighted sum, or None if layers are not summed."""
        return self.factors_L if self.mix_L is None else self.mix_L.softmax(0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one frame, which is (D,), or (L, D) for several layers that are not summed."""
        width = self.hubert.config.width
        return (width,) if self.single or self.weights_L is not None else (len(self.layers), width)

    def forward(
        self, wav_BT: Tensor, n_samples_B: Tensor | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return features (B, S, D) or (B, S, L, D), zero in padding, and the number of valid frames (B,).

        `HubertModel.forward` documents the arguments and errors.
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


def _layer_numbers(layer: int | Sequence[int] | str, top: int) -> list[int]:
    """Return the numbers of the requested layers, which may be integers of numpy, up to `top`."""
    if isinstance(layer, str):
        values: list[Any] = list(range(top + 1)) if layer == "all" else [layer]
    else:
        values = list(layer) if isinstance(layer, Iterable) else [layer]
    if not values:
        raise ConfigError(f"an empty list of layers is not valid: the model has layers 0 to {top}")
    numbers = []
    for value in values:
        try:
            number = -1 if isinstance(value, bool) else operator.index(value)
        except TypeError:  # not an integer
            number = -1
        if not 0 <= number <= top:
            raise ConfigError(
                f"layer {quote(value)} is not valid: use integers from 0 to {top}, a list of them, or 'all'"
            )
        numbers.append(number)
    return numbers


class FeatureExtractor:
    """Feature extractor: `extractor("a.wav")` returns float32 (frames, dim) on the CPU, without gradient.

    For several layers, the result is (frames, layers, dim), or (frames, dim) for their weighted sum.

    Args:
        model: the encoder, which is set to eval mode and moved to `device`.
        layer: see `LayerFeatures`.
        weights: see `LayerFeatures`.
        device: device of the model (default: a GPU if available).
        dtype: autocast dtype, which is torch.float32, bfloat16 or float16. Results are float32.
        chunk_seconds: length of the overlapping chunks in which longer recordings are encoded to bound
            memory. By default, every recording is encoded as a whole.

    Raises:
        ConfigError: the layers, weights, device, dtype or chunk length are invalid, or autocast to `dtype`
            does not support the dtype of the model.
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
        # Without autocast, the encoder computes in the dtype of its parameters.
        if dtype is not torch.float32:
            check_parameter_dtypes(model, (torch.float32, dtype))
        self.device = pick_device(device)
        self.dtype = dtype
        self.chunk_seconds = chunk_seconds
        self.features = LayerFeatures(model, layer, weights).eval().to(self.device)
        if chunk_seconds is not None:
            chunk_size(self.grid, chunk_seconds)  # validates the length

    @classmethod
    def from_pretrained(
        cls, source: str | os.PathLike[str] | None = None, layer: Layers = None, **options: Any
    ) -> FeatureExtractor:
        """Load any model that `HubertModel.from_pretrained` opens (default: the built-in one).

        `options` are passed to the constructor.
        """
        return cls(HubertModel.from_pretrained(source), layer, **options)

    @property
    def model(self) -> HubertModel:
        """The encoder whose features are extracted."""
        return self.features.hubert

    @property
    def grid(self) -> FrameGrid:
        """Mapping between frames and samples."""
        return self.model.config.grid

    @property
    def dim(self) -> int:
        """Width of the features."""
        return self.model.config.width

    def times(self, n_frames: int) -> Tensor:
        """Return the center of each frame in seconds, float64 (frames,)."""
        first = self.grid.center(0)
        samples = torch.arange(n_frames, dtype=torch.float64, device="cpu") * self.grid.hop + first
        return samples / SAMPLE_RATE

    def to(self, device: str | torch.device) -> FeatureExtractor:
        """Move the model to another device, in place."""
        self.device = pick_device(device)
        self.features.to(self.device)
        return self

    @overload
    def __call__(self, audio: AudioLike, sample_rate: int | None = None) -> Tensor: ...
    @overload
    def __call__(
        self, audio: list[Any] | tuple[Any, ...], sample_rate: int | None = None
    ) -> list[Tensor]: ...
    def __call__(self, audio: Any, sample_rate: int | None = None) -> Any:
        """Extract the features of one recording, or a list of features for a list of recordings.

        The result for a recording does not depend on other recordings in the list, except for rounding.

        Args:
            audio: an input of `load_audio`, or a list of inputs.
            sample_rate: sampling rate of arrays in Hz (default: the rates in `audio`, or 16,000).
        """
        if is_recording(audio):
            return self.encode([load_audio(audio, sample_rate)])[0]
        return self.encode([load_audio(item, sample_rate) for item in audio])

    def many(
        self,
        audio: Iterable[AudioLike],
        sample_rate: int | None = None,
        *,
        batch_seconds: float = 60.0,
        errors: Literal["raise", "return"] = "raise",
    ) -> Iterator[Tensor | Exception]:
        """Extract the features of many recordings in order, while decoding the next ones in the background.

        Args:
            audio: inputs of `load_audio`.
            sample_rate: sampling rate of arrays in Hz (default: the rates in `audio`, or 16,000).
            batch_seconds: seconds of audio at which a batch is complete. A batch has at most 32 recordings.
            errors: "return" yields the exception for a failed recording in its place and continues.

        Raises:
            AudioError: `audio` is a single recording.
            ConfigError: `errors` is invalid.
        """
        check_many(audio, errors)
        return self._encode_prefetched(prefetch_audio(audio, sample_rate), batch_seconds, errors)

    def _encode_prefetched(
        self, recordings: Iterable[tuple[AudioLike, Tensor | Exception]], batch_seconds: float, errors: str
    ) -> Iterator[Tensor | Exception]:
        """Encode the waveforms of recordings in batches. The arguments are those of `many`."""
        waiting: list[Tensor | Exception] = []
        seconds = 0.0
        for _, wav in recordings:
            if isinstance(wav, Exception) and errors == "raise":
                raise wav
            waiting.append(wav)
            seconds += 0 if isinstance(wav, Exception) else len(wav) / SAMPLE_RATE
            if seconds >= batch_seconds or len(waiting) == PREFETCH:
                yield from self._encode_valid(waiting, errors)
                waiting = []
                seconds = 0.0
        yield from self._encode_valid(waiting, errors)

    def _encode_valid(self, wavs: list[Tensor | Exception], errors: str) -> Iterator[Tensor | Exception]:
        """Encode waveforms, and pass exceptions through in their positions."""
        features = iter(run_batch([wav for wav in wavs if isinstance(wav, Tensor)], self.encode, errors))
        for wav in wavs:
            yield wav if isinstance(wav, Exception) else next(features)

    def stream(self, audio: AudioLike, sample_rate: int | None = None) -> Iterator[Tensor]:
        """Yield the features of one recording in chunks. For a file, memory use is independent of length.

        The concatenated chunks equal the result of `__call__` with the same `chunk_seconds`, up to rounding.
        Without `chunk_seconds`, chunks of 30 s are used.
        """
        blocks = stream_audio(audio, sample_rate)
        return encode_stream(blocks, self._forward, self.grid, self.chunk_seconds or STREAM_SECONDS)

    def encode(self, wavs: Sequence[Tensor]) -> list[Tensor]:
        """Extract the features of 16 kHz waveforms (T,), which are finite floating-point tensors.

        Raises:
            AudioError: an item is not such a waveform.
        """
        return encode_all(wavs, self._forward, self.grid, self.features.shape, self.chunk_seconds)

    def _forward(self, wav_BT: Tensor, n_samples: list[int]) -> tuple[Tensor, Tensor]:
        with autocast(self.dtype, self.device):
            features, n_frames_B = self.features(wav_BT.to(self.device), n_samples)
        return features.float(), n_frames_B


class UnitExtractor:
    """Unit extractor: `units("a.wav")` returns the index of the nearest centroid per frame, int64 (frames,).

    Args:
        features: feature extractor for the layer whose output was clustered.
        centroids_KD: k-means centroids.

    Raises:
        CheckpointError: the centroids are not a matrix, or differ in dimension from the features.
    """

    def __init__(self, features: FeatureExtractor, centroids_KD: Tensor):
        if centroids_KD.dim() != 2 or centroids_KD.shape[1] != features.dim:
            raise CheckpointError(
                f"centroids of shape {tuple(centroids_KD.shape)} do not match features of {features.dim} "
                "dimensions; the centroids belong to another model"
            )
        self.features = features
        self.centroids_KD = centroids_KD.float().cpu()

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str] | None = None, **options: Any) -> UnitExtractor:
        """Load a bundle with centroids (default: the built-in model).

        `options` are `device`, `dtype` and `chunk_seconds`.
        """
        return cls.from_bundle(load_bundle(source), model_name(source), **options)

    @classmethod
    def from_bundle(cls, bundle: Bundle, name: str = "the model", **options: Any) -> UnitExtractor:
        """Create a unit extractor from a loaded bundle. Error messages show `name`."""
        if bundle.centroids_KD is None or bundle.centroid_layer is None:
            raise CheckpointError(
                f"{name} has no centroids, so it cannot extract units; use a bundle with centroids, which "
                "the label stage writes, or extract features with FeatureExtractor"
            )
        return cls(FeatureExtractor(bundle.model, bundle.centroid_layer, **options), bundle.centroids_KD)

    @property
    def n_units(self) -> int:
        """Number of units."""
        return self.centroids_KD.shape[0]

    def to(self, device: str | torch.device) -> UnitExtractor:
        """Move the encoder to another device, in place. Units are still computed on the CPU."""
        self.features.to(device)
        return self

    @overload
    def __call__(self, audio: AudioLike, sample_rate: int | None = None) -> Tensor: ...
    @overload
    def __call__(
        self, audio: list[Any] | tuple[Any, ...], sample_rate: int | None = None
    ) -> list[Tensor]: ...
    def __call__(self, audio: Any, sample_rate: int | None = None) -> Any:
        """Compute the units (frames,) of a recording or of each recording in a list."""
        features = self.features(audio, sample_rate)
        if isinstance(features, list):
            return [self.nearest(frames_SD) for frames_SD in features]
        return self.nearest(features)

    def many(
        self, audio: Iterable[AudioLike], sample_rate: int | None = None, **options: Any
    ) -> Iterator[Any]:
        """Compute the units of many recordings in order, with the arguments of `FeatureExtractor.many`."""
        results = self.features.many(audio, sample_rate, **options)
        return (result if isinstance(result, Exception) else self.nearest(result) for result in results)

    def nearest(self, frames_SD: Tensor) -> Tensor:
        """Return the index of the nearest centroid of each frame, int64 (S,), on the CPU.

        Args:
            frames_SD: features of any floating-point dtype on any device.

        Raises:
            DataError: the features differ in dimension from the centroids.
        """
        # A `NearestCentroid` must not be shared, because threads may call this method at the same time.
        return NearestCentroid(self.centroids_KD).labels(frames_SD)
