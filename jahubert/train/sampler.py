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
from jahubert.train.masking import generator


@dataclass(frozen=True)
class MicroBatch:
    """The rows of a manifest that are computed at once, and where they stand in the run."""

    epoch: int
    index: int  # in the epoch
    rows: tuple[int, ...]


class Sampler:
    """Micro-batches of similar lengths, at most `micro_seconds` long with their padding."""

    def __init__(
        self,
        rows: np.ndarray,
        n_samples: np.ndarray,
        *,
        micro_seconds: float,
        per_step: int,
        seed: int,
        max_rows: int = 0,
    ):
        """`n_samples`: length of each of `rows` after cropping; `per_step`: micro-batches of one step."""
        self.rows, self.n_samples = np.asarray(rows), np.asarray(n_samples)
        self.capacity = int(micro_seconds * SAMPLE_RATE)
        self.per_step, self.seed, self.max_rows = per_step, seed, max_rows
        if not len(self.rows):
            raise DataError(
                "no utterance is left to train on; look at the split, the lengths and the labels asked for"
            )
        if self.n_samples.max() > self.capacity:
            longest = self.n_samples.max() / SAMPLE_RATE
            raise ConfigError(
                f"micro_seconds={micro_seconds} cannot hold the longest utterance ({longest:.2f} s)"
            )

    def epoch(self, epoch: int) -> list[MicroBatch]:
        """All micro-batches of an epoch, in order."""
        rng = generator(self.seed, epoch, 0)
        # A little noise on the lengths varies who meets whom, and costs next to no padding.
        order = np.argsort(self.n_samples * rng.uniform(0.97, 1.03, len(self.rows)), kind="stable")
        groups: list[list[int]] = [[]]
        longest = 0
        for position in order:
            longest = max(longest, int(self.n_samples[position]))
            full = longest * (len(groups[-1]) + 1) > self.capacity
            if groups[-1] and (full or len(groups[-1]) == self.max_rows):
                groups.append([])
                longest = int(self.n_samples[position])
            groups[-1].append(int(self.rows[position]))
        shuffled = rng.permutation(len(groups))
        return [MicroBatch(epoch, index, tuple(groups[g])) for index, g in enumerate(shuffled)]

    def stream(self, epoch: int, cursor: int) -> Iterator[MicroBatch]:
        """Micro-batches without end, from a saved state on."""
        while True:
            yield from self.epoch(epoch)[cursor:]
            epoch, cursor = epoch + 1, 0

    def padding(self, epoch: int = 0) -> float:
        """Share of an epoch's samples that is padding."""
        length = dict(zip(self.rows.tolist(), self.n_samples.tolist(), strict=True))
        batches = [[length[row] for row in batch.rows] for batch in self.epoch(epoch)]
        return 1 - sum(map(sum, batches)) / sum(max(b) * len(b) for b in batches)
