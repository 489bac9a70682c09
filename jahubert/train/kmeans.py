"""k-means over frames: our own Lloyd in torch, faiss, or scikit-learn with fairseq's arguments.

The torch backend goes from coarse to fine: k-means++ and Lloyd on a small sample (several starts, the best
one is kept), then Lloyd on samples eight times as large each, then on all frames. Most of the way is done
where it is cheap, and the passes over all the data only finish it. Frames may be a memory map: they are read
block by block and need not fit into memory or onto the device.

Several processes share each pass, and the result is the same bit for bit: blocks are dealt out to 16 lanes,
lanes to processes, and the sums of the lanes are added in their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import ConfigError, DataError
from jahubert.train import ranks
from jahubert.train.kmeans_peers import faiss_kmeans, import_faiss, sklearn_kmeans

Backend = Literal["auto", "torch", "faiss", "sklearn"]
Frames = Any  # (N, D): a tensor, an array, a memory map, or what gives arrays for slices and index arrays

_COARSE_FRAMES = 64  # a cluster, in the sample of the first level
_COARSE_MIN = 20_000  # frames
_COARSE_PASSES = 50  # at most, for each level but the last
_GROWTH = 8  # from one level to the next
_LANES = 16  # sums that are kept apart, whatever the number of processes
_LAST_TOL = 10  # passes over all frames are dear, and little is left to do for them


@dataclass(frozen=True)
class KmeansResult:
    """Centroids and what is known about them on the frames they were fitted to."""

    centroids_KD: Tensor  # float32, on the CPU
    inertia: float  # mean squared distance of a frame to its centroid
    counts_K: Tensor  # int64, frames in each cluster
    history: list[float]  # inertia over all frames at each pass; the last one is `inertia`
    reseeded: int  # clusters that died and were started again elsewhere
    backend: str


def fit_kmeans(
    frames_ND: Frames,
    n_clusters: int,
    *,
    backend: Backend = "auto",
    n_init: int = 1,
    max_iter: int = 50,
    tol: float = 1e-4,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> KmeansResult:
    """Cluster frames; the same seed gives the same centroids.

    Args:
        frames_ND: (N, D), any floating type, in memory or memory-mapped; the same in every process.
        n_clusters: K.
        backend: "auto" is "torch". "sklearn" is the reference: MiniBatchKMeans with fairseq's arguments
            (n_init 20, batches of 10,000 ...), so that only `n_clusters` and `seed` act on it.
        n_init: starts, of which the best one is kept.
        max_iter: passes over all frames at most.
        tol: stop clustering a sample when a pass lowers its inertia by less than this share, and all frames
            when by less than ten times as much (torch only).
        device: where the products are computed.

    Raises:
        DataError: fewer frames than clusters, or NaN in the frames.
        MissingExtraError: the backend is not installed.
    """
    backends = {"auto": _fit_torch, "torch": _fit_torch, "faiss": _fit_faiss, "sklearn": _fit_sklearn}
    if backend not in backends:
        raise ConfigError(f"no k-means backend {backend!r}; there are: {', '.join(backends)}")
    if n_clusters < 1 or n_init < 1 or max_iter < 1:
        raise ConfigError(
            f"n_clusters, n_init and max_iter must be positive, but are {n_clusters}, {n_init} and {max_iter}"
        )
    if frames_ND.ndim != 2:
        raise DataError(f"frames must be (N, D), but have shape {tuple(frames_ND.shape)}")
    if len(frames_ND) < n_clusters:
        raise DataError(
            f"{len(frames_ND)} frames cannot make {n_clusters} clusters: use more audio or fewer clusters"
        )
    fitted, history, reseeded = backends[backend](
        frames_ND,
        n_clusters,
        n_init=n_init,
        max_iter=max_iter,
        tol=tol,
        seed=seed,
        device=torch.device(device),
    )
    return KmeansResult(
        centroids_KD=fitted.centroids_KD.cpu(),
        inertia=fitted.inertia,
        counts_K=fitted.counts_K.cpu(),
        history=history,
        reseeded=reseeded,
        backend="torch" if backend == "auto" else backend,
    )


def assign(frames_ND: Frames, centroids_KD: Tensor) -> Tensor:
    """The nearest centroid of each frame, int64 (N,), computed on the centroids' device."""
    nearest = _Nearest(centroids_KD, len(frames_ND))
    labels = [nearest(x_ND)[0] for x_ND in _blocks(frames_ND, centroids_KD)]
    return torch.cat(labels) if labels else torch.zeros(0, dtype=torch.int64, device=centroids_KD.device)


