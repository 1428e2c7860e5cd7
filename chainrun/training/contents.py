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
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch

from chainrun.checkpoint.bits import fingerprint
from chainrun.errors import RegisterError, RestoreError
from chainrun.owned import FOREIGN, is_users_own
from chainrun.training import carried, rng
from chainrun.training.packed import (
    LARGE,
    equal,
    is_large_container,
    pack,
    refilled,
    sample,
    size_of,
    some,
    unpack,
    without_folders,
)

_HOLDS = (
    str,
    bytes,
    list,
    tuple,
    dict,
    set,
    deque,
    np.ndarray,
    torch.Tensor,
    enum.Enum,
)  # what is no open file
_DEPTH, _WIDTH = 6, 64  # how deep objects are looked for, and in how long containers
_NOT_STATE: Any = object()


class Contents:
    """The plain attributes of a data set and of the user's objects in it, as far as they have changed.

    State are numbers, strings that are no paths, and lists, tuples, dicts, sets, deques, arrays and tensors of them.

    Args:
        dataset: as it was built.
        caches: it may keep what it can make again: large containers are left alone, and so is each object that has
            got a file or the like since it was built, whose other attributes may tell that it has.
        large: whether large tensors and arrays are looked at; a worker would do so at every batch.
    """

    def __init__(self, dataset: Any, *, caches: bool = False, large: bool = True) -> None:
        self.thing, self.caches, self._large = dataset, caches, large
        self._known: dict[str, tuple[bytes, Any]] = {}  # by place: a value's mark, and what it is encoded as
        self._left_alone: set[str] = set()  # the paths of objects with files
        self._others: set[str] | None = None  # the places of what was no state when it was built
        self._built = self._all()

    def _all(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        others: set[str] = set()
        for path, owner in self.owners().items():
            mine, opened = {}, set()
            for name, value in carried.fields(owner):
                place = f"{path}.{name}"
                mine[place] = self._encoded(place, value)
                if mine[place] is _NOT_STATE and not isinstance(value, _HOLDS):
                    opened.add(place)
            others |= opened
            if self.caches and self._others is not None and not opened <= self._others:
                self._left_alone.add(path)
            if path not in self._left_alone:
                found |= {place: value for place, value in mine.items() if value is not _NOT_STATE}
        self._others = others if self._others is None else self._others
        return found

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
        return _owners(self.thing, lambda one: True)

    def state_dict(self) -> dict[str, Any]:
        """Return what is not as it was built: the content, of what is large a mark."""
        return {
            path: value
            for path, value in self._all().items()
            if path not in self._built or not equal(value, self._built[path])
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all that is small, in place where others may know it; `check` tells of the rest."""
        owners, now = self.owners(), self._all()
        for place, value in {**self._built, **state}.items():
            path, _, name = place.rpartition(".")
            if path in self._left_alone or path not in owners:
                continue
            if not (place in now and equal(value, now[place])):
                _set(owners[path], name, value)

    def check(self, state: dict[str, Any], where: str) -> None:
        """See that what is too large to be carried is what it was.

        Raises:
            RestoreError: it is not.
        """
        for path, value in self._all().items():
            then = state.get(path, self._built.get(path))
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


def _owners(root: Any, is_followed: Callable[[Any], bool]) -> dict[str, Any]:
    """Return an object and the user's objects in it, by their places."""
    found: dict[str, Any] = {}
    seen: set[int] = set()
    todo: list[tuple[str, Any, int]] = [("", root, _DEPTH)]
    while todo:
        path, owner, depth = todo.pop()
        if id(owner) not in seen:
            seen.add(id(owner))
            found[path] = owner
            for name, value in carried.fields(owner) if depth else ():
                inside = ((at, one) for at, one in _objects_in(value) if is_followed(one))
                todo += ((f"{path}.{name}{at}", one, depth - 1) for at, one in inside)
    return found


def _is_state(value: Any) -> bool:
    return not _is_path(value) and size_of(value, sys.maxsize) is not None


def _is_path(value: Any) -> bool:
    """Whether it is a path, which may be the job's own."""
    return type(value) is str and os.sep in value


def of_parts(*parts: Any, large: bool = True) -> list[Contents]:
    """Return the contents of a map-style data set and a collate function, as far as these have no state_dict."""
    objects = (part for part in parts if not isinstance(part, types.FunctionType))
    return [Contents(one, caches=True, large=large) for one in objects if not carried.is_stateful(one)]


def check(carriers: list[carried.Carrier], states: list[Any], where: str) -> None:
    """Have all contents among the carriers checked, once they are set.

    Raises:
        RestoreError: what is too large to be set is not what it was.
    """
    for carrier, state in zip(carriers, states, strict=True):
        if isinstance(carrier, Contents):
            carrier.check(state, where)


def _objects_in(value: Any, at: str = "", depth: int = _DEPTH) -> Iterator[tuple[str, Any]]:
    """Yield the user's objects that a value is, or has in it, and where; none that has state of its own."""
    if isinstance(value, (list, tuple, dict)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in items if len(value) <= _WIDTH and depth else ():
            yield from _objects_in(one, f"{at}[{key!r}]", depth - 1)
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
    if _is_large(packed):
        return
    live: Any = getattr(owner, name, None)
    value = refilled(live, unpack(packed))
    if value is not live:
        setattr(owner, name, value)
