"""K-means backends based on faiss and scikit-learn, which run in a single process."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jahubert.errors import ConfigError, MissingExtraError
from jahubert.train.clustering.frames import Frames
from jahubert.train.clustering.lloyd import (
    Fit,
    KmeansOptions,
    assign_pass,
    coarse_centroids,
    not_finite_error,
)


def fit_faiss(frames_ND: Frames, options: KmeansOptions) -> Fit:
    """Run faiss's k-means on all frames, ignoring `tol` and `lloyd_frames`.

    Centroids are initialized as in `fit_lloyd`, because faiss's own random initialization results in a much
    higher inertia.

    Raises:
        MissingExtraError: faiss is not installed.
        ConfigError: `device` is a GPU, but faiss does not find one.
        DataError: the frames are not finite.
    """
    device = torch.device(options.device)
    faiss = _import_faiss(gpu=device.type == "cuda")  # imported first, so that errors are raised early
    order = np.random.default_rng(options.seed).permutation(len(frames_ND))
    initial_KD, _ = coarse_centroids(frames_ND, order, options)
    n_frames, dim = frames_ND.shape
    # Use all frames; the default is 256 per cluster.
    max_points = math.ceil(n_frames / options.n_clusters) + 1
    kmeans = faiss.Kmeans(
        dim,
        options.n_clusters,
        niter=options.max_iter,
        seed=options.seed,
        gpu=device.type == "cuda",
        min_points_per_centroid=1,
        max_points_per_centroid=max_points,
    )
    kmeans.train(_to_numpy(frames_ND), init_centroids=_to_numpy(initial_KD))
    history = [float(total) / n_frames for total in kmeans.obj]
    splits = int(np.sum([stats["nsplit"] for stats in kmeans.iteration_stats]))
    statistics = assign_pass(frames_ND, torch.from_numpy(np.array(kmeans.centroids)).to(device))
    return Fit(statistics, [*history, statistics.inertia], splits)


def _import_faiss(gpu: bool) -> Any:
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "gpu") from error
    if gpu and not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
        # Without this check, faiss would silently run on the CPU.
        raise ConfigError("faiss finds no GPU (is faiss-cpu installed?): set device=cpu or backend=torch")
    return faiss


def fit_sklearn(frames_ND: Frames, options: KmeansOptions) -> Fit:
    """Run scikit-learn's MiniBatchKMeans with the arguments of fairseq, `n_clusters` and `seed`.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        DataError: the frames are not finite.
    """
    _import_sklearn_cluster()  # imported first, so that errors are raised early
    centroids = sklearn_centroids(_to_numpy(frames_ND), options.n_clusters, options.seed)
    statistics = assign_pass(frames_ND, torch.from_numpy(centroids).to(options.device))
    return Fit(statistics, [statistics.inertia], 0)


def _import_sklearn_cluster() -> Any:
    try:
        import sklearn.cluster
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "sklearn") from error
    return sklearn.cluster


def sklearn_centroids(frames_ND: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Fit MiniBatchKMeans with the arguments of fairseq's learn_kmeans.py, and return centroids (K, D).

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    kmeans = _import_sklearn_cluster().MiniBatchKMeans(
        n_clusters=n_clusters,
        init="k-means++",
        max_iter=100,
        batch_size=10_000,
        tol=0.0,
        max_no_improvement=100,
        init_size=None,
        n_init=20,
        reassignment_ratio=0.0,
        compute_labels=False,
        random_state=seed,
    )
    kmeans.fit(frames_ND)
    centroids_KD: np.ndarray = kmeans.cluster_centers_.astype(np.float32)
    return centroids_KD


def _to_numpy(frames_ND: Frames) -> np.ndarray:
    """Load frames into a float32 array, and raise DataError unless all of them are finite."""
    if isinstance(frames_ND, Tensor):
        frames_ND = frames_ND.cpu().float().numpy()
    loaded_ND = np.ascontiguousarray(frames_ND[:], dtype=np.float32)
    if not np.isfinite(loaded_ND).all():
        raise not_finite_error()
    return loaded_ND
