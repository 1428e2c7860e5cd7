"""The events of a chain, one JSON line each in ``journal.jsonl``.

Events and their fields (every line also has ``time`` in seconds since the epoch and ``event``):

=============  =======================================================================================
``start``      a SLURM job starts, before anything else: ``job restart nodes gpus``
``lost``       a job was killed without a word, as the next one sees: ``job restart segment state last_seen
               step``
``segment``    a segment starts: ``segment job restart host world_size resumed step checkpoint seconds``
``trains``     a segment's first step is done: ``segment step seconds``, of this step since the restore, and
               what SLURM says of when the job was ``submitted eligible granted``
``checkpoint`` a checkpoint is committed: ``segment step path bytes seconds waited stall reason``; of the
               training, ``waited`` is what it stood still for the save before and ``stall`` in all; a save
               without ``stall`` was not made beside it
``created``    the run directory is made: ``id format version``
``submitted``  a job is submitted: ``job``, and of a person's own script the ``command``
``space``      there is no room for the next checkpoint: ``reason removed``
``unsaved``    a periodic save failed: ``step reason``
``fallback``   a checkpoint was not trusted: ``path reason``
``drift``      the environment has changed since the checkpoint: ``segment changes``
``witness``    what a segment saw first is what the one before saw next: ``segment rank step identical
               compared differs``
``deferred``   a stop or save waits for a place where it is exact: ``step reason``
``stop``       a segment ends at a boundary: ``segment step reason unused_seconds lead``; of a walltime ``lead`` has
               the ``seconds`` before the job's end at which to stop, and what for: ``gap save margin`` (s)
``taken``      SLURM takes its nodes from a job that saved in time: ``job restart state``, a preemption (PREEMPTED),
               a failed node (NODE_FAIL) or somebody's requeue (REQUEUED)
``warning``    of what the function forgets (to register, to call `step`): ``segment step reason``
``handoff``    what makes the next segment happen: ``segment how`` or ``refused``
``failed``     the user's function or chainrun failed: ``segment rank node step error traceback
               retry``
``exclude``    the next jobs keep away from a node: ``node failures``
``done``       the function returned: ``segment step``
``cancel``     a person ended the chain
``notified``   the experiment's ``notify`` was run: ``of``, what it was told, ``seconds``, and ``problem`` where
               it failed
``continue``   a person let an ended chain go on: ``changes``
``code``       the function's project is frozen, at first or anew: ``files root`` and of git ``git_commit git_changes``
=============  =======================================================================================
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator
from typing import Any

from chainrun.rundir import RunDir, append_lines, read_lines


def record(run: RunDir, event: str, **fields: Any) -> None:
    """Append one event."""
    append_lines(run.journal, [{"time": round(time.time(), 3), "event": event, **fields}])


def events(run: RunDir, *kinds: str) -> Iterator[dict[str, Any]]:
    """Yield the events of the given kinds, all of them without one, oldest first."""
    for line in read_lines(run.journal):
        if not kinds or line.get("event") in kinds:
            yield line


def last(run: RunDir, *kinds: str) -> dict[str, Any] | None:
    """Return the newest event of the given kinds."""
    newest = None
    for newest in events(run, *kinds):  # noqa: B007 the loop's last value is what is wanted
        pass
    return newest


def brief(run: RunDir) -> list[dict[str, Any]]:
    """Return the events, oldest first, but of checkpoints and of good witnesses, which are most of them, the newest.

    So a look at a hundred long runs need not read a hundred thousand lines.
    """
    try:
        lines = run.journal.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    for mark, more in _MANY:
        many = [number for number, line in enumerate(lines) if mark in line[:60] and more in line]
        for number in many[:-1]:
            lines[number] = b""
    return _parsed(lines)


_MANY = ((b'"event": "checkpoint"', b""), (b'"event": "witness"', b'"identical": true'))


class Follower:
    """Reads a journal as it grows: each event once, and no byte twice.

    Args:
        run: whose journal.
        skip: pass over what is there already.
    """

    def __init__(self, run: RunDir, *, skip: bool = False) -> None:
        self._path, self._at = run.journal, 0
        if skip:
            self.new()

    def new(self) -> list[dict[str, Any]]:
        """Return the events that were added since the last call."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._at)
                data = file.read()
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1  # a line that is being written is read the next time
        self._at += whole
        return _parsed(data[:whole].split(b"\n"))


def _parsed(lines: list[bytes]) -> list[dict[str, Any]]:
    """Return the events that lines hold; one torn by a crash is passed over."""
    lines = [line for line in lines if line]
    try:
        found = json.loads(b"[" + b",".join(lines) + b"]")  # one call costs half of what many do
    except ValueError:
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [event for event in found if isinstance(event, dict) and "event" in event]


def witnessed(event: dict[str, Any]) -> str:
    """Return a ``witness`` event in a sentence."""
    step, compared, differs = event["step"], event["compared"], event["differs"]
    if differs:
        shown = ", ".join(differs[:5]) + f" and {len(differs) - 5} more" * (len(differs) > 5)
        return f"warning: at step {step} this differs from what the segment before had: {shown}"
    *most, last = compared
    return f"witnessed at step {step}: {', '.join(most)}{' and ' * bool(most)}{last} identical"


def finished(run: RunDir) -> str:
    """Return how a run that is done came to its end, in a sentence."""
    return tell(last(run, "done") or {"event": ""}) or "done"


def jobs(told: Iterable[dict[str, Any]]) -> list[str]:
    """Return the ids of the SLURM jobs that were submitted, by events, newest last."""
    submitted = (event for event in told if event["event"] in ("submitted", "handoff"))
    return list(dict.fromkeys(str(event["job"]) for event in submitted if event.get("job")))


def done_after(steps: int, segments: int) -> str:
    """Return how a run has ended well, in words."""
    return f"done after {steps} steps and {segments} segment{'s' * (segments != 1)}"


def tell(event: dict[str, Any]) -> str | None:
    """Return what an event means to a person who follows the chain; None where there is nothing to tell."""
    kind = event["event"]
    if kind == "segment":
        if not event["resumed"]:
            return f"segment {event['segment']}: fresh start"
        took = f"read and verified in {event['seconds']:.2f} s"
        return (
            f"segment {event['segment']}: resumes at step {event['step']} from {event['checkpoint']} ({took})"
        )
    if kind == "stop":
        return f"segment {event['segment']} stops at step {event['step']}: {event['reason']}"
    if kind == "failed" and event["retry"]:
        return f"segment {event['segment']} failed at step {event['step']}, trying again: {event['error']}"
    if kind == "fallback":
        return f"checkpoint {event['path']} cannot be trusted: {event['reason']}"
    if kind == "drift":
        return f"warning: the environment has changed since the checkpoint: {'; '.join(event['changes'])}"
    if kind == "witness":
        return witnessed(event)
    if kind == "space":
        removed = f"; removed {', '.join(event['removed'])} to make room" * bool(event["removed"])
        return f"warning: {event['reason']}{removed}"
    if kind == "unsaved":
        return f"no checkpoint at step {event['step']}: {event['reason']}"
    if kind == "deferred":
        return f"a stop or save at step {event['step']} waits: {event['reason']}"
    if kind == "warning":
        return f"warning: {event['reason']}"
    if kind == "done":
        return done_after(event["step"], event["segment"])
    return None
