"""Why SLURM has ended a job: what it has left in the job's log, and what became of the job's nodes.

Without accounting SLURM forgets how a job ended that it has put back into the queue.
"""

from __future__ import annotations

import contextlib
import datetime
import re
from collections.abc import Sequence
from pathlib import Path

from chainrun.launch import slurm

_LAST_WORDS = re.compile(
    r"\*\*\* (?:JOB|STEP) (\S+) ON \S+ CANCELLED AT (\d\S+?)(?: DUE TO ([A-Z ]+?))?(?:,[^*]*)? \*\*\*"
)
_CAUSES = {
    "PREEMPTION": "PREEMPTED",
    "NODE FAILURE": "NODE_FAIL",
    "TIME LIMIT": "TIMEOUT",
    "JOB REQUEUE": "REQUEUED",
}


def state_of(logs: Path, job: str, nodes: Sequence[str], began: float, *, again: bool) -> str:
    """Return in which state a start of a job ended, in the words of SLURM's states; empty where nobody knows.

    Args:
        logs: the folder of the jobs' logs.
        job: the job.
        nodes: its nodes.
        began: when that start began, in seconds since the epoch.
        again: whether the job has been started again since, so that its present state says nothing.
    """
    state = "" if again else slurm.last_state(job)
    if state not in ("", "COMPLETED", "COMPLETING"):
        return state
    said = _CAUSES.get(_last_words(logs, job, began))
    if said is not None:
        return said
    return "NODE_FAIL" if slurm.have_failed(nodes, began) else state


def _last_words(logs: Path, job: str, began: float) -> str:
    """Return why SLURM has ended a start of a job, in its own words; empty where it has not said why."""
    found = (began - 1, "")  # its stamps are whole seconds
    for log in logs.glob(f"{job}_*log.*"):
        with contextlib.suppress(OSError, ValueError), open(log, "rb") as file:
            file.seek(max(0, log.stat().st_size - 1_000_000))
            for whose, stamp, cause in _LAST_WORDS.findall(file.read().decode(errors="replace")):
                if whose.partition(".")[0] == job:  # the stamp is in the node's own time
                    found = max(found, (datetime.datetime.fromisoformat(stamp).timestamp(), cause))
    return found[1]
