"""k-means: planted clusters are found, by every backend, and nothing is done silently."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from jahubert.errors import ConfigError, DataError, MissingExtraError
from jahubert.train.clustering import kmeans as module
from jahubert.train.clustering import lloyd as lloyd_module
from jahubert.train.clustering.kmeans import assign, draw_rows, fit_kmeans, inertia
from jahubert.train.clustering.lloyd import Fitted, FrameFile, Subset, lloyd, refine


def planted(n_clusters: int, per_cluster: int, dim: int, spread: float = 0.1, seed: int = 0):
    """Shuffled frames around well-separated centres, the centres, and which frame belongs where."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((n_clusters, dim)) * 5 + 100  # far from zero on purpose
    owner = rng.permutation(np.repeat(np.arange(n_clusters), per_cluster))
    frames = centres[owner] + spread * rng.standard_normal((len(owner), dim))
    return torch.from_numpy(frames.astype(np.float32)), torch.from_numpy(centres).float(), owner


@pytest.mark.parametrize("backend", ["auto", "torch", "faiss", "sklearn"])
def test_planted_clusters_are_found(backend):
    if backend == "faiss":
        pytest.importorskip("faiss")
    frames, centres, owner = planted(12, 400, 39)
    found = fit_kmeans(frames, 12, backend=backend, n_init=5)
    nearest = torch.cdist(centres, found.centroids_KD).min(dim=1)
    assert nearest.values.max() < 0.1
    assert sorted(nearest.indices.tolist()) == list(range(12))
    assert found.counts_K.tolist() == [400] * 12
    assert found.inertia == pytest.approx(39 * 0.1**2, rel=0.02)
    assert found.inertia == found.history[-1] == inertia(frames, found.centroids_KD)
    labels = assign(frames, found.centroids_KD)
    assert labels.dtype == torch.int64
    assert torch.equal(nearest.indices[owner], labels)
    assert found.backend == ("torch" if backend == "auto" else backend)


def test_coarse_to_fine_ends_where_plain_lloyd_cannot_improve(monkeypatch):
    monkeypatch.setattr(module, "_COARSE_MIN", 100)
    torch.manual_seed(0)
    frames = torch.randn(20_000, 5)
    found = fit_kmeans(frames, 10, tol=0, max_iter=300)
    assert all(a >= b - 1e-6 for a, b in zip(found.history, found.history[1:], strict=False))
    labels = assign(frames, found.centroids_KD)
    for k in range(10):  # a fixed point: each centroid is the mean of its frames
        mean = frames[labels == k].double().mean(dim=0)
        torch.testing.assert_close(found.centroids_KD[k].double(), mean, atol=1e-5, rtol=0)
    exact = (frames.double() - found.centroids_KD[labels].double()).square().sum(dim=1).mean()
    assert found.inertia == pytest.approx(float(exact), rel=1e-6)


def test_same_seed_same_centroids_and_more_starts_are_not_worse():
    torch.manual_seed(1)
    frames = torch.randn(5000, 8)
    one, two = (fit_kmeans(frames, 20, seed=3) for _ in range(2))
    assert torch.equal(one.centroids_KD, two.centroids_KD)
    assert one.history == two.history
    assert not torch.equal(one.centroids_KD, fit_kmeans(frames, 20, seed=4).centroids_KD)
    assert (
        fit_kmeans(frames, 20, seed=3, n_init=8, tol=0).inertia
        <= fit_kmeans(frames, 20, seed=3, tol=0).inertia
    )


def test_arrays_maps_and_half_precision_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_COARSE_MIN", 100)
    frames, _, _ = planted(4, 1000, 6, spread=0.5)
    frames = frames.half().float()
    np.save(tmp_path / "frames.npy", frames.half().numpy())
    mapped = np.load(tmp_path / "frames.npy", mmap_mode="r")
    expected = fit_kmeans(frames, 4)
    for same in (frames.numpy(), frames.half(), frames.double(), mapped):
        assert torch.equal(fit_kmeans(same, 4).centroids_KD, expected.centroids_KD)
        assert torch.equal(assign(same, expected.centroids_KD), assign(frames, expected.centroids_KD))


def test_distances_far_from_zero_keep_their_digits():
    torch.manual_seed(0)
    frames = torch.randn(3000, 16) * 0.01 + 1000
    centroids = frames[:50].clone()
    exact = torch.cdist(frames.double(), centroids.double(), compute_mode="donot_use_mm_for_euclid_dist")
    agree = assign(frames, centroids) == exact.argmin(dim=1)
    assert agree.double().mean() > 0.999
    assert inertia(frames, centroids) == pytest.approx(
        float(exact.min(dim=1).values.square().mean()), rel=1e-3
    )


