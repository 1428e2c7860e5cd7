"""Handoffs, and what ends a chain, on a real SLURM: presubmitted jobs, refusals, breakers, cancels, lost nodes.

Each test starts its chains together, so that they wait for SLURM and for imports at the same time.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, beside, require_slurm
from test_slurm import Chain, assert_same, plain
from test_store import small_disk as small_disk  # noqa: PLC0414 a fixture

sys.path.insert(0, str(Path(__file__).parent.parent / "slurm"))
from folder import Cluster as SlurmFolder

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.usefixtures("running")]
EPOCHS = 3  # of 12 steps


@pytest.fixture(scope="module")
def cluster():
    """A cluster with partitions whose nodes or doors the tests close."""
    require_slurm()
    options = [
        "--slurm-conf-extra=PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP",
        "--slurm-conf-extra=PartitionName=frail Nodes=n[3-4] MaxTime=INFINITE State=UP",
    ]
    cluster = Cluster.up("--fast-signals", "--nodes=4", "--cpus=8", *options)
    yield cluster
    cluster.down()


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    """What the plain program, uninterrupted, does."""
    return plain(tmp_path_factory.mktemp("reference"), EPOCHS)


class Starter:
    """Makes and submits chains of the training whose reference is `reference`, on one cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self._cluster, self._folder = cluster, folder

    def described(self, name: str, **keys) -> Chain:
        """Make a chain without submitting it."""
        folder = self._folder / name
        folder.mkdir()
        args = {"epochs": EPOCHS, "nap": 0.2, **keys.pop("args", {})}
        slurm = {"time": "20min", **keys.pop("slurm", {})}
        chain = Chain(self._cluster, folder, args=args, slurm=slurm, **keys)
        chain.run = Path(keys.get("dir", chain.run.parent)) / "chain"
        return chain

    def __call__(self, name: str, *words: str, **keys) -> Chain:
        chain = self.described(name, **keys)
        chain.command("submit", str(chain.file), *words)
        return chain


@pytest.fixture
def start(cluster, tmp_path) -> Starter:
    return Starter(cluster, tmp_path)


def jobs_of(chain: Chain) -> list[str]:
    return [event["job"] for event in chain.events("submitted")]


WARNED = {"how": "warned", "after": 4}  # as the walltime's signal, at a step of the first segment


def wait_step(chain: Chain, segment: int = 1) -> None:
    """Wait until a segment trains."""

    def trains() -> bool:
        trace = chain.trace.with_suffix(".0")
        return len(chain.events("segment")) >= segment and trace.exists()

    chain.wait(trains, 90, f"a step of segment {segment}")


def refusing(folder: Path, *programs: str, how: str = "echo 'not on this node' >&2; exit 1") -> dict:
    """Return the slurm section that puts programs first on the job's PATH which refuse, or hang."""
    tools = folder / "refusing"
    tools.mkdir()
    for program in programs:
        (tools / program).write_text(f"#!/bin/sh\n{how}\n")
        (tools / program).chmod(0o755)
    return {"setup": [f"export PATH={tools}:$PATH"]}


def test_a_chain_submitted_at_once_needs_nothing_of_its_nodes(cluster, start, reference, tmp_path):
    """Each job goes on when the one before has ended, where nodes may ask SLURM nothing too; no surplus one trains."""
    forbidden = refusing(tmp_path, "sbatch", "scontrol", "scancel", "squeue")
    alone = start("alone", "--jobs=3", slurm=forbidden, args={"trouble": WARNED})
    usual = start("usual", "--jobs=4", args={"nap": 0.4, "trouble": {**WARNED, "after": 20}})
    wait_step(usual)
    code = f"from chainrun.launch import slurm; assert slurm.cancel_waiting({jobs_of(usual)[:1]}).ok"
    cluster.run(sys.executable, "-c", code)  # as at a chain's end: what runs already is left alone
    for chain in (alone, usual):
        chain.wait_done(120)
        assert_same(chain, reference)
        jobs = jobs_of(chain)
        assert [event["job"] for event in chain.events("segment")] == jobs[:2]
        assert [event["how"] for event in chain.events("handoff")] == ["ahead"]
    left = cluster.wait_job(jobs_of(alone)[2], timeout=30)
    assert (left["JobState"], left["ExitCode"]) == ("COMPLETED", "0:0")
    assert [event["job"] for event in alone.events("start")] == jobs_of(alone)[:2]
    for job in jobs_of(usual)[2:]:
        cluster.wait_job(job, {"CANCELLED"}, 30)


