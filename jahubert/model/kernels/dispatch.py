"""Selection between the plain modules, the kernels and the Triton kernels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as module_globals
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)
_enabled = os.environ.get("JAHUBERT_KERNELS", "1") != "0"
_TORCH_MODULES = {nn.Conv1d, nn.Dropout, nn.LayerNorm, nn.Linear, nn.Module, nn.ModuleDict, nn.ModuleList}
_FSDP = "torch.distributed.fsdp"
_OWN_MODULES = {"jahubert.model.hubert", "jahubert.model.layers"}
# Names of torch's dictionaries of hooks that apply to all modules; torch 2.6 has no function that reads them.
_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
)


@contextmanager
def disabled() -> Iterator[None]:
    """Use the plain modules and unfused attention in the `with` block, for debugging and comparisons.

    Setting the environment variable JAHUBERT_KERNELS=0 selects the plain modules for a whole process.
    """
    global _enabled
    before, _enabled = _enabled, False
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        _enabled = before


def is_tracing() -> bool:
    """Return whether torch.export (used for ONNX), torch.compile or torch.jit.trace is tracing operations."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_transformed() -> bool:
    """Return whether torch.func or forward-mode differentiation is transforming operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def usable(part: nn.Module) -> bool:
    """Return whether kernels may compute `part` (a model, front end or unit head) in this forward pass.

    Kernels read the weights of modules without calling the modules, and compute on packed frames instead of a
    padded batch. They are used except in these cases:

    - the kernels are switched off (`disabled`);
    - operations are traced or transformed, as in export, torch.compile of the whole model and torch.func;
    - a module inside `part` is not exactly of its standard type (LoRA and other wrappers, quantized layers,
      parametrizations), has a hook (pruning uses one) or a patched `forward`, or has a weight that is a
      tensor subclass with its own arithmetic;
    - torch has a global hook for all modules.

    Transformer blocks are called as modules in any case, so that activation checkpointing, torch.compile and
    FSDP2 may wrap them. Double backward, which the forward pass cannot foresee, differentiates plain
    operators (`double_backward`).
    """
    if not _enabled or is_tracing() or is_transformed():
        return False
    if any(getattr(module_globals, name) for name in _GLOBAL_HOOKS):
        return False
    modules = list(part._modules.values())
    while modules:
        module = modules.pop()
        if module is None:
            continue
        if not _is_standard(module):
            return False
        modules.extend(module._modules.values())
    return True


def triton_kernels_for(x: Tensor) -> ModuleType | None:
    """Return the module `triton_kernels` if it may compute an operation on `x`, and otherwise None.

    This is the case for contiguous 16-bit tensors on a CUDA device for which Triton can compile, unless
    operations are traced or transformed. Callers use the module in training only, and otherwise torch's
    operators.
    """
    if type(x) is not Tensor or x.dtype not in (torch.bfloat16, torch.float16) or not x.is_contiguous():
        return None
    return None if is_tracing() or is_transformed() else _load_triton_kernels(x.device, x.dtype)


@lru_cache(maxsize=16)
def _load_triton_kernels(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Return the module `triton_kernels` if its kernels run on `device`; otherwise log why they do not."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    try:
        from jahubert.model.kernels import triton_kernels

        triton_kernels.run_all(device, dtype)
    except Exception as error:  # the package, a C compiler or support for this GPU is missing, for example
        log.warning(
            "%s: Triton cannot compile kernels, so torch's slower operators are used (%s: %s)",
            device, type(error).__name__, error,
        )  # fmt: skip
        return None
    return triton_kernels


def _is_standard(module: nn.Module) -> bool:
    """Return whether the kernels can replace a module, not considering its submodules."""
    if module._backward_hooks or module._backward_pre_hooks:
        return False
    for weight in module._parameters.values():
        weight_type: Any = type(weight)
        if weight_type is not nn.Parameter and _has_own_arithmetic(weight_type):
            return False
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    forward = module.__dict__.get("forward")
    kind: Any = type(module)
    if not _is_block(kind):
        return _is_standard_type(kind) and not hooks and forward is None
    from_fsdp = all(getattr(hook, "__module__", "").startswith(_FSDP) for hook in hooks)
    return from_fsdp and (forward is None or (isinstance(forward, partial) and forward.func is checkpoint))


# Types do not change, so the results of the following functions can be cached.
@lru_cache(maxsize=64)
def _is_standard_type(kind: type[nn.Module]) -> bool:
    return kind in _TORCH_MODULES or kind.__module__ in _OWN_MODULES


@lru_cache(maxsize=64)
def _is_block(kind: type[nn.Module]) -> bool:
    """Return whether modules of this type are Transformer blocks, including FSDP2's subclasses of them."""
    if kind.__module__.startswith(_FSDP):
        kind = kind.__bases__[-1]
    return kind.__module__ in _OWN_MODULES and kind.__name__ == "EncoderLayer"


@lru_cache(maxsize=64)
def _has_own_arithmetic(kind: type) -> bool:
    """Return whether a tensor type overrides torch's functions, as quantized weights do."""
    if not issubclass(kind, Tensor):
        return False  # the type is NoneType if a parameter is not set
    override, default = kind.__torch_function__, Tensor.__torch_function__
    is_default = getattr(override, "__func__", None) is getattr(default, "__func__", default)
    return not is_default and override is not torch._C._disabled_torch_function_impl
