"""Convolution with weight norm, as an ordinary module."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F


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
