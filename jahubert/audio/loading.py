"""Audio loading: whole waveforms, streams of blocks, and lengths of recordings."""

from __future__ import annotations

import logging
import math
import numbers
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, BinaryIO

import numpy as np
import soxr
import torch

from jahubert.audio.decoders import Decoder, open_decoders
from jahubert.audio.sources import UNNAMED_STREAM, AudioSource, open_bytes
from jahubert.errors import AudioError
from jahubert.frames import SAMPLE_RATE

log = logging.getLogger(__name__)

# A file, byte range or binary stream, samples, or samples with their sampling rate in the form
# (rate, samples) or {"array": samples, "sampling_rate": rate}.
AudioLike = (
    str
    | os.PathLike[str]
    | AudioSource
    | BinaryIO
    | np.ndarray
    | torch.Tensor
    | Sequence[float]
    | tuple[float, Any]
    | Mapping[str, Any]
)
_ARRAY = "the array"  # name of arrays in messages
_canceling: set[str] = set()  # names of recordings for which a warning was logged
_QUIET = 1e-6  # mean power (-60 dBFS) below which channels may contain only noise
_CANCELED = 1e-3  # power of the mean of canceling channels, relative to that of the channels
_EXPECTED = (
    "pass a path, an AudioSource, a binary stream, an array of samples, (rate, array) or "
    '{"array": ..., "sampling_rate": ...}'
)


def load_audio(
    source: AudioLike, sample_rate: float | None = None, *, start: int = 0, n_samples: int | None = None
) -> torch.Tensor:
    """Load audio as a mono float32 tensor (T,) at 16 kHz, in which full scale is 1.

    Arrays have the shape (T,), (channels, T) or (T, channels), where the smaller dimension is assumed to be
    the channels. Integers are divided by their full scale, after centering in the case of uint8. The result
    is the mean of the channels; a warning is logged if they cancel each other out.

    Args:
        source: see `AudioLike`.
        sample_rate: sampling rate of an array in Hz (default: the rate in `source`, or 16,000). It is ignored
            for files and streams, whose headers specify the rate.
        start: first sample to return, at 16 kHz.
        n_samples: number of samples to return, at 16 kHz. Fewer are returned at the end of the audio.

    Raises:
        AudioError: the source cannot be read or decoded, is truncated, has no samples in the requested range,
            or has NaN or infinite samples; or an argument is invalid.
    """
    if start < 0 or (n_samples is not None and n_samples < 0):
        raise AudioError(f"start and n_samples must not be negative, but are {start} and {n_samples}")
    end = None if n_samples is None else start + n_samples
    array, rate = _samples(source, sample_rate)
    if array is not None:
        name = _ARRAY
        wav_T = _to_16k(_mono(_array(array), name), rate, name)[start:end]
    else:
        with _open(source) as (name, decoders):
            if _reads_by_seeking(decoders):
                wav_T = _mono(decoders[0].read(start, n_samples), name)
            else:
                streams = [_to_16k(_mono(d.read(), name), d.rate, name) for d in decoders]
                wav_T = np.concatenate(streams)[start:end]
    if wav_T.size == 0 and n_samples != 0:
        position = f" from sample {start} on" if start else ""
        raise AudioError(f"{name} contains no audio{position} (0 samples at 16 kHz)")
    _check_finite(wav_T, name)
    return torch.from_numpy(np.ascontiguousarray(wav_T, dtype=np.float32))


def stream_audio(
    source: AudioLike, sample_rate: float | None = None, *, block_seconds: float = 10.0
) -> Iterator[torch.Tensor]:
    """Yield the samples of `load_audio(source)` in blocks (T,), without loading a whole file into memory.

    The concatenated blocks are bit-identical to `load_audio(source)`, or equal up to rounding (1e-7) for MP3.
    An error in a file is raised when decoding reaches it. Byte ranges, pipes and open streams, unlike files,
    are kept in memory in encoded form.

    Args:
        source, sample_rate: see `load_audio`.
        block_seconds: approximate length of a block.
    """
    array, _ = _samples(source, sample_rate)
    if array is not None:
        yield from load_audio(source, sample_rate).split(max(1, round(block_seconds * SAMPLE_RATE)))
        return
    with _open(source) as (name, decoders):
        n_read = n_samples = 0
        for decoder in decoders:
            resampler = None
            if decoder.rate != SAMPLE_RATE:
                resampler = soxr.ResampleStream(decoder.rate, SAMPLE_RATE, 1, quality="HQ")
            for frames_TC in chain(decoder.blocks(max(1, round(block_seconds * decoder.rate))), [None]):
                wav_T = np.zeros(0, np.float32) if frames_TC is None else _mono(frames_TC, name)
                _check_finite(wav_T, name, n_read)
                n_read += len(wav_T)
                if resampler is not None:
                    wav_T = resampler.resample_chunk(wav_T, last=frames_TC is None)
                if len(wav_T):
                    n_samples += len(wav_T)
                    yield torch.from_numpy(np.ascontiguousarray(wav_T, dtype=np.float32))
        if n_samples == 0:
            raise AudioError(f"{name} contains no audio (0 samples at 16 kHz)")


