"""Which names the code that follows a place can read before it writes them.

Of the variables that a cut has changed only those matter: a loop variable, or what a turn works out for itself, is
written first. Read from bytecode, by the usual flow backwards over it; calls are followed by the names of the functions.
What an exception would jump to is left out: it is not how a training goes on.

A key is a pair of ``local``, ``global`` or ``attribute`` (of any object) and a name.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import re
import types
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeAlias

Key: TypeAlias = tuple[str, str]
Keys: TypeAlias = frozenset[Key]

PROPERTY = "@"  # before the name of a function that runs where an attribute is loaded
_NONE: Keys = frozenset()
_JUMPS = {*dis.hasjrel, *dis.hasjabs}
_ALWAYS = {"JUMP_FORWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT"}
_HANDLERS = {"SETUP_FINALLY", "SETUP_WITH", "SETUP_ASYNC_WITH", "SETUP_CLEANUP"}  # until Python 3.10
_ENDS = {"RETURN_VALUE", "RETURN_CONST"}
_RAISES = {"RAISE_VARARGS", "RERAISE"}
_LEAVES = _ALWAYS | _ENDS | _RAISES
_CALLS = (
    *("PRECALL", "CALL", "CALL_KW"),
    *("CALL_FUNCTION", "CALL_FUNCTION_KW", "CALL_FUNCTION_EX", "CALL_METHOD"),
)
_OVERWRITE = {  # methods after which nothing of the object is as it was
    *("clear", "reset", "zero_", "fill_", "copy_", "set_"),
    *("normal_", "uniform_", "random_", "bernoulli_", "exponential_"),
}
_FILL = {  # methods that change what they are called on
    *("append", "appendleft", "extend", "insert", "add", "update", "setdefault", "push", "put", "accumulate"),
    *("add_", "sub_", "mul_", "div_", "lerp_", "copy_", "index_add_", "scatter_add_"),
}
_PARTS = ("LOAD_ATTR", "BINARY_SUBSCR", "BINARY_SLICE")  # of an object: to change one is to change the object
_INDICES = ("LOAD_CONST", "LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "BUILD_SLICE")
_INTO = ("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE")
_BY_ITS_NAME = {  # not by an operator in the middle of a training; texts are shown to people
    *("__init__", "__new__", "__post_init__", "__del__", "__repr__", "__str__", "__hash__", "__set_name__"),
    *(
        "__init_subclass__",
        "__class_getitem__",
        "__getstate__",
        "__setstate__",
        "__reduce__",
        "__reduce_ex__",
    ),
    *("__copy__", "__deepcopy__", "__dir__", "__sizeof__"),
}
_MAY_CALL = ("call", "pass", "give")
_KINDS = (("_FAST", "local"), ("DEREF", "local"), ("_GLOBAL", "global"), ("_NAME", "global"))


class Effect(NamedTuple):
    """What an instruction does with a name: ``use``, ``write``, ``call`` it, ``ask`` for an attribute to call,
    ``pass`` one on that others may call, or ``give`` it as a text."""

    what: str
    key: Key


class Step(NamedTuple):
    """An instruction: where it may go on, None for the end, and its effects in their order."""

    at: int
    name: str
    goes_on: tuple[int | None, ...]
    effects: tuple[Effect, ...]
    inner: types.CodeType | None
    """The lambda or comprehension that it loads."""


@functools.lru_cache(1024)
def read(code: types.CodeType) -> list[Step]:
    """Return the instructions of some code; they go on at places in this list."""
    listed = list(dis.get_instructions(code))
    places = {step.offset: place for place, step in enumerate(listed)}
    cells = {*code.co_cellvars, *code.co_freevars}
    found = []
    for place, step in enumerate(listed):
        name, after = step.opname, place + 1
        goes_on: list[int | None] = []
        if name in _ENDS or after == len(listed):
            goes_on = [None]
        elif name not in _RAISES:
            goes_on = [] if name in _ALWAYS else [after]
            if step.opcode in _JUMPS and name not in _HANDLERS and step.argval in places:
                goes_on.append(places[step.argval])
        inner = step.argval if type(step.argval) is types.CodeType and "<" in step.argval.co_name else None
        effects = tuple(_effects(listed, place, cells))
        found.append(Step(step.offset, name, tuple(goes_on), effects, inner))
    for place, callee in _calls(listed):  # what is called writes after its arguments were read
        *others, last = found[callee].effects or (None,)
        if last is not None and last.what == "call":
            kind, name = last.key
            if name.startswith(PROPERTY):
                last = Effect("call", (kind, name.removeprefix(PROPERTY)))
            else:
                found[callee] = found[callee]._replace(effects=tuple(others))
            found[place] = found[place]._replace(effects=(*found[place].effects, last))
    return found


def _calls(listed: list[dis.Instruction]) -> Iterator[tuple[int, int]]:
    """Give where something is called, and where that was loaded."""
    for place, step in enumerate(listed):
        name, count = step.opname, step.arg or 0
        if name not in _CALLS or listed[place - 1].opname == "PRECALL":
            continue
        if name == "CALL_FUNCTION_EX":
            count = 1 + (count & 1)
        elif name.endswith("_KW"):  # their names are on the stack as well
            count += 1
        callee = before(listed, place, count)
        yield place, callee - (listed[callee].opname == "PUSH_NULL")  # from Python 3.13 on it comes after


def _effects(listed: list[dis.Instruction], place: int, cells: set[str]) -> Iterator[Effect]:
    step, then = listed[place], listed[place + 1 : place + 5]
    name, last = step.opname, listed[place - 1].opname
    if name == "LOAD_CONST":
        texts = step.argval if type(step.argval) is tuple else (step.argval,)
        # the names of events have parts; what has none is what a metric is called, mostly
        events = [text for text in texts if type(text) is str and text.isidentifier() and "_" in text]
        yield from (Effect("give", ("attribute", event)) for event in events)
        return
    if name in ("LOAD_FAST_AND_CLEAR", "LOAD_CLOSURE"):  # a comprehension puts it aside; a function is made
        return
    if name in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR"):
        kind = "attribute"
    else:
        kind = next((kind for part, kind in _KINDS if part in name), "")
        if not kind or not name.startswith(("LOAD", "STORE", "DELETE")):
            return
    verbs = re.findall("LOAD|STORE|DELETE", name)
    names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
    for number, (verb, which) in enumerate(zip(verbs, names, strict=False)):
        if "_FAST" in name and verb == "LOAD" and which in cells:  # a function is made, from Python 3.13
            continue
        key = (kind, str(which))
        if verb != "LOAD" or (number == len(verbs) - 1 and _is_overwritten(then)):
            yield Effect("write", key)
        else:
            # what else is loaded from an object runs only where it is a property
            is_method = kind == "attribute" and (name == "LOAD_METHOD" or "NULL|self" in step.argrepr)
            yield Effect("ask" if is_method else "use", key)
            if kind == "attribute" and not is_method:
                if last.startswith(("LOAD_FAST", "LOAD_DEREF")):
                    yield Effect("pass", key)
                yield Effect("call", (kind, PROPERTY + key[1]))
            elif kind == "attribute" or number < len(verbs) - 1 or not _is_taken_apart(then):
                yield Effect("call", key)


def _is_taken_apart(then: list[dis.Instruction]) -> bool:
    """Whether of what was loaded an attribute is wanted: it is not called itself."""
    return bool(then) and then[0].opname in ("LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR")


def _is_overwritten(then: list[dis.Instruction]) -> bool:
    """Whether what was loaded is written anew as a whole: ``x.clear()``, ``x[:] = …``, ``x[...] = …``."""
    first = then[0] if then else None
    if first is None:
        return False
    if first.opname in ("LOAD_ATTR", "LOAD_METHOD"):
        return first.argval in _OVERWRITE
    if first.opname == "LOAD_CONST" and first.argval in (Ellipsis, None):
        names = [step.opname for step in then[1:]]
        if first.argval is Ellipsis:
            return names[:1] == ["STORE_SUBSCR"]
        return names[1:2] == ["STORE_SLICE"] or names[1:3] == ["BUILD_SLICE", "STORE_SUBSCR"]
    return False


class Code:
    """The user's code, and which of some names its places can read before they write them.

    Args:
        functions: the code of the functions, by the name that they are called by.
        keys: the names that are asked for.
        held: the names of variables that hold functions; others are taken to hold those that are made in functions.
        data: those of the keys that no function is held by: an attribute that is called is another object's.
    """

    def __init__(
        self,
        functions: dict[str, list[types.CodeType]],
        keys: Iterable[Key],
        held: Iterable[str] = (),
        data: Iterable[Key] = (),
    ) -> None:
        self._functions, self._keys, self._data = functions, frozenset(keys), frozenset(data)
        self._known: dict[str, tuple[Keys, Keys]] = {}
        codes = [*itertools.chain(*functions.values())]
        self._calls_by_text = any("getattr" in code.co_names for code in codes)
        inner = (const for code in codes for const in code.co_consts if type(const) is types.CodeType)
        self._held = {*held, *(code.co_name for code in inner)}
        unnamed = [self._of_call(name)[0] for name in functions if _is_unnamed(name)]
        self._everywhere = frozenset(key for keys in unnamed for key in keys if key[0] != "local")

    def live(
        self,
        code: types.CodeType,
        at: int,
        ends_with: Keys = _NONE,
        gives: bool | None = None,
        around_gives: bool = False,
    ) -> Keys:
        """Return what can be read before it is written, from the instruction at an offset on, which is under way.

        Args:
            ends_with: what can be read after the code has returned.
            gives: where that instruction asks a loop for its next turn: whether there is one, None for unknown.
            around_gives: whether the loop around that one has another turn for sure.
        """
        steps, ways = read(code), []
        place = place_of(steps, at)
        ways = list(steps[place].goes_on)
        if steps[place].name == "FOR_ITER" and gives is not None and len(ways) == 2:
            ways = [ways[0] if gives else ways[1]]
        entries = self._entries(code, ends_with)
        heads = [n for n, step in enumerate(steps) if step.name == "FOR_ITER"]
        loops = [n for n in heads if n < place < exit_of(steps[n])]
        if gives and not around_gives:  # so have those in the turn that comes
            inner = [n for n in heads if place < n < exit_of(steps[place])]
            entries = self._entries(code, ends_with, {n: entries[steps[n].goes_on[0] or 0] for n in inner})
        if loops and around_gives:  # in that turn this loop, begun anew, has turns as well
            for loop in [place] * (steps[place].name == "FOR_ITER") + loops[-1:]:
                body = steps[loop].goes_on[0]
                assert body is not None
                entries = self._entries(code, ends_with, {loop: entries[body]})
        return (
            frozenset().union(*(ends_with if way is None else entries[way] for way in ways))
            | self._everywhere
        )

    def until_the_next_turn(self, code: types.CodeType, at: int, *, ends: bool) -> tuple[Keys, bool]:
        """Return what is read from an offset on until a loop asks for a turn, and if there is one around.

        Args:
            ends: whether the instruction there is a loop's, of which there is no next turn.
        """
        steps = read(code)
        place = place_of(steps, at)
        heads = [n for n, step in enumerate(steps) if step.name == "FOR_ITER"]
        around = [n for n in heads if n < place < exit_of(steps[n])]
        entries = self._entries(code, _NONE, dict.fromkeys(heads, _NONE))
        ways = [exit_of(steps[place])] if ends else [way for way in steps[place].goes_on if way is not None]
        return frozenset().union(*(entries[way] for way in ways)), bool(around)

    def writes_again(self, code: types.CodeType, at: int, name: str) -> bool:
        """Whether a loop around the instruction at an offset writes a local variable."""
        steps = read(code)
        place = place_of(steps, at)
        inside = _reached(steps, place) & _reached(_backwards(steps), place)
        written = {key for each in inside for what, key in steps[each].effects if what == "write"}
        return ("local", name) in written or name in _written_inside(code)

    def bound_before(self, code: types.CodeType, at: int) -> set[str]:
        """Return the local variables that may have got a value when the instruction at an offset is first come to."""
        steps = read(code)
        place = place_of(steps, at)
        ways = [step._replace(goes_on=()) if n == place else step for n, step in enumerate(steps)]
        before = ({0} | _reached(ways, 0)) & _reached(_backwards(ways), place)
        written = {key[1] for n in before for what, key in steps[n].effects if what == "write"}
        given = code.co_argcount + code.co_kwonlyargcount
        given += bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
        return written | {*code.co_varnames[:given], *code.co_freevars} | _written_inside(code)

    def _entries(
        self, code: types.CodeType, ends_with: Keys, fixed: dict[int, Keys] | None = None
    ) -> list[Keys]:
        """Return what is live before each instruction; that of some is known."""
        steps = read(code)
        cells = {*code.co_cellvars, *code.co_freevars}
        found: list[Keys] = [_NONE] * len(steps)
        matters = [self._matters(step) for step in steps]
        changed = True
        while changed:
            changed = False
            for place in range(len(steps) - 1, -1, -1):
                live = _NONE
                for way in steps[place].goes_on:
                    after = ends_with if way is None else found[way]
                    live = live | after if live else after
                if matters[place]:
                    live = self._before(steps[place], live, cells)
                if fixed and place in fixed:
                    live = fixed[place]
                if live != found[place]:
                    found[place], changed = live, True
        return found

    def _matters(self, step: Step) -> bool:
        """Whether it does anything with one of the names, or calls what may."""
        return step.inner is not None or any(
            self._called(what, key) if what in _MAY_CALL else key in self._keys for what, key in step.effects
        )

    def _called(self, what: str, key: Key) -> list[str]:
        """Return the functions that an effect may call: ``getattr(callback, "on_end")()``, ``f"on_{event}"``."""
        kind, name = key
        if what == "call":
            return [name] if name in self._functions and (kind != "local" or name in self._held) else []
        if what == "pass":  # `optimizer.step(self.closure)`
            return [name] if name in self._functions and key not in self._set_somewhere else []
        if not self._calls_by_text:
            return []
        return [one for one in self._functions if one == name or (name[-1:] == "_" and one.startswith(name))]

    @functools.cached_property
    def _set_somewhere(self) -> set[Key]:
        return attributes_set(self._functions)

    def _before(self, step: Step, live: Keys, cells: set[str]) -> Keys:
        if step.inner is not None:
            live = self._passed(live, *self._of_code(step.inner), cells)
        for what, key in reversed(step.effects):
            if what in _MAY_CALL:
                # a function that is loaded may be called later, or not at all
                is_sure = what == "call" and (key[0] == "attribute" or step.name in _CALLS)
                for name in self._called(what, key):
                    reads, writes = self._of_call(name)
                    live = self._passed(live, reads, writes if is_sure else _NONE, cells)
            elif key in self._keys and not (what == "ask" and key in self._data):
                live = live - {key} if what == "write" else live | {key}
        return live

    @staticmethod
    def _passed(live: Keys, reads: Keys, writes: Keys, cells: set[str]) -> Keys:
        known = [{key for key in keys if key[0] != "local" or key[1] in cells} for keys in (reads, writes)]
        return (live - known[1]) | known[0]

    def _of_call(self, name: str) -> tuple[Keys, Keys]:
        """Return what functions of a name read before they write it, and what they always write."""
        if name not in self._known:
            self._known[name] = _NONE, _NONE  # one that calls itself
            parts = [self._of_code(code) for code in self._functions[name]]
            self._known[name] = (
                frozenset().union(*(reads for reads, _ in parts)),
                frozenset().union(*(writes for _, writes in parts)),
            )
        return self._known[name]

    def _of_code(self, code: types.CodeType) -> tuple[Keys, Keys]:
        reads, passes = (self._entries(code, end)[0] for end in (_NONE, self._keys))
        free = {*code.co_freevars}
        runs_later = code.co_flags & (
            inspect.CO_GENERATOR | inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
        )
        ways = (reads, _NONE if runs_later else self._keys - passes)
        read_, written = (frozenset(k for k in keys if k[0] != "local" or k[1] in free) for keys in ways)
        return read_, written


def _is_unnamed(name: str) -> bool:
    """Whether a function is called without its name, by an operator or a module: its reads count wherever the code is."""
    return name == "forward" or (name[:2] == "__" == name[-2:] and name not in _BY_ITS_NAME)


def attributes_set(functions: dict[str, list[types.CodeType]]) -> set[Key]:
    """Return the attributes that are data: some code sets them."""
    steps = itertools.chain(*map(read, itertools.chain(*functions.values())))
    written = {key for step in steps for what, key in step.effects if what == "write"}
    return {key for key in written if key[0] == "attribute"}


def live_in(
    code: Code, where: list[types.FrameType], gives: bool | None = None, around_gives: bool = False
) -> dict[types.FrameType, Keys]:
    """Return what the code that follows reads before it writes it, for each frame, given from inside out."""
    live: dict[types.FrameType, Keys] = {}
    after: Keys = frozenset()
    for frame in reversed(where):  # from outside in: what is read when the inner one has returned
        free = {*frame.f_code.co_freevars}
        ends_with = frozenset(key for key in after if key[0] != "local" or key[1] in free)
        after = live[frame] = code.live(frame.f_code, frame.f_lasti, ends_with, gives, around_gives)
    return live


def place_of(steps: list[Step], at: int) -> int:
    """Return the place of the instruction at an offset, which may lie in its cache."""
    return max(place for place, step in enumerate(steps) if step.at <= max(at, 0))


def is_in_a_loop(code: types.CodeType, at: int) -> bool:
    """Whether the instruction at an offset may be come to again."""
    steps = read(code)
    return place_of(steps, at) in _reached(steps, place_of(steps, at))


def before(steps: list[dis.Instruction], place: int, values: int) -> int:
    """Return the last instruction before those that put so many values on the stack, which end before a place."""
    jumps = [(n, step.argval) for n, step in enumerate(steps[:place]) if step.opcode in _JUMPS]
    end, depth, place = steps[place].offset, 0, place - 1
    while place > 0:
        step, start = steps[place], steps[place + 1].offset
        # in the midst of `a if b else c` or `a or b` there are jumps, and jumps lead there
        is_inside = any(n <= place and start < to <= end for n, to in jumps)
        falls_through = step.opname not in _LEAVES
        if depth >= values and falls_through and not is_inside and step.opcode not in _JUMPS:
            break
        if not falls_through:  # what comes after it is jumped to
            place = next((n for n, to in jumps if to == start), 0)
            step = steps[place]
        depth += dis.stack_effect(step.opcode, step.arg, jump=not falls_through)
        place -= 1
    return max(place, 0)


def written_in_the_loop(code: types.CodeType, at: int) -> set[str]:
    """Return the local variables that the body of a loop writes, which asks for its next turn at an offset."""
    steps = read(code)
    place = place_of(steps, at)
    body = steps[place + 1 : exit_of(steps[place])]
    return {key[1] for step in body for what, key in step.effects if what == "write" and key[0] == "local"}


def filled_in_the_loop(code: types.CodeType, at: int) -> set[str]:
    """Return the local variables that hold what the body of that loop adds to, and that were made for it.

    It was made anew by the turn of a loop around it, or by this call of the function: a list, a dict, a meter.
    """
    steps, listed = read(code), list(dis.get_instructions(code))
    place = place_of(steps, at)
    around = [n for n, step in enumerate(steps) if step.name == "FOR_ITER" and n < place < exit_of(step)]
    before = steps[around[-1] + 1 if around else 0 : place]
    made = {key[1] for step in before for what, key in step.effects if what == "write" and key[0] == "local"}
    found = set()
    for n in range(place + 1, exit_of(steps[place])):
        loaded = {key[1] for what, key in steps[n].effects if what == "use" and key[0] == "local"} & made
        if loaded and _is_filled(listed[n + 1 :]):
            found |= loaded
    return found


def _is_filled(then: list[dis.Instruction]) -> bool:
    """Whether what was loaded is changed: ``x.append(…)``, ``x[k].append(…)``, ``x[k] = …``, ``x.n += …``."""
    for step, following in itertools.pairwise(then):
        name = step.opname
        if name.startswith(("COPY", "DUP_TOP")):
            # of the object, or of it and an index: loaded again to be changed
            return following.opname.startswith(("COPY", *_PARTS))
        if name in ("LOAD_ATTR", "LOAD_METHOD") and step.argval in _FILL:
            return True
        if not name.startswith((*_PARTS, *_INDICES)):
            return name in _INTO
    return False


def written_before_the_loop(code: types.CodeType, at: int) -> tuple[set[str], set[str]]:
    """Return the local variables that a turn of an outer loop has written before the loop around, or at, an offset began.

    And those that the body of this one writes.
    """
    steps = read(code)
    place = place_of(steps, at)
    loops = [n for n, step in enumerate(steps) if step.name == "FOR_ITER" and n <= place < exit_of(step)]
    if len(loops) < 2:
        return set(), set()
    outer, inner = loops[-2:]
    before, body = (
        {key[1] for step in steps[a:b] for what, key in step.effects if what == "write" and key[0] == "local"}
        for a, b in ((outer + 1, inner), (inner + 1, exit_of(steps[inner])))
    )
    return before, body


def counted_around(code: types.CodeType, at: int) -> list[list[str]]:
    """Return the local variables that each loop around an offset gives its turns to, and nothing else writes."""
    steps = read(code)
    place = place_of(steps, at)
    found = []
    for n, step in enumerate(steps):
        if step.name == "FOR_ITER" and n < place < exit_of(step):
            targets = itertools.takewhile(
                lambda one: one.name.startswith(("STORE", "UNPACK")), steps[n + 1 :]
            )
            found.append([key[1] for one in targets for what, key in one.effects if what == "write"])
    written = [key[1] for step in steps for what, key in step.effects if what == "write"]
    return [[name for name in names if written.count(name) == 1] for names in found]


def gives_after(code: types.CodeType, at: int) -> bool:
    """Whether a generator gives anything after the loop at an offset, but by that loop begun anew."""
    steps = read(code)
    place = place_of(steps, at)
    end = exit_of(steps[place])
    ways = [step._replace(goes_on=()) if n == place else step for n, step in enumerate(steps)]
    return any(steps[n].name.startswith(("YIELD", "SEND")) for n in {end} | _reached(ways, end))


def exit_of(loop: Step) -> int:
    """Return where a loop goes on after its last turn."""
    return max((way for way in loop.goes_on if way is not None), default=0)


def _backwards(steps: list[Step]) -> list[Step]:
    comes: list[list[int | None]] = [[] for _ in steps]
    for place, step in enumerate(steps):
        for way in step.goes_on:
            if way is not None:
                comes[way].append(place)
    return [step._replace(goes_on=tuple(ways)) for step, ways in zip(steps, comes, strict=True)]


def _reached(steps: list[Step], place: int) -> set[int]:
    """Return the instructions that come after one, itself only where a loop comes back to it."""
    found: set[int] = set()
    todo = [place]
    while todo:
        for way in steps[todo.pop()].goes_on:
            if way is not None and way not in found:
                found.add(way)
                todo.append(way)
    return found


def _written_inside(code: types.CodeType) -> set[str]:
    """Return the names of the variables that functions inside of others write there (``nonlocal``)."""
    inner = [const for const in code.co_consts if type(const) is types.CodeType]
    own = {
        step.argval
        for one in inner
        for step in dis.get_instructions(one)
        if step.opname == "STORE_DEREF" and step.argval in one.co_freevars
    }
    return own.union(*map(_written_inside, inner)) if inner else own
