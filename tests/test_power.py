"""The power is cut at any moment: what was committed is there, whole, and the training goes on from it.

The disk after the cut is rebuilt from a log of all that a real run did to it (faults/power.py). CHAINRUN_CUTS=5000
looks at more of them, CHAINRUN_SEED=… at the same ones again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import disk
import pytest
import torch
from chain import memory

from chainrun import journal
from chainrun.checkpoint.public import Checkpoint
from chainrun.checkpoint.store import Store
from chainrun.rundir import RunDir
from chainrun.training import rng
from chainrun.training.run import Run
from chainrun.training.saving import Setting

sys.path.insert(0, str(disk.FAULTS))
import power
import steps as training

CUTS = int(os.environ.get("CHAINRUN_CUTS", "40"))
SEED = int(os.environ.get("CHAINRUN_SEED", str(time.time_ns() % 1_000_000)))
STEPS = 9
KEEP = 2


def logged(folder: Path, ranks: int) -> tuple[Path, list[power.Call]]:
    """Train, in two segments, with a save at every step; return the root of the disk, and all that was done to it."""
    root, log = folder / "disk", folder / "log"
    root.mkdir()
    described = {
        "function": f"{disk.FAULTS / 'steps.py'}:train",
        "args": {"steps": STEPS},
        "dir": str(root / "runs"),
        "checkpoint": {"every": {"steps": 1}, "keep": KEEP},
        "local": {"tasks": ranks},
    }
    (folder / "power.yaml").write_text(json.dumps(described))
    command = [sys.executable, "-m", "chainrun", "run", str(folder / "power.yaml"), "--interrupt-at", "4"]
    environment = disk.environment(disk.shim(folder), root, log)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root, power.read(log)


def expected() -> dict[int, dict]:
    """Return the losses by step of the training that nothing happens to."""
    rng.seed_all(0)
    parts = training.parts()
    return {step: {"step": step, "loss": training.learn(*parts)} for step in range(STEPS)}


class Promise:
    """What was said to be safe, at a moment of the log."""

    def __init__(self, calls: list[power.Call]) -> None:
        events = [(number, json.loads(line)) for number, line in power.lines(calls, "journal.jsonl")]
        self._commits = [(n, event["path"]) for n, event in events if event["event"] == "checkpoint"]
        assert len(self._commits) == STEPS + 1  # one a step, and the last one of all

    def at(self, call: int) -> list[str]:
        """Return the names of the checkpoints that had been told of when so many calls had been made, oldest first."""
        return [name for number, name in self._commits if number < call]


def look(run: RunDir, promised: list[str], metrics: dict[int, dict], ranks: int, note: str) -> Path | None:
    """Check what a cut has left; return the newest checkpoint."""
    store, flaws = Store(run), []
    newest = store.newest(lambda checkpoint, why: flaws.append((checkpoint.path.name, why)))
    assert flaws == [], note  # nothing torn ever bears the name of a newer checkpoint
    assert newest is not None or not promised, note
    for name in promised[-KEEP:]:
        Checkpoint(run.checkpoints / name).verify()
    if newest is None:
        return None
    assert [newest.path.name] >= promised[-1:], note
    text = run.metrics.read_bytes() if run.metrics.exists() else b""
    assert journal.last(run, "created")["id"] == newest.manifest["run"], note
    for rank in range(ranks):
        Checkpoint(newest.path).load(rank)
        claims = torch.load(newest.path / f"rank-{rank:05d}.pt", weights_only=True)["metrics"]
        assert len(text) >= claims, f"{note}: {claims} bytes of metrics are claimed"
        if rank == 0:
            lines = [json.loads(line) for line in text[:claims].splitlines()]
            assert lines == [metrics[index] for index in range(len(lines))], note
            assert len(lines) == newest.step, note
    return newest.path


def go_on(folder: Path, metrics: dict[int, dict], note: str) -> None:
    """Train to the end what a cut has left, and compare all of its metrics."""
    rng.seed_all(0)
    said: list[str] = []
    run = Run(folder, setting=Setting(save_every_steps=3, keep=KEEP, background=True, say=said.append))
    training.train(run, STEPS)
    run._close()
    assert [line for line in said if "witness" not in line] == [], note
    lines = [json.loads(line) for line in RunDir(folder).metrics.read_text().splitlines()]
    assert lines == list(metrics.values()), note
    assert Store(RunDir(folder)).newest().step == STEPS


@pytest.fixture
def after() -> Iterator[Path]:
    """A folder for what a cut leaves, in memory where that is possible: it is made very often."""
    with tempfile.TemporaryDirectory(prefix="chainrun-power-", dir=memory()) as folder:
        yield Path(folder) / "after"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_power_cut_at_any_moment_loses_nothing_that_was_committed(tmp_path, after, ranks):
    """What the journal had told of is there and whole, nothing torn is taken for it, and the training goes on exactly."""
    root, calls = logged(tmp_path, ranks)
    promise, metrics, chance = Promise(calls), expected(), random.Random(SEED)
    looked_at = sorted(chance.choices(range(len(calls) + 1), k=CUTS))
    watched, done, ends = power.Disk(root), 0, set()
    for number, cut in enumerate(looked_at):
        for call in calls[done:cut]:
            watched.do(call)
        done = cut
        after.mkdir()
        watched.after_cut(after, chance)
        note = f"CHAINRUN_SEED={SEED} CHAINRUN_CUTS={CUTS}, cut {number} after call {cut} of {len(calls)}"
        run = RunDir(after / "runs" / "power")
        newest = look(run, promise.at(cut), metrics, ranks, note)
        ends.add(newest and newest.name)
        if ranks == 1:
            go_on(run.path, metrics, note)
        shutil.rmtree(after)
    for call in calls[done:]:
        watched.do(call)
    print(
        f"\nCHAINRUN_SEED={SEED}: {CUTS} cuts among {len(calls)} calls left {len(ends)} different newest checkpoints"
    )
    after.mkdir()
    watched.as_it_is(after)  # the log lacks nothing: it explains the disk
    assert contents(after / "runs" / "power") == contents(root / "runs" / "power")


def contents(run: Path) -> dict[str, bytes]:
    """Return what is in a run directory, without the logs and the frozen code, which others write."""
    files = (path for path in run.rglob("*") if path.is_file() and not {"jobs", "code"} & set(path.parts))
    return {str(path.relative_to(run)): path.read_bytes() for path in files}