def test_dead_clusters_start_again_at_the_farthest_frames_and_are_counted():
    frames, centres, _ = planted(4, 20, 3)
    start = centres.clone()
    start[2:] = 1e4  # nobody's nearest
    fitted, history, reseeded = lloyd(frames, start, max_iter=20, tol=1e-4)
    assert reseeded >= 2
    assert torch.cdist(centres, fitted.centroids_KD).min(dim=1).values.max() < 0.1
    assert history[-1] < history[0]


def test_fewer_distinct_frames_than_clusters():
    frames = torch.tensor([[0.0, 0.0], [1.0, 1.0]]).repeat(50, 1)
    found = fit_kmeans(frames, 5)
    assert found.inertia == 0
    assert found.reseeded == 0
    assert found.counts_K.sum() == 100
    assert found.centroids_KD.isfinite().all()


def test_as_many_clusters_as_frames():
    frames, _, _ = planted(1, 30, 4)
    assert fit_kmeans(frames, 30).inertia == pytest.approx(0, abs=1e-6)
    assert assign(frames[:0], frames).tolist() == []


def test_faiss_sees_every_frame():
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    frames = torch.randn(30_000, 2)  # 256 a centroid would be 512 frames
    found = fit_kmeans(frames, 2, backend="faiss", max_iter=200)
    labels = assign(frames, found.centroids_KD)
    for k in range(2):
        torch.testing.assert_close(found.centroids_KD[k], frames[labels == k].mean(dim=0), atol=2e-3, rtol=0)


