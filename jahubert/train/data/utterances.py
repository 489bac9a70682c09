"""Items that recipes yield (utterances, archives, rejected items), and reading of files with retries."""

from __future__ import annotations

import errno
import io
import logging
import operator
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from jahubert.audio import AudioSource, load_audio
from jahubert.errors import DISK_FULL, AudioError, DataError, ReadError, shorten
from jahubert.formats.gzip_files import open_gzip

log = logging.getLogger(__name__)

T = TypeVar("T")

UNUSABLE_AUDIO = "unusable audio"  # reason for rejecting recordings that cannot be decoded
DECODING_THREADS = 8  # maximum number of threads with which stage=prepare checks audio
RETRY_DELAYS = (1.0, 5.0, 20.0)  # seconds to wait before retrying a read after a file system error
_BLOCK = 1 << 20  # bytes
_MAX_DETAIL = 2_000  # maximum length, in characters, of the details about a rejected item
# Errors caused by the path or by writing, for which retrying does not help.
_PERMANENT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, *DISK_FULL)


@dataclass(frozen=True)
class Phone:
    """A phone in a reference alignment, with positions in samples from the start of the utterance."""

    symbol: str
    start: int
    end: int  # exclusive


@dataclass(frozen=True)
class Utterance:
    """An utterance in an audio file, with the speaker, text and reference alignment if available."""

    id: str
    audio: AudioSource
    start: int = 0  # 16 kHz samples from the start of the audio
    n_samples: int = 0  # 16 kHz samples; 0: to the end of the audio, as measured by stage=prepare
    speaker: str = ""
    text: str = ""
    words: tuple[tuple[str, ...], ...] = ()  # the phones of each word
    split: str = "train"
    alignment: tuple[Phone, ...] = ()

    @property
    def location(self) -> str:
        """Location of the audio, for error messages."""
        return f"{self.audio}" + (f", from sample {self.start}" if self.start else "")


@dataclass(frozen=True)
class Utterances:
    """Recordings in one archive, stored as columns for corpora with millions of rows.

    Each recording is one utterance, whose length is required.
    """

    path: str
    ids: Sequence[str]
    offset_N: np.ndarray  # int64, byte offsets in the archive
    length_N: np.ndarray  # int64, bytes
    n_samples_N: np.ndarray  # int64, 16 kHz samples
    texts: Sequence[str]
    split: str = "train"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Utterance:
        audio = AudioSource(self.path, int(self.offset_N[i]), int(self.length_N[i]))
        return Utterance(
            self.ids[i], audio, n_samples=int(self.n_samples_N[i]), text=self.texts[i], split=self.split
        )

    def __iter__(self) -> Iterator[Utterance]:
        return (self[i] for i in range(len(self)))

    def take(self, rows: Sequence[int] | np.ndarray, split: str | None = None) -> Utterances:
        """Select rows, optionally assigning them to another split."""
        return Utterances(
            self.path,
            [self.ids[i] for i in rows],
            self.offset_N[rows],
            self.length_N[rows],
            self.n_samples_N[rows],
            [self.texts[i] for i in rows],
            self.split if split is None else split,
        )


@dataclass(frozen=True)
class Rejected:
    """An item that a recipe or stage=prepare rejected, with the reason."""

    id: str
    reason: str  # one of a few fixed phrases, because rejected items are counted per reason
    detail: str = ""  # details about this item
    missing: str = ""  # path of a missing file; once the file exists, stage=prepare explains how to add it

    def __post_init__(self) -> None:
        object.__setattr__(self, "detail", shorten(self.detail, _MAX_DETAIL))


def too_many(n_rejected: int, n_total: int, max_share: float) -> bool:
    """Return whether more than one item and more than the share `max_share` of the items are rejected.

    A single rejected item is always accepted, unless `max_share` is 0.
    """
    return n_rejected > (max(1.0, max_share * n_total) if max_share else 0)


