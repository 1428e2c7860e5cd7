"""What a data set or a collate function without state_dict keeps in attributes, of objects inside it too.

Nobody gives it, so it is looked for: counters, the order of a list that is shuffled in place, sums. What is small is
saved and set again. Of what is large a sample is remembered, by which a resume tells that it has changed.

A map-style data set may hold a cache, which is no state and may be large: there a large container is left alone.
"""

from __future__ import annotations

import copy
import enum
import functools
import marshal
import os
import sys
import types
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from multiprocessing.sharedctypes import Synchronized
from typing import Any

import numpy as np
import torch

from chainrun.checkpoint import kinds
from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.state import duplicate, refilled, set_attribute
from chainrun.errors import RegisterError, RestoreError
from chainrun.owned import FOREIGN, RECORDS, is_users_own
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
_MUTABLE = (list, dict, set, deque, np.ndarray, torch.Tensor)
_OF_OBJECTS = (list, tuple, dict, deque)  # in which one by one is told from others
_CODE = (
    *(types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType),
    *(np.ufunc, functools._lru_cache_wrapper, type),
)
_WHICH = {"is", "code", "bound", "objects", "kind"}  # the keys of what tells which one a value is
_DEPTH = 6  # how deep objects are looked for
WIDTH = 64
"""In how long containers objects are looked for."""
_NOT_STATE: Any = object()
_NOTHING: Mapping[Any, Any] = types.MappingProxyType({})


