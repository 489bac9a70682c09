"""Layer norm that keeps bfloat16 under autocast.

On CUDA, autocast computes `nn.LayerNorm` in float32 and returns float32. The next matrix product would need
a cast and, in post-norm models, the residual stream would be in float32. On a CPU, torch keeps bfloat16.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jahubert.model.kernels.weights import weight_copy
from jahubert.model.precision import autocast_dtype

# Devices whose layer norm keeps the dtype (cpu), without autocast (meta) or without a test (mps).
_UNCHANGED = ("cpu", "meta", "mps")


def layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the layer norm `module`, in the dtype of `x` if autocast and `x` are in bfloat16."""
    if x.dtype is torch.bfloat16 and x.device.type not in _UNCHANGED and autocast_dtype(x) is torch.bfloat16:
        return same_dtype_layer_norm(module, x)
    normed: Tensor = module(x)
    return normed


def same_dtype_layer_norm(module: nn.LayerNorm, x: Tensor) -> Tensor:
    """Apply the layer norm `module` with weights in the dtype of `x`, mean and variance in float32 (CUDA)."""
    weight, bias = (
        None if parameter is None else weight_copy(x.dtype, parameter)
        for parameter in (module.weight, module.bias)
    )
    with torch.autocast(x.device.type, enabled=False):
        return F.layer_norm(x, module.normalized_shape, weight, bias, module.eps)
