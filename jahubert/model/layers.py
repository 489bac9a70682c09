"""Modules and functions that torch lacks: masked group norm, weight norm that can be pickled, masks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from jahubert.model.kernels.indexing import index_tensors


class MaskedGroupNorm(nn.GroupNorm):
    """Group norm with one group per channel, over the valid frames of each utterance."""

    def __init__(self, channels: int):
        super().__init__(channels, channels)

    def forward(self, x_BCS: Tensor, valid_B1S: Tensor | None = None) -> Tensor:
        if valid_B1S is None:
            return super().forward(x_BCS)
        x_BCS = x_BCS.to(torch.promote_types(x_BCS.dtype, torch.float32))
        count_B11 = valid_B1S.sum(-1, keepdim=True)
        mean_BC1 = x_BCS.masked_fill(~valid_B1S, 0.0).sum(-1, keepdim=True) / count_B11
        centered_BCS = (x_BCS - mean_BC1).masked_fill(~valid_B1S, 0.0)
        variance_BC1 = centered_BCS.square().sum(-1, keepdim=True) / count_B11
        normed_BCS = centered_BCS * torch.rsqrt(variance_BC1 + self.eps)
        return normed_BCS * self.weight[:, None] + self.bias[:, None]


class WeightNorm(nn.Module):
    """A convolution's weight as norm (1, 1, K) times direction (D, D / groups, K), normalized per tap."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.original0 = nn.Parameter(torch.norm_except_dim(weight, 2, 2))
        self.original1 = nn.Parameter(weight)

    def forward(self) -> Tensor:
        if forward_ad._current_level >= 0:  # torch's fused function has no forward-mode derivative
            return self.original1 * (self.original0 / torch.norm_except_dim(self.original1, 2, 2))
        return torch._weight_norm(self.original1, self.original0, 2)


class WeightNormConv1d(nn.Module):
    """Convolution whose weight is computed by `WeightNorm`.

    State-dict names and arithmetic are those of `torch.nn.utils.parametrizations.weight_norm`, which cannot
    be pickled.
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
        return self.parametrizations["weight"]()

    def forward(self, x_BDS: Tensor) -> Tensor:
        return F.conv1d(x_BDS, self.weight, self.bias, padding=self.padding, groups=self.groups)

    def folded(self) -> nn.Conv1d:
        """An ordinary convolution with the effective weight."""
        weight = self.weight.detach()
        conv = nn.Conv1d(
            weight.shape[1] * self.groups, len(weight), self.kernel_size, padding=self.padding,
            groups=self.groups, device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        conv.load_state_dict({"weight": weight, "bias": self.bias})
        return conv.train(self.training)


def length_mask(lengths: Iterable[int], width: int, device: torch.device) -> Tensor:
    """True up to each length: (B, width)."""
    (length_B,) = index_tensors(device, list(lengths))
    return torch.arange(width, device=device) < length_B[:, None]


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """x, with its gradient multiplied by `scale`."""
    if scale == 1.0 or not x.requires_grad:
        return x
    return x * scale + x.detach() * (1 - scale)


def mean_square(x_BSC: Tensor, valid_BS: Tensor | None) -> Tensor:
    """Mean square of the valid frames, float32."""
    if valid_BS is None:
        return x_BSC.float().square().mean()
    return x_BSC.float().square().mean(-1).masked_fill(~valid_BS, 0.0).sum() / valid_BS.sum()
