"""In which turns loops of the function's own are, to see at a resume that it has come to the same ones."""

from __future__ import annotations

import types

from chainrun.errors import RestoreError
from chainrun.training.liveness import counted_around
from chainrun.training.variables import locals_of


def turns(frames: list[types.FrameType]) -> dict[str, int]:
    """Return the whole numbers that the loops around the frames' places count with, by variable and function."""
    found = {}
    for frame in frames:
        values = locals_of(frame)
        for name in counted_around(frame.f_code, frame.f_lasti):
            if type(values.get(name)) is int:
                found[f"`{name}` in {frame.f_code.co_name}()"] = values[name]
    return found


def check(then: dict[str, int], now: dict[str, int]) -> None:
    """See that the function has come to the turns that the checkpoint was taken in.

    Raises:
        RestoreError: it has not.
    """
    for name, turn in now.items():
        if then.get(name, turn) != turn:
            raise RestoreError(
                f"the loop over {name} has come to {turn} where it was at {then[name]} when the checkpoint was taken: it "
                "did not begin where it began then. A resumed function is gone through from its first line, and what was "
                "done is skipped: let the loop begin at its first turn, `range(n)` and not `range(run.state[...], n)`; "
                "for a new run, write `for epoch in run.epochs(n):`"
            )
