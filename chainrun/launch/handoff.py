"""What makes the next segment happen, last of all, by rank 0 of the segment that ends."""

from __future__ import annotations

import contextlib
import json
import signal
import time

from chainrun import breakers, experiment, journal
from chainrun.allocation import Allocation
from chainrun.errors import UsageError
from chainrun.launch import notify, slurm, submit
from chainrun.rundir import RunDir, write_durably
from chainrun.segment import Outcome, say
from chainrun.training.stop import Signals

_CANCELLED = "the job was cancelled with scancel"
_STAND_BY = 90.0  # seconds, in which several commands of SLURM may hang and be given up one after the other


def hand_over(run: RunDir, allocation: Allocation, outcome: Outcome, signals: Signals) -> bool:
    """Make the next segment happen; return False where the chain ends here, the reason in the journal."""
    described = experiment.load(run.experiment)
    if outcome.reason == "cancelled" or run.stop.exists():
        return _refuse(run, allocation, "the run was cancelled")
    terminated = signals.terminated
    fate = slurm.fate(allocation.job, allocation.restart)
    _note_taken(run, allocation, fate, terminated=terminated)
    if fate.kind == "cancelled":  # scontrol requeue would bring the job back to life
        return _refuse(run, allocation, _CANCELLED)
    if fate.kind == "requeued":
        journal.record(run, "handoff", how="requeued by SLURM", job=allocation.job)
        return True
    avoids = _keep_away(run)
    trip = breakers.tripped(run, described.chain)
    if trip is not None:
        return _refuse(run, allocation, trip.why, trip.options)
    ways = {
        "requeue": [_requeue],
        "resubmit": [_resubmit],
        "ahead": [_requeue, _resubmit],
        "auto": [_requeue, _resubmit],
    }[described.chain.handoff]
    # a job that is requeued keeps its options, and a limit that --time-min let SLURM shorten
    shortened = described.chain.handoff == "auto" and "time-min" in described.slurm.extra
    if avoids or shortened:
        ways = [_resubmit, *(way for way in ways if way is not _resubmit)]
    waiting = _waiting(run, allocation)
    if waiting:  # whatever the policy: beside them a requeued job would be one too many
        if avoids:
            _exclude(run, waiting)
        journal.record(run, "handoff", how="ahead", job=waiting[0])
        return True
    if described.chain.handoff == "ahead":
        journal.record(run, "handoff", how="ahead", refused="no job is waiting")
    refused = False
    for way in ways:
        # a cancel may have come meanwhile, and be why the way before was refused; its signal may still be on its way
        heard = signals.terminated and not terminated
        if (heard or refused) and slurm.fate(allocation.job, allocation.restart).kind == "cancelled":
            return _refuse(run, allocation, _CANCELLED)
        problem = way(run, allocation, described, signals)
        if problem is None:
            return True
        refused, how = True, way.__name__.strip("_")
        journal.record(run, "handoff", how=how, refused=problem)
        say(f"handing over by {how} was refused: {problem}")
    return _refuse(run, allocation, "no way of handing over was left")


def _note_taken(run: RunDir, allocation: Allocation, fate: slurm.Fate, *, terminated: bool) -> None:
    """Record why SLURM takes the job's nodes away, where it does and where it says so."""
    state = "PREEMPTED" if fate.preempted else ""
    if not state and fate.kind != "cancelled" and (terminated or fate.kind == "requeued"):
        began = (journal.last(run, "start") or {"time": 0.0})["time"]
        state = allocation.ended(allocation.job, allocation.nodes, began)
    if state:
        journal.record(run, "taken", job=allocation.job, restart=allocation.restart, state=state)


def claim(run: RunDir, allocation: Allocation) -> bool:
    """Whether this rank is the one to hand over: where several have failed, only the first does."""
    try:
        run.claim(allocation.job, allocation.restart).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def stand_by() -> None:
    """Wait for the end that comes when another rank has handed over: one's own end would come before that."""
    time.sleep(_STAND_BY)


def halt(run: RunDir, allocation: Allocation, why: str, options: str = "") -> None:
    """End the chain here, for whoever looks and for jobs that start yet; say how to go on.

    Args:
        options: to be added to the command that goes on.
    """
    waiting = _waiting(run, allocation)  # before a person can let the chain go on
    own = (journal.last(run, "submitted") or {}).get("command")  # a person's own script
    command = own or f"chainrun submit {run.experiment}{options}"
    say(f"the chain stops here: {why}; to go on: {command}")
    with contextlib.suppress(OSError):  # a full disk
        write_durably(run.halted, json.dumps({"why": why, "command": command}).encode())
        journal.record(run, "handoff", how=None, refused=why)
    _cancel(waiting)
    notify.notify(run, "stopped", f"{why}; to go on: {command}")


