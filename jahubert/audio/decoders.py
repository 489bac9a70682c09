"""Decoding of audio files with soundfile (libsndfile) or an optional decoder."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Protocol

import numpy as np
import soundfile

from jahubert.audio import media
from jahubert.audio.containers import Part, find, split
from jahubert.audio.integrity import flac_samples, is_truncated
from jahubert.audio.sources import AudioBytes
from jahubert.errors import AudioError

_BLOCK = 60 * 48_000  # number of frames to decode at a time from a file of unknown length
_UNKNOWN = 1 << 48  # frame counts of this value or more mean that the length is unknown
_FLAC = b"fLaC\0\0\0\x22"  # start of a FLAC stream
_MIN_RATE, _MAX_RATE = 1_000, 3_072_000  # Hz; files with rates outside this range are considered damaged
_READ_AHEAD = 65_536  # maximum number of bytes that a decoder reads ahead
_SOUNDFILE_ERRORS = (soundfile.SoundFileError, TypeError, ValueError, RuntimeError)


class Decoder(Protocol):
    """An open stream with a fixed sampling rate."""

    rate: int  # sampling rate in Hz
    seekable: bool  # whether `read` decodes only the requested samples

    def length(self) -> int:
        """Return the number of samples per channel, decoding the stream if its header is unreliable."""

    def read(self, start: int = 0, n: int | None = None) -> np.ndarray:
        """Read up to `n` frames (None: all) from frame `start` on, as float32 (frames, channels)."""

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        """Yield all samples in blocks of up to `n` frames."""


@contextmanager
def open_decoders(source: AudioBytes) -> Iterator[list[Decoder]]:
    """Open decoders for all streams in a file, in order.

    Raises:
        AudioError: the file is not audio, has an unsupported format or an impossible sampling rate, is
            truncated or damaged, or needs an optional decoder that is not installed.
    """
    magic = media.sniff(source)
    if magic is not None:
        with media.open_media(source, magic) as media_decoder:
            _check_rate(source.name, media_decoder.rate)
            yield [media_decoder]
        return
    parts = split(source)
    decoders: list[SoundFileDecoder] = []
    try:
        try:
            decoders += (SoundFileDecoder(source, part) for part in parts)
        except _SOUNDFILE_ERRORS as error:
            unsupported = media.unreadable_error(source, getattr(error, "error_string", "") or str(error))
            raise unsupported from error
        for decoder in decoders:
            _check_rate(source.name, decoder.rate)
        yield list(decoders)
    finally:
        for decoder in decoders:
            decoder.close()


def _check_rate(name: str, rate: int) -> None:
    if not _MIN_RATE <= rate <= _MAX_RATE:
        raise AudioError(
            f"{name}: its header states a sampling rate of {rate} Hz, which is not between {_MIN_RATE} and "
            f"{_MAX_RATE}; the file is damaged or not audio"
        )


class _Bytes(io.RawIOBase):
    """File object for a `Part`, which consists of its prefix and a byte range of the file."""

    def __init__(self, file: BinaryIO, part: Part):
        self.file = file
        self.part = part
        self.position = 0
        self.size = len(part.prefix) + part.length

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        self.position = max(0, base + offset)
        return self.position

    def tell(self) -> int:
        return self.position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        end = min(self.size, self.position + len(buffer))
        prefix = self.part.prefix
        data = prefix[self.position : end]
        start = max(0, self.position - len(prefix))
        n_bytes = end - len(prefix) - start
        if n_bytes > 0:
            self.file.seek(self.part.start + start)
            data += self.file.read(n_bytes)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)


class _Sequential(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """SoundFile that does not seek between reads.

    soundfile seeks to the current position after each read of a seekable file. Such a seek fails if the
    length is unknown, and it clears the bit reservoir of the MP3 decoder, which causes an audible glitch at
    each block boundary.
    """

    def seekable(self) -> bool:
        return False


class SoundFileDecoder:
    """Decoder that uses libsndfile."""

    def __init__(self, source: AudioBytes, part: Part):
        self.name = source.name
        self.source = source
        self.part = part
        self.file = _Sequential(self._target(), closefd=False)
        self.rate = self.file.samplerate
        if is_truncated(self.file, source.file):
            self.file.close()
            raise AudioError(f"{self.name} is truncated: it contains fewer samples than its header states")
        # In MP3 files, seeking is not sample-exact. FLAC files written to a pipe do not state a length.
        self.seekable = self.file.format != "MP3" and self.file.frames < _UNKNOWN

    def _target(self) -> int | BinaryIO:
        """Return the argument for soundfile: a descriptor for a whole regular file, or else a file object."""
        file = self.source.file
        file.seek(0)
        if self.part.prefix or self.part.length != self.source.size:
            return io.BufferedReader(_Bytes(file, self.part), 16_384)
        if isinstance(file, io.BytesIO) or sys.platform == "win32":
            return file
        descriptor = file.fileno()
        os.lseek(descriptor, 0, os.SEEK_SET)  # libsndfile treats the current position as the start
        return descriptor

    def close(self) -> None:
        self.file.close()

    def length(self) -> int:
        if not self.seekable:  # the stated length is missing (FLAC) or inexact (MP3)
            return sum(len(block) for block in self.blocks(_BLOCK))
        self._check_flac_length()
        n_frames: int = self.file.frames
        return n_frames

    def read(self, start: int = 0, n: int | None = None) -> np.ndarray:
        file = self.file
        if not self.seekable:
            everything = np.concatenate([np.zeros((0, file.channels), np.float32), *self.blocks(_BLOCK)])
            return everything[start : None if n is None else start + n]
        start = min(start, file.frames)
        n_expected = file.frames - start if n is None else min(n, file.frames - start)
        try:
            if start:
                file.seek(start)
            samples: np.ndarray = file.read(n_expected, dtype="float32", always_2d=True)
        except _SOUNDFILE_ERRORS as error:
            raise self._damaged() from error
        except MemoryError:  # the stated length is impossible
            raise self._truncated(n_expected, 0) from None
        if len(samples) < n_expected:
            raise self._truncated(n_expected, len(samples))
        if n is None:
            self._check_end()
        return samples

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        file = self.file
        n_read = 0
        n_stated = _UNKNOWN if file.format == "MP3" else file.frames
        try:
            while n_read < n_stated:  # reading on would decode what follows the last sample
                block = file.read(min(n, n_stated - n_read), dtype="float32", always_2d=True)
                if not len(block):
                    break
                n_read += len(block)
                yield block
        except _SOUNDFILE_ERRORS as error:
            raise self._damaged() from error
        n_expected = self._min_frames()
        if n_read < n_expected:
            raise self._truncated(n_expected, n_read)
        self._check_end()

    def _min_frames(self) -> int:
        if self.file.frames >= _UNKNOWN:
            return 0
        return self.part.min_frames if self.file.format == "MP3" else self.file.frames

    def _check_end(self) -> None:
        """Reject a FLAC file with a wrong length, or with further streams, which libsndfile ignores."""
        if self.file.format != "FLAC":
            return
        self._check_flac_length()
        file = self.source.file
        in_memory = isinstance(file, io.BytesIO)
        position = file.tell() if in_memory else os.lseek(file.fileno(), 0, os.SEEK_CUR)
        if find(file, _FLAC, max(len(_FLAC), position - _READ_AHEAD)) >= 0:
            raise AudioError(
                f"{self.name} contains several FLAC streams, but libsndfile reads only the first; split "
                "the file into one file per stream"
            )

    def _check_flac_length(self) -> None:
        """Raise AudioError if the stated length of a FLAC stream differs from the end of its last frame."""
        if self.file.format != "FLAC" or self.file.frames >= _UNKNOWN:
            return
        file = self.source.file
        position = file.tell()  # libsndfile uses the position of the same descriptor
        n_samples = flac_samples(file, self.source.size)
        file.seek(position)
        if n_samples is not None and n_samples != self.file.frames:
            raise AudioError(
                f"{self.name}: its header states {self.file.frames} samples, but its last FLAC frame ends at "
                f"sample {n_samples}; encode it again, for example with ffmpeg"
            )

    def _damaged(self) -> AudioError:
        return AudioError(f"{self.name} is truncated or damaged: some of its samples cannot be decoded")

    def _truncated(self, n_expected: int, n_read: int) -> AudioError:
        return AudioError(
            f"{self.name} is truncated: its header states {self.file.frames} samples, but only {n_read} of "
            f"{n_expected} could be decoded"
        )
