"""The report of a chain that a real SLURM has cut in three ways, kept for people to look at.

``artifacts/report/`` has the page and its picture after a run of this test; `make screenshot` shows them in Chromium.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster, beside, require_slurm
from test_report import check, rows
from test_slurm import Chain, assert_same, plain

from chainrun.report.look import NOTHING
from chainrun.rundir import read_json

sys.path.insert(0, str(Path(__file__).parent.parent / "slurm"))
from folder import Cluster as SlurmFolder

pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm")]
KEPT = Path(__file__).parent.parent / "artifacts" / "report"
LOW = "PartitionName=low Nodes=ALL PriorityTier=1 GraceTime=10 MaxTime=INFINITE State=UP"
EVERY = 10  # steps between two saves
EPOCHS, NAP = 9, 1.0  # 108 steps: a walltime has no room for what is left of them after two cuts


def held(chain: Chain) -> dict:
    """Return what the running segment says of itself."""
    return read_json(chain.run / "lock") or {}


def has_unsaved_steps(chain: Chain) -> bool:
    """Whether the run says that it is some steps past its newest checkpoint, with the next one some way off."""
    step, saved = held(chain).get("step", 0), chain.events("checkpoint")[-1]["step"]
    return step >= saved + 2 and step % EVERY <= EVERY - 4


def lose_power(cluster: Cluster, node: str, job: str, rank: int) -> None:
    """Kill all that runs on a node at once, and let SLURM know without its usual five minutes."""
    dies = (f"slurmd {node}", f"slurmstepd: [{job}.")
    doomed = [pid for pid, kind in SlurmFolder(cluster.dir).processes().items() if kind.startswith(dies)]
    for pid in (*doomed, rank):
        os.kill(pid, signal.SIGKILL)
    cluster.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")


@beside
def test_a_chain_cut_by_preemption_node_failure_and_walltime_is_shown_as_that(tmp_path: Path) -> None:
    """Each segment's row says what ended it, lost work and handoffs have their price, and the run is exact all the same."""
    require_slurm()
    options = ("--nodes=3", "--fast-signals", "--profile=preempt", "--slurm-conf-extra", LOW)
    cluster = Cluster.up(*options)
    try:
        chain = Chain(
            cluster,
            tmp_path,
            args={"epochs": EPOCHS, "nap": NAP},
            checkpoint={"every": {"steps": EVERY}},
            slurm={"time": "1min", "partition": "low", "cpus_per_task": 4},
        )
        job = chain.submit()
        reference = plain(tmp_path, EPOCHS)

        chain.wait(lambda: chain.events("trains"), 90, "the first step")
        (node,) = chain.events("start")[0]["nodes"]
        other = (
            "--partition=high",
            "--cpus-per-task=4",
            f"--nodelist={node}",
            "--output=/dev/null",
            "--wrap=:",
        )
        cluster.run("sbatch", *other)

        chain.wait(lambda: len(chain.events("trains")) == 2, 120, "the second segment")
        chain.wait(lambda: has_unsaved_steps(chain), 90, "steps after a checkpoint")
        (node,) = chain.events("start")[1]["nodes"]
        lose_power(cluster, node, job, held(chain)["pid"])

        chain.wait_done(300)
        assert_same(chain, reference)
        said = chain.command("report", str(chain.run))
        assert said.split() == [str(chain.run / "report.html"), str(chain.run / "report.png")]
    finally:
        cluster.down()
    KEPT.mkdir(parents=True, exist_ok=True)
    for name in ("report.html", "report.png", "journal.jsonl"):
        shutil.copy(chain.run / name, KEPT)

    html = (KEPT / "report.html").read_text()
    check(html)
    heads, *found = rows(html, "Segments")
    column = {head: index for index, head in enumerate(heads)}
    ends = [row[column["ended by"]] for row in found]
    assert ends[0].startswith("preemption SLURM took its nodes for another job"), ends
    assert ends[1].startswith("node failure SLURM took the job from a node that had failed"), ends
    assert set(ends[2:-1]) == {"walltime"}, ends
    assert ends[-1] == "done"
    assert [row[column["lost"]] != NOTHING for row in found] == [False, True, *[False] * (len(found) - 2)]
    assert int(found[1][column["lost"]].split()[0]) >= 1
    for label in ("preemption", "node failure", "walltime", "done"):
        assert re.search(rf"<text [^>]*>{label}", html), label  # in the timeline too
    heads, *handoffs = rows(html, "What each handoff cost")
    assert [row[1] for row in handoffs] == [end.partition(" SLURM")[0] for end in ends[:-1]]
    assert [row[2] for row in handoffs] == ["requeue", "SLURM, by itself", *["requeue"] * (len(found) - 3)]
    assert "hold" in heads[4]
    assert all(float(re.match(r"[\d.]+", row[4])[0]) > 0 for row in handoffs)
