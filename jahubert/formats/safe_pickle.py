"""Restricted reader for PyTorch's `.pt` and `.bin` files.

A pickle is a program that can call any function of any package, run for exponential time, and declare sizes
larger than the file. This reader calls only OrderedDict and the constructors defined in this module. Tensors
are views of bytes read from the file. Objects of known packages (such as settings of argparse and
omegaconf, and dictionaries of fairseq) become inert records, and objects of all other packages are rejected.
Limits on the number of instructions, and on sizes relative to the file size, bound time and memory.
"""

from __future__ import annotations

import math
import mmap
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jahubert.errors import CheckpointError, JahubertError, quote
from jahubert.limits import ADVICE, DEPTH, EXPANSION, INSTRUCTIONS, PICKLE_BYTES, limit

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
# Packages whose objects become records, and single names from other packages.
_FAMILIES = {"argparse", "omegaconf", "fairseq", "numpy", "pathlib", "typing"}
_FAMILIES |= {"lightning", "lightning_fabric", "pytorch_lightning"}
_NAMES = {"torch.device", "torch.Size", "_codecs.encode", "collections.defaultdict", "collections.Counter"}
_BUILTINS = {"object", "dict", "list", "tuple", "set", "frozenset", "slice", "complex"}
_BUILTINS |= {"bool", "int", "long", "float", "str", "unicode", "bytes", "bytearray"}
_REBUILD_TENSOR = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # first object in files from before PyTorch 1.6
_LEGACY_PROTOCOL = 1001
_PythonUnpickler: Any = pickle._Unpickler  # the type stubs lack attributes of the Python unpickler


class Record(dict[Any, Any]):
    """Inert replacement for an object of a foreign class, with its constructor arguments and state."""

    args: tuple[Any, ...] = ()
    state: Any = None

    def append(self, _: Any) -> None:
        """Ignore an item of a foreign list, which contains no settings."""

    def extend(self, _: Iterable[Any]) -> None:
        """Ignore the items, like `append`."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__
    __ne__ = object.__ne__


@dataclass
class Storage:
    """Bytes of one or more tensors, which are read from the file on first use."""

    dtype: torch.dtype
    read: Callable[[], bytes]
    content: Tensor | None = None

    def values(self) -> Tensor:
        """Read all values as a one-dimensional tensor.

        Raises:
            ValueError: the number of bytes is not a multiple of the item size.
        """
        if self.content is None:
            raw = bytearray(self.read())
            if len(raw) % self.dtype.itemsize:
                raise ValueError(f"their size ({len(raw)} bytes) is not that of a whole number of values")
            empty = torch.empty(0, dtype=self.dtype)
            self.content = torch.frombuffer(raw, dtype=self.dtype) if raw else empty
        return self.content


@dataclass(frozen=True)
class Stored:
    """Reference to a tensor in a file, whose values are read by `load`."""

    path: Path
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def n_bytes(self) -> int:
        """Declared size in bytes."""
        return math.prod(self.shape) * self.storage.dtype.itemsize

    def load(self) -> Tensor:
        """Read the values into CPU memory, which tensors with the same storage share.

        Raises:
            CheckpointError: the values are missing, incomplete or damaged.
        """
        try:
            values = self.storage.values()
            # A stride of zero would let a tensor have more values than its storage.
            if math.prod(self.shape) > len(values):
                raise ValueError(f"their size in the file is only {values.nbytes} bytes")
            return values.as_strided(self.shape, self.stride, self.offset)
        except Exception as error:  # zipfile, zlib and torch raise various errors
            raise CheckpointError(
                f"{self.path}: the values of a tensor of shape {self.shape} are damaged ({error}); "
                "download or copy the file again"
            ) from error


def read_pickled(path: Path) -> Any:
    """Read a file written by `torch.save`, converting tensors to `Stored` and foreign objects to `Record`.

    Raises:
        CheckpointError: the file is damaged, too complex, in an unknown format, or refers to a class or
            function that is not allowed.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path}: ONNX files cannot be read; use the original model")
    try:
        return _read_archive(path) if zipfile.is_zipfile(path) else _read_legacy(path)
    except JahubertError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way
        reason = f"{type(error).__name__}: {error}"[:200]
        raise CheckpointError(
            f"{path}: neither safetensors nor an intact PyTorch file ({reason}); download or copy it again"
        ) from error


