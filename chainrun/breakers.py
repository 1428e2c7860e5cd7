"""When a chain must not go on by itself, and on which node not: read from the journal alone.

So every job comes to the same answer, one that starts after another was killed without a word too.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chainrun import journal
from chainrun.rundir import RunDir

if TYPE_CHECKING:  # commands that only look need no YAML
    from chainrun.experiment import ChainPolicy

ENDS = ("stop", "failed", "done", "lost")
FAILURES = 2  # on one node, after which the chain keeps away from it
_NOT_THE_NODES = (
    "TIMEOUT",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "CANCELLED",
    "REQUEUED",
)  # states of jobs that were killed


@dataclass
class Start:
    """One start of one SLURM job, and how it ended: a ``stop``, ``failed``, ``done`` or ``lost`` event, or not yet."""

    event: dict[str, Any]
    end: dict[str, Any] | None = None
    segment: int | None = None

    @property
    def seconds(self) -> float:
        """How long it has lasted, or lasts by now."""
        end = self.end or {"time": time.time()}
        return max(0.0, float(end.get("last_seen", end["time"])) - float(self.event["time"]))


@dataclass(frozen=True)
class Trip:
    """Why a chain stops, and what has to be added to the command that lets it go on."""

    why: str
    options: str = ""


def since_a_person_looked(run: RunDir) -> list[dict[str, Any]]:
    """Return the events since a person last let the chain go on."""
    recent: list[dict[str, Any]] = []
    for event in journal.events(run):
        recent = [] if event["event"] == "continue" else [*recent, event]
    return recent


def starts(events: list[dict[str, Any]]) -> list[Start]:
    """Return the starts of SLURM jobs among events, oldest first."""
    found: list[Start] = []
    for event in events:
        if event["event"] == "start":
            found.append(Start(event))
        elif found and event["event"] == "segment":
            found[-1].segment = event["segment"]
        elif found and event["event"] in ENDS and found[-1].end is None:
            found[-1].end = event
    return found


def idle_segments(run: RunDir) -> int:
    """Return how many of the newest segments, in a row, ended without one new committed step.

    A job that was killed before its segment began counts too. The exclusion of a node is a reason to try once more.
    """
    idle, step = 0, 0
    for event in journal.events(run):
        kind = event["event"]
        if kind == "continue":
            idle = 0  # a person has looked at it
        elif kind == "segment" or (kind == "lost" and event["segment"] is None):
            idle += 1
        elif kind == "exclude":
            idle = max(0, idle - 1)
        elif kind == "checkpoint" and event["step"] > step:
            idle, step = 0, event["step"]
    return idle


def spent(run: RunDir) -> tuple[float, float]:
    """Return the node hours and GPU hours of all SLURM jobs so far, those that were killed included."""
    nodes = gpus = 0.0
    for start in starts(list(journal.events(run))):
        hours = start.seconds / 3600
        nodes += hours * len(start.event["nodes"])
        gpus += hours * start.event["gpus"]
    return nodes, gpus


def tripped(run: RunDir, chain: ChainPolicy) -> Trip | None:
    """Return why the chain must not go on by itself, None where it may."""
    recent = since_a_person_looked(run)
    segments = sum(event["event"] == "segment" for event in recent)
    if segments >= chain.max_segments:
        return Trip(f"it has had {segments} segments, chain.max_segments is {chain.max_segments}")
    idle = idle_segments(run)
    if idle >= chain.stop_after_idle_segments:
        return Trip(
            f"{idle} segments in a row ended without one new committed step "
            f"(chain.stop_after_idle_segments is {chain.stop_after_idle_segments}): {_how_the_last_ended(recent)}"
        )
    budgets = {"max_node_hours": chain.max_node_hours, "max_gpu_hours": chain.max_gpu_hours}
    for (key, most), hours in zip(budgets.items(), spent(run), strict=True):
        if most is not None and hours >= most:
            unit = key.removeprefix("max_").replace("_", " ").replace("gpu", "GPU")
            why = f"it has used {hours:.4g} {unit}, chain.{key} is {most:.4g}"
            return Trip(why, f" chain.{key}={2 * hours:.3g} --override")
    return None


def _how_the_last_ended(recent: list[dict[str, Any]]) -> str:
    last = next((event for event in reversed(recent) if event["event"] in ENDS), {"event": "lost"})
    if last["event"] == "failed":
        return f"the last failed with {last['error']}"
    if last["event"] == "lost":
        if last.get("state") == "TIMEOUT":
            return (
                "the last one was killed at its walltime before it came to a step boundary; call run.step() after every "
                "optimizer step and run.poll() in long evaluations, or give a job more time (slurm.time)"
            )
        state = f", SLURM says {last['state']}" if last.get("state") else ""
        return f"the last one was killed without a word{state}: a crash, no memory left, or its node failed"
    return "a step may be longer than the walltime allows"


def excluded(run: RunDir) -> list[str]:
    """Return the nodes that the chain keeps away from, since a person last looked."""
    return [event["node"] for event in since_a_person_looked(run) if event["event"] == "exclude"]


def suspect(run: RunDir) -> tuple[str, int] | None:
    """Return the node on which segments fail again and again, and how often; None where there is none.

    A failure of the function is blamed on the failing rank's node, a segment that was killed on all its nodes; the
    node that is blamed `FAILURES` times, and more often than every other, is suspected.
    """
    blamed: Counter[str] = Counter()
    for start in starts(since_a_person_looked(run)):
        end = start.end or {"event": None}
        if end["event"] == "failed":
            blamed.update([end["node"]] if end.get("node") else [])
        elif end["event"] == "lost" and end.get("state") not in _NOT_THE_NODES:
            blamed.update(start.event["nodes"])
    for node in excluded(run):
        del blamed[node]
    most = blamed.most_common(2)
    if not most or most[0][1] < FAILURES or (len(most) == 2 and most[1][1] == most[0][1]):
        return None
    return most[0]
