"""Chains on SLURM 22.05, 24.11 and 26.05, and on clusters that are set up differently.

What SLURM does at a requeue and at a preemption differs between its versions, so the same chains run on each.
They sleep most of their time, so they run together, in one test.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from slurm_cluster import Cluster, beside, require_slurm
from test_slurm import Chain, assert_same, plain

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]

VERSIONS = ("host", "trixie", "sid")  # bookworm has what the host has in CI
FIRST_AND_LAST = ("host", "sid")
LATER = ("trixie",)  # one version saves time, and 22.05 does not requeue by itself what a newer SLURM does
SILENT = ("--slurm-conf-extra", "SlurmctldParameters=")  # a preempted job gets SIGTERM, not its --signal
CANCEL = "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=0 PreemptMode=CANCEL MaxTime=INFINITE State=UP"
PATIENT = ("--slurm-conf-extra", "KillWait=20")  # time to save in, on a busy machine too
SITUATIONS = {  # name: (the cluster's options, the chain's handoff, seconds that a step sleeps)
    "walltime": (("--profile", "default"), "auto", 1.3),  # 48 steps are more than one walltime on any machine
    "refused": (("--profile", "norequeue"), "auto", 0.25),
    "preempted": (("--profile", "preempt"), "auto", 0.6),  # and more than a preempted job's 20 s of grace
    "terminated": (("--profile", "preempt", *SILENT), "auto", 0.25),
    "cancelled": (("--profile", "preempt", "--slurm-conf-extra", CANCEL, *PATIENT), "auto", 0.25),
    "twice": (("--profile", "preempt", *SILENT), "resubmit", 0.25),
}
EPOCHS = 4  # of 12 steps
WHERE = {
    "refused": FIRST_AND_LAST,
    "terminated": FIRST_AND_LAST,
    "cancelled": LATER,
    "twice": LATER,
}  # else everywhere


class Situation:
    """One chain on one cluster, cut in one way."""

    def __init__(self, version: str, name: str, folder: Path) -> None:
        self.name = name
        options, handoff, nap = SITUATIONS[name]
        if version == "host":
            require_slurm()
        self.cluster = Cluster.up("--version", version, "--nodes=1", "--fast-signals", *options)
        folder.mkdir()
        slurm = {"time": "1min" if name == "walltime" else "5min", "cpus_per_task": 4}
        if "preempt" in options:
            slurm["partition"] = "low"
        self.chain = Chain(
            self.cluster, folder, args={"epochs": EPOCHS, "nap": nap}, slurm=slurm, chain={"handoff": handoff}
        )
        try:
            self.job = self.chain.submit()
            self._cut()
            self.chain.wait_done(300)
            # 24.11 requeues a job that was preempted once more after it has ended well
            self.chain.wait(lambda: not self._queued(), 60, "the end of the run's jobs")
        except BaseException:
            self.cluster.down()
            raise

    def _queued(self) -> str:
        return self.cluster.run("squeue", "--noheader", "--format=%i %T").stdout

    def _cut(self) -> None:
        """Cut the chain's first segment, unless its walltime does."""
        if self.name == "walltime":
            return
        self._steps(1)
        if (
            self.name == "refused"
        ):  # --requeue, which chainrun asks for, is stronger than the cluster's default
            self.cluster.run("scontrol", "update", f"JobId={self.job}", "Requeue=0")
            self.cluster.run("scancel", "--signal=USR2", self.job)
            return
        self._preempt()
        if self.name == "twice":
            self.chain.wait(lambda: len(self.chain.events("segment")) == 2, 60, "the second segment")
            self._steps(2)
            self._preempt()

    def _steps(self, segment: int) -> None:
        """Wait for the first steps of a segment."""
        trace = self.chain.trace.with_suffix(".0")
        self.chain.wait(trace.exists, 90, f"a step of segment {segment}")
        before = trace.stat().st_size
        self.chain.wait(lambda: trace.stat().st_size > before, 90, f"a step of segment {segment}")

    def _preempt(self) -> None:
        job = self.cluster.run(
            "sbatch", "--parsable", "--partition=high", "--cpus-per-task=4", "--output=/dev/null", "--wrap=:"
        )
        self.cluster.wait_job(job.stdout.strip(), "COMPLETED", 90)


def hows(chain: Chain) -> list[str]:
    """Return how each segment was handed over; a requeue is written before it is tried."""
    return [event["how"] for event in chain.events("handoff") if "refused" not in event]


def check(name: str, chain: Chain) -> None:
    """Check that a chain was cut and handed over as its situation wants."""
    segments, stops = chain.events("segment"), [stop["reason"] for stop in chain.events("stop")]
    restarts = [segment["restart"] for segment in segments]
    if name == "walltime":
        assert set(stops) == {"walltime"}
        assert set(hows(chain)) == {"requeue"}
        assert restarts == list(range(len(restarts)))
        assert len(restarts) >= 2
    elif name == "refused":  # a new job goes on, and what SLURM said is in the journal
        assert hows(chain) == ["requeue", "resubmit"]
        assert any("disabled" in event.get("refused", "") for event in chain.events("handoff"))
        first, second = [segment["job"] for segment in segments]
        assert chain.events("handoff")[-1]["job"] == second != first
        assert chain.cluster.job(first)["JobState"] == "COMPLETED"
    elif (
        name == "preempted"
    ):  # the warning moves the job's end, and the segment trains until shortly before that
        assert hows(chain) == ["requeue"]
        assert restarts == [0, 1]
    elif name in (
        "terminated",
        "cancelled",
    ):  # saved at once; a dying job, but not one that its owner cancelled
        # where its warning comes first, the end that SLURM then states for it is now
        assert stops == ["terminated"] or (name, stops) == ("cancelled", ["walltime"])
        assert hows(chain) == ["requeue"]
        assert restarts == [0, 1]
    elif name == "twice":
        # SLURM may requeue the job that has submitted another: then that one, which waits, goes on after it
        first, second = segments[:2]
        assert hows(chain) == ["resubmit", "ahead" if second["job"] == first["job"] else "resubmit"]
        carried = {segment["job"] for segment in segments}
        assert len({event["job"] for event in chain.events("submitted")} - carried) <= 1


@beside
def test_chains_are_exact_on_every_version_however_they_are_cut(tmp_path: Path) -> None:
    """Cut by a walltime, a refused requeue or preemptions, a run ends and equals the plain program."""

    def carry(version: str, name: str) -> None:
        situation = Situation(version, name, tmp_path / f"{version}-{name}")
        try:
            assert_same(situation.chain, reference.result())
            check(name, situation.chain)
        finally:
            situation.cluster.down()

    with ThreadPoolExecutor(4) as pool:
        reference = pool.submit(plain, tmp_path, EPOCHS)
        carried = {
            (version, name): pool.submit(carry, version, name)
            for name in SITUATIONS
            for version in WHERE.get(name, VERSIONS)
        }
    errors = {case: future.exception() for case, future in carried.items() if future.exception()}
    missing = {str(error) for error in errors.values() if isinstance(error, pytest.skip.Exception)}
    failed = [case for case, error in errors.items() if not isinstance(error, pytest.skip.Exception)]
    assert not failed, "\n\n".join(f"{' '.join(case)}: {errors[case]}" for case in failed)
    if missing:
        pytest.skip(f"{len(carried) - len(errors)} of {len(carried)} chains ran: {'; '.join(missing)}")