def hiding(folder: Path, *programs: str) -> dict:
    """Return the slurm section whose PATH has everything but these programs."""
    tools = folder / "hiding"
    tools.mkdir()
    for path in Path("/usr/bin").iterdir():
        if path.name not in programs:
            (tools / path.name).symlink_to(path)
    return {"setup": [f"export PATH={tools}"]}


def log_of(chain: Chain) -> str:
    return "".join(path.read_text() for path in sorted(chain.run.glob("jobs/*_log.*")))


def command_to_go_on(chain: Chain, *reasons: str) -> list[str]:
    """Check that a chain has stopped, and that its log and `status` say why and how to go on; return that command."""
    chain.wait((chain.run / "HALTED").exists, 150, "the stop of the chain")
    first, *rows = chain.command("status", str(chain.run)).splitlines()
    assert first.split()[1] == "stopped", first
    command = next(row for row in rows if row.startswith("  to go on")).removeprefix("  to go on").strip()
    shown = f"{first}; to go on: {command}"
    for text in (shown, log_of(chain)):
        assert all(reason in text for reason in reasons), text
    assert f"to go on: {command}\n" in log_of(chain)
    program, *words = command.split()
    assert program == "chainrun"
    return words


def refusals(chain: Chain) -> dict[str, str]:
    return {event["how"]: event["refused"] for event in chain.events("handoff") if "refused" in event}


def test_chains_that_get_nowhere_stop_and_say_why(cluster, start, reference, small_disk):
    """An error, a kill at the first step, a full disk: two further segments at most, and nobody trains after that."""
    raises = start("raises", chain={"retry_errors": 9}, args={"trouble": {"how": "raised"}})
    killed = start("killed", "--jobs=5", args={"trouble": {"how": "killed"}})
    full = start(
        "full",
        "--jobs=5",
        dir=str(small_disk),
        args={"trouble": {"how": "full"}},
    )
    command_to_go_on(raises, "without one new committed step", "ValueError: planted after 1 steps")
    command_to_go_on(killed, "without one new committed step", "killed without a word")
    full.wait((full.run / "FAILED").exists, 90, "the failure of the last save")
    assert len(full.events("segment")) == 1
    assert "No space left" in (full.run / "FAILED").read_text()
    assert "failed" in full.command("status", str(full.run))
    assert len(killed.events("segment")) == 2
    assert len(raises.events("segment")) == 3  # once more, since both had failed on one node
    assert len({event["node"] for event in raises.events("failed")}) == 2
    assert [event["segment"] for event in killed.events("lost")] == [1, 2]
    for chain, surplus in ((killed, jobs_of(killed)[3:]), (full, jobs_of(full)[1:])):
        for job in surplus:
            cluster.wait_job(job, {"CANCELLED"}, 30)
        assert len(chain.events("start")) <= 3