def read_reliably(read: Callable[[], T], source: AudioSource | str | os.PathLike[str]) -> T:
    """Call `read`, which reads `source`, and retry after file system errors.

    Decoders report a file system error in the middle of a file as truncated audio. Before audio is considered
    damaged, its bytes are therefore read once without a decoder, and the decoding is repeated.

    Raises:
        AudioError: the audio is missing or unusable.
        ReadError: the file system still fails after several attempts.
        OSError: the file does not exist, or the error concerns another file, such as an output file.
    """
    if not isinstance(source, AudioSource):
        source = AudioSource(os.fsdecode(source))
    delays = iter(RETRY_DELAYS)
    confirmed = False
    while True:
        try:
            return read()
        except (AudioError, OSError) as error:
            failure = error if isinstance(error, OSError) else error.__cause__
            if not isinstance(failure, OSError):
                failure = _read_error(source)
                if failure is None and not confirmed:
                    confirmed = True
                    continue
            if not isinstance(failure, OSError) or failure.errno in _PERMANENT:
                raise
            if failure.filename is not None and os.fsdecode(failure.filename) != source.path:
                raise
            delay = next(delays, None)
            if delay is None:
                raise ReadError(
                    f"{source}: read error ({failure.strerror or failure}); rerun the same command "
                    "once the file is readable"
                ) from error
            log.warning("%s: %s; retrying in %g s", source, failure, delay)
            time.sleep(delay)


def is_file(path: str | os.PathLike[str]) -> bool:
    """Return whether a file exists, and retry after file system errors other than a missing file.

    Raises:
        ReadError: the file system still fails after several attempts.
    """
    return stat.S_ISREG(_mode(path))


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a folder, with the same retries and errors as `is_file`."""
    return stat.S_ISDIR(_mode(path))


def _mode(path: str | os.PathLike[str]) -> int:
    """Return the file type and permission bits of a path, or 0 if it does not exist."""
    try:
        return read_reliably(lambda: os.stat(path), path).st_mode
    except (OSError, ValueError):  # ValueError: the name contains a null character
        return 0


def read_bytes(path: Path) -> bytes:
    """Read a file with retries.

    Raises:
        ReadError: the file system still fails after several attempts.
        DataError: the path does not exist or is not a file.
    """
    try:
        return read_reliably(path.read_bytes, path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def read_blocks(path: Path) -> Iterator[bytes]:
    """Yield a file in blocks, with retries.

    Raises:
        ReadError: the file system still fails after several attempts.
        OSError: the path does not exist or is not a file.
    """
    position = 0

    def read() -> bytes:
        with open(path, "rb") as file:
            file.seek(position)
            return file.read(_BLOCK)

    while block := read_reliably(read, path):
        yield block
        position += len(block)


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends, with the same retries and errors as `read_blocks`."""
    start: list[bytes] = []  # the parts of a line that ends in a later block
    for block in read_blocks(path):
        *lines, end = block.split(b"\n")
        if lines:
            yield b"".join((*start, lines[0], b"\n"))
            yield from (line + b"\n" for line in lines[1:])
            start = []
        start.append(end)
    if last := b"".join(start):
        yield last


def same_content(first: Path, second: Path) -> bool:
    """Return whether two paths are files with the same content, with retries after file system errors."""
    try:
        sizes = [read_reliably(path.stat, path).st_size for path in (first, second)]
        return sizes[0] == sizes[1] and all(map(operator.eq, read_blocks(first), read_blocks(second)))
    except OSError:  # a path is a folder or a broken link
        return False


def read_text(path: Path) -> str:
    """Read a UTF-8 file, which may have a byte order mark or be compressed with gzip, with retries.

    Raises:
        DataError: the file cannot be read or is not UTF-8.
    """
    try:
        raw = read_bytes(path)
        if path.suffix == ".gz":
            raw = open_gzip(io.BytesIO(raw), path).read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}:{line}: not UTF-8; convert a Shift_JIS file with: iconv -f CP932 -t UTF-8"
        ) from error


def _read_error(source: AudioSource) -> OSError | None:
    """Read all bytes of an audio source. Return the OSError raised by reading, or None."""
    try:
        with open(source.path, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # reading a device might never end
                return None
            file.seek(source.offset)
            remaining = source.length
            while chunk := file.read(1 << 20 if remaining < 0 else min(1 << 20, remaining)):
                remaining -= len(chunk) if remaining >= 0 else 0
    except (OSError, ValueError) as error:
        return error if isinstance(error, OSError) else None
    return None


def load_utterance(item: Utterance, start: int = 0, n_samples: int | None = None) -> torch.Tensor:
    """Load samples of an utterance, float32 (T,).

    Args:
        start: first sample, counted from the start of the utterance.
        n_samples: number of samples; None: all samples to the end of the utterance.

    Raises:
        AudioError: the audio is unreadable, or shorter than specified in the manifest.
    """
    n_requested = item.n_samples - start if n_samples is None else n_samples
    wav_T = load_audio(item.audio, start=item.start + start, n_samples=n_requested)
    if len(wav_T) != n_requested:
        raise AudioError(
            f"{item.location} has {start + len(wav_T)} samples, but the manifest specifies {item.n_samples}: "
            "the audio was changed after stage=prepare"
        )
    return wav_T
