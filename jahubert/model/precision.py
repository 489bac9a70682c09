"""Compute precision: autocast dtypes and int8 quantization.

Autocast lowers the precision of matrix products, convolutions and, depending on the device, operations on
their outputs. The cosines and log-probabilities of the heads remain in float32, and the weights of the model
are not changed.
"""

from __future__ import annotations

import copy
import platform
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import nn

from jahubert.errors import ConfigError

T = TypeVar("T", bound=nn.Module)
PRECISIONS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by name in settings


def preferred_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if a CUDA device supports it or a CPU is faster with it, otherwise float32."""
    if device.type == "cuda":
        faster = torch.cuda.is_bf16_supported(False)  # False excludes emulation
    else:
        faster = _cpu_is_faster_in_bf16()
    return torch.bfloat16 if faster else torch.float32


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return a context with autocast to bfloat16 or float16, or for other dtypes, one without autocast."""
    lower = dtype in PRECISIONS[1:]
    if not lower and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype if lower else None, enabled=lower)


def autocast_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the autocast dtype if autocast is enabled, and otherwise the dtype of the tensor.

    The kernels need this for operations that autocast does not convert.
    """
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Convert a tensor to float32 unless its own dtype is more precise."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def check_parameter_dtypes(model: nn.Module, supported: Sequence[torch.dtype]) -> None:
    """Check that the floating-point parameters of a model have one of the supported dtypes.

    Raises:
        ConfigError: a parameter has another dtype.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype not in supported:
            raise ConfigError(
                f"the parameter {name} of the model is {parameter.dtype}, but must be "
                f"{' or '.join(map(str, supported))}; convert the model with model.float(), and choose the "
                "precision of the computation with dtype"
            )


def quantize_int8(model: T, device: torch.device) -> T:
    """Return a copy of the model whose linear layers use int8 weights and dynamically quantized activations.

    Raises:
        ConfigError: the device is not a CPU, or the installed torch has no dynamic quantization.
    """
    if device.type != "cpu":
        raise ConfigError(f"int8 needs a CPU, but the device is {device}; use the CPU, or bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that the torchao package replaces `quantize_dynamic`
        try:
            from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic
        except ImportError as error:
            raise ConfigError(
                f"torch {torch.__version__} has no dynamic quantization; use float32 or bfloat16"
            ) from error
        quantized: T = quantize_dynamic(
            copy.deepcopy(model).eval().cpu(), {nn.Linear: per_channel_dynamic_qconfig}
        )
        return quantized


def _cpu_is_faster_in_bf16() -> bool:
    """Return whether the CPU multiplies matrices faster in bfloat16 than in float32.

    AVX-512 instructions for bfloat16 are faster than those for float32 on AMD processors, but slower on Intel
    processors (LOG.md). On the latter, bfloat16 is faster only with AMX, which is disabled in some virtual
    machines.
    """
    # mkldnn._is_mkldnn_bf16_supported is also true for AVX-512 without bf16, where bfloat16 is emulated.
    return cpu_has_amx() or (_cpu_supports("_is_avx512_bf16_supported") and cpu_is_amd())


@lru_cache(maxsize=1)
def cpu_is_amd() -> bool:
    """Return whether the CPU is an AMD processor."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            processor = file.read(1024)
    except OSError:  # not Linux
        processor = platform.processor()
    return "AuthenticAMD" in processor


def cpu_has_amx() -> bool:
    """Return whether the CPU multiplies matrices in hardware (Intel AMX)."""
    return _cpu_supports("_is_amx_tile_supported")


def _cpu_supports(function: str) -> bool:
    try:
        return bool(getattr(torch.cpu, function)())
    except (AttributeError, RuntimeError):  # some versions of torch lack these private functions
        return False