def test_budgets_bad_nodes_and_held_jobs(cluster, start, reference):
    """A budget of hours ends a chain, a node that fails twice is kept away from, and a held job is explained."""
    policy = {"max_node_hours": 0.001, "max_gpu_hours": 5}
    budget = start("budget", chain=policy, args={"trouble": {**WARNED, "after": 25}})
    frail = {"partition": "frail"}
    # so that SLURM chooses n3 until both chains keep away from it
    cluster.run("scontrol", "update", "NodeName=n4", "State=DRAIN", "Reason=the others first")
    every = {"every": {"steps": 1}}
    trouble = {"trouble": {"how": "raised", "after": 3, "node": "n3"}}
    raises = start("raises", slurm=frail, checkpoint=every, chain={"retry_errors": 9}, args=trouble)
    trouble = {"trouble": {"how": "killed", "after": 3, "node": "n3"}}
    killed = start("killed", "--jobs=5", slurm=frail, checkpoint=every, args=trouble)
    held = start("held", slurm={"extra": {"hold": True}}, args={"nap": 0.5})

    job = jobs_of(held)[0]
    (asked,) = json.loads(held.command("status", "--json", str(held.run)))
    assert (asked["state"], asked["next"]) == ("held", f"scontrol release {job}")
    assert [(one["job"], one["state"]) for one in asked["queue"]] == [(job, "PENDING")]
    assert f"scontrol release {job}" in held.command("submit", str(held.file), code=2)
    cluster.run("scontrol", "release", job)
    wait_step(held)
    cluster.run("scontrol", "requeuehold", job)
    cluster.wait_job(job, {"PENDING"}, 30)
    shown = held.command("status", str(held.run))
    assert "held" in shown
    assert re.search(rf"to go on +scontrol release {job}\n", shown)
    cluster.run("scontrol", "release", job)

    words = command_to_go_on(budget, "node hours, chain.max_node_hours is 0.001")
    cluster.wait_job(jobs_of(budget)[0])  # its last seconds
    budget.command(*words)
    for chain in (raises, killed):
        chain.wait(lambda chain=chain: chain.events("exclude"), 150, "two failures on n3")
    cluster.run("scontrol", "update", "NodeName=n4", "State=RESUME")
    for chain in (raises, killed):
        chain.wait_done(90)
        assert_same(chain, reference)
        excluded = chain.events("exclude")
        assert [(event["node"], event["failures"]) for event in excluded] == [("n3", 2)]
        assert chain.events("start")[-1]["nodes"] == ["n4"]
    for chain in (budget, held):
        chain.wait_done(90)
        assert_same(chain, reference)
    assert [event["how"] for event in raises.events("handoff")] == ["requeue", "resubmit"]


def test_scancel_ends_a_chain_in_every_phase_and_submit_goes_on(cluster, start, reference, tmp_path):
    """While it waits, imports, saves or hands over: nothing starts again by itself, and what goes on is exact."""
    hand = 'if [ "$1" = requeue ]; then /usr/bin/scancel $2; sleep 5; fi; exec /usr/bin/scontrol "$@"'
    waits = start("waits", slurm={"extra": {"hold": True}})
    slow = tmp_path / "slow"
    slow.mkdir()
    once = "import pathlib, time\nfirst = pathlib.Path(__file__ + '.first')\n"
    (slow / "sitecustomize.py").write_text(
        f"{once}if not first.exists():\n    first.touch()\n    time.sleep(9)\n"
    )
    imports = start("imports", "--jobs=3", slurm={"setup": [f"export PYTHONPATH={slow}:$PYTHONPATH"]})
    cluster.wait_job(jobs_of(imports)[0], {"RUNNING"}, 30)
    cluster.run("scancel", jobs_of(imports)[0])
    cluster.run("scancel", jobs_of(waits)[0])
    trouble = {"trouble": {"how": "cancelled", "after": 4}}
    saves = start("saves", checkpoint={"every": {"steps": 1}}, args=trouble)
    hands = start("hands", args={"trouble": WARNED}, slurm=refusing(tmp_path, "scontrol", how=hand))

    for chain in (waits, saves, hands):
        cluster.wait_job(jobs_of(chain)[0], {"CANCELLED"}, 120)
        assert "stopped" in chain.command("status", str(chain.run))
        assert len(jobs_of(chain)) == 1
    command_to_go_on(imports, "was cancelled with scancel")
    assert not imports.events("segment")
    cluster.wait_job(jobs_of(imports)[2], timeout=30)
    # it was about to, and was killed in that; or, its signal being late, was told that the job is being cancelled
    *_, last = hands.events("handoff")
    assert last["how"] == "requeue" or "was cancelled with scancel" in last["refused"]

    for chain in (waits, imports, saves, hands):
        chain.command("submit", str(chain.file))
    cluster.run("scontrol", "release", jobs_of(waits)[-1])
    for chain in (waits, imports, saves, hands):
        chain.wait_done(150)
        assert_same(chain, reference)


