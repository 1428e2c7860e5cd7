"""Where a training is and how fast it goes: what a bar, a line in a log and `chainrun status` say of it."""

from __future__ import annotations

from collections import deque
from typing import Any

from chainrun.durations import rough_duration

WINDOW = 20  # of the newest looks, over which the rate is taken


class Rate:
    """Steps a second, over the newest looks at a training."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=WINDOW)

    def note(self, now: float, step: int) -> None:
        """Note a look.

        Args:
            now: seconds on any clock; a look of the same time is the same look.
            step: optimization steps done by then; fewer than before starts anew.
        """
        if self._seen and (now < self._seen[-1][0] or step < self._seen[-1][1]):
            self._seen.clear()
        if self._seen and now == self._seen[-1][0]:
            return
        self._seen.append((now, step))

    @property
    def value(self) -> float | None:
        """Steps a second; None as long as nobody knows."""
        if len(self._seen) < 2 or self._seen[-1][1] == self._seen[0][1]:
            return None
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return (last - first) / (now - began) if now > began else None


def line(progress: dict[str, Any], rate: float | None) -> str:
    """Return in a line where a training is.

    Args:
        progress: what `Run.progress` says.
        rate: in steps a second.
    """
    step, total = progress["step"], progress["total"]
    parts = [f"step {step}" + (f" of {total} ({progress['fraction']:.0%})" if total else "")]
    parts.append(f"epoch {progress['epoch']}")
    parts += [f"{name} {value:.4g}" for name, value in progress["metrics"].items()]
    if rate:
        parts.append(speed(rate))
    if progress["left"] is not None:
        parts.append(f"{rough_duration(progress['left'])} to walltime")
    if rate and total and total > step:
        parts.append(f"{rough_duration((total - step) / rate)} of training left")
    return ", ".join(parts)


def speed(rate: float) -> str:
    """Return a rate in steps a second for people."""
    return f"{rate:.3g} steps/s" if rate >= 1 else f"{1 / rate:.3g} s/step"
