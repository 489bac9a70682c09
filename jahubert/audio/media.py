"""Optional decoders for m4a, mp4, webm, aac, wma and similar formats, based on PyAV or ffmpeg."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from jahubert.audio.sources import AudioBytes
from jahubert.errors import AudioError

_FORMATS = (  # (offset, magic bytes, name of the format)
    (4, b"ftyp", "MPEG-4 (m4a, mp4)"),
    (4, b"moov", "QuickTime"),
    (4, b"mdat", "QuickTime"),
    (0, b"\x1a\x45\xdf\xa3", "Matroska (webm, mka)"),
    (0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "Windows Media (wma)"),
    (0, b"\xff\xf1", "AAC"),
    (0, b"\xff\xf9", "AAC"),
    (0, b"#!AMR", "AMR"),
    (0, b"FLV", "Flash Video"),
    (0, b".RMF", "RealMedia"),
)
# First bytes of files that libsndfile opens only if it supports the codec inside.
_KNOWN_CONTAINERS = (b"OggS", b"RIFF", b"RIFX", b"RF64", b"FORM", b"caff", b"ID3")
_TRUNCATED = re.compile(rb"prematurely|partial file|truncat", re.I)  # ffmpeg's messages about truncated files
_SLACK_SECONDS = 0.25  # maximum number of seconds by which decoded audio may be shorter than stated
INSTALL = "run pip install '.[media]' in a clone of jahubert (PyAV), or install ffmpeg"


def sniff(source: AudioBytes) -> str | None:
    """Return the name of the format if it requires the optional decoder, otherwise None."""
    source.file.seek(0)
    head = source.file.read(16)
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "AVI"
    for offset, magic, name in _FORMATS:
        if head[offset : offset + len(magic)] == magic:
            return name
    if head[:3] == b"ID3" and len(head) >= 10:
        n_bytes = (head[6] << 21) | (head[7] << 14) | (head[8] << 7) | head[9]
        source.file.seek(10 + n_bytes)
        if source.file.read(2) in (b"\xff\xf1", b"\xff\xf9"):
            return "AAC"
    return None


def unreadable_error(source: AudioBytes, reason: str) -> AudioError:
    """Create an error for a file that libsndfile cannot open."""
    source.file.seek(0)
    head = source.file.read(4)
    advice = ""
    if any(head.startswith(magic) for magic in _KNOWN_CONTAINERS):
        advice = " (if other programs can play it, its codec is unusual: convert it, for example with ffmpeg)"
    return AudioError(f"{source.name} is not audio that can be read: {reason.strip().rstrip('.')}{advice}")


@contextmanager
def open_media(source: AudioBytes, format_name: str) -> Iterator[AvDecoder | FfmpegDecoder]:
    """Open the first audio track of a media file.

    Raises:
        AudioError: neither PyAV nor ffmpeg is installed, or the file has no readable audio.
    """
    decoder: AvDecoder | FfmpegDecoder
    if _has_av():
        decoder = AvDecoder(source)
    elif (program := shutil.which("ffmpeg")) is not None:
        decoder = FfmpegDecoder(source, program)
    else:
        raise AudioError(
            f"{source.name} has the format {format_name}, which needs an optional decoder: {INSTALL}; or "
            "convert the file to WAV or FLAC"
        )
    try:
        yield decoder
    finally:
        decoder.close()


def _has_av() -> bool:
    try:
        import av  # noqa: F401
    except ImportError:
        return False
    return True


class _MediaDecoder:
    """Base class that decodes whole files, because seeking in media files is not sample-exact."""

    rate: int
    seekable = False

    def length(self) -> int:
        return sum(len(block) for block in self.blocks(1 << 20))

    def read(self, start: int = 0, n: int | None = None) -> np.ndarray:
        everything = np.concatenate(list(self.blocks(1 << 20)) or [np.zeros((0, 1), np.float32)])
        return everything[start : None if n is None else start + n]

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        raise NotImplementedError


class AvDecoder(_MediaDecoder):
    """Decoder that uses PyAV, which runs the FFmpeg libraries in the Python process."""

    def __init__(self, source: AudioBytes):
        import av

        self.name = source.name
        source.file.seek(0)
        try:
            self.container = av.open(source.file, mode="r", metadata_errors="ignore")
        except (av.error.FFmpegError, ValueError) as error:
            raise AudioError(f"{self.name} cannot be decoded: {error.strerror or error}") from error
        if not self.container.streams.audio:
            self.container.close()
            raise AudioError(f"{self.name} has no audio track")
        self.stream = self.container.streams.audio[0]
        self.rate = self.stream.sample_rate

    def close(self) -> None:
        self.container.close()

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        import av

        waiting: list[np.ndarray] = []
        n_waiting = n_read = 0
        try:
            for samples_TC in self._frames():
                n_read += len(samples_TC)
                n_waiting += len(samples_TC)
                waiting.append(samples_TC)
                if n_waiting >= n:
                    yield from _rechunk(waiting, n)
                    n_waiting = sum(map(len, waiting))
        except av.error.FFmpegError as error:
            raise AudioError(f"{self.name} is truncated or damaged: {error.strerror or error}") from error
        if waiting:
            yield np.concatenate(waiting)
        stated = self._stated_seconds()
        if n_read < (stated - _SLACK_SECONDS) * self.rate:
            raise AudioError(
                f"{self.name} is truncated: its header states {stated:.2f} s, but only "
                f"{n_read / self.rate:.2f} s could be decoded"
            )

    def _frames(self) -> Iterator[np.ndarray]:
        import av

        resampler = av.AudioResampler(format="fltp", rate=self.rate)
        for frame in self.container.decode(self.stream):
            for converted in resampler.resample(frame):
                yield converted.to_ndarray().T
        for converted in resampler.resample(None):
            yield converted.to_ndarray().T

    def _stated_seconds(self) -> float:
        """Return the duration in the header, or 0 if it is missing or unreliable."""
        if self.container.format.name in ("aac", "amr", "mpegts"):
            return 0.0
        if self.stream.duration is not None and self.stream.time_base is not None:
            return float(self.stream.duration * self.stream.time_base)
        only_audio = len(self.container.streams) == 1
        return self.container.duration / 1e6 if self.container.duration and only_audio else 0.0


class FfmpegDecoder(_MediaDecoder):
    """Decoder that runs the ffmpeg program and reads floating-point WAV from its output."""

    def __init__(self, source: AudioBytes, program: str):
        self.name = source.name
        self.copy: Path | None = None
        if isinstance(source.file, io.BytesIO):
            descriptor, copy = tempfile.mkstemp(prefix="jahubert-")
            self.copy = Path(copy)
            with open(descriptor, "wb") as file:
                file.write(source.file.getbuffer())
            path = os.fsencode(copy)
        else:
            path = os.path.abspath(os.fsencode(source.file.name))
        options = ["-v", "error", "-nostdin", "-xerror"]
        output = ["-map", "0:a:0", "-c:a", "pcm_f32le", "-f", "wav", "pipe:1"]
        self.errors: list[bytes] = []
        command = [*map(os.fsencode, [program, *options, "-i"]), b"file:" + path, *map(os.fsencode, output)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.reader = threading.Thread(target=self._read_errors, daemon=True)
        self.reader.start()
        self.rate, self.channels = self._read_header()

    def _read_errors(self) -> None:
        assert self.process.stderr is not None
        self.errors.append(self.process.stderr.read())

    def _read_header(self) -> tuple[int, int]:
        """Read the sampling rate and the number of channels, and advance the pipe to the first sample."""
        assert self.process.stdout is not None
        head = self.process.stdout.read(12)
        rate = channels = 0
        while len(chunk := self.process.stdout.read(8)) == 8:
            kind, length = chunk[:4], int.from_bytes(chunk[4:], "little")
            if kind == b"data" and rate:
                return rate, channels
            content = self.process.stdout.read(length + (length & 1))
            if kind == b"fmt ":
                channels = int.from_bytes(content[2:4], "little")
                rate = int.from_bytes(content[4:8], "little")
        self.close()
        raise self._failed("no audio" if not head else "incomplete output")

    def close(self) -> None:
        with suppress(OSError):
            self.process.kill()
        self.process.wait()
        self.reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        if self.copy is not None:
            self.copy.unlink(missing_ok=True)

    def blocks(self, n: int) -> Iterator[np.ndarray]:
        assert self.process.stdout is not None
        width = 4 * self.channels
        while len(data := self.process.stdout.read(n * width)) >= width:
            samples = np.frombuffer(data[: len(data) - len(data) % width], "<f4")
            yield samples.reshape(-1, self.channels)
        status = self.process.wait()
        self.reader.join()
        # ffmpeg may exit with status 0 even for truncated files.
        if status != 0 or _TRUNCATED.search(b"".join(self.errors)):
            raise self._failed("ffmpeg failed")

    def _failed(self, reason: str) -> AudioError:
        messages = b"".join(self.errors).decode("utf-8", "replace").strip().splitlines()
        return AudioError(f"{self.name} cannot be decoded: {messages[-1] if messages else reason}")


def _rechunk(waiting: list[np.ndarray], n: int) -> Iterator[np.ndarray]:
    """Yield blocks of `n` frames from a list of arrays, and leave the remaining frames in the list."""
    samples = np.concatenate(waiting)
    n_full = len(samples) - len(samples) % n
    waiting[:] = [samples[n_full:]] if n_full < len(samples) else []
    for start in range(0, n_full, n):
        yield samples[start : start + n]
