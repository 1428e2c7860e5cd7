"""The state that data sets, samplers and collate functions carry inside: generators, and what has a state_dict.

Nobody registers it, and a loader's workers hold copies of it that nobody could. It is found by following
attributes, small containers, closures, class attributes and the global names that the code uses, always in
the same order.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch

from chainrun import owned
from chainrun.errors import RegisterError, RestoreError
from chainrun.owned import FOREIGN
from chainrun.training import rng

Carrier: TypeAlias = Any  # a generator, or an object with state_dict and load_state_dict

_LEAVES = (int, float, complex, str, bytes, type(None), type, torch.Tensor, np.ndarray)
_DEPTH, _WIDTH = 6, 64  # how deep attributes are followed; longer containers hold data, not generators
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial, staticmethod, classmethod, property)


# what a trainer has that is registered by itself
_REGISTERED = (
    torch.nn.Module,
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.amp.GradScaler,
)


def is_stateful(value: Any) -> bool:
    """Whether it gives its state and takes it back; a network does too, but is nothing that loading changes."""
    if isinstance(value, (*FUNCTIONS, types.ModuleType, *_REGISTERED)):
        return False
    if _is_chainruns(value):
        return False
    try:
        return callable(getattr(value, "state_dict", None)) and callable(
            getattr(value, "load_state_dict", None)
        )
    except Exception:  # ``__getattr__ = dict.__getitem__``: a KeyError
        return False


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
    elif not isinstance(value, types.ModuleType) and not _is_chainruns(value):
        yield from getattr(value, "__dict__", {}).values()
        for kind in type(value).__mro__:
            if _is_users(kind):
                for name in _slots(kind):
                    yield getattr(value, name, None)
                yield from vars(kind).values()


def _is_chainruns(value: Any) -> bool:
    """Whether it is a loader or the like, to which a trainer leads whose method collates: found by itself."""
    return type(value).__module__.partition(".")[0] == "chainrun"


def fields(value: Any) -> list[tuple[str, Any]]:
    """Return an object's own attributes, those in slots too; of a function also what it is given when it is made."""
    if isinstance(value, types.FunctionType):
        return [*vars(value).items(), *_given(value)]
    if isinstance(value, functools.partial):
        named = [("func", value.func), *((f"argument {n}", one) for n, one in enumerate(value.args))]
        return [*named, *((f"keyword {name}", one) for name, one in value.keywords.items())]
    return owned.fields(value)


def _is_users(thing: Any) -> bool:
    return (getattr(thing, "__module__", None) or "builtins").partition(".")[0] not in FOREIGN


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _children_of_function(function: types.FunctionType) -> Iterator[Any]:
    yield from (value for _, value in _given(function))
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


def _given(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the variables from around a function and the defaults of its arguments, by their names."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not yet bound
            continue
    defaults = function.__defaults__ or ()
    yield from zip(
        code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=True
    )
    yield from (function.__kwdefaults__ or {}).items()


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
