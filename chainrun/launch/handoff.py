"""What makes the next segment happen, last of all, by rank 0 of the segment that ends."""

from __future__ import annotations

import signal
import time

from chainrun import experiment, journal
from chainrun.allocation import Allocation
from chainrun.errors import ClusterError
from chainrun.launch import slurm, submit
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
        return _refuse(run, allocation, "the run was cancelled")
    fate = slurm.fate(allocation.job, allocation.restart)
    if fate == "cancelled":  # scontrol requeue would bring the job back to life
        return _refuse(run, allocation, "the job was cancelled with scancel")
    if fate == "requeued":
        journal.record(run, "handoff", how="requeued by SLURM", job=allocation.job)
        return True
    why = breaker(run, described.chain)
    if why is not None:
        return _refuse(run, allocation, why)
    ways = {
        "requeue": [_requeue],
        "resubmit": [_resubmit],
        "ahead": [_ahead, _requeue, _resubmit],
        "auto": [_requeue, _resubmit],
    }[described.chain.handoff]
    for way in ways:
        problem = way(run, allocation, described)
        if problem is None:
            return True
        journal.record(run, "handoff", how=way.__name__.strip("_"), refused=problem)
        say(f"handing over by {way.__name__.strip('_')} was refused: {problem}")
    return _refuse(run, allocation, "no way of handing over was left")


def prepare_ahead(run: RunDir, allocation: Allocation) -> None:
    """With ``handoff: ahead``, submit the job that goes on after this one, now.

    It waits in the queue while this one runs, gathers priority, and starts when this one ends; it is spared
    the hold of a requeued job (about 121 s, the lifetime of the job's credential).
    """
    described = experiment.load(run.experiment)
    over = any(marker.exists() for marker in (run.done, run.failed, run.stop))
    if described.chain.handoff != "ahead" or over or _waiting(run, allocation):
        return
    why = _submit_after(run, allocation, described)
    if why is not None:
        journal.record(run, "handoff", how="ahead", refused=why)
        say(f"the next job could not be submitted ahead: {why}")


def tidy(run: RunDir, allocation: Allocation) -> None:
    """Cancel the job submitted ahead: the chain has ended."""
    for job in _waiting(run, allocation):
        slurm.cancel(job)


def _waiting(run: RunDir, allocation: Allocation) -> list[str]:
    """Return the run's other jobs that are in the queue."""
    return [job for job in slurm.states(submit.jobs_of(run)) if job != allocation.job]


def _ahead(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    waiting = _waiting(run, allocation)
    if not waiting:
        return "no job is waiting"
    journal.record(run, "handoff", how="ahead", job=waiting[-1])
    return None


def _refuse(run: RunDir, allocation: Allocation, why: str) -> bool:
    tidy(run, allocation)
    journal.record(run, "handoff", how=None, refused=why)
    say(f"the chain stops here: {why}; to go on: chainrun submit {run.experiment}")
    return False


def _requeue(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    # written before it is done: on success SLURM kills this process at once
    journal.record(run, "handoff", how="requeue", job=allocation.job)
    say(f"requeueing job {allocation.job}")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # die at once: a job that lingers is requeued later
    answer = slurm.requeue(allocation.job)
    if not answer.ok:
        return answer.text
    time.sleep(60)  # until SLURM kills us; an exit of our own would race with it
    return None


def _resubmit(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    why = _submit_after(run, allocation, described)
    if why is None:
        journal.record(run, "handoff", how="resubmit", job=submit.jobs_of(run)[-1])
    return why


def _submit_after(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    try:
        # not singleton: that does not wait for a job that is completing
        job = submit.submit_job(run, described, dependency=f"afterany:{allocation.job}")
    except ClusterError as error:
        return str(error)
    say(f"submitted job {job} to go on after this one")
    return None
