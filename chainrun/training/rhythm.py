"""What is learned of a training's rhythm, so that a segment stops late, and not too late."""

from __future__ import annotations

from dataclasses import dataclass, field

TIMES_USUAL = 4.0  # a gap so many times longer than the mean one is something else than a step: an evaluation
LEAST_LONG = 1.0  # seconds; shorter gaps are never looked at as long ones
FORGETS = 0.999  # what is left of the longest usual gap after each boundary: half of it after 700
BEATS = 2  # equal distances between long gaps, in a row, that make a rhythm


@dataclass
class Pace:
    """How long steps, the gaps between them and saves take; kept over the segments.

    A gap is the time between two boundaries. Most are steps; some are far longer, an evaluation or the end of an
    epoch, and often come every so many steps. While that rhythm holds, a long gap is reckoned with only where it
    comes next; as long as none is known it may come at any time.
    """

    longest_gap: float = 0.0
    """Seconds between two boundaries, at most."""
    usual_gap: float = 0.0
    """The same without the long gaps."""
    mean_gap: float = 0.0
    """Seconds of a usual gap, on average."""
    save_seconds: float = 0.0
    """Of the slowest recent save; 0 while none was made."""
    long_after: list[int] = field(default_factory=list)
    """The global steps after which the last long gaps came, oldest first."""

    def note_save(self, seconds: float) -> None:
        self.save_seconds = max(seconds, 0.8 * self.save_seconds)

    def note_gap(self, seconds: float, boundaries: int, after: int) -> None:
        """Learn from the time between two looks at the training.

        Args:
            boundaries: how many were passed in it, at least 1.
            after: the global step when it began.
        """
        known = self.mean_gap or seconds
        if seconds > max(LEAST_LONG, TIMES_USUAL * known) and seconds > 0.5 * self.longest_gap:
            if seconds > 2 * self.longest_gap:
                self.long_after = []  # longer than all so far: whether it comes back nobody knows yet
            self.long_after = [*self.long_after, after][-BEATS - 1 :]
        else:
            self.usual_gap = max(seconds, FORGETS**boundaries * self.usual_gap)
            mean = seconds / boundaries
            self.mean_gap = mean if not self.mean_gap else 0.9 * self.mean_gap + 0.1 * mean
            due = self._next_long()
            if due is not None and after > due:  # it did not come
                self.long_after = []
        self.longest_gap = max(self.longest_gap, seconds)

    def _next_long(self) -> int | None:
        """Return the global step after which the next long gap comes, None where there is no rhythm."""
        if len(self.long_after) <= BEATS:
            return None
        distances = {
            later - earlier for earlier, later in zip(self.long_after, self.long_after[1:], strict=False)
        }
        return self.long_after[-1] + distances.pop() if len(distances) == 1 else None

    def gap(self, step: int, soon: float) -> float:
        """Return how many seconds the gaps that come next may last.

        Args:
            step: the present global step.
            soon: seconds that a decision takes: a long gap that begins within them comes next.
        """
        due = self._next_long()
        if due is None or self.mean_gap == 0:
            return self.longest_gap
        comes = 0 <= due - step <= 2 + soon / self.mean_gap
        return self.longest_gap if comes else self.usual_gap
