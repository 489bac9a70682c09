"""Matrix products and sums over rows that are faster than torch's on some devices.

torch computes float32 products with MKL, which is half as fast as oneDNN on AMD processors with AVX-512
(`tools/bench/products.py`). On CUDA, a Triton kernel computes the bias gradients of 16-bit products. On other
devices and processors, and for other dtypes and small products, the functions call torch's operators.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from jahubert.model.kernels.dispatch import is_tracing, triton_kernels_for
from jahubert.model.kernels.double_backward import is_differentiated, plain_gradients
from jahubert.model.precision import autocast_dtype, cpu_is_amd

MIN_MULTIPLICATIONS = 2**20  # below this, calling oneDNN takes more time than the product


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x (N, I) @ weight (O, I).T + bias, with first and second derivatives."""
    if torch.is_grad_enabled() and (_uses_onednn(x, weight) or _has_fast_bias_gradient(x, weight, bias)):
        output: Tensor = _Linear.apply(x, weight, bias)
        return output
    return _linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Compute a (N, K) @ b (K, O), without derivatives."""
    return _onednn_linear(a, b.T) if _uses_onednn(a, b) else a @ b


def matmul_into(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """Write a (N, K) @ b (K, O) to `out`, or add it to `out`, without derivatives."""
    if not _uses_onednn(a, b):
        out.addmm_(a, b, beta=int(add))
    elif add:
        out.add_(_onednn_linear(a, b.T))
    else:
        out.copy_(_onednn_linear(a, b.T))


def addmm_into(out: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> None:
    """Write bias (O,) + a (N, K) @ b (K, O) to `out`, without derivatives."""
    if _uses_onednn(a, b):
        out.copy_(_onednn_linear(a, b.T, bias))
    else:
        torch.addmm(bias, a, b, out=out)


def column_sum(x_ND: Tensor) -> Tensor:
    """Sum over the rows, without derivatives."""
    kernels = triton_kernels_for(x_ND)
    total_D: Tensor = x_ND.sum(0) if kernels is None else kernels.column_sum(x_ND)
    return total_D


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if is_differentiated(grad):
            return plain_gradients(F.linear, ctx.saved_tensors, ctx.needs_input_grad, grad)
        x, weight, _ = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            matmul(grad, weight) if needs_x else None,
            matmul(grad.T, x) if needs_weight else None,
            column_sum(grad) if needs_bias else None,
        )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn_linear(x, weight, bias) if _uses_onednn(x, weight) else F.linear(x, weight, bias)


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _uses_onednn(a: Tensor, b: Tensor) -> bool:
    return (
        not is_tracing()  # first, because torch.compile would make a graph for each result of the conditions
        and a.device.type == "cpu"
        and a.dtype is b.dtype is torch.float32
        and autocast_dtype(a) is torch.float32
        and a.shape[0] * b.numel() >= MIN_MULTIPLICATIONS
        and onednn_is_faster()
    )


def _has_fast_bias_gradient(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether a linear layer has a bias whose gradient a Triton kernel computes."""
    if bias is None or triton_kernels_for(x) is None:
        return False
    return x.dtype is weight.dtype is bias.dtype is autocast_dtype(x)


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Return whether torch's products use MKL on an AMD processor and oneDNN can replace it."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # a private operator
        return False
    return cpu_is_amd()
