"""What happened to a run, put together from its journal: segments, their phases and how each ended."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from chainrun import journal
from chainrun.checkpoint.store import Store
from chainrun.lock import holder
from chainrun.report import endings
from chainrun.report.endings import Ending
from chainrun.report.look import NOTHING
from chainrun.rundir import RunDir, read_json

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
        for (phase, at), (_, until) in zip(marks, [*marks[1:], ("", self.ended)], strict=True):
            if until > at:
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


def number(event: Event, key: str) -> float | None:
    """Return a finite number of an event, None where it has none."""
    value = event.get(key)
    usable = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if usable else None  # type: ignore[arg-type]


def _whole(event: Event, key: str, default: int = 0) -> int:
    value = number(event, key)
    return default if value is None else int(value)


def tell(run: RunDir, queue: dict[str, tuple[str, str]], now: float | None = None) -> Story:
    """Put the story of a run together.

    Args:
        queue: what SLURM says of the jobs in its queue: {job: (state, reason)}.
        now: the present time, by default the clock's.
    """
    now = time.time() if now is None else now
    events = [e for e in journal.events(run) if isinstance(e.get("event"), str) and number(e, "time")]
    held = holder(run) or {}
    alive = bool(held.get("alive"))
    segments = _segments(events)
    for index, segment in enumerate(segments):
        before = segments[index - 1] if index else None
        after = segments[index + 1] if index + 1 < len(segments) else None
        _settle(segment, before, after, now, held if alive and after is None else {})
    kept = {checkpoint.path.name: checkpoint.step for checkpoint in Store(run).committed()}
    checkpoints = [one for segment in segments for one in segment.checkpoints]
    for index, segment in enumerate(segments):
        resumes = [s.from_step for s in segments[index + 1 :] if s.number is not None]
        _count_lost(segment, resumes, max(kept.values(), default=0))
    last = {one.name: one for one in checkpoints}  # of a name, the one that was committed last
    for name, one in last.items():
        one.exists = name in kept
    created = next((event for event in events if event["event"] == "created"), {})
    state, remark = _state(run, events, alive, held, queue)
    return Story(
        run=run,
        name=run.path.name,
        id=str(created.get("id", run.path.name)),
        state=state,
        remark=remark,
        segments=segments,
        events=events,
        checkpoints=checkpoints,
        steps=max(
            [*(s.to_step - s.lost_steps for s in segments), *kept.values(), _whole(held, "step") * alive],
            default=0,
        ),
        fraction=1.0 if state == "done" else number(held, "fraction") if alive else None,
        now=now,
    )


def _state(
    run: RunDir, events: list[Event], alive: bool, held: Event, queue: dict[str, tuple[str, str]]
) -> tuple[str, str]:
    """Return where a run stands, and a remark."""
    if run.done.exists():
        return "done", ""
    if run.failed.exists():
        failed = [str(e.get("error", "")) for e in events if e["event"] == "failed"]
        return "failed", (failed or [""])[-1].partition("\n")[0]
    if alive:
        return "running", f"job {held.get('job')} on {held.get('host')}"
    if run.stop.exists():
        return "cancelled", ""
    if run.halted.exists():
        halted = read_json(run.halted)
        return "stopped", str(halted.get("why", "")) if isinstance(halted, dict) else ""
    for event in reversed(events):
        job = str(event.get("job", ""))
        if event["event"] in ("submitted", "handoff") and job in queue:
            state, reason = queue[job]
            return "queued", f"job {job} is {state.lower()}" + f" ({reason})" * (reason not in ("None", ""))
    refused = [e for e in events if e["event"] == "handoff" and e.get("how") is None and e.get("refused")]
    if refused and events[-1] is refused[-1]:
        return "stopped", str(refused[-1]["refused"])
    began = any(e["event"] in ("start", "segment") for e in events)
    return "stopped", "nobody carries it on" if began else "it has not started"


def jobs(events: Iterable[Event]) -> list[str]:
    """Return the jobs that may still be in SLURM's queue."""
    found = [str(e["job"]) for e in events if e.get("event") in ("submitted", "handoff") and e.get("job")]
    return list(dict.fromkeys(found))[-20:]


