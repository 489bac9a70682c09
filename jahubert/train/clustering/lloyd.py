"""Lloyd's algorithm and mini-batch k-means over frames that may not fit in memory.

Fitting proceeds from coarse to fine. K-means++ and Lloyd's algorithm run on a small sample with `n_init`
initializations, and the best result is kept. Lloyd's algorithm then runs on samples that grow by a factor of
eight, and finally on all frames. If there are more than `lloyd_frames` frames, the last run uses a sample of
this size instead, and a single mini-batch pass over all frames follows. Most of the improvement happens on
small samples, where a pass is cheap.

Frames are read in chunks. On a GPU, chunks are cached in up to half of the free memory. After the small
sample, the processes share each pass. The results are bit-identical for any number of processes: chunks are
assigned to 16 lanes, lanes are assigned to processes, and the sums of the lanes are added in a fixed order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import ConfigError, DataError
from jahubert.model.centroids import NearestCentroid
from jahubert.train.clustering.frames import CachedFrames, Frames, Subset, draw_rows, load_frames
from jahubert.train.experiment import distributed
from jahubert.train.experiment.progress import progress

Backend = Literal["torch", "faiss", "sklearn"]

_LANES = 16  # number of separate partial sums, regardless of the number of processes
_CHUNK_BYTES = 1 << 22  # maximum size of a chunk, unless a single block is larger
_BATCH = 4096  # number of frames per lane in a mini-batch

_COARSE_FRAMES = 64  # number of frames per cluster in the first sample
_COARSE_MIN = 20_000  # minimum number of frames in the first sample
_COARSE_PASSES = 50  # maximum number of passes in each run except the final one
_GROWTH = 8  # growth factor of the samples
_IN_MEMORY = 1 << 30  # bytes; larger samples are not loaded into memory, but read in each pass
_LAST_TOL = 10  # factor for `tol` in the final run if runs on smaller samples precede it


@dataclass(frozen=True)
class KmeansOptions:
    """Options of a k-means fit, for all backends.

    Args:
        n_clusters: number of clusters K.
        backend: implementation of k-means. "torch" is implemented in this file. "faiss" ignores `tol` and
            `lloyd_frames`. "sklearn" is for reference: it runs MiniBatchKMeans with fairseq's arguments, and
            ignores `n_init`, `max_iter`, `tol` and `lloyd_frames`.
        n_init: number of initializations, of which the best one is used.
        max_iter: maximum number of passes over all frames, or over the sample of `lloyd_frames` frames.
        tol: Lloyd's algorithm stops on a sample when a pass decreases the inertia by at most this fraction.
            If smaller samples precede the final run, this run stops at ten times the fraction (torch only).
        lloyd_frames: maximum number of frames for Lloyd's algorithm. If there are more, a uniform sample of
            this size is clustered, and one mini-batch pass over all frames refines the result (torch only).
        seed: seed of all random choices.
        device: the device on which distances are computed.

    Raises:
        ConfigError: a value is out of range.
    """

    n_clusters: int
    backend: Backend = "torch"
    n_init: int = 1
    max_iter: int = 50
    tol: float = 1e-4
    lloyd_frames: int = 10_000_000
    seed: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        for name, minimum in (
            ("n_clusters", 1),
            ("n_init", 1),
            ("max_iter", 1),
            ("lloyd_frames", self.n_clusters),
        ):
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}, but must be at least {minimum}")


@dataclass(frozen=True)
class PassStatistics:
    """Statistics of one pass that assigns all frames to centroids."""

    centroids_KD: Tensor
    means_KD: Tensor  # mean of the frames in each cluster, or the centroid if the cluster is empty
    counts_K: Tensor  # int64, number of frames per cluster
    inertia: float  # mean squared distance of a frame to its centroid


@dataclass(frozen=True)
class Fit:
    """The result of Lloyd's algorithm or of a backend."""

    statistics: PassStatistics  # statistics of the last pass
    history: list[float]  # inertia in each pass
    reseeded: int  # number of times that an empty cluster was moved to another frame


