"""Length-bucketed sampler for updates and their micro-batches.

An epoch is a sequence of groups of utterances with similar lengths. It is determined by (seed, epoch). An
update consists of a fixed number of consecutive groups. Its content therefore depends neither on the memory
of a GPU nor on the number of processes.
A device processes one micro-batch in one forward pass. A group is a single micro-batch, unless it is longer
than `micro_seconds` or the processes could not share the update evenly: then it is cut into several. If
`micro_seconds` is at least twice as long as a group, groups of similar lengths are merged instead.
The state of the sampler consists of two integers: the epoch, and the number of groups consumed in that epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, islice, pairwise

import numpy as np

from jahubert.errors import ConfigError, DataError
from jahubert.frames import HUBERT, SAMPLE_RATE
from jahubert.model.kernels import PackedShape
from jahubert.train.data.masking import seeded_rng

_GROUPS = 8  # number of groups per update, unless the groups would be too long or too short
_MIN_GROUP_SECONDS, _MAX_GROUP_SECONDS = 87.5, 500.0  # the HuBERT paper uses 87.5 s per GPU


def groups_per_update(batch_seconds: float) -> int:
    """Return the default number of groups per update, e.g. 8 groups of 350 s for 2,800 s (HuBERT base)."""
    groups = _GROUPS
    while batch_seconds / groups > _MAX_GROUP_SECONDS:
        groups *= 2
    while groups > 1 and batch_seconds / groups < _MIN_GROUP_SECONDS:
        groups //= 2
    return groups


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the sampler's groups, updates and micro-batches."""

    group_seconds: float  # maximum audio per group, including padding
    groups: int = 1  # number of groups per update
    # Maximum audio per micro-batch, including the padding within each group; None: whole groups
    micro_seconds: float | None = None
    one_shape: bool = False  # whether all micro-batches have the same shape (see `Sampler.shape`)

    def groups_per_micro_batch(self, processes: int = 1) -> int:
        """Return the number of groups in a micro-batch, or 1 if groups have to be cut.

        It is the largest number allowed by `micro_seconds` with which all processes get equally many groups.
        """
        limit = (self.micro_seconds or 0.0) / self.group_seconds + 1e-6  # tolerates rounding
        numbers = range(2, int(limit) + 1)
        return max((n for n in numbers if self.groups % (n * processes) == 0), default=1)


@dataclass(frozen=True)
class MicroBatch:
    """Manifest rows that are processed together: a group from the sampler, a part of one, or several."""

    epoch: int
    index: int  # position of the (first) group in the epoch
    rows: tuple[int, ...]
    part: int = 0  # index of the part within the group
    # All rows of each group that `rows` belong to; None: `rows` are one group
    groups: tuple[tuple[int, ...], ...] | None = None
    is_filler: bool = False  # a copy for a process that would otherwise have nothing to compute; not counted

    @property
    def key(self) -> tuple[int, ...]:
        """Key for random generators, which identifies the micro-batch within a run."""
        return (self.epoch, self.index, self.part) if self.part else (self.epoch, self.index)


class Epoch:
    """The ordered groups of one epoch, stored as arrays because there can be millions of rows."""

    def __init__(
        self,
        number: int,
        rows: np.ndarray,
        n_samples: np.ndarray,
        by_length: np.ndarray,
        starts: np.ndarray,
        order: np.ndarray,
    ):
        """Create an epoch whose group `i` is `rows[by_length[starts[order[i]] : starts[order[i] + 1]]]`."""
        self.number, self.rows, self.n_samples = number, rows, n_samples
        self.by_length, self.starts, self.order = by_length, starts, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> MicroBatch:
        return MicroBatch(self.number, index, tuple(self.rows[self._members(index)].tolist()))

    def lengths(self, index: int) -> np.ndarray:
        """Return the number of samples of each utterance in a group."""
        lengths: np.ndarray = self.n_samples[self._members(index)]
        return lengths

    def _members(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)  # iteration over the groups ends with this error
        group = self.order[index]
        return self.by_length[self.starts[group] : self.starts[group + 1]]


