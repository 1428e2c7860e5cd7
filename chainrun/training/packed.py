"""Plain values in the form that is saved: numbers, strings, and lists, tuples, dicts, sets, deques, arrays and tensors.

Also named tuples, the dicts of `collections`, members of enumerations, and numbers that processes share
(`multiprocessing.Value`).
"""

from __future__ import annotations

import enum
import os
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterator
from itertools import chain, islice
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch

from chainrun.checkpoint import kinds
from chainrun.checkpoint.kinds import FACTORIES
from chainrun.checkpoint.state import Shared

LARGE = 64 * 1024  # bytes of one value, above which it is data rather than state
_NUMBERS = (bool, int, float, type(None))
_NAMES = (torch.dtype, torch.device)  # which are told from others by what they are called
_DEPTH = 6  # of containers in containers
_SAMPLE = 256
_DICTS = {kind.__name__: kind for kind in (dict, Counter, OrderedDict)}
_SETS = {kind.__name__: kind for kind in (set, frozenset)}
_SIMPLE = (list, tuple, deque, *_SETS.values(), *_DICTS.values())


def size_of(value: Any, most: int, depth: int = _DEPTH) -> int | None:
    """Return about how many bytes a value has, counted up to `most`; None of what is not state."""
    kind = type(value)
    if kind in _NUMBERS:
        return 8 if kind is not int or value.bit_length() < 2000 else None
    if kind in (str, bytes):
        return 8 + len(value)
    if kind is range:
        return 24
    if kind in _NAMES or kinds.is_member(value):
        return 8
    if kind is torch.Tensor and value.layout is torch.strided and not value.is_nested:
        return int(value.nbytes)
    if kind is torch.nn.Parameter:  # a large one is a model's, which is saved with that
        return int(value.nbytes) if value.nbytes <= LARGE else None
    if isinstance(value, (np.ndarray, np.generic)):
        known = kinds.is_plain_array(value) or (kind is np.ndarray and not value.dtype.hasobject)
        return int(value.nbytes) if known else None
    if kind is Synchronized:
        return 8 if type(value.value) in _NUMBERS else None
    if not _is_container(value, depth) or not depth:
        return None
    size = 8 * len(value)
    if kinds.base_of(kind):
        parts = [kinds.content_of(value), kinds.attributes_of(value)]
        return size_of(parts, most, depth)
    if _is_of_short_integers(value):
        return size
    # of many items some show whether they are state
    for item in _items(value) if size <= most else some(value):
        inner = size_of(item, most, depth - 1)
        if inner is None:
            return None
        size += inner
        if size > most and len(value) > _SAMPLE:
            break
    return size


def _is_container(value: Any, depth: int) -> bool:
    """Whether it can be made again: of a defaultdict inside of another value, also what makes its values."""
    kind = type(value)
    if kind is defaultdict:
        return depth == _DEPTH or value.default_factory in (None, *FACTORIES.values())
    named = kinds.is_named_tuple(value) and kinds.named(kind)
    return kind in _SIMPLE or bool(named or kinds.base_of(kind))


def _items(value: Any) -> Iterator[Any]:
    return chain(dict.keys(value), dict.values(value)) if isinstance(value, dict) else iter(value)


