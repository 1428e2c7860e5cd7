"""Which variables of the user's a resumed run has to do without, although the code that follows reads them.

A local variable, a global, an attribute of an object that is not registered: no checkpoint holds them. The segment that
ends notes marks of them beside its witness; the next one compares, at the moment its loop goes on. A false alarm is
worse than a missed one. Told is what

- is bound in both and holds something else;
- has changed from the segment's first boundary to its last, or a loop around this place gives it another value, or it
  was worked out from what is registered, which was another one then: not what differs from job to job;
- is read from here on before it is written (`liveness`);
- holds no time (`clocks`), and was not just made at its first use: None or a flag, and since then what it is now.
"""

from __future__ import annotations

import inspect
import itertools
import sys
import time
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from chainrun.training import clocks, variables
from chainrun.training.held import (
    ATOMS,
    WEIGHTS,
    Kept,
    Place,
    differ,
    frames,
    functions_of,
    managers,
    path_of,
    within_managers,
)
from chainrun.training.liveness import Code, Key, Keys, live_in, written_before_the_loop

SECONDS = 0.3  # that a look at the variables may take; what it did not come to is not compared
MOST = 300  # variables noted
SHOWN = 5
_TENSORS = ("Tensor", "Parameter", "ndarray")
_PLAIN = (*_TENSORS, "bool", "int", "float", "str", "NoneType", "list", "tuple", "dict", "deque")
_ONCE = ("None", "False", "True")

Told = dict[str, list[Any]]
"""By name a `Place`, and whether it is known to have changed; None where that is not known."""


class Loss(NamedTuple):
    """A variable that is not what it was."""

    name: str
    then: Place
    now: str
    """The mark that it has here."""

    def text(self) -> str:
        """Return its name and, where they can be shown, its two values."""
        then, now = self.values
        return self.where + (f" ({then} then, {now} here)" if then != now else "")

    @property
    def where(self) -> str:
        path, inside, function = self.name.partition(" in ")
        return f"`{path}`{inside}{function}"

    @property
    def values(self) -> tuple[str, str]:
        """What it was and is, where both can be shown."""
        then, now = _shown(self.then.mark), _shown(self.now)
        return (then, now) if then and now else ("", "")

    def registration(self) -> str:
        """Return the argument with which it is registered."""
        path, base = path_of(self.name), self.then.base
        return f"{self.then.parts[-1]}={path[path.index(base) :]}" if self.then.parts else f"{base}=..."


def warning(losses: list[Loss]) -> str:
    """Return what to tell of them, in a sentence."""
    if len(losses) == 1:
        (one,) = losses
        then, now = one.values
        changed = f"was {then} when the run was cut and is {now} here"
        text = f"the variable {one.where} {changed if then != now else 'is not what it was when the run was cut'}"
    else:
        named = ", ".join(one.text() for one in losses[:SHOWN])
        more = f" and {len(losses) - SHOWN} more" * (len(losses) > SHOWN)
        text = f"these variables are not what they were when the run was cut: {named}{more}"
    return f"{text}: {_remedy(losses)}"


def _remedy(losses: list[Loss]) -> str:
    """Return what to do: register objects, keep values in `run.state`."""
    found = []
    objects = dict.fromkeys(one.registration() for one in losses if one.then.register)
    values = [one for one in losses if not one.then.register]
    if objects:
        found.append(f"call run.register({', '.join([*objects][:SHOWN])})")
    if any(one.then.parts for one in values):
        found.append(
            "keep it in run.state, or have its owner's state_dict and load_state_dict hold it, and register that"
        )
    elif values:
        found.append("keep it in run.state")
    return "; ".join(found)


def _shown(mark: str) -> str:
    return mark.partition(" ")[2]


