"""K-means clustering with several backends, and assignment of frames to clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jahubert.errors import ConfigError, DataError
from jahubert.model.centroids import NearestCentroid
from jahubert.train.clustering.frames import Frames
from jahubert.train.clustering.lloyd import KmeansOptions, assign_pass, blocks_of_frames, fit_lloyd
from jahubert.train.clustering.peers import fit_faiss, fit_sklearn

_BACKENDS = {"torch": fit_lloyd, "faiss": fit_faiss, "sklearn": fit_sklearn}


@dataclass(frozen=True)
class KmeansResult:
    """Fitted centroids, with statistics of the frames to which they were fitted."""

    centroids_KD: Tensor  # float32, on the CPU
    inertia: float  # mean squared distance of a frame to its centroid
    counts_K: Tensor  # int64, number of frames per cluster
    history: list[float]  # inertia in each pass over all frames; the last value equals `inertia`
    reseeded: int  # number of times that an empty cluster was moved to another frame
    backend: str


def fit_kmeans(frames_ND: Frames, options: KmeansOptions) -> KmeansResult:
    """Cluster frames with k-means.

    Args:
        frames_ND: frames (N, D) of any floating-point dtype, in memory or in a file. They must be the same in
            all processes.

    Raises:
        ConfigError: the backend is unknown, or finds no GPU although `device` is one.
        DataError: the frames have a wrong shape, are fewer than the clusters, or are not finite.
        MissingExtraError: the backend is not installed.
    """
    backend = options.backend
    if backend not in _BACKENDS:
        raise ConfigError(f"backend={backend!r}: unknown k-means backend; use one of {', '.join(_BACKENDS)}")
    if frames_ND.ndim != 2:
        raise DataError(f"frames must have shape (N, D), but have shape {tuple(frames_ND.shape)}")
    if len(frames_ND) < options.n_clusters:
        raise DataError(
            f"n_clusters={options.n_clusters} requires at least that many frames, but the number of frames "
            f"is {len(frames_ND)}: use more audio or fewer clusters"
        )
    fitted = _BACKENDS[backend](frames_ND, options)
    return KmeansResult(
        centroids_KD=fitted.statistics.centroids_KD.cpu(),
        inertia=fitted.statistics.inertia,
        counts_K=fitted.statistics.counts_K.cpu(),
        history=fitted.history,
        reseeded=fitted.reseeded,
        backend=backend,
    )


def assign(frames_ND: Frames, centroids_KD: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each frame, int64 (N,), on the centroids' device."""
    nearest = NearestCentroid(centroids_KD)
    labels = [nearest.labels(block_ND) for _, block_ND in blocks_of_frames(frames_ND, nearest)]
    return torch.cat(labels) if labels else nearest.labels(centroids_KD[:0])


def inertia(frames_ND: Frames, centroids_KD: Tensor) -> float:
    """Compute the mean squared distance of frames to their nearest centroids."""
    return assign_pass(frames_ND, centroids_KD).inertia
