"""Lengths of recordings, and FLAC copies of recordings whose parts cannot be read by seeking."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from table_sources import Row

from jahubert.audio import audio_length, is_seekable, stream_audio
from jahubert.errors import AudioError
from jahubert.frames import SAMPLE_RATE
from jahubert.prefetch import usable_cores
from jahubert.train.data.flac import write_flac_once
from jahubert.train.data.utterances import read_reliably
from jahubert.train.experiment.progress import progress

log = logging.getLogger(__name__)

VERSION = 1  # part of the names of copies
_MAX_PENDING = 256  # maximum number of recordings queued for reading
_MAX_PEAK = 2.0  # multiple of full scale; louder audio, which 16 bits would distort audibly, is not converted


@dataclass(frozen=True)
class Recording:
    """The file from which a recording is read: the original or a copy."""

    path: Path
    n_samples: int  # 16 kHz samples


def read_recordings(rows: Sequence[Row], max_samples: int, folder: Path) -> dict[Path, Recording | str]:
    """Determine the lengths of recordings, and convert recordings that cannot be read in parts, in parallel.

    A recording that is used in parts is converted to 16 kHz FLAC if its parts cannot be read by seeking,
    because otherwise the whole file would be decoded for each part. Audio far above full scale is not
    converted. Existing copies are kept.

    Args:
        max_samples: maximum length of an utterance. Longer recordings without text are used in parts.
        folder: folder for the copies.

    Returns:
        Each recording, or the reason why its audio is unusable, keyed by the path in its rows.

    Raises:
        ReadError: a recording cannot be read because of file system errors.
    """
    rows_of: dict[Path, list[Row]] = {}
    for row in rows:
        rows_of.setdefault(row.path, []).append(row)
    recordings: dict[Path, Recording | str] = {}
    waiting = iter(rows_of.items())
    pending: deque[tuple[Path, Future[Recording | str]]] = deque()
    stop = threading.Event()
    pool = ThreadPoolExecutor(usable_cores())
    with progress("reading the recordings", "recordings", len(rows_of)) as done:
        try:
            while True:
                for path, uses in islice(waiting, _MAX_PENDING - len(pending)):
                    pending.append((path, pool.submit(_read, path, uses, max_samples, folder, stop)))
                if not pending:
                    break
                path, future = pending.popleft()
                recordings[path] = future.result()
                done(1)
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
    copies = [
        path for path, found in recordings.items() if isinstance(found, Recording) and found.path != path
    ]
    if copies:
        log.info("table: number of recordings that are read from FLAC copies in %s: %d", folder, len(copies))
    return recordings


def _read(
    path: Path, rows: Sequence[Row], max_samples: int, folder: Path, stop: threading.Event
) -> Recording | str:
    try:
        # For some formats, determining the length takes as long as decoding. The length is not needed here if
        # a row has a start, because this row is always a part.
        n_samples = None if any(row.start > 0 for row in rows) else _length(path)
        is_whole = n_samples is not None and not any(_is_part(row, n_samples, max_samples) for row in rows)
        if not is_whole and not read_reliably(lambda: is_seekable(path), path):
            try:
                return _converted(path, folder, stop)
            except OverflowError:
                log.warning(
                    "%s has samples above %g times full scale and is therefore not converted, so every part "
                    "is read by decoding the whole file; reduce its level",
                    path,
                    _MAX_PEAK,
                )
        return Recording(path, _length(path) if n_samples is None else n_samples)
    except AudioError as error:
        return str(error)


def _length(path: Path) -> int:
    return read_reliably(lambda: audio_length(path), path)


def _is_part(row: Row, n_samples: int, max_samples: int) -> bool:
    """Return whether a row without a start is part of a recording, or is cut into parts."""
    is_cut = n_samples > max_samples and not row.text and not row.kana
    return is_cut or (row.end is not None and round(row.end * SAMPLE_RATE) < n_samples)


def _converted(path: Path, folder: Path, stop: threading.Event) -> Recording:
    """Convert a recording to 16 kHz FLAC, unless a copy exists that was made from the same file.

    Raises:
        OverflowError: the audio far exceeds full scale.
    """
    original = path.resolve()
    state = read_reliably(original.stat, original)
    key = os.fsencode(f"{VERSION} {state.st_size} {state.st_mtime_ns} {original}")
    copy = folder.absolute() / f"{path.stem[-40:]}-{hashlib.sha256(key).hexdigest()[:20]}.flac"

    def blocks() -> Iterator[np.ndarray]:
        for wav_T in stream_audio(path):
            if stop.is_set():
                raise CancelledError
            if wav_T.abs().max() > _MAX_PEAK:
                raise OverflowError
            yield wav_T.numpy()

    return Recording(copy, read_reliably(lambda: write_flac_once(copy, blocks), path))