def load_tensors(path: Path, table: Any) -> dict[str, Tensor]:
    """Load the tensors in a table that was read from `path`, dropping other values.

    Raises:
        CheckpointError: the values are damaged, or the total size far exceeds the file size.
    """
    items = table if isinstance(table, Mapping) else {}
    declared = sum(value.n_bytes for value in items.values() if isinstance(value, Stored))
    if declared > _max_bytes(path):
        raise CheckpointError(
            f"{path}: a file of {path.stat().st_size:,} bytes that declares {declared:,} bytes of tensors is "
            f"damaged or malicious ({ADVICE})"
        )
    tensors = {name: value.load() if isinstance(value, Stored) else value for name, value in items.items()}
    return {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}


def to_plain(where: object, value: Any) -> Any:
    """Replace records with the dicts, lists and values in them, and unwrap omegaconf nodes.

    Raises:
        CheckpointError: the value is nested too deeply.
    """
    converted: dict[int, Any] = {}  # ensures that shared objects are converted only once

    def convert(value: Any, depth: int) -> Any:
        if depth > limit(DEPTH):
            raise CheckpointError(f"{where}: settings are nested more than {limit(DEPTH)} levels deep")
        if not isinstance(value, dict | list | tuple):
            return value
        if id(value) not in converted:
            converted[id(value)] = None  # ends the recursion for self-references
            converted[id(value)] = convert_container(value, depth + 1)
        return converted[id(value)]

    def convert_container(value: Any, depth: int) -> Any:
        if isinstance(value, Record):
            state = value.state if isinstance(value.state, dict) else {}
            for content in ("_content", "_val"):
                if content in state:
                    return convert(state[content], depth)
            if value.args and not state and not len(value):  # the record is an enum member
                return convert(value.args[0], depth)
            value = {**value, **state}
        if isinstance(value, dict):
            return {key: convert(inner, depth) for key, inner in value.items()}
        return [convert(inner, depth) for inner in value]

    return convert(value, 0)


def _read_archive(path: Path) -> Any:
    """Read a file from PyTorch 1.6 or later, a zip archive with a pickle and one entry per storage."""
    archive = zipfile.ZipFile(path)
    entries = {info.filename: info for info in archive.infolist()}
    (program,) = (name for name in entries if name.endswith("/data.pkl") or name == "data.pkl")
    folder = program.removesuffix("data.pkl")
    bytes_left = _max_bytes(path)

    def read(name: str) -> bytes:
        nonlocal bytes_left
        entry = entries[name]
        if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} has an unsupported compression type ({entry.compress_type})")
        bytes_left -= entry.file_size
        if bytes_left < 0:
            raise ValueError(f"the entries up to {name} exceed {_max_bytes(path):,} bytes; {ADVICE}")
        return archive.read(entry)

    if folder + "byteorder" in entries and read(folder + "byteorder") != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine; only little-endian can be read")

    storages: dict[tuple[str, torch.dtype], Storage] = {}

    def storage(key: str, dtype: torch.dtype, _: int) -> Storage:
        new = Storage(dtype, lambda: read(f"{folder}data/{key}"))
        return storages.setdefault((key, dtype), new)

    if (size := entries[program].file_size) > limit(PICKLE_BYTES):
        raise ValueError(f"its pickle has {size:,} bytes, more than {limit(PICKLE_BYTES):,}; {ADVICE}")
    return _Unpickler(path, BytesIO(read(program)), storage).load()