def test_what_cannot_work_is_refused(monkeypatch):
    frames, _, _ = planted(2, 10, 4)
    with pytest.raises(DataError, match="20 frames cannot make 21 clusters"):
        fit_kmeans(frames, 21)
    with pytest.raises(ConfigError, match=r"no k-means backend 'fais'.*faiss"):
        fit_kmeans(frames, 2, backend="fais")
    with pytest.raises(ConfigError, match="must be positive"):
        fit_kmeans(frames, 0)
    with pytest.raises(DataError, match=r"must be \(N, D\)"):
        fit_kmeans(frames[0], 2)
    with pytest.raises(DataError, match="another feature"):
        assign(frames, frames[:2, :3])
    frames[7, 1] = torch.nan
    with pytest.raises(DataError, match="NaN"):
        fit_kmeans(frames, 2)
    for package, backend, extra in (("faiss", "faiss", "gpu"), ("sklearn.cluster", "sklearn", "train")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(MissingExtraError, match=rf"jahubert\[{extra}\]"):
            fit_kmeans(frames, 2, backend=backend)


@pytest.mark.parametrize(("n", "size"), [(50, 7), (50, 43), (9, 9), (5, 0)])
def test_drawn_rows_are_all_equally_likely(n, size):
    """Each row is in a draw as often as each other one, and so is each pair of neighbours."""
    rng, n_draws = np.random.default_rng(0), 3000
    drawn = np.zeros((n_draws, n), bool)
    for number in range(n_draws):
        rows = draw_rows(n, size, rng)
        assert len(rows) == size and np.all(np.diff(rows) > 0)
        drawn[number, rows] = True
    for seen, expected in (
        (drawn.mean(0), size / n),
        ((drawn & np.roll(drawn, 1, axis=1)).mean(0), size * (size - 1) / n / (n - 1)),
    ):
        assert np.abs(seen - expected).max() <= 5 * np.sqrt(abs(expected * (1 - expected)) / n_draws)


def test_drawing_a_few_out_of_very_many_needs_no_memory():
    rows = draw_rows(6_840_000_000, 1000, np.random.default_rng(0))
    assert rows.max() > 6_000_000_000 and len(rows) == 1000


def overlapping(n: int, seed: int = 0) -> np.ndarray:
    """Frames of 40 wide clusters, of which the first half of the file has only 20."""
    rng = np.random.default_rng(seed)
    centres = 3 * np.random.default_rng(5).standard_normal((40, 8))
    owner = np.where(np.arange(n) < n // 2, rng.integers(20, size=n), rng.integers(40, size=n))
    return (centres[owner] + rng.standard_normal((n, 8))).astype(np.float32)


def test_mini_batches_take_what_lloyd_did_not_see(tmp_path, monkeypatch):
    """One pass of them over a file does most of what Lloyd's passes over it would do from the same start."""
    monkeypatch.setattr(module, "_COARSE_MIN", 500)
    monkeypatch.setattr(module, "_COARSE_FRAMES", 10)
    monkeypatch.setattr(lloyd_module, "_BATCH", 256)
    np.save(tmp_path / "frames.npy", overlapping(60_000))
    frames, test = FrameFile(tmp_path / "frames.npy"), overlapping(20_000, seed=1)
    part = Subset(frames, draw_rows(60_000, 1000, np.random.default_rng(0)))
    first = lloyd(part, fit_kmeans(part, 40, n_init=3).centroids_KD, 50, 1e-4)[0]
    refined = refine(frames, first)
    best = inertia(test, lloyd(frames, first.means_KD, 50, 1e-4)[0].centroids_KD)
    on_part, on_all = inertia(test, first.means_KD), inertia(test, refined)
    assert on_part - best > 0.05  # there was something to gain
    assert on_all - best < 0.3 * (on_part - best)
    found = fit_kmeans(frames, 40, n_init=3, lloyd_frames=1000)
    assert inertia(test, found.centroids_KD) - best < 0.5 * (on_part - best)
    assert found.counts_K.sum() == 60_000
    assert found.history == [pytest.approx(inertia(frames, found.centroids_KD), rel=1e-6)]
    in_memory = torch.from_numpy(np.load(tmp_path / "frames.npy"))
    again = fit_kmeans(in_memory, 40, n_init=3, lloyd_frames=1000)
    assert torch.equal(again.centroids_KD, found.centroids_KD)


def test_a_refined_centroid_is_the_mean_of_all_its_frames():
    """With clusters so far apart that nothing changes hands: the start counts as often as it was seen."""
    frames, centres, owner = planted(4, 5000, 6)
    start = Fitted(centres, centres + 0.5, torch.tensor([5000, 0, 2500, 10_000]), 0.0)
    means_KD = torch.stack([frames[owner == k].double().mean(0) for k in range(4)])
    weight_K1 = start.counts_K[:, None] / (start.counts_K[:, None] + 5000)
    expected = weight_K1 * start.means_KD + (1 - weight_K1) * means_KD
    torch.testing.assert_close(refine(frames, start), expected.float(), atol=1e-4, rtol=0)


MEMORY = """
import resource, sys
import numpy as np
from jahubert.train.clustering import kmeans
from jahubert.train.clustering import lloyd
kmeans._HELD = 1 << 20
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
frames = lloyd.FrameFile(sys.argv[1])
kmeans.fit_kmeans(lloyd.Subset(frames, np.arange(30_000)), 4, max_iter=1)
before = peak()
found = kmeans.fit_kmeans(frames, 4, max_iter=2, tol=0)
assert int(found.counts_K.sum()) == len(frames)
print(peak() - before)
"""


def test_a_file_of_frames_is_never_in_memory(tmp_path):
    """Passes over 160 MB raise the peak of a process by a small part of that."""
    path = tmp_path / "frames.npy"
    np.save(path, np.random.default_rng(0).standard_normal((400_000, 100), dtype=np.float32))
    command = [sys.executable, "-c", MEMORY, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40


def test_a_file_that_is_no_array_is_named(tmp_path):
    (tmp_path / "sample.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match=r"sample\.npy: not a \.npy file"):
        FrameFile(tmp_path / "sample.npy")


SHARED = """
import sys, numpy as np
from jahubert.train.clustering import kmeans
from jahubert.train.experiment import distributed
kmeans._COARSE_MIN = 100
frames = np.random.default_rng(0).standard_normal((60_000, 12)).astype(np.float32)
with distributed.process_group():
    found = kmeans.fit_kmeans(frames, 12, n_init=2, max_iter=8, tol=0)
    refined = kmeans.fit_kmeans(frames, 12, n_init=2, max_iter=8, tol=0, lloyd_frames=20_000)
    both = np.concatenate([found.centroids_KD.numpy(), refined.centroids_KD.numpy()])
    np.save(f"{sys.argv[1]}/{distributed.world()}_{distributed.rank()}.npy", both)
"""


def test_any_number_of_processes_gives_the_same_centroids(tmp_path):
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
    found = [np.load(path) for path in sorted(tmp_path.glob("*.npy"))]
    assert len(found) == 7 and len(np.unique(found[0], axis=0)) == 24
    assert all(np.array_equal(found[0], other) for other in found)
