"""chainrun from Python: chains from a script, checkpoints by hand, a `Run` in a unit test."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest
import torch

import chainrun
from chainrun import shipped
from chainrun.errors import CheckpointError, UsageError
from chainrun.rundir import RunDir
from chainrun.shipped import ship

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


PROMPT = """\
import json, torch, chainrun

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8
    def __getitem__(self, index):
        return torch.rand(2) + SCALE * index

SCALE = 2
def loss_of(model, x):
    return model(x).sum()

def train(run, epochs):
    model = torch.nn.Linear(2, 1)
    loader = chainrun.DataLoader(Data(), batch_size=2, num_workers=1, multiprocessing_context="spawn")
    run.register(model=model, loader=loader)
    seen = run.state.setdefault("seen", [])
    for _ in run.epochs(epochs):
        for x in loader:
            seen.append(float(loss_of(model, x)))
            run.step()
    return {"seen": seen, "segments": run.segment}

chain = chainrun.run(train, args={"epochs": 1}, dir="runs", interrupt_at=[2])
print("result", json.dumps([chain.state, chain.result()]))
again = chainrun.run(train, args={"epochs": 1}, name="whole", dir="runs")
print("result", json.dumps([again.state, again.result()]))
"""


def test_a_function_of_a_prompt_is_taken_along_with_what_it_uses(tmp_path):
    """No file holds it: the jobs, and loader workers that are spawned, have it from the run directory."""
    done = subprocess.run(
        [sys.executable, "-i"],
        input=PROMPT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    results = [
        json.loads(line.partition("result ")[2]) for line in done.stdout.splitlines() if "result " in line
    ]
    (state, cut), (_, whole) = results or pytest.fail(done.stdout + done.stderr)
    assert state == "done"
    assert (cut["segments"], whole["segments"]) == (2, 1)
    assert len(whole["seen"]) == 4
    assert cut["seen"] == whole["seen"]
    names = {path.name for path in (tmp_path / "runs" / "train" / "code").iterdir()}
    assert {"shipped_function.py", "shipped_function.pkl", "shipped_function.json"} <= names


def _cell(text: str, **values) -> dict:
    """Run the text as a notebook runs a cell: in a module that is in no file."""
    scope = {"__name__": "__main__", **values}
    exec(compile(text, "<ipython-input-1-abc>", "exec"), scope)
    return scope


CELL = """
def helper(x):
    return x * {factor}

def train(run, n=2, *, rate=0.1):
    return helper(n) + UNIT
"""


def test_what_changes_in_a_cell_is_named(tmp_path):
    """The same cells run again are no change; another helper or another value is, by its name."""
    run = RunDir(tmp_path).create()
    run.code.mkdir()
    first = ship(_cell(CELL.format(factor=2), UNIT=1)["train"])
    first.write(run)
    assert ship(_cell("\n\n" + CELL.format(factor=2), UNIT=1)["train"]).differences(run) == []
    assert ship(_cell(CELL.format(factor=3), UNIT=1)["train"]).differences(run) == ["helper: changed"]
    assert ship(_cell(CELL.format(factor=2), UNIT=2)["train"]).differences(run) == ["UNIT: changed"]


def test_what_cannot_be_taken_along_is_refused_with_a_reason(tmp_path, monkeypatch):
    """Locks, very large variables and arguments that do not fit, before anything is written."""
    monkeypatch.chdir(tmp_path)
    text = "def train(run, n=1):\n    return THING\n"
    with pytest.raises(UsageError, match=r"train\(\) uses something .*inside of the function"):
        chainrun.run(_cell(text, THING=threading.Lock())["train"])
    monkeypatch.setattr(shipped, "MOST", 1000)
    with pytest.raises(UsageError, match=r"load data inside"):
        chainrun.run(_cell(text, THING=b"x" * 2000)["train"])
    with pytest.raises(UsageError, match=r"unexpected keyword argument 'm'.*train\(run, n=1\)"):
        chainrun.run(_cell(text, THING=1)["train"], args={"m": 1})
    assert not (tmp_path / "runs").exists()


def test_a_chain_that_does_not_finish_says_why(tmp_path, monkeypatch):
    """`result()` raises with the state, the error and where to look; `wait` gives the state."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fails.py").write_text("def train(run):\n    raise ValueError('no luck')\n")
    failed = chainrun.run("fails.py:train", dir="runs")
    assert (failed.state, failed.wait(0)) == ("failed", "failed")
    assert repr(failed) == f"<Chain {tmp_path}/runs/train: failed>"
    with pytest.raises(chainrun.ChainFailed, match=r"is failed: ValueError: no luck.*chainrun logs"):
        failed.result()
    assert failed.checkpoints == []
    failed.cancel()
    with pytest.raises(UsageError, match="is not a run directory"):
        chainrun.Chain(tmp_path / "nothing")


USER = """
from pathlib import Path

import torch

import chainrun


def train(run: chainrun.Run, lr: float = 0.1) -> dict[str, float]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data = torch.utils.data.TensorDataset(torch.rand(4, 2))
    loader = chainrun.DataLoader(data, batch_size=2, shuffle=True)
    run.register(model=model, optimizer=optimizer, loader=loader)
    best: float = run.state.get("best", 0.0)
    for epoch in run.epochs(2):
        for (x,) in loader:
            loss = model(x).sum()
            run.step(loss=loss)
    step: int = run.global_step
    where: Path = run.dir
    return {"best": best, "step": float(step), "epoch": float(epoch), "length": float(len(str(where)))}


chain: chainrun.Chain = chainrun.submit(train, args={"lr": 0.1}, slurm={"time": "4h"})
state: str = chain.wait(timeout=10.0)
steps: list[int] = [one.step for one in chain.checkpoints]
here: chainrun.Chain = chainrun.run(train, walltime=20, interrupt_at=[3])
exact: bool = chainrun.verify(train, steps=4).exact
chainrun.Checkpoint(here.path).verify()
"""


def test_a_users_program_passes_strict_type_checking(tmp_path):
    """The package is typed for others: mypy --strict has nothing to say about a program that uses all of it."""
    (tmp_path / "user.py").write_text(USER)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
