"""faiss-gpu, the wheel of the full stack, also serves a machine without a GPU."""

from __future__ import annotations

import importlib.metadata

import pytest
import torch

from jahubert.errors import ConfigError
from jahubert.train.clustering.kmeans import assign, fit_kmeans


@pytest.mark.stack
def test_faiss_gpu_without_a_gpu():
    assert importlib.metadata.version("faiss-gpu")
    generator = torch.Generator().manual_seed(0)
    centres_KD = 10 * torch.randn(6, 13, generator=generator)
    label_N = torch.arange(3_000) % 6
    frames_ND = centres_KD[label_N] + torch.randn(3_000, 13, generator=generator)
    found = fit_kmeans(frames_ND, 6, backend="faiss", n_init=3, seed=1)
    again = fit_kmeans(frames_ND, 6, backend="faiss", n_init=3, seed=1)
    assert found.backend == "faiss" and torch.equal(found.centroids_KD, again.centroids_KD)
    assert found.counts_K.tolist() == [500] * 6
    torch.testing.assert_close(found.inertia, 13.0, rtol=0.05, atol=0)  # the noise's 13 variances of one
    unit_of = assign(centres_KD, found.centroids_KD)
    assert torch.equal(assign(frames_ND, found.centroids_KD), unit_of[label_N])
    ours = fit_kmeans(frames_ND, 6, backend="torch", n_init=3, seed=1)
    assert found.inertia == pytest.approx(ours.inertia, rel=1e-4)


@pytest.mark.stack
def test_a_gpu_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="GPU"):
        fit_kmeans(torch.randn(100, 4), 3, backend="faiss", device="cuda")
