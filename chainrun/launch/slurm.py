"""The only module that talks to SLURM: asks squeue and scontrol, and says what they answered."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from chainrun.allocation import Allocation
from chainrun.errors import ClusterError

TIMEOUT = 20.0  # seconds after which a SLURM command counts as hanging
_QUESTION = 5.0  # the same for questions, which the training asks too
_LEAST = 1.0
_DEVICES = {
    "CUDA_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "GPU_DEVICE_ORDINAL",
    "ZE_AFFINITY_MASK",
}  # set by SLURM
_UTC = "UTC0"  # as TZ: times of the clocks' change in autumn have one meaning
_IN_A_JOB = 5.0  # the same inside a job of which nobody says when it ends

_known_end: list[float | None] = [None]  # of the job that we run in, as SLURM last said


@dataclass(frozen=True)
class Answer:
    """What a SLURM command said: standard output where it succeeded, else why it did not."""

    ok: bool
    text: str


def patience(most: float = TIMEOUT) -> float:
    """Return how many seconds one SLURM command may take.

    Inside a job so few that several that hang one after the other leave time for the next way of handing over.
    """
    if "SLURM_JOB_ID" not in os.environ:
        return most
    end = _known_end[0]
    return min(most, TIMEOUT, _IN_A_JOB if end is None else max(_LEAST, (end - time.time()) / 6))


# What a person or a site sets to change what the commands below do or print: another format of times, a query before
# every scancel, other people's jobs, another cluster than the one that the jobs are submitted to.
_CHANGES = ("SQUEUE_", "SCANCEL_", "SCONTROL_", "SINFO_", "SLURM_TIME_FORMAT", "SLURM_CLUSTERS")


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_CHANGES)}
    return {**kept, "LC_ALL": "C"}


def ask(*command: str, most: float = TIMEOUT, **variables: str) -> Answer:
    """Run a SLURM command; never raises for what SLURM does.

    Args:
        most: seconds that it may take, fewer inside a job that ends soon.
        variables: of its environment.
    """
    timeout = patience(most)
    try:
        done = subprocess.run(
            command,
            env={**_environment(), **variables},
            capture_output=True,
            text=True,
            errors="replace",  # a job's name may have any bytes
            timeout=timeout,
            check=False,
        )
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            return Answer(False, f"{command[0]} cannot be run: {error.strerror}")
        return Answer(False, f"{command[0]} is not on PATH")
    except subprocess.TimeoutExpired:
        return Answer(False, f"{command[0]} did not answer within {timeout:.0f} s")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return Answer(False, lines[-1] if lines else f"{command[0]} ended with {done.returncode}")
    return Answer(True, done.stdout)


begun: dict[str, str] = {}  # the environment that the job's process began with


def begin() -> None:
    """Remember the environment before the user's code adds to it: addresses, ranks, devices of this job alone."""
    begun.update(os.environ)


def outside(variables: dict[str, str]) -> dict[str, str]:
    """Return an environment without what a job that it comes from has set, and what sbatch would take for options."""
    job = variables.get("SLURM_JOB_ID")
    names = {"SLURM_CONF"} & set(variables)
    names |= {
        name for name in variables if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_", "PMI"))
    }
    if job is not None:
        names -= _DEVICES if "SLURM_JOB_GPUS" in variables else set()
        names -= {name for name in ("TMPDIR", "TMP", "TEMP") if job in variables.get(name, "")}
    return {name: variables[name] for name in names}


def need(*commands: str) -> None:
    """Check that jobs can be submitted from here.

    Args:
        commands: those that are needed; by default what a person's submission needs.

    Raises:
        ClusterError: a command of SLURM is missing.
    """
    for command in commands or ("sbatch", "srun", "squeue", "scontrol"):
        if shutil.which(command) is None:
            raise ClusterError(
                f"SLURM's {command} is not on PATH: submit from a login node of a SLURM cluster (a module may "
                "have to be loaded), or use `chainrun run` to train on this machine"
            )


_FIELD = re.compile(r"(?:^| )([A-Za-z][\w/:]*)=(.*?)(?= [A-Za-z][\w/:]*=|$)")


def records(text: str) -> list[dict[str, str]]:
    """Return the fields of each line of ``scontrol --oneliner show …``."""
    return [dict(_FIELD.findall(line)) for line in text.splitlines() if "=" in line]


def _show(what: str, name: str) -> dict[str, str]:
    answer = ask("scontrol", "--oneliner", "show", what, name, most=_QUESTION, TZ=_UTC)
    lines = answer.text.splitlines() if answer.ok else []
    return dict(_FIELD.findall(lines[0])) if lines else {}


