"""`chainrun logs`: one rank's output over all segments, as one log in which each start is marked. Never imports torch.

Every job has one log for each rank; a job that is requeued appends to its own, and one that is submitted begins another.
What the rank prints and its errors are in one file, in their order; what SLURM itself says stands in a second one, and
comes where it is found: after the job's start that was under way.
"""

from __future__ import annotations

import re
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainrun import journal
from chainrun.errors import EXIT_DONE, UsageError
from chainrun.launch import standing
from chainrun.launch.standing import Segment, Standing
from chainrun.lock import holder
from chainrun.rundir import RunDir, open_run, read_json

POLL = 0.3  # seconds between two looks of --follow
PATIENCE = 60.0  # seconds that it waits for the journal to say which segment a start is
CHUNK = 1 << 24  # bytes of a log that are held at once
GRACE = 10.0  # seconds that a chain on this machine may stand still between two segments
# how submitit begins, and how chainrun does: one or the other is the first of a start
_BEGINS = re.compile(
    rb"submitit INFO \(.*\) - Starting with |chainrun: segment (\d+): (?:fresh start|resuming at )"
)


def logs(
    path: Path, *, rank: int = 0, follow: bool = False, segment: int | None = None, lines: int | None = None
) -> int:
    """Print one rank's output over all segments.

    Args:
        path: the run directory.
        rank: whose output.
        follow: go on as it grows, also over handoffs, until the chain ends.
        segment: of this one alone.
        lines: only so many of the last ones, and what follows.

    Raises:
        UsageError: there is no such run, rank or segment, or no log yet.
    """
    run = open_run(path)
    out, reader, ended = _Out(segment, lines), _Reader(run, rank), _End(run)
    while True:
        over = ended.over()  # before reading: what is written until then is read
        grown = False
        for part in reader.new(patient=follow and not over):
            out.take(part)
            grown = True
        out.flush()
        if not follow or (over and not grown):  # the last lines come after the marker of the end
            break
        time.sleep(POLL)
    for part in reader.rest():
        out.take(part)
    out.flush()
    if not reader.found:
        raise UsageError(
            f"{path} has no log of rank {rank} yet; its first job has not started, or has fewer ranks"
        )
    if segment is not None and not out.taken:
        numbers = [each.number for each in standing.segments(journal.events(run))]
        known = f"it has had {numbers[-1]}" if numbers else "it has had none"
        raise UsageError(f"{path} has no log of segment {segment}: {known}")
    if follow:
        sys.stderr.write(f"chainrun: {over}\n")
    return EXIT_DONE


