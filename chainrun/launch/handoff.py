"""What makes the next segment happen, last of all, by rank 0 of the segment that ends."""

from __future__ import annotations

import time

from chainrun import experiment, journal
from chainrun.allocation import Allocation
from chainrun.launch import slurm
from chainrun.rundir import RunDir
from chainrun.segment import Outcome, say


def idle_segments(run: RunDir) -> int:
    """Return how many of the newest segments, in a row, ended without one new committed step."""
    idle, step = 0, 0
    for event in journal.events(run, "segment", "checkpoint", "continue"):
        if event["event"] == "continue":
            idle = 0  # a person has looked at it
        elif event["event"] == "segment":
            idle += 1
        elif event["step"] > step:
            idle, step = 0, event["step"]
    return idle


def breaker(run: RunDir, chain: experiment.ChainPolicy) -> str | None:
    """Return why the chain must not go on by itself, None where it may."""
    segments = sum(1 for _ in journal.events(run, "segment"))
    if segments >= chain.max_segments:
        return f"it has had {segments} segments, chain.max_segments is {chain.max_segments}"
    idle = idle_segments(run)
    if idle >= chain.stop_after_idle_segments:
        return (
            f"{idle} segments in a row ended without one new committed step "
            f"(chain.stop_after_idle_segments is {chain.stop_after_idle_segments}): a step may be longer than "
            "the walltime allows"
        )
    return None


def hand_over(run: RunDir, allocation: Allocation, outcome: Outcome) -> bool:
    """Make the next segment happen; return False where the chain ends here, the reason in the journal."""
    described = experiment.load(run.experiment)
    if outcome.reason == "cancelled" or run.stop.exists():
        return _refuse(run, "the run was cancelled")
    fate = slurm.fate(allocation.job, allocation.restart)
    if fate == "cancelled":  # scontrol requeue would bring the job back to life
        return _refuse(run, "the job was cancelled with scancel")
    if fate == "requeued":
        journal.record(run, "handoff", how="requeued by SLURM", job=allocation.job)
        return True
    why = breaker(run, described.chain)
    if why is not None:
        return _refuse(run, why)
    ways = {"requeue": [_requeue], "resubmit": [_resubmit]}.get(
        described.chain.handoff, [_requeue, _resubmit]
    )
    for way in ways:
        problem = way(run, allocation, described)
        if problem is None:
            return True
        journal.record(run, "handoff", how=way.__name__.strip("_"), refused=problem)
        say(f"handing over by {way.__name__.strip('_')} was refused: {problem}")
    return _refuse(run, "no way of handing over was left")


def _refuse(run: RunDir, why: str) -> bool:
    journal.record(run, "handoff", how=None, refused=why)
    say(f"the chain stops here: {why}; to go on: chainrun submit {run.experiment}")
    return False


def _requeue(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    # written before it is done: on success SLURM kills this process at once
    journal.record(run, "handoff", how="requeue", job=allocation.job)
    say(f"requeueing job {allocation.job}")
    answer = slurm.requeue(allocation.job)
    if not answer.ok:
        return answer.text
    time.sleep(60)  # until SLURM kills us; an exit of our own would race with it
    return None


def _resubmit(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    from chainrun.errors import ClusterError
    from chainrun.launch import submit

    try:
        job = submit.submit_job(run, described, dependency=f"afterany:{allocation.job}")
    except ClusterError as error:
        return str(error)
    journal.record(run, "handoff", how="resubmit", job=job)
    say(f"submitted job {job} to go on after this one")
    return None