class Sampler:
    """Sampler of groups of utterances with similar lengths.

    A group has at most `group_seconds` of audio including padding.
    """

    def __init__(
        self,
        rows: np.ndarray,
        n_samples: np.ndarray,
        sizes: BatchSizes,
        *,
        seed: int,
        shortest: np.ndarray | None = None,
        epoch_lengths: Callable[[int], np.ndarray] | None = None,
    ):
        """Create a sampler.

        Args:
            rows: manifest rows from which groups are sampled.
            n_samples: length of each row after cropping, or an upper bound on the length.
            shortest: lower bound on the length of each row; None means `n_samples`.
            epoch_lengths: function that maps an epoch to the lengths in this epoch, if they change.
        """
        self.rows, self.n_samples = np.asarray(rows), np.asarray(n_samples)
        self.sizes, self.seed = sizes, seed
        self.shortest = self.n_samples if shortest is None else shortest
        self.epoch_lengths = epoch_lengths
        micro_seconds = min(sizes.group_seconds, sizes.micro_seconds or sizes.group_seconds)
        self.group_capacity, self.capacity = (
            round(seconds * SAMPLE_RATE) for seconds in (sizes.group_seconds, micro_seconds)
        )
        if not len(self.rows):
            raise DataError("no utterances to train on: the split is empty or has no labels")
        longest = self.n_samples.max() / SAMPLE_RATE
        if self.n_samples.max() > self.group_capacity:
            raise ConfigError(
                f"batch_seconds: a group ({sizes.groups} per update) can hold {sizes.group_seconds:g} s, but "
                f"the longest utterance lasts {longest:.2f} s; increase batch_seconds"
            )
        if self.n_samples.max() > self.capacity:
            raise ConfigError(
                f"micro_seconds={micro_seconds:g} is shorter than the longest utterance ({longest:.2f} s); "
                "increase micro_seconds"
            )
        self._epochs: dict[int, Epoch] = {}

    @cached_property
    def shape(self) -> PackedShape | None:
        """Shape to which all micro-batches are padded; None: each has its own shape."""
        if not self.sizes.one_shape:
            return None
        shortest, longest = int(self.shortest.min()), int(self.n_samples.max())
        merged = self.sizes.groups_per_micro_batch()
        return PackedShape.largest(HUBERT, shortest, longest, self.capacity, merged)

    def epoch(self, epoch: int) -> Epoch:
        """Return the groups of an epoch."""
        if epoch not in self._epochs:  # data workers are ahead of training, so the previous epoch is kept
            self._epochs = {number: built for number, built in self._epochs.items() if number == epoch - 1}
            self._epochs[epoch] = self._build(epoch)
        return self._epochs[epoch]

    def update(self, epoch: int, cursor: int, processes: int = 1) -> list[MicroBatch]:
        """Return the micro-batches of the update that starts at group `cursor` of an epoch.

        Groups are cut into more parts until the number of micro-batches is a multiple of `processes`. If
        there are too few utterances for that, the last processes get fillers.
        """
        groups = [self._group(micro) for micro in islice(self.stream(epoch, cursor), self.sizes.groups)]
        merged = self.sizes.groups_per_micro_batch(processes)
        if merged > 1 and groups[0].micro.epoch == groups[-1].micro.epoch:
            return _merge(groups, merged)
        while sum(len(group.parts) for group in groups) % processes:
            divisible = [group for group in groups if len(group.parts) < len(group.lengths)]
            if not divisible:
                break
            max(divisible, key=_Group.longest_part).split()
        parts = [part for group in groups for part in group.micro_batches()]
        return parts + [replace(parts[0], is_filler=True)] * (-len(parts) % processes)

    def single_pass(self, rank: int = 0, processes: int = 1) -> Iterator[MicroBatch]:
        """Iterate over one process's share of the micro-batches in epoch 0, for an evaluation."""
        epoch = self.epoch(0)
        groups = [self._group(epoch[index]) for index in range(len(epoch))]
        merged = self.sizes.groups_per_micro_batch(processes)
        parts = _merge(groups, merged) if merged > 1 else [part for g in groups for part in g.micro_batches()]
        return islice(parts, rank, None, processes)

    def _group(self, micro: MicroBatch) -> _Group:
        return _Group(micro, self.epoch(micro.epoch).lengths(micro.index), self.capacity)

    def _build(self, epoch: int) -> Epoch:
        rng = seeded_rng(self.seed, epoch, 0)
        n_samples = self.n_samples if self.epoch_lengths is None else self.epoch_lengths(epoch)
        # Because of random noise in the lengths, groups differ between epochs, with almost no extra padding.
        by_length = np.argsort(n_samples * rng.uniform(0.97, 1.03, len(self.rows)), kind="stable")
        starts = self._boundaries(n_samples[by_length])
        order = rng.permutation(len(starts) - 1)
        return Epoch(epoch, self.rows, n_samples, by_length, starts, order)

    def _boundaries(self, length: np.ndarray) -> np.ndarray:
        """Split rows with the given lengths into groups. Return the start of each group and the final end."""
        starts, counts = [0], np.arange(1, self._row_limit(int(length[0])) + 1)
        while starts[-1] < len(length):
            first = starts[-1]
            candidates = length[first : first + self._row_limit(int(length[first]))]
            if len(candidates) > len(counts):
                counts = np.arange(1, len(candidates) + 1)
            padded = np.maximum.accumulate(candidates) * counts[: len(candidates)]  # monotonic
            starts.append(first + int(np.searchsorted(padded, self.group_capacity, side="right")))
        if len(starts) > 2:
            starts[-2] = self._balanced(length, *starts[-3:])
        return np.array(starts)

    def _balanced(self, length: np.ndarray, first: int, second: int, end: int) -> int:
        """Return a start of the last group that gives it up to half of the rows of the last two groups.

        Otherwise, the last group could be a single utterance, which several processes cannot share evenly.
        """
        while second - first > end - second + 1:
            rows, longest = end - second + 1, int(length[second - 1 : end].max())
            if rows * longest > self.group_capacity:
                break
            second -= 1
        return second

    def _row_limit(self, first_length: int) -> int:
        """Return the maximum number of rows in a group whose first row has the given length."""
        return self.group_capacity // max(1, first_length)

    def stream(self, epoch: int, cursor: int) -> Iterator[MicroBatch]:
        """Iterate over groups endlessly, starting at group `cursor` of an epoch."""
        while True:
            groups = self.epoch(epoch)
            yield from (groups[index] for index in range(cursor, len(groups)))
            epoch, cursor = epoch + 1, 0


