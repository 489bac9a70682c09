"""k-means by other libraries, in one process: faiss, and scikit-learn with fairseq's arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from jahubert.errors import ConfigError, MissingExtraError


def import_faiss(gpu: bool) -> Any:
    """The faiss module.

    Raises:
        MissingExtraError: faiss is not installed.
        ConfigError: a GPU is asked for and faiss sees none.
    """
    try:
        import faiss
    except ImportError as error:
        raise MissingExtraError("faiss", "gpu") from error
    if gpu and not (hasattr(faiss, "get_num_gpus") and faiss.get_num_gpus()):
        # faiss itself would run on the CPU without a word
        raise ConfigError("faiss sees no GPU here (faiss-cpu?): use device=cpu or backend=torch")
    return faiss


def faiss_kmeans(
    frames_ND: np.ndarray, start_KD: np.ndarray, *, max_iter: int, seed: int, gpu: bool
) -> tuple[np.ndarray, list[float], int]:
    """Centroids (K, D), mean squared distance at each pass, and how many clusters died and were split off."""
    faiss = import_faiss(gpu)
    n_frames, dim = frames_ND.shape
    kmeans = faiss.Kmeans(
        dim,
        len(start_KD),
        niter=max_iter,
        seed=seed,
        gpu=gpu,
        min_points_per_centroid=1,
        max_points_per_centroid=math.ceil(n_frames / len(start_KD)) + 1,  # its default looks at 256 of them
    )
    kmeans.train(frames_ND, init_centroids=start_KD)
    history = [float(total) / n_frames for total in kmeans.obj]
    splits = int(np.sum([stats["nsplit"] for stats in kmeans.iteration_stats]))
    return np.array(kmeans.centroids), history, splits


def sklearn_kmeans(frames_ND: np.ndarray, n_clusters: int, seed: int) -> np.ndarray:
    """Centroids (K, D) of MiniBatchKMeans exactly as fairseq's recipe calls it (learn_kmeans.py), float32.

    Raises:
        MissingExtraError: scikit-learn is not installed.
    """
    try:
        from sklearn.cluster import MiniBatchKMeans
    except ImportError as error:
        raise MissingExtraError("scikit-learn", "train") from error
    kmeans = MiniBatchKMeans(
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
    ).fit(frames_ND)
    return kmeans.cluster_centers_.astype(np.float32)
