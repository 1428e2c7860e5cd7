"""In which turns loops of the function's own are, to see at a resume that it has come to the same ones."""

from __future__ import annotations

import types
from typing import TypeAlias

from chainrun.errors import RestoreError
from chainrun.training.liveness import counted_around
from chainrun.training.variables import locals_of

Turns: TypeAlias = dict[str, list[int]]


def turns(frames: list[types.FrameType]) -> Turns:
    """Return the whole numbers that the loops around the frames' places count with, by variables and function."""
    found = {}
    for frame in frames:
        values = locals_of(frame)
        for names in counted_around(frame.f_code, frame.f_lasti):
            numbers = {name: values[name] for name in names if type(values.get(name)) is int}
            shown = ", ".join(f"`{name}`" for name in numbers)
            found[f"{shown} in {frame.f_code.co_name}()"] = [*numbers.values()]
    return found


def check(then: Turns, now: Turns) -> None:
    """See that the function has come to the turns that the checkpoint was taken in.

    Raises:
        RestoreError: it has not.
    """
    for name, turn in now.items():
        was = then.get(name, turn)
        # an enumerate() may count what is left to do: the item is the same
        if turn and all(one != other for one, other in zip(was, turn, strict=False)):
            raise RestoreError(
                f"the loop over {name} has come to {_shown(turn)} where it was at {_shown(was)} when the checkpoint was "
                "taken: it did not begin where it began then. A resumed function is gone through from its first line, "
                "and what was done is skipped: let the loop begin at its first turn, `range(n)` and not "
                "`range(run.state[...], n)`; for a new run, write `for epoch in run.epochs(n):`"
            )


def _shown(turn: list[int]) -> str:
    return ", ".join(map(str, turn))
