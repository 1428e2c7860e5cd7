"""Which names hold what was measured: the time, memory in use. They differ after a cut, and that is no loss.

Read from bytecode: what is worked out in one expression with a clock's name, or with a name that holds such a value,
holds one too; so does the object whose method is given one (``meter.update(time.time() - start)``). In the same way
is seen what was worked out from given variables.
"""

from __future__ import annotations

import dis
import time
import types
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from typing import Any

from chainrun.training.liveness import Key

_CLOCKS = {
    *("time", "time_ns", "perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time"),
    *(
        "default_timer",
        "datetime",
        "now",
        "utcnow",
        "today",
        "strftime",
        "elapsed_time",
        "time_left",
        "ctime",
    ),
    *("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved", "memory_stats"),
    *("getrusage", "memory_info", "utilization", "getpid", "gethostname", "urandom", "uuid1", "uuid4"),
}
_LOADS = ("LOAD_FAST", "LOAD_DEREF", "LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD")
_STORES = ("STORE_FAST", "STORE_DEREF", "STORE_GLOBAL", "STORE_NAME", "STORE_ATTR")
_BETWEEN_TARGETS = {"SWAP", "ROT_TWO", "ROT_THREE", "UNPACK_SEQUENCE", "UNPACK_EX", "COPY", "DUP_TOP"}
_ENDS = ("POP_TOP", "RETURN_VALUE", "POP_JUMP", "JUMP", "FOR_ITER", "YIELD_VALUE")
_NEAR = 90 * 86400.0  # seconds around now, in which a number is the time of day

Held = set[
    tuple[types.CodeType | None, Key]
]  # of a local variable, or of an attribute or a global, in no code


def is_time(value: Any) -> bool:
    """Whether a number is the time of day, now or not long ago."""
    if type(value) is float:
        return abs(value - time.time()) < _NEAR
    return type(value) is int and abs(value - time.time_ns()) < _NEAR * 1e9


def measured(codes: Iterable[types.CodeType]) -> Held:
    """Return the names that hold what was measured."""
    return _followed(codes, _CLOCKS, set())


def worked_out(codes: Iterable[types.CodeType], variables: Held) -> Held:
    """Return the variables that hold what was worked out from these."""
    return _followed(codes, frozenset(), {*variables})


def _followed(codes: Iterable[types.CodeType], names: AbstractSet[str], found: Held) -> Held:
    codes, flow = [*codes], _Flow(names, found)
    for _ in range(3):  # a name by way of another one
        known = names | flow.functions | {name for code, (_, name) in found if code is None}
        for code in codes:
            if not known.isdisjoint(code.co_names) or any(held is code for held, _ in found):
                flow.look(code)
    return found


class _Flow:
    """Follows values through code.

    Args:
        names: those of attributes and globals that give such a value. Where there are none, the objects that get
            one are not followed: the registered ones are given to all sorts of things.
        found: what holds one, to which more is added.
    """

    def __init__(self, names: AbstractSet[str], found: Held) -> None:
        self._names, self._found = names, found
        self.functions: set[str] = set()  # that return one

    def look(self, code: types.CodeType) -> None:
        loads: list[Key] = []  # since the last expression's end
        targets = False  # the last instruction stored a value, which the next one may store too
        after: dict[
            int, list[Key]
        ] = {}  # by where a comprehension ends: it is one expression, from Python 3.12 in line
        last, name = "", ""
        for step in dis.get_instructions(code):
            last, name = name, step.opname
            loads = after.pop(step.offset, loads)
            if name == "FOR_ITER" and last == "SWAP":
                after[step.argval] = [*loads]
                continue
            if name == "POP_TOP" and last == "END_FOR":  # from Python 3.13 two that are one
                continue
            names = [
                str(each) for each in (step.argval if isinstance(step.argval, tuple) else (step.argval,))
            ]
            keys = [_key(name, each) for each in names]
            marks = [place for place, load in enumerate(loads) if self._gives(code, load)]
            if name.startswith(_STORES):
                stores = keys[:1] if "LOAD" in name else keys
                if marks:
                    self._found.update((code if key[0] == "local" else None, key) for key in stores)
                targets = stores == keys
                loads = loads if targets else keys[1:]
                continue
            if targets and name not in _BETWEEN_TARGETS:
                loads = []
            targets = False
            if name.startswith(_LOADS):
                loads += keys
            elif name in ("STORE_SUBSCR", "STORE_SLICE"):  # value, container, key
                if marks:  # or container, key, value where it is `x[key] += value`
                    is_augmented = last in ("SWAP", "ROT_THREE")
                    self._note(
                        code, _leading(loads) if is_augmented else loads[marks[-1] + 1 : marks[-1] + 2]
                    )
                loads = []
            elif name.startswith(_ENDS):
                if marks and name == "RETURN_VALUE" and not code.co_name.startswith(("_", "<")):
                    self.functions.add(code.co_name)
                elif marks and name == "POP_TOP":
                    before = loads[: marks[0]]
                    method = max((n for n, (kind, _) in enumerate(before) if kind == "attribute"), default=0)
                    of_an_item = method > 1 and before[method - 1][0] != "attribute"  # times[key].append(...)
                    self._note(
                        code,
                        _leading(before) if of_an_item else before[method - 1 : method] if method else [],
                    )
                loads = []

    def _note(self, code: types.CodeType, keys: list[Key]) -> None:
        """Note the object that gets such a value, unless it is one that gets all sorts of things."""
        for key in keys if self._names else ():
            if key != ("local", "self"):
                self._found.add((code if key[0] == "local" else None, key))

    def _gives(self, code: types.CodeType, key: Key) -> bool:
        if key[0] != "local":
            return key[1] in self._names or key[1] in self.functions or (None, key) in self._found
        return (code, key) in self._found or key[1] in self.functions


def _leading(loads: list[Key]) -> list[Key]:
    """Return what an expression begins with: ``.total`` of ``self.total[key]``, as a list of one."""
    count = next((n for n, (kind, _) in enumerate(loads) if n and kind != "attribute"), len(loads))
    return loads[max(0, count - 1) : count]


def _key(operation: str, name: str) -> Key:
    if "ATTR" in operation or "METHOD" in operation:
        return ("attribute", name)
    return ("local" if "FAST" in operation or "DEREF" in operation else "global", name)
