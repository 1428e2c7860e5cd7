"""Chains among what real sites have besides jobs: arrays, reservations, maintenance, settings of sbatch and squeue."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, beside
from test_handoff import EPOCHS, WARNED, Starter, jobs_of
from test_slurm import Chain, assert_same, plain

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.usefixtures("running")]

_ARRAY = """
import sys
from pathlib import Path
from chainrun import experiment
from chainrun.launch import submit
from chainrun.launch.job import Job
described = [experiment.load(Path(name)) for name in sys.argv[1:]]
runs = [submit.prepare(one, Path.cwd())[0] for one in described]
executor = submit._executor(runs[0], described[0], None)
with executor.batch():
    jobs = [executor.submit(Job(str(run.path))) for run in runs]
print(*(job.job_id for job in jobs))
"""
# What a site's or a person's start files may set: another format of times and of squeue, other options of sbatch
AMBIENT = (
    "export SLURM_TIME_FORMAT=relative SQUEUE_FORMAT=%A SQUEUE_STATES=FAILED SCANCEL_INTERACTIVE=1 "
    "SBATCH_TIMELIMIT=1 SBATCH_HOLD=1 TZ=America/Caracas"
)


def in_an_array(cluster: Cluster, *chains: Chain) -> list[str]:
    """Submit the first jobs of several chains as one array; return their ids."""
    files = [str(chain.file) for chain in chains]
    return cluster.run(sys.executable, "-c", _ARRAY, *files).stdout.split()


def leave_reservation(cluster: Cluster, job: str) -> bool:
    """Let a job that waits start without its reservation; whether that worked."""
    waits = cluster.job(job)["JobState"] == "PENDING"
    return (
        waits
        and not cluster.run("scontrol", "update", f"JobId={job}", "Reservation=", check=False).returncode
    )


@beside
def test_arrays_reservations_and_shortened_limits(tmp_path):
    """Elements of an array are requeued, or resubmitted, each by itself; ends that only a reservation knows are kept.

    A job in a reservation is ended with it, whatever its own EndTime says, and --time-min lets SLURM shorten a limit.
    A person's settings of sbatch and squeue change nothing. Of ranks that fail together one hands over.
    """
    reference = plain(tmp_path, EPOCHS)
    with Cluster.own("--nodes=3", "--cpus=8") as cluster:
        start, user = Starter(cluster, tmp_path), f"Users={getpass.getuser()}"
        soon = ["StartTime=now+3minutes", "Duration=30", "Flags=MAINT", "Nodes=n3", user]
        cluster.run("scontrol", "create", "reservation", "ReservationName=maintenance", *soon)
        short = start("short", slurm={"extra": {"time-min": 1, "nodelist": "n3"}}, args={"nap": 1.7})
        now = ["StartTime=now", "Duration=1", "Nodes=n2", user]
        cluster.run("scontrol", "create", "reservation", "ReservationName=brief", *now)
        reserved = start(
            "reserved", slurm={"lead": "35s", "extra": {"reservation": "brief"}}, args={"nap": 1.7}
        )
        again = start.described("again", args={"trouble": WARNED})
        policy = {"handoff": "resubmit"}
        anew = start.described("anew", args={"trouble": WARNED}, chain=policy, slurm={"setup": [AMBIENT]})
        elements = in_an_array(cluster, anew, again)  # with the first one's setup
        policy = {"handoff": "resubmit", "retry_errors": 1}
        both = start(
            "both", chain=policy, slurm={"tasks_per_node": 2}, args={"trouble": {"how": "raised", "after": 3}}
        )

        (job,) = jobs_of(reserved)
        reserved.wait(lambda: reserved.events("handoff"), 90, "the handoff before the reservation ends")
        assert cluster.job(job)["JobState"] != "TIMEOUT"
        reserved.wait(lambda: leave_reservation(cluster, job), 60, "the start without the reservation")
        short.wait(lambda: short.events("handoff"), 150, "the handoff before the shortened limit")
        cluster.run("scontrol", "delete", "ReservationName=maintenance")
        for chain in (short, reserved, again, anew):
            chain.wait_done(200)
            assert_same(chain, reference)
            assert not chain.events("lost")
        for chain in (short, reserved):
            assert chain.events("stop")[0]["reason"] == "walltime"
        assert (
            short.events("handoff")[0]["how"] == "resubmit"
        )  # a requeued job would keep the shortened limit
        assert [event["job"] for event in again.events("segment")] == [elements[1]] * 2
        assert [event["restart"] for event in again.events("segment")] == [0, 1]
        first, second = anew.events("segment")
        assert (first["job"], second["job"]) == (elements[0], anew.events("submitted")[-1]["job"])
        assert cluster.job(second["job"])["TimeLimit"] == "00:20:00"

        both.wait((both.run / "FAILED").exists, 120, "the failure after one retry")
        assert {event["segment"] for event in both.events("failed")} == {1, 2}
        assert len(jobs_of(both)) == 2
        assert [event["how"] for event in both.events("handoff")] == ["resubmit"]


def entered(folder: Path) -> Path:
    """Return a Python that is a script, as one that enters a container is; the Python inside takes itself for it."""
    (folder / "bin").mkdir(parents=True)
    (folder / "lib").symlink_to(Path(sys.prefix) / "lib")
    (folder / "pyvenv.cfg").write_text((Path(sys.prefix) / "pyvenv.cfg").read_text())
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/bash\nexport INSIDE=1\nexec -a "$0" {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


@beside
def test_a_signal_comes_through_a_wrapper_where_only_the_first_process_gets_any(tmp_path):
    """Under proctrack/cgroup, with a Python that is a script which ends in exec: warned far from its end, it stops."""
    reference = plain(tmp_path, EPOCHS)
    python = entered(tmp_path / "environment")
    cluster = Cluster.up("--profile", "cgroup", "--nodes=1", "--fast-signals")
    try:
        chain = Starter(cluster, tmp_path).described("wrapped")
        cluster.run(str(python), "-m", "chainrun", "submit", str(chain.file), cwd=chain.folder)
        (job,) = jobs_of(chain)
        chain.wait(chain.trace.with_suffix(".0").exists, 120, "the first step")
        script = (chain.run / "jobs" / f"{job}_submission.sh").read_text()
        assert f"{python} -u -m submitit" in script
        cluster.run("scancel", "--signal=USR2", job)
        chain.wait_done(150)
        assert_same(chain, reference)
        assert [event["reason"] for event in chain.events("stop")] == ["signal"]
        assert [event["how"] for event in chain.events("handoff")] == ["requeue"]
    finally:
        cluster.down()
