"""The user's metrics over steps, read line by line and kept small enough to draw: weeks of training fit."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from chainrun.rundir import RunDir, read_lines

BUCKETS = 1200  # of one curve, at most


@dataclass
class Curve:
    """One metric: over steps, the mean and the extremes of every few of them."""

    name: str
    width: int = 1
    """Steps in one bucket."""
    count: int = 0
    not_finite: int = 0
    first_not_finite: int | None = None
    until: int = 0
    """The last step."""
    last: float | None = None
    """The newest value that is finite."""
    _buckets: dict[int, list[float]] = field(default_factory=dict)

    def add(self, step: int, value: float) -> None:
        self.count, self.until = self.count + 1, max(self.until, step)
        if not math.isfinite(value):
            self.not_finite += 1
            self.first_not_finite = step if self.first_not_finite is None else self.first_not_finite
            return
        self.last = value
        bucket = self._buckets.get(step // self.width)
        if bucket is not None:  # nearly always: there are millions of lines
            if value < bucket[0]:
                bucket[0] = value
            elif value > bucket[1]:
                bucket[1] = value
            bucket[2] += value
            bucket[3] += 1
            return
        self._buckets[step // self.width] = [value, value, value, 1]
        if len(self._buckets) > BUCKETS:
            self._widen()

    def _widen(self) -> None:
        """Make one bucket of two."""
        self.width *= 2
        old, self._buckets = self._buckets, {}
        for index, (low, high, total, number) in old.items():
            have = self._buckets.setdefault(index // 2, [low, high, 0.0, 0])
            have[0], have[1] = min(have[0], low), max(have[1], high)
            have[2], have[3] = have[2] + total, have[3] + number

    def points(self) -> tuple[list[float], list[float], list[float], list[float]]:
        """Return steps, means, lowest and highest values, in the order of the steps."""
        steps, means, lows, highs = [], [], [], []
        for index in sorted(self._buckets):
            low, high, total, number = self._buckets[index]
            steps.append(index * self.width + (self.width - 1) / 2)
            means.append(total / number)
            lows.append(low)
            highs.append(high)
        return steps, means, lows, highs


@dataclass
class Metrics:
    """All metrics of a run."""

    curves: list[Curve]
    """Those with a number in them, in the order of their first line."""
    others: dict[str, str]
    """Those without: name and type of the value."""


def read(run: RunDir) -> Metrics:
    """Read the metrics of a run."""
    curves: dict[str, Curve] = {}
    others: dict[str, str] = {}
    for line in read_lines(run.metrics):
        step = line.get("step")
        if not isinstance(step, int):
            continue
        for name, value in line.items():
            if name == "step":
                continue
            if isinstance(value, int | float):
                curves.setdefault(name, Curve(name)).add(step, _float(value))
            elif value is not None:
                others.setdefault(name, type(value).__name__)
    return Metrics(list(curves.values()), {n: t for n, t in others.items() if n not in curves})


def _float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an int of hundreds of digits
        return math.inf
