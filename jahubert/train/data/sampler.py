"""Which utterances go together, in which order: a function of (seed, epoch) and nothing else.

A micro-batch is what one device computes at once; a step takes a fixed number of micro-batches, split
over the ranks, so the batch of a step does not depend on how many ranks or workers there are. The state
of the data is two integers: the epoch, and how many of its micro-batches were taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jahubert.errors import ConfigError, DataError
from jahubert.frames import SAMPLE_RATE
from jahubert.train.data.masking import seeded_rng


@dataclass(frozen=True)
class MicroBatch:
    """The rows of a manifest that are computed at once, and where they stand in the run."""

    epoch: int
    index: int  # in the epoch
    rows: tuple[int, ...]


class Epoch:
    """The micro-batches of one epoch, in order: two arrays, because 22 million rows must not be objects."""

    def __init__(self, number: int, rows: np.ndarray, starts: np.ndarray, order: np.ndarray, padding: float):
        """Micro-batch `i` is `rows[starts[order[i]] : starts[order[i] + 1]]`."""
        self.number, self.rows, self.starts, self.order = number, rows, starts, order
        self.padding = padding  # share of the samples

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> MicroBatch:
        if not 0 <= index < len(self):
            raise IndexError(index)  # which also ends a loop
        group = self.order[index]
        rows = self.rows[self.starts[group] : self.starts[group + 1]]
        return MicroBatch(self.number, index, tuple(rows.tolist()))

    def for_rank(self, rank: int, world: int) -> Iterator[MicroBatch]:
        """Those of one process, when they are dealt out in turn."""
        return (self[index] for index in range(rank, len(self), world))


class Sampler:
    """Micro-batches of similar lengths, at most `micro_seconds` long with their padding."""

    def __init__(
        self,
        rows: np.ndarray,
        n_samples: np.ndarray,
        *,
        micro_seconds: float,
        micro_batches_per_step: int,
        seed: int,
        max_rows: int = 0,
    ):
        """`n_samples`: length of each of `rows` after cropping."""
        self.rows, self.n_samples = np.asarray(rows), np.asarray(n_samples)
        self.capacity = int(micro_seconds * SAMPLE_RATE)
        self.micro_batches_per_step, self.seed, self.max_rows = micro_batches_per_step, seed, max_rows
        if not len(self.rows):
            raise DataError(
                "no utterance is left to train on; look at the split, the lengths and the labels asked for"
            )
        if self.n_samples.max() > self.capacity:
            longest = self.n_samples.max() / SAMPLE_RATE
            raise ConfigError(
                f"micro_seconds={micro_seconds} cannot hold the longest utterance ({longest:.2f} s)"
            )
        self.kept: dict[int, Epoch] = {}

    def epoch(self, epoch: int) -> Epoch:
        """All micro-batches of an epoch, in order."""
        if epoch not in self.kept:  # reading runs ahead of learning, so the one before is still asked for
            self.kept = {number: made for number, made in self.kept.items() if number == epoch - 1}
            self.kept[epoch] = self._made(epoch)
        return self.kept[epoch]

    def _made(self, epoch: int) -> Epoch:
        rng = seeded_rng(self.seed, epoch, 0)
        # A little noise on the lengths varies who meets whom, and costs next to no padding.
        by_length = np.argsort(self.n_samples * rng.uniform(0.97, 1.03, len(self.rows)), kind="stable")
        length = self.n_samples[by_length]
        starts = self._cut(length)
        filled = np.sum(np.maximum.reduceat(length, starts[:-1]) * np.diff(starts))
        padding = 1 - float(length.sum() / filled)
        return Epoch(epoch, self.rows[by_length], starts, rng.permutation(len(starts) - 1), padding)

    def _cut(self, length: np.ndarray) -> np.ndarray:
        """Where each micro-batch begins, and the end, when lengths are taken in this order."""
        starts, places = [0], np.arange(1, self._most(int(length[0])) + 1)
        while starts[-1] < len(length):
            first = starts[-1]
            ahead = length[first : first + self._most(int(length[first]))]
            if len(ahead) > len(places):
                places = np.arange(1, len(ahead) + 1)
            filled = np.maximum.accumulate(ahead) * places[: len(ahead)]  # with padding; it only grows
            starts.append(first + int(np.searchsorted(filled, self.capacity, side="right")))
        return np.array(starts)

    def _most(self, shortest: int) -> int:
        """Rows of a micro-batch that begins with this length, at most."""
        most = self.capacity // max(1, shortest)
        return min(most, self.max_rows) if self.max_rows else most

    def stream(self, epoch: int, cursor: int) -> Iterator[MicroBatch]:
        """Micro-batches without end, from a saved state on."""
        while True:
            batches = self.epoch(epoch)
            yield from (batches[index] for index in range(cursor, len(batches)))
            epoch, cursor = epoch + 1, 0

    def padding(self, epoch: int = 0) -> float:
        """Share of an epoch's samples that is padding."""
        return self.epoch(epoch).padding
