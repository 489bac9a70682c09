"""k-means over frames: our own Lloyd in torch, faiss, or scikit-learn with fairseq's arguments.

The torch backend goes from coarse to fine: k-means++ and Lloyd on a small sample (several starts, the best
one is kept), then Lloyd on samples eight times as large each, then on all frames. Most of the way is done
where it is cheap, and the passes over all the data only finish it. With more than `lloyd_frames` of them, one
pass of mini-batches does that. Frames may lie in a file that does not fit into memory, and any number of
processes gives the same result (lloyd.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import ConfigError, DataError
from jahubert.train.clustering.kmeans_peers import faiss_kmeans, import_faiss, sklearn_kmeans
from jahubert.train.clustering.lloyd import (
    Fitted,
    Frames,
    Nearest,
    Subset,
    assign_pass,
    lloyd,
    load_frames,
    refine,
)
from jahubert.train.experiment import distributed
from jahubert.train.experiment.progress import progress

Backend = Literal["auto", "torch", "faiss", "sklearn"]

_COARSE_FRAMES = 64  # a cluster, in the sample of the first level
_COARSE_MIN = 20_000  # frames
_COARSE_PASSES = 50  # at most, for each level but the last
_GROWTH = 8  # from one level to the next
_HELD = (
    1 << 30
)  # bytes: a level's sample up to this size is kept in memory, a larger one is read in each pass
_LAST_TOL = 10  # passes over all frames are dear, and little is left to do for them


@dataclass(frozen=True)
class KmeansResult:
    """Centroids and what is known about them on the frames they were fitted to."""

    centroids_KD: Tensor  # float32, on the CPU
    inertia: float  # mean squared distance of a frame to its centroid
    counts_K: Tensor  # int64, frames in each cluster
    history: list[float]  # inertia over all frames at each pass that saw them; the last one is `inertia`
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
    lloyd_frames: int = 10_000_000,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> KmeansResult:
    """Cluster frames; the same seed gives the same centroids.

    Args:
        frames_ND: (N, D), any floating type, in memory or a file; the same in every process.
        n_clusters: K.
        backend: "auto" is "torch". "sklearn" is the reference: MiniBatchKMeans with fairseq's arguments
            (n_init 20, batches of 10,000 ...), so that only `n_clusters` and `seed` act on it.
        n_init: starts, of which the best one is kept.
        max_iter: passes over all frames at most.
        tol: stop clustering a sample when a pass lowers its inertia by less than this share, and all frames
            when by less than ten times as much (torch only).
        lloyd_frames: with more frames than this, a uniform sample of so many is clustered, and one pass of
            mini-batches over all frames refines the result (torch only).
        device: where the products are computed.

    Raises:
        DataError: fewer frames than clusters, or NaN in the frames.
        MissingExtraError: the backend is not installed.
    """
    backends = {"auto": _fit_torch, "torch": _fit_torch, "faiss": _fit_faiss, "sklearn": _fit_sklearn}
    if backend not in backends:
        raise ConfigError(f"no k-means backend {backend!r}; there are: {', '.join(backends)}")
    _check(frames_ND, n_clusters, n_init, max_iter, lloyd_frames)
    fitted, history, reseeded = backends[backend](
        frames_ND,
        n_clusters,
        n_init=n_init,
        max_iter=max_iter,
        tol=tol,
        lloyd_frames=lloyd_frames,
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


def _check(frames_ND: Frames, n_clusters: int, n_init: int, max_iter: int, lloyd_frames: int) -> None:
    if min(n_clusters, n_init, max_iter) < 1 or lloyd_frames < n_clusters:
        raise ConfigError(
            "n_clusters, n_init and max_iter must be positive and lloyd_frames at least n_clusters, but are "
            f"{n_clusters}, {n_init}, {max_iter} and {lloyd_frames}"
        )
    if frames_ND.ndim != 2:
        raise DataError(f"frames must be (N, D), but have shape {tuple(frames_ND.shape)}")
    if len(frames_ND) < n_clusters:
        raise DataError(
            f"{len(frames_ND)} frames cannot make {n_clusters} clusters: use more audio or fewer clusters"
        )


def assign(frames_ND: Frames, centroids_KD: Tensor) -> Tensor:
    """The nearest centroid of each frame, int64 (N,), computed on the centroids' device."""
    return Nearest(centroids_KD).labels(frames_ND)


def inertia(frames_ND: Frames, centroids_KD: Tensor) -> float:
    """Mean squared distance of the frames to their nearest centroids."""
    return assign_pass(frames_ND, centroids_KD).inertia