def fit_lloyd(frames_ND: Frames, options: KmeansOptions) -> Fit:
    """Cluster frames from coarse to fine. All processes must call this function; they share the passes."""
    device = torch.device(options.device)
    n_frames, rng = len(frames_ND), np.random.default_rng(options.seed)
    sample_ND = frames_ND
    if options.lloyd_frames < n_frames:
        sample_ND = Subset(frames_ND, draw_rows(n_frames, options.lloyd_frames, rng))
    n_sample = len(sample_ND)
    order = rng.permutation(n_sample)  # each smaller sample is a prefix of this permutation
    centroids_KD, first_size = coarse_centroids(sample_ND, order, options)
    # Processes may run on different CPUs, which can round differently.
    centroids_KD = distributed.rank0_broadcast(centroids_KD.cpu).to(device)
    for size in sample_sizes(first_size, n_sample):
        level_ND: Frames = Subset(sample_ND, np.sort(order[:size]))
        if 4 * size * frames_ND.shape[1] <= _IN_MEMORY:
            level_ND = load_frames(level_ND, device)
        fit = lloyd(level_ND, centroids_KD, _COARSE_PASSES, options.tol, all_ranks=True)
        centroids_KD = fit.statistics.means_KD
    tol = options.tol * _LAST_TOL if first_size < n_sample else options.tol
    fit = lloyd(sample_ND, centroids_KD, options.max_iter, tol, all_ranks=True)
    if n_sample == n_frames:
        return fit
    centroids_KD = mini_batch_pass(frames_ND, fit.statistics, all_ranks=True)
    statistics = assign_pass(frames_ND, centroids_KD, all_ranks=True)
    return Fit(statistics, [statistics.inertia], fit.reseeded)


def sample_sizes(first: int, n_frames: int) -> Iterator[int]:
    """Yield the sizes of the samples between the first sample and all frames, both excluded."""
    size = first * _GROWTH
    while 2 * size < n_frames:
        yield size
        size *= _GROWTH


def coarse_centroids(frames_ND: Frames, order: np.ndarray, options: KmeansOptions) -> tuple[Tensor, int]:
    """Cluster a small sample with `n_init` initializations, and return the best centroids.

    Args:
        order: a permutation of the rows; the sample is a prefix of it.

    Returns:
        The centroids (K, D) on `options.device`, and the intended size of the sample, which can exceed the
        number of rows.
    """
    size = max(_COARSE_FRAMES * options.n_clusters, _COARSE_MIN)
    sample_ND = load_frames(Subset(frames_ND, np.sort(order[:size])), torch.device(options.device))
    best: PassStatistics | None = None
    for number in range(options.n_init):
        generator = torch.Generator().manual_seed(options.seed * 1_000_003 + number)
        initial_KD = _plus_plus(sample_ND, options.n_clusters, generator)
        statistics = lloyd(sample_ND, initial_KD, _COARSE_PASSES, options.tol).statistics
        if best is None or statistics.inertia < best.inertia:
            best = statistics
    assert best is not None
    return best.means_KD, size


