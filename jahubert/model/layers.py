"""Layers and functions that torch lacks, such as masked group norm and picklable weight norm."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from jahubert.model.kernels.indexing import index_tensors
from jahubert.model.precision import at_least_float32


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm with one group per channel, computed over the valid frames of each utterance."""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x_BCS: Tensor, valid_B1S: Tensor | None = None) -> Tensor:
        if valid_B1S is None:
            return super().forward(x_BCS)
        normed_BCS = standardize(at_least_float32(x_BCS), valid_B1S, self.eps)
        return normed_BCS * self.weight[:, None] + self.bias[:, None]


class WeightNorm(nn.Module):
    """Convolution weight with one norm per tap (1, 1, K) and a separate direction (D, D / groups, K)."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.original0 = nn.Parameter(torch.norm_except_dim(weight, 2, 2))
        self.original1 = nn.Parameter(weight)

    def forward(self) -> Tensor:
        if forward_ad._current_level >= 0:  # torch._weight_norm has no forward-mode derivative
            return self.original1 * (self.original0 / torch.norm_except_dim(self.original1, 2, 2))
        return torch._weight_norm(self.original1, self.original0, 2)


class WeightNormConv1d(nn.Module):
    """Convolution whose weight is computed by `WeightNorm`.

    State-dict names and arithmetic are the same as in `torch.nn.utils.parametrizations.weight_norm`, which
    cannot be pickled.
    """

    def __init__(self, conv: nn.Conv1d):
        super().__init__()
        self.kernel_size = cast("tuple[int]", conv.kernel_size)
        self.padding = cast("tuple[int]", conv.padding)
        self.groups = conv.groups
        self.bias = cast(nn.Parameter, conv.bias)
        self.parametrizations = nn.ModuleDict({"weight": WeightNorm(conv.weight.detach())})

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self.parametrizations["weight"]()
        return weight

    def forward(self, x_BDS: Tensor) -> Tensor:
        return F.conv1d(x_BDS, self.weight, self.bias, padding=self.padding, groups=self.groups)

    def folded(self) -> nn.Conv1d:
        """Return an ordinary convolution with the effective weight."""
        weight = self.weight.detach()
        conv = nn.Conv1d(
            weight.shape[1] * self.groups, len(weight), self.kernel_size, padding=self.padding,
            groups=self.groups, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        conv.load_state_dict({"weight": weight, "bias": self.bias})
        return conv.train(self.training)


def standardize(x: Tensor, valid: Tensor, eps: float) -> Tensor:
    """Normalize the valid values in the last dimension to mean 0 and variance 1, and set others to zero."""
    count = valid.sum(-1, keepdim=True)
    mean = x.masked_fill(~valid, 0.0).sum(-1, keepdim=True) / count
    centered = (x - mean).masked_fill(~valid, 0.0)
    variance = centered.square().sum(-1, keepdim=True) / count
    return centered * torch.rsqrt(variance + eps)


def length_tensor(lengths: Iterable[int] | Tensor, device: torch.device) -> Tensor:
    """Return lengths as an int64 tensor (B,) on `device`."""
    if isinstance(lengths, Tensor):
        return lengths.to(device, torch.int64)
    (length_B,) = index_tensors(device, list(lengths))
    return length_B


def length_mask(length_B: Tensor, width: int) -> Tensor:
    """Return a mask (B, width) that is True at positions below each length."""
    return torch.arange(width, device=length_B.device) < length_B[:, None]


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return `x` (up to rounding), and multiply its gradient by `scale` in the backward pass."""
    if scale == 1.0 or not x.requires_grad:
        return x
    return x * scale + x.detach() * (1 - scale)


def mean_square(x_BSC: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Return the mean square (B,) of the valid frames of each utterance in float32."""
    square_BS = x_BSC.float().square().mean(-1)
    if valid_BS is None:
        return square_BS.mean(-1)
    return square_BS.masked_fill(~valid_BS, 0.0).sum(-1) / valid_BS.sum(-1)
