"""Reads the story of a run from its journal, its lock and its checkpoints; damaged lines are passed over."""

from __future__ import annotations

import time
from collections.abc import Iterable

from chainrun import journal
from chainrun.checkpoint.store import Store
from chainrun.lock import holder
from chainrun.report import endings
from chainrun.report.story import Checkpoint, Event, Segment, Story
from chainrun.rundir import RunDir, read_json

MOST = 1e12  # of a step, of seconds, and of bytes in thousands
FIRST, LAST = 1e9, 1e11  # of a time: the years 2001 and 5138


def number(event: Event, key: str, least: float = 0.0, most: float = MOST) -> float | None:
    """Return a number of an event, None where it has none, or one that only a damaged line can hold."""
    value = event.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < most:
        return None
    return float(value)


def _moment(event: Event, key: str) -> float | None:
    return number(event, key, FIRST, LAST)


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
    events = [e for e in journal.events(run) if isinstance(e.get("event"), str) and _moment(e, "time")]
    held = holder(run) or {}
    alive = bool(held.get("alive"))
    segments = _segments(events)
    for index, segment in enumerate(segments):
        before = segments[index - 1] if index else None
        newest = index + 1 == len(segments)
        _settle(segment, before, now, held if alive and newest else {})
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
        said = halted if isinstance(halted, dict) else {}
        return "stopped", f"{said.get('why', '')}; to go on: {said.get('command', '')}"
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


def _settle(segment: Segment, before: Segment | None, now: float, held: Event) -> None:
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
            granted = _moment(event, "granted")
            least = segment.began - 86400 if before is None else before.ended - 2
            if granted is not None and least <= granted <= segment.began + 1:
                segment.began = granted
            segment.eligible = _moment(event, "eligible")
            if segment.asked is None:
                segment.asked = _moment(event, "submitted")
        elif kind == "checkpoint":
            _add_checkpoint(segment, event)
        elif kind == "stop":
            segment.unused = number(event, "unused_seconds", -MOST)
        elif kind == "handoff" and event.get("how") and "refused" not in event:
            segment.how = str(event["how"])
        elif kind == "lost":
            times.append(min(at, _moment(event, "last_seen") or at))
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
