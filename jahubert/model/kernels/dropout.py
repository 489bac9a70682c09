"""CPU dropout that uses sixteen random bits per element.

torch draws a Bernoulli sample per element on a CPU, which takes longer than the preceding matrix product
(5 ns compared with 1 ns per element). Other devices use torch's own dropout, except in the Triton kernel of
`layer_norm.residual_norm`, which rounds probabilities in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def dropout(module: nn.Dropout, x: Tensor) -> Tensor:
    """Apply the dropout `module` to `x`. On a CPU, `p` is rounded to a multiple of 2**-16."""
    if not module.training or module.p == 0.0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, module.p)
    dropped: Tensor = _Dropout.apply(x, module.p)
    return dropped


def threshold(p: float) -> int:
    """Return the number of 16-bit integers, of 2**16, for which an element is dropped."""
    return round(p * 2**16)


def keep_probability(p: float) -> float:
    """Return 1 - p, with `p` rounded to a multiple of 2**-16."""
    return 1 - threshold(p) / 2**16


def keep_mask(shape: Sequence[int], p: float) -> Tensor:
    """Draw a uint8 mask whose elements are 1 with probability `keep_probability(p)`, and otherwise 0."""
    count = torch.Size(shape).numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device="cpu").random_(-(2**63), None)
    number = bits.view(torch.int16)[:count].view(shape)
    return (number >= threshold(p) - 2**15).view(torch.uint8)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        keep, ctx.scale = keep_mask(x.shape, p), 1 / keep_probability(p)
        ctx.save_for_backward(keep)
        return (x * keep).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (keep,) = ctx.saved_tensors
        return (grad * keep).mul_(ctx.scale), None
