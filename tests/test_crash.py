"""Runs whose processes are killed with SIGKILL, at random instants, again and again, most often in a save.

CHAINRUN_KILLS=1000 kills more often (`make crash`), CHAINRUN_SEED=… repeats the delays of an earlier run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from chainrun.checkpoint.public import Checkpoint
from chainrun.checkpoint.store import Store, flaw
from chainrun.rundir import RunDir

FAULTS = Path(__file__).parent / "faults"
sys.path.insert(0, str(FAULTS))
import train as training  # noqa: E402

EVERY = 3  # steps from save to save
KILLS = int(os.environ.get("CHAINRUN_KILLS", "16"))
SEED = int(os.environ.get("CHAINRUN_SEED", str(time.time_ns() % 1_000_000)))


def describe(folder: Path, steps: int, **keys) -> Path:
    """Write an experiment file; return its path. The run is FOLDER/runs/NAME, the file's name."""
    args = {"trace": str(folder / "trace"), "steps": steps, **keys.pop("args", {})}
    described = {
        "function": f"{FAULTS / 'train.py'}:train",
        "args": args,
        "dir": str(folder / "runs"),
        "checkpoint": {"every": {"steps": EVERY}},
        **keys,
    }
    folder.mkdir(exist_ok=True)
    file = folder / "crash.yaml"
    file.write_text(json.dumps(described))
    return file


def created(file: Path) -> RunDir:
    """Make the run of an experiment file as `chainrun run` does, without starting it."""
    from chainrun import experiment
    from chainrun.launch import submit

    return submit.prepare(experiment.load(file), file.parent)[0]


def kills(run: RunDir, trace: Path, count: int, log: Path, ranks: int = 1) -> subprocess.Popen:
    """Start tests/faults/kills.py; its report goes to `log`."""
    numbers = [str(number) for number in (count, SEED, ranks)]
    command = [sys.executable, str(FAULTS / "kills.py"), str(run.path), f"{trace}.0", *numbers]
    with open(log, "w") as file:
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)


def plain(folder: Path, steps: int) -> subprocess.Popen:
    """Start the program that never heard of chainrun."""
    return subprocess.Popen([sys.executable, str(FAULTS / "train.py"), str(folder / "plain"), str(steps)])


def assert_finished_as_if_nothing_had_happened(run: RunDir, folder: Path, ranks: int = 1) -> None:
    """Compare a finished run with the plain program, bit for bit, and its metrics with its steps."""
    expected = training.read(folder / "plain.0")
    for rank in range(ranks):
        assert training.read(folder / f"trace.{rank}") == expected
    newest = Store(run).newest()
    assert newest is not None
    assert newest.step == len(expected)
    final = torch.load(folder / "plain.pt", weights_only=True)
    for rank in range(ranks):
        saved = Checkpoint(newest.path).load(rank)["model"]
        assert saved.keys() - {"ballast"} == final.keys()
        assert all(torch.equal(saved[key], final[key]) for key in final)
    metrics = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(expected)
    assert [line["loss"].hex() for line in metrics] == [line["loss"] for line in expected.values()]


def kind(before: dict, after: dict) -> str:
    """Say what a kill interrupted."""
    newest = max(after["committed"], default="")
    if after["segments"] == before["segments"]:
        return "a start"
    for name, files in after["unfinished"].items():
        if name > newest:
            last = int(name[5:13]) == after["stop_at"]
            stage = (
                "the manifest"
                if any("manifest" in file for file in files)
                else "a file"
                if files
                else "the beginning"
            )
            return f"a {'final' if last else 'periodic'} save at {stage}"
    if newest and [newest] != after["told"][-1:]:
        return "a save just committed"
    # one retired directory, with nothing but the ranks' files, is kept for the next save
    left = [files for files in after["unfinished"].values() if not files or "manifest.json" in files]
    if left or len(after["unfinished"]) > 1 or len(after["committed"]) > 2:
        return "a removal"
    return "a step" if os.WIFSIGNALED(after["statuses"][0]) else "nothing, it was over"


