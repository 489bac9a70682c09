"""Passes over frames: who is nearest to whom, Lloyd's iteration, and mini-batches where there are too many.

Frames may be a file larger than memory: they are read a stretch at a time, and need not fit onto the device.
What of a process's share does fit onto a GPU stays there from the first pass to the last.
Several processes share each pass, and the result is the same bit for bit: stretches are dealt out to 16
lanes, lanes to processes, and the sums of the lanes are added in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.train.experiment import distributed
from jahubert.train.experiment.progress import progress

Frames = Any  # (N, D): a tensor, an array, or what gives arrays for slices and index arrays

_LANES = 16  # sums that are kept apart, whatever the number of processes
_READ = 1 << 22  # bytes of frames that are read at once, if their distances are fewer
_BATCH = 4096  # frames of a lane between two steps of `refine`


class FrameFile:
    """The frames of a .npy file. What was read does not stay mapped, so a pass over all needs no memory."""

    ndim = 2

    def __init__(self, path: Path):
        self.path = path
        self.shape, self.dtype = self._map().shape, self._map().dtype

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> np.ndarray:
        return np.array(self._map()[index])

    def _map(self) -> np.ndarray:
        try:
            return np.load(self.path, mmap_mode="r")
        except ValueError as error:
            raise DataError(
                f"{self.path}: not a .npy file ({error}); delete its folder, run it again"
            ) from error


class Subset:
    """Some rows of frames, gathered when they are asked for; ascending rows are read forwards."""

    ndim = 2

    def __init__(self, frames_ND: Frames, rows: np.ndarray):
        self.frames_ND, self.rows = frames_ND, rows
        self.shape = (len(rows), frames_ND.shape[1])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self.rows[index]
        if isinstance(self.frames_ND, Tensor):
            return self.frames_ND[torch.from_numpy(rows).to(self.frames_ND.device)]
        return self.frames_ND[rows]


def load_frames(frames_ND: Frames, device: torch.device) -> Tensor:
    """All of these frames, float32."""
    if not isinstance(frames_ND, Tensor):
        frames_ND = torch.from_numpy(np.asarray(frames_ND[:], dtype=np.float32))
    return frames_ND.to(device, torch.float32)


class CachedFrames:
    """Frames that stay on a device once they were read, as far as `room` bytes go."""

    ndim = 2

    def __init__(self, frames_ND: Frames, device: torch.device, room: int):
        self.frames_ND, self.device, self.room = frames_ND, device, room
        self.shape = frames_ND.shape
        self.kept: dict[tuple[int, int], Tensor] = {}

    def __len__(self) -> int:
        return len(self.frames_ND)

    def __getitem__(self, stretch: slice) -> Any:
        place = (stretch.start, stretch.stop)
        if place not in self.kept:
            read_ND = self.frames_ND[stretch]
            size = 4 * len(read_ND) * self.shape[1]
            if size > self.room:
                return read_ND
            self.room -= size
            self.kept[place] = load_frames(read_ND, self.device)
        return self.kept[place]


def _room(device: torch.device) -> int:
    """Bytes for `CachedFrames`: half of what a GPU has free; for a CPU the system keeps the file."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0


