"""What a loop's body passes on in variables: to the code after the loop, or from turn to turn of a generator around it.

To a resumed function a loop that is over gives nothing, so its body does not run, and a generator begins anew. Read
from bytecode (`liveness`): where it is not sure, nothing is said.
"""

from __future__ import annotations

import dis
import inspect
import itertools
import sys
import traceback
import types
import weakref
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

import torch

from chainrun.errors import RegisterError
from chainrun.owned import fields, is_users_own
from chainrun.training.held import functions_of
from chainrun.training.liveness import (
    Code,
    Key,
    attributes_set,
    before,
    exit_of,
    filled_in_the_loop,
    gives_after,
    live_in,
    place_of,
    read,
    written_in_the_loop,
)
from chainrun.training.variables import frames_within, locals_of

_DEPTH = 2  # containers in containers
_COMPREHENSIONS = ("<listcomp>", "<setcomp>", "<dictcomp>")
Bound: TypeAlias = set[tuple[int, str]]
"""The ids of objects, and the names of their attributes."""
_COLLECT = ("list", "tuple", "set", "frozenset", "dict", "sum", "sorted", "min", "max")


class PassedOn(NamedTuple):
    """The variables that the code after a loop reads."""

    unbound: tuple[str, ...] = ()
    """Those that only the loop's body gives a value."""
    changed: tuple[str, ...] = ()
    """All that the body changes."""
    late: tuple[str, ...] = ()
    """Attributes that objects have only since the loop, and that code after it may read of them, or of others."""


NOTHING = PassedOn()
_known: dict[tuple[tuple[tuple[types.CodeType, int], ...], frozenset[str]], PassedOn] = {}


def bound(outside: frozenset[types.CodeType]) -> Bound:
    """Return which attributes the user's objects have that variables lead to.

    Args:
        outside: the code that ran before the run was begun.
    """
    found: Bound = set()
    for frame in frames_within(outside):
        for value in locals_of(frame).values():
            for inner in (value, *(one for _, one in _attributes(value))):
                found.update((id(inner), name) for name, _ in _attributes(inner))
    return found


def to_the_code_after(outside: frozenset[types.CodeType], late: Bound) -> PassedOn:
    """Return what a loop passes on that is asking for its next turn, of which there is none.

    Args:
        outside: the code that ran before the run was begun.
        late: the attributes that objects have got in loops, and would not have in a resumed function.
    """
    where = frames_within(outside)
    names = frozenset(name for _, name in late)
    for number, frame in enumerate(where):
        code = frame.f_code
        is_generator = code.co_flags & inspect.CO_GENERATOR  # then the loop around it follows
        place = place_of(read(code), frame.f_lasti)
        if read(code)[place].name == "FOR_ITER":
            key = (tuple((one.f_code, one.f_lasti) for one in where[number:]), names)
            if key not in _known:
                found = _passed_on(where[number:], names)
                if is_generator:  # what one gives after its loop, a resumed one does not come to
                    found = (
                        PassedOn(found.changed, found.changed, found.late)
                        if gives_after(code, frame.f_lasti)
                        else NOTHING
                    )
                _known[key] = found
            if _known[key].changed:
                return _known[key]
        if not is_generator:
            return NOTHING
    return NOTHING


def _passed_on(where: list[types.FrameType], late: frozenset[str]) -> PassedOn:
    frame, at = where[0].f_code, where[0].f_lasti
    names = {*frame.co_varnames, *frame.co_cellvars}  # bound or not: all ranks have to find the same
    functions = functions_of(where)
    set_somewhere = attributes_set(functions)
    code = Code(functions, {("local", name) for name in names} | set_somewhere, data=set_somewhere)
    live = live_in(code, where, gives=False)[where[0]]
    read_after = sorted(name for name in names if ("local", name) in live)
    written = written_in_the_loop(frame, at) | filled_in_the_loop(frame, at)
    changed = [name for name in read_after if name in written]
    bound = code.bound_before(frame, at)
    unbound = [name for name in changed if name not in bound]
    # attributes that each turn sets: a cut in the loop does not lose them, one at its end would
    carried = live_in(code, where, gives=True)[where[0]]
    set_in_a_turn = sorted(name for kind, name in live - carried if kind == "attribute")
    changed += [f".{name}" for name in set_in_a_turn]
    unbound += [f".{name}" for name in set_in_a_turn if name in late]
    read_soon = _read_soon(code, where)
    read_late = sorted(name for name in late - {*set_in_a_turn} if ("attribute", name) in read_soon)
    changed += [f".{name}" for name in read_late]
    return PassedOn(tuple(unbound), tuple(changed), tuple(f".{name}" for name in read_late))


def _read_soon(code: Code, where: list[types.FrameType]) -> set[Key]:
    """Return what is read after a loop that is over, before another one, or one around it, asks for a turn."""
    found: set[Key] = set()
    for frame in where:
        keys, is_in_a_loop = code.until_the_next_turn(frame.f_code, frame.f_lasti, ends=frame is where[0])
        found |= keys
        if is_in_a_loop:
            break
    return found