def prepare(run: RunDir, allocation: Allocation) -> None:
    """See to the jobs that go on after this one, when it starts.

    They keep away from a node on which segments are killed again and again: those could not say so at their end.
    With ``handoff: ahead`` the next one is submitted now: it waits in the queue while this one runs, gathers
    priority, and starts when this one ends; it is spared the hold of a requeued job (about 121 s, the lifetime
    of the job's credential).
    """
    described = experiment.load(run.experiment)
    waiting = _waiting(run, allocation)
    if _keep_away(run):
        _exclude(run, waiting)
    if described.chain.handoff != "ahead" or waiting:
        return
    why = _submit_after(run, allocation, described)
    if why is not None:
        journal.record(run, "handoff", how="ahead", refused=why)
        say(f"the next job could not be submitted ahead: {why}")


def cancelled_before(run: RunDir, allocation: Allocation) -> str | None:
    """Return which job of the chain was cancelled with scancel, None where none was, or nobody can tell.

    One that was cancelled before it could listen, or while it waited, has told nobody; the next one starts
    all the same where it was submitted beforehand.
    """
    if any(marker.exists() for marker in (run.done, run.failed, run.stop, run.halted)):
        return None
    jobs = submit.jobs_of(run, recent=True)
    earlier = jobs[: jobs.index(allocation.job)] if allocation.job in jobs else []
    for job, (state, _) in slurm.states(earlier, ended=True).items():
        if state == "CANCELLED":
            return f"job {job} was cancelled with scancel"
    return None


def tidy(run: RunDir, allocation: Allocation) -> None:
    """Cancel the jobs that still wait: the chain has ended, as its marker says to one that starts meanwhile."""
    _cancel(_waiting(run, allocation))


def _cancel(waiting: list[str]) -> None:
    answer = slurm.cancel_waiting(waiting) if waiting else slurm.Answer(True, "")
    if not answer.ok:
        say(
            f"jobs {', '.join(waiting)} could not be cancelled: {answer.text}; they will leave when they start"
        )


def _waiting(run: RunDir, allocation: Allocation) -> list[str]:
    """Return the run's other jobs that wait in the queue, the first to start first.

    Where SLURM does not say, these are the jobs submitted since the present one was, which all start after it.
    """
    jobs = submit.jobs_of(run, recent=True)
    others = [job for job in jobs if job != allocation.job]
    queue = slurm.queue(others)
    if queue is None:
        return jobs[jobs.index(allocation.job) + 1 :] if allocation.job in jobs else []
    return [job for job in others if queue.get(job, ("", ""))[0] == "PENDING"]


def _keep_away(run: RunDir) -> bool:
    """Exclude a node on which segments fail again and again; return whether any is newly excluded."""
    found = breakers.suspect(run)
    if found is None:
        return False
    node, failures = found
    journal.record(run, "exclude", node=node, failures=failures)
    say(f"{failures} segments have failed on node {node}: the next jobs keep away from it")
    return True


def _exclude(run: RunDir, jobs: list[str]) -> None:
    """Keep jobs that wait away from the excluded nodes."""
    nodes = breakers.excluded(run)
    for job in jobs:
        answer = slurm.exclude(job, nodes)
        if not answer.ok:
            say(f"job {job} could not be kept away from {', '.join(nodes)}: {answer.text}")


def _refuse(run: RunDir, allocation: Allocation, why: str, options: str = "") -> bool:
    halt(run, allocation, why, options)
    return False


def _requeue(
    run: RunDir, allocation: Allocation, described: experiment.Experiment, signals: Signals
) -> str | None:
    # written before it is done: on success SLURM kills this process at once
    journal.record(run, "handoff", how="requeue", job=allocation.job)
    say(f"requeueing job {allocation.job}")
    # die at once: a job that lingers is requeued later, and one that is cancelled now must not come back
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    answer = slurm.requeue(allocation.job)
    if not answer.ok:
        signals.install()
        return answer.text
    time.sleep(60)  # until SLURM kills us; an exit of our own would race with it
    return None


def _resubmit(
    run: RunDir, allocation: Allocation, described: experiment.Experiment, signals: Signals
) -> str | None:
    why = _submit_after(run, allocation, described)
    if why is None:
        journal.record(run, "handoff", how="resubmit", job=submit.jobs_of(run)[-1])
    return why


def _submit_after(run: RunDir, allocation: Allocation, described: experiment.Experiment) -> str | None:
    try:
        job = submit.submit_job(run, described, after=[allocation.job])
    except UsageError as error:  # SLURM's, or a run from a person's own script that says no slurm.time
        return str(error)
    say(f"submitted job {job} to go on after this one")
    return None