def audio_length(source: AudioLike, sample_rate: float | None = None) -> int:
    """Return the number of 16 kHz samples in `load_audio(source)`.

    The length in the header is used if the format allows it to be verified. Otherwise, the file is decoded.

    Raises:
        AudioError: as for `load_audio`, but invalid samples may remain undetected.
    """
    array, rate = _samples(source, sample_rate)
    if array is not None:
        name, length = _ARRAY, _resampled_length(_array_length(array), rate)
    else:
        with _open(source) as (name, decoders):
            length = sum(_resampled_length(decoder.length(), decoder.rate) for decoder in decoders)
    if length == 0:
        raise AudioError(f"{name} contains no audio (0 samples at 16 kHz)")
    return length


def is_seekable(source: str | os.PathLike[str] | AudioSource | BinaryIO) -> bool:
    """Return whether `load_audio` seeks to the requested part of a file instead of decoding the whole file.

    Raises:
        AudioError: the source cannot be opened as audio.
    """
    with _open(source) as (_, decoders):
        return _reads_by_seeking(decoders)


def is_recording(audio: Any) -> bool:
    """Return whether `audio` is a single recording rather than a list of recordings."""
    if not isinstance(audio, list | tuple):
        return True
    if _is_rate_and_samples(audio) or _is_samples_and_rate(audio):
        return True
    return bool(audio) and all(map(_is_number, audio))


@contextmanager
def _open(source: Any) -> Iterator[tuple[str, list[Decoder]]]:
    with open_bytes(source) as audio_bytes, open_decoders(audio_bytes) as decoders:
        yield audio_bytes.name, decoders


def _reads_by_seeking(decoders: list[Decoder]) -> bool:
    """Return whether a file is one seekable stream whose samples need no resampling."""
    return len(decoders) == 1 and decoders[0].rate == SAMPLE_RATE and decoders[0].seekable


def _samples(source: Any, sample_rate: float | None) -> tuple[Any, int]:
    """Return the array in `source` (None for files and streams) and its sampling rate."""
    stated: Any = None
    if isinstance(source, Mapping):
        array = source.get("array", source.get("raw"))
        stated = source.get("sampling_rate")
        if array is None or stated is None:
            raise AudioError(f"audio is a dict with the keys {sorted(map(str, source))}: {_EXPECTED}")
    elif _is_rate_and_samples(source):
        stated, array = source
    elif _is_samples_and_rate(source):
        raise AudioError("audio is a tuple (array, rate); pass (rate, array) instead")
    elif isinstance(source, np.ndarray | torch.Tensor | list | tuple):
        array = source
    elif isinstance(source, str | os.PathLike | AudioSource) or hasattr(source, "read"):
        return None, SAMPLE_RATE
    else:
        raise AudioError(f"audio is of type {type(source).__name__}: {_EXPECTED}")
    if not isinstance(array, np.ndarray | torch.Tensor):
        array = _from_sequence(array)
    rate = _rate(sample_rate if stated is None else stated)
    if stated is not None and sample_rate is not None and _rate(sample_rate) != rate:
        raise AudioError(
            f"the audio has a stated rate of {rate} Hz, but sample_rate is {sample_rate}; omit sample_rate"
        )
    return array, rate


def _from_sequence(values: Any) -> np.ndarray:
    """Convert a list of floats, or one list of floats per channel, to an array."""
    try:
        array = np.asarray(values)
    except ValueError:  # the lists have different lengths
        array = np.zeros(0, object)
    if not isinstance(values, list | tuple) or array.dtype.kind not in "fi":
        raise AudioError(
            f"audio of type {type(values).__name__} is neither a list of floats nor one equally long list of "
            f"floats per channel: {_EXPECTED}"
        )
    if array.dtype.kind == "i":
        raise AudioError("audio is a list of integers, whose full scale is unknown: pass an int16 array")
    return array


def _is_rate_and_samples(source: Any) -> bool:
    is_pair = isinstance(source, tuple) and len(source) == 2
    return is_pair and _is_number(source[0]) and not _is_number(source[1])