class Variables:
    """Follows what the user's variables hold through one segment.

    Args:
        registered: returns what checkpoints hold.
        names: returns the names of registered objects, by their ids.
        outside: the code that ran before the run was begun.
    """

    def __init__(
        self,
        registered: Callable[[], Iterable[Any]],
        names: Callable[[], dict[int, str]],
        outside: frozenset[types.CodeType],
    ) -> None:
        self._registered, self._names, self._outside = registered, names, outside
        self._managers = managers()  # those that the code has entered which began the run
        self._begun: dict[str, str] = {}  # the marks where the segment's first loop began, or went on
        self._first: dict[str, str] = {}  # those at its first boundary
        self._first_at = -1
        self._differ: dict[str, tuple[list[Any], str]] = {}
        self._later: Told = {}
        self._called: dict[str, list[types.CodeType]] = {}
        self._same: dict[tuple[types.FrameType, str], set[tuple[types.FrameType, str]]] = {}

    def frames(self) -> list[types.FrameType]:
        """Return the frames of the user's code that call, from inside out; after them those of context managers."""
        calling, package = frames(sys._getframe(1), self._outside)
        return [*calling, *(within_managers(package) if managers() > self._managers else ())]

    def _look(self, where: list[types.FrameType], *, lent: bool = True) -> Kept:
        callers = [frame for frame in where if not frame.f_code.co_flags & inspect.CO_GENERATOR]
        package = str(callers[-1].f_globals.get("__name__")).partition(".")[0] if callers else ""
        held = Kept(self._registered(), self._names(), package, time.monotonic() + SECONDS, lent=lent)
        held.look(where)
        return held

    def note_begin(self) -> None:
        """Where a loop begins, and no boundary was passed: a segment may have but one."""
        self._note_begin(self._look(self.frames()))

    def _note_begin(self, held: Kept) -> None:
        # what is made at its first use is told from what changes by a boundary that it was there at
        marks = {name: place.mark for name, place in held.places.items()}
        self._begun = {name: mark for name, mark in marks.items() if _shown(mark) not in _ONCE}

    def note_first(self, boundary: int) -> None:
        """At the segment's first boundary: what changes from here on is state."""
        self._first_at = boundary
        self._first = {name: place.mark for name, place in self._look(self.frames()).places.items()}

    def noted(self, where: list[types.FrameType], boundary: int) -> Told:
        """Return what may be lost by a cut at this boundary.

        Args:
            where: what `frames` returned, in the thread that runs the training.
        """
        first = self._first if self._first_at != boundary else self._begun
        found: Told = {}
        held = self._look(where)
        for name, place in held.places.items():
            changed = differ(first[name], place.mark) if name in first else None
            if changed is None and any(name.startswith(f"{giver}[") for giver in held.givers):
                changed = True  # a key of a defaultdict that was not there
            if changed is None and _shown(first.get(_variable_of(place), "")) == "None":
                changed = True  # the variable has got it since then
            if changed is None and place.kind == WEIGHTS:
                changed = True  # a copy, to be put back later
            if changed or place.is_variable:
                found[name] = [*place, changed]
        ways = sorted(
            found, key=lambda name: bool(Place(*found[name][:-1]).of)
        )  # other ways to the same last
        return {name: found[name] for name in ways[:MOST]}

    def compare(self, told: Told) -> None:
        """Where the loop goes on: note what is bound here too and holds something else."""
        where = self.frames()
        held = self._look(where, lent=False)  # what the restored have is theirs
        self._called = held.called
        self._note_begin(held)
        running = {frame.f_code.co_name for frame in where}
        self._later = {
            n: noted for n, noted in told.items() if Place(*noted[:-1]).function not in {*running, None}
        }
        for name, noted in told.items():
            now = held.places.get(name)
            bare = held.places.get(_variable_of(Place(*noted[:-1])))
            if now is not None and differ(now.mark, noted[2]):
                self._differ[name] = noted, now.mark
            elif now is None and any(name.startswith(f"{giver}[") for giver in held.givers):
                self._differ[name] = noted, ""
            elif now is None and noted[0] == WEIGHTS:
                self._differ[name] = noted, ""  # an empty dict, or another value, which is looked at
            elif now is None and bare is not None and _shown(bare.mark) == "None":
                self._differ[name] = noted, bare.mark
        values = [
            (frame, name, value)
            for frame in where
            for name, value in variables.locals_of(frame).items()
            if type(value) not in ATOMS
        ]
        known: dict[int, set[tuple[types.FrameType, str]]] = {}
        for frame, name, value in values:
            known.setdefault(id(value), set()).add((frame, name))
        self._same = {(frame, name): known[id(value)] for frame, name, value in values}

    def hear(
        self,
        told: Told,
        see_next: Callable[[Callable[[bool, Any], None]], None] | None,
        gives: bool | None,
        around_gives: bool,
        tell: Callable[[str], None],
        *,
        again: bool = False,
    ) -> None:
        """Where the loop goes on: compare, and tell of what is lost, before a line of the function runs.

        Args:
            told: what the segment before has `noted`.
            see_next: has a function called when the loader's loop asks for its next turn, which then knows whether
                there is one; None where no loader's loop goes on.
            gives: whether there is one, where that is known already.
            around_gives: whether the loop around it has another turn.
            tell: called with a sentence, if there is something to tell.
            again: whether the function has gone through this turn once more, from its head, and through a loop in it.
        """
        self.compare(told)

        def look(gives: bool | None) -> None:
            losses = self.lost(gives, around_gives, again=again)
            if losses:
                tell(warning(losses))

        if see_next is None:
            look(gives)
        elif self._differ:
            see_next(lambda ended, _: look(not ended))

    @property
    def waits(self) -> bool:
        """Whether there is more to compare, of generators that have not begun yet."""
        return bool(self._later)

    def hear_later(self, tell: Callable[[str], None]) -> None:
        """A loader's next batch is asked for, maybe by a generator of which the segment before has noted something."""
        running = {frame.f_code.co_name for frame in self.frames()}
        told = {n: noted for n, noted in self._later.items() if Place(*noted[:-1]).function in running}
        if told:
            rest = {n: noted for n, noted in self._later.items() if n not in told}
            self.hear(told, None, None, False, tell)
            self._later = rest

    def lost(self, gives: bool | None, around_gives: bool = False, *, again: bool = False) -> list[Loss]:
        """Return those of them that matter, at the same place; the arguments are those of `hear`."""
        differ, self._differ = self._differ, {}
        same, self._same = self._same, {}
        if not differ:
            return []
        where = self.frames()
        functions = functions_of(where)
        registered = self._names()
        from_state: clocks.Held = {
            (frame.f_code, ("local", name))
            for frame in where
            for name, value in variables.locals_of(frame).items()
            if id(value) in registered
        }
        for name, codes in self._called.items():
            functions.setdefault(name, []).extend(codes)
        places = {name: Place(*noted[:-1]) for name, (noted, _) in differ.items()}
        aliases = {name for group in same.values() for _, name in group}
        keys = {key for place in places.values() for key in _keys(place)} | {
            ("local", name) for name in aliases
        }
        leading = {part for place in places.values() for part in place.parts[:-1]}
        ends = {place.parts[-1] for place in places.values() if place.parts and place.kind in _PLAIN}
        data = [("attribute", name) for name in ends - leading]
        code = Code(functions, keys, self._called, data)
        live = live_in(code, where, gives, around_gives)
        everything = {*(f.f_code for f in where), *itertools.chain(*functions.values())}
        measured = clocks.measured(everything)
        from_state = clocks.worked_out(everything, from_state)
        found = []
        for name, (noted, now) in differ.items():
            place, changed = places[name], noted[-1]
            own = [frame for frame in where if frame.f_code.co_name == place.function]
            made = any((frame.f_code, ("local", place.base)) in from_state for frame in own)
            # a tensor is of no job: it was made from others, maybe from what is restored by now
            fixed = not changed and not made and place.kind not in (*_TENSORS, WEIGHTS)
            if fixed and not any(code.writes_again(f.f_code, f.f_lasti, place.base) for f in own):
                continue
            heads = [written_before_the_loop(frame.f_code, frame.f_lasti) for frame in own]
            in_the_head = any(place.base in before for before, _ in heads)
            if _is_made_once(place, now, changed) and not (place.is_variable and in_the_head):
                continue
            scopes = {None, *(frame.f_code for frame in own)}
            if any((scope, key) in measured for scope in scopes for key in _keys(place)):
                continue
            # labels that the head of an epoch asks the model for: it has other weights now
            only_there = any(place.base in before - body for before, body in heads)
            of_the_head = again and made and place.kind in _TENSORS and only_there
            if of_the_head or _is_read(place, own, live, same):
                found.append(Loss(name, place, now))
        told = {one.name for one in found}
        return [loss for loss in found if loss.then.of not in told and not _is_lent(loss, where, told)]


