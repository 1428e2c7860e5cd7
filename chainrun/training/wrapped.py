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
from chainrun.training.held import functions_of
from chainrun.training.liveness import Code, live_in
from chainrun.training.variables import locals_of, users_frames

_DEPTH = 6
_REMEMBER: dict[type, str] = {
    itertools.cycle: "gives the batches of its first round again: `while True: yield from loader` draws new ones",
    itertools.islice: "counts: leave the loop with `if number == n: break` under enumerate(loader)",
    itertools.accumulate: "keeps a sum: keep it in run.state",
    itertools.pairwise: "keeps a batch: keep it in run.state",
    itertools.zip_longest: "keeps which of its loaders have ended: use zip() over loaders of one length, or a loop over "
    "the longest that takes what there is of the others",
    type(itertools.tee(())[0]): "keeps batches: go through the loader once",
}
if (_batched := getattr(itertools, "batched", None)) is not None:  # from Python 3.12
    _REMEMBER[_batched] = "holds several batches: take one in each turn"
_ITERATORS: list[Any] = [iter(range(0)), iter(range(2**99)), iter([]), iter(()), iter("")]
_COUNT: tuple[type, ...] = (*map(type, _ITERATORS), itertools.count)
_STAND_BETWEEN: tuple[type, ...] = (
    *(enumerate, zip, map, filter, itertools.chain, itertools.takewhile, itertools.starmap),
    *(itertools.filterfalse, types.GeneratorType),
    *_REMEMBER,
)


class Around:
    """What stands around one iterator, and takes its items from it.

    To find it, all objects are asked whether they refer to it. Where nobody but these iterators and the loop holds any
    of them, nothing can come or go but with the iterator itself: then the answer is remembered.
    """

    def __init__(self) -> None:
        self._counting: list[tuple[int, int]] | None = None  # each enumerate(), and what it refers to, by id

    def look(self, iterator: Any) -> list[Any]:
        """Return the iterators around this one, from inside out."""
        found, alone = _look(iterator)
        if alone:
            kinds = [one for one in found if type(one) is enumerate]
            self._counting = [(id(one), id(_inner(one))) for one in kinds]
        return found

    def counting(self, iterator: Any) -> list[Any]:
        """Return each enumerate() among them."""
        if self._counting is not None:
            # they live as long as the iterator that they alone hold
            live = [ctypes.cast(one, ctypes.py_object).value for one, _ in self._counting]
            inner = [inner for _, inner in self._counting]
            if all(
                type(one) is enumerate and id(_inner(one)) == i for one, i in zip(live, inner, strict=True)
            ):
                return live
        return [one for one in self.look(iterator) if type(one) is enumerate]


def _inner(one: Any) -> Any:
    return one.__reduce__()[1][0]


def goes_on(iterator: Any) -> bool | None:
    """Whether the code that follows will ask it for more, as far as the variables tell that hold it.

    Returns:
        False where none of them is read before it is written; True where one is that no loop around this place writes
        again; None where neither can be said, as of what an attribute or a list holds.
    """
    _, known, alone = _holders(iterator)
    where = users_frames(inspect.currentframe())
    holding = [
        (frame, name)
        for frame in where
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED
        for name, value in locals_of(frame).items()
        if id(value) in known
    ]
    code = Code(functions_of(where), {("local", name) for _, name in holding})
    live = live_in(code, where)
    read = [(frame, name) for frame, name in holding if ("local", name) in live[frame]]
    if not read:
        return False if alone else None
    return all(not code.writes_again(frame.f_code, frame.f_lasti, name) for frame, name in read) or None


def _look(iterator: Any) -> tuple[list[Any], bool]:
    """Return what stands around an iterator, and whether nothing else holds any of that, or the iterator."""
    found, known, alone = _holders(iterator)
    return found, alone and not _is_in_a_variable(known)


def _holders(iterator: Any) -> tuple[list[Any], set[int], bool]:
    """Return what stands around an iterator, the ids of all that, and whether nothing but variables holds any of it."""
    found: list[Any] = []
    alone = True
    seen = {id(iterator)}
    level = [iterator, *_running_generators()]
    known = [*level]
    for depth in range(_DEPTH + 1):
        if not level:
            break
        outer: list[Any] = []
        asked = (*level,)
        for one in gc.get_referrers(*asked):
            if one is asked or one is level or one is known or one is found:
                continue  # this function's own
            if type(one) is types.FrameType:  # what frames hold is seen below
                # until Python 3.10 a generator's is an object of its own
                outer += (each for each in _generators_of(one) if id(each) not in seen)
            elif not (issubclass(type(one), _STAND_BETWEEN) or type(one) is tuple):
                alone = False
            elif id(one) not in seen and depth < _DEPTH:
                outer.append(one)
            elif id(one) not in seen:
                alone = False
        seen.update(map(id, outer))
        found += (one for one in outer if type(one) is not tuple)  # zip and map hold one
        known += outer
        level = outer
    return found, {id(one) for one in known}, alone


def _is_in_a_variable(known: set[int]) -> bool:
    """Whether a function that runs, or a generator among these, has one of them in a variable."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("chainrun."):
        frame = frame.f_back
    while frame is not None:
        # the variables of other frames are in a dict, which was seen
        values = locals_of(frame).values() if frame.f_code.co_flags & inspect.CO_OPTIMIZED else ()
        if any(id(value) in known for value in values):
            return True
        frame = frame.f_back
    return False


def _running_generators() -> Iterator[Any]:
    """Yield the generators in whose frames the iterator is being asked: what a running frame holds is not seen."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__", "").startswith("chainrun."):
        frame = frame.f_back
    while frame is not None and frame.f_code.co_flags & inspect.CO_GENERATOR:
        yield from _generators_of(frame)
        frame = frame.f_back


def _generators_of(frame: types.FrameType) -> list[Any]:
    """Return the generator whose frame it is, if it is one's."""
    if not frame.f_code.co_flags & inspect.CO_GENERATOR:
        return []
    referrers = gc.get_referrers(frame)
    return [one for one in referrers if type(one) is types.GeneratorType and one.gi_frame is frame]


def refuse(around: Around, iterator: Any, name: str) -> None:
    """Refuse what remembers more than a count.

    Raises:
        RegisterError: such an iterator takes the batches of the loader `name`.
    """
    for one in around.look(iterator):
        why = _REMEMBER.get(type(one))
        if why is None and isinstance(one, zip):
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


def counts(around: Around, iterator: Any) -> list[int]:
    """Return what each enumerate() around it will count next."""
    return [_count(one) for one in around.counting(iterator)]


def set_counts(around: Around, iterator: Any, counts: list[int]) -> None:
    """Set them to what `counts` returned, unless the loop has changed since."""
    for one, count in zip(around.counting(iterator), counts, strict=False):
        # enumobject.c: the count comes right after the object's head; Python has no way to set it
        field = ctypes.c_ssize_t.from_address(id(one) + object.__basicsize__)
        if field.value == _count(one):
            field.value = count


def _count(one: Any) -> int:
    return int(one.__reduce__()[1][1])
