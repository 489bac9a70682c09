"""Any audio file, byte range, stream or array -> mono float32 at 16 kHz.

Reading is soundfile (WAV, FLAC, Ogg Vorbis and Opus, MP3, AIFF, ...) and resampling is soxr; no system
library is needed. A file that is shorter than its own header says is refused: decoders clip such files
silently, and a training label for audio that is not there is worse than an error.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr
import torch

from jahubert.errors import AudioError
from jahubert.frames import SAMPLE_RATE

_BLOCK = 60 * 48_000  # frames decoded at a time when a file does not say how many it has
_UNKNOWN = 1 << 48  # a frame count above this means that the header does not know
_OGG_PAGE = 65_307  # bytes, of the longest Ogg page


@dataclass(frozen=True)
class AudioSource:
    """Where the bytes of an audio file lie: a file, or a range of an uncompressed tar or zip."""

    path: str
    offset: int = 0  # bytes
    length: int = -1  # bytes; -1: to the end of the file

    def __str__(self) -> str:
        if self.offset == 0 and self.length < 0:
            return self.path
        end = "end" if self.length < 0 else str(self.offset + self.length)
        return f"{self.path} (bytes {self.offset} to {end})"


AudioLike = str | os.PathLike | AudioSource | np.ndarray | torch.Tensor | BinaryIO


def load_audio(
    source: AudioLike, sample_rate: int | None = None, *, start: int = 0, n_samples: int | None = None
) -> torch.Tensor:
    """Audio as a float32 tensor (T,), mono, 16 kHz, full scale = 1.

    `sample_rate` is the rate of an array (16,000 when not given); files know their own. Arrays are (T,),
    (channels, T) or (T, channels), the smaller side being the channels; integers are scaled by their full
    scale. `start` and `n_samples` count 16 kHz samples; fewer come back where the audio ends earlier.

    Raises AudioError: missing, not audio, empty, truncated, NaN or infinite samples.
    """
    if start < 0 or (n_samples is not None and n_samples < 0):
        raise AudioError(f"start and n_samples must not be negative, but are {start} and {n_samples}")
    if isinstance(source, (np.ndarray, torch.Tensor)):
        wav_T, rate, name = _mono(_array(source)), sample_rate or SAMPLE_RATE, "the array"
        cropped = False
    else:
        with _Opened(source) as opened:
            name, rate = opened.name, opened.file.samplerate
            cropped = rate == SAMPLE_RATE
            wav_T = _mono(opened.read(start, n_samples) if cropped else opened.read())
    if rate != SAMPLE_RATE:
        _check_finite(wav_T, name)  # before resampling, which would smear one NaN over everything
        wav_T = _resample(wav_T, rate, name)
    if not cropped:
        wav_T = wav_T[start : None if n_samples is None else start + n_samples]
    if wav_T.size == 0 and n_samples != 0:
        where = f" from sample {start} on" if start else ""
        raise AudioError(f"{name} holds no audio{where} (0 samples)")
    _check_finite(wav_T, name)
    return torch.from_numpy(np.ascontiguousarray(wav_T, dtype=np.float32))


def stream_audio(
    source: AudioLike, sample_rate: int | None = None, *, block_seconds: float = 10.0
) -> Iterator[torch.Tensor]:
    """The samples of `load_audio(source)` in blocks (T,), so that memory does not grow with a file.

    They are the same bit for bit, MP3 up to its decoder's rounding (1e-7). Blocks have about `block_seconds`.
    What is wrong with the end of a file raises when it is reached. A range of bytes (`AudioSource`) and an
    open stream are read as they are, compressed, before they are decoded.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        yield from load_audio(source, sample_rate).split(max(1, round(block_seconds * SAMPLE_RATE)))
        return
    with _Opened(source) as opened:
        rate, n_read, n_given = opened.file.samplerate, 0, 0
        resampler = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1, quality="HQ")
        empty = np.zeros(0, np.float32)
        for frames_TC in chain(opened.blocks(max(1, round(block_seconds * rate))), [None]):
            wav_T = empty if frames_TC is None else _mono(frames_TC)
            _check_finite(wav_T, opened.name, n_read)
            n_read += len(wav_T)
            if resampler is not None:
                wav_T = resampler.resample_chunk(wav_T, last=frames_TC is None)
            if len(wav_T):
                n_given += len(wav_T)
                yield torch.from_numpy(np.ascontiguousarray(wav_T, dtype=np.float32))
        if n_given == 0:
            raise AudioError(f"{opened.name} holds no audio (0 samples)")


def audio_length(source: AudioLike, sample_rate: int | None = None) -> int:
    """How many 16 kHz samples `load_audio(source)` returns, from the header wherever that can be trusted.

    Raises AudioError as `load_audio` does, except for what only decoding can find.
    """
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return _resampled_length(max(source.shape, default=0), sample_rate or SAMPLE_RATE)
    with _Opened(source) as opened:
        file = opened.file
        # MP3 has no sample count that decoders keep to, and a FLAC that was piped has none at all.
        decode = file.format == "MP3" or file.frames >= _UNKNOWN
        frames = len(opened.read()) if decode else file.frames
        length = _resampled_length(frames, file.samplerate)
        if length == 0:
            raise AudioError(f"{opened.name} holds no audio (0 samples)")
        return length


