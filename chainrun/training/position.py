"""Where the function is, in counts that a fresh process can walk to again.

A resumed function starts at its first line. To go on exactly where a checkpoint was taken, chainrun walks
it there: loops that had ended give nothing, the interrupted epoch is entered again, the interrupted loader
moves to its batch; then everything registered, and the random state last, is set to the checkpoint's, which
undoes whatever the walk did. That moment is called *going on*.

Words:

pass
    one run of a registered loader, of `Run.steps` or of `Run.epochs` from start to end.
scope
    the function, inside it the present turn of `epochs`, inside that a `steps` range. Passes are counted
    by scope: "the second pass over ``train`` since this epoch began".
head
    where a loop asks for its next turn. A checkpoint is taken at the head that follows the boundary, so that
    the rest of the loop's body has run; or in the boundary call itself where no registered loop is running.
owner
    the loop at whose head (or ``None``: the boundary call in which) the checkpoint was taken; meeting it
    again is going on.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal

from chainrun.errors import RegisterError, RestoreError
from chainrun.training import passed_on
from chainrun.training.holders import Path
from chainrun.training.passed_on import NOTHING, Bound
from chainrun.training.passes import LoopsVariables, Pass, Scope

CHANGED = (
    "its loops or its arguments have changed, so go back to the code that wrote the checkpoint, or start a new run; or a "
    "loop of its own depends on run.state, which is the checkpoint's from the first line on: write "
    "`for epoch in run.epochs(n):`, which counts by itself, or `range(n)` from 0"
)
Begin = Literal["fresh", "skip", "resume"]


class Position:
    """The place of the function, and the walk to a saved one.

    Args:
        target: what `capture` returned when the checkpoint was taken, None for a fresh start.
        go_on: called when the walk arrives; restores everything registered and the random state.
        random_state: returns everything random, as tensors and plain data.
        set_random_state: sets it.
        outside: the code that ran before the run was begun, and does not begin anew.
    """

    def __init__(
        self,
        target: dict[str, Any] | None,
        go_on: Callable[[], None],
        random_state: Callable[[], Any],
        set_random_state: Callable[[Any], None],
        outside: frozenset[types.CodeType],
    ) -> None:
        self._tick = 0
        self._scopes = [Scope(None, 0, {})]
        self._running: dict[str, Pass] = {}
        self._target = target
        self._waiting: dict[str, dict[str, Any]] = (
            {} if target is None else {p["loop"]: p for p in target["running"]}
        )
        self._go_on, self._random_state, self._set_random_state = go_on, random_state, set_random_state
        self.outside = outside
        self._late: Bound = set()  # what objects have got in loops, and a resumed function's have not
        # what is known of loops of which a turn of a range holds an iterator beyond its end: that a later turn goes
        # on with it, or that it makes a new one
        self._kept: set[str] = set() if target is None else {*target.get("kept", ())}
        self._renewed: set[str] = set() if target is None else {*target.get("renewed", ())}
        # such an iterator of which neither is known: boundaries since its turn was over, and 1
        self._unsettled = 0
        self.over = False  # the segment ends: what ends with it does not count
        self.walking = target is not None
        self.boundaries = 0  # passed by this process, the walk's not counted

    # ---- what loops tell -----------------------------------------------------------------------

    def begin(self, loop: str) -> tuple[Begin, Pass]:
        """A pass over `loop` begins; say whether it is to be skipped, resumed or run afresh.

        Raises:
            RestoreError: the function's loops are not those that the checkpoint was taken in.
        """
        self._tick += 1
        if loop in self._running:
            if self._is_unsettled(self._running[loop]):
                self._is_renewed(self._running[loop])
            else:
                self.end(self._running[loop], exhausted=False)
        scope = self._scopes[-1]
        outer = scope.inherited.get(loop)
        if outer is not None and self._was_counted_here(loop):  # the variable was seen to keep it
            self._forget(outer)
            outer = None
        if outer is not None:  # a variable of an outer scope is given a new pass: it counts there
            new = Pass(loop, outer.home, outer.ordinal, self._tick, self.boundaries, follows=outer)
            new.looked = outer.looked or self._is_only_held(outer)
        else:
            new = Pass(loop, 0, 0, self._tick, self.boundaries)
            self._count_here(new)
        if not self._in_a_loop():
            new.line = scope
        new.range = self._scopes[new.home].loop
        what = self._what(new, inherited=outer is not None)
        waiting = self._waiting.get(loop)
        if what != "skip":
            self._running[loop] = new
        elif waiting and waiting["held"] and waiting["home"] == new.home:
            new.ordinal, new.held, new.stands_in = waiting["ordinal"], True, True
            new.line = None  # the pass that it stands in for was begun elsewhere
            self._running[loop] = new
        return what, new

    def _was_counted_here(self, loop: str) -> bool:
        """Whether by the checkpoint the next pass over a loop was the present scope's own."""
        saved = self._saved_scope()
        if saved is None or not self._on_path():
            return False
        so_far = self._scopes[-1].passes.get(loop, 0)
        waiting = self._waiting.get(loop)
        here = (len(self._scopes) - 1, so_far + 1)
        # one of an earlier turn is in no scope's counts, and is the first of this one
        is_waiting_here = waiting is not None and (waiting["home"], waiting["ordinal"]) == here
        return saved["passes"].get(loop, 0) > so_far or is_waiting_here

    def _count_here(self, new: Pass) -> None:
        """It is the present scope's own."""
        scope = self._scopes[-1]
        scope.passes[new.loop] = scope.passes.get(new.loop, 0) + 1
        new.home, new.ordinal = len(self._scopes) - 1, scope.passes[new.loop]

    def _see_what_follows(self) -> None:
        """See if the variables that held earlier passes hold them still, now that the line is over."""
        for new in self._running.values():
            outer, new.follows = new.follows, None
            if outer is None:
                continue
            # one at its end lives on in the StopIteration that the function makes a new one for
            if outer.exhausted or not outer.lives():
                for scope in self._scopes:
                    if new.loop in scope.inherited:
                        scope.inherited[new.loop] = new
                if outer.line in self._scopes:  # the walk comes to that line first
                    new.line, new.begun = outer.line, outer.begun
                continue
            home = self._scopes[outer.home]
            self._forget(outer)
            if home.loop != "steps":  # of which no turn is begun again
                self._note_end(outer, home, again=outer.early or outer.looked)
            self._count_here(new)
            new.range, new.looked = self._scopes[-1].loop, False

    def _what(self, new: Pass, inherited: bool) -> Begin:
        if self.walking and not self._on_path():
            return "fresh"
        waiting = self._waiting.get(new.loop)
        if waiting and (not self.walking or (waiting["home"], waiting["ordinal"]) == (new.home, new.ordinal)):
            new.looked = waiting.get("looked", False)
            if new.looked and self.walking:
                return (
                    "fresh"  # the walk looks as the function did; at its end the pass is moved to its place
                )
            del self._waiting[new.loop]
            new.begun = waiting["begun"]
            new.early = bool(waiting.get("fresh"))
            new.boundaries = 0 if new.early else -1  # it has passed some in an earlier process
            new.held, new.asked = waiting["held"], waiting.get("asked", True)
            if not self.walking:
                new.line = None  # to which the walk did not come
            if not self.walking and not inherited:
                # the function made it in a place that it has not come to again
                self._scopes[-1].passes[new.loop] -= 1
            new.home, new.ordinal = waiting["home"], waiting["ordinal"]
            return "resume"
        saved = self._saved_scope()
        if saved is None or inherited or new.ordinal in saved["glances"].get(new.loop, ()):
            return "fresh"
        if new.ordinal > saved["passes"].get(new.loop, 0):
            raise RestoreError(
                f"the function began pass {new.ordinal} over '{new.loop}' before it came to the place where "
                f"the checkpoint was taken ({self.describe_target()}): {CHANGED}"
            )
        ended = saved["ended"].get(f"{new.loop} {new.ordinal}")
        new.exhausted = ended is None or ended.get("exhausted", True)
        if ended is not None and ended["random"] is not None:
            self._set_random_state(ended["random"])  # code between two loops draws what it drew then
            if ended["passes"]:
                self._scopes[-1].boundaries = ended["boundaries"]
                self._scopes[-1].passes.update(ended["passes"])  # loops inside that loop counted here too
        return "skip"

    def resumed(self, new: Pass) -> None:
        """The pass has been moved to its place: the walk is over, or goes on as the function did then."""
        if self.walking and self._target is not None:
            if self._target["owner"] == new.loop:
                self.arrive()
            elif new.begun is not None:
                self._set_random_state(new.begun)

    def is_waiting(self, loop: str) -> bool:
        """Whether the walk is over, and a pass over this loop that was running is still to be taken up."""
        return not self.walking and loop in self._waiting

    def holder_of(self, loop: str) -> Path | None:
        """Return the variable that held a pass which the walk has not come to, None where there was no such thing."""
        return None if self.walking else self._waiting.get(loop, {}).get("holder")

    def forget_waiting(self, loop: str) -> None:
        """A new pass begins although that one was not taken up: it is over."""
        del self._waiting[loop]

    def _in_a_loop(self) -> bool:
        return any(
            one.home == len(self._scopes) - 1
            and one.advanced is not None
            and not one.held
            and one.loop not in ("epochs", "steps")
            for one in self._running.values()
        )

    def _on_path(self) -> bool:
        return all(scope.resumed for scope in self._scopes)

    def _saved_scope(self) -> dict[str, Any] | None:
        """What the checkpoint says of the present scope, None where it says nothing or the walk is over."""
        if not self.walking or self._target is None or len(self._scopes) > len(self._target["scopes"]):
            return None
        saved: dict[str, Any] = self._target["scopes"][len(self._scopes) - 1]
        return saved

    def owns(self, loop: str) -> bool:
        """Whether the walk ends where this loop is resumed."""
        return self.walking and self._target is not None and self._target["owner"] == loop

    def arrive(self) -> None:
        """The walk is at its end: go on."""
        assert self._target is not None
        for scope, saved in zip(self._scopes, self._target["scopes"], strict=True):
            scope.passes, scope.glances = saved["passes"], saved["glances"]
            scope.boundaries, scope.quiet, scope.ended = saved["boundaries"], saved["quiet"], saved["ended"]
        for one in self._running.values():
            if one.looked and (waiting := self._waiting.pop(one.loop, None)) is not None:
                one.boundaries, one.early = 0 if waiting["fresh"] else -1, waiting["fresh"]
                one.held, one.direct = waiting["held"], False
        self.walking = False
        self._go_on()

    def advance(self, running: Pass) -> None:
        """The pass hands something out.

        Raises:
            RegisterError: the function holds a batch that a resumed one could not have.
        """
        self._tick += 1
        self._see_what_follows()
        if running.outlived:
            if running.loop in self._renewed and not running.placed:
                raise RegisterError(
                    f"the iterator over '{running.loop}' that an earlier turn made is used, although other turns made "
                    "a new one; a resumed function could not tell which. Make it before the range begins, or anew in "
                    "every turn that uses it"
                )
            self._kept.add(running.loop)
        if not running.asked:
            running.held, running.asked = running.by_hand, True
        elif running.held and not running.by_hand:
            raise RegisterError(
                f"a batch of '{running.loop}' was taken with next() before a loop went over the same iterator; a "
                "resumed function would take another one. Take it inside the loop, or use an iterator of its own"
            )
        inner = self._in_a_loop()
        deeper = running.depth < len(self._scopes) or inner
        if running.direct and deeper and self._scopes[running.depth - 1].began <= (running.advanced or 0):
            raise RegisterError(
                f"a batch of '{running.loop}' was taken before a loop began, and more are taken from the same "
                "iterator inside: a batch fetched ahead is lost by a cut. Take every batch in the turn that uses "
                "it; for a look at the first one, use an iterator of its own"
            )
        running.direct = running.held and not inner and self.inside != "steps"
        running.early = running.early and running.boundaries == self.boundaries
        running.depth, running.advanced = len(self._scopes), self._tick

    def note_bound(self, running: Pass) -> None:
        """Note which attributes the function's objects have before the loop's body runs."""
        running.bound = passed_on.bound(self.outside)

    def end_is_near(self, running: Pass) -> None:
        """The loop asks for its next turn, and there is none: see what its body passes on."""
        if running.bound is not None:
            self._late |= passed_on.bound(self.outside) - running.bound
        running.passed_on = passed_on.to_the_code_after(self.outside, self._late)

    def end(self, ended: Pass, *, exhausted: bool) -> None:
        """The pass is over (`exhausted`), or was left early."""
        ended.exhausted = exhausted
        if self.over or self._running.get(ended.loop) is not ended:
            return  # a newer pass has taken its place
        if ended.follows is not None:
            self._see_what_follows()
        del self._running[ended.loop]
        if ended.stands_in or (ended.outlived and ended.placed):
            return
        scope = self._scopes[-1]
        if ended.home != len(self._scopes) - 1 or ended.loop in scope.inherited:
            return
        if scope.loop == "steps":
            return  # no turn of it is begun again
        repeats = not exhausted or scope.quiet  # a look at the first batch, statistics before the training
        self._note_end(ended, scope, again=repeats and ended.boundaries == self.boundaries)

    def _note_end(self, ended: Pass, scope: Scope, *, again: bool) -> None:
        """Note for the walk that a pass of this scope is over; `again` is whether the walk goes through it again."""
        if again:
            glances = scope.glances.setdefault(ended.loop, [])
            if ended.ordinal not in glances:
                glances.append(ended.ordinal)
        else:
            lacks = ended.passed_on.unbound + (ended.passed_on.late if scope.loop == "epochs" else ())
            if lacks:
                scope.lacks = (ended.loop, lacks)
            if ended.passed_on.changed:
                scope.rests, scope.rests_after = (ended.loop, ended.passed_on.changed), scope.boundaries
            # the code after the begin of a held iterator is gone through again; a loop's body is not
            never_asked = not ended.asked and not ended.exhausted
            held = ended.held or (never_asked and ended.loop not in ("epochs", "steps"))
            scope.ended[f"{ended.loop} {ended.ordinal}"] = {
                "boundaries": scope.boundaries,
                "exhausted": ended.exhausted,
                "passes": {} if held else dict(scope.passes),
                "random": ended.begun if held else self._random_state(),
            }

    def push(self, loop: str, what: Begin) -> None:
        """A turn of `epochs`, or a `steps` range, begins; `what` is what `begin` said."""
        self._tick += 1
        self._see_what_follows()
        self._scopes.append(Scope(loop, self._tick, dict(self._running), resumed=what == "resume"))

    def pop(self) -> None:
        """It is over. A pass that began inside and is still held counts as the next turn's first."""
        self._see_what_follows()
        self._scopes.pop()
        self._outlive(len(self._scopes))

    def turn(self) -> None:
        """A turn of a `steps` range is over; the range goes on."""
        self._outlive(len(self._scopes) - 1)

    def _outlive(self, home: int) -> None:
        for held in [*self._running.values()]:
            if held.home == home and held.loop not in ("epochs", "steps"):
                held.placed = held.placed if held.outlived else held.holder() is not None
                held.ordinal, held.outlived = 1, True
                if held.loop in self._renewed and not held.placed:
                    self._is_renewed(held)
                if self._is_unsettled(held):
                    self._unsettled = 1

    def _is_unsettled(self, one: Pass) -> bool:
        """Whether nothing tells yet if later turns go on with it: no variable of a resumed function holds it."""
        known = one.placed or one.loop in self._kept or one.loop in self._renewed
        return one.outlived and one.range in self._running and not known

    def _is_renewed(self, one: Pass) -> None:
        """Each turn that uses such an iterator makes its own: this one is of no use any more."""
        self._renewed.add(one.loop)
        self._forget(one)

    def _forget(self, one: Pass) -> None:
        """No later pass is one of the variable that holds this one."""
        if self._running.get(one.loop) is one:
            del self._running[one.loop]
        for scope in self._scopes:
            scope.inherited.pop(one.loop, None)

    def _settle(self) -> Pass | None:
        """See by the code that follows what becomes of such iterators; return one of which that is not seen."""
        for one in [*self._running.values()]:
            if self._is_unsettled(one):
                goes_on = one.goes_on()
                if goes_on is None:
                    return one
                if goes_on:
                    self._kept.add(one.loop)
                else:
                    self._is_renewed(one)
        self._unsettled = 0
        return None

    @property
    def inside(self) -> str | None:
        """The range whose turn is running: ``epochs``, ``steps`` or None."""
        return self._scopes[-1].loop

    # ---- boundaries ----------------------------------------------------------------------------

    def boundary(self) -> bool:
        """A boundary is reached; return whether it is one that the function really passes.

        During the walk it is not, and the one at which the checkpoint was taken is where the walk ends.

        Raises:
            RegisterError: a turn that is over made an iterator, and nothing tells if this one is to go on with it.
        """
        self._see_what_follows()
        if self._unsettled and (one := self._settle()):
            self._unsettled += 1
            if self._unsettled > 2:
                raise RegisterError(
                    f"an iterator over '{one.loop}' was made in an earlier turn of run.{self.inside}() and may be used in "
                    "a later one: a resumed function would have none, and nothing tells whether it then makes a new one "
                    "for want of this one, or would have made one anyway. Make it before the range begins, or anew in "
                    "every turn, or go over the loader with a for loop"
                )
        scope = self._scopes[-1]
        scope.boundaries += 1
        for each in self._scopes:
            each.quiet = False
        if not self.walking:
            self.boundaries += 1
            return True
        assert self._target is not None
        scopes = self._target["scopes"]
        if (
            self._target["owner"] is None
            and self._on_path()
            and len(self._scopes) == len(scopes)
            and scope.boundaries == scopes[-1]["boundaries"]
        ):
            self.arrive()
        return False

    def is_head(self, head: Pass, *, now: bool = True) -> bool:
        """Whether this loop is the present scope's own, so that its head, `now`, is a place to capture at."""
        self._see_what_follows()
        if self.inside == "steps":
            return head.loop == "steps"
        by_hand = head.by_hand if now else head.held
        return head.home == len(self._scopes) - 1 and not by_hand

    def has_head(self) -> bool:
        """Whether a loop is running at whose head to capture; else it is done in the boundary call."""
        return any(self.is_head(running, now=False) for running in self._running.values())

    def refuse_by_hand(self) -> None:
        """Refuse a loop of the function's own that takes its batches with next().

        Its count would begin again after a cut, and nothing tells how far it was.

        Raises:
            RegisterError: there is one, and no range or loader's loop whose head could be used.
        """
        passes = self._running.values()
        # one that nobody has asked yet may be taken by hand as well
        if any(one.advanced is not None and self.is_head(one, now=False) for one in passes):
            return
        for running in passes:
            if running.held and running.advanced is not None and running.advanced >= self._scopes[-1].began:
                raise RegisterError(
                    f"batches of '{running.loop}' are taken with next() in a loop of the function's own, whose "
                    "count a resume does not know; write that loop as `for step in run.steps(n):`, or go over "
                    "the loader itself"
                )

    def passed_on(self, head: Pass | None) -> LoopsVariables | None:
        """Return a loop that is over, or at its end, and variables that the code after it has from its body.

        A turn of `epochs` that is begun again has not got them: the capture waits for the next one.
        """
        scope, mine = self._scopes[-1], NOTHING if head is None else head.passed_on
        if scope.loop == "steps":
            scope = self._scopes[-2]
            if scope.loop == "epochs":
                return ("steps", mine.changed) if mine.changed else scope.lacks
        if scope.loop is None and head is not None:
            is_range = head.loop in ("epochs", "steps")
            others = [
                one for one in self._running.values() if one is not head and not (is_range and one.held)
            ]
            if not others:
                lacks = mine.unbound + mine.late
                return (head.loop, lacks) if lacks else None  # what comes last
        if scope.loop != "epochs":
            return None
        if head is not None and mine.changed:
            return (head.loop, mine.changed)
        at_the_first = scope.boundaries <= scope.rests_after + 1
        return scope.lacks or (scope.rests if at_the_first else None)

    @property
    def lacks(self) -> LoopsVariables | None:
        """The same of the function itself, for which no later turn comes."""
        return self._scopes[0].lacks

    def hindrance(self, head: Pass | None) -> str | None:
        """Return the name of an outer loop that makes a capture at this head inexact, None if exact.

        An outer loader has handed out a batch whose body is still running: a resumed function would need
        that batch again. The capture waits until the inner loop has ended.
        """
        since = head.began if head else self._scopes[-1].began
        if self._unsettled and (one := self._settle()):
            return one.loop  # this turn will tell before its second boundary
        for other in self._running.values():
            if other is head or other.loop in ("epochs", "steps") or other.advanced is None:
                continue
            if self._is_only_held(other) or self._was_of_an_earlier_turn(other):
                continue
            if other.advanced < since:
                return other.loop
        return None

    def _is_only_held(self, one: Pass) -> bool:
        """Whether its iterator lives on after a look at the first batches, taken before the range began.

        It is no loop that has to go on, and is gone through again like any look.
        """
        return one.early and one.advanced is not None and one.depth < len(self._scopes)

    def _was_of_an_earlier_turn(self, one: Pass) -> bool:
        """Whether it was last asked with next() by a turn of `epochs` that is over: a batch now and then, and no loop."""
        scope = self._scopes[-1]
        asked_inside = one.held and one.depth == len(self._scopes) and scope.loop == "epochs"
        return asked_inside and one.advanced is not None and one.advanced < scope.began

    def capture(self, owner: str | None) -> dict[str, Any]:
        """Return the place as plain data."""
        self._see_what_follows()
        held = [p for p in self._running.values() if self._is_only_held(p)]
        return {
            "owner": owner,
            "kept": sorted(self._kept),
            "renewed": sorted(self._renewed),
            "scopes": [
                {
                    "passes": dict(s.passes),
                    "glances": {
                        loop: [
                            *s.glances.get(loop, ()),
                            *(p.ordinal for p in held if (p.loop, p.home) == (loop, n)),
                        ]
                        for loop in {*s.glances, *(p.loop for p in held)}
                    },
                    "boundaries": s.boundaries,
                    "quiet": s.quiet,
                    "ended": dict(s.ended),
                }
                for n, s in enumerate(self._scopes)
            ],
            "running": [
                *self._waiting.values(),
                *(
                    {
                        "loop": p.loop,
                        "home": p.home,
                        "ordinal": p.ordinal,
                        "held": p.held,
                        "asked": p.asked,
                        "looked": p.looked,
                        "holder": p.holder(),
                        "begun": p.begun,
                        "fresh": p.advanced is None and p.boundaries == self.boundaries,
                    }
                    for p in self._running.values()
                    if p not in held and not p.stands_in
                ),
            ],
        }

    def describe_target(self) -> str:
        """Say in words where the walk goes."""
        assert self._target is not None
        owner = self._target["owner"]
        return f"in loop '{owner}'" if owner else f"boundary {self._target['scopes'][-1]['boundaries']}"
