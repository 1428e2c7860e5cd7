"""What a rank's file holds, read without torch: the tensors' names, dtypes, shapes and bytes, not their values.

The file is a zip in torch's format, in which a pickle describes the tree and the storages lie beside it. That
pickle is walked with an unpickler that imports nothing: a tensor becomes a `Tensor`, any other class an `Other`.
"""

from __future__ import annotations

import collections
import math
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrun.errors import CheckpointError

# torch names the storages of its older dtypes by C's types
_LEGACY = dict(
    [
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8")),
        *(("Bool", "bool"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128")),
        *(("QInt8", "qint8"), ("QUInt8", "quint8"), ("QInt32", "qint32")),
    ]
)


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file; `parts` are those that a sparse one is made of, `storage` is None for one elsewhere."""

    dtype: str
    shape: tuple[int, ...]
    storage: str | None = None
    storage_bytes: int = 0
    parts: tuple[Tensor, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its elements; of a view, not of all that it lies in."""
        if self.parts:
            return sum(part.nbytes for part in self.parts)
        return math.prod(self.shape) * itemsize(self.dtype)


class Other:
    """An object of a class that is not needed here."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Name(str):
    """A global of torch: a dtype, the class of a storage, or what makes an object that is not needed here."""

    def __call__(self, *args: Any) -> Other:
        return Other()


def itemsize(dtype: str) -> int:
    """Return the bytes of an element, which the name of a dtype tells: ``float8_e4m3fn``, ``bool``."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def _strided(storage: Tensor, offset: int, shape: tuple[int, ...], *rest: Any) -> Tensor:
    # torch's third form of the call names a dtype that has no storage class of its own
    named = [one for one in rest if isinstance(one, str)]
    return Tensor(named[0] if named else storage.dtype, shape, storage.storage, storage.storage_bytes)


def _sparse(layout: Any, data: tuple[Any, ...]) -> Tensor:
    *parts, values = (one for one in data if isinstance(one, Tensor))
    shape = next(one for one in data if isinstance(one, tuple))
    return Tensor(values.dtype, shape, parts=(*parts, values))


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": collections.OrderedDict,
    "collections.Counter": collections.Counter,
    "builtins.set": set,
    "__builtin__.set": set,
    "builtins.complex": complex,
    "__builtin__.complex": complex,
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor_v2": _strided,
    "torch._utils._rebuild_tensor_v3": _strided,
    "torch._utils._rebuild_qtensor": _strided,
    "torch._utils._rebuild_sparse_tensor": _sparse,
    "torch._utils._rebuild_meta_tensor_no_storage": lambda dtype, shape, *rest: Tensor(dtype, shape),
    "torch._utils._rebuild_parameter": lambda tensor, *rest: tensor,
    "torch._utils._rebuild_parameter_with_state": lambda tensor, *rest: tensor,
    "torch._tensor._rebuild_from_type_v2": lambda build, kind, args, state: build(*args),
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        call = _CALLS.get(f"{module}.{name}")
        if call is not None:
            return call
        # nothing is ever imported
        return _Name(name) if module in ("torch", "torch.storage") else Other

    def persistent_load(self, pid: Any) -> Tensor:
        _, kind, key, _, count = pid
        dtype = _LEGACY.get(str(kind).removesuffix("Storage"), "uint8")  # UntypedStorage counts bytes
        return Tensor(dtype, (count,), key, count * itemsize(dtype))


def read(path: Path) -> Any:
    """Return the tree of a file, with a `Tensor` for each tensor.

    Raises:
        CheckpointError: it is no file of torch's format.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as file:
                return _Reader(file).load()
    except Exception as error:  # whatever a damaged pickle leads to
        raise CheckpointError(
            f"{path} cannot be opened: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error


def tensors(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a tree with their names, the keys that lead to them joined by dots."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from tensors(value, f"{name}.{key}" if name else str(key))


def space(tree: Any, seen: set[str]) -> int:
    """Return the bytes that a tree takes in the file, of storages that are not in `seen`; add them to it."""
    total = 0
    for _, tensor in tensors(tree):
        for part in tensor.parts or (tensor,):
            if part.storage is None:
                total += part.nbytes  # sharded: it lies in other files
            elif part.storage not in seen:
                seen.add(part.storage)
                total += part.storage_bytes
    return total
