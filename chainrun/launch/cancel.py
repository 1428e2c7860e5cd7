"""End a run for good: the running segment saves and ends, no further one starts."""

from __future__ import annotations

import time
from pathlib import Path

from chainrun import journal
from chainrun.checkpoint.store import Store
from chainrun.errors import EXIT_DONE
from chainrun.launch import notify, slurm
from chainrun.launch.submit import jobs_of
from chainrun.lock import holder
from chainrun.rundir import open_run, write_durably

PATIENCE = 60.0  # seconds that a running segment has to come to a boundary and save


def cancel(path: Path) -> int:
    """Cancel the run in a directory."""
    run = open_run(path)
    if run.done.exists():
        print(f"{run.path} is done already")
        return EXIT_DONE
    write_durably(run.stop, b"")
    journal.record(run, "cancel")
    until = time.monotonic() + PATIENCE
    while (held := holder(run)) and held["alive"] and time.monotonic() < until:
        time.sleep(0.5)
    # unless its last segment has told already, or is telling now: then this waits, before the job is killed
    notify.notify(run, "stopped", "the run was cancelled")
    jobs = slurm.states(jobs_of(run))
    for job in jobs:
        answer = slurm.cancel(job)
        if not answer.ok:
            print(f"job {job} could not be cancelled: {answer.text}; it will leave when it starts")
    if held and held["alive"]:
        then = "its job was cancelled" if jobs else "it will stop at the next one"
        print(f"the segment on {held['host']} came to no boundary within {PATIENCE:.0f} s; {then}")
    newest = Store(run).latest()
    where = f"its newest checkpoint is of step {newest.step}" if newest else "it has no checkpoint"
    again = "submit" if jobs_of(run) else "run"
    print(f"{run.path} is cancelled; {where}; to go on after all: chainrun {again} {run.experiment}")
    return EXIT_DONE
