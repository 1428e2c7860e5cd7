"""One run of a loop, and the counts since a scope began: what `position` keeps of them. The words are explained there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from chainrun.training.holders import Path
from chainrun.training.passed_on import NOTHING, Bound, PassedOn

LoopsVariables: TypeAlias = tuple[str, tuple[str, ...]]


@dataclass(eq=False)
class Pass:
    """One pass over a loop."""

    loop: str
    home: int  # the scope in which a resumed function begins it again, as an index
    ordinal: int  # the how-manyth pass over this loop since that scope began
    began: int  # tick
    boundaries: int  # of this process, when it began
    advanced: int | None = None  # tick at which it last handed something out
    depth: int = 0  # how many scopes there were then
    direct: bool = False  # it was held, and asked in no loader's loop
    asked: bool = False  # it has handed something out, in this process or an earlier one
    by_hand: bool = False  # last asked with next() instead of by a loop
    held: bool = False  # asked with next() from its first batch on: the code after its begin is no body of it
    early: bool = True  # no boundary was passed between its begin and its last batch
    begun: dict[str, Any] | None = None  # random state after the ``iter()`` of that line
    line: Scope | None = None  # where the walk comes to the line that began it; None inside a loader's loop
    range: str | None = None  # ``epochs`` or ``steps``, in a turn of which it counts
    outlived: bool = False  # that turn is over, and a variable holds it still
    goes_on: Callable[[], bool | None] = lambda: None  # whether it will be asked again, None for unknown
    lives: Callable[[], bool] = lambda: False  # whether anything of the function holds it
    holder: Callable[[], Path | None] = lambda: None  # the variable that holds it
    placed: bool = False  # there was one when its turn was over, so that a resumed function's can be given it
    exhausted: bool = False  # it came to its end
    follows: Pass | None = None  # what a variable of an outer scope held, until it is seen if it does still
    looked: bool = False  # the variable's earlier one was only looked at, which the walk does again
    passed_on: PassedOn = NOTHING  # by its end, to the code after it
    bound: Bound | None = None  # the attributes that objects had before the body ran
    stands_in: bool = False  # skipped, for a later pass of the same variable, taken up after the walk


@dataclass(eq=False)
class Scope:
    """The counts since the function, a turn of `epochs` or a `steps` range began."""

    loop: str | None
    began: int  # tick
    inherited: dict[str, Pass]  # passes that were running when the scope began
    resumed: bool = True  # during the walk: it is the checkpoint's scope, not another one on the way
    passes: dict[str, int] = field(default_factory=dict)
    glances: dict[str, list[int]] = field(default_factory=dict)  # passes to run again on the walk
    boundaries: int = 0
    quiet: bool = True  # no boundary was passed since it began, in inner scopes neither
    ended: dict[str, Any] = field(default_factory=dict)  # by pass: the counts and the random state at its end
    # a loop that is over, and the variables of its body that the code after it reads and a resumed turn
    lacks: LoopsVariables | None = None  # has not at all
    rests: LoopsVariables | None = None  # has other values of, at the first boundary after the loop
    rests_after: int = 0  # the boundaries that there were before that one
