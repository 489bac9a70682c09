"""Layer norm that keeps the dtype of its input under autocast.

On a GPU, autocast computes `nn.LayerNorm` in float32 and returns float32. The residual stream would then be
in float32, and every matrix product would need a cast of its input. On a CPU, `nn.LayerNorm` keeps bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model.kernels.weights import weight_copy
from jahubert.model.precision import autocast_dtype


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the layer norm `module`. The mean and variance are computed in float32 for 16-bit inputs."""
    kept = x.device.type in ("cpu", "meta") or x.dtype is torch.float32  # autocast does not change the dtype
    if kept or x.dtype is not autocast_dtype(x):
        normed: Tensor = module(x)
        return normed
    return same_dtype_layer_norm(module, x)


def same_dtype_layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the layer norm `module` without autocast, with its weights in the dtype of `x`."""
    weight, bias = (
        None if parameter is None else weight_copy(x.dtype, parameter)
        for parameter in (module.weight, module.bias)
    )
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
