"""How a segment ended, for what it was: walltime, preemption, node failure, cancel, crash and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ending:
    """How a segment ended."""

    kind: str
    """One of `KINDS`."""
    label: str
    """In two or three words."""
    more: str = ""
    """In a sentence."""


KINDS = {
    "walltime": "#3b82c4",
    "preemption": "#e08a1e",
    "node failure": "#c0399f",
    "killed": "#d64545",
    "crash": "#d64545",
    "cancelled": "#7d8590",
    "requeued": "#1c9ba8",
    "signal": "#1c9ba8",
    "interrupted": "#1c9ba8",
    "left": "#7d8590",
    "done": "#2f9e5b",
    "running": "#3b82c4",
    "unknown": "#7d8590",
}
"""The kinds of endings, and the colour of each."""

UNKNOWN = Ending(
    "killed", "killed", "it ended without a word: a crash of its process, no memory left, its node, or SLURM"
)

_TAKEN = {  # SLURM's state, of a segment that saved in time
    "PREEMPTED": Ending("preemption", "preemption", "SLURM took its nodes for another job; it saved in time"),
    "NODE_FAIL": Ending(
        "node failure", "node failure", "SLURM took the job from a node that had failed; it saved in time"
    ),
    "REQUEUED": Ending("requeued", "requeued", "put back into the queue, not by the chain; it saved in time"),
}
_LOST = {  # SLURM's state: how that is called here
    "NODE_FAIL": Ending("node failure", "node failure", "SLURM took the job from a node that had failed"),
    "BOOT_FAIL": Ending("node failure", "node failure", "the node could not be booted"),
    "PREEMPTED": Ending("preemption", "preemption", "killed for another job before it could save"),
    "REQUEUED": Ending(
        "requeued", "requeued", "put back into the queue, not by the chain, before it could save"
    ),
    "TIMEOUT": Ending("walltime", "walltime, killed", "the limit came before the checkpoint was committed"),
    "OUT_OF_MEMORY": Ending("killed", "out of memory", "SLURM killed it for want of memory"),
    "CANCELLED": Ending("cancelled", "cancelled", "cancelled with scancel before it could save"),
    "DEADLINE": Ending("killed", "deadline", "SLURM killed it at its deadline"),
}


def of(events: list[dict[str, Any]], *, alive: bool, began: bool, local: bool) -> Ending:
    """Return how a segment ended, from what was written by it and about it.

    Args:
        events: its events, oldest first.
        alive: whether it still runs.
        began: whether its segment had begun.
        local: whether it ran without SLURM.
    """
    kinds = {event["event"]: event for event in events}
    if "done" in kinds:
        return Ending("done", "done")
    if "failed" in kinds:
        failed = next(event for event in events if event["event"] == "failed")
        again = "; tried again" if failed.get("retry") else ""
        error = str(failed.get("error", "")).partition("\n")[0]
        return Ending("crash", "crash", f"{error}{again}")
    if "stop" in kinds:
        return _of_stop(
            str(kinds["stop"].get("reason", "")),
            events,
            taken=str(kinds.get("taken", {}).get("state")),
            local=local,
        )
    if alive:
        return Ending("running", "running", "it is alive")
    if "lost" in kinds:
        state = str(kinds["lost"].get("state") or "")
        more = (
            f"SLURM says {state}" if state else "killed without a word: a crash, no memory left, or its node"
        )
        return _LOST.get(state, Ending("killed", "killed", more))
    refused = [str(event["refused"]) for event in events if event.get("refused")]
    if not began:
        return Ending("left", "left at once", refused[-1] if refused else "it had nothing to do")
    return UNKNOWN


def _of_stop(reason: str, events: list[dict[str, Any]], *, taken: str, local: bool) -> Ending:
    handoffs = [event for event in events if event["event"] == "handoff"]
    refused = " ".join(str(event.get("refused", "")) for event in handoffs)
    if taken in _TAKEN:
        return _TAKEN[taken]
    if reason == "cancelled" or any(event["event"] == "cancel" for event in events):
        return Ending("cancelled", "cancelled", "chainrun cancel")
    if "scancel" in refused:
        return Ending("cancelled", "cancelled", "scancel")
    if reason == "walltime":
        return Ending("walltime", "walltime")
    if reason == "interrupt":
        return Ending("interrupted", "interrupted", "cut where --interrupt-at says")
    if any(event.get("how") == "requeued by SLURM" for event in handoffs):
        return Ending("requeued", "requeued", "somebody, or SLURM, has put its job back into the queue")
    if reason == "terminated" and local:
        return Ending("cancelled", "stopped by hand", "Ctrl-C, or SIGTERM")
    if reason == "signal":
        return Ending("signal", "warned", "a warning signal that was not the walltime's")
    if reason == "terminated":
        return Ending("signal", "terminated", "it was told to end: SIGTERM")
    return Ending("unknown", reason or "stopped")
