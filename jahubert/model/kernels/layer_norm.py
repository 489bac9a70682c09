"""Layer norm that keeps bfloat16 under autocast, also in one kernel with the preceding residual sum.

On CUDA, autocast computes `nn.LayerNorm` in float32 and returns float32. The next matrix product would need
a cast and, in post-norm models, the residual stream would be in float32. On a CPU, torch keeps bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model.kernels.dispatch import triton_kernels_for
from jahubert.model.kernels.double_backward import is_differentiated, plain_gradients
from jahubert.model.kernels.dropout import dropout
from jahubert.model.kernels.weights import weight_copy
from jahubert.model.precision import autocast_dtype

# Devices whose layer norm keeps the dtype (cpu), without autocast (meta) or without a test (mps).
_UNCHANGED = ("cpu", "meta", "mps")


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the layer norm `module`, in the dtype of `x` if autocast and `x` are in bfloat16."""
    if _computes_in_bfloat16(x):
        return same_dtype_layer_norm(module, x)
    normed: Tensor = module(x)
    return normed


def _computes_in_bfloat16(x: Tensor) -> bool:
    if x.dtype is not torch.bfloat16 or x.device.type in _UNCHANGED:
        return False
    return autocast_dtype(x) is torch.bfloat16


def same_dtype_layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the layer norm `module` with weights in the dtype of `x`, mean and variance in float32 (CUDA)."""
    weight, bias = (
        None if parameter is None else weight_copy(x.dtype, parameter)
        for parameter in (module.weight, module.bias)
    )
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)


def residual_norm(
    norm: nn.LayerNorm, drop: nn.Dropout, x_ND: Tensor, residual_ND: Tensor
) -> tuple[Tensor, Tensor]:
    """Compute norm(residual + drop(x)).

    Returns:
        The normalized sum, and the sum.
    """
    in_bfloat16 = _computes_in_bfloat16(x_ND) and residual_ND.dtype is torch.bfloat16
    kernels = triton_kernels_for(x_ND) if torch.is_grad_enabled() and in_bfloat16 else None
    if kernels is None or norm.bias is None:
        sum_ND = residual_ND + dropout(drop, x_ND)
        return layer_norm(norm, sum_ND), sum_ND
    p = drop.p if drop.training else 0.0
    # The seed remains on the device, and is a function of the state of torch's generator.
    seed = torch.randint(2**63 - 1, (1,), device=x_ND.device) if p else None
    normed_ND: Tensor
    normed_ND, sum_ND = _ResidualNorm.apply(
        x_ND, residual_ND, norm.weight, norm.bias, norm.eps, seed, p, kernels
    )
    return normed_ND, sum_ND


class _ResidualNorm(torch.autograd.Function):
    """Function from x and the residual to the normalized sum and the sum, of which only the sum is stored."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        seed: Tensor | None,
        p: float,
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        sum_, normed, moments = kernels.residual_norm(x, residual.contiguous(), weight, bias, eps, seed, p)
        ctx.save_for_backward(sum_, weight, bias, moments, seed)
        ctx.eps, ctx.p, ctx.kernels = eps, p, kernels
        ctx.set_materialize_grads(False)
        return normed, sum_

    @staticmethod
    def backward(ctx: Any, grad_normed: Tensor | None, grad_sum: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_, weight, bias, moments, seed = ctx.saved_tensors
        grad_weights: Sequence[Tensor | None] = None, None
        if grad_normed is not None and not is_differentiated(grad_normed):
            grad_sum = None if grad_sum is None else grad_sum.contiguous()
            grad_x, grad_sum, grad_weights = ctx.kernels.residual_norm_backward(
                grad_normed.contiguous(), grad_sum, sum_, weight, moments, seed, ctx.p
            )
            return grad_x, grad_sum, *grad_weights, None, None, None, None
        if grad_normed is not None:
            needed = any(ctx.needs_input_grad[:2]), *ctx.needs_input_grad[2:4]
            plain = partial(_plain_norm, eps=ctx.eps)
            grad, *grad_weights = plain_gradients(plain, (sum_, weight, bias), needed, grad_normed)
            grad_sum = grad if grad_sum is None or grad is None else grad_sum + grad
        grad_x = grad_sum
        if seed is not None and grad_sum is not None:
            scale = ctx.kernels.dropout_scale(sum_, seed, ctx.p)
            grad_x = (grad_sum * scale).to(grad_sum.dtype)
        return grad_x, grad_sum, *grad_weights, None, None, None, None


def _plain_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight.to(x.dtype), bias.to(x.dtype), eps)
