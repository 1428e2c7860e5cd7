"""A chain by a script of one's own, slurm/chain.sbatch, on a real SLURM."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from test_slurm import Chain, assert_same, plain

from chainrun.launch import sbatch

SCRIPT = Path(__file__).parents[1] / "slurm" / "chain.sbatch"


@pytest.mark.slurm
def test_a_chain_by_the_template_is_requeued_and_equals_the_plain_program(slurm_cluster, tmp_path):
    """One cut, one requeue under the same job id; logs and status work; given again, it finds the run done."""
    reference = plain(tmp_path, 3)
    chain = Chain(slurm_cluster, tmp_path, args={"epochs": 3, "nap": 0.3})
    slurm_cluster.env["PYTHON"] = sys.executable
    words = ["--parsable", "--time=5", "--cpus-per-task=1", f"--output={tmp_path}/batch", str(SCRIPT)]
    try:
        job = slurm_cluster.run("sbatch", *words, str(chain.file), "seed=0", cwd=tmp_path).stdout.strip()
        chain.wait(chain.trace.with_suffix(".0").exists, 60, "the first step")
        slurm_cluster.run("scancel", "--signal=USR2", job)
        chain.wait_done(90)
        slurm_cluster.wait_job(job, {"COMPLETED"}, 30)
        again = slurm_cluster.run("sbatch", *words, str(chain.file), "seed=0", cwd=tmp_path).stdout.strip()
        slurm_cluster.wait_job(again, {"COMPLETED"}, 60)
    finally:
        del slurm_cluster.env["PYTHON"]
    assert_same(chain, reference)
    assert [(e["job"], e["restart"]) for e in chain.events("segment")] == [(job, 0), (job, 1)]
    (submitted,) = chain.events("submitted")
    assert (submitted["job"], submitted["command"]) == (job, f"sbatch {SCRIPT} {chain.file} seed=0")
    assert [event["how"] for event in chain.events("handoff")] == ["requeue"]
    said = chain.command("logs", str(chain.run))
    assert "segment 1: fresh start" in said
    assert "segment 2: resuming at step" in said


@pytest.mark.parametrize(
    ("words", "job", "message"),
    [
        ([], "1", "found nothing; usage: python -m chainrun.launch.sbatch open EXP"),
        (["fly", "x"], "1", "found fly x; usage: "),
        (["open", "train.yaml"], None, "this is no SLURM job: open is for a script given to sbatch"),
        (["open", "train.yaml"], "1", "train.yaml: cannot be read: No such file or directory"),
    ],
)
def test_the_entry_for_scripts_says_what_is_wrong(words, job, message, monkeypatch, capsys, tmp_path):
    """Exit code 2 and one line, on which the script ends; nothing is made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    if job:
        monkeypatch.setenv("SLURM_JOB_ID", job)
    assert sbatch.main(words) == 2
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == []
