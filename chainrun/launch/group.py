"""A group of chains with so many at once as asked for, and no daemon: the end of one chain starts the next.

A group is ``dir/NAME`` with one run directory a point. A point is started by who makes the file ``claims/POINT``;
a chain that has ended passes its place on once, to who makes ``claims/POINT.passed``. Both are made with O_EXCL, so
two chains that end at the same time start two different points, and no more. A chain that was killed without a
word passes nothing on; any other job of the group that starts or ends sees that it has left the queue, and does.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from chainrun import experiment, journal
from chainrun.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, ChainrunError, ClusterError
from chainrun.launch import cancel, freeze, local, slurm, submit
from chainrun.lock import holder
from chainrun.rundir import GroupDir, RunDir, write_durably
from chainrun.segment import say
from chainrun.sweep import Sweep


def submit_group(
    found: Sweep, base: Path, *, override: bool = False, keep_code: bool = False, jobs: int = 1, source: Path
) -> int:
    """Submit the points of a sweep, as many as may run at once; return the exit code.

    Points that are done or have jobs already are left alone, those that failed or stopped go on.

    Args:
        jobs: how many to submit at once for each of the first chains.
        source: the experiment file, for the command that goes on.

    Raises:
        UsageError: the function or its arguments do not fit, or nothing could be submitted.
    """
    for point in found.points:
        submit.check(point.experiment)
    group, ready, refused = _prepare(found, base, override=override, keep_code=keep_code)
    for run in ready:
        for mark in _marks(group, run):
            mark.unlink(missing_ok=True)
    active = _settle(group, ready)
    places = len(ready) if found.parallel is None else max(0, found.parallel - active)
    started = 0
    for run in ready:
        if started == places:
            break
        if not _make(_marks(group, run)[0]):
            continue
        try:
            submit.submit_jobs(run, experiment.load(run.experiment), max(1, jobs))
        except ClusterError as error:
            _marks(group, run)[0].unlink(missing_ok=True)
            if not started:
                raise
            refused += 1
            print(f"chainrun: {error}; `chainrun submit {source}` submits the rest", file=sys.stderr)
            break
        started += 1
    waiting = len(ready) - started
    print(f"submitted {started} chain{'s' * (started != 1)} of {len(found.points)}, group {group.path}")
    if waiting and not refused:
        print(
            f"{waiting} more: each is submitted by the last job of a chain before it (parallel: {found.parallel})"
        )
    print(f"chainrun status {group.path}")
    return EXIT_USAGE if refused else EXIT_DONE


def run_group(
    found: Sweep,
    base: Path,
    interrupt_at: list[int],
    walltime: float | None,
    *,
    override: bool = False,
    keep_code: bool = False,
) -> int:
    """Run the points of a sweep on this machine, one after the other; return the exit code.

    One that fails does not keep the others from running.
    """
    group, ready, refused = _prepare(found, base, override=override, keep_code=keep_code)
    failed: list[str] = []
    for number, run in enumerate(ready, 1):
        say(f"{number} of {len(ready)}: {run.path.name}")
        code = local.run_chain(run, experiment.load(run.experiment), interrupt_at, walltime)
        if code == EXIT_STOPPED and (journal.last(run, "stop", "handoff") or {}).get("event") != "handoff":
            return code  # a person has ended it
        if code != EXIT_DONE:
            failed.append(run.path.name)
    if failed:
        print(f"{len(failed)} of {len(found.points)} have not finished: {', '.join(failed)}", file=sys.stderr)
    print(f"{'done' if not failed and not refused else 'ended'}: {group.path}")
    return EXIT_FAILED if failed else EXIT_USAGE if refused else EXIT_DONE


def cancel_group(path: Path) -> int:
    """Cancel all points: those that run save and end, those that wait never start."""
    group = GroupDir(path.absolute())
    write_durably(group.stop, b"")
    runs = [run for run in group.runs() if not run.done.exists()]
    for run in runs:  # all of them first, so that they end at the same time
        write_durably(run.stop, b"")
    for run in runs:
        cancel.cancel(run.path)
    print(f"{group.path}: {len(runs)} cancelled, {len(group.runs()) - len(runs)} had been done")
    return EXIT_DONE


def pass_on(run: RunDir) -> None:
    """Start as many points of the run's group as chains of it have ended; called by jobs, at their start and end."""
    group = GroupDir(run.path.parent)
    if group.sweep.is_file():
        try:
            _pass_on(group, run)
        except (OSError, ChainrunError) as error:  # the run itself is well
            say(f"the next of the group {group.path} could not be started: {error}")


