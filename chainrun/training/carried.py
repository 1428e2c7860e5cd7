"""The state that data sets, samplers and collate functions carry inside: generators, and what has a state_dict.

Nobody registers it, and a loader's workers hold copies of it that nobody could. It is found by following
attributes, small containers, closures, class attributes and the global names that the code uses, always in
the same order.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch

from chainrun.errors import RegisterError, RestoreError
from chainrun.owned import FOREIGN
from chainrun.training import rng

Carrier: TypeAlias = Any  # a generator, or an object with state_dict and load_state_dict

_LEAVES = (int, float, complex, str, bytes, type(None), type, torch.Tensor, np.ndarray)
_DEPTH, _WIDTH = 6, 64  # how deep attributes are followed; longer containers hold data, not generators
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod, property)


def is_stateful(value: Any) -> bool:
    """Whether it gives its state and takes it back; a network does too, but is nothing that loading changes."""
    if isinstance(value, (*FUNCTIONS, types.ModuleType, torch.nn.Module)):
        return False
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


def find(*roots: Any, generators_only: bool = False) -> list[Carrier]:
    """Return what is reachable, in a fixed order."""
    found: list[Carrier] = []
    seen: set[int] = set()
    stack = [(root, _DEPTH) for root in reversed(roots)]
    while stack:
        value, depth = stack.pop()
        if isinstance(value, _LEAVES) or id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, rng.GENERATORS):
            found.append(value)
        else:
            if not generators_only and is_stateful(value):
                found.append(value)
            if depth:
                stack.extend((child, depth - 1) for child in reversed(list(_children(value))))
    return found


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values() if len(value) <= _WIDTH else ()
    elif isinstance(value, (list, tuple)):
        yield from value if len(value) <= _WIDTH else ()
    elif isinstance(value, types.FunctionType):
        yield from _children_of_function(value)
    elif isinstance(value, types.MethodType):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, (staticmethod, classmethod)):
        yield value.__func__
    elif isinstance(value, property):
        yield value.fget
    elif isinstance(value, functools.partial):
        yield from (value.func, *value.args, *value.keywords.values())
    elif not isinstance(value, types.ModuleType):
        yield from getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            if _is_users(kind):
                for name in _slots(kind):
                    yield getattr(value, name, None)
                yield from vars(kind).values()


def fields(value: Any) -> list[tuple[str, Any]]:
    """Return an object's own attributes, those in slots too."""
    slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
    named = [(name, getattr(value, name)) for name in slots if not name.startswith("__")]
    return [*getattr(value, "__dict__", {}).items(), *named]