class _End:
    """Sees when nobody carries the chain on any more."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._still: float | None = None  # since when a chain on this machine stands still

    def over(self) -> str:
        """Return how the chain has ended, empty as long as it goes on."""
        run = self._run
        held = holder(run)
        if held and held["alive"]:  # it has more to say, and a run that is cancelled saves first
            self._still = None
            return ""
        if run.done.exists():
            return "the run is done"
        if run.failed.exists():
            return "the run has failed"
        if run.stop.exists():
            return "the run was cancelled"
        if run.halted.exists():
            halted: dict[str, Any] = read_json(run.halted) or {}
            return f"the chain has stopped: {halted.get('why')}; to go on: {halted.get('command')}"
        self._still = self._still or time.monotonic()
        if time.monotonic() - self._still < GRACE:
            return ""
        self._still = None
        now = Standing(run)
        if now.open_jobs or now.state({}).word != "stopped" or not now.segments:
            return ""  # SLURM's jobs leave a marker where the chain ends
        return f"the chain has stopped: {now.state({}).remark}; to go on: {now.again}"


@dataclass(frozen=True)
class _Part:
    """A piece of the log, whole lines."""

    text: bytes
    segment: int | None
    """The segment that it is of, None for a start that has not come to one (yet)."""


@dataclass
class _File:
    """One log file, read as it grows."""

    path: Path
    job: str
    at: int = 0
    rest: bytes = b""
    """A line that has not ended yet."""
    lines: deque[bytes] = field(default_factory=deque)
    """Whole lines that are still to be shown."""
    starts: int = 0
    """How many starts of the job were seen in it."""
    announced: bool = False
    """submitit has begun and chainrun has not yet."""
    waits: float | None = None
    """Since when the first line waits for the journal to say which segment it begins."""
    segment: int | None = None

    def read(self) -> bool:
        """Read what was added, or a part of it; return whether there is more."""
        try:
            with open(self.path, "rb") as file:
                file.seek(self.at)
                data = file.read(CHUNK)
        except FileNotFoundError:  # removed while it was followed
            return False
        self.at += len(data)
        *whole, self.rest = (self.rest + data).split(b"\n")
        self.lines.extend(line + b"\n" for line in whole)
        return len(data) == CHUNK


class _Reader:
    """Reads the files of one rank in the order of their jobs, and marks where segments begin."""

    def __init__(self, run: RunDir, rank: int) -> None:
        self._run, self._rank = run, rank
        self._journal = journal.Follower(run)
        self._events: list[dict[str, Any]] = []
        self._files: dict[Path, _File] = {}

    @property
    def found(self) -> bool:
        return bool(self._files)

    def new(self, *, patient: bool) -> Iterator[_Part]:
        """Yield what was added since the last call.

        Args:
            patient: give the journal time to say what a start is.
        """
        for path in self._run.logs(self._rank):
            self._files.setdefault(path, _File(path, path.name.split("_")[0]))
        self._events += self._journal.new()
        order: dict[str, int] = {}
        for event in self._events:
            if event["event"] in ("submitted", "start", "segment"):
                order.setdefault(event["job"], len(order))
        for file in sorted(self._files.values(), key=lambda each: order.get(each.job, len(order))):
            yield from self._shown(file, patient=patient)  # what has waited
            more = True
            while more and not file.waits:
                more = file.read()
                yield from self._shown(file, patient=patient)

    def rest(self) -> Iterator[_Part]:
        """Yield lines that have not ended."""
        for file in self._files.values():
            if file.rest:
                yield _Part(file.rest + b"\n", file.segment)

    def _shown(self, file: _File, *, patient: bool) -> Iterator[_Part]:
        while file.lines:
            line = file.lines[0]
            begins = _BEGINS.match(line)
            if not begins:
                pass
            elif file.announced and begins[1]:
                file.announced = False
                yield from self._corrected(file, int(begins[1]))
            else:
                every = standing.segments(self._events)
                segment = self._which(every, file.job, file.starts)
                if segment is None and patient:
                    file.waits = file.waits or time.monotonic()
                    if time.monotonic() - file.waits < PATIENCE:
                        return
                file.starts, file.waits = file.starts + 1, None
                file.announced = not begins[1]
                file.segment = segment.number if segment else None
                yield _Part(f"{_mark(every, segment, file.job)}\n".encode(), file.segment)
            yield _Part(file.lines.popleft(), file.segment)

    def _corrected(self, file: _File, number: int) -> Iterator[_Part]:
        """Yield another mark where a start was not what the journal made it seem: one before it had left no event."""
        every = standing.segments(self._events)
        segment = next((each for each in every if each.number == number), None)
        if segment is not None and number != file.segment:
            file.segment = number
            yield _Part(f"{_mark(every, segment, file.job)}\n".encode(), number)

    def _which(self, every: list[Segment], job: str, start: int) -> Segment | None:
        """Return the segment of a job's start, the first being 0; None where it did not come to one."""
        mine = [each for each in every if each.start["job"] == job]
        begun = [event for event in self._events if event["event"] == "start" and event["job"] == job]
        if not begun:  # a local one
            return mine[start] if start < len(mine) else None
        restart = begun[start]["restart"] if start < len(begun) else None
        return next((each for each in mine if each.start["restart"] == restart), None)


def _mark(every: list[Segment], segment: Segment | None, job: str) -> str:
    """Return the line that stands above a start's output."""
    if segment is None:
        return f"──── job {job} starts ────"
    start = segment.start
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(start["time"]))
    how = f"resumed at step {start['step']}" if start["resumed"] else "fresh"
    mark = f"──── segment {segment.number} · job {job} on {start['host']} · {when} · {how}"
    before = next((each for each in every if each.number == segment.number - 1), None)
    if before is not None and before.ending():
        mark += f" · the one before: {before.ending()}"
    return mark + " ────"


class _Out:
    """Prints what is asked for of the parts."""

    def __init__(self, segment: int | None, lines: int | None) -> None:
        self._segment = segment
        self._last: deque[bytes] | None = None if lines is None else deque(maxlen=max(0, lines))
        self.taken = False

    def take(self, part: _Part) -> None:
        if self._segment is not None and part.segment != self._segment:
            return
        self.taken = True
        if self._last is None:
            sys.stdout.buffer.write(part.text)
        else:
            self._last.append(part.text)

    def flush(self) -> None:
        for text in self._last or ():
            sys.stdout.buffer.write(text)
        self._last = None
        sys.stdout.buffer.flush()
