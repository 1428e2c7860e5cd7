"""The story of a run: its segments, their phases, what they cost, and what each handoff took."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from chainrun.report import endings
from chainrun.report.endings import Ending
from chainrun.report.look import NOTHING
from chainrun.rundir import RunDir

Event = dict[str, Any]
PHASES = {
    "hold": "SLURM's hold before it may start",
    "queue": "waiting in the queue",
    "start": "start of the job, imports, set-up",
    "restore": "restore, way back to the step",
    "train": "training",
    "save": "training stands still for a save",
    "lost": "training that was lost",
    "handoff": "last act: witness, handing over",
}
"""The phases of a segment in their order; the first two come before its job has its nodes."""
WAITS = ("hold", "queue")


@dataclass
class Checkpoint:
    """One committed checkpoint."""

    name: str
    step: int
    time: float
    """When it was committed, in seconds since the epoch."""
    bytes: float | None
    seconds: float
    """That it took to write."""
    stall: float
    """Seconds for which the training stood still."""
    reason: str
    beside: bool
    """Whether the training went on meanwhile."""
    exists: bool = False

    @property
    def captured(self) -> float:
        """When the state that it holds was that of the training."""
        return self.time - self.seconds - (self.stall if self.beside else 0.0)


@dataclass
class Segment:
    """What one start of one job did for the run; times are in seconds since the epoch."""

    job: str
    restart: int
    began: float
    """When the job had its nodes, as far as that is known; else when its first process started."""
    number: int | None = None
    """None where the job was killed, or left, before its segment began."""
    nodes: tuple[str, ...] = ()
    gpus: int = 0
    host: str = ""
    asked: float | None = None
    """Since when it had waited for its nodes: its submission, or the end of the segment before."""
    eligible: float | None = None
    entered: float | None = None
    """When the function was about to be called."""
    reading: float = 0.0
    """Seconds that the checkpoint took to be read and verified."""
    trains: float | None = None
    """When the training went on, or began."""
    first_step: float | None = None
    """When the first step was done."""
    resumed: str | None = None
    """The checkpoint that it went on from."""
    from_step: int = 0
    to_step: int = 0
    ended: float = 0.0
    over: bool = False
    ending: Ending = endings.UNKNOWN
    unused: float | None = None
    """Seconds of its walltime that it has left."""
    lost_steps: int = 0
    kept_until: float | None = None
    """Until when its training counts: what came later was lost; None where nothing was."""
    how: str | None = None
    """How it handed over."""
    checkpoints: list[Checkpoint] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    @property
    def name(self) -> str:
        return NOTHING if self.number is None else str(self.number)

    @property
    def final(self) -> Checkpoint | None:
        """The checkpoint with which it ended, the training at an end too."""
        last = self.checkpoints[-1] if self.checkpoints else None
        stopped = any(event["event"] in ("stop", "done") for event in self.events)
        return last if last is not None and not last.beside and stopped else None

    @property
    def last_boundary(self) -> float:
        """When its last step was done, as far as that is known."""
        return min(self.ended, self.final.captured) if self.final else self.ended

    def phases(self) -> list[tuple[str, float, float]]:
        """Return (phase, from, to), in order and without gaps between the first and the last."""
        marks: list[tuple[str, float]] = []
        if self.asked is not None:
            held = min(max(self.asked, self.eligible or self.asked), self.began)
            marks += [("hold", self.asked), ("queue", held)]
        marks.append(("start", self.began))
        if self.entered is not None:
            restores = self.resumed is not None
            marks.append(("restore" if restores else "start", self.entered - self.reading))
            if self.trains is not None:
                marks.append(("train", self.trains))
                for one in self.checkpoints:
                    if one.beside:
                        marks += [("save", one.captured), ("train", one.captured + one.stall)]
                    else:
                        marks += [("save", one.captured), ("train", one.time)]
                marks.sort(key=lambda mark: mark[1])
                if self.kept_until is not None:
                    kept = max(self.trains, self.kept_until)
                    marks = [mark for mark in marks if mark[1] < kept or mark[0] == "save"]
                    marks = [*(m for m in marks if m[1] <= kept), ("lost", kept)]
            if self.final is not None:
                marks = [*(m for m in marks if m[1] < self.final.time), ("handoff", self.final.time)]
        found: list[tuple[str, float, float]] = []
        first, last = marks[0][1], max(self.ended, marks[0][1])
        times = [min(at, last) for at in itertools.accumulate((max(first, at) for _, at in marks), max)]
        for (phase, _), at, until in zip(marks, times, [*times[1:], last], strict=True):
            if until > at and found and found[-1][0] == phase and found[-1][2] == at:
                found[-1] = (phase, found[-1][1], until)
            elif until > at:
                found.append((phase, at, until))
        return found

    def seconds(self, phase: str) -> float:
        return sum(until - at for which, at, until in self.phases() if which == phase)

    @property
    def allocated(self) -> float:
        """Seconds for which it had its nodes."""
        return max(0.0, self.ended - self.began)

    @property
    def node_hours(self) -> float:
        return self.allocated * len(self.nodes) / 3600

    @property
    def gpu_hours(self) -> float:
        return self.allocated * self.gpus / 3600


@dataclass
class Handoff:
    """From the last boundary of one segment to the first step of the next."""

    before: Segment
    after: Segment
    seconds: float
    parts: dict[str, float]
    """Seconds by phase."""


@dataclass
class Story:
    """All that the report of one run tells."""

    run: RunDir
    name: str
    id: str
    state: str
    remark: str
    segments: list[Segment]
    events: list[Event]
    checkpoints: list[Checkpoint]
    steps: int
    fraction: float | None
    """How much of the training is done, where the loop says how long it is."""
    now: float

    @property
    def began(self) -> float:
        first = [at for s in self.segments[:1] for at in (s.asked, s.began) if at is not None]
        return min([*first, *(e["time"] for e in self.events[:1])], default=self.now)

    @property
    def ended(self) -> float:
        if self.state in ("running", "queued"):
            return self.now
        times = [s.ended for s in self.segments] + [e["time"] for e in self.events[-1:]]
        return max(times, default=self.now)

    def total(self, *phases: str) -> float:
        return sum(segment.seconds(phase) for segment in self.segments for phase in phases)

    @property
    def allocated(self) -> float:
        return sum(segment.allocated for segment in self.segments)

    @property
    def goodput(self) -> float | None:
        """The part of the time with nodes in which steps were trained that count; None before there was any."""
        return self.total("train") / self.allocated if self.allocated > 0 else None

    @property
    def node_hours(self) -> float:
        return sum(segment.node_hours for segment in self.segments)

    @property
    def gpu_hours(self) -> float:
        return sum(segment.gpu_hours for segment in self.segments)

    @property
    def cuts(self) -> list[tuple[int, Segment]]:
        """The steps from which a later segment went on, with the segment before."""
        trained = [s for s in self.segments if s.number is not None]
        return [(after.from_step, before) for before, after in itertools.pairwise(trained)]

    def handoffs(self) -> list[Handoff]:
        """Return what it took to go on, for each segment that trained after another one."""
        found = []
        trained = [s for s in self.segments if s.first_step is not None]
        for before, after in itertools.pairwise(trained):
            assert after.first_step is not None
            since = before.last_boundary
            parts: dict[str, float] = {}
            for segment in self.segments[self.segments.index(before) : self.segments.index(after) + 1]:
                for phase, at, until in segment.phases():
                    inside = min(until, after.first_step) - max(at, since)
                    if inside > 0:
                        parts[phase] = parts.get(phase, 0.0) + inside
            found.append(Handoff(before, after, max(0.0, after.first_step - since), parts))
        return found
