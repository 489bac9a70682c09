"""Backward pass of GELU that also recomputes its output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.model.kernels.dispatch import triton_kernels_for


def gelu_backward(x: Tensor, grad: Tensor) -> Tensor:
    """Return GELU(x), and multiply `grad` by the derivative of GELU at x in place."""
    kernels = triton_kernels_for(x) if grad.is_contiguous() else None
    if kernels is not None:
        activated: Tensor = kernels.gelu_backward(x, grad)
        return activated
    activated = F.gelu(x)
    torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)
    return activated