def _pass_on(group: GroupDir, run: RunDir) -> None:
    if next(_unclaimed(group), None) is None:  # SLURM need not be asked
        return
    for ended in _ended(group, run):
        if group.stop.exists():
            return
        passed = _marks(group, ended)[1]
        if not _make(passed):
            continue
        following = next((one for one in _unclaimed(group) if _make(_marks(group, one)[0])), None)
        if following is None:
            return
        why = _start(following)
        if why is None:
            group.halted.unlink(missing_ok=True)
            say(f"{ended.path.name} has ended: {following.path.name} of the same group was submitted")
            continue
        for mark in (_marks(group, following)[0], passed):  # for the next one to try again
            mark.unlink(missing_ok=True)
        command = f"chainrun submit {following.experiment}"
        say(f"{following.path.name} of the same group could not be submitted: {why}; to do so: {command}")
        write_durably(group.halted, json.dumps({"why": why, "command": command}).encode())
        return


def _start(run: RunDir) -> str | None:
    """Submit a point's first job; return why that was refused."""
    try:
        submit.submit_job(run, experiment.load(run.experiment))
    except ChainrunError as error:
        return str(error)
    return None


def _prepare(
    found: Sweep, base: Path, *, override: bool, keep_code: bool
) -> tuple[GroupDir, list[RunDir], int]:
    """Make the run directories; return those that may be started, and how many were refused."""
    project = freeze.survey(found.points[0].experiment, base)
    group = found.write()
    for marker in (group.stop, group.halted):
        marker.unlink(missing_ok=True)
    ready, refused = [], 0
    for point in found.points:
        if _is_active(RunDir(point.experiment.run_dir)):
            print(f"{point.name}: has a job already")
            continue
        try:
            run, how = submit.prepare(
                point.experiment, base, override=override, keep_code=keep_code, project=project
            )
        except ChainrunError as error:
            refused += 1
            print(f"chainrun: {point.name}: {error}", file=sys.stderr)
            continue
        if how == "done":
            print(f"{point.name}: is done")
        else:
            ready.append(run)
    return group, ready, refused


def _settle(group: GroupDir, ready: list[RunDir]) -> int:
    """Make the claims fit to the group's other points; return how many of those are on their way."""
    active = 0
    for run in group.runs():
        if run in ready:
            continue
        claim, passed = _marks(group, run)
        _make(claim)
        if _is_active(run):
            passed.unlink(missing_ok=True)
            active += 1
        else:
            _make(passed)
    return active


def _is_active(run: RunDir) -> bool:
    held = holder(run)
    return bool(held and held["alive"]) or bool(slurm.states(submit.jobs_of(run, recent=True)))


def _ended(group: GroupDir, mine: RunDir) -> Iterator[RunDir]:
    """Yield the points whose chains have ended and that have not passed their place on."""
    claimed = [
        run for run in group.runs() if _marks(group, run)[0].exists() and not _marks(group, run)[1].exists()
    ]
    doubtful = []
    for run in claimed:
        if any(marker.exists() for marker in (run.done, run.failed, run.stop, run.halted)):
            yield run
        elif run.path != mine.path:
            doubtful.append(run)
    jobs = {run.path: submit.jobs_of(run, recent=True) for run in doubtful}
    queue = slurm.queue([job for names in jobs.values() for job in names])
    for run in doubtful:
        held = holder(run)
        if queue is None or not jobs[run.path] or (held and held["alive"]):
            continue  # nobody knows; it is being submitted right now; it runs
        seen = submit.jobs_of(run, recent=True)
        if seen == jobs[run.path] and not any(job in queue for job in seen):
            yield run


def _unclaimed(group: GroupDir) -> Iterator[RunDir]:
    """Yield the points that nobody has started."""
    for run in group.runs():
        if not _marks(group, run)[0].exists() and not run.stop.exists() and not run.done.exists():
            yield run


def _marks(group: GroupDir, run: RunDir) -> tuple[Path, Path]:
    """Return the files that say that a point was started, and that it has passed its place on."""
    return group.claims / run.path.name, group.claims / f"{run.path.name}.passed"


def _make(mark: Path) -> bool:
    """Make a file; return False where it was there already."""
    try:
        with open(mark, "x"):
            return True
    except FileExistsError:
        return False
