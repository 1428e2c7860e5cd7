"""Trees of tensors and plain data: what a file may hold, put back in place, measured."""

from __future__ import annotations

import copy
import re
import sys
from collections import Counter, OrderedDict, deque
from multiprocessing.sharedctypes import Synchronized
from typing import Any, NamedTuple

import numpy as np
import torch

from chainrun.checkpoint import kinds
from chainrun.errors import RegisterError
from chainrun.owned import fields

_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_KEYS = (*_PLAIN, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_STRIDED = torch.strided
_LAYOUTS = (
    *(torch.strided, torch.sparse_coo),
    *(torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc),
)
_UNKNOWN = {  # to torch.save: those of less than a byte
    dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
    and re.fullmatch(r"torch\.(int|uint|bits)([1-7]|1x8|2x4|4x2)", str(dtype))
}
_INT = 1 << 62
_INT_BITS = 2040  # torch.load's weights_only reader knows integers of up to 255 bytes
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)


def _is_common(value: Any) -> bool:
    """Whether it is of those kinds that are nearly all there is in a state, and that every checkpoint can hold."""
    kind = type(value)
    if kind in _TENSORS:
        plain = value.dtype not in _UNKNOWN and not value.is_nested and not value.__dict__
        return plain and value.layout is _STRIDED
    return kind is str or kind is float or kind is bool or (kind is int and -_INT <= value <= _INT)


def check(tree: Any, path: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not open again.

    Raises:
        RegisterError: names the path and the type.
    """
    kind = type(tree)
    if kind is bytes and not tree:
        raise RegisterError(f"{path} is empty bytes, which a checkpoint cannot hold; use None")
    if kind is int and tree.bit_length() >= _INT_BITS:
        raise RegisterError(
            f"{path} is an int of {tree.bit_length()} bits; a checkpoint holds up to {_INT_BITS - 1}"
        )
    if isinstance(tree, torch.Tensor):
        if tree.is_nested or tree.layout not in _LAYOUTS or tree.dtype in _UNKNOWN:
            what = "nested" if tree.is_nested else f"{tree.layout}, {tree.dtype}"
            raise RegisterError(
                f"{path} is a tensor that torch cannot save and load again ({what}); keep it as one or more "
                "ordinary tensors, and make it from them"
            )
        if kind not in _TENSORS and kind not in torch.serialization.get_safe_globals():
            raise RegisterError(
                f"{path} is a tensor of the class {kind.__module__}.{kind.__qualname__}, which a checkpoint "
                "cannot hold; use plain tensors, or name the class in torch.serialization.add_safe_globals "
                "before the training and before every load"
            )
        check(vars(tree), f"{path}.__dict__")
    elif kind in _CONTAINERS:
        if isinstance(tree, dict):
            for key, value in tree.items():
                if type(key) not in _KEYS:
                    raise RegisterError(
                        f"{path} has a key of type {type(key).__qualname__}; use str or int keys"
                    )
                if not _is_common(key):
                    check(key, f"a key of {path}")
                if not _is_common(value):
                    check(value, f"{path}.{key}")
        else:
            for index, value in enumerate(tree):
                if not _is_common(value):
                    check(value, f"{path}[{index}]")
    elif kind not in _PLAIN:
        raise RegisterError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; use numbers, "
            "strings, lists, dicts, deques, tensors and arrays of numbers"
        )


def copied(tree: Any, known: dict[int, Any] | None = None) -> Any:
    """Return a deep copy; what shares memory in the tree shares it in the copy.

    Args:
        known: copies of some of what is in it, by the id of what they are copies of.
    """
    memo = {} if known is None else known
    # as tensors, since a copy of an array knows nothing of others that use its memory
    rest = kinds.split({"": tree})
    _copy_others(rest, memo)
    return kinds.join(copy.deepcopy(rest, memo))[""]


def _copy_others(tree: Any, memo: dict[int, Any]) -> None:
    """Fill the memo of a deep copy with what has no such copy: CSR tensors and their kin."""
    if isinstance(tree, torch.Tensor):
        if tree.layout not in (torch.strided, torch.sparse_coo):
            memo[id(tree)] = tree.clone()
    elif isinstance(tree, (dict, list, tuple)):
        for value in tree.values() if isinstance(tree, dict) else tree:
            _copy_others(value, memo)


class Shared(NamedTuple):
    """What a number has been that processes share (`multiprocessing.Value`), which is never made anew."""

    value: Any


def refilled(live: Any, value: Any) -> Any:
    """Return what has the content of `value`, the same objects as far as that is possible: a function holds on to them.

    Args:
        value: of nobody else.
    """
    if type(value) is Shared:
        if isinstance(live, Synchronized):
            live.value = value.value
        return live
    if type(live) is not type(value) or live is value:
        return value
    if isinstance(live, torch.Tensor):
        if not (_is_alike(live, value) and live.layout == value.layout):
            return value
        with torch.no_grad():
            live.copy_(value)  # it may be a view
    elif isinstance(live, np.ndarray):
        if not (_is_alike(live, value) and live.flags.writeable):
            return value
        live[...] = value
    elif isinstance(live, dict):
        content = {key: refilled(dict.get(live, key), one) for key, one in kinds.content_of(value).items()}
        kinds.fill(live, content, kinds.attributes_of(value))  # the order of the keys is content too
    elif isinstance(live, list):
        kinds.fill(live, _items(live, value), kinds.attributes_of(value))
    elif type(live) is tuple:
        items = _items(live, value)
        same = len(live) == len(items) and all(old is new for old, new in zip(live, items, strict=True))
        return live if same else tuple(items)
    elif isinstance(live, set):
        live.clear()
        live.update(value)
    elif isinstance(live, deque) and live.maxlen == value.maxlen:
        items = _items(live, value)
        live.clear()
        live.extend(items)
    else:
        return value
    return live


def _is_alike(live: Any, value: Any) -> bool:
    return (live.shape, live.dtype) == (value.shape, value.dtype)


def _items(live: Any, value: Any) -> list[Any]:
    base = next(base for base in (list, tuple, deque) if isinstance(live, base))
    old = [*base.__iter__(live)]
    return [refilled(old[n] if n < len(old) else None, one) for n, one in enumerate(base.__iter__(value))]


def duplicate(value: Any, most: int = sys.maxsize) -> Any:
    """Return a copy of an object of the user's with containers of its own; the object, where it cannot be copied.

    Args:
        most: bytes of a tensor or an array, above which it is shared.
    """
    try:
        made = copy.copy(value)
    except Exception:  # a copy is the class's own affair
        return value
    for name, one in fields(made):
        if isinstance(one, torch.Tensor):
            if nbytes(one) <= most:
                set_attribute(made, name, one.clone())
        elif isinstance(one, (list, dict, set, deque, np.ndarray)) and getattr(one, "nbytes", 0) <= most:
            set_attribute(made, name, copy.copy(one))
    return made


def set_attribute(owner: Any, name: str, value: Any) -> None:
    """Set an attribute, also of a class that does not let it be set."""
    try:
        setattr(owner, name, value)
    except (AttributeError, TypeError):
        object.__setattr__(owner, name, value)


def nbytes(tree: Any) -> int:
    """Return how many bytes the tensors of a tree hold."""
    if isinstance(tree, torch.Tensor):
        # of a sparse one it is not defined
        return tree.nbytes if tree.layout == torch.strided and not tree.is_meta else 0
    if isinstance(tree, dict):
        return sum(nbytes(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(nbytes(value) for value in tree)
    return 0
