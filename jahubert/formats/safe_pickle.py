"""PyTorch's `.pt` and `.bin` files, read without running anything that is in them.

A pickle is a program: it may name any function of any package and have it called. Nothing is called here but
what this file defines. Tensors are raw bytes of the file, objects of the few families that model files hold
(settings of argparse, omegaconf and Lightning, dictionaries of fairseq) become inert records, and a file that
names anything else is refused.
"""

from __future__ import annotations

import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError

_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# Packages whose objects become records, and single names of others.
_FAMILIES = {"argparse", "omegaconf", "fairseq", "numpy", "pathlib", "typing"}
_FAMILIES |= {"lightning", "lightning_fabric", "pytorch_lightning"}
_NAMES = {"torch.device", "torch.Size", "_codecs.encode", "collections.defaultdict", "collections.Counter"}
_BUILTINS = {"object", "dict", "list", "tuple", "set", "frozenset", "slice", "complex"}
_BUILTINS |= {"bool", "int", "long", "float", "str", "unicode", "bytes", "bytearray"}


class Record(dict):
    """An object of a foreign class: what it was made of, and nothing that it can do."""

    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any, **_: Any):
        super().__init__()
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None:
        """Lists and sets of foreign classes lose their items: no setting is one."""

    def extend(self, _: Iterable) -> None:
        """See `append`."""

    add = append
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


@dataclass(frozen=True)
class Stored:
    """A tensor that still lies in the file."""

    file: zipfile.ZipFile
    entry: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """Its values, on the CPU.

        Raises:
            CheckpointError: the file has no or too few bytes for it.
        """
        try:
            raw = bytearray(self.file.read(self.entry))
            n_values, odd = divmod(len(raw), self.dtype.itemsize)
            # A shape may claim more than there is, with a stride of zero as much as it likes.
            if odd or not 0 <= math.prod(self.shape) <= n_values:
                raise ValueError(f"{len(raw)} bytes")
            flat = torch.frombuffer(raw, dtype=self.dtype) if raw else torch.empty(0, dtype=self.dtype)
            return flat.as_strided(self.shape, self.stride, self.offset).contiguous()
        except (
            KeyError,
            OSError,
            EOFError,
            ValueError,
            TypeError,
            RuntimeError,
            zipfile.BadZipFile,
        ) as error:
            raise CheckpointError(
                f"{self.file.filename}: the values of a tensor of shape {self.shape} are damaged ({error}); "
                "copy the file again"
            ) from error


def read_pickled(path: Path) -> Any:
    """What `torch.save` wrote: containers and numbers as they are, tensors as `Stored`, objects as `Record`.

    Files older than PyTorch 1.6, which are not zip archives, are left to torch.load with weights_only.

    Raises:
        CheckpointError: not such a file, damaged, or it names what a model file has no need of.
    """
    if not zipfile.is_zipfile(path):
        return _read_old(path)
    try:
        file = zipfile.ZipFile(path)
        (program,) = (name for name in file.namelist() if name.endswith("/data.pkl") or name == "data.pkl")
        folder = program.removesuffix("data.pkl")
        if folder + "byteorder" in file.namelist() and file.read(folder + "byteorder") != b"little":
            raise CheckpointError(f"{path}: written on a big-endian machine; only little-endian can be read")
        return _Unpickler(path, file, folder, file.read(program)).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged program fails in any way a program can
        raise CheckpointError(
            f"{path}: not a readable PyTorch file ({type(error).__name__}: {error}); copy it again"
        ) from error


def to_plain(value: Any) -> Any:
    """Records as the dicts, lists and values that they hold; omegaconf's nodes are unwrapped."""
    if isinstance(value, Record):
        state = value.state if isinstance(value.state, dict) else {}
        for inside in ("_content", "_val"):
            if inside in state:
                return to_plain(state[inside])
        if value.args and not state and not len(value):  # a member of an enumeration
            return to_plain(value.args[0])
        return to_plain({**value, **state})
    if isinstance(value, dict):
        return {key: to_plain(inner) for key, inner in value.items()}
    return [to_plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def _read_old(path: Path) -> Any:
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an ONNX file, which is not read back; give the model it was made of"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a file that is none can cause
        # Of what torch says the first sentence: the next ones advise to load it without restriction.
        reason = str(error).strip().partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise CheckpointError(
            f"{path}: neither safetensors nor a whole PyTorch file ({reason}); copy it again"
        ) from error


class _Unpickler(pickle._Unpickler):
    """The one written in Python: a damaged number makes the other ask for gigabytes."""

    def __init__(self, path: Path, file: zipfile.ZipFile, folder: str, program: bytes):
        super().__init__(BytesIO(program), encoding="utf-8")
        self.path, self.file, self.folder = path, file, folder

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full in ("torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"):
            return getattr(self, name.removeprefix("_"))
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        builtin = module in ("builtins", "__builtin__") and name in _BUILTINS
        if builtin or full in _NAMES or module.partition(".")[0] in _FAMILIES:
            return type(name, (Record,), {})
        raise CheckpointError(
            f"{self.path}: the file names {full}, which no model needs; opening it the usual way could run "
            "code that somebody put there. Nothing of it was run; ask for the weights as safetensors"
        )

    def persistent_load(self, pid: Any) -> tuple[str, torch.dtype]:
        kind, dtype, key = pid[:3]
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise CheckpointError(f"{self.path}: holds {kind!r} data of a kind that no model needs")
        return f"{self.folder}data/{key}", dtype

    def rebuild_tensor_v2(
        self, storage: tuple[str, torch.dtype], offset: int, shape: Any, stride: Any, *_: Any
    ) -> Stored:
        entry, dtype = storage
        return Stored(self.file, entry, dtype, offset, tuple(shape), tuple(stride))

    def rebuild_parameter(self, data: Stored, *_: Any) -> Stored:
        return data
