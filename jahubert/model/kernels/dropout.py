"""Dropout from sixteen random bits an element, on a CPU.

torch draws a Bernoulli number for every element there, which takes longer than the matrix product that
the dropout follows (5 ns against 1). Other devices keep torch's own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Dropout(nn.Dropout):
    """`nn.Dropout`, faster on a CPU; `p` is rounded to a multiple of 2**-16 there."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return _Dropout.apply(x, self.p)


def keep_mask(shape: Sequence[int], p: float) -> tuple[Tensor, float]:
    """One byte an element, 0 with probability `p` and 1 otherwise; and what keeps the mean: 1 / (1 - p)."""
    count, dropped = torch.Size(shape).numel(), round(p * 2**16)
    bits = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    number = bits.view(torch.int16)[:count].view(shape)
    return (number >= dropped - 2**15).view(torch.uint8), 2**16 / (2**16 - dropped)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = keep_mask(x.shape, p)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None