def inertia(frames_ND: Frames, centroids_KD: Tensor) -> float:
    """Mean squared distance of the frames to their nearest centroids."""
    return _pass(frames_ND, centroids_KD).inertia


def _block_rows(shape_KD: torch.Size, device: torch.device) -> int:
    """Rows whose distances stay in the L2 cache, or fill a GPU."""
    budget = 1 << 18 if device.type == "cpu" else 1 << 27
    return max(1024, budget // sum(shape_KD))


def _blocks(frames_ND: Frames, centroids_KD: Tensor) -> Iterator[Tensor]:
    """float32 blocks on the centroids' device."""
    if frames_ND.shape[1] != centroids_KD.shape[1]:
        raise DataError(
            f"frames have {frames_ND.shape[1]} dimensions, but the centroids {centroids_KD.shape[1]}: "
            "they were made from another feature"
        )
    rows = _block_rows(centroids_KD.shape, centroids_KD.device)
    for start in range(0, len(frames_ND), rows):
        block = frames_ND[start : start + rows]
        if not isinstance(block, Tensor):
            block = torch.from_numpy(np.array(block, dtype=np.float32))
        yield block.to(centroids_KD.device, torch.float32)


def _lanes(
    frames_ND: Frames, centroids_KD: Tensor, sums_LKD: Tensor, rank: int, world: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The blocks of this process, each with the sums of its lane."""
    rows = _block_rows(centroids_KD.shape, centroids_KD.device)
    for number, start in enumerate(range(0, len(frames_ND), rows)):
        lane = number % _LANES
        if lane % world == rank:
            for block_ND in _blocks(frames_ND[start : start + rows], centroids_KD):
                yield sums_LKD[lane], block_ND


class _Nearest:
    """Nearest centroids: |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c).

    Around the centroids' mean: with features that lie far from zero the products would swallow the
    differences.
    """

    def __init__(self, centroids_KD: Tensor, n_frames: int):
        self.middle_D = centroids_KD.mean(dim=0)
        centred_KD = centroids_KD - self.middle_D
        self.half_K = centred_KD.square().sum(dim=1) / 2
        self.centred_DK = centred_KD.T.contiguous()
        rows = min(n_frames, _block_rows(centroids_KD.shape, centroids_KD.device))
        self.buffer_NK = centroids_KD.new_empty(
            rows, len(centroids_KD)
        )  # fresh pages for every block cost time
        # numpy's argmin is twice as fast as torch's min, but knows only one thread.
        self.by_numpy = centroids_KD.device.type == "cpu" and torch.get_num_threads() <= 2

    def __call__(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (N,); squared distances less |x|^2 (N,); the frames around the middle, x (N, D)."""
        x_ND = x_ND - self.middle_D
        score_NK = self.buffer_NK[: len(x_ND)]
        torch.addmm(self.half_K, x_ND, self.centred_DK, alpha=-1, out=score_NK)
        if self.by_numpy:
            label_N = torch.from_numpy(score_NK.numpy().argmin(axis=1))
            least_N = score_NK.gather(1, label_N[:, None])[:, 0]
        else:
            least_N, label_N = score_NK.min(dim=1)
        return label_N, 2 * least_N, x_ND


@dataclass
class _Fitted:
    """Centroids, and what one pass over the frames says about them."""

    centroids_KD: Tensor
    means_KD: Tensor  # of the frames of each cluster; the centroid itself where there are none
    counts_K: Tensor  # int64
    inertia: float


def _pass(frames_ND: Frames, centroids_KD: Tensor, together: bool = False) -> _Fitted:
    """One pass over the frames: float32 within a block, float64 from block to block.

    `together`: each process takes its lanes; otherwise this process takes all.
    """
    n_clusters, device = len(centroids_KD), centroids_KD.device
    shape = (_LANES, n_clusters, centroids_KD.shape[1] + 2)  # sums, and beside them counts and distances
    sums_LKD = torch.zeros(shape, dtype=torch.float64, device=device)
    nearest = _Nearest(centroids_KD, len(frames_ND))
    share = (ranks.rank(), ranks.world()) if together else (0, 1)
    for lane_KD, x_ND in _lanes(frames_ND, centroids_KD, sums_LKD, *share):
        label_N, least_N, x_ND = nearest(x_ND)
        distance = torch.linalg.vecdot(x_ND, x_ND).add_(least_N).clamp_(min=0).sum(dtype=torch.float64)
        lane_KD[0, -1] += distance
        lane_KD[:, -2] += torch.bincount(label_N, minlength=n_clusters)
        if device.type == "cpu":
            lane_KD[:, :-2] += torch.zeros_like(centroids_KD).index_add_(0, label_N, x_ND)
        else:  # index_add_ adds in a random order there; a product does not, and is faster
            member_NK = torch.nn.functional.one_hot(label_N, n_clusters).to(x_ND.dtype)
            lane_KD[:, :-2] += member_NK.T @ x_ND
    if together:
        ranks.add(sums_LKD)  # exact: in each lane all processes but one have zeros
    total_KD = sums_LKD[0]
    for lane_KD in sums_LKD[1:]:
        total_KD = total_KD + lane_KD
    sums_KD, counts_K, distance = total_KD[:, :-2], total_KD[:, -2].long(), total_KD[0, -1]
    mean = float(distance) / len(frames_ND)
    if not math.isfinite(mean):
        raise DataError("the frames hold NaN or infinite values: look for the utterances they came from")
    means_KD = (sums_KD / counts_K.clamp(min=1)[:, None] + nearest.middle_D).to(centroids_KD.dtype)
    means_KD = torch.where(counts_K[:, None] > 0, means_KD, centroids_KD)
    return _Fitted(centroids_KD, means_KD, counts_K, mean)


def _farthest(frames_ND: Frames, centroids_KD: Tensor, n: int) -> Tensor:
    """Up to n frames (n, D) far from all centroids and from each other: outliers have neighbours."""
    pool_N = torch.zeros(0, device=centroids_KD.device)
    pool_ND = centroids_KD[:0]
    nearest = _Nearest(centroids_KD, len(frames_ND))
    for block_ND in _blocks(frames_ND, centroids_KD):
        _, least_N, x_ND = nearest(block_ND)
        distance_N = torch.cat([pool_N, (x_ND.square().sum(dim=1) + least_N).clamp_(min=0)])
        pool_N, index = distance_N.topk(min(n * 32, len(distance_N)))
        pool_ND = torch.cat([pool_ND, block_ND])[index]
    chosen: list[Tensor] = []
    while len(chosen) < n and float(pool_N.max()) > 0:
        chosen.append(pool_ND[int(pool_N.argmax())])
        pool_N = torch.minimum(pool_N, (pool_ND - chosen[-1]).square().sum(dim=1))
    return torch.stack(chosen) if chosen else centroids_KD[:0]


def _lloyd(
    frames_ND: Frames, centroids_KD: Tensor, max_iter: int, tol: float, together: bool = False
) -> tuple[_Fitted, list[float], int]:
    """What the last of at most `max_iter` passes found, the inertia of each, and how many were re-seeded."""
    history: list[float] = []
    reseeded = 0
    fresh = False  # a re-seeded cluster deserves another pass
    while True:
        fitted = _pass(frames_ND, centroids_KD, together)
        history.append(fitted.inertia)
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


def _coarse(
    frames_ND: Frames,
    order: np.ndarray,
    n_clusters: int,
    n_init: int,
    tol: float,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, int]:
    """The best of several starts on a small sample, and how many frames of `order` it has seen."""
    size = max(_COARSE_FRAMES * n_clusters, _COARSE_MIN)
    sample_ND = _take(frames_ND, order[:size], device)
    best: _Fitted | None = None
    for start in range(n_init):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        centroids_KD = _plus_plus(sample_ND, n_clusters, generator)
        fitted, _, _ = _lloyd(sample_ND, centroids_KD, _COARSE_PASSES, tol)
        if best is None or fitted.inertia < best.inertia:
            best = fitted
    assert best is not None
    return best.means_KD, size


def _fit_torch(
    frames_ND: Frames,
    n_clusters: int,
    *,
    n_init: int,
    max_iter: int,
    tol: float,
    seed: int,
    device: torch.device,
) -> tuple[_Fitted, list[float], int]:
    n_frames = len(frames_ND)
    order = np.random.default_rng(seed).permutation(n_frames)  # every level sees the first so many of it
    centroids_KD, size = _coarse(frames_ND, order, n_clusters, n_init, tol, seed, device)
    centroids_KD = ranks.from_first(centroids_KD.cpu).to(
        device
    )  # another kind of processor may round otherwise
    if size < n_frames:
        tol_all = tol * _LAST_TOL
        while (size := size * _GROWTH) * 2 < n_frames:
            sample_ND = _take(frames_ND, order[:size], device)
            fitted, _, _ = _lloyd(sample_ND, centroids_KD, _COARSE_PASSES, tol, together=True)
            centroids_KD = fitted.means_KD
    else:
        tol_all = tol
    return _lloyd(frames_ND, centroids_KD, max_iter, tol_all, together=True)


def _take(frames_ND: Frames, rows: np.ndarray, device: torch.device) -> Tensor:
    rows = np.sort(rows)  # a memory map is read forwards
    if isinstance(frames_ND, Tensor):
        return frames_ND[torch.from_numpy(rows).to(frames_ND.device)].to(device, torch.float32)
    return torch.from_numpy(np.array(frames_ND[rows], dtype=np.float32)).to(device)


def _plus_plus(x_ND: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few frames drawn by squared distance, the one that helps most."""
    frames_ND, x_ND = x_ND, x_ND - x_ND.mean(dim=0)
    norm_N = x_ND.square().sum(dim=1)
    n_candidates = 2 + int(math.log(n_clusters))
    chosen = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    distance_N = _to_rows(x_ND, norm_N, chosen)[0]
    for _ in range(n_clusters - 1):
        cumulative_N = distance_N.double().cumsum(dim=0)
        draws = torch.rand(n_candidates, generator=generator, dtype=torch.float64).to(x_ND.device)
        rows = torch.searchsorted(cumulative_N, draws * cumulative_N[-1]).clamp(max=len(x_ND) - 1)
        closer_CN = torch.minimum(distance_N, _to_rows(x_ND, norm_N, rows))
        best = int(closer_CN.sum(dim=1).argmin())
        distance_N = closer_CN[best]
        chosen.append(int(rows[best]))
    return frames_ND[chosen]


def _to_rows(x_ND: Tensor, norm_N: Tensor, rows: Tensor | list[int]) -> Tensor:
    """Squared distances of all frames to some of them, (rows, N)."""
    return (norm_N + norm_N[rows][:, None] - 2 * (x_ND[rows] @ x_ND.T)).clamp_(min=0)


def _fit_faiss(
    frames_ND: Frames,
    n_clusters: int,
    *,
    n_init: int,
    max_iter: int,
    tol: float,
    seed: int,
    device: torch.device,
) -> tuple[_Fitted, list[float], int]:
    """faiss over all frames, from our start (its own random one is much worse); it has no `tol`."""
    gpu = device.type == "cuda"
    import_faiss(gpu)  # before the work, not behind it
    order = np.random.default_rng(seed).permutation(len(frames_ND))
    start_KD, _ = _coarse(frames_ND, order, n_clusters, n_init, tol, seed, device)
    centroids_KD, history, splits = faiss_kmeans(
        _contiguous(frames_ND), _contiguous(start_KD), max_iter=max_iter, seed=seed, gpu=gpu
    )
    fitted = _pass(frames_ND, torch.from_numpy(centroids_KD).to(device))
    return fitted, [*history, fitted.inertia], splits


def _fit_sklearn(
    frames_ND: Frames,
    n_clusters: int,
    *,
    n_init: int,
    max_iter: int,
    tol: float,
    seed: int,
    device: torch.device,
) -> tuple[_Fitted, list[float], int]:
    centroids_KD = sklearn_kmeans(_contiguous(frames_ND), n_clusters, seed)
    fitted = _pass(frames_ND, torch.from_numpy(centroids_KD).to(device))
    return fitted, [fitted.inertia], 0


def _contiguous(frames_ND: Frames) -> np.ndarray:
    if isinstance(frames_ND, Tensor):
        frames_ND = frames_ND.cpu().float().numpy()
    return np.ascontiguousarray(frames_ND[:], dtype=np.float32)
