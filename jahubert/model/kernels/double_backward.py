"""Second and higher derivatives for kernels that have only a first derivative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from jahubert.model.kernels.dispatch import is_tracing, is_transformed


def with_double_backward(output: Tensor, plain: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
    """Return the output of a kernel, with a double backward that differentiates `plain(*inputs)`.

    An ordinary backward pass uses the gradient of the kernel. With `create_graph=True` (or
    `is_grads_batched=True`), the backward pass recomputes the output with `plain`, which consists of
    differentiable operators, and differentiates the result. This takes no additional memory if the kernel
    saves the same inputs for its own gradient.
    """
    if not torch.is_grad_enabled() or not output.requires_grad or is_tracing() or is_transformed():
        return output
    switched: Tensor = _Switch.apply(output, plain, *inputs)
    return switched


def is_differentiated(grad: Tensor) -> bool:
    """Return whether the backward pass of a kernel has to use differentiable operators.

    This is the case with `create_graph=True` and with `is_grads_batched=True`.
    """
    functorch = torch._C._functorch
    vectorized = functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
    return torch.is_grad_enabled() or bool(vectorized)


def plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Recompute `plain(*inputs)`, and return differentiable gradients of the inputs that are needed."""
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # Aliases are used so that the gradient of an input excludes the paths through other inputs.
        aliases = [None if x is None else x.view_as(x) for x in inputs]
        differentiated = [
            x for x, is_needed in zip(aliases, needed, strict=True) if is_needed and x is not None
        ]
        grads = torch.autograd.grad(plain(*aliases), differentiated, grad, create_graph=True)
    remaining = iter(grads)
    return tuple(next(remaining) if is_needed else None for is_needed in needed)


class _Switch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, plain: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        ctx.plain = plain
        ctx.save_for_backward(*inputs)
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if not is_differentiated(grad):
            return grad, None, *(None for _ in needed)
        return None, None, *plain_gradients(ctx.plain, ctx.saved_tensors, needed, grad)
