"""What a data set or a collate function without state_dict keeps in attributes, of objects inside it too.

Nobody gives it, so it is looked for: counters, the order of a list that is shuffled in place, sums. What is small is
saved and set again. Of what is large a sample is remembered, by which a resume tells that it has changed.

A map-style data set may hold a cache, which is no state and may be large: there a large container is left alone.
"""

from __future__ import annotations

import argparse
import enum
import functools
import marshal
import os
import sys
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch

from chainrun.checkpoint import kinds
from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.state import refilled, set_attribute
from chainrun.errors import RegisterError, RestoreError
from chainrun.owned import FOREIGN, is_users_own
from chainrun.training import carried, rng
from chainrun.training.packed import (
    LARGE,
    equal,
    is_large_container,
    pack,
    sample,
    size_of,
    some,
    unpack,
    without_folders,
)

# what is no open file
_HOLDS = (str, bytes, list, tuple, dict, set, frozenset, deque, np.ndarray, torch.Tensor, enum.Enum)
_CODE = (types.FunctionType, types.BuiltinFunctionType, type)
_WHICH = {"is", "code", "objects", "kind"}  # the keys of what tells which one a value is
_DEPTH = 6  # how deep objects are looked for
WIDTH = 64
"""In how long containers objects are looked for."""
_NOT_STATE: Any = object()


