"""The only module that talks to SLURM: asks squeue and scontrol, and says what they answered."""

from __future__ import annotations

import datetime
import os
import re
import shutil
import subprocess
from dataclasses import dataclass

from chainrun.allocation import Allocation
from chainrun.errors import ClusterError

TIMEOUT = 30.0  # seconds after which a SLURM command counts as hanging


@dataclass(frozen=True)
class Answer:
    """What a SLURM command said: standard output where it succeeded, else why it did not."""

    ok: bool
    text: str


def ask(*command: str, timeout: float = TIMEOUT) -> Answer:
    """Run a SLURM command; never raises for what SLURM does."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        return Answer(False, f"{command[0]} is not on PATH")
    except subprocess.TimeoutExpired:
        return Answer(False, f"{command[0]} did not answer within {timeout:.0f} s")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return Answer(False, lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return Answer(True, done.stdout)


def need() -> None:
    """Check that jobs can be submitted from here.

    Raises:
        ClusterError: a command of SLURM is missing.
    """
    for command in ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(command) is None:
            raise ClusterError(
                f"SLURM's {command} is not on PATH: submit from a login node of a SLURM cluster (a module may "
                "have to be loaded), or use `chainrun run` to train on this machine"
            )


_FIELD = re.compile(r"(?:^| )([A-Za-z][\w/:]*)=(.*?)(?= [A-Za-z][\w/:]*=|$)")


def job_record(job: str) -> dict[str, str]:
    """Return the fields of ``scontrol show job``, empty where SLURM does not know (or tell of) the job."""
    answer = ask("scontrol", "--oneliner", "show", "job", job, timeout=10)
    lines = answer.text.splitlines() if answer.ok else []
    return dict(_FIELD.findall(lines[0])) if lines else {}


def end_time(job: str) -> float | None:
    """Return when SLURM will end a job, in seconds since the epoch; None where it has no limit.

    The environment's SLURM_JOB_END_TIME (from 23.02) is not used: limits are changed while jobs run.
    """
    end = job_record(job).get("EndTime", "")
    try:
        return datetime.datetime.fromisoformat(end).timestamp()
    except ValueError:  # Unknown, NONE
        return None


def states(jobs: list[str]) -> dict[str, tuple[str, str]]:
    """Return {job id: (state, reason)} of the jobs that are in the queue."""
    if not jobs:
        return {}
    answer = ask("squeue", "--noheader", "--format=%i|%T|%r", "--jobs=" + ",".join(jobs))
    if not answer.ok:  # an unknown job id among several is no error, a single one is
        return {}
    rows = (line.strip().split("|") for line in answer.text.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


def allocation() -> Allocation:
    """Return this process's place in the SLURM job that it runs in."""
    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    ranks = int(env.get("SLURM_NTASKS", "1"))
    last: list[float | None] = [None]

    def end() -> float | None:
        last[0] = end_time(job) or last[0]  # SLURM may be too busy to answer; the last answer holds
        return last[0]

    return Allocation(
        rank=int(env.get("SLURM_PROCID", "0")),
        world_size=ranks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_world_size=-(-ranks // nodes),
        node=int(env.get("SLURM_NODEID", "0")),
        scheduler="slurm",
        job=job,
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
        end=end,
    )


def requeue(job: str) -> Answer:
    """Put a running job back into the queue; on success SLURM kills its steps at once."""
    return ask("scontrol", "requeue", job)


def cancel(job: str) -> Answer:
    return ask("scancel", job)


def fate(job: str, restart: int) -> str | None:
    """Return what SLURM has decided about the job that runs us: ``cancelled``, ``requeued``, or None.

    While a job is dying its base state is hidden: squeue and scontrol say COMPLETING for a cancel, a requeue
    and a reached limit alike (measured on 22.05.8). They differ in Reason and in the count of restarts.
    """
    record = job_record(job)
    state = record.get("JobState", "")
    if state.startswith("CANCELLED"):
        return "cancelled"
    if int(record.get("Restarts", restart)) > restart:
        return "requeued"
    if state == "COMPLETING" and record.get("Reason") != "TimeLimit":
        return "cancelled"
    return None
