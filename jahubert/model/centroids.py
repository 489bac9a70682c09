"""Assignment of frames to k-means centroids.

Shapes: N frames, D dimensions, K centroids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jahubert.errors import DataError
from jahubert.model.kernels.products import addmm_into


class NearestCentroid:
    """Assignment of frames to their nearest centroids, using |x - c|^2 = |x|^2 + 2 (|c|^2 / 2 - x c).

    The mean of the centroids is subtracted first, because the products lose precision if the features are far
    from zero. The methods share buffers, so several threads must not use the same object.

    Args:
        centroids_KD: float32 centroids.
    """

    def __init__(self, centroids_KD: Tensor):
        self.mean_D = centroids_KD.mean(dim=0)
        self.centered_KD = centroids_KD - self.mean_D
        self.half_norm_K = self.centered_KD.square().sum(dim=1) / 2
        self.negative_DK = -self.centered_KD.T.contiguous()
        self.block_rows = _block_rows(centroids_KD.shape, centroids_KD.device)  # frames to process at a time
        # These buffers are reused for all blocks, because allocating new pages takes time.
        self.frames_ND, self.score_NK = centroids_KD[:0], centroids_KD.new_empty(0, len(centroids_KD))
        # numpy's argmin is twice as fast as torch's, but uses a single thread.
        self.use_numpy = centroids_KD.device.type == "cpu" and torch.get_num_threads() <= 2

    @torch.no_grad()
    def labels(self, frames_ND: Tensor) -> Tensor:
        """Return the index of the nearest centroid of each frame, int64 (N,), on the centroids' device.

        Args:
            frames_ND: frames of any floating-point dtype on any device.

        Raises:
            DataError: the frames differ in dimension from the centroids.
        """
        blocks = frames_ND.split(self.block_rows)
        return torch.cat([self._label(x_ND.to(self.mean_D.device, torch.float32)) for x_ND in blocks])

    def distances(self, x_ND: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return labels (N,), squared distances (N,) and centered frames (N, D) for a block of frames.

        The centered frames are valid until the next call.

        Args:
            x_ND: float32 frames on the centroids' device.

        Raises:
            DataError: the frames differ in dimension from the centroids.
        """
        label_N = self._label(x_ND)
        least_N = self.score_NK[: len(x_ND)].gather(1, label_N[:, None])[:, 0]
        x_ND = self.frames_ND[: len(x_ND)]
        return label_N, torch.linalg.vecdot(x_ND, x_ND).add_(least_N, alpha=2).clamp_(min=0), x_ND

    def _label(self, x_ND: Tensor) -> Tensor:
        if x_ND.shape[1] != len(self.mean_D):
            raise DataError(
                f"the frames have {x_ND.shape[1]} dimensions, but the centroids have {len(self.mean_D)}: the "
                "centroids were fitted to a different feature"
            )
        if len(x_ND) > len(self.score_NK):
            self.frames_ND = torch.empty_like(x_ND)
            self.score_NK = x_ND.new_empty(len(x_ND), len(self.half_norm_K))
        score_NK, frames_ND = self.score_NK[: len(x_ND)], self.frames_ND[: len(x_ND)]
        torch.sub(x_ND, self.mean_D, out=frames_ND)
        addmm_into(score_NK, self.half_norm_K, frames_ND, self.negative_DK)
        if self.use_numpy:
            return torch.from_numpy(score_NK.numpy().argmin(axis=1))
        return score_NK.argmin(dim=1)


def _block_rows(shape_KD: torch.Size, device: torch.device) -> int:
    """Return the number of rows per block, so that distances fit in a CPU's L2 cache or keep a GPU busy."""
    budget = 1 << 18 if device.type == "cpu" else 1 << 27
    return max(1024, budget // sum(shape_KD))