class Contents:
    """The plain attributes of a data set and of the user's objects in it, as far as they have changed.

    State are numbers, strings that are no paths, and lists, tuples, dicts, sets, deques, arrays and tensors of them.
    Of what is none: which one it is of those that were there when it was built, or which function or class by its name.

    Args:
        dataset: as it was built; or a function, whose attributes, defaults and variables from around it are looked at.
        caches: it may keep what it can make again: large containers are left alone, and so is each object that has
            got a file or the like since it was built, whose other attributes may tell that it has.
        large: whether large tensors and arrays are looked at; a worker would do so at every batch.
    """

    def __init__(self, dataset: Any, *, caches: bool = False, large: bool = True) -> None:
        self.thing, self.caches, self._large = dataset, caches, large
        self._known: dict[str, tuple[bytes, Any]] = {}  # by place: a value's mark, and what it is encoded as
        self._left_alone: set[str] = set()  # the paths of objects with files
        self._there: dict[int, tuple[str, Any]] = {}  # by id: where an object was that is no state, and it
        self._names: dict[int, str] = {}  # those of its owners
        for path, owner in self.owners().items():
            self._there[id(owner)] = path, owner
            for name, value in carried.fields(owner):
                for at, one in _others_in(value):
                    self._there.setdefault(id(one), (f"{path}.{name}{at}", one))
        self._names = {key: path for key, (path, _) in self._there.items()}
        self._objects = dict(self._there.values())
        self._built: dict[str, Any] | None = None
        self._built = self._all()

    def _all(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for path, owner in self.owners().items():
            mine = {}
            for name, value in carried.fields(owner):
                place = f"{path}.{name}"
                packed = self._encoded(place, value)
                if packed is _NOT_STATE:
                    packed = self._which(value)
                    # it was none of what has a content, and is not what a file is opened in
                    if self._built is not None and _kind_in(packed) and not _is_which(self._built.get(place)):
                        packed = _NOT_STATE
                        if self.caches and not isinstance(value, _HOLDS):
                            self._left_alone.add(path)
                if packed is not _NOT_STATE:
                    mine[place] = packed
            if path not in self._left_alone:
                found |= mine
        return found

    def _which(self, value: Any, depth: int = 1) -> Any:
        """Return which one a value is of those that were there, or which function or class: else of which kind."""
        if id(value) in self._there:
            return {"is": self._there[id(value)][0]}
        if isinstance(value, _CODE) and (name := kinds.named(value)):
            return {"code": name}
        if type(value) in (list, tuple) and len(value) <= WIDTH and depth:
            parts = [self._which(one, 0) if size_of(one, LARGE) is None else pack(one) for one in value]
            if not any(map(_kind_in, parts)):
                return {"objects": [type(value).__name__, parts]}
        return {"kind": _described(value)}

    def _encoded(self, place: str, value: Any) -> Any:
        if self.caches and _is_out_of_reach(value, self._large):
            return {"large": ""}
        if not self._large and isinstance(value, Synchronized):  # a worker's is the training process's
            return _NOT_STATE
        mark = _mark(value)
        if mark is None:
            return _encode(value)
        if place not in self._known or self._known[place][0] != mark:
            self._known[place] = mark, _encode(value)
        return self._known[place][1]

    def owners(self) -> dict[str, Any]:
        """Return the data set and the user's objects in it, by their places."""
        return _owners(self.thing, lambda one: True, self._names)

    def state_dict(self) -> dict[str, Any]:
        """Return what is not as it was built: the content, of what is large a mark."""
        built = self._built or {}
        return {p: value for p, value in self._all().items() if p not in built or not equal(value, built[p])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all that is small, in place where others may know it; `check` tells of the rest."""
        owners, now = self.owners(), self._all()
        others = tuple(f"{place}." for place, _, _ in self.replaced(state))
        for place, value in {**(self._built or {}), **state}.items():
            path, _, name = place.rpartition(".")
            if path in self._left_alone or path not in owners or place.startswith(others):
                continue
            if not (place in now and equal(value, now[place])):
                if _is_which(value):
                    _put(owners[path], name, self._made(value, dict(carried.fields(owners[path])).get(name)))
                else:
                    _set(owners[path], name, value)

    def _made(self, which: Any, live: Any = None) -> Any:
        """Return the value; a list in place, if there is one."""
        ((how, what),) = which.items()
        if how == "is":
            return self._objects.get(what, _NOT_STATE)
        if how == "code":
            return kinds.found_again(what)
        if how == "objects":
            items = [self._made(one) if _is_which(one) else unpack(one) for one in what[1]]
            if any(one is _NOT_STATE for one in items):
                return _NOT_STATE
            if what[0] == "tuple":
                return tuple(items)
            made = live if type(live) is list else []
            made[:] = items
            return made
        return _NOT_STATE

    def replaced(self, state: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yield the places where an object of another kind is than there was, of which only the kind is known; both kinds."""
        owners = self.owners()
        for place, value in state.items():
            path, _, name = place.rpartition(".")
            if then := _kind_in(value):
                live = dict(carried.fields(owners[path])).get(name) if path in owners else None
                now = _described(live)
                if now != then:
                    yield place, then, now

    def check(self, state: dict[str, Any], where: str) -> None:
        """See that what is too large to be carried is what it was.

        Raises:
            RestoreError: it is not.
        """
        for path, value in self._all().items():
            then = state.get(path, (self._built or {}).get(path))
            if self.caches and not (_has_sample(value) and _has_sample(then)):
                continue  # a cache that has grown
            if (_is_large(value) or _is_large(then)) and not equal(value, then):
                raise RestoreError(
                    f"{where}: the attribute '{path[1:]}' of the data set {type(self.thing).__name__} had "
                    "changed when the checkpoint was taken, and is too large to be saved beside it. Give the data set "
                    "state_dict and load_state_dict, or make what changes anew in each __iter__()"
                )


class Attributes:
    """The plain attributes of a sampler without state_dict, as far as they have changed since it was built.

    An epoch, a count of its own, a list that it shuffles in place, one by label: however large. And what is small in
    the user's objects that it holds, which are no data.

    Args:
        sampler: as it was built.
        others: what is followed by itself, or not at all: the data set, other samplers.

    Raises:
        RegisterError: it holds a generator, which goes on from pass to pass.
    """

    def __init__(self, sampler: Any, *others: Any) -> None:
        self._sampler, self._others = sampler, {id(other) for other in others}
        for place, value in self._fields():
            if isinstance(value, types.GeneratorType) or type(value).__module__ == "itertools":
                raise RegisterError(
                    f"the sampler {type(sampler).__name__} keeps an iterator in '{place}', and no checkpoint can hold how far "
                    "that has come: make it anew in each __iter__(), or give the sampler state_dict and load_state_dict"
                )
        self._built = self._all()

    def _owners(self) -> dict[str, Any]:
        def is_followed(one: Any) -> bool:
            return id(one) not in self._others and not hasattr(one, "__getitem__")

        return _owners(self._sampler, is_followed)

    def _fields(self) -> Iterator[tuple[str, Any]]:
        for path, owner in self._owners().items():
            for name, value in carried.fields(owner):
                is_small = (size_of(value, LARGE) or 0) <= LARGE
                if id(value) not in self._others and (is_small or not path):
                    yield f"{path}.{name}".removeprefix("."), value

    def _all(self) -> dict[str, Any]:
        return {place: pack(value) for place, value in self._fields() if _is_state(value)}

    def state_dict(self) -> dict[str, Any]:
        """Return those that are not as they were built."""
        built = self._built
        return {n: v for n, v in self._all().items() if n not in built or not equal(v, built[n])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set them all, those that have not changed as they were built."""
        owners, now = self._owners(), self._all()
        for place, value in {**{k: v for k, v in self._built.items() if k in now}, **state}.items():
            path, _, name = place.rpartition(".")
            owner = owners.get(f".{path}" if path else "")
            if owner is not None and (place not in now or not equal(value, now[place])):
                _set(owner, name, value)


def _owners(
    root: Any, is_followed: Callable[[Any], bool], names: Mapping[int, str] = types.MappingProxyType({})
) -> dict[str, Any]:
    """Return an object and the user's objects in it, by their places.

    Args:
        names: the places of some, by their ids, whatever leads to them now.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any, int]] = [("", root, _DEPTH)]
    while todo:
        path, owner, depth = todo.pop()
        if id(owner) not in seen:
            seen.add(id(owner))
            path = names.get(id(owner), path)
            found[path] = owner
            for name, value in carried.fields(owner) if depth else ():
                inside = ((at, one) for at, one in _objects_in(value) if is_followed(one))
                if isinstance(owner, types.FunctionType):
                    inside = ((at, one) for at, one in inside if not _trains(one))
                todo += ((f"{path}.{name}{at}", one, depth - 1) for at, one in inside)
    return found


def _trains(value: Any) -> bool:
    """Whether an object is a trainer, to which a function in a data set leads: what it keeps is the training's."""
    held = (torch.nn.Module, torch.optim.Optimizer, torch.utils.data.DataLoader)
    return any(isinstance(one, held) for _, one in carried.fields(value))


def _is_state(value: Any) -> bool:
    return not _is_path(value) and size_of(value, sys.maxsize) is not None


def _is_path(value: Any) -> bool:
    """Whether it is a path, which may be the job's own."""
    return type(value) is str and os.sep in value


def of_parts(*parts: Any, large: bool = True) -> list[Contents]:
    """Return the contents of a map-style data set and a collate function, as far as these have no state_dict."""
    found = [getattr(part, "__func__", part) for part in parts]
    keeping = [one for one in found if not isinstance(one, types.FunctionType) or carried.fields(one)]
    return [Contents(one, caches=True, large=large) for one in keeping if not carried.is_stateful(one)]


def check(carriers: list[carried.Carrier], states: list[Any], where: str) -> None:
    """Have all contents among the carriers checked, once they are set.

    Raises:
        RestoreError: what is too large to be set is not what it was.
    """
    for carrier, state in zip(carriers, states, strict=True):
        if isinstance(carrier, Contents):
            carrier.check(state, where)


def _others_in(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield a value and those in a short container, as far as they are no state; and where."""
    if size_of(value, LARGE) is not None or _is_path(value):
        return
    if type(value) in (list, tuple, dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        inside = ((f"[{key!r}]", one) for key, one in items if len(value) <= WIDTH)
        yield from ((at, one) for at, one in inside if size_of(one, LARGE) is None)
    else:
        yield "", value


def kind_of(value: Any) -> str:
    """Return the name of a function or a class, of all else that of its class."""
    if not isinstance(value, _CODE):
        return type(value).__qualname__
    is_lambda = isinstance(value, types.FunctionType) and value.__name__ == "<lambda>"
    line = f" in line {value.__code__.co_firstlineno}" if is_lambda else ""  # type: ignore[union-attr]
    return f"{value.__qualname__}{line}"


def _described(value: Any) -> str:
    if type(value) in (list, tuple) and len(value) <= WIDTH:
        return f"[{', '.join(map(kind_of, value))}]"
    return kind_of(value)


def _is_which(packed: Any) -> bool:
    return isinstance(packed, dict) and not packed.keys().isdisjoint(_WHICH)


def _kind_in(packed: Any) -> str:
    return packed.get("kind", "") if isinstance(packed, dict) else ""


def replaced(carriers: list[carried.Carrier], states: list[Any]) -> Iterator[str]:
    """Yield what to tell of objects in contents that were of another kind when the checkpoint was taken."""
    for carrier, state in zip(carriers, states, strict=True):
        for place, then, now in carrier.replaced(state) if isinstance(carrier, Contents) else ():
            yield (
                f"the attribute '{place[1:]}' of {kind_of(carrier.thing)} is not what it was when the run was cut ({then} "
                f"then, {now} here): the training has changed it, and no checkpoint can hold it. Make all of them when "
                "it is built, and choose one of them by a number or a name that it keeps; or give it state_dict and "
                "load_state_dict"
            )


def _objects_in(value: Any, at: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield the user's objects that a value is, or has in it, and where; none that has state of its own."""
    if isinstance(value, (list, tuple, dict)):
        items = dict.items(value) if isinstance(value, dict) else enumerate(value)
        for key, one in items if len(value) <= WIDTH and depth else ():
            yield from _objects_in(one, f"{at}[{key!r}]", depth - 1)
    elif isinstance(value, (types.FunctionType, functools.partial)):
        if is_users_own(value) if isinstance(value, types.FunctionType) else depth:
            yield at, value
    elif isinstance(
        value, (type, enum.Enum, torch.nn.Module, *rng.GENERATORS, *carried.FUNCTIONS)
    ) or carried.is_stateful(value):
        return
    elif _is_followed(type(value)):  # type: ignore[arg-type]
        yield at, value
    elif _is_installed(type(value)):  # type: ignore[arg-type]
        for name, one in vars(value).items() if depth and hasattr(value, "__dict__") else ():
            if type(one) in (list, tuple):  # torchvision's Compose, and the like
                yield from _objects_in(one, f"{at}.{name}", depth - 1)


@functools.cache
def _is_followed(kind: Any) -> bool:
    settings = kind in (argparse.Namespace, types.SimpleNamespace)
    return is_users_own(kind) or settings or kind.__module__ == "torch.utils.data.dataset"


@functools.cache
def _is_installed(kind: Any) -> bool:
    return kind.__module__.partition(".")[0] not in {*FOREIGN, "builtins"}


def _mark(value: Any) -> bytes | None:
    """Return what tells at a glance whether a long flat container is encoded as it was; None of all else."""
    kind = type(value)
    if (
        kind not in (list, tuple, dict, set)
        or len(value) < 8
        or type(next(iter(value))) not in (int, float, str)
    ):
        return None
    try:
        # version 0, in which equal values have equal bytes
        return marshal.dumps(value if 8 * len(value) <= LARGE else [len(value), *some(value)], 0)
    except ValueError:
        return None


def _encode(value: Any) -> Any:
    """Return a value in the form that is saved: of one that is large a mark."""
    size = None if _is_path(value) else size_of(value, LARGE)
    if size is None:
        return _NOT_STATE
    return pack(value) if size <= LARGE else {"large": fingerprint(without_folders(sample(value)))}


def _is_large(packed: Any) -> bool:
    return isinstance(packed, dict) and "large" in packed


def _has_sample(packed: Any) -> bool:
    return _is_large(packed) and packed["large"] != ""


def _is_out_of_reach(value: Any, large: bool) -> bool:
    """Whether a value is a large container, which may be a cache; or any large one, unless they are looked at."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return not large and value.nbytes > LARGE
    return is_large_container(value)


def _set(owner: Any, name: str, packed: Any) -> None:
    """Set an attribute, in place where an iterator may hold what is there."""
    if not _is_large(packed):
        _put(owner, name, refilled(dict(carried.fields(owner)).get(name), unpack(packed)))


def _put(owner: Any, name: str, value: Any) -> None:
    if dict(carried.fields(owner)).get(name, _NOT_STATE) is value or value is _NOT_STATE:
        return
    if not isinstance(owner, carried.FUNCTIONS):
        set_attribute(owner, name, value)
    elif isinstance(owner, types.FunctionType) and name in owner.__code__.co_freevars:
        cells = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
        cells[name].cell_contents = value
    elif name in vars(owner):
        setattr(owner, name, value)