def explain(error: BaseException) -> str:
    """Return how an error of a resumed function may come of a loop that was over when the run was cut, or ""."""
    if isinstance(error, AttributeError):
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        codes = {*(frame.f_code for frame in frames), *itertools.chain(*functions_of(frames).values())}
        sets = any(
            ("write", ("attribute", error.name)) in step.effects for code in codes for step in read(code)
        )
        if not (sets and is_users_own(type(error.obj))):
            return ""
    elif not isinstance(error, UnboundLocalError):
        return ""
    return (
        "a loop that was over when the run was cut gives nothing to a resumed function: give the "
        f"{'attribute' if isinstance(error, AttributeError) else 'variable'} a value before that loop, or write the loop "
        "around it as `for epoch in run.epochs(n):`"
    )


def refuse_ahead(given: list[weakref.ref[torch.Tensor]], name: str) -> None:
    """Refuse a generator around the loader `name` that holds batches for later turns.

    Args:
        given: tensors of the batches that it has got.

    Raises:
        RegisterError: there is one.
    """
    where = frames_within(frozenset())
    alive = {id(one) for ref in given if (one := ref()) is not None}
    for frame in where:
        if not frame.f_code.co_flags & inspect.CO_GENERATOR:
            return
        values = locals_of(frame)
        owned = {(n, a): v for n, one in values.items() for a, v in _attributes(one)}
        keys = {("local", n) for n in values} | {("attribute", a) for _, a in owned}
        code = Code(functions_of(where), keys)
        live = live_in(code, where)[frame]
        for variable, value in values.items():
            tensors = [*_tensors(value)] if ("local", variable) in live else []
            again = tensors and code.writes_again(frame.f_code, frame.f_lasti, variable)
            if again or any(id(tensor) in alive for tensor in tensors):
                _refuse(name, variable, frame)
        for (variable, attribute), value in owned.items():
            if ("attribute", attribute) in live and any(id(t) in alive for t in _tensors(value)):
                _refuse(name, f"{variable}.{attribute}", frame)


def refuse_collected(name: str) -> None:
    """Refuse a list and the like that is being made of the turns over the loader `name`, and is in no variable yet.

    Raises:
        RegisterError: there is one.
    """
    where = frames_within(frozenset())
    for frame, outer in itertools.zip_longest(where, where[1:]):
        code = frame.f_code
        is_comprehension = code.co_name in _COMPREHENSIONS  # until Python 3.11 a function of its own
        if is_comprehension or code.co_flags & inspect.CO_GENERATOR:
            what = "a comprehension" if is_comprehension else ""
            asks = outer
        else:
            what, asks = _collecting(frame), frame
        if what and asks is not None and not _is_dropped(asks):
            raise RegisterError(
                f"{what} collects what the turns over the loader '{name}' give, and run.step() is called inside: a cut "
                "loses what was collected. Write a for loop, and keep in run.state what is more than shown"
            )
        if asks is frame:
            return


def _collecting(frame: types.FrameType) -> str:
    """Return what collects what a loop gives, in the instruction that a frame is at."""
    listed = list(dis.get_instructions(frame.f_code))
    place = place_of(read(frame.f_code), frame.f_lasti)
    if listed[place].opname == "FOR_ITER":  # a comprehension begins with an empty list
        is_one = place > 1 and listed[place - 1].opname == "SWAP" and "BUILD" in listed[place - 2].opname
        return "a comprehension" if is_one else ""
    if not listed[place].opname.startswith(("CALL", "PRECALL")) or listed[place].arg != 1:
        return ""
    place -= listed[place - 1].opname == "PRECALL"  # Python 3.11 has two, and may be at the first
    called = listed[before(listed, place, 1)]
    return f"{called.argval}()" if "LOAD" in called.opname and called.argval in _COLLECT else ""


def _is_dropped(frame: types.FrameType) -> bool:
    """Whether what the instruction collects that a frame is at goes nowhere."""
    steps = read(frame.f_code)
    place = place_of(steps, frame.f_lasti)
    then = place + (2 if steps[place].name == "PRECALL" else 1)
    if steps[place].name == "FOR_ITER":
        then = exit_of(steps[place])
        if steps[then].name == "END_FOR":
            then += 1 + (sys.version_info >= (3, 13))
        while then < len(steps) - 1 and steps[then].name in ("SWAP", "STORE_FAST"):
            then += 1  # a variable of the comprehension's name gets its value again
    return steps[then].name == "POP_TOP"


def _refuse(name: str, variable: str, frame: types.FrameType) -> None:
    raise RegisterError(
        f"the generator {frame.f_code.co_name}() takes batches of the loader '{name}' and keeps what it has got for "
        f"later turns, in `{variable}`: a cut would lose that. Let it give each batch in the turn in which it takes it; "
        "workers load ahead (num_workers=, prefetch_factor=), and a data set may shuffle"
    )


def _attributes(value: Any) -> list[tuple[str, Any]]:
    is_followed = is_users_own(type(value)) and not isinstance(value, torch.nn.Module)
    return fields(value) if is_followed else []


def tensors_of(batch: Any) -> list[weakref.ref[torch.Tensor]]:
    """Return references to the tensors of a batch, which keep none alive."""
    return [weakref.ref(tensor) for tensor in _tensors(batch)]


def _tensors(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth:
        items = value.values() if isinstance(value, dict) else value
        if isinstance(value, (dict, list, tuple, set, deque)):
            for item in items:
                yield from _tensors(item, depth - 1)
