"""Tests of the assignment of frames to their nearest centroids."""

from __future__ import annotations

import pytest
import torch

from jahubert.errors import DataError
from jahubert.model.centroids import NearestCentroid


@pytest.fixture
def planted():
    """Return frames far from zero, their centroids and the index of the centroid of each frame."""
    torch.manual_seed(0)
    centroids_KD = 100 + 20 * torch.randn(30, 16)
    label_N = torch.randint(30, (3000,))
    return centroids_KD[label_N] + torch.randn(3000, 16), centroids_KD, label_N


@pytest.mark.parametrize("n_threads", [1, 3])  # numpy computes the argmin for up to two threads
def test_labels_for_all_layouts_and_dtypes(planted, n_threads):
    frames_ND, centroids_KD, label_N = planted
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        nearest = NearestCentroid(centroids_KD)
        for frames, expected in (
            (frames_ND[:0], label_N[:0]),
            (frames_ND[:1], label_N[:1]),
            (frames_ND, label_N),
            (frames_ND[::2], label_N[::2]),
            (frames_ND.T.contiguous().T, label_N),
            (frames_ND.bfloat16(), label_N),
            (frames_ND.double(), label_N),
            (frames_ND.clone().requires_grad_(), label_N),
        ):
            labels_N = nearest.labels(frames)
            assert labels_N.dtype == torch.int64 and torch.equal(labels_N, expected)
    finally:
        torch.set_num_threads(before)


def test_labels_under_autocast_have_full_precision(planted):
    frames_ND, centroids_KD, _ = planted
    close_KD = centroids_KD[:1] + 1e-3 * torch.randn(30, 16)  # differences that bfloat16 cannot represent
    expected_N = NearestCentroid(close_KD).labels(frames_ND)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(NearestCentroid(close_KD).labels(frames_ND), expected_N)


def test_distances_and_centered_frames(planted):
    frames_ND, centroids_KD, label_N = planted
    nearest = NearestCentroid(centroids_KD)
    labels_N, distance_N, centered_ND = nearest.distances(frames_ND)
    assert torch.equal(labels_N, label_N)
    torch.testing.assert_close(
        distance_N, (frames_ND - centroids_KD[label_N]).square().sum(1), rtol=1e-3, atol=0
    )
    torch.testing.assert_close(centered_ND, frames_ND - centroids_KD.mean(0))


def test_frames_of_another_dimension_are_rejected(planted):
    _, centroids_KD, _ = planted
    with pytest.raises(DataError, match=r"17 dimensions.* 16"):
        NearestCentroid(centroids_KD).labels(torch.zeros(2, 17))