@pytest.mark.parametrize(("ranks", "count"), [(1, KILLS - KILLS // 4), (2, KILLS // 4)])
def test_a_run_killed_over_and_over_loses_only_what_came_after_its_newest_checkpoint(tmp_path, ranks, count):
    """After every kill all checkpoints are whole, and the finished run is, bit for bit, the program never killed.

    Of two ranks one dies first, and the other lives on for a moment, or both die at once.
    """
    steps = 20 * (4 + count // 2)
    hold = tmp_path / "hold"
    hold.touch()
    run = created(describe(tmp_path, steps, args={"hold": str(hold), "ballast": 5_000_000}))
    killing = kills(run, tmp_path / "trace", count, tmp_path / "report", ranks)
    program = plain(tmp_path, steps)
    try:
        while killing.poll() is None:
            time.sleep(0.1)
            if (tmp_path / "report").read_text().count("\n") >= count:
                hold.unlink(missing_ok=True)
        assert killing.returncode == 0, (tmp_path / "report").read_text()
        assert program.wait(300) == 0
    finally:
        for process in (killing, program):
            process.kill()
            process.wait()

    report = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert len(report) == count + 1
    before = {"segments": 0, "step": 0}
    hit: Counter[str] = Counter()
    for number, after in enumerate(report[:-1]):
        note = f"kill {number}, CHAINRUN_SEED={SEED} CHAINRUN_KILLS={KILLS}: {after}"
        assert not after["failed"], note
        first, *others = after["statuses"]
        # a segment that was to stop may have been faster; a rank may see that the other one has died
        assert os.WIFSIGNALED(first) or (after["stop_at"] and os.WEXITSTATUS(first) == 75), note
        assert all(os.WIFSIGNALED(one) or os.WEXITSTATUS(one) in (1, 75) for one in others), note
        assert after["flaws"] == [], note
        assert after["step"] >= before["step"], note
        assert set(after["told"][-1:]) <= set(after["committed"]), (
            note
        )  # what the journal has told of is there
        assert after["done"] - after["step"] <= 2 * EVERY, (
            note
        )  # one save may be under way when the next is due
        hit[kind(before, after)] += 1
        before = after
    print(f"\nCHAINRUN_SEED={SEED}: {count} kills of {ranks} rank(s) hit {dict(sorted(hit.items()))}")
    if count >= 100:  # fewer may miss one of them by chance
        for what in ("a start", "a step", "a periodic save", "a final save"):
            assert sum(n for one, n in hit.items() if one.startswith(what)) >= count / 50, hit
    assert report[-1]["statuses"] == [0] * ranks, (run.jobs / f"{count:06d}_0_log.out").read_text()
    assert report[-1]["unfinished"] == {}

    assert_finished_as_if_nothing_had_happened(run, tmp_path, ranks)
    losses = [float.fromhex(line["loss"]) for line in training.read(tmp_path / "plain.0").values()]
    assert json.loads(run.result.read_text())["sum"] == sum(losses)
    left = {path.name for path in run.path.iterdir()}
    assert left == {
        "experiment.yaml",
        "checkpoints",
        "jobs",
        "journal.jsonl",
        "metrics.jsonl",
        "result.json",
        "DONE",
        "code",
        "code.json",
        "environment.json",
    }


def test_the_command_survives_the_death_of_all_its_processes(tmp_path):
    """Launcher, controller, two ranks and their workers die together; the same command goes on each time."""
    steps, chance = 150, random.Random(SEED)
    file = describe(tmp_path, steps, args={"nap": 0.02}, local={"tasks": 2})
    run = RunDir(tmp_path / "runs" / "crash")
    command = [sys.executable, "-m", "chainrun", "run", str(file)]
    killed = 0
    with open(tmp_path / "log", "w") as log, plain(tmp_path, steps) as program:
        for delay in [chance.uniform(2.5, 5.5) for _ in range(3)]:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            time.sleep(delay)
            if process.poll() is not None:
                break
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            checkpoints = Store(run).committed()
            assert [flaw(checkpoint) for checkpoint in checkpoints] == [None] * len(checkpoints)
        done = subprocess.run(
            command, check=False, stdout=log, stderr=log, start_new_session=True, timeout=100
        )
    assert killed, f"CHAINRUN_SEED={SEED}: the run was over before the first kill"
    assert done.returncode == 0, f"CHAINRUN_SEED={SEED}\n{(tmp_path / 'log').read_text()}"
    assert program.returncode == 0
    assert_finished_as_if_nothing_had_happened(run, tmp_path, ranks=2)
    # what the newest line says of the start is where the disk was
    starts = [json.loads(line) for line in run.journal.read_text().splitlines()]
    starts = [line for line in starts if line["event"] == "segment"]
    assert starts[-1]["checkpoint"] == (f"step-{starts[-1]['step']:08d}" if starts[-1]["step"] else None)