def _plus_plus(x_ND: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Choose initial centroids by greedy k-means++: keep the best of several candidates in each step."""
    frames_ND, x_ND = x_ND, x_ND - x_ND.mean(dim=0)
    norm_N = x_ND.square().sum(dim=1)
    n_candidates = 2 + int(math.log(n_clusters))
    chosen = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    distance_N = _distances_to_rows(x_ND, norm_N, chosen)[0]
    with progress("k-means++", "centroids", n_clusters - 1) as done:
        for _ in range(n_clusters - 1):
            cumulative_N = distance_N.double().cumsum(dim=0)
            draws = torch.rand(n_candidates, generator=generator, dtype=torch.float64).to(x_ND.device)
            rows = torch.searchsorted(cumulative_N, draws * cumulative_N[-1]).clamp(max=len(x_ND) - 1)
            closer_CN = torch.minimum(distance_N, _distances_to_rows(x_ND, norm_N, rows))
            best = int(closer_CN.sum(dim=1).argmin())
            distance_N = closer_CN[best]
            chosen.append(int(rows[best]))
            done(1)
    return frames_ND[chosen]


def _distances_to_rows(x_ND: Tensor, norm_N: Tensor, rows: Tensor | list[int]) -> Tensor:
    """Compute squared distances (len(rows), N) between the frames at `rows` and all frames."""
    return (norm_N + norm_N[rows][:, None] - 2 * (x_ND[rows] @ x_ND.T)).clamp_(min=0)


def lloyd(frames_ND: Frames, centroids_KD: Tensor, max_iter: int, tol: float, all_ranks: bool = False) -> Fit:
    """Run Lloyd's algorithm until it converges, for at most `max_iter` passes.

    Args:
        tol: the algorithm has converged when a pass decreases the inertia by no more than this fraction,
            unless empty clusters were moved before the pass.
        all_ranks: whether all processes call this function together and share the passes.
    """
    device = centroids_KD.device
    if not isinstance(frames_ND, Tensor) or frames_ND.device != device:
        frames_ND = CachedFrames(frames_ND, device, _cache_bytes(device))
    history: list[float] = []
    reseeded = 0
    moved = False  # True if empty clusters were moved after the last pass, which requires another pass
    with progress(f"k-means over {len(frames_ND):,} frames", "passes", max_iter) as done:
        while True:
            statistics = assign_pass(frames_ND, centroids_KD, all_ranks)
            history.append(statistics.inertia)
            done(1)
            converged = len(history) > 1 and history[-2] - history[-1] <= tol * history[-2] and not moved
            if converged or len(history) == max_iter:
                return Fit(statistics, history, reseeded)
            centroids_KD = statistics.means_KD
            empty = torch.nonzero(statistics.counts_K == 0)[:, 0]
            moved = False
            if len(empty) > 0:
                seeds = _farthest(frames_ND, statistics.centroids_KD, len(empty))
                centroids_KD[empty[: len(seeds)]] = seeds
                reseeded += len(seeds)
                moved = len(seeds) > 0


def assign_pass(frames_ND: Frames, centroids_KD: Tensor, all_ranks: bool = False) -> PassStatistics:
    """Assign all frames to centroids. With `all_ranks`, each process handles its own lanes."""
    nearest = NearestCentroid(centroids_KD)
    rank, world = (distributed.rank(), distributed.world()) if all_ranks else (0, 1)
    blocks = blocks_of_frames(frames_ND, nearest, rank, world)
    sums_KD, counts_K, distance = _sums(blocks, nearest, all_ranks)
    means_KD = (sums_KD / counts_K.clamp(min=1)[:, None] + nearest.mean_D).to(centroids_KD.dtype)
    means_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
    return PassStatistics(centroids_KD, means_KD, counts_K.long(), float(distance) / len(frames_ND))


def mini_batch_pass(frames_ND: Frames, start: PassStatistics, all_ranks: bool = False) -> Tensor:
    """Refine centroids (K, D) with one mini-batch pass over all frames.

    After each batch, a centroid is the mean of all frames assigned to it so far, including those in `start`
    (MacQueen 1967; the learning rate is that of Sculley 2010). The frames of a batch come from 16 distant
    positions, because neighboring frames usually belong to the same speaker.
    """
    centroids_KD, counts_K = start.means_KD.double(), start.counts_K.double()
    rank, world = (distributed.rank(), distributed.world()) if all_ranks else (0, 1)
    bounds = [len(frames_ND) * lane // _LANES for lane in range(_LANES + 1)]
    offsets = range(0, -(-len(frames_ND) // _LANES), _BATCH)
    with progress(f"k-means over {len(frames_ND):,} frames", "mini-batches", len(offsets)) as done:
        for offset in offsets:
            nearest = NearestCentroid(centroids_KD.float())
            parts = {
                lane: slice(start + offset, min(start + offset + _BATCH, end))
                for lane, (start, end) in enumerate(itertools.pairwise(bounds))
                if lane % world == rank
            }
            blocks = (
                block for lane, part in parts.items() for block in _split(frames_ND[part], nearest, lane)
            )
            sums_KD, new_K, _ = _sums(blocks, nearest, all_ranks)
            counts_K = counts_K + new_K
            moved_KD = sums_KD - new_K[:, None] * (centroids_KD - nearest.mean_D)
            centroids_KD = centroids_KD + moved_KD / counts_K.clamp(min=1)[:, None]
            done(1)
    return centroids_KD.float()


def _sums(
    blocks: Iterable[tuple[int, Tensor]], nearest: NearestCentroid, all_ranks: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute sums over blocks: frames are added in float32 within a block, everything else in float64.

    Returns:
        The sum (K, D) and the number (K,) of the centered frames in each cluster, and the sum of all squared
        distances.
    """
    n_clusters, device = len(nearest.half_norm_K), nearest.half_norm_K.device
    shape = (_LANES, n_clusters, len(nearest.mean_D) + 2)  # the last two columns are counts and distances
    sums_LKD = torch.zeros(shape, dtype=torch.float64, device=device)
    for lane, block_ND in blocks:
        label_N, distance_N, x_ND = nearest.distances(block_ND)
        lane_KD = sums_LKD[lane]
        lane_KD[0, -1] += distance_N.sum(dtype=torch.float64)
        lane_KD[:, -2] += torch.bincount(label_N, minlength=n_clusters)
        if device.type == "cpu":
            lane_KD[:, :-2] += torch.zeros_like(nearest.centered_KD).index_add_(0, label_N, x_ND)
        else:  # on a GPU, a matrix product is deterministic and faster than index_add_
            member_NK = torch.nn.functional.one_hot(label_N, n_clusters).to(x_ND.dtype)
            lane_KD[:, :-2] += member_NK.T @ x_ND
    if all_ranks:
        distributed.all_reduce_(sums_LKD)  # exact, because each lane is nonzero in only one process
    total_KD = sums_LKD[0]
    for lane_KD in sums_LKD[1:]:
        total_KD = total_KD + lane_KD
    if not math.isfinite(float(total_KD[0, -1])):
        raise not_finite_error()
    return total_KD[:, :-2], total_KD[:, -2], total_KD[0, -1]


def not_finite_error() -> DataError:
    """Create the error for frames that contain NaN or infinite values."""
    return DataError("the frames contain NaN or infinite values; check the audio for broken recordings")


def _farthest(frames_ND: Frames, centroids_KD: Tensor, n: int) -> Tensor:
    """Choose up to n frames (n, D) that are far from all centroids and from each other."""
    pool_N = torch.zeros(0, device=centroids_KD.device)
    pool_ND = centroids_KD[:0]
    nearest = NearestCentroid(centroids_KD)
    for _, block_ND in blocks_of_frames(frames_ND, nearest):
        distance_N = torch.cat([pool_N, nearest.distances(block_ND)[1]])
        pool_N, index = distance_N.topk(min(n * 32, len(distance_N)))
        pool_ND = torch.cat([pool_ND, block_ND])[index]
    chosen: list[Tensor] = []
    while len(chosen) < n and float(pool_N.max()) > 0:
        chosen.append(pool_ND[int(pool_N.argmax())])
        pool_N = torch.minimum(pool_N, (pool_ND - chosen[-1]).square().sum(dim=1))
    return torch.stack(chosen) if chosen else centroids_KD[:0]


def blocks_of_frames(
    frames_ND: Frames, nearest: NearestCentroid, rank: int = 0, world: int = 1
) -> Iterator[tuple[int, Tensor]]:
    """Yield (lane, float32 block on the centroids' device) for all frames in the lanes of a process."""
    rows = nearest.block_rows
    chunk = rows * max(1, _CHUNK_BYTES // (4 * rows * frames_ND.shape[1]))
    for number, start in enumerate(range(0, len(frames_ND), chunk)):
        lane = number % _LANES
        if lane % world == rank:
            distributed.tick()  # a pass over all frames can take longer than the hang timeout
            yield from _split(frames_ND[start : start + chunk], nearest, lane)


def _split(frames_ND: Any, nearest: NearestCentroid, lane: int) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(frames_ND), nearest.block_rows):
        block_ND = frames_ND[start : start + nearest.block_rows]
        if not isinstance(block_ND, Tensor):
            block_ND = torch.from_numpy(np.require(block_ND, np.float32, ["C", "W"]))
        yield lane, block_ND.to(nearest.mean_D.device, torch.float32)


def _cache_bytes(device: torch.device) -> int:
    """Return half of a GPU's free memory (bytes), or 0 on a CPU, where the system caches files."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else 0
