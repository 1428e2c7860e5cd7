"""How long a training is, in optimization steps, as its loops tell while they run."""

from __future__ import annotations

from typing import Any


class Extent:
    """Estimates the number of all steps: exact where a batch, or a turn of `run.steps`, is a step.

    Args:
        total: what was known of it before.
    """

    def __init__(self, total: int | None = None) -> None:
        self._total = total

    def look(
        self, step: int, ranges: dict[str, dict[str, Any]], passes: list[tuple[int, int, bool]]
    ) -> tuple[int | None, float | None]:
        """Return how many steps there will be, and which fraction is done; None where nobody knows yet.

        Args:
            step: those done.
            ranges: ``index`` and ``of`` of the loops over `run.steps` and `run.epochs`.
            passes: of each loader how many batches of its pass are handed out, of how many, and whether it runs.
        """
        place = ranges.get("steps") or ranges.get("epochs")
        if place is None or not place["of"]:  # the loops have not begun (yet), or there are none
            return self._total, min(1.0, step / self._total) if self._total else None
        index, of = place["index"], place["of"]
        if index >= of:
            self._total = step
        elif "steps" in ranges:
            self._learn(step, index, of)
        else:
            # the longest loader is the training's; another one may be the evaluation's
            handed, batches, runs = max(passes, key=lambda each: each[1], default=(0, 0, False))
            if runs and batches:
                self._learn(step, index * batches + handed, of * batches)
        if self._total:
            return self._total, min(1.0, step / self._total)
        return None, index / of

    def _learn(self, step: int, turn: int, turns: int) -> None:
        """A turn that is under way has been counted and its step has not: so one more or less is the same."""
        if abs(turn - step) <= 1:
            self._total = turns
        elif turn and step:
            self._total = max(step, round(step * turns / turn))