class _Streamed(soundfile.SoundFile):
    """A file without a sample count: soundfile's seek after every read would fail, so it gets no seeking."""

    def seekable(self) -> bool:
        return False


class _Opened:
    """An open sound file with a name for messages; closes what it opened, nothing else."""

    def __init__(self, source: str | os.PathLike | AudioSource | BinaryIO):
        self.name, target, head, tail, size = _bytes_of(source)
        if size == 0:
            raise AudioError(f"{self.name} is empty (0 bytes)")
        _check_whole(self.name, target, head, tail, size)
        self._xing = b"Xing" in head or b"Info" in head  # an MP3 that counts its frames
        try:
            self.file = soundfile.SoundFile(target)
            if self.file.frames >= _UNKNOWN:
                self.file.close()
                if isinstance(target, io.BytesIO):
                    target.seek(0)
                self.file = _Streamed(target)
        except (soundfile.SoundFileError, TypeError, ValueError, RuntimeError) as error:
            reason = getattr(error, "error_string", "") or error
            advice = (
                " Make a WAV of m4a, aac and the like first (ffmpeg)." if "not recog" in str(reason) else ""
            )
            raise AudioError(f"{self.name} is not audio that can be read: {reason}{advice}") from error

    def __enter__(self) -> _Opened:
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def read(self, start: int = 0, n: int | None = None) -> np.ndarray:
        """(frames, channels) float32; AudioError when fewer frames come than the header promises."""
        file = self.file
        try:
            if file.frames >= _UNKNOWN:
                return self._read_blocks(start, n)
            if file.format == "MP3":  # its seeking is not exact to the sample
                whole = self._promise(self._promised(), file.read(dtype="float32", always_2d=True))
                return whole[start : None if n is None else start + n]
            start = min(start, file.frames)
            wanted = file.frames - start if n is None else min(n, file.frames - start)
            if start:
                file.seek(start)
            return self._promise(wanted, file.read(wanted, dtype="float32", always_2d=True))
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise self._damaged() from error

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        """Like `read`, from the start to the end, `n` frames at a time."""
        file, n_read = self.file, 0
        try:
            while len(block := file.read(n, dtype="float32", always_2d=True)):
                n_read += len(block)
                yield block
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise self._damaged() from error
        if n_read < self._promised():
            raise self._too_short(self._promised(), n_read)

    def _promised(self) -> int:
        """The frames that the header says there are, as far as it can be believed."""
        if self.file.frames >= _UNKNOWN:
            return 0
        if self.file.format == "MP3":
            return max(0, self.file.frames - 4 * 1152) if self._xing else 0
        return self.file.frames

    def _damaged(self) -> AudioError:
        return AudioError(f"{self.name} is truncated or damaged: its samples cannot all be decoded")

    def _promise(self, wanted: int, got: np.ndarray) -> np.ndarray:
        if len(got) < wanted:
            raise self._too_short(wanted, len(got))
        return got

    def _too_short(self, wanted: int, got: int) -> AudioError:
        return AudioError(
            f"{self.name} is truncated: its header promises {self.file.frames} samples, "
            f"but {got} of the {wanted} asked for could be decoded"
        )

    def _read_blocks(self, start: int, n: int | None) -> np.ndarray:
        blocks = [np.zeros((0, self.file.channels), np.float32)]
        while len(block := self.file.read(_BLOCK, dtype="float32", always_2d=True)):
            blocks.append(block)
        return np.concatenate(blocks)[start : None if n is None else start + n]