def job_record(job: str) -> dict[str, str]:
    """Return the fields of ``scontrol show job``, empty where SLURM does not know (or tell of) the job; times in UTC."""
    return _show("job", job)


def _seconds(time: str) -> float | None:
    """Return seconds since the epoch for a time that SLURM has said in UTC; None for Unknown, NONE, N/A."""
    try:
        return datetime.datetime.fromisoformat(time).replace(tzinfo=datetime.timezone.utc).timestamp()
    except ValueError:
        return None


def end_time(job: str, record: dict[str, str] | None = None) -> float | None:
    """Return when SLURM will end a job, in seconds since the epoch; None where it has no limit.

    The environment's SLURM_JOB_END_TIME (from 23.02) is not used: limits are changed while jobs run.

    Args:
        record: what `job_record` has just said.
    """
    record = job_record(job) if record is None else record
    if not record:  # scontrol is forbidden, missing, or hangs
        answer = ask("squeue", "--noheader", "--format=%e", "--jobs=" + job, most=_QUESTION, TZ=_UTC)
        return _seconds(answer.text.strip()) if answer.ok else None
    ends = [_seconds(record.get("EndTime", "")), _reservations_end(record.get("Reservation", ""))]
    return min((end for end in ends if end is not None), default=None)


def _reservations_end(name: str) -> float | None:
    """Return when the reservation that a job runs in ends its jobs: their own EndTime does not tell, nor does a warning."""
    record = _show("reservation", name) if name not in ("", "(null)") else {}
    end = _seconds(record.get("EndTime", ""))
    if end is None or "FLEX" in record.get("Flags", ""):
        return None
    overrun = re.search(r"ResvOverRun *= *(\w+)", ask("scontrol", "show", "config", most=_QUESTION).text)
    if overrun is None or not overrun[1].isdecimal():
        return None if overrun else end
    return end + 60.0 * int(overrun[1])


def states(jobs: list[str], *, ended: bool = False) -> dict[str, tuple[str, str]]:
    """Return {job id: (state, reason)} of the jobs that are in the queue.

    Args:
        ended: also those that have ended and that SLURM still remembers (MinJobAge, 300 s).
    """
    return queue(jobs, ended=ended) or {}


def queue(jobs: list[str], *, ended: bool = False) -> dict[str, tuple[str, str]] | None:
    """Return what `states` does, but None where SLURM gives no answer."""
    if not jobs:
        return {}
    which = ["--states=all"] if ended else []
    # --array: one line for each element, also of those that wait
    answer = ask("squeue", "--noheader", "--array", "--format=%i|%T|%r", *which, "--jobs=" + ",".join(jobs))
    if not answer.ok:  # an unknown job id among several is no error, a single one is
        return {} if "Invalid job id" in answer.text else None
    rows = (line.strip().split("|", 2) for line in answer.text.splitlines())
    return {row[0]: (row[1], row[2]) for row in rows if len(row) == 3}


@dataclass(frozen=True)
class Queued:
    """A job in the queue."""

    state: str
    reason: str
    start: float | None
    """When it has started, or when SLURM expects it to, in seconds since the epoch; None where it does not say."""


def listing(jobs: list[str]) -> tuple[dict[str, Queued], str]:
    """Ask once for all of the jobs; return those that are in the queue, and why SLURM did not say, if it did not."""
    if not jobs:
        return {}, ""
    command = ("squeue", "--noheader", "--array", "--format=%i|%T|%S|%r", "--jobs=" + ",".join(jobs))
    answer = ask(*command, most=_QUESTION, TZ=_UTC)
    if not answer.ok:
        return {}, "" if "Invalid job id" in answer.text else answer.text
    found = {}
    for line in answer.text.splitlines():
        job, state, stamp, reason = (line.strip().split("|", 3) + [""] * 3)[:4]
        found[job] = Queued(state, "" if reason == "None" else reason, _seconds(stamp))
    return found, ""


def last_state(job: str) -> str:
    """Return in which state a job has ended, by SLURM's memory or else its accounting; empty where neither says."""
    state = states([job], ended=True).get(job, ("", ""))[0]
    if not state:
        answer = ask(
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            "--format=State",
            f"--jobs={job}",
            most=_QUESTION,
        )
        lines = answer.text.split("\n") if answer.ok else [""]
        state = lines[0].partition(" by ")[0].strip()  # CANCELLED by 1000
    return state


_GONE = ("DOWN", "FAIL", "NOT_RESPONDING", "*")  # in the state of a node


def have_failed(nodes: Sequence[str], since: float) -> bool:
    """Whether one of the nodes is down, or has been booted since a time in seconds since the epoch."""
    if not nodes:
        return False
    answer = ask("scontrol", "--oneliner", "show", "node", ",".join(nodes), most=_QUESTION, TZ=_UTC)
    for node in records(answer.text) if answer.ok else []:
        booted = _seconds(node.get("BootTime", "")) or 0.0
        if booted > since or any(word in node.get("State", "") for word in _GONE):
            return True
    return False


