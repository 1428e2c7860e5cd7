"""Which variable holds an iterator over a loader, so that a resumed function's can be given it again.

What a turn of a loop has made is not made again on the way to a later one: ``if step % 100 == 0: it = iter(loader)``.
"""

from __future__ import annotations

import ctypes
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from chainrun.owned import fields, is_users_own
from chainrun.training.variables import frames_within, locals_of

_DEPTH, _WIDTH = 2, 64

Path = list[Any]
"""The names of a function and of its variable, and the attributes and items that lead from there, as pairs."""


def find(iterator: Any, outside: frozenset[types.CodeType]) -> Path | None:
    """Return the path to an iterator, None where no variable of the functions that run leads to it.

    Args:
        outside: the code that ran before the run was begun.
    """
    for frame in frames_within(outside):
        for name, value in locals_of(frame).items():
            steps = _steps_to(iterator, value, _DEPTH)
            if steps is not None:
                return [frame.f_code.co_name, name, *steps]
    return None


def give(path: Path, outside: frozenset[types.CodeType], make: Callable[[], Any]) -> None:
    """Have what a path leads to hold what `make` returns, which is called where there is such a place."""
    function, name, *steps = path
    for frame in frames_within(outside):
        code = frame.f_code
        if code.co_name != function or name not in (*code.co_varnames, *code.co_cellvars, *code.co_freevars):
            continue
        values = locals_of(frame)
        if not steps:
            _set_local(frame, name, make())
        elif (owner := _owner(values.get(name), steps)) is not None:
            kind, key = steps[-1]
            if kind == "attribute":
                setattr(owner, key, make())
            else:
                owner[key] = make()
        return


def _steps_to(iterator: Any, value: Any, depth: int) -> Path | None:
    if value is iterator:
        return []
    for step, inner in _inside(value) if depth else ():
        steps = _steps_to(iterator, inner, depth - 1)
        if steps is not None:
            return [step, *steps]
    return None


def _inside(value: Any) -> Iterator[tuple[list[Any], Any]]:
    if type(value) in (list, dict):
        items = (
            list(value.items() if type(value) is dict else enumerate(value)) if len(value) <= _WIDTH else []
        )
        yield from ((["item", key], one) for key, one in items if type(key) in (int, str))
    elif is_users_own(type(value)):
        yield from ((["attribute", name], one) for name, one in fields(value))


def _owner(value: Any, steps: Path) -> Any:
    """Return what has the attribute or item of the last step, None where there is no such thing."""
    for step in steps[:-1]:
        value = next((one for each, one in _inside(value) if each == step), None)
    kind, key = steps[-1]
    if kind == "attribute":
        return value if is_users_own(type(value)) else None
    fits = type(value) is dict or (type(value) is list and type(key) is int and key < len(value))
    return value if fits else None


def _set_local(frame: types.FrameType, name: str, value: Any) -> None:
    frame.f_locals[name] = value
    if sys.version_info < (3, 13):  # before PEP 667 it is a copy, which is written back as debuggers do
        ctypes.pythonapi.PyFrame_LocalsToFast(ctypes.py_object(frame), ctypes.c_int(0))
    locals_of(frame)  # leaves no second reference behind
