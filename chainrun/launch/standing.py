"""Where a run stands: one look at its directory, and one answer to what it does now, for everybody who asks."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from chainrun import journal
from chainrun.breakers import ENDS
from chainrun.checkpoint.store import Committed, Store
from chainrun.launch import slurm
from chainrun.launch.slurm import Queued
from chainrun.lock import holder
from chainrun.rundir import RunDir, other_format, read_json

BETWEEN = 60.0  # seconds that a local chain may take from one segment to the next
RECENT = 10  # newest segments, over which the chain's pace is taken


@dataclass
class Segment:
    """A segment, as the journal tells of it."""

    start: dict[str, Any]
    """Its ``segment`` event."""
    end: dict[str, Any] | None = None
    """A ``stop``, ``failed``, ``done`` or ``lost`` event; None where it said nothing (yet)."""
    handoff: dict[str, Any] | None = None
    """The last ``handoff`` after it."""
    last: bool = True
    """Whether no other one has followed."""

    @property
    def number(self) -> int:
        return int(self.start["segment"])

    @property
    def step(self) -> int | None:
        """The step at which it ended, None where nobody knows."""
        return self.end.get("step") if self.end else None

    def ending(self) -> str:
        """Return how it ended, in words; empty where it may still be alive."""
        end = self.end
        if end is None:
            return "" if self.last else "killed without a word"
        at = f" at step {end['step']}" if end.get("step") is not None else ""
        if end["event"] == "done":
            return f"done{at}"
        if end["event"] == "lost":
            state = f", SLURM says {end['state']}" if end.get("state") else ""
            return f"killed without a word{at}{state}"
        if end["event"] == "failed":
            how = f"failed{at}: " + str(end["error"]).partition("\n")[0]
        else:
            how = f"{end['reason']}{at}"
        return how + self._handed_over()

    def _handed_over(self) -> str:
        handoff = self.handoff or {"how": None}
        job = handoff.get("job")
        if handoff.get("refused"):
            return f"; the chain stopped: {handoff['refused']}" if handoff["how"] is None else ""
        words = {
            "requeue": ", requeued",
            "resubmit": f", job {job} submitted",
            "ahead": f", job {job} was waiting",
        }
        return words.get(handoff["how"], f", {handoff['how']}" if job else "")


def segments(events: Iterable[dict[str, Any]]) -> list[Segment]:
    """Return the segments that events tell of, oldest first."""
    found: list[Segment] = []
    for event in events:
        kind = event["event"]
        if kind == "segment":
            if found:
                found[-1].last = False
            found.append(Segment(event))
        elif found and kind == "handoff":
            found[-1].handoff = event
        elif found and kind in ENDS and event.get("segment") == found[-1].number:
            found[-1].end = found[-1].end or event
    return found


@dataclass(frozen=True)
class State:
    """What a run does now."""

    word: str
    """``done``, ``failed``, ``running``, ``cancelled``, ``stopped``, ``queued``, ``held`` (a job that waits for a
    person), or ``unknown`` where SLURM does not say whether a job waits, or where another version made the run."""
    remark: str = ""
    """Why, or by whom."""
    command: str = ""
    """What a person may do about it."""


class Standing:
    """One look at a run's directory; asks nobody, and reads the journal once.

    Args:
        run: which run.
    """

    def __init__(self, run: RunDir) -> None:
        self.run, self.now = run, time.time()
        # first: what is written after it is looked for after it, so a run that ends just now is not taken for stopped
        self.held = holder(run)
        self.alive = bool(self.held and self.held["alive"])
        self.done, self.failed = run.done.exists(), run.failed.exists()
        self.stop, self.halted = run.stop.exists(), run.halted.exists()

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """All events but of the checkpoints only the newest."""
        return journal.brief(self.run)

    @cached_property
    def recent(self) -> list[dict[str, Any]]:
        """Those since a person last let the chain go on."""
        events = self.events
        marks = [number for number, event in enumerate(events) if event["event"] == "continue"]
        return events[marks[-1] + 1 :] if marks else events

    @cached_property
    def segments(self) -> list[Segment]:
        return segments(self.events)

    @cached_property
    def newest(self) -> Committed | None:
        """The newest committed checkpoint."""
        return Store(self.run).latest()

    def last(self, *kinds: str) -> dict[str, Any] | None:
        """Return the newest event of the given kinds."""
        return next((event for event in reversed(self.events) if event["event"] in kinds), None)

    @property
    def witness(self) -> dict[str, Any] | None:
        """What the newest segment that compared found: what differed on any rank, if something did."""
        newest = self.last("witness")
        if newest is None:
            return None
        mine = [e for e in self.events if e["event"] == "witness" and e["segment"] == newest["segment"]]
        return next((event for event in mine if not event["identical"]), newest)

    @property
    def open_jobs(self) -> list[str]:
        """The jobs that may be in the queue: the one that started last, and those submitted after it."""
        if self.done or self.failed:
            return []
        jobs = journal.jobs(self.recent)
        begun = [event["job"] for event in self.recent if event["event"] in ("start", "segment")]
        at = next((jobs.index(job) for job in reversed(begun) if job in jobs), 0)
        return jobs[at:]

    def state(self, queue: dict[str, Queued] | None = None, problem: str = "") -> State:
        """Return what the run does now.

        Args:
            queue: what SLURM says of `open_jobs`; it is asked where that makes a difference if None.
            problem: why it did not say.
        """
        run = self.run
        problem_of_format = other_format(run)
        if problem_of_format is not None:
            return State("unknown", problem_of_format)
        if self.done:
            return State("done", command=f"its result is in {run.result}")
        if self.failed:
            error = (self.last("failed") or {}).get("error", "").partition("\n")[0]
            why = f"chainrun logs {run.path} shows all; once it is mended: {self.again}"
            return State("failed", error, why)
        if self.alive:
            assert self.held is not None
            follow = f"chainrun logs {run.path} -f follows it; chainrun cancel {run.path} saves and ends it"
            return State("running", f"job {self.held['job']} on {self.held['host']}", follow)
        if self.stop:
            return State("cancelled", command=self.again)
        if self.halted:
            halted = read_json(run.halted) or {}
            return State("stopped", str(halted.get("why", "")), str(halted.get("command", self.again)))
        if queue is None:
            queue, problem = slurm.listing(self.open_jobs)
        for job in self.open_jobs:
            if job in queue:
                return self._queued(job, queue[job])
        if problem and self.open_jobs:
            return State(
                "unknown", f"job {self.open_jobs[-1]}: {problem}", f"squeue --jobs={self.open_jobs[-1]}"
            )
        return self._stopped()

    def _queued(self, job: str, queued: Queued) -> State:
        wait = slurm.held(job, queued.state, queued.reason)
        if wait is not None:
            remark, _, command = wait.partition("; to let it go on: ")
            return State("held", remark, command)
        if queued.state in ("RUNNING", "CONFIGURING"):
            return State("running", f"job {job} is starting")
        reason = f" ({queued.reason})" if queued.reason else ""
        state = "" if queued.state == "PENDING" else f" {queued.state}"
        return State("queued", f"job {job}{state}{reason}", "nothing: it starts by itself")

    def _stopped(self) -> State:
        last = self.last("segment", "stop", "handoff", "continue", "lost") or {}
        kind = last.get("event")
        if kind == "handoff" and last.get("how") == "local" and self.now - last["time"] < BETWEEN:
            return State("running", "the next segment is starting")
        if kind is None or kind == "continue":
            return State("stopped", "not started", self.again)
        if kind == "handoff":
            return State("stopped", last.get("refused") or "", self.again)
        if kind == "stop":
            return State("stopped", f"{last['reason']} at step {last['step']}", self.again)
        return State(
            "stopped", "killed without a word: a crash, no memory left, or its node failed", self.again
        )

    @cached_property
    def again(self) -> str:
        """The command with which a person lets the run go on, or starts it."""
        submitted = self.last("submitted")
        if submitted and submitted.get("command"):  # a person's own script
            return str(submitted["command"])
        return f"chainrun {'submit' if journal.jobs(self.events) else 'run'} {self.run.experiment}"

    # ---- progress

    @property
    def step(self) -> int:
        """Steps done, of which those after the newest checkpoint would be done again after a crash."""
        if self.done:
            return int((self.last("done") or {}).get("step", self.newest.step if self.newest else 0))
        if self.alive and self.held and "step" in self.held:
            return int(self.held["step"])
        return self.newest.step if self.newest else 0

    @property
    def fraction(self) -> float | None:
        """Of the training, from 0 to 1; None where its loops do not say."""
        found = 1.0 if self.done else self._extent.get("fraction")
        return None if found is None else float(found)

    @property
    def total(self) -> int | None:
        """Steps of the whole training; None where its loops do not say."""
        found = self.step if self.done else self._extent.get("total")
        return None if found is None else int(found)

    @property
    def _extent(self) -> dict[str, Any]:
        if self.alive and self.held and "step" in self.held:
            return self.held
        return self.newest.manifest if self.newest else {}

    @property
    def rate(self) -> float | None:
        """Steps a second of the newest segment that has done some, without waiting; None where there is none yet."""
        for one in reversed(self.segments):
            if one.last and self.alive and self.held and "step" in self.held:
                step, at = self.held["step"], self.held["time"]
            elif one.step is not None and one.end is not None:
                step, at = one.step, one.end["time"]
            else:
                continue
            if step > one.start["step"] and at > one.start["time"]:
                return float((step - one.start["step"]) / (at - one.start["time"]))
        return None

    @property
    def end(self) -> float | None:
        """Return when the training would end at the pace of the chain so far, its waiting between segments included.

        Returns:
            Seconds since the epoch; None where nobody carries the run, or nobody knows.
        """
        begun, total = segments(self.recent)[-RECENT:], self.total
        if not begun or total is None or self.step <= begun[0].start["step"]:
            return None
        first = begun[0].start
        at = self.held["time"] if self.alive and self.held else self.now
        rate = (self.step - first["step"]) / max(1e-3, at - first["time"])
        return float(at + (total - self.step) / rate)