class _Group:
    """A group, cut into parts with similar numbers of utterances and at most `capacity` samples each."""

    def __init__(self, micro: MicroBatch, lengths: np.ndarray, capacity: int):
        self.micro, self.lengths, self.capacity = micro, lengths, capacity
        self._cut(-(-len(lengths) * int(lengths.max()) // capacity))

    def longest_part(self) -> int:
        """Return the length of the longest part in samples, including padding."""
        return max(map(self._padded, self.parts))

    def split(self) -> None:
        """Cut the group into more parts."""
        self._cut(len(self.parts) + 1)

    def _cut(self, n_parts: int) -> None:
        """Cut the group into `n_parts` parts, or more if a part would exceed the capacity."""
        n_rows = len(self.lengths)
        for n in range(min(n_parts, n_rows), n_rows + 1):
            bounds = [n_rows * i // n for i in range(n + 1)]
            self.parts = [slice(*bound) for bound in pairwise(bounds)]
            if self.longest_part() <= self.capacity:
                break

    def _padded(self, part: slice) -> int:
        lengths = self.lengths[part]
        return len(lengths) * int(lengths.max())

    def micro_batches(self) -> list[MicroBatch]:
        if len(self.parts) == 1:
            return [self.micro]
        epoch, index, rows = self.micro.epoch, self.micro.index, self.micro.rows
        return [MicroBatch(epoch, index, rows[part], n, (rows,)) for n, part in enumerate(self.parts)]


def _merge(groups: list[_Group], n: int) -> list[MicroBatch]:
    """Merge every `n` groups, in the order of their lengths, into one micro-batch."""
    micros = [group.micro for group in sorted(groups, key=lambda group: int(group.lengths.max()))]
    batches = [[micro.rows for micro in micros[start : start + n]] for start in range(0, len(micros), n)]
    return [
        replace(first, rows=tuple(chain.from_iterable(rows)), groups=tuple(rows))
        for first, rows in zip(micros[::n], batches, strict=True)
    ]
