"""Feed-forward network that, without inner dropout, recomputes GELU in the backward pass to save memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jahubert.model.kernels.double_backward import with_double_backward
from jahubert.model.kernels.dropout import dropout
from jahubert.model.kernels.gelu import gelu_backward
from jahubert.model.kernels.products import column_sum, matmul, product
from jahubert.model.kernels.weights import linear, weight_copy

if TYPE_CHECKING:
    from jahubert.model.hubert import FeedForward


def feed_forward(module: FeedForward, x_ND: Tensor) -> Tensor:
    inner = linear(x_ND, module.intermediate_dense)
    output, inner_dropout = module.output_dense, module.intermediate_dropout
    if (
        torch.is_grad_enabled()
        and output.bias is not None
        and not (inner_dropout.training and inner_dropout.p)
    ):
        inputs = inner, weight_copy(inner.dtype, output.weight), weight_copy(inner.dtype, output.bias)
        return with_double_backward(_GeluLinear.apply(*inputs), _gelu_linear, *inputs)
    return product(dropout(inner_dropout, F.gelu(inner)), output.weight, output.bias)


def _gelu_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(F.gelu(x), weight, bias)


class _GeluLinear(torch.autograd.Function):
    """Linear layer applied to GELU(x), which is recomputed in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_x = matmul(grad, weight)
        grad_weight = matmul(grad.T, gelu_backward(x, grad_x))
        return grad_x, grad_weight, column_sum(grad)