def _block_rows(shape_KD: torch.Size, device: torch.device) -> int:
    """Rows whose distances stay in the L2 cache, or fill a GPU."""
    budget = 1 << 18 if device.type == "cpu" else 1 << 27
    return max(1024, budget // sum(shape_KD))


def _blocks(
    frames_ND: Frames, centroids_KD: Tensor, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """(lane, float32 block on the centroids' device) of all frames, or of the lanes of one process."""
    if frames_ND.shape[1] != centroids_KD.shape[1]:
        raise DataError(
            f"frames have {frames_ND.shape[1]} dimensions, but the centroids {centroids_KD.shape[1]}: "
            "they were made from another feature"
        )
    rows = _block_rows(centroids_KD.shape, centroids_KD.device)
    stretch = rows * max(1, _READ // (4 * rows * centroids_KD.shape[1]))
    for number, start in enumerate(range(0, len(frames_ND), stretch)):
        lane = number % _LANES
        if lane % world == rank:
            distributed.tick()  # a pass over all frames is long
            yield from _split(frames_ND[start : start + stretch], centroids_KD, lane)


def _split(frames_ND: Any, centroids_KD: Tensor, lane: int) -> Iterator[tuple[int, Tensor]]:
    rows = _block_rows(centroids_KD.shape, centroids_KD.device)
    for start in range(0, len(frames_ND), rows):
        block_ND = frames_ND[start : start + rows]
        if not isinstance(block_ND, Tensor):
            block_ND = torch.from_numpy(np.require(block_ND, np.float32, ["C", "W"]))
        yield lane, block_ND.to(centroids_KD.device, torch.float32)


class Nearest:
    """Nearest centroids: |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c).

    Around the centroids' mean: with features that lie far from zero the products would swallow the
    differences.
    """

    def __init__(self, centroids_KD: Tensor):
        self.centroids_KD = centroids_KD
        self.middle_D = centroids_KD.mean(dim=0)
        self.centred_KD = centroids_KD - self.middle_D
        self.half_K = self.centred_KD.square().sum(dim=1) / 2
        self.centred_DK = self.centred_KD.T.contiguous()
        # Fresh pages for every block would cost time.
        self.frames_ND, self.score_NK = centroids_KD[:0], centroids_KD.new_empty(0, len(centroids_KD))
        # numpy's argmin is twice as fast as torch's min, but knows only one thread.
        self.by_numpy = centroids_KD.device.type == "cpu" and torch.get_num_threads() <= 2

    def labels(self, frames_ND: Frames) -> Tensor:
        """The nearest centroid of each frame, int64 (N,), on the centroids' device."""
        found = [self._label(x_ND) for _, x_ND in _blocks(frames_ND, self.centroids_KD)]
        return torch.cat(found) if found else self.half_K.new_zeros(0, dtype=torch.int64)

    def distances(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of a block: labels (N,); squared distances (N,); the frames around the middle (N, D), until the
        next block."""
        label_N = self._label(x_ND)
        least_N = self.score_NK[: len(x_ND)].gather(1, label_N[:, None])[:, 0]
        x_ND = self.frames_ND[: len(x_ND)]
        return label_N, torch.linalg.vecdot(x_ND, x_ND).add_(least_N, alpha=2).clamp_(min=0), x_ND

    def _label(self, x_ND: Tensor) -> Tensor:
        if len(x_ND) > len(self.score_NK):
            self.frames_ND = torch.empty_like(x_ND)
            self.score_NK = x_ND.new_empty(len(x_ND), len(self.half_K))
        score_NK, frames_ND = self.score_NK[: len(x_ND)], self.frames_ND[: len(x_ND)]
        torch.sub(x_ND, self.middle_D, out=frames_ND)
        torch.addmm(self.half_K, frames_ND, self.centred_DK, alpha=-1, out=score_NK)
        if self.by_numpy:
            return torch.from_numpy(score_NK.numpy().argmin(axis=1))
        return score_NK.argmin(dim=1)


@dataclass
class Fitted:
    """Centroids, and what one pass over the frames says about them."""

    centroids_KD: Tensor
    means_KD: Tensor  # of the frames of each cluster; the centroid itself where there are none
    counts_K: Tensor  # int64
    inertia: float  # mean squared distance of a frame to its centroid


def _sums(
    blocks: Iterable[tuple[int, Tensor]], nearest: Nearest, together: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the blocks, in float64: the sum of each cluster's frames around the middle (K, D), how many they
    are (K,), and the sum of all squared distances. float32 within a block, float64 from block to block.
    """
    n_clusters, device = len(nearest.half_K), nearest.half_K.device
    shape = (_LANES, n_clusters, len(nearest.middle_D) + 2)  # sums, and beside them counts and distances
    sums_LKD = torch.zeros(shape, dtype=torch.float64, device=device)
    for lane, block_ND in blocks:
        label_N, distance_N, x_ND = nearest.distances(block_ND)
        lane_KD = sums_LKD[lane]
        lane_KD[0, -1] += distance_N.sum(dtype=torch.float64)
        lane_KD[:, -2] += torch.bincount(label_N, minlength=n_clusters)
        if device.type == "cpu":
            lane_KD[:, :-2] += torch.zeros_like(nearest.centred_KD).index_add_(0, label_N, x_ND)
        else:  # index_add_ adds in a random order there; a product does not, and is faster
            member_NK = torch.nn.functional.one_hot(label_N, n_clusters).to(x_ND.dtype)
            lane_KD[:, :-2] += member_NK.T @ x_ND
    if together:
        distributed.all_reduce_(sums_LKD)  # exact: in each lane all processes but one have zeros
    total_KD = sums_LKD[0]
    for lane_KD in sums_LKD[1:]:
        total_KD = total_KD + lane_KD
    if not math.isfinite(float(total_KD[0, -1])):
        raise DataError("the frames hold NaN or infinite values: look for the utterances they came from")
    return total_KD[:, :-2], total_KD[:, -2], total_KD[0, -1]


def assign_pass(frames_ND: Frames, centroids_KD: Tensor, together: bool = False) -> Fitted:
    """What all frames say of centroids.

    `together`: each process takes its lanes; otherwise this process takes all.
    """
    nearest = Nearest(centroids_KD)
    share = (distributed.rank(), distributed.world()) if together else (0, 1)
    sums_KD, counts_K, distance = _sums(_blocks(frames_ND, centroids_KD, *share), nearest, together)
    means_KD = (sums_KD / counts_K.clamp(min=1)[:, None] + nearest.middle_D).to(centroids_KD.dtype)
    means_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
    return Fitted(centroids_KD, means_KD, counts_K.long(), float(distance) / len(frames_ND))


def _farthest(frames_ND: Frames, centroids_KD: Tensor, n: int) -> Tensor:
    """Up to n frames (n, D) far from all centroids and from each other: outliers have neighbours."""
    pool_N = torch.zeros(0, device=centroids_KD.device)
    pool_ND = centroids_KD[:0]
    nearest = Nearest(centroids_KD)
    for _, block_ND in _blocks(frames_ND, centroids_KD):
        distance_N = torch.cat([pool_N, nearest.distances(block_ND)[1]])
        pool_N, index = distance_N.topk(min(n * 32, len(distance_N)))
        pool_ND = torch.cat([pool_ND, block_ND])[index]
    chosen: list[Tensor] = []
    while len(chosen) < n and float(pool_N.max()) > 0:
        chosen.append(pool_ND[int(pool_N.argmax())])
        pool_N = torch.minimum(pool_N, (pool_ND - chosen[-1]).square().sum(dim=1))
    return torch.stack(chosen) if chosen else centroids_KD[:0]


def lloyd(
    frames_ND: Frames, centroids_KD: Tensor, max_iter: int, tol: float, together: bool = False
) -> tuple[Fitted, list[float], int]:
    """What the last of at most `max_iter` passes found, the inertia of each, and how many were re-seeded.

    It stops when a pass lowers the inertia by no more than the share `tol`.
    """
    if not isinstance(frames_ND, Tensor):
        frames_ND = CachedFrames(frames_ND, centroids_KD.device, _room(centroids_KD.device))
    history: list[float] = []
    reseeded = 0
    fresh = False  # a re-seeded cluster deserves another pass
    with progress(f"k-means over {len(frames_ND):,} frames", "passes", max_iter) as done:
        while True:
            fitted = assign_pass(frames_ND, centroids_KD, together)
            history.append(fitted.inertia)
            done(1)
            converged = len(history) > 1 and history[-2] - history[-1] <= tol * history[-2] and not fresh
            if converged or len(history) == max_iter:
                return fitted, history, reseeded
            centroids_KD = fitted.means_KD
            dead = torch.nonzero(fitted.counts_K == 0)[:, 0]
            if fresh := len(dead) > 0:
                seeds = _farthest(frames_ND, fitted.centroids_KD, len(dead))
                centroids_KD[dead[: len(seeds)]] = seeds
                reseeded += len(seeds)
                fresh = len(seeds) > 0


def refine(frames_ND: Frames, start: Fitted, together: bool = False) -> Tensor:
    """Centroids (K, D) after one pass of mini-batches, which looks at each frame once.

    After every batch a centroid is the mean of all frames that were nearest to it until then, those of
    `start` counted in (MacQueen 1967; the rate of Sculley 2010). A batch has frames from 16 places all over,
    because neighbours are of one voice.
    """
    centroids_KD, counts_K = start.means_KD.double(), start.counts_K.double()
    rank, world = (distributed.rank(), distributed.world()) if together else (0, 1)
    bounds = [len(frames_ND) * lane // _LANES for lane in range(_LANES + 1)]
    steps = range(0, -(-len(frames_ND) // _LANES), _BATCH)
    with progress(f"k-means over {len(frames_ND):,} frames", "mini-batches", len(steps)) as done:
        for step in steps:
            nearest = Nearest(centroids_KD.float())
            parts = (
                (lane, frames_ND[bounds[lane] + step : min(bounds[lane] + step + _BATCH, bounds[lane + 1])])
                for lane in range(rank, _LANES, world)
            )
            blocks = (block for lane, part in parts for block in _split(part, nearest.centroids_KD, lane))
            sums_KD, new_K, _ = _sums(blocks, nearest, together)
            counts_K = counts_K + new_K
            moved_KD = sums_KD - new_K[:, None] * (centroids_KD - nearest.middle_D)
            centroids_KD = centroids_KD + moved_KD / counts_K.clamp(min=1)[:, None]
            done(1)
    return centroids_KD.float()