@beside
def test_what_refuses_or_hangs_in_a_job_is_passed_over(tmp_path):
    """Whatever is missing, hangs or is refused, the next way is taken; when none is left, the printed command goes on."""
    reference = plain(tmp_path, EPOCHS)
    closing = "--slurm-conf-extra=PartitionName=closing Nodes=n[1-2] MaxTime=INFINITE State=UP"
    epilog = tmp_path / "epilog"
    epilog.write_text("#!/bin/sh\nexec sleep 5\n")
    epilog.chmod(0o755)
    with Cluster.own("--nodes=2", "--cpus=8", closing, f"--slurm-conf-extra=Epilog={epilog}") as cluster:
        start = Starter(cluster, tmp_path)
        tools = {name: tmp_path / f"tools-{name}" for name in ("hanging", "limit", "slow")}
        for folder in tools.values():
            folder.mkdir()
        args, longer = {"trouble": WARNED}, {"trouble": WARNED, "nap": 0.7}
        programs = refusing(tools["hanging"], "scontrol", "squeue", how="exec sleep 600")
        hanging = start("hanging", args=longer, slurm=programs)
        programs = refusing(tools["slow"], "scontrol", "sbatch", how="exec sleep 600")
        slow = start("slow", args=longer, slurm=programs)
        programs = refusing(tools["limit"], "scontrol")
        limit = start("limit", args=args, slurm={"partition": "closing", **programs})
        cluster.run(
            "scontrol", "update", "PartitionName=closing", "State=DRAIN"
        )  # nobody may submit there now
        missing = start("missing", args=args, slurm=hiding(tmp_path / "tools-limit", "scontrol"))
        bare = start("bare", args=args, slurm=hiding(tmp_path, "sbatch"), chain={"handoff": "resubmit"})
        goes_on, stops = (missing, hanging), (limit, slow, bare)

        words = command_to_go_on(limit, "no way of handing over was left")
        cluster.run("scontrol", "update", "PartitionName=closing", "State=UP")
        cluster.wait_job(jobs_of(limit)[0], "COMPLETING")
        limit.command(*words)  # waits until that job has left the queue
        for chain in (slow, bare):
            words = command_to_go_on(chain, "no way of handing over was left")
            assert cluster.wait_job(jobs_of(chain)[0])["ExitCode"] == "75:0"
            chain.command(*words)
        for chain in (*goes_on, *stops):
            chain.wait_done(120)
            assert_same(chain, reference)
            assert len(chain.events("segment")) == 2
        assert "scontrol is not on PATH" in refusals(missing)["requeue"]
        assert "scontrol did not answer within" in refusals(hanging)["requeue"]
        assert "not on this node" in refusals(limit)["requeue"]
        assert "sbatch refused the job" in refusals(limit)["resubmit"]
        assert "sbatch did not answer within" in refusals(slow)["resubmit"]
        assert "sbatch is not on PATH" in refusals(bare)["resubmit"]
        assert missing.events("handoff")[-1]["how"] == "resubmit"