def _read_legacy(path: Path) -> Any:
    """Read a file from before PyTorch 1.6: several pickles, followed by the values of all storages."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        storages: dict[str, Storage] = {}
        n_values: dict[str, int] = {}
        data: dict[str, bytes] = {}

        def storage(key: str, dtype: torch.dtype, size: int) -> Storage:
            n_values.setdefault(key, size)
            return storages.setdefault(key, Storage(dtype, lambda: data[key]))

        def read() -> Any:
            return _Unpickler(path, content, storage).load()

        if read() != _LEGACY_MAGIC or read() != _LEGACY_PROTOCOL:
            raise ValueError("unknown first bytes")
        read()  # byte order and type sizes of the machine that wrote the file
        result = read()
        keys = read()
        if not isinstance(keys, list) or set(keys) != set(storages):
            raise ValueError("storages are missing")
        for key in keys:
            size = int.from_bytes(content.read(8), "little")
            n_bytes = size * storages[key].dtype.itemsize
            if size != n_values[key] or content.tell() + n_bytes > len(content):
                raise ValueError(f"storage {key} is truncated or has the wrong number of values ({size})")
            data[key] = content.read(n_bytes)
        return result


def _max_bytes(path: Path) -> int:
    """Return the maximum number of uncompressed bytes to read from a file."""
    return limit(EXPANSION) * (path.stat().st_size + (1 << 20))


class _Dispatch(dict[Any, Any]):
    """Dispatch table that counts executed pickle instructions."""

    executed = 0
    allowed = 0

    def __getitem__(self, instruction: int) -> Callable[..., Any]:
        self.executed += 1
        if self.executed > self.allowed:
            self.count(0)
        function: Callable[..., Any] = super().__getitem__(instruction)
        return function

    def count(self, n: int) -> None:
        self.executed += n
        if self.executed > self.allowed:
            raise ValueError(f"more than {self.allowed:,} instructions; {ADVICE}")


class _Unpickler(_PythonUnpickler):  # type: ignore[misc]
    """Unpickler that is limited to containers, numbers, strings, records and references to tensors.

    Args:
        path: path of the file, for error messages.
        file: file object of the pickle.
        storage: function that returns the storage for a key, dtype and number of values.
    """

    def __init__(self, path: Path, file: Any, storage: Callable[[str, torch.dtype, int], Storage]):
        super().__init__(file, encoding="utf-8")
        self.path, self.storage = path, storage
        self.dispatch = _Dispatch(_INSTRUCTIONS)
        self.dispatch.allowed = limit(INSTRUCTIONS)

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full in _REBUILD_TENSOR:
            return self.rebuild_tensor
        if full == _REBUILD_PARAMETER:
            return self.rebuild_parameter
        if module == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return Record
        builtin = module in ("builtins", "__builtin__") and name in _BUILTINS
        if builtin or full in _NAMES or module.partition(".")[0] in _FAMILIES:
            return Record
        raise CheckpointError(
            f"{self.path}: the file refers to {quote(full)}, which is not allowed, because opening it with "
            "torch.load could run malicious code. Nothing was run; ask the author for a safetensors file"
        )

    def persistent_load(self, pid: Any) -> Storage:
        if type(pid) is not tuple or len(pid) not in (5, 6) or pid[5:] not in ((), (None,)):
            raise ValueError("unknown kind of storage")
        kind, dtype, key, _, size = pid[:5]
        types = (type(kind), type(key), type(size))
        if types != (str, str, int) or kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("unknown kind of storage")
        return self.storage(key, dtype, size)

    def rebuild_tensor(self, storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> Stored:
        numbers = (offset, *_integers(shape), *_integers(stride))
        if not isinstance(storage, Storage) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
            raise ValueError("damaged tensor")
        return Stored(self.path, storage, offset, _integers(shape), _integers(stride))

    def rebuild_parameter(self, data: Any, *_: Any) -> Stored:
        if not isinstance(data, Stored):
            raise ValueError("damaged parameter")
        return data

    def call(self, function: Any, args: Any) -> Any:
        """Create an object by calling `function`, which must be a result of `find_class`."""
        if function is Record:
            record = Record()
            record.args = tuple(args)  # `tuple` does not copy a tuple, which may be large and shared
            return record
        if function is OrderedDict:
            pairs = list(args[0]) if len(args) == 1 else []
            self.dispatch.count(len(pairs))
            result: OrderedDict[Any, Any] = OrderedDict()
            for key, value in pairs:
                result[_checked_key(key)] = value
            return result
        if function in (self.rebuild_tensor, self.rebuild_parameter) and len(args) < 10:
            return function(*args)
        raise ValueError("the pickle calls an object that is not a class")

    # --- replacements for instructions that could run code or take unbounded time --------------------------

    def make(self) -> None:
        """Execute REDUCE or NEWOBJ, whose function and arguments are on the stack."""
        args = self.stack.pop()
        self.stack[-1] = self.call(self.stack[-1], args)

    def make_with_keywords(self) -> None:
        """Execute NEWOBJ_EX, dropping keyword arguments of foreign classes."""
        self.stack.pop()
        self.make()

    def make_from_stack(self) -> None:
        """Execute OBJ."""
        function, *args = self.pop_mark()
        self.append(self.call(function, args))

    def make_from_text(self) -> None:
        """Execute INST."""
        module, name = (self.readline()[:-1].decode("ascii") for _ in range(2))
        self.append(self.call(self.find_class(module, name), self.pop_mark()))

    def set_state(self) -> None:
        """Execute BUILD."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Record):
            self.stack[-1].state = state
        elif not isinstance(self.stack[-1], OrderedDict):  # attributes such as `_metadata` are ignored
            raise ValueError("the pickle sets attributes of an object")

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._fill([key, value])

    def set_items(self) -> None:
        self._fill(self.pop_mark())

    def make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._fill(items)

    def _fill(self, items: list[Any]) -> None:
        table = self.stack[-1]
        if not isinstance(table, dict):
            raise ValueError("the pickle sets items of an object that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[_checked_key(key)] = value

    def refuse(self) -> None:
        raise ValueError("an unsupported pickle instruction")


def _integers(value: Any) -> tuple[int, ...]:
    """Check a shape or stride, which is a tuple or, for torch.Size, a record with one argument."""
    if isinstance(value, Record):
        value = value.args[0]
    if type(value) not in (tuple, list) or len(value) > 8:
        raise ValueError("damaged shape")
    return tuple(value)


def _checked_key(key: Any) -> Any:
    """Return a dict key if it is simple. Hashing nested tuples could take exponential time."""
    simple = (str, int, float, bool, bytes, type(None), Record)
    parts = key if type(key) is tuple and len(key) < 10 else (key,)
    if not all(type(part) in simple for part in parts):
        raise ValueError("a dict key has an unsupported type")
    return key


_INSTRUCTIONS: dict[int, Callable[..., Any]] = dict(_PythonUnpickler.dispatch)
_REPLACED = {
    pickle.REDUCE: _Unpickler.make,
    pickle.NEWOBJ: _Unpickler.make,
    pickle.NEWOBJ_EX: _Unpickler.make_with_keywords,
    pickle.OBJ: _Unpickler.make_from_stack,
    pickle.INST: _Unpickler.make_from_text,
    pickle.BUILD: _Unpickler.set_state,
    pickle.SETITEM: _Unpickler.set_item,
    pickle.SETITEMS: _Unpickler.set_items,
    pickle.DICT: _Unpickler.make_dict,
}
_INSTRUCTIONS |= {instruction[0]: function for instruction, function in _REPLACED.items()}
_REFUSED = (
    pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.PERSID,
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER,
)  # fmt: skip
_INSTRUCTIONS |= {instruction[0]: _Unpickler.refuse for instruction in _REFUSED}
