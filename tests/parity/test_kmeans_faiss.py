"""Tests of the faiss k-means backend with the faiss-gpu wheel, with and without a GPU."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from jahubert.errors import ConfigError
from jahubert.train.clustering.kmeans import assign, fit_kmeans
from jahubert.train.clustering.lloyd import KmeansOptions


@pytest.mark.stack
def test_faiss_gpu_wheel_works_without_a_gpu():
    assert importlib.metadata.version("faiss-gpu")
    generator = torch.Generator().manual_seed(0)
    centers_KD = 10 * torch.randn(6, 13, generator=generator)
    label_N = torch.arange(3_000) % 6
    frames_ND = centers_KD[label_N] + torch.randn(3_000, 13, generator=generator)
    first = fit_kmeans(frames_ND, KmeansOptions(6, backend="faiss", n_init=3, seed=1))
    second = fit_kmeans(frames_ND, KmeansOptions(6, backend="faiss", n_init=3, seed=1))
    assert first.backend == "faiss" and torch.equal(first.centroids_KD, second.centroids_KD)
    assert first.counts_K.tolist() == [500] * 6
    torch.testing.assert_close(first.inertia, 13.0, rtol=0.05, atol=0)  # 13 dimensions have unit variance
    unit_of = assign(centers_KD, first.centroids_KD)
    assert torch.equal(assign(frames_ND, first.centroids_KD), unit_of[label_N])
    ours = fit_kmeans(frames_ND, KmeansOptions(6, backend="torch", n_init=3, seed=1))
    assert first.inertia == pytest.approx(ours.inertia, rel=1e-4)


@pytest.mark.stack
def test_missing_gpu_is_rejected():
    if torch.cuda.is_available():
        pytest.skip("a GPU is available")
    with pytest.raises(ConfigError, match="GPU"):
        fit_kmeans(torch.randn(100, 4), KmeansOptions(3, backend="faiss", device="cuda"))
