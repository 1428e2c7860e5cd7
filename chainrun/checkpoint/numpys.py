"""NumPy's numbers in a state: a learning rate from `np.linspace`, a best value from `np.mean`.

They are not Python's: a float32 is added to otherwise. But a file that plain ``torch.load(weights_only=True)`` opens
holds none. So Python's are in their places, and beside them is said where, and of which kinds, NumPy's were.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

PLACES = "numpys"
"""The key in a rank's tree."""

_CONTAINERS = (dict, OrderedDict, Counter, list, tuple)


def split(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree without such numbers; what has none in it is the same object."""
    places: list[Any] = []
    rest: dict[str, Any] = _without(tree, (), places, {})
    return {**rest, PLACES: places} if places else tree


def join(tree: dict[str, Any]) -> dict[str, Any]:
    """Put the numbers into a tree that `split` returned, in place."""
    for keys, kind in tree.pop(PLACES, ()):
        _put(tree, keys, np.dtype(kind).type)
    return tree


def _without(value: Any, keys: tuple[Any, ...], places: list[Any], known: dict[int, Any]) -> Any:
    if isinstance(value, np.generic):
        plain = value.item()
        if type(plain) not in (bool, int, float, complex):  # text, dates, numbers that Python has not
            return value
        places.append((list(keys), value.dtype.str))
        return plain
    if type(value) not in _CONTAINERS:
        return value
    if id(value) in known:
        return known[id(value)]
    content = dict(value if isinstance(value, dict) else enumerate(value))
    rest = {key: _without(one, (*keys, key), places, known) for key, one in content.items()}
    made = value
    if any(rest[key] is not one for key, one in content.items()):
        if isinstance(value, tuple):
            return tuple(rest.values())  # in every place that it is in: it is not changed in place
        made = copy.copy(value)
        for key, one in rest.items():
            made[key] = one
    known[id(value)] = made
    return made


def _put(value: Any, keys: Sequence[Any], kind: Any) -> Any:
    if not keys:
        return kind(value)
    first, *rest = keys
    new = _put(value[first], rest, kind)
    if isinstance(value, tuple):
        return (*value[:first], new, *value[first + 1 :])
    value[first] = new
    return value
