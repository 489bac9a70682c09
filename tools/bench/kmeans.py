"""Benchmark of k-means against scikit-learn's MiniBatchKMeans with fairseq's arguments, on the same frames.

    python tools/bench/kmeans.py                                             # 2,000,000 x 39, 100 clusters
    python tools/bench/kmeans.py --frames 300000 --dim 768 --clusters 500    # scikit-learn takes half an hour
    python tools/bench/kmeans.py --sample exp/demo/iter1/features/sample.npy # real features

The script prints the fitting times and the inertia of held-out frames for interleaved runs with different
seeds, and the ratios of the medians. Both the wall time and the CPU time of all threads are measured, because
CPU time depends less on the load of the machine. The script then assigns frames to clusters, as one array and
in utterances of 500 frames, and compares the time and the labels with those of the numpy code in fairseq's
recipe. At least 99.9 % of the labels must be the same; rounding explains the others.
"""

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from jahubert.model.centroids import NearestCentroid
from jahubert.train.clustering.kmeans import fit_kmeans
from jahubert.train.clustering.lloyd import KmeansOptions
from jahubert.train.clustering.peers import sklearn_centroids


def mixture(frames: int, dim: int, seed: int = 0) -> np.ndarray:
    """Draw frames from 300 clusters of different weights and widths, with correlated dimensions."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((dim, dim)) / np.sqrt(dim)
    centers, width = 2 * rng.standard_normal((300, dim)), rng.uniform(0.5, 1.5, 300)
    weight = rng.dirichlet(np.ones(300))
    x_ND = np.empty((frames, dim), np.float32)
    for start in range(0, frames, 100_000):
        owner = rng.choice(300, min(100_000, frames - start), p=weight)
        noise = width[owner, None] * rng.standard_normal((len(owner), dim))
        x_ND[start : start + len(owner)] = (centers[owner] + noise) @ mixing
    return x_ND


def fairseq_assign(x_ND: np.ndarray, centroids_KD: np.ndarray) -> np.ndarray:
    """Assign labels as in fairseq's recipe, by the argmin over all squared distances in numpy."""
    products_NK = np.matmul(x_ND, centroids_KD.T)
    norm_K = (centroids_KD.T**2).sum(0, keepdims=True)
    return ((x_ND**2).sum(1, keepdims=True) - 2 * products_NK + norm_K).argmin(1)


def inertia(x_ND: np.ndarray, centroids_KD: np.ndarray) -> float:
    """Compute the mean squared distance to the nearest centroid in float64, in blocks."""
    total, centroids_KD = 0.0, centroids_KD.astype(np.float64)
    for start in range(0, len(x_ND), 10_000):
        block = x_ND[start : start + 10_000].astype(np.float64)
        nearest = fairseq_assign(block, centroids_KD)
        total += float(((block - centroids_KD[nearest]) ** 2).sum())
    return total / len(x_ND)


def timed(work: Callable[[], Any]) -> tuple[np.ndarray, Any]:
    """Run `work`, and return the wall and CPU times in seconds and the result."""
    started = np.array([time.perf_counter(), time.process_time()])
    result = work()
    return np.array([time.perf_counter(), time.process_time()]) - started, result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=2_000_000)
    parser.add_argument("--dim", type=int, default=39)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--sample", help=".npy file with frames to use instead of synthetic ones")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument(
        "--n-init", type=int, default=3, help="initializations for jahubert; stage=kmeans uses 3"
    )
    parser.add_argument("--device", default="cpu", help="device for jahubert")
    parser.add_argument(
        "--threads", type=int, default=2, help="threads for jahubert; scikit-learn reads OMP_NUM_THREADS"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    x_ND = np.load(args.sample).astype(np.float32) if args.sample else mixture(args.frames, args.dim)
    held_out = np.random.default_rng(1).random(len(x_ND)) < 0.02
    fit_ND, test_ND = x_ND[~held_out], x_ND[held_out]
    print(f"{len(fit_ND)} x {x_ND.shape[1]} frames, {args.clusters} clusters, {len(test_ND)} held out")
    rows = []
    for seed in range(args.repeats):
        own_s, own = timed(
            lambda seed=seed: fit_kmeans(
                torch.from_numpy(fit_ND),
                KmeansOptions(args.clusters, n_init=args.n_init, max_iter=100, seed=seed, device=args.device),
            )
        )
        peer_s, peer_KD = timed(lambda seed=seed: sklearn_centroids(fit_ND, args.clusters, seed))
        own_inertia, peer_inertia = inertia(test_ND, own.centroids_KD.numpy()), inertia(test_ND, peer_KD)
        rows.append((own_s, peer_s, own_inertia, peer_inertia))
        print(
            f"seed {seed}: jahubert {own_s[0]:.2f} s (CPU {own_s[1]:.2f}), inertia {own_inertia:.3f}; "
            f"scikit-learn {peer_s[0]:.2f} s (CPU {peer_s[1]:.2f}), inertia {peer_inertia:.3f}",
            flush=True,
        )
    own_s, peer_s, own_inertia, peer_inertia = (np.median(x, axis=0) for x in zip(*rows, strict=True))
    ratio = peer_s / own_s
    print(
        f"fit: speedup {ratio[0]:.1f} in wall time, {ratio[1]:.1f} in CPU time; "
        f"relative inertia {own_inertia / peer_inertia:.4f}"
    )

    for size in (200_000, 500):
        assignment(fit_ND[:200_000], size, own.centroids_KD.to(args.device))


def assignment(frames_ND: np.ndarray, size: int, centroids_KD: torch.Tensor) -> None:
    """Assign all frames, `size` frames at a time, and compare the labels and the times."""
    parts = [frames_ND[start : start + size] for start in range(0, len(frames_ND), size)]
    peer_KD, times = centroids_KD.cpu().numpy(), []
    for _ in range(6):
        nearest = NearestCentroid(centroids_KD)
        own_s, own = timed(lambda: [nearest.labels(torch.from_numpy(x_ND)).cpu() for x_ND in parts])  # noqa: B023
        peer_s, peer = timed(lambda: [fairseq_assign(x_ND, peer_KD) for x_ND in parts])
        times.append([own_s, peer_s])
    same = float(np.mean(np.concatenate(own) == np.concatenate(peer)))
    own_s, peer_s = np.median(times[1:], axis=0)
    print(
        f"labels of {len(frames_ND)} frames, {size} at a time: "
        f"jahubert {own_s[0]:.3f} s (CPU {own_s[1]:.3f}), "
        f"numpy {peer_s[0]:.3f} s (CPU {peer_s[1]:.3f}), speedup {peer_s[0] / own_s[0]:.1f}; "
        f"{same:.6f} of the labels equal"
    )
    if same < 0.999:
        raise SystemExit("parity check failed: more labels differ than rounding explains")


if __name__ == "__main__":
    main()
