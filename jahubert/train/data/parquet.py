"""Reader for parquet files, with retries after file system errors."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from jahubert.errors import DataError
from jahubert.train.data.utterances import read_reliably

T = TypeVar("T")
_BATCH_ROWS = 256  # rows in memory at a time; they may contain audio


def parquet_schema(path: Path) -> pa.Schema:
    """Return the schema of a parquet file.

    Raises:
        DataError: the file is not parquet, or the file system still fails after several attempts.
        OSError: the file does not exist.
    """
    return read_reliably(lambda: _read(path, lambda: pq.ParquetFile(path).schema_arrow), path)


def parquet_batches(path: Path, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a parquet file in batches of at most 256 rows.

    Raises:
        DataError: the file is damaged, or the file system still fails after several attempts.
        OSError: the file does not exist.
    """
    n_read = 0
    batches: Iterator[pa.RecordBatch] | None = None

    def next_batch() -> pa.RecordBatch | None:
        nonlocal batches
        try:
            if batches is None:  # this is the first attempt, or the iterator ended with an error
                batches = islice(
                    pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=columns), n_read, None
                )
            return next(batches, None)
        except BaseException:
            batches = None
            raise

    while (batch := read_reliably(lambda: _read(path, next_batch), path)) is not None:
        yield batch
        n_read += 1


def _read(path: Path, read: Callable[[], T]) -> T:
    """Call `read`, and raise DataError if Arrow reports a damaged file, e.g. by an OSError without errno."""
    try:
        return read()
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise DataError(f"{path}: not a parquet file, or damaged ({error}); copy the file again") from error