def allocation() -> Allocation:
    """Return this process's place in the SLURM job that it runs in."""
    from submitit.slurm.slurm import SlurmJobEnvironment  # parses SLURM's short form of lists of nodes

    env = os.environ
    job = env["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in env:
        job = f"{env['SLURM_ARRAY_JOB_ID']}_{env['SLURM_ARRAY_TASK_ID']}"
    nodes = int(env.get("SLURM_JOB_NUM_NODES", "1"))
    ranks = int(env.get("SLURM_NTASKS", "1"))
    with contextlib.suppress(KeyError, ValueError):
        _known_end[0] = float(env["SLURM_JOB_END_TIME"])  # from 23.02; a first guess, limits are changed

    record: dict[str, str] = {}

    def end() -> float | None:
        found = job_record(job)
        record.update(found)
        _known_end[0] = end_time(job, found) or _known_end[0]  # too busy to answer: the last one holds
        return _known_end[0]

    def queued() -> dict[str, float]:
        fields = {"submitted": "SubmitTime", "eligible": "EligibleTime", "granted": "StartTime"}
        times = {name: _seconds(record.get(field, "")) for name, field in fields.items()}
        return {name: at for name, at in times.items() if at is not None}

    return Allocation(
        rank=int(env.get("SLURM_PROCID", "0")),
        world_size=ranks,
        local_rank=int(env.get("SLURM_LOCALID", "0")),
        local_world_size=-(-ranks // nodes),
        node=int(env.get("SLURM_NODEID", "0")),
        scheduler="slurm",
        job=job,
        restart=int(env.get("SLURM_RESTART_COUNT", "0")),
        nodes=tuple(SlurmJobEnvironment().hostnames),
        node_name=env.get("SLURMD_NODENAME", ""),
        gpus=nodes * int(env.get("SLURM_GPUS_ON_NODE") or 0),
        queued=queued,
        end=end,
    )


def requeue(job: str) -> Answer:
    """Put a running job back into the queue; on success SLURM kills its steps at once."""
    return ask("scontrol", "requeue", job)


def cancel(job: str) -> Answer:
    return ask("scancel", job)


def cancel_waiting(jobs: list[str]) -> Answer:
    """Cancel those of the jobs that wait; one that has just started is left to see for itself what to do."""
    return ask("scancel", "--state=PENDING", *jobs)


def exclude(job: str, nodes: list[str]) -> Answer:
    """Keep a waiting job away from nodes."""
    return ask("scontrol", "update", f"JobId={job}", f"ExcNodeList={','.join(nodes)}")


def held(job: str, state: str, reason: str) -> str | None:
    """Return what is to be done about a job that waits for a person, None where it waits for something else."""
    reason = reason.replace("_", " ")
    if state == "PENDING" and re.fullmatch("Reservation ?Deleted", reason, re.IGNORECASE):
        return (
            f"job {job} waits for a reservation that is over; to let it go on without: "
            f"scontrol update JobId={job} ReservationName="
        )
    if state != "PENDING" or not re.search("held|too many requeues", reason, re.IGNORECASE):
        return None
    who = "; only an administrator may, or the one who held it" if "HeldAdmin" in reason else ""
    return f"job {job} is held ({reason}) and will not start by itself; to let it go on: scontrol release {job}{who}"


@dataclass(frozen=True)
class Fate:
    """What SLURM has decided about the job that runs us."""

    kind: Literal["cancelled", "requeued"] | None = None
    preempted: bool = False
    """Whether it takes the job's nodes for another one."""


def fate(job: str, restart: int) -> Fate:
    """Return what SLURM has decided about the job that runs us.

    While a job is dying its base state is hidden: squeue and scontrol say COMPLETING for a cancel, a requeue,
    a reached limit and a preemption that cancels alike (measured on 22.05.8 and 24.11.5). They differ in Reason,
    in the count of restarts and in PreemptTime.
    """
    record = job_record(job)
    if not record:  # scontrol is forbidden, missing, or hangs
        state, reason = states([job]).get(job, ("", ""))
        record = {"JobState": state, "Reason": reason}
    state = record.get("JobState", "")
    preempted = record.get("PreemptTime", "None") != "None"
    if state.startswith("CANCELLED"):
        return Fate("cancelled", preempted)
    if int(record.get("Restarts", restart)) > restart:
        return Fate("requeued", preempted)
    if state == "COMPLETING" and record.get("Reason") != "TimeLimit" and not preempted:
        return Fate("cancelled")
    return Fate(preempted=preempted)
