"""`chainrun status DIR` of one run: everything a person asks about it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

from chainrun import journal, pace
from chainrun.checkpoint.store import Store
from chainrun.durations import rough_duration
from chainrun.inspect_runs import size
from chainrun.launch import slurm
from chainrun.launch.slurm import Queued
from chainrun.launch.standing import Segment, Standing
from chainrun.lock import STALE
from chainrun.status import age, plain, stamp, steps

SHOWN = 5  # newest segments, and warnings
_WARNINGS = ("fallback", "drift", "space", "unsaved", "deferred", "exclude", "warning")


def detail(one: Standing, queue: dict[str, Queued], problem: str) -> list[str]:
    """Return the lines that say where one run stands."""
    about = plain("", one, queue, problem)
    rows = [row for row in _rows(one, about) if row[1]]
    first = f"{about['name']}  {about['state']}" + (f"  {about['remark']}" if about["remark"] else "")
    return [first, *(f"  {name:<12}{text}" for name, text in rows)]


def _rows(one: Standing, about: dict[str, Any]) -> Iterator[tuple[str, str]]:
    held: dict[str, Any] = one.held if one.alive and one.held else {}
    epoch = "" if about["epoch"] is None else f", epoch {about['epoch']}"
    metrics = "".join(f", {name} {value:.4g}" for name, value in about["metrics"].items())
    yield "step", steps(about) + epoch + metrics
    yield "pace", _pace(about)
    if held:
        heard = age(one.now - held["time"])
        restarted = f", restart {held['restart']}" if held.get("restart") and journal.jobs(one.events) else ""
        ranks = f", {about['ranks']} rank{'s' * (about['ranks'] != 1)}" if about["ranks"] else ""
        number = f"segment {held['segment']}" if "segment" in held else "starting"
        yield "now", f"{number}: job {held['job']}{restarted} on {held['host']}{ranks}, heard of {heard}"
        left = about["left"]
        yield "walltime", "" if left is None else f"in {rough_duration(left)}, at {stamp(one.now + left)}"
        if one.now - held["time"] > STALE:
            yield "warning", f"last heard of {heard}, though its process is there: it may hang"
    if (
        about["state"] == "stopped"
        and one.segments
        and one.segments[-1].end is None
        and journal.jobs(one.events)
    ):
        yield "SLURM says", slurm.last_state(one.segments[-1].start["job"])
    for queued in about["queue"]:
        if not (queued["state"] == "RUNNING" and held):
            start = f", starts about {stamp(queued['start'])}" if queued["start"] else ""
            reason = f" ({queued['reason']})" if queued["reason"] else ""
            yield "queue", f"job {queued['job']} {queued['state']}{reason}{start}"
    saved = about["checkpoint"]
    if saved:
        kept = len(Store(one.run).committed())
        told = f"{size(saved['size'])}, {age(one.now - saved['time'])}; {kept} kept"
        yield "checkpoint", f"step {saved['step']}, {told}: {saved['path']}"
    else:
        yield "checkpoint", "none yet"
    yield from _history(one)
    yield "witness", about["witness"] or ""
    failed = one.last("failed")
    if failed:
        where = f"segment {failed['segment']}, rank {failed['rank']}, step {failed['step']}, {age(one.now - failed['time'])}"
        yield "last error", f"{failed['error'].partition(chr(10))[0]} ({where})"
    warnings = [
        e for e in one.recent if e["event"] in _WARNINGS or (e["event"] == "notified" and e["problem"])
    ]
    for event in warnings[-SHOWN:]:
        yield "warning", f"{stamp(event['time'])}  {_warning(event)}"
    yield (
        "to go on" if about["state"] in ("stopped", "cancelled", "held") else "next",
        about["next"] or "",
    )
    yield "directory", str(one.run.path)


def _warning(event: dict[str, Any]) -> str:
    if event["event"] == "exclude":
        return f"{event['failures']} segments failed on node {event['node']}: the next jobs keep away from it"
    if event["event"] == "notified":
        return f"notify, told that the chain has {event['of']}, {event['problem']}"
    return (journal.tell(event) or "").removeprefix("warning: ")


def _pace(about: dict[str, Any]) -> str:
    if not about["rate"]:
        return ""
    parts = [pace.speed(about["rate"])]
    if about["total"] and about["total"] > about["step"]:
        parts.append(f"{rough_duration((about['total'] - about['step']) / about['rate'])} of training left")
    if about["end"]:
        parts.append(f"ends about {stamp(about['end'])} at the pace of the chain so far")
    return ", ".join(parts)


def _history(one: Standing) -> Iterator[tuple[str, str]]:
    """Yield how many segments there were and how they ended, then the newest of them."""
    ends = Counter(_kind(each) for each in one.segments if each.ending())
    how = ", ".join(f"{count} {kind}" for kind, count in ends.most_common())
    yield "segments", f"{len(one.segments)}" + (f": {how}" if how else "")
    for each in one.segments[-SHOWN:]:
        began = time.strftime("%b %d %H:%M:%S", time.localtime(each.start["time"]))
        resumed = f"from step {each.start['step']}" if each.start["resumed"] else "fresh"
        ending = each.ending() or ("running" if one.alive else "killed without a word")
        yield (
            f"  {each.number}",
            f"{began}  job {each.start['job']} on {each.start['host']}, {resumed}: {ending}",
        )


def _kind(segment: Segment) -> str:
    if segment.end is None or segment.end["event"] == "lost":
        return "killed"
    return str(segment.end.get("reason") or segment.end["event"])