def _is_samples_and_rate(source: Any) -> bool:
    """Return whether `source` is the invalid pair (samples, rate), which other libraries return."""
    is_pair = isinstance(source, tuple) and len(source) == 2
    return is_pair and isinstance(source[0], np.ndarray | torch.Tensor | list) and _is_number(source[1])


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _rate(value: Any) -> int:
    """Check a sampling rate (None: the default), and convert it to an integer."""
    if value is None:
        return SAMPLE_RATE
    if not _is_number(value) or not math.isfinite(value) or value != int(value):
        raise AudioError(f"the sampling rate must be a whole number of Hz, but is {value!r}")
    if value <= 0:
        raise AudioError(f"the sampling rate must be positive, but is {value}")
    return int(value)


def _check_array(source: np.ndarray | torch.Tensor) -> None:
    """Check the shape and type of an array."""
    if source.ndim not in (1, 2):
        shape = tuple(source.shape)
        raise AudioError(
            f"audio arrays must be (T,), (channels, T) or (T, channels), but the shape is {shape}"
        )
    if isinstance(source, torch.Tensor):
        is_float, dtype = source.is_floating_point(), str(source.dtype).removeprefix("torch.")
    else:
        # Unlike `str(dtype)`, the name does not depend on the byte order.
        is_float, dtype = np.issubdtype(source.dtype, np.floating), source.dtype.name
    if not is_float and dtype not in ("uint8", "int8", "int16", "int32"):
        raise AudioError(
            f"audio arrays must contain floats, uint8, int8, int16 or int32, but the dtype is {dtype}"
        )


def _array_length(source: np.ndarray | torch.Tensor) -> int:
    """Return the number of frames in `_array(source)`, without converting the array."""
    _check_array(source)
    return 0 if 0 in source.shape else max(source.shape)


def _array(source: np.ndarray | torch.Tensor) -> np.ndarray:
    """Convert an array of a supported type and orientation to float samples (frames, channels)."""
    _check_array(source)
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    samples: np.ndarray
    if source.dtype == np.uint8:
        samples = (source.astype(np.float32) - 128) / 128
    elif np.issubdtype(source.dtype, np.integer):
        samples = source.astype(np.float32) / -float(np.iinfo(source.dtype).min)
    else:
        samples = source.astype(np.float32)  # a copy, so that the result shares no memory with the argument
    if samples.ndim == 1 or not samples.size:
        return samples.reshape(-1, 1)
    return samples.T if samples.shape[0] < samples.shape[1] else samples


def _mono(frames_TC: np.ndarray, name: str) -> np.ndarray:
    """Return the mean of the channels, with a warning if they have opposite polarity."""
    wav_T: np.ndarray
    if frames_TC.shape[1] == 1:
        wav_T = frames_TC[:, 0]
        return wav_T
    wav_T = frames_TC.mean(axis=1, dtype=np.float32)
    power = _mean_square(frames_TC)
    if power > _QUIET and _mean_square(wav_T[:, None]) < _CANCELED * power:
        _warn_about_canceling_channels(name)
    return wav_T


def _mean_square(frames_TC: np.ndarray) -> float:
    """Return the mean square, without a copy of the frames."""
    return float(np.einsum("tc,tc->", frames_TC, frames_TC, dtype=np.float64)) / max(1, frames_TC.size)


def _warn_about_canceling_channels(name: str) -> None:
    """Log a warning, once per named recording, because training reads the same recordings in every epoch."""
    if name in _canceling:
        return
    if name not in (_ARRAY, UNNAMED_STREAM):
        _canceling.add(name)
    log.warning(
        "%s: the channels cancel each other out, so their mean is almost silent; convert the recording to "
        "mono with one of the channels, for example with `sox IN.wav OUT.wav remix 1`",
        name,
    )


def _check_finite(wav_T: np.ndarray, name: str, start: int = 0) -> None:
    if not np.isfinite(wav_T).all():
        bad = start + int(np.flatnonzero(~np.isfinite(wav_T))[0])
        raise AudioError(f"{name} contains a NaN or infinite value, first at sample {bad}")


def _to_16k(wav_T: np.ndarray, rate: int, name: str) -> np.ndarray:
    if rate == SAMPLE_RATE:
        return wav_T
    _check_finite(wav_T, name)  # resampling would spread a NaN
    length = _resampled_length(len(wav_T), rate)
    if length == 0:
        return wav_T[:0]
    resampled: np.ndarray = soxr.resample(wav_T, rate, SAMPLE_RATE, quality="HQ")
    if len(resampled) < length:  # `audio_length` relies on the exact length
        return np.pad(resampled, (0, length - len(resampled)))
    return resampled[:length]


def _resampled_length(n: int, rate: int) -> int:
    """Return the output length of soxr: n * 16,000 / rate, rounded to the nearest integer (halves up)."""
    return n if rate == SAMPLE_RATE else (2 * n * SAMPLE_RATE + rate) // (2 * rate)
