"""What one process knows of the job that carries it."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


def _no_end() -> float | None:
    return None


def _unknown(job: str, nodes: Sequence[str], began: float) -> str:
    return ""


def _not_queued() -> dict[str, float]:
    return {}


@dataclass(frozen=True)
class Allocation:
    """The place of this process in its job, and the job's end.

    Built by the launching layer from the scheduler's environment; the layers below only read it.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    scheduler: str = "none"
    """``slurm``, ``local``, or ``none`` for a `Run` made by hand."""
    job: str = "0"
    restart: int = 0
    """How often the scheduler has started this job before."""
    host: str = field(default_factory=socket.gethostname)
    nodes: tuple[str, ...] = ()
    """The names of the job's nodes, in the scheduler's words; empty where there is no scheduler."""
    node_name: str = ""
    """This process's node among them."""
    gpus: int = 0
    """GPUs of the whole job."""
    ended: Callable[[str, Sequence[str], float], str] = _unknown
    """Asks in which state an earlier start of a job ended, given the job, its nodes and when it began; empty where
    nobody knows."""
    queued: Callable[[], dict[str, float]] = _not_queued
    """When the job was ``submitted``, ``eligible`` and ``granted`` its nodes, in seconds since the epoch, as far as
    the scheduler has said so by now; asks nobody."""
    end: Callable[[], float | None] = _no_end
    """Asks when the job will be killed: seconds since the epoch, None where there is no limit."""
    interrupt_at: frozenset[int] = frozenset()
    """Global steps at which the segment ends as if the walltime had come."""
    save_at: frozenset[int] = frozenset()
    """Global steps at which a checkpoint is taken besides those that are due."""
    record: str | None = None
    """File to which a fingerprint of the state is written after every step."""