def _segments(events: list[Event]) -> list[Segment]:
    """Return what each start of a job, or of a local segment, wrote."""
    found: list[Segment] = []
    asked: dict[str, float] = {}
    handed: float | None = None  # when a local chain began its next segment
    for event in events:
        kind, at = event["event"], event["time"]
        if kind == "submitted":
            asked[str(event.get("job"))] = at
        elif kind in ("created", "continue"):
            handed = at
        if kind == "start":
            nodes = event.get("nodes")
            segment = Segment(str(event.get("job", "?")), _whole(event, "restart"), at)
            segment.nodes = tuple(map(str, nodes)) if isinstance(nodes, list) else ()
            segment.gpus = _whole(event, "gpus")
            segment.asked = asked.pop(segment.job, None)
            found.append(segment)
        elif kind == "segment":
            if not found or found[-1].number is not None or found[-1].job != str(event.get("job", "?")):
                began = at - (number(event, "seconds") or 0.0)
                began = handed if handed is not None and began - 300 < handed < began else began
                found.append(Segment(str(event.get("job", "?")), _whole(event, "restart"), began))
            segment = found[-1]
            segment.number, segment.host = _whole(event, "segment"), str(event.get("host", ""))
            segment.entered, segment.reading = at, number(event, "seconds") or 0.0
            segment.from_step = segment.to_step = _whole(event, "step")
            segment.resumed = event.get("checkpoint") if isinstance(event.get("checkpoint"), str) else None
        elif found:  # `lost` is written by the next job, about the one before
            of = event.get("segment")
            mine = [s for s in found[-3:] if s.number == of] if isinstance(of, int) else []
            (mine or found[-1:])[-1].events.append(event)
        if kind == "handoff":
            handed = at
    return found


def _settle(segment: Segment, before: Segment | None, after: Segment | None, now: float, held: Event) -> None:
    """Work out the times of a segment, and how it ended.

    Args:
        held: what the lock says, if the segment is alive.
    """
    times = [segment.began, segment.entered or segment.began]
    for event in segment.events:
        kind, at = event["event"], event["time"]
        if kind == "trains":
            segment.first_step = at
            segment.trains = at - min(number(event, "seconds") or 0.0, at - (segment.entered or at))
            granted = number(event, "granted")
            if granted is not None and granted <= segment.began + 1:
                segment.began = granted
            segment.eligible = number(event, "eligible")
            if segment.asked is None:
                segment.asked = number(event, "submitted")
        elif kind == "checkpoint":
            _add_checkpoint(segment, event)
        elif kind == "stop":
            segment.unused = number(event, "unused_seconds")
        elif kind == "handoff" and event.get("how") and "refused" not in event:
            segment.how = str(event["how"])
        elif kind == "lost":
            times = [t for t in times if t <= (number(event, "last_seen") or t)]
            times.append(number(event, "last_seen") or times[-1])
        if kind not in ("lost", "cancel", "continue", "submitted", "exclude"):
            times.append(at)
        if kind in ("trains", "stop", "failed", "done", "lost", "checkpoint"):
            segment.to_step = max(segment.to_step, _whole(event, "step"))
    segment.ended = max(times)
    if before is not None and before.ended > segment.began:
        before.ended = max(before.began, segment.began)
    if held:
        segment.ended = max(segment.ended, now)
        segment.to_step = max(segment.to_step, _whole(held, "step"))
    if segment.entered is not None and segment.trains is None:
        known = [*(c.captured for c in segment.checkpoints), segment.ended]
        trained = segment.to_step > segment.from_step
        segment.trains = min(known) if not trained else segment.entered
        segment.first_step = segment.trains if trained else None
    if segment.nodes and before is not None:  # it waited from the end of the one before on, at the earliest
        segment.asked = max(segment.asked or before.ended, before.ended)
    if segment.asked is not None:
        segment.asked = min(segment.asked, segment.began)
    segment.ending = endings.of(
        segment.events, alive=bool(held), began=segment.number is not None, local=not segment.nodes
    )
    segment.over = not held


def _add_checkpoint(segment: Segment, event: Event) -> None:
    seconds, stall = number(event, "seconds") or 0.0, number(event, "stall")
    segment.checkpoints.append(
        Checkpoint(
            name=str(event.get("path", "")),
            step=_whole(event, "step"),
            time=event["time"],
            bytes=number(event, "bytes"),
            seconds=seconds,
            stall=seconds if stall is None else stall,
            reason=str(event.get("reason", "")),
            beside=stall is not None,
        )
    )


def _count_lost(segment: Segment, resumes: list[int], newest: int) -> None:
    """Work out what of a segment's training was lost.

    Args:
        resumes: the steps from which the later segments went on.
        newest: the step of the newest checkpoint, from which the next one would.
    """
    if segment.number is None or not segment.over:
        return
    finished = segment.ending.kind == "done"
    back_to = min(resumes) if resumes else (segment.to_step if finished else newest)
    known = [one for one in segment.checkpoints if one.step <= back_to]
    at_its_end = segment.final is not None and segment.final.step <= back_to
    if finished or at_its_end:
        return
    segment.lost_steps = max(0, segment.to_step - max(back_to, segment.from_step))
    segment.kept_until = known[-1].captured if known else segment.trains