def _variable_of(place: Place) -> str:
    """Return the name of the function's variable that leads to a value."""
    return f"{place.base} in {place.function}()"


def _is_lent(loss: Loss, where: list[types.FrameType], told: set[str]) -> bool:
    """Whether it is the variable of a function around its own, and told of as that."""
    base, function = loss.then.base, loss.then.function
    path = path_of(loss.name)
    lenders = [frame.f_code.co_name for frame in where if base in frame.f_code.co_cellvars]
    borrows = any(base in frame.f_code.co_freevars for frame in where if frame.f_code.co_name == function)
    return borrows and any(f"{path} in {lender}()" in told for lender in lenders)


def _is_made_once(place: Place, now: str, changed: bool | None) -> bool:
    """Whether it was, or may have been, made for want of something: it was None or a flag, and has not changed since.

    A function's own variable that has changed later than that is no such thing: ``best = None``; nor is one that each
    turn of an outer loop sets anew.
    """
    once = _shown(now) in _ONCE and place.kind != WEIGHTS
    return once and not (changed and (place.is_variable or _shown(now) == "True"))


def _is_read(
    place: Place,
    own: list[types.FrameType],
    live: dict[types.FrameType, Keys],
    same: dict[tuple[types.FrameType, str], set[tuple[types.FrameType, str]]],
) -> bool:
    inside = next(iter(live.values())) if live else frozenset()
    innermost = next(reversed(live.values())) if live else inside
    if not all(("attribute", part) in innermost for part in place.parts):
        return False
    if place.function is None:
        return ("global", place.base) in innermost or ("attribute", place.base) in innermost
    names = {(frame, place.base) for frame in own}
    names = names.union(*(same.get(one, ()) for one in names))  # the same object under another name
    return any(("local", name) in live.get(frame, ()) for frame, name in names)


def _keys(place: Place) -> list[Key]:
    attributes: list[Key] = [("attribute", part) for part in place.parts]
    if place.function is None:
        return [("global", place.base), ("attribute", place.base), *attributes]
    return [("local", place.base), *attributes]
