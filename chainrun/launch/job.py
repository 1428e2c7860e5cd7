"""What submitit pickles: the path of the run directory, and nothing else.

Every start, for whatever reason, asks the store for the newest committed checkpoint, so nothing in the
pickle can go stale; and it is unpickled fast, so that the moment in which a signal finds no handler is short.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainrun.allocation import Allocation
from chainrun.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED
from chainrun.launch import ends, slurm
from chainrun.rundir import RunDir
from chainrun.training.stop import Signals, kill

if TYPE_CHECKING:
    from chainrun.segment import Outcome

LOCAL = "CHAINRUN_LOCAL"  # what `chainrun run` tells its segments: JSON with segment, end, interrupt_at


class Job:
    """One start of one job, on every rank."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __call__(self) -> None:
        environment = dict(os.environ)  # before the segment and the user's code add to it
        signals = Signals().install()  # over submitit's, which would requeue from inside a signal handler
        _one_log()
        slurm.begin()
        run = RunDir(Path(self.path))
        allocation = _local_allocation() if LOCAL in os.environ else _slurm_allocation(run)
        try:
            _carry(run, allocation, signals, environment)
        finally:
            _end_workers()

    def checkpoint(self) -> Any:
        """Answer submitit's own handler in the seconds before ours are installed: start again as we are."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def _carry(
    run: RunDir, allocation: Allocation, signals: Signals, environment: dict[str, str] | None = None
) -> None:
    from chainrun.launch import group, handoff  # not while unpickling
    from chainrun.segment import run_segment

    leads = allocation.rank == 0 and allocation.scheduler == "slurm"
    if leads:
        cancelled = handoff.cancelled_before(run, allocation)
        if cancelled is not None:
            handoff.halt(run, allocation, cancelled)
            group.pass_on(run, environment)
            sys.exit(EXIT_STOPPED)
    began = partial(_began, run, allocation) if leads else lambda: None
    outcome = run_segment(run, allocation, signals, began)
    ending = _end(run, allocation, signals, outcome, leads=leads)
    # of a failed segment any rank does: rank 0 may be killed for its waiting for the one that failed
    if allocation.scheduler == "slurm" and (leads or outcome.kind in ("failed", "retry")):
        group.pass_on(run, environment)
    if ending:
        sys.exit(ending)


def _began(run: RunDir, allocation: Allocation) -> None:
    from chainrun.launch import group, handoff

    handoff.prepare(run, allocation)
    group.pass_on(run)  # the places of chains that were killed without a word


def _end(run: RunDir, allocation: Allocation, signals: Signals, outcome: Outcome, *, leads: bool) -> int:
    """Hand over, or clean up behind the chain; return the exit code."""
    from chainrun.launch import handoff

    if leads and outcome.kind in ("done", "failed", "idle"):
        handoff.tidy(run, allocation)
    if allocation.scheduler == "slurm":  # a local chain's command sees its end by itself
        _tell(run, outcome, leads=leads)
    if outcome.kind == "halted":
        handoff.halt(run, allocation, outcome.reason, outcome.options)
        return EXIT_STOPPED
    if outcome.kind in ("failed", "locked", "lost"):  # srun then ends the ranks that wait for this one
        return EXIT_FAILED
    slurms = allocation.scheduler == "slurm"
    if outcome.kind == "stopped" and slurms and allocation.rank == 0:
        if not handoff.hand_over(run, allocation, outcome, signals):
            return EXIT_STOPPED
    elif outcome.kind == "retry" and slurms:
        # the rank that failed hands over, since the others may wait for it for ever; of several the first
        if handoff.claim(run, allocation):
            handoff.hand_over(run, allocation, outcome, signals)
        else:
            handoff.stand_by()
        return EXIT_FAILED  # also where the next job waits: srun then ends the other ranks
    elif outcome.kind == "follows":
        if slurms:
            handoff.stand_by()
        return EXIT_FAILED
    return EXIT_DONE  # of a local chain `chainrun run` starts the next segment


def _tell(run: RunDir, outcome: Outcome, *, leads: bool) -> None:
    """Let the experiment's ``notify`` know of the chain's end; on any rank of a failed one, since any may know why."""
    from chainrun import journal
    from chainrun.launch import notify

    if leads and outcome.kind in ("done", "idle") and run.done.exists():  # idle: killed before it could tell
        notify.notify(run, "finished", journal.finished(run), outcome.step or None)
    elif outcome.kind == "failed":
        notify.notify(run, "failed", outcome.reason, outcome.step)


def _one_log() -> None:
    """Send errors where output goes: in two files nobody can tell any more what came after what."""
    with contextlib.suppress(OSError):
        sys.stderr.flush()
        os.dup2(1, 2)


def _end_workers() -> None:
    """End loader workers that hang: multiprocessing would wait for them for ever when it exits."""
    processes = sys.modules.get("multiprocessing")
    kill([child for child in processes.active_children() if child.daemon] if processes else [])


def _slurm_allocation(run: RunDir) -> Allocation:
    here = slurm.allocation()

    def ended(job: str, nodes: Sequence[str], began: float) -> str:
        return ends.state_of(run.jobs, job, nodes, began, again=job == here.job)

    return replace(here, ended=ended)


def _local_allocation() -> Allocation:
    env = os.environ
    told: dict[str, Any] = json.loads(env[LOCAL])
    ranks = int(env["SUBMITIT_LOCAL_NTASKS"])
    return Allocation(
        rank=int(env["SUBMITIT_LOCAL_GLOBALID"]),
        world_size=ranks,
        local_rank=int(env["SUBMITIT_LOCAL_LOCALID"]),
        local_world_size=ranks,
        scheduler="local",
        job=env["SUBMITIT_LOCAL_JOB_ID"],
        restart=told["segment"],
        end=lambda: told["end"],
        interrupt_at=frozenset(told["interrupt_at"]),
        save_at=frozenset(told.get("save_at", ())),
        record=told.get("record"),
    )