def _bytes_of(source) -> tuple[str, str | io.BytesIO, bytes, bytes, int]:
    """Name, what soundfile shall open, the first and the last bytes, and the size in bytes."""
    if hasattr(source, "read"):
        name, data = str(getattr(source, "name", "the stream")), source.read()
        if not isinstance(data, bytes):
            raise AudioError(f"{name} was opened as text: open it in binary mode, or give its path")
        return name, io.BytesIO(data), data[:4096], data[-_OGG_PAGE:], len(data)
    if not isinstance(source, AudioSource):
        source = AudioSource(os.fspath(source))
    name = str(source)
    if Path(source.path).is_dir():
        raise AudioError(f"{name} is a folder, not an audio file")
    try:
        with open(source.path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            if source.offset == 0 and source.length < 0:
                file.seek(0)
                head = file.read(4096)
                tail = b""
                if head[:4] == b"OggS":
                    file.seek(max(0, size - _OGG_PAGE))
                    tail = file.read()
                return name, source.path, head, tail, size
            file.seek(source.offset)
            data = file.read(source.length)
    except FileNotFoundError as error:
        raise AudioError(f"no such audio file: {source.path}") from error
    except OSError as error:
        raise AudioError(f"{name} cannot be read: {error.strerror}") from error
    if source.offset > size or len(data) < source.length:
        raise AudioError(
            f"{name} reaches behind the end of the file, which has {size} bytes: the archive is truncated, "
            "or the manifest was made from another one"
        )
    return name, io.BytesIO(data), data[:4096], data[-_OGG_PAGE:], len(data)


def _check_whole(name: str, target: str | io.BytesIO, head: bytes, tail: bytes, size: int) -> None:
    """Refuse a file that ends before its header says so, where the decoder would just return less."""
    magic = head[:4]
    needed = 0
    if magic == b"OggS":
        page = tail.rfind(b"OggS")
        n_segments = tail[page + 26] if len(tail) > page + 26 else 0
        end = page + 27 + n_segments + sum(tail[page + 27 : page + 27 + n_segments])
        if page < 0 or len(tail) < page + 27 or len(tail) < end or not tail[page + 5] & 4:
            raise AudioError(f"{name} is truncated: its last Ogg page is cut or not marked as the last one")
    elif magic == b".snd" and len(head) >= 12:
        offset, length = struct.unpack(">II", head[4:12])
        needed = 0 if length == 0xFFFFFFFF else offset + length
    elif magic in (b"RIFF", b"RF64", b"RIFX", b"FORM"):
        if isinstance(target, io.BytesIO):
            needed = _data_end(target, magic)
            target.seek(0)
        else:
            with open(target, "rb") as file:
                needed = _data_end(file, magic)
    if needed > size:
        raise AudioError(f"{name} is truncated: its header promises {needed} bytes, but it has {size}")


def _data_end(file: BinaryIO, magic: bytes) -> int:
    """The byte where the samples of a chunked file (WAV, AIFF) end according to its header; 0: unknown."""
    order = "<" if magic in (b"RIFF", b"RF64") else ">"
    long_size = 0
    position = 12
    while True:
        file.seek(position)
        chunk = file.read(8)
        if len(chunk) < 8:
            return 0
        kind, length = chunk[:4], struct.unpack(order + "I", chunk[4:])[0]
        if kind == b"ds64":  # RF64: sizes above 4 GiB
            sizes = file.read(16)
            long_size = struct.unpack("<QQ", sizes)[1] if len(sizes) == 16 else 0
        if kind in (b"data", b"SSND"):
            if length == 0xFFFFFFFF:  # written into a pipe (or RF64): the writer could not know
                length = long_size
            return position + 8 + length if length else 0
        position += 8 + length + (length & 1)


def _array(source: np.ndarray | torch.Tensor) -> np.ndarray:
    """(frames, channels) float from an array of any usual type and orientation."""
    if isinstance(source, torch.Tensor):
        source = source.detach().cpu()
        source = (source.float() if source.is_floating_point() else source).numpy()
    if source.ndim not in (1, 2):
        raise AudioError(
            f"audio arrays are (T,), (channels, T) or (T, channels), but this has shape {source.shape}"
        )
    samples: np.ndarray
    if source.dtype == np.uint8:
        samples = (source.astype(np.float32) - 128) / 128
    elif source.dtype in (np.int8, np.int16, np.int32):
        samples = source.astype(np.float32) / -float(np.iinfo(source.dtype).min)
    elif np.issubdtype(source.dtype, np.floating):
        samples = source.astype(np.float32)  # a copy: what comes back never shares the caller's memory
    else:
        raise AudioError(
            f"audio arrays hold floats or 8, 16 or 32 bit integers, but this holds {source.dtype}"
        )
    if samples.ndim == 1:
        return samples[:, None]
    return samples.T if samples.shape[0] < samples.shape[1] else samples


def _mono(frames_TC: np.ndarray) -> np.ndarray:
    if frames_TC.shape[1] == 1:
        return frames_TC[:, 0]
    return frames_TC.mean(axis=1, dtype=np.float32)


def _check_finite(wav_T: np.ndarray, name: str, start: int = 0) -> None:
    if not np.isfinite(wav_T).all():
        bad = start + int(np.flatnonzero(~np.isfinite(wav_T))[0])
        raise AudioError(f"{name} holds a NaN or infinite sample (the first one at position {bad})")


def _resample(wav_T: np.ndarray, rate: int, name: str) -> np.ndarray:
    if rate <= 0:
        raise AudioError(f"{name}: the sample rate must be positive, but is {rate}")
    length = _resampled_length(len(wav_T), rate)
    if length == 0:
        return wav_T[:0]
    out = soxr.resample(wav_T, rate, SAMPLE_RATE, quality="HQ")
    if len(out) < length:  # not seen in practice: the length is a promise that `audio_length` makes
        out = np.pad(out, (0, length - len(out)))
    return out[:length]


def _resampled_length(n: int, rate: int) -> int:
    """soxr's output length: n * 16,000 / rate, halves rounded up."""
    return n if rate == SAMPLE_RATE else (2 * n * SAMPLE_RATE + rate) // (2 * rate)