def some(value: Any) -> Iterator[Any]:
    """Return items of a long container, always the same ones; none of a set, which has no order."""
    if isinstance(value, dict):
        return chain(islice(value.items(), _SAMPLE), islice(reversed(value.items()), _SAMPLE))
    step = max(1, len(value) // _SAMPLE)
    if isinstance(value, (set, frozenset)):
        return iter(())
    return islice(value, 0, None, step) if isinstance(value, deque) else iter(value[::step])


def sample(value: Any) -> Any:
    """Return a part of a large value, from all over it, with its size."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1)
        return [list(value.shape), flat[:: max(1, flat.numel() // 1024)]]
    if isinstance(value, np.ndarray):
        return [list(value.shape), value.reshape(-1)[:: max(1, value.size // 1024)]]
    if isinstance(value, (list, tuple, dict, set, frozenset, deque)):
        return [len(value), *map(sample, some(value))]
    return value


def without_folders(tree: Any) -> Any:
    """Return a tree with the names of files for their paths: folders may be a job's own."""
    if isinstance(tree, str):
        return os.path.basename(tree)
    if isinstance(tree, dict):
        return {key: without_folders(value) for key, value in tree.items()}
    return [without_folders(one) for one in tree] if isinstance(tree, (list, tuple)) else tree


def pack(value: Any) -> Any:
    """Return a value in the form that is saved."""
    if isinstance(value, torch.nn.Parameter):
        return {"parameter": [pack(value.data), value.requires_grad]}
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and not kinds.is_plain_array(value):  # records, texts, dates
        raw = torch.from_numpy(np.frombuffer(value.tobytes(), np.uint8).copy())
        return {"raw": [np.lib.format.dtype_to_descr(value.dtype), [*value.shape], raw]}
    if isinstance(value, np.ndarray):
        return {"array": torch.from_numpy(value.copy(order="K"))}
    if isinstance(value, np.generic):
        return {"scalar": torch.from_numpy(np.asarray(value))}
    if isinstance(value, Synchronized):
        return {"shared": value.value}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}  # no file holds empty ones
    if isinstance(value, enum.Enum):
        return {"member": [kinds.named(type(value)), kinds.name_of(value)]}
    if kinds.base_of(type(value)):
        parts = (kinds.content_of(value), kinds.attributes_of(value))
        return {"own": [kinds.named(type(value)), *map(pack, parts)]}
    if isinstance(value, dict):
        content = [[pack(key) for key in value], [pack(one) for one in value.values()]]
        if isinstance(value, defaultdict):
            return {"defaultdict": [getattr(value.default_factory, "__name__", ""), *content]}
        return {type(value).__name__: content}
    if isinstance(value, (set, frozenset)):
        return {type(value).__name__: sorted(map(pack, value), key=repr)}
    if isinstance(value, deque):
        return {"deque": [value.maxlen, *map(pack, value)]}
    if kinds.is_named_tuple(value):
        return {"named": [kinds.named(type(value)), *map(pack, value)]}
    if isinstance(value, (list, tuple)):
        short = _is_of_short_integers(value)
        return {type(value).__name__: torch.tensor(value) if short else [pack(one) for one in value]}
    return value


def _is_of_short_integers(value: Any) -> bool:
    """Whether it is a list of what a tensor holds, as a permutation of a data set's indices is."""
    if not isinstance(value, (list, tuple)) or set(map(type, value)) != {int}:
        return False
    return bool(min(value) >= -(2**63) and max(value) < 2**63)


def unpack(packed: Any) -> Any:
    """Return a value of its own that `pack` was given.

    Raises:
        RestoreError: there is no such class of named tuples, or of an enumeration.
    """
    if isinstance(packed, torch.Tensor):
        return packed.clone()
    if not isinstance(packed, dict):
        return packed
    ((kind, inner),) = packed.items()
    if kind == "array":
        return inner.clone().numpy()
    if kind == "raw":
        dtype = np.lib.format.descr_to_dtype(inner[0])
        return np.frombuffer(inner[2].numpy().tobytes(), dtype).reshape(inner[1]).copy()
    if kind == "scalar":
        return inner.numpy()[()]
    if kind == "parameter":
        return torch.nn.Parameter(inner[0].clone(), inner[1])
    if kind == "shared":
        return Shared(inner)
    if kind in _DICTS:
        return _DICTS[kind](dict(zip(map(unpack, inner[0]), map(unpack, inner[1]), strict=True)))
    if kind == "defaultdict":
        return defaultdict(
            FACTORIES.get(inner[0]), zip(map(unpack, inner[1]), map(unpack, inner[2]), strict=True)
        )
    if kind == "named":
        return kinds.named_tuple(inner[0], map(unpack, inner[1:]))
    if kind == "member":
        return kinds.member(*inner)
    if kind == "own":
        return kinds.made_of(inner[0], *map(unpack, inner[1:]))
    if kind == "range":
        return range(*inner)
    if kind == "bytes":
        return bytes.fromhex(inner)
    if kind == "deque":
        return deque(map(unpack, inner[1:]), inner[0])
    items = inner.tolist() if isinstance(inner, torch.Tensor) else map(unpack, inner)
    return {"list": list, "tuple": tuple, **_SETS}[kind](items)


def is_large_container(value: Any) -> bool:
    """Whether a value is a list, dict or the like of more than `LARGE` bytes."""
    if not _is_container(value, _DEPTH):
        return False
    return 8 * len(value) > LARGE or (size_of(value, LARGE) or 0) > LARGE


def equal(a: Any, b: Any) -> bool:
    """Whether two values that `pack` returned are the same."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)
