"""What a segment compares with the one before: the witness and the variables. A training is well without it.

So nothing here raises; what goes wrong is a line in the log.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from chainrun.checkpoint.store import Committed
from chainrun.rundir import RunDir
from chainrun.training import turns, witness
from chainrun.training.lost import Variables
from chainrun.training.passes import Pass
from chainrun.training.position import Position
from chainrun.training.registry import Registry
from chainrun.training.saving import Setting
from chainrun.training.stop import Wish


class Diagnosis:
    """What one rank leaves for the next segment, and hears of the one before.

    Args:
        before: the checkpoint that this segment goes on from, None at a fresh start.
        belongings: returns all that checkpoints hold.
        warn: tells the user, in the log and in the journal.
    """

    def __init__(
        self,
        run: RunDir,
        setting: Setting,
        registry: Registry,
        position: Position,
        before: Committed | None,
        belongings: Callable[[], list[Any]],
        warn: Callable[[str], None],
    ) -> None:
        self._run, self._setting, self._registry, self._position = run, setting, registry, position
        self._rank, self._before, self._warn = setting.allocation.rank, before, warn
        self._variables = Variables(belongings, registry.names, position.outside)
        self._looks = 3  # at variables where a loop begins, until the first boundary

    # ---- before the first boundary

    def look(self, head: Pass) -> None:
        """A loop asks for its next turn."""
        if not self._looks or head.advanced is not None:
            return
        if self._before is None:
            self._looks -= 1
            self._follow(self._variables.note_begin)
        elif self._variables.waits:
            self._follow(partial(self._variables.hear_later, self.tell))

    def first_boundary(self) -> None:
        """The training has come to the segment's first boundary."""
        self._looks = 0
        self._follow(partial(self._variables.note_first, self._position.boundaries))

    def _follow(self, note: Callable[[], None]) -> None:
        try:
            note()
        except Exception as error:
            self._setting.say(f"what variables hold is not followed: {type(error).__name__}: {error}")

    @property
    def turns(self) -> turns.Turns:
        """In which turns the function's own loops are."""
        return turns.turns(self._variables.frames())

    # ---- the segment that ends

    def leave(
        self, saved: Path, wish: Wish, tree: dict[str, Any], owner: str | None, time_left: float
    ) -> None:
        """What follows would be the next batch: leave its fingerprint, and the state's, for the next segment.

        Args:
            saved: the folder of the segment's last checkpoint.
            tree: this rank's state in it.
            owner: the loop at whose head it was taken.
            time_left: seconds until the job is killed.
        """
        seconds = witness.seconds_for(time_left, wish.reason)
        about = (tree, self._registry.generators(), self._registry.chain_of(owner))
        held = partial(self._variables.noted, self._variables.frames(), self._position.boundaries)
        for line in witness.give(saved, self._rank, *about, seconds, held):
            self._setting.say(line)

    # ---- the segment that goes on

    @property
    def expects_witness(self) -> bool:
        """Whether the segment before should have left a witness of what this rank has restored."""
        if self._before is None:
            return False
        about = self._before.manifest
        return (
            witness.is_expected(about["reason"])
            and about["world_size"] == self._setting.allocation.world_size
        )

    def hear(self, owner: str | None, tree: Callable[[], dict[str, Any]], step: int) -> None:
        """Compare what the segment before left with what was restored, and with what comes next."""
        assert self._before is not None
        try:
            now = tree()  # on every rank, whatever each finds: a state_dict() may need the others
            testimony = witness.read(self._before.path, self._rank)
            if not testimony:
                self._setting.say(f"no witness at step {step}: the segment before could not leave one")
                return
            report = partial(witness.report, self._run, self._setting, step)
            witness.hear(testimony, now, self._registry.generators(), self._registry.chain_of(owner), report)
        except Exception as error:
            self._setting.say(f"no witness at step {step}: {type(error).__name__}: {error}")

    def compare_variables(self, owner: str | None, ranges: dict[str, dict[str, Any]]) -> None:
        """Tell of variables that the cut has lost, and that the function goes on to read."""
        assert self._before is not None
        chain = self._registry.chain_of(owner)
        try:
            told = witness.variables(self._before.path, self._rank)
            see_next = None if chain is None else chain.see_next
            gives = {loop: place["index"] < place["of"] for loop, place in ranges.items()}
            epochs = ranges.get("epochs", {"index": 0, "of": 0})
            around = owner != "epochs" and epochs["index"] + 1 < epochs["of"]
            about = (see_next, gives.get(str(owner)), around)
            again = owner is None and self._position.inside == "epochs"
            self._variables.hear(told, *about, self.tell, again=again)
        except Exception as error:
            self._setting.say(f"what variables hold was not compared: {type(error).__name__}: {error}")

    def tell(self, line: str) -> None:
        """Warn of something that this rank has lost."""
        if self._rank == 0:
            self._warn(line)
        else:
            print(f"chainrun: rank {self._rank}: warning: {line}", file=sys.stderr, flush=True)
