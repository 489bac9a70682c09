"""A device that is not there: the CPU computes, but tensors do not mix with the CPU's, as on a GPU.

What code does on a GPU that it does not do on a CPU can be tried without one: tensors made on the wrong
device, a generator of the wrong device, `.numpy()` of what is not here. Its numbers are the CPU's own.

Importing this changes what torch takes for the accelerator: it belongs into a process of its own.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_flatten, tree_map

if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
    raise ImportError("this torch cannot have a device that is written in Python")
NAME = "elsewhere"
# These take tensors of two devices on a GPU too.
MEETING = {
    "aten::copy_",
    "aten::_to_copy",
    "aten::index",
    "aten::index_put",
    "aten::index_put_",
    "aten::_ctc_loss",
    "aten::_ctc_loss_backward",
}


class _Stream:
    """Whoever asks for it finds all work done."""

    def synchronize(self) -> None: ...


class _Backend(backend_registration._DummyBackendModule):
    only = _Stream()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def current_stream(self) -> _Stream:
        return self.only

    def stream(self, _: _Stream) -> AbstractContextManager:
        return nullcontext()


backend_registration._setup_privateuseone_for_python_backend(NAME, _Backend())
DEVICE = torch.device(NAME, 0)
ASKED: list[str] = []  # operations that brought something back to the CPU; a GPU has to finish before them


class There(torch.Tensor):
    """A tensor of the CPU's that says it is elsewhere."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        like = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.size(), device=DEVICE, **like)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def __repr__(self, **_: Any) -> str:
        return f"There({self.inner})"

    def tolist(self) -> list:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Elsewhere(TorchDispatchMode):
    """Inside it, `DEVICE` exists."""

    def __enter__(self):
        torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(list, device=...)` asks this mode then
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wanted = kwargs.get("device")
        known = wanted is not None and torch.device(wanted).type == NAME
        if known or any(isinstance(value, There) for value in tree_flatten((args, kwargs))[0]):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _run(func, args, kwargs):
    given = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = [value for value in given if isinstance(value, There)]
    here = [value for value in given if not isinstance(value, There) and value.dim()]
    if there and here and func._schema.name not in MEETING:
        shapes = [(tuple(value.shape), value.device.type) for value in given]
        raise RuntimeError(f"{func}: all tensors must be on one device, found {shapes}")
    lands = bool(there)
    if kwargs.get("device") is not None:
        lands = torch.device(kwargs["device"]).type == NAME
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if lands and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: expected a generator of {NAME}, found one of the CPU")
    inner = tree_map(lambda value: value.inner if isinstance(value, There) else value, (args, kwargs))
    with _disable_current_modes():
        result = func(*inner[0], **inner[1])
        if func._schema.name == "aten::_to_copy" and result is inner[0][0]:
            result = result.clone()
    if there and not (lands and isinstance(result, torch.Tensor | tuple | list | None)):
        ASKED.append(str(func))
    if not lands:
        return result
    result = tree_map(lambda value: There(value) if isinstance(value, torch.Tensor) else value, result)
    return return_and_correct_aliasing(func, args, kwargs, result) if there else result
