"""chainrun from Python: chains from a script, checkpoints by hand, a `Run` in a unit test."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import chainrun
from chainrun.errors import CheckpointError, UsageError

SCRIPT = """
import json, sys
import torch
import chainrun

def train(run, n):
    weight = torch.nn.Linear(2, 2)
    run.register(weight=weight)
    for i in run.steps(n):
        with torch.no_grad():
            weight.weight.add_(torch.rand(2, 2))
        run.log(sum=weight.weight.sum())
    return {"sum": weight.weight.sum(), "segments": run.segment}

if __name__ == "__main__":
    chain = chainrun.run(train, args={"n": 9}, name=sys.argv[1], dir="runs", interrupt_at=json.loads(sys.argv[2]))
    print(json.dumps([chain.state, chain.result(), [c.step for c in chain.checkpoints]]))
"""


def test_a_function_of_a_script_is_run_as_a_chain(tmp_path):
    """`chainrun.run` carries a function of the script itself through cuts, to the same result."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    results = []
    for name, cuts in (("cut", "[2, 5]"), ("whole", "[]")):
        done = subprocess.run(
            [sys.executable, str(script), name, cuts],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        results.append(json.loads(done.stdout))
    (state, cut, checkpoints), (_, whole, _) = results
    assert state == "done"
    assert checkpoints == [9, 5]
    assert (cut["segments"], whole["segments"]) == (3, 1)
    assert cut["sum"] == whole["sum"]


def test_a_function_that_no_job_could_find_is_refused(tmp_path):
    """A lambda or an inner function has no name that another process could import."""
    with pytest.raises(UsageError, match="top level of a file"):
        chainrun.run(lambda run: None, name="x", dir=str(tmp_path))


def training(run: chainrun.Run, steps: int = 4) -> torch.nn.Module:
    model = torch.nn.Linear(2, 1)
    run.register(model=model)
    for _ in run.steps(steps):
        with torch.no_grad():
            model.weight.add_(torch.rand(1, 2))
        run.save()
    return model


def test_a_run_works_in_a_unit_test_and_a_second_one_goes_on(tmp_path):
    """No SLURM, no experiment file: a folder is enough, and it is a run directory."""
    torch.manual_seed(0)
    whole = training(chainrun.Run(tmp_path / "whole"), 6).weight
    torch.manual_seed(0)
    first = chainrun.Run(tmp_path / "run")
    assert (first.global_step, first.resumed, first.rank, first.is_main) == (0, False, 0, True)
    assert first.time_left() == float("inf")
    training(first)
    torch.manual_seed(99)
    second = chainrun.Run(tmp_path / "run")
    assert (second.global_step, second.resumed) == (4, True)
    assert torch.equal(training(second, 6).weight, whole)


def test_a_checkpoint_is_opened_without_the_launcher(tmp_path):
    """`chainrun.Checkpoint` and plain torch give the registered state_dicts; a changed byte is found."""
    run = chainrun.Run(tmp_path)
    weight = training(run).weight
    path = max((tmp_path / "checkpoints").iterdir())
    checkpoint = chainrun.Checkpoint(path)
    checkpoint.verify()
    assert checkpoint.manifest["step"] == 4
    assert torch.equal(checkpoint.load()["model"]["weight"], weight)
    plain = torch.load(path / "rank-00000.pt", weights_only=True)
    assert torch.equal(plain["objects"]["model"]["weight"], weight)
    with pytest.raises(CheckpointError, match="no rank 1"):
        checkpoint.load(rank=1)
    data = bytearray((path / "rank-00000.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "rank-00000.pt").write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        checkpoint.load()
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        chainrun.Checkpoint(tmp_path / "nothing")


def test_the_public_names_are_few_and_all_there():
    """What `__all__` lists can be imported; another name is told what there is."""
    for name in chainrun.__all__:
        assert getattr(chainrun, name) is not None
    with pytest.raises(AttributeError, match="it has Chain"):
        chainrun.Trainer  # noqa: B018
