"""Large lists and dicts of a map-style data set that the training itself has changed, and no checkpoint carries.

A data set may keep in them what it can make again: what its own code fills while it loads is a cache, and left alone.
So is what a worker changes, which has copies of its own. What else has another length or other items than when the
checkpoint was taken was changed by the training, and a resumed one has to do without it.
"""

from __future__ import annotations

import dis
import re
import types
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from chainrun.checkpoint.bits import fingerprint
from chainrun.owned import is_users_own
from chainrun.training import carried
from chainrun.training.contents import WIDTH, Contents
from chainrun.training.liveness import before
from chainrun.training.packed import is_large_container, sample, some, without_folders

_ENTRIES = ("__getitem__", "__getitems__", "__call__", "forward")  # what torch's loader calls
_CHANGE = {
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "pop", "popitem", "popleft"),
    *("remove", "discard", "clear", "move_to_end", "sort", "reverse", "__setitem__"),
}
_CODES = 500  # functions looked at


class Fills:
    """Marks of the large containers in the parts of a loader that are no caches of theirs.

    Args:
        parts: the contents of the data set and of the collate function.
    """

    def __init__(self, parts: Iterable[Any]) -> None:
        self._parts = [part for part in parts if isinstance(part, Contents) and part.caches]
        self._names = _names_in_many(self._parts)

    def marks(self) -> dict[str, list[Any]]:
        """Return the length and a fingerprint of some items of each, by its place."""
        found: dict[str, list[Any]] = {}
        for number, part in enumerate(self._parts):
            owners = part.owners()
            values = _values(number, owners)
            large = {p: one for p, one in values if is_large_container(one) or _is_of_many_objects(one)}
            names = self._filled(owners, large.values()) if large else set()
            mine = {place: value for place, value in large.items() if place.rpartition(".")[2] not in names}
            found |= {place: self._mark(value, names) for place, value in mine.items()}
        return found

    def changed(self, then: dict[str, list[Any]]) -> Iterator[str]:
        """Yield what to tell of those that are not what they were when `marks` returned this."""
        for number, part in enumerate(self._parts):
            owners = part.owners()
            there = {p: one for p, one in _values(number, owners) if p in then and one is not None}
            names = self._filled(owners, there.values()) if there else set()
            for place, live in there.items():
                path, _, name = place.removeprefix(str(number)).rpartition(".")
                mark, now = then[place], self._mark(live, names)
                if now != mark:
                    what = f"{mark[0]:,} items then, {now[0]:,} here" if now[0] != mark[0] else "other items"
                    yield (
                        f"the attribute '{(path + '.' + name)[1:]}' of {type(part.thing).__name__} is not what it was when the run "
                        f"was cut ({what}): the training has changed it, and it is too large to be carried beside every "
                        "checkpoint. If items depend on it, and it is no cache, give the data set state_dict and "
                        "load_state_dict"
                    )

    def _filled(self, owners: dict[str, Any], large: Iterable[Any]) -> set[str]:
        """Return the names of attributes that the owners, and the objects in long lists, set while they load."""
        many = [value[0] for value in large if _is_of_many_objects(value)]
        return filled_while_loading([*owners.values(), *many])

    def _mark(self, value: Any, names: set[str]) -> list[Any]:
        """Return the length and a fingerprint of some items, of objects without the attributes of these names."""
        try:
            size = len(value)
        except TypeError:
            return [0, ""]
        if _is_of_many_objects(value):
            known = self._names.get(type(value[0]).__qualname__, set()) - names
            value = [{n: v for n, v in carried.fields(one) if n in known} for one in some(value)]
        try:
            return [size, fingerprint(without_folders(sample(value)))]
        except Exception:  # items that have no fingerprint
            return [size, ""]


def _values(number: int, owners: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what the owners in a part hold, and its place."""
    for path, owner in owners.items():
        yield from ((f"{number}{path}.{name}", value) for name, value in carried.fields(owner))


def _names_in_many(parts: Iterable[Contents]) -> dict[str, set[str]]:
    """Return the attributes, by class, that the objects in long lists have when they are built: no cache."""
    owners = [owner for part in parts for owner in part.owners().values()]
    many = [value[0] for owner in owners for _, value in carried.fields(owner) if _is_of_many_objects(value)]
    return {type(one).__qualname__: {name for name, _ in carried.fields(one)} for one in many}


def _is_of_many_objects(value: Any) -> bool:
    """Whether it is a list of objects of the user's that is too long for them to be looked at one by one."""
    return type(value) in (list, tuple) and len(value) > WIDTH and is_users_own(type(value[0]))


def filled_while_loading(owners: Iterable[Any]) -> set[str]:
    """Return the names of the attributes whose content the owners' own code changes when items are loaded."""
    kinds = [kind for owner in owners for kind in type(owner).__mro__ if is_users_own(kind)]
    methods: dict[str, list[types.FunctionType]] = {}
    for kind in kinds:
        for name, method in vars(kind).items():
            inner = getattr(method, "__func__", getattr(method, "fget", method))
            inner = getattr(inner, "__wrapped__", inner)
            if isinstance(inner, types.FunctionType):
                methods.setdefault(name, []).append(inner)
    todo = [function for name in _ENTRIES for function in methods.get(name, ())]
    found = {name for kind in kinds for name, one in vars(kind).items() if isinstance(one, cached_property)}
    known: set[types.CodeType] = set()
    while todo and len(known) < _CODES:
        function = todo.pop()
        for code in _codes(function.__code__):
            if code in known:
                continue
            known.add(code)
            found |= set(_changed_in(code))
            for name in code.co_names:
                todo += methods.get(name, ())
            for step in dis.get_instructions(code):
                used = function.__globals__.get(step.argval) if step.opname == "LOAD_GLOBAL" else None
                if isinstance(used, types.FunctionType) and is_users_own(used):
                    todo.append(used)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _one_by_one(code: types.CodeType) -> Iterator[dis.Instruction]:
    """Yield the instructions; those of two variables, from Python 3.13, as two."""
    for step in dis.get_instructions(code):
        parts = re.findall("LOAD_FAST_BORROW|LOAD_FAST|STORE_FAST", step.opname)
        if len(parts) < 2:
            yield step
            continue
        for part, name in zip(parts, step.argval, strict=True):
            yield step._replace(opname=part, opcode=dis.opmap[part], arg=0, argval=name)


def _changed_in(code: types.CodeType) -> Iterator[str]:
    """Yield the names of attributes that code sets, or puts items into."""
    steps = list(_one_by_one(code))
    aliases: dict[str, str] = {}  # variables that hold an attribute's value
    for place, step in enumerate(steps):
        last = steps[place - 1] if place else None
        if step.opname == "STORE_FAST" and last is not None and last.opname == "LOAD_ATTR":
            aliases[str(step.argval)] = str(last.argval)
        if step.opname == "STORE_ATTR":
            yield str(step.argval)
        elif step.opname in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            yield from _name(steps, before(steps, place, 2 if step.opname == "STORE_SLICE" else 1), aliases)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _CHANGE:
            yield from _name(steps, place - 1, aliases)


def _name(steps: list[dis.Instruction], place: int, aliases: dict[str, str]) -> Iterator[str]:
    """Yield the attribute whose value an expression that ends there gives, be it an item of it."""
    while place > 0 and steps[place].opname == "BINARY_SUBSCR":
        place = before(steps, place, 1)
    step = steps[max(place, 0)]
    if step.opname == "LOAD_ATTR":
        yield str(step.argval)
    elif step.opname.startswith("LOAD_FAST") and step.argval in aliases:
        yield aliases[step.argval]