class Contents:
    """The plain attributes of a data set and of the user's objects in it, as far as they have changed.

    State are numbers, strings that are no paths, and lists, tuples, dicts, sets, deques, arrays and tensors of them.
    Of what is none: which one it is of those that were there when it was built, or which function or class by its name.
    What the training has put in the place of another object is not written into that one, which others may hold.

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
        # what may be told from others of its kind, by where it was when built; called, it is given, if it is still there
        self._objects: dict[str, Callable[[], Any]] = {}
        self._places: dict[int, str] = {}  # of those, by their ids
        # those that were there: what they hold counts also while they are put aside
        self._owners: dict[str, Any] = {}
        self._owners = self.owners()
        for path, owner in self._owners.items():
            self._note(path, owner)
        for path, owner in self.owners().items():
            for name, value in carried.fields(owner):
                for at, one in _objects_of(value):
                    self._note(f"{path}.{name}{at}", one)
        self._built: dict[str, Any] | None = None
        self._built = self._all()

    def _note(self, place: str, one: Any) -> None:
        own = isinstance(one, (*_CODE, *_MUTABLE)) or _is_followed(type(one))  # type: ignore[arg-type]
        try:  # of an index or a table in memory a data set may rid itself
            self._objects[place] = (lambda: one) if own else weakref.ref(one)
        except TypeError:
            self._objects[place] = lambda: one
        self._places.setdefault(id(one), place)

    def _there(self, place: str) -> Any:
        return self._objects[place]() if place in self._objects else None

    def _place_of(self, one: Any) -> str | None:
        """Return where an object was that was there."""
        place = self._places.get(id(one))
        return place if place is not None and self._there(place) is one else None

    def _all(self) -> dict[str, Any]:
        return {place: packed for place, (packed, _) in self._look().items()}

    def _look(self) -> dict[str, tuple[Any, Any]]:
        """Return what is saved of each value, and the value, by its place."""
        found: dict[str, tuple[Any, Any]] = {}
        for path, owner in self.owners().items():
            mine = {}
            for name, value in carried.fields(owner):
                place = f"{path}.{name}"
                packed = self._encoded(place, value)
                if packed is _NOT_STATE:
                    packed = self._which(value)
                    # what had a content, or was not there: a file may have been opened, or a cache filled
                    was_there = self._built is not None and path in self._owners
                    if was_there and _kinds_in(packed) and not _is_which((self._built or {}).get(place)):
                        if isinstance(value, _HOLDS):
                            continue
                        if self.caches and not _is_plain(value):
                            self._left_alone.add(path)
                mine[place] = packed, value
            if path not in self._left_alone:
                found |= mine
        return found

    def _which(self, value: Any, depth: int = 3) -> Any:
        """Return which one a value is of those that were there, or which function or class: else of which kind."""
        if not isinstance(value, _MUTABLE) and (place := self._place_of(value)) is not None:
            return {"is": place}
        if isinstance(value, _CODE) and (name := kinds.named(value)):
            return {"code": name}
        if isinstance(value, types.MethodType) and (owner := self._place_of(value.__self__)) is not None:
            return {"bound": [owner, value.__func__.__name__]}
        if type(value) in _OF_OBJECTS and len(value) <= WIDTH and depth and _has_plain_keys(value):
            parts = [
                pack(one) if size_of(one, LARGE) is not None else self._which(one, depth - 1)
                for one in _items(value)
            ]
            keys = [*map(pack, value)] if isinstance(value, dict) else [getattr(value, "maxlen", None)]
            return {"objects": [type(value).__name__, keys, parts, _described(value)]}
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
        return _owners(self.thing, lambda one: True, self._places, self._owners)

    def state_dict(self) -> dict[str, Any]:
        """Return what is not as it was built: the content, of what is large a mark; and where another object is."""
        built, state = self._built or {}, {}
        for place, (packed, value) in self._look().items():
            other = None if _is_large(packed) else self._moved(place, value)
            if other is not None:
                state[place] = {"is": other} if other else {"new": packed}
            elif place not in built or not equal(packed, built[place]):
                state[place] = packed
        return state

    def _moved(self, place: str, value: Any) -> str | None:
        """Return where a container was that is another one than there was, "" of a new one; None of the same one."""
        if not isinstance(value, _MUTABLE) or value is self._there(place):
            return None
        other = self._place_of(value)
        return other if other is not None or place not in self._objects else ""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set all that is small, in place where others may know it; `check` tells of the rest."""
        others = tuple(f"{place}." for place, _, _ in self.replaced(state))
        values = {
            place: value
            for place, value in {**(self._built or {}), **state}.items()
            if not place.startswith(others)
        }
        which = {place: value for place, value in values.items() if _is_which(_content(value))}
        # first which objects are where, those in new ones then; at last what they hold
        for part in (which, which, {place: value for place, value in values.items() if place not in which}):
            self._load(part)

    def _load(self, state: dict[str, Any]) -> None:
        owners, now = self.owners(), self._all()
        for place, value in state.items():
            path, _, name = place.rpartition(".")
            if path not in self._left_alone and path in owners:
                live, content = dict(carried.fields(owners[path])).get(name), _content(value)
                is_new = content is not value and live is not None and live is self._there(place)
                if is_new or not (place in now and equal(content, now[place])):
                    made = self._made(content, live)
                    if not is_new and "objects" in _keys(content):
                        made = _with_items(live, made)
                    elif not is_new and not _is_which(content):
                        made = refilled(live, made)
                    _put(owners[path], name, made)

    def _made(self, packed: Any, live: Any) -> Any:
        """Return a value; one of which only the kind is known is a copy of what is there, which others may hold."""
        if _is_large(packed):
            return live
        if not _is_which(packed):
            return unpack(packed)
        ((how, what),) = packed.items()
        if how == "is":
            there = self._there(what)
            return live if there is None else there
        if how == "code":
            return kinds.found_again(what)
        if how == "bound":
            return getattr(self._there(what[0]), what[1], live)
        if how == "kind":
            return _copied(live) if what == _described(live) and self._place_of(live) is not None else live
        kind, keys, parts, _ = what
        if _is_lost(packed, live):
            return live
        there = [*_items(live)] if type(live).__name__ == kind else []
        items: Any = [self._made(one, there[n] if n < len(there) else None) for n, one in enumerate(parts)]
        if kind == "deque":
            return deque(items, keys[0])
        if kind == "dict":
            return dict(zip(map(unpack, keys), items, strict=True))
        return tuple(items) if kind == "tuple" else items

    def replaced(self, state: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
        """Yield the places where objects of another kind are than there were, of which only that is known; both kinds."""
        owners = self.owners()
        for place, value in state.items():
            path, _, name = place.rpartition(".")
            if path in owners:
                live = dict(carried.fields(owners[path])).get(name)
                if _is_lost(_content(value), live):
                    yield place, _kinds_in(value), _described(live)

    def check(self, state: dict[str, Any], where: str) -> None:
        """See that what is too large to be carried is what it was.

        Raises:
            RestoreError: it is not.
        """
        for path, value in self._all().items():
            then = _content(state.get(path, (self._built or {}).get(path)))
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
        self._there = {place: value for place, value in self._fields() if isinstance(value, _MUTABLE)}
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
        found = {}
        for place, value in self._fields():
            if _is_state(value):
                found[place] = pack(value)
            elif isinstance(value, _CODE) and (name := kinds.named(value)):
                found[place] = {"code": name}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return those that are not as they were built, and whether another container is in the place of one."""
        built, values = self._built, dict(self._fields())
        state = {n: v for n, v in self._all().items() if n not in built or not equal(v, built[n])}
        replaced = {
            n
            for n, there in self._there.items()
            if isinstance(values.get(n), _MUTABLE) and values[n] is not there
        }
        return {n: {"new": v} if n in replaced else v for n, v in state.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set them all, those that have not changed as they were built."""
        owners, now, values = self._owners(), self._all(), dict(self._fields())
        for place, value in {**{k: v for k, v in self._built.items() if k in now}, **state}.items():
            path, _, name = place.rpartition(".")
            owner, content = owners.get(f".{path}" if path else ""), _content(value)
            is_new = content is not value and values.get(place, _NOT_STATE) is self._there.get(place)
            if owner is None or (place in now and equal(content, now[place]) and not is_new):
                continue
            if _is_which(content):
                _put(owner, name, kinds.found_again(content["code"]))
            elif is_new:  # others may hold what is there
                _put(owner, name, unpack(content))
            else:
                _set(owner, name, content)


def _owners(
    root: Any,
    is_followed: Callable[[Any], bool],
    names: Mapping[int, str] = _NOTHING,
    others: Mapping[str, Any] = _NOTHING,
) -> dict[str, Any]:
    """Return an object and the user's objects in it, by their places.

    Args:
        names: the places of some, by their ids, whatever leads to them now.
        others: objects that are looked at too, whatever leads to them, by their places.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    taken = {*names.values()}
    todo: list[tuple[str, Any, int]] = [*((path, one, 1) for path, one in others.items()), ("", root, _DEPTH)]
    while todo:
        path, owner, depth = todo.pop()
        if id(owner) not in seen:
            seen.add(id(owner))
            # that of another one that was there, whatever has come in its place
            path = names.get(id(owner), f"{path}'" if path in taken else path)
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
    found = []
    for part in parts:
        found.append(getattr(part, "__func__", part))
        owner = getattr(part, "__self__", None) if isinstance(part, types.MethodType) else None
        if owner is not None and not any(owner is one for one in parts) and not _trains(owner):
            found.append(owner)  # an object that collates
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


def _objects_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what may be told from others of its kind, of a value and of what is in it where it is short; and where."""
    if isinstance(value, _MUTABLE):
        if not is_large_container(value) and (size_of(value, LARGE) or 0) <= LARGE:
            yield "", value
    elif (
        size_of(value, LARGE) is None
        and not _is_path(value)
        and not isinstance(value, (tuple, types.MethodType))
    ):
        yield "", value
    if type(value) in _OF_OBJECTS and len(value) <= WIDTH:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        yield from (
            (f"[{key!r}]", one)
            for key, one in items
            if size_of(one, LARGE) is None and not isinstance(one, _HOLDS)
        )


def _is_plain(value: Any, depth: int = _DEPTH) -> bool:
    """Whether an object holds nothing like a file: a function, or one of the user's with values and such objects in it."""
    if isinstance(value, (*_CODE, *_HOLDS)) or size_of(value, LARGE) is not None:
        return True
    if not depth or not (isinstance(value, functools.partial) or _is_followed(type(value))):  # type: ignore[arg-type]
        return False
    return all(_is_plain(one, depth - 1) for _, one in carried.fields(value))


def _copied(value: Any) -> Any:
    """Return a copy of an object of the user's, or of a function with variables around it of its own; else the value."""
    if isinstance(value, functools.partial):
        made: Any = copy.copy(value)
        for name, one in carried.fields(made):
            if isinstance(one, _MUTABLE):
                _put(made, name, one.clone() if isinstance(one, torch.Tensor) else copy.copy(one))
        return made
    if not isinstance(value, types.FunctionType):
        return duplicate(value, LARGE) if _is_followed(type(value)) else value  # type: ignore[arg-type]
    around = dict(carried.fields(value))
    cells = tuple(
        types.CellType(around[name]) if name in around else types.CellType()
        for name in value.__code__.co_freevars
    )
    code, names = value.__code__, value.__globals__
    made = types.FunctionType(code, names, value.__name__, value.__defaults__, cells)
    made.__kwdefaults__, made.__qualname__ = value.__kwdefaults__, value.__qualname__
    vars(made).update(vars(value))
    return made


def kind_of(value: Any) -> str:
    """Return the name of a function or a class, of all else that of its class."""
    if isinstance(value, functools.partial):
        return f"partial({kind_of(value.func)})"
    if not isinstance(value, _CODE):
        return type(value).__qualname__
    is_lambda = isinstance(value, types.FunctionType) and value.__name__ == "<lambda>"
    line = f" in line {value.__code__.co_firstlineno}" if is_lambda else ""  # type: ignore[union-attr]
    return f"{getattr(value, '__qualname__', value.__name__)}{line}"


def _described(value: Any) -> str:
    if type(value) is dict and len(value) <= WIDTH:
        return f"{{{', '.join(f'{key!r}: {kind_of(one)}' for key, one in value.items())}}}"
    if type(value) in _OF_OBJECTS and len(value) <= WIDTH:
        return f"[{', '.join(map(kind_of, value))}]"
    return kind_of(value)


def _keys(packed: Any) -> set[str]:
    return {*packed} if isinstance(packed, dict) else set()


def _content(packed: Any) -> Any:
    return packed["new"] if "new" in _keys(packed) else packed


def _is_which(packed: Any) -> bool:
    return not _keys(packed).isdisjoint(_WHICH)


def _kinds_in(packed: Any) -> str:
    """Return the kind of an object of which only that is known, or those of a container with such ones in it."""
    content = _content(packed)
    if "objects" in _keys(content):
        *_, parts, described = content["objects"]
        return str(described) if any(map(_kinds_in, parts)) else ""
    return str(content["kind"]) if "kind" in _keys(content) else ""


def _is_lost(packed: Any, live: Any) -> bool:
    """Whether objects of which only the kind is known are of another kind here."""
    if "objects" not in _keys(packed):
        return bool(_kinds_in(packed)) and _kinds_in(packed) != _described(live)
    kind, _, parts, _ = packed["objects"]
    there = [*_items(live)] if type(live).__name__ == kind else []
    return any(_kinds_in(one) and (n >= len(there) or _is_lost(one, there[n])) for n, one in enumerate(parts))


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _with_items(live: Any, value: Any) -> Any:
    """Return a container with these items, the same one if there is one."""
    if (
        live is value
        or type(live) is not type(value)
        or getattr(live, "maxlen", 0) != getattr(value, "maxlen", 0)
    ):
        return value
    if isinstance(live, (list, deque)):
        items = [*value]
        live.clear()
        live.extend(items)
    elif isinstance(live, dict):
        live.clear()
        live.update(value)
    else:
        return value
    return live


def _has_plain_keys(value: Any) -> bool:
    return not isinstance(value, dict) or all(size_of(key, LARGE) is not None for key in value)


def replaced(carriers: list[carried.Carrier], states: list[Any]) -> Iterator[str]:
    """Yield what to tell of objects in contents that were of another kind when the checkpoint was taken."""
    for carrier, state in zip(carriers, states, strict=True):
        for place, then, now in carrier.replaced(state) if isinstance(carrier, Contents) else ():
            yield (
                f"the attribute '{_plain_place(place)}' of {kind_of(carrier.thing)} is not what it was when the run was cut ({then} "
                f"then, {now} here): the training has changed it, and no checkpoint can hold it. Make all of them when "
                "it is built, and choose one of them by a number or a name that it keeps; or give it state_dict and "
                "load_state_dict"
            )


def _plain_place(place: str) -> str:
    return place[1:].replace("'.", ".")


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
    return is_users_own(kind) or kind in RECORDS or kind.__module__ == "torch.utils.data.dataset"


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
    elif isinstance(owner, functools.partial):
        _put_into_partial(owner, name, value)
    elif isinstance(owner, types.FunctionType) and name not in owner.__code__.co_varnames:  # no default
        setattr(owner, name, value)


def _put_into_partial(owner: functools.partial[Any], name: str, value: Any) -> None:
    function, arguments, named = owner.func, [*owner.args], dict(owner.keywords)
    what, _, which = name.partition(" ")
    if what == "argument":
        arguments[int(which)] = value
    elif what == "keyword":
        named[which] = value
    elif what == "func":
        function = value
    owner.__setstate__((function, tuple(arguments), named, vars(owner)))  # type: ignore[attr-defined]
