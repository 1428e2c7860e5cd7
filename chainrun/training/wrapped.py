"""What stands between a loop and a loader's iterator: enumerate(), zip(), and iterators that remember.

Python's iterators keep counts and items of their own, which no checkpoint sees and a resumed function begins
anew. They are found among what refers to the loader's iterator: an enumerate() is set to the count it had, others
are refused.
"""

from __future__ import annotations

import ctypes
import gc
import inspect
import itertools
import types
from collections.abc import Iterator
from typing import Any

from chainrun.errors import RegisterError

_DEPTH = 6
_REMEMBER: dict[type, str] = {
    itertools.cycle: "gives the batches of its first round again: `while True: yield from loader` draws new ones",
    itertools.islice: "counts: leave the loop with `if number == n: break` under enumerate(loader)",
    itertools.accumulate: "keeps a sum: keep it in run.state",
    itertools.pairwise: "keeps a batch: keep it in run.state",
    type(itertools.tee(())[0]): "keeps batches: go through the loader once",
}
if (_batched := getattr(itertools, "batched", None)) is not None:  # from Python 3.12
    _REMEMBER[_batched] = "holds several batches: take one in each turn"
_ITERATORS: list[Any] = [iter(range(0)), iter(range(2**99)), iter([]), iter(()), iter("")]
_COUNT: tuple[type, ...] = (*map(type, _ITERATORS), itertools.count)
_STAND_BETWEEN: tuple[type, ...] = (
    *(enumerate, zip, map, filter, itertools.chain, itertools.takewhile, itertools.starmap),
    *(itertools.filterfalse, itertools.zip_longest, types.GeneratorType),
    *_REMEMBER,
)


def around(iterator: Any) -> list[Any]:
    """Return the iterators, from inside out, that take their items from this one."""
    found: list[Any] = []
    seen = {id(iterator)}
    level = [iterator, *_running_generators()]
    for _ in range(_DEPTH):
        if not level:
            break
        outer = [
            one
            for one in gc.get_referrers(*level)
            if (issubclass(type(one), _STAND_BETWEEN) or type(one) is tuple) and id(one) not in seen
        ]
        seen.update(map(id, outer))
        found += (one for one in outer if type(one) is not tuple)  # zip and map hold one
        level = outer
    return found


def _running_generators() -> Iterator[Any]:
    """Yield the generators in whose frames the iterator is being asked: what a running frame holds is not seen."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("chainrun."):
        frame = frame.f_back
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        yield from (
            one
            for one in gc.get_referrers(frame)
            if type(one) is types.GeneratorType and one.gi_frame is frame
        )
        frame = frame.f_back


def refuse(iterator: Any, name: str) -> None:
    """Refuse what remembers more than a count.

    Raises:
        RegisterError: such an iterator takes the batches of the loader `name`.
    """
    for one in around(iterator):
        why = _REMEMBER.get(type(one))
        if why is None and isinstance(one, (zip, itertools.zip_longest)):
            inner = [each for tuple_ in gc.get_referents(one) for each in gc.get_referents(tuple_)]
            if any(isinstance(each, _COUNT) for each in inner):
                why = "counts beside the loader: use enumerate(loader)"
        if why is not None:
            kind = type(one)
            shown = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
            raise RegisterError(
                f"{shown}() around the loader '{name}' begins anew after a cut, since a checkpoint does not see what "
                f"it remembers; it {why}"
            )


def counts(iterator: Any) -> list[int]:
    """Return what each enumerate() around it will count next."""
    return [_count(one) for one in around(iterator) if type(one) is enumerate]


def set_counts(iterator: Any, counts: list[int]) -> None:
    """Set them to what `counts` returned, unless the loop has changed since."""
    live = [one for one in around(iterator) if type(one) is enumerate]
    for one, count in zip(live, counts, strict=False):
        # enumobject.c: the count comes right after the object's head; Python has no way to set it
        field = ctypes.c_ssize_t.from_address(id(one) + object.__basicsize__)
        if field.value == _count(one):
            field.value = count


def _count(one: Any) -> int:
    return int(one.__reduce__()[1][1])