def _is_users(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] not in FOREIGN


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _children_of_function(function: types.FunctionType) -> Iterator[Any]:
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not yet bound
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    if not _is_users(function):
        return
    names = _names(function.__code__)
    for name in names:
        value = function.__globals__.get(name)
        if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in FOREIGN:
            values = [vars(value).get(inner) for inner in names]
        else:
            values = [value]
        yield from (each for each in values if isinstance(each, (*rng.GENERATORS, *FUNCTIONS)))


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The global names and attributes that code uses, that of functions inside it too."""
    inner = (const for const in code.co_consts if isinstance(const, types.CodeType))
    return tuple(dict.fromkeys([*code.co_names, *(name for each in inner for name in _names(each))]))


def get(carriers: list[Carrier]) -> list[Any]:
    """Return their states: bytes of a generator, the state_dict of others."""
    return [rng.get(c) if isinstance(c, rng.GENERATORS) else c.state_dict() for c in carriers]


def put(carriers: list[Carrier], states: list[Any], where: str) -> None:
    """Set the carriers found somewhere to the states of those found there before.

    Raises:
        RestoreError: there are not as many as there were.
    """
    if len(carriers) != len(states):
        raise RestoreError(
            f"{where}: {len(carriers)} random generators and objects with state were found, {len(states)} when "
            "the checkpoint was taken; build it as it was then"
        )
    for carrier, state in zip(carriers, states, strict=True):
        if isinstance(carrier, rng.GENERATORS) != isinstance(state, bytes):
            raise RestoreError(
                f"{where}: a {type(carrier).__name__} was something else when the checkpoint was taken"
            )
        if isinstance(state, bytes):
            rng.put(carrier, state)
        else:
            carrier.load_state_dict(copy.deepcopy(state))  # it never gets hold of the saved one


def refuse_new(before: int, now: int, where: str) -> None:
    """Refuse generators that appear while they are used: a resumed process could not know of them.

    Raises:
        RegisterError: there are not as many as there were.
    """
    if before != now:
        raise RegisterError(
            f"{where}: there were {before} random generators and objects with state before the first item was "
            f"loaded, now there are {now}; create them when the object is built (in a worker: in "
            "worker_init_fn), else a resume cannot set them"
        )


def to_plain(states: list[Any]) -> list[Any]:
    """Return what `get` returned in the form that is saved."""
    return [rng.to_tensor(state) if isinstance(state, bytes) else {"state": state} for state in states]


def from_plain(states: list[Any]) -> list[Any]:
    """Return what `to_plain` was given."""
    return [state["state"] if isinstance(state, dict) else rng.from_tensor(state) for state in states]


class Attributes:
    """The plain attributes of what has no state_dict, as far as they have changed since it was built.

    An epoch, a count of its own, a list that it shuffles in place, one by label: numbers, and lists, dicts, tensors
    and arrays of them. Objects and strings are not state.

    Args:
        thing: a sampler.
        dataset: an attribute that is left out.
    """

    def __init__(self, thing: Any, dataset: Any) -> None:
        self._thing, self._dataset = thing, dataset
        self._built = self._all()

    def _all(self) -> dict[str, Any]:
        plain = {
            name: _encode(dict(value) if type(value) is defaultdict else value)
            for name, value in getattr(self._thing, "__dict__", {}).items()
            if value is not self._dataset
        }
        return {name: value for name, value in plain.items() if value is not _NOT_PLAIN}

    def state_dict(self) -> dict[str, Any]:
        return {
            name: value
            for name, value in self._all().items()
            if name not in self._built or not equal(value, self._built[name])
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        now = self._all()
        for name, value in {**{k: v for k, v in self._built.items() if k in now}, **state}.items():
            if name not in now or not equal(value, now[name]):
                decoded, old = _decode(value), getattr(self._thing, name, None)
                if type(old) is defaultdict and type(decoded) is dict:  # it keeps what makes its values
                    old.clear()
                    old.update(decoded)
                else:
                    setattr(self._thing, name, decoded)


_NOT_PLAIN: Any = object()
_NUMBERS = (bool, int, float, type(None))


def _encode(value: Any) -> Any:
    if type(value) in _NUMBERS:
        return value
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": torch.from_numpy(value.copy())}
    if type(value) in (list, tuple):
        kind = type(value).__name__
        if value and all(type(item) is int and abs(item) < 2**63 for item in value):
            return {kind: torch.tensor(value)}
        items = [_encode(item) for item in value]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else {kind: items}
    if type(value) is dict and all(
        type(key) in (*_NUMBERS, str) or isinstance(key, np.generic) for key in value
    ):
        items = [_encode(item) for item in value.values()]
        return _NOT_PLAIN if any(item is _NOT_PLAIN for item in items) else {"dict": [[*value], items]}
    return _NOT_PLAIN


def _decode(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.clone()
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "array":
        return inner.clone().numpy()
    if kind == "dict":
        return dict(zip(inner[0], map(_decode, inner[1]), strict=True))
    items = inner.tolist() if isinstance(inner, torch.Tensor) else [_decode(item) for item in inner]
    return items if kind == "list" else tuple(items)


def equal(a: Any, b: Any) -> bool:
    """Whether two values in the form that is saved are the same."""
    if a is b:
        return True
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return type(a) is type(b) and bool(a == b)
