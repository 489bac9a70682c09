"""Tests of k-means: planted clusters, mini-batches, several processes, and invalid input."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from jahubert.errors import ConfigError, DataError, MissingExtraError
from jahubert.train.clustering import lloyd as lloyd_module
from jahubert.train.clustering.frames import FrameFile, Subset, draw_rows
from jahubert.train.clustering.kmeans import assign, fit_kmeans, inertia
from jahubert.train.clustering.lloyd import KmeansOptions, PassStatistics, lloyd, mini_batch_pass


def planted(n_clusters: int, per_cluster: int, dim: int, spread: float = 0.1, seed: int = 0):
    """Return shuffled frames around well-separated centers, the centers, and the cluster of each frame."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((n_clusters, dim)) * 5 + 100  # all centers are far from zero
    cluster = rng.permutation(np.repeat(np.arange(n_clusters), per_cluster))
    frames = centers[cluster] + spread * rng.standard_normal((len(cluster), dim))
    return torch.from_numpy(frames.astype(np.float32)), torch.from_numpy(centers).float(), cluster


@pytest.mark.parametrize("backend", ["torch", "faiss", "sklearn"])
def test_planted_clusters_are_recovered(backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    frames, centers, cluster = planted(12, 400, 39)
    result = fit_kmeans(frames, KmeansOptions(12, backend=backend, n_init=5))
    nearest = torch.cdist(centers, result.centroids_KD).min(dim=1)
    assert nearest.values.max() < 0.1
    assert sorted(nearest.indices.tolist()) == list(range(12))
    assert result.counts_K.tolist() == [400] * 12
    assert result.inertia == pytest.approx(39 * 0.1**2, rel=0.02)
    assert result.inertia == result.history[-1] == inertia(frames, result.centroids_KD)
    labels = assign(frames, result.centroids_KD)
    assert labels.dtype == torch.int64
    assert torch.equal(nearest.indices[cluster], labels)
    assert result.backend == backend


def test_coarse_to_fine_converges_to_a_fixed_point_of_lloyd(monkeypatch):
    monkeypatch.setattr(lloyd_module, "_COARSE_MIN", 100)
    torch.manual_seed(0)
    frames = torch.randn(20_000, 5)
    result = fit_kmeans(frames, KmeansOptions(10, tol=0, max_iter=300))
    assert all(a >= b - 1e-6 for a, b in zip(result.history, result.history[1:], strict=False))
    labels = assign(frames, result.centroids_KD)
    for k in range(10):  # each centroid must be the mean of its frames
        mean = frames[labels == k].double().mean(dim=0)
        torch.testing.assert_close(result.centroids_KD[k].double(), mean, atol=1e-5, rtol=0)
    exact = (frames.double() - result.centroids_KD[labels].double()).square().sum(dim=1).mean()
    assert result.inertia == pytest.approx(float(exact), rel=1e-6)


def test_seed_determines_centroids_and_more_initializations_are_not_worse():
    torch.manual_seed(1)
    frames = torch.randn(5000, 8)
    one, two = (fit_kmeans(frames, KmeansOptions(20, seed=3)) for _ in range(2))
    assert torch.equal(one.centroids_KD, two.centroids_KD)
    assert one.history == two.history
    assert not torch.equal(one.centroids_KD, fit_kmeans(frames, KmeansOptions(20, seed=4)).centroids_KD)
    assert (
        fit_kmeans(frames, KmeansOptions(20, seed=3, n_init=8, tol=0)).inertia
        <= fit_kmeans(frames, KmeansOptions(20, seed=3, tol=0)).inertia
    )


def test_array_types_and_half_precision_give_the_same_centroids(tmp_path, monkeypatch):
    monkeypatch.setattr(lloyd_module, "_COARSE_MIN", 100)
    frames, _, _ = planted(4, 1000, 6, spread=0.5)
    frames = frames.half().float()
    np.save(tmp_path / "frames.npy", frames.half().numpy())
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    expected = fit_kmeans(frames, KmeansOptions(4))
    for same in (frames.numpy(), frames.half(), frames.double(), mapped):
        assert torch.equal(fit_kmeans(same, KmeansOptions(4)).centroids_KD, expected.centroids_KD)
        assert torch.equal(assign(same, expected.centroids_KD), assign(frames, expected.centroids_KD))


def test_distances_far_from_zero_keep_their_precision():
    torch.manual_seed(0)
    frames = torch.randn(3000, 16) * 0.01 + 1000
    centroids = frames[:50].clone()
    exact = torch.cdist(frames.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    agree = assign(frames, centroids) == exact.argmin(dim=1)
    assert agree.double().mean() > 0.999
    assert inertia(frames, centroids) == pytest.approx(
        float(exact.min(dim=1).values.square().mean()), rel=1e-3
    )


def test_empty_clusters_are_reseeded_at_the_farthest_frames():
    frames, centers, _ = planted(4, 20, 3)
    start = centers.clone()
    start[2:] = 1e4  # these centroids are far from every frame
    fit = lloyd(frames, start, max_iter=20, tol=1e-4)
    assert fit.reseeded >= 2
    assert torch.cdist(centers, fit.statistics.centroids_KD).min(dim=1).values.max() < 0.1
    assert fit.history[-1] < fit.history[0]


def test_fewer_distinct_frames_than_clusters_give_finite_centroids():
    frames = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
    result = fit_kmeans(frames, KmeansOptions(5))
    assert result.inertia == 0
    assert result.reseeded == 0
    assert result.counts_K.sum() == 100
    assert result.centroids_KD.isfinite().all()


def test_as_many_clusters_as_frames_reproduce_the_frames():
    frames, _, _ = planted(1, 30, 4)
    assert fit_kmeans(frames, KmeansOptions(30)).inertia == pytest.approx(0, abs=1e-6)
    assert assign(frames[:0], frames).tolist() == []


def test_faiss_uses_every_frame():
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    frames = torch.randn(30_000, 2)  # by default, faiss uses at most 256 frames per centroid
    result = fit_kmeans(frames, KmeansOptions(2, backend="faiss", max_iter=200))
    labels = assign(frames, result.centroids_KD)
    for k in range(2):
        torch.testing.assert_close(result.centroids_KD[k], frames[labels == k].mean(dim=0), atol=2e-3, rtol=0)


def test_invalid_input_is_rejected(monkeypatch):
    frames, _, _ = planted(2, 10, 4)
    with pytest.raises(DataError, match=r"n_clusters=21.* 20"):
        fit_kmeans(frames, KmeansOptions(21))
    with pytest.raises(ConfigError, match="backend='fais'"):
        fit_kmeans(frames, KmeansOptions(2, backend="fais"))
    with pytest.raises(ConfigError, match="n_clusters is 0"):
        fit_kmeans(frames, KmeansOptions(0))
    with pytest.raises(DataError, match="shape"):
        fit_kmeans(frames[0], KmeansOptions(2))
    with pytest.raises(DataError, match="dimensions"):
        assign(frames, frames[:2, :3])
    broken = frames.clone()
    broken[7, 1] = torch.nan
    for backend in ("torch", "sklearn"):
        with pytest.raises(DataError, match="NaN"):
            fit_kmeans(broken, KmeansOptions(2, backend=backend))
    for package, backend, extra in (("faiss", "faiss", "gpu"), ("sklearn.cluster", "sklearn", "sklearn")):
        monkeypatch.setitem(sys.modules, package, None)
        # The missing package is reported instead of the NaN, because the frames are read after the import.
        with pytest.raises(MissingExtraError, match=rf"\.\[{extra}\]"):
            fit_kmeans(broken, KmeansOptions(2, backend=backend))


@pytest.mark.parametrize(("n", "size"), [(50, 7), (50, 43), (9, 9), (5, 0)])
def test_drawn_rows_are_uniform(n, size):
    """All rows, and all pairs of neighboring rows, are drawn equally often."""
    rng, n_draws = np.random.default_rng(0), 3000
    drawn = np.zeros((n_draws, n), bool)
    for number in range(n_draws):
        rows = draw_rows(n, size, rng)
        assert len(rows) == size and np.all(np.diff(rows) > 0)
        drawn[number, rows] = True
    for frequency, expected in (
        (drawn.mean(0), size / n),
        ((drawn & np.roll(drawn, 1, axis=1)).mean(0), size * (size - 1) / n / (n - 1)),
    ):
        assert np.abs(frequency - expected).max() <= 5 * np.sqrt(abs(expected * (1 - expected)) / n_draws)


def test_drawing_few_rows_of_many_needs_little_memory():
    rows = draw_rows(6_840_000_000, 1000, np.random.default_rng(0))
    assert rows.max() > 6_000_000_000 and len(rows) == 1000


def overlapping(n: int, seed: int = 0) -> np.ndarray:
    """Return frames from 40 overlapping clusters, only 20 of which occur in the first half."""
    rng = np.random.default_rng(seed)
    centers = 3 * np.random.default_rng(5).standard_normal((40, 8))
    cluster = np.where(np.arange(n) < n // 2, rng.integers(20, size=n), rng.integers(40, size=n))
    return (centers[cluster] + rng.standard_normal((n, 8))).astype(np.float32)


def test_mini_batch_pass_improves_on_lloyd_over_a_sample(tmp_path, monkeypatch):
    """One mini-batch pass over a file achieves most of the improvement of Lloyd's algorithm on all frames."""
    monkeypatch.setattr(lloyd_module, "_COARSE_MIN", 500)
    monkeypatch.setattr(lloyd_module, "_COARSE_FRAMES", 10)
    monkeypatch.setattr(lloyd_module, "_BATCH", 256)
    np.save(tmp_path / "frames.npy", overlapping(60_000))
    frames, test = FrameFile(tmp_path / "frames.npy"), overlapping(20_000, seed=1)
    sample = Subset(frames, draw_rows(60_000, 1000, np.random.default_rng(0)))
    initial_KD = fit_kmeans(sample, KmeansOptions(40, n_init=3)).centroids_KD
    first = lloyd(sample, initial_KD, 50, 1e-4).statistics
    refined_KD = mini_batch_pass(frames, first)
    best = inertia(test, lloyd(frames, first.means_KD, 50, 1e-4).statistics.centroids_KD)
    from_sample, refined = inertia(test, first.means_KD), inertia(test, refined_KD)
    assert from_sample - best > 0.05  # there is room for improvement
    assert refined - best < 0.3 * (from_sample - best)
    result = fit_kmeans(frames, KmeansOptions(40, n_init=3, lloyd_frames=1000))
    assert inertia(test, result.centroids_KD) - best < 0.5 * (from_sample - best)
    assert result.counts_K.sum() == 60_000
    assert result.history == [pytest.approx(inertia(frames, result.centroids_KD), rel=1e-6)]
    in_memory = torch.from_numpy(np.load(tmp_path / "frames.npy"))
    again = fit_kmeans(in_memory, KmeansOptions(40, n_init=3, lloyd_frames=1000))
    assert torch.equal(again.centroids_KD, result.centroids_KD)


def test_mini_batch_pass_gives_the_mean_of_all_frames_of_a_cluster():
    """Clusters are far apart, so no frame changes its cluster. The mean includes the frames in `start`."""
    frames, centers, cluster = planted(4, 5000, 6)
    start = PassStatistics(centers, centers + 0.5, torch.tensor([5000, 0, 2500, 10_000]), 0.0)
    means_KD = torch.stack([frames[cluster == k].double().mean(0) for k in range(4)])
    weight_K1 = start.counts_K[:, None] / (start.counts_K[:, None] + 5000)
    expected = weight_K1 * start.means_KD + (1 - weight_K1) * means_KD
    torch.testing.assert_close(mini_batch_pass(frames, start), expected.float(), atol=1e-4, rtol=0)


MEMORY = """
import resource, sys
import numpy as np
from jahubert.train.clustering import kmeans, lloyd
from jahubert.train.clustering.frames import FrameFile, Subset
from jahubert.train.clustering.lloyd import KmeansOptions
lloyd._IN_MEMORY = 1 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
frames = FrameFile(sys.argv[1])
kmeans.fit_kmeans(Subset(frames, np.arange(30_000)), KmeansOptions(4, max_iter=1))
before = peak()
result = kmeans.fit_kmeans(frames, KmeansOptions(4, max_iter=2, tol=0))
assert int(result.counts_K.sum()) == len(frames)
print(peak() - before)
"""


def test_frame_file_is_never_loaded_as_a_whole(tmp_path):
    """Passes over 160 MB of frames raise the peak memory only slightly."""
    path = tmp_path / "frames.npy"
    np.save(path, np.random.default_rng(0).standard_normal((400_000, 100), dtype=np.float32))
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40


@pytest.mark.parametrize("content", [b"not an array", b""])
def test_invalid_frame_file_is_named(tmp_path, content):
    (tmp_path / "sample.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"sample\.npy"):
        FrameFile(tmp_path / "sample.npy")


SHARED = """
import sys, numpy as np
from jahubert.train.clustering import kmeans, lloyd
from jahubert.train.clustering.lloyd import KmeansOptions
from jahubert.train.experiment import distributed
lloyd._COARSE_MIN = 100
frames = np.random.default_rng(0).standard_normal((60_000, 12)).astype(np.float32)
with distributed.process_group():
    result = kmeans.fit_kmeans(frames, KmeansOptions(12, n_init=2, max_iter=8, tol=0))
    refined = kmeans.fit_kmeans(frames, KmeansOptions(12, n_init=2, max_iter=8, tol=0, lloyd_frames=20_000))
    both = np.concatenate([result.centroids_KD.numpy(), refined.centroids_KD.numpy()])
    np.save(f"{sys.argv[1]}/{distributed.world()}_{distributed.rank()}.npy", both)
"""


def test_number_of_processes_does_not_change_the_centroids(tmp_path):
    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    for world in (1, 2, 4):
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
        ]
        done = subprocess.run(
            [*launcher, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
    result = [np.load(path) for path in sorted(tmp_path.glob("*.npy"))]
    assert len(result) == 7 and len(np.unique(result[0], axis=0)) == 24
    assert all(np.array_equal(result[0], other) for other in result)
