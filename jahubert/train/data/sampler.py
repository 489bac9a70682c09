"""Length-bucketed sampler of micro-batches, determined by (seed, epoch).

A micro-batch is processed by one device in one forward pass. A step consists of a fixed number of
micro-batches, which are distributed over the ranks, so the batch of a step does not depend on the number of
ranks or workers. The sampler state is two integers: the epoch and the number of micro-batches consumed in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from jahubert.errors import ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.masking import seeded_rng


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a manifest that are processed together, and their position in the run."""

    epoch: int
    index: int  # position in the epoch
    rows: tuple[int, ...]


class Epoch:
    """The micro-batches of one epoch in order, stored as arrays because there can be millions of rows."""

    def __init__(self, number: int, rows: np.ndarray, starts: np.ndarray, order: np.ndarray, padding: float):
        """Create an epoch in which micro-batch `i` is `rows[starts[order[i]] : starts[order[i] + 1]]`."""
        self.number, self.rows, self.starts, self.order = number, rows, starts, order
        self.padding = padding  # fraction of all samples

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)  # required for iteration to end
        group = self.order[index]
        rows = self.rows[self.starts[group] : self.starts[group + 1]]
        return MicroBatch(self.number, index, tuple(rows.tolist()))

    def for_rank(self, rank: int, world: int) -> Iterator[MicroBatch]:
        """Iterate over the micro-batches of a rank: every `world`-th, starting at `rank`."""
        return (self[index] for index in range(rank, len(self), world))


class Sampler:
    """Sampler of micro-batches of similar lengths, each at most `micro_seconds` long including padding."""

    def __init__(
        self,
        rows: np.ndarray,
        n_samples: np.ndarray,
        *,
        micro_seconds: float,
        micro_batches_per_step: int,
        seed: int,
        max_rows: int = 0,
        epoch_lengths: Callable[[int], np.ndarray] | None = None,
    ):
        """Create a sampler.

        Args:
            rows: manifest rows to sample from.
            n_samples: length of each row after cropping, or an upper bound of it.
            max_rows: maximum number of rows per micro-batch; 0: no limit.
            epoch_lengths: maps an epoch to the lengths in it, if they change between epochs.
        """
        self.rows, self.n_samples = np.asarray(rows), np.asarray(n_samples)
        self.capacity = int(micro_seconds * SAMPLE_RATE)
        self.micro_batches_per_step, self.seed, self.max_rows = micro_batches_per_step, seed, max_rows
        self.epoch_lengths = epoch_lengths
        if not len(self.rows):
            raise DataError("no utterances to train on; check the split, the length limits and the labels")
        if self.n_samples.max() > self.capacity:
            longest = self.n_samples.max() / SAMPLE_RATE
            raise ConfigError(
                f"micro_seconds={micro_seconds} is shorter than the longest utterance ({longest:.2f} s)"
            )
        self._epochs: dict[int, Epoch] = {}

    def epoch(self, epoch: int) -> Epoch:
        """Return the micro-batches of an epoch."""
        if epoch not in self._epochs:  # keep the previous epoch, because data workers are ahead of training
            self._epochs = {number: built for number, built in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = self._build(epoch)
        return self._epochs[epoch]

    def _build(self, epoch: int) -> Epoch:
        rng = seeded_rng(self.seed, epoch, 0)
        n_samples = self.n_samples if self.epoch_lengths is None else self.epoch_lengths(epoch)
        # Noise on the lengths varies which utterances share a micro-batch, with almost no extra padding.
        by_length = np.argsort(n_samples * rng.uniform(0.97, 1.03, len(self.rows)), kind="stable")
        length = n_samples[by_length]
        starts = self._boundaries(length)
        padded = np.sum(np.maximum.reduceat(length, starts[:-1]) * np.diff(starts))
        padding = 1 - float(length.sum() / padded)
        return Epoch(epoch, self.rows[by_length], starts, rng.permutation(len(starts) - 1), padding)

    def _boundaries(self, length: np.ndarray) -> np.ndarray:
        """Split rows with these lengths into micro-batches; return all start positions and the final end."""
        starts, counts = [0], np.arange(1, self._row_limit(int(length[0])) + 1)
        while starts[-1] < len(length):
            first = starts[-1]
            candidates = length[first : first + self._row_limit(int(length[first]))]
            if len(candidates) > len(counts):
                counts = np.arange(1, len(candidates) + 1)
            padded = np.maximum.accumulate(candidates) * counts[: len(candidates)]  # monotonic
            starts.append(first + int(np.searchsorted(padded, self.capacity, side="right")))
        return np.array(starts)

    def _row_limit(self, first_length: int) -> int:
        """Maximum number of rows in a micro-batch whose first row has this length."""
        limit = self.capacity // max(1, first_length)
        return min(limit, self.max_rows) if self.max_rows else limit

    def stream(self, epoch: int, cursor: int) -> Iterator[MicroBatch]:
        """Iterate over micro-batches endlessly, starting from a saved state."""
        while True:
            batches = self.epoch(epoch)
            yield from (batches[index] for index in range(cursor, len(batches)))
            epoch, cursor = epoch + 1, 0

    def padding(self, epoch: int = 0) -> float:
        """Fraction of an epoch's samples that are padding."""
        return self.epoch(epoch).padding
