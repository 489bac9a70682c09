"""Copies of weights in lower precision, or concatenated across layers that have the same input."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from jahubert.model.kernels.dispatch import is_tracing
from jahubert.model.kernels.products import product
from jahubert.model.precision import autocast_dtype


class _Copy(NamedTuple):
    tensor: Tensor
    weights: tuple[Tensor, ...]  # the original weights; the references prevent reuse of their ids
    versions: list[int]  # version counters of the weights at the time of the copy


_shared: dict[tuple[Any, ...], _Copy] | None = None


@contextmanager
def shared_weight_copies(enabled: bool = True) -> Iterator[None]:
    """Reuse weight copies across all forward and backward passes in the `with` block.

    This is intended for the micro-batches of one update. A copy is replaced if an operation changes the
    weight in place. Changes through `weight.data` are not detected.
    """
    global _shared
    before, _shared = _shared, {} if enabled else None
    try:
        yield
    finally:
        _shared = before


def discard_weight_copies() -> None:
    """Discard the copies of `shared_weight_copies`, so that the next forward pass makes new ones."""
    if _shared is not None:
        _shared.clear()


def weight_copy(dtype: torch.dtype, *weights: Tensor) -> Tensor:
    """Convert weights to a dtype, and concatenate them along the first dimension (differentiable).

    Inside `shared_weight_copies`, the same tensor is returned until a weight changes.
    """
    if is_tracing() or _shared is None:
        return _make_copy(dtype, weights)
    key = (dtype, torch.is_grad_enabled(), *map(id, weights))
    versions = [weight._version for weight in weights]
    copy = _shared.get(key)
    if copy is None or copy.versions != versions:
        copy = _shared[key] = _Copy(_make_copy(dtype, weights), weights, versions)
    return copy.tensor


def _make_copy(dtype: torch.dtype, weights: tuple[Tensor, ...]) -> Tensor:
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return weight.to(dtype)


def linear(x: Tensor, *modules: nn.Linear) -> Tensor:
    """Compute the concatenated outputs of linear layers for `x`, as one product if all have biases."""
    if any(module.bias is None for module in modules):
        return torch.cat([product(x, module.weight, module.bias) for module in modules], dim=-1)
    dtype = autocast_dtype(x)
    weight = weight_copy(dtype, *(module.weight for module in modules))
    bias = weight_copy(dtype, *(module.bias for module in modules))
    return product(x.to(dtype), weight, bias)
