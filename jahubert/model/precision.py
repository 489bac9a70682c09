"""In which numbers a model computes: float32, or fewer bits where that is faster.

Lower precision is for matrix products and convolutions only (autocast); norms, softmax, cosines and the
symbols' log-probabilities stay in float32. The weights themselves are not changed.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import nn

from jahubert.errors import ConfigError

T = TypeVar("T", bound=nn.Module)
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)


def preferred_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it in hardware, else float32, which is faster then."""
    has = torch.cuda.is_bf16_supported(False) if device.type == "cuda" else _cpu_has_bf16()  # not emulated
    return torch.bfloat16 if has else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager:
    """Autocast to `dtype`; for float32 (and for int8, which is in the layers) none, also inside another."""
    lower = dtype in PRECISIONS[1:]
    return torch.autocast(device.type, dtype if lower else None, enabled=lower)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """What a matrix product takes this tensor as: autocast does not reach into one's own functions."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def quantize_int8(model: T, device: torch.device) -> T:
    """A copy of the model with int8 linear layers: weights by channel, activations as they come.

    Raises:
        ConfigError: this device or this torch cannot run them.
    """
    if device.type != "cpu":
        raise ConfigError(f"int8 is for CPUs, but the device is {device}; add device cpu, or take bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces torchao, another package, in its place
        try:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
        except ImportError as error:
            raise ConfigError(
                f"torch {torch.__version__} has no dynamic quantisation; leave int8 out"
            ) from error
        return quantize_dynamic(copy.deepcopy(model).eval().cpu(), {nn.Linear: per_channel_dynamic_qconfig})


def _cpu_has_bf16() -> bool:
    # mkldnn._is_mkldnn_bf16_supported says yes for every AVX-512, where bfloat16 is only imitated.
    cpu = torch.cpu
    try:
        return bool(cpu._is_avx512_bf16_supported() or cpu._is_amx_tile_supported())
    except (AttributeError, RuntimeError):  # private names: absent means unknown
        return False