def draw_rows(n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` different numbers below n, ascending, all choices equally likely; takes memory for them only."""
    if 2 * size > n:
        keep = np.ones(n, bool)
        keep[draw_rows(n, n - size, rng)] = False
        return np.flatnonzero(keep)
    rows = np.zeros(0, np.int64)
    while len(rows) < size:  # what came twice is drawn again
        rows = np.unique(np.concatenate([rows, rng.integers(n, size=size - len(rows))]))
    return rows


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
    sample_ND = load_frames(Subset(frames_ND, np.sort(order[:size])), device)
    best: Fitted | None = None
    for start in range(n_init):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + start)
        centroids_KD = _plus_plus(sample_ND, n_clusters, generator)
        fitted, _, _ = lloyd(sample_ND, centroids_KD, _COARSE_PASSES, tol)
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
    lloyd_frames: int,
    seed: int,
    device: torch.device,
) -> tuple[Fitted, list[float], int]:
    n_frames, rng = len(frames_ND), np.random.default_rng(seed)
    chosen_ND = frames_ND
    if lloyd_frames < n_frames:
        chosen_ND = Subset(frames_ND, draw_rows(n_frames, lloyd_frames, rng))
    n_chosen = len(chosen_ND)
    order = rng.permutation(n_chosen)  # every level sees the first so many of it
    centroids_KD, size = _coarse(chosen_ND, order, n_clusters, n_init, tol, seed, device)
    # Another kind of processor may round otherwise.
    centroids_KD = distributed.rank0_broadcast(centroids_KD.cpu).to(device)
    if size < n_chosen:
        tol_all = tol * _LAST_TOL
        while (size := size * _GROWTH) * 2 < n_chosen:
            sample_ND: Frames = Subset(chosen_ND, np.sort(order[:size]))
            if 4 * size * frames_ND.shape[1] <= _HELD:
                sample_ND = load_frames(sample_ND, device)
            fitted, _, _ = lloyd(sample_ND, centroids_KD, _COARSE_PASSES, tol, together=True)
            centroids_KD = fitted.means_KD
    else:
        tol_all = tol
    fitted, history, reseeded = lloyd(chosen_ND, centroids_KD, max_iter, tol_all, together=True)
    if n_chosen == n_frames:
        return fitted, history, reseeded
    fitted = assign_pass(frames_ND, refine(frames_ND, fitted, together=True), together=True)
    return fitted, [fitted.inertia], reseeded


def _plus_plus(x_ND: Tensor, n_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few frames drawn by squared distance, the one that helps most."""
    frames_ND, x_ND = x_ND, x_ND - x_ND.mean(dim=0)
    norm_N = x_ND.square().sum(dim=1)
    n_candidates = 2 + int(math.log(n_clusters))
    chosen = [int(torch.randint(len(x_ND), (1,), generator=generator))]
    distance_N = _to_rows(x_ND, norm_N, chosen)[0]
    with progress("k-means++", "centroids", n_clusters - 1) as done:
        for _ in range(n_clusters - 1):
            cumulative_N = distance_N.double().cumsum(dim=0)
            draws = torch.rand(n_candidates, generator=generator, dtype=torch.float64).to(x_ND.device)
            rows = torch.searchsorted(cumulative_N, draws * cumulative_N[-1]).clamp(max=len(x_ND) - 1)
            closer_CN = torch.minimum(distance_N, _to_rows(x_ND, norm_N, rows))
            best = int(closer_CN.sum(dim=1).argmin())
            distance_N = closer_CN[best]
            chosen.append(int(rows[best]))
            done(1)
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
    lloyd_frames: int,
    seed: int,
    device: torch.device,
) -> tuple[Fitted, list[float], int]:
    """faiss over all frames, from our start (its own random one is much worse); it has no `tol`."""
    gpu = device.type == "cuda"
    import_faiss(gpu)  # before the work, not behind it
    order = np.random.default_rng(seed).permutation(len(frames_ND))
    start_KD, _ = _coarse(frames_ND, order, n_clusters, n_init, tol, seed, device)
    centroids_KD, history, splits = faiss_kmeans(
        _contiguous(frames_ND), _contiguous(start_KD), max_iter=max_iter, seed=seed, gpu=gpu
    )
    fitted = assign_pass(frames_ND, torch.from_numpy(centroids_KD).to(device))
    return fitted, [*history, fitted.inertia], splits


def _fit_sklearn(
    frames_ND: Frames,
    n_clusters: int,
    *,
    n_init: int,
    max_iter: int,
    tol: float,
    lloyd_frames: int,
    seed: int,
    device: torch.device,
) -> tuple[Fitted, list[float], int]:
    centroids_KD = sklearn_kmeans(_contiguous(frames_ND), n_clusters, seed)
    fitted = assign_pass(frames_ND, torch.from_numpy(centroids_KD).to(device))
    return fitted, [fitted.inertia], 0


def _contiguous(frames_ND: Frames) -> np.ndarray:
    if isinstance(frames_ND, Tensor):
        frames_ND = frames_ND.cpu().float().numpy()
    return np.ascontiguousarray(frames_ND[:], dtype=np.float32)