@beside
def test_signals_and_limits_that_change(tmp_path):
    """A warning before Python listens, signals twice, a limit made shorter or longer: it stops in time, or goes on."""
    reference = plain(tmp_path, EPOCHS)
    with Cluster.own("--nodes=2", "--cpus=8") as cluster:
        start = Starter(cluster, tmp_path)
        imports = start("imports")
        shorter = start("shorter", slurm={"lead": "40s"}, args={"nap": 0.9})
        longer = start("longer", slurm={"lead": "15s", "time": "1min"}, args={"nap": 1.2})
        # at a boundary whose save has just begun
        every = {"every": {"steps": 1}}
        twice = start("twice", checkpoint=every, args={"trouble": {"how": "signals", "after": 4}})
        for chain, minutes in ((longer, 20), (shorter, 1)):
            chain.wait(lambda chain=chain: chain.events("start"), 60, "the start")
            cluster.run("scontrol", "update", f"JobId={jobs_of(chain)[0]}", f"TimeLimit={minutes}")
        for _ in range(40):  # also before Python's first line, if a little late for that after the others
            if imports.events("segment"):
                break
            cluster.run("scancel", "--signal=USR2", jobs_of(imports)[0], check=False)
        shorter.wait(lambda: shorter.events("handoff"), 90, "the stop before the shortened limit")
        cluster.run("scontrol", "update", f"JobId={jobs_of(shorter)[0]}", "TimeLimit=20")
        for chain in (imports, shorter, longer, twice):
            chain.wait_done(200)
            assert_same(chain, reference)
            assert not chain.events("lost")
        assert len(longer.events("segment")) == 1
        assert shorter.events("stop")[0]["reason"] == "walltime"
        assert [event["reason"] for event in twice.events("stop")] == ["terminated"]


@beside
def test_a_lost_node_and_the_orphan_it_leaves(tmp_path):
    """A node that goes down, or loses its slurmd: the job goes on elsewhere, and the orphan beside it writes nothing."""
    reference = plain(tmp_path, EPOCHS)
    options = [
        "--slurm-conf-extra=PartitionName=weak Nodes=n[1-2] MaxTime=INFINITE State=UP",
        "--slurm-conf-extra=PartitionName=frail Nodes=n[3-4] MaxTime=INFINITE State=UP",
        "--slurm-conf-extra=SlurmdTimeout=31",
    ]
    with Cluster.own("--nodes=4", "--cpus=8", *options) as cluster:
        start = Starter(cluster, tmp_path)
        every = {"every": {"steps": 3}}
        down = start("down", slurm={"partition": "weak"}, checkpoint=every, args={"nap": 0.4})
        orphaned = start("orphaned", slurm={"partition": "frail"}, checkpoint=every, args={"nap": 2.2})
        down.wait(lambda: down.events("checkpoint"), 90, "the first checkpoint")
        (node,) = down.events("start")[0]["nodes"]
        for state in (
            "DRAIN",
            "DOWN",
        ):  # a node that is only down comes back at once, while the old job still dies
            cluster.run("scontrol", "update", f"NodeName={node}", f"State={state}", "Reason=test")
        orphaned.wait(lambda: orphaned.events("checkpoint"), 90, "the first checkpoint")
        (node,) = orphaned.events("start")[0]["nodes"]
        orphan = json.loads((orphaned.run / "lock").read_text())["pid"]
        dies = (f"slurmd {node}", f"slurmstepd: [{jobs_of(orphaned)[0]}.")
        for pid, kind in SlurmFolder(cluster.dir).processes().items():
            if kind.startswith(dies):
                os.kill(pid, signal.SIGKILL)

        orphaned.wait(lambda: len(orphaned.events("segment")) == 2, 120, "the second start")
        assert Path(f"/proc/{orphan}").exists()  # or there was nobody to keep from writing
        orphaned.wait(lambda: not Path(f"/proc/{orphan}").exists(), 60, "the orphan's end")
        for chain in (down, orphaned):
            chain.wait_done(200)
            assert_same(chain, reference)
            nodes = [event["nodes"] for event in chain.events("start")]
            assert len(nodes) == 2
            assert nodes[0] != nodes[1]
            events = chain.events("segment", "checkpoint")
            assert [event["segment"] for event in events] == sorted(event["segment"] for event in events)
        assert [event["segment"] for event in orphaned.events("lost")] == [1]
        metrics = [json.loads(line) for line in (orphaned.run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in metrics] == list(range(1, 12 * EPOCHS + 1))
