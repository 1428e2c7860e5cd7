"""Runs whose processes are killed with SIGKILL, at random instants, again and again.

CHAINRUN_KILLS=500 kills more often, CHAINRUN_SEED=… repeats the delays of an earlier run.
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

import torch

from chainrun.checkpoint.store import Store, flaw, rank_file
from chainrun.rundir import RunDir

FAULTS = Path(__file__).parent / "faults"
sys.path.insert(0, str(FAULTS))
import train as training  # noqa: E402

EVERY = 3  # steps from save to save
KILLS = int(os.environ.get("CHAINRUN_KILLS", "50"))
SEED = int(os.environ.get("CHAINRUN_SEED", str(time.time_ns() % 1_000_000)))


def describe(folder: Path, steps: int, every: int | None = EVERY, **keys) -> Path:
    """Write an experiment file; return its path. The run is FOLDER/runs/NAME, the file's name."""
    args = {"trace": str(folder / "trace"), "steps": steps, **keys.pop("args", {})}
    described = {
        "function": f"{FAULTS / 'train.py'}:train",
        "args": args,
        "dir": str(folder / "runs"),
        "checkpoint": {"every": every and {"steps": every}},
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


def kills(run: RunDir, trace: Path, count: int, log: Path) -> subprocess.Popen:
    """Start tests/faults/kills.py; its report goes to `log`."""
    command = [sys.executable, str(FAULTS / "kills.py"), str(run.path), f"{trace}.0", str(count), str(SEED)]
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
        saved = torch.load(newest.path / rank_file(rank), weights_only=True)["objects"]["model"]
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
    if any(name > newest for name in after["unfinished"]):
        return "a save"
    if after["unfinished"] or len(after["committed"]) > 2:
        return "a removal"
    return "a step"


def test_a_run_killed_over_and_over_loses_only_what_came_after_its_newest_checkpoint(tmp_path):
    """After every kill all checkpoints are whole, and the finished run is, bit for bit, one never killed."""
    steps = 26 * KILLS
    hold = tmp_path / "hold"
    hold.touch()
    run = created(describe(tmp_path, steps, args={"hold": str(hold), "ballast": 2_000_000}))
    calm_run = created(describe(tmp_path / "calm", steps, every=None))
    killing = kills(run, tmp_path / "trace", KILLS, tmp_path / "report")
    calm = kills(calm_run, tmp_path / "calm" / "trace", 0, tmp_path / "calm" / "report")
    program = plain(tmp_path, steps)
    try:
        while killing.poll() is None:
            time.sleep(0.1)
            if (tmp_path / "report").read_text().count("\n") >= KILLS:
                hold.unlink(missing_ok=True)
        assert killing.returncode == 0, (tmp_path / "report").read_text()
        assert calm.wait(120) == 0
        assert program.wait(120) == 0
    finally:
        for process in (killing, calm, program):
            process.kill()
            process.wait()

    report = [json.loads(line) for line in (tmp_path / "report").read_text().splitlines()]
    assert len(report) == KILLS + 1
    before = {"segments": 0, "step": 0}
    hit: Counter[str] = Counter()
    for number, after in enumerate(report[:-1]):
        note = f"kill {number} after {after['delay']:.3f} s, CHAINRUN_SEED={SEED}: {after}"
        assert os.WTERMSIG(after["status"]) == signal.SIGKILL, note
        assert after["flaws"] == [], note
        assert after["step"] >= before["step"], note
        assert after["done"] - after["step"] <= EVERY, note
        hit[kind(before, after)] += 1
        before = after
    print(f"\nCHAINRUN_SEED={SEED}: {KILLS} kills hit {dict(hit)}")
    if KILLS >= 50:  # fewer may miss one of them by chance
        assert hit["a start"], hit
        assert hit["a step"], hit
        assert hit["a save"] + hit["a removal"], hit
    assert report[-1]["status"] == 0, (run.jobs / f"{KILLS:06d}_0_log.out").read_text()
    assert report[-1]["unfinished"] == []

    assert_finished_as_if_nothing_had_happened(run, tmp_path)
    assert run.result.read_text() == calm_run.result.read_text()
    assert training.read(tmp_path / "trace.0") == training.read(tmp_path / "calm" / "trace.0")
    left = {path.name for path in run.path.iterdir()}
    assert left == {
        "experiment.yaml",
        "checkpoints",
        "jobs",
        "journal.jsonl",
        "metrics.jsonl",
        "result.json",
        "DONE",
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


HANGS = """
import pathlib, time
import torch
import chainrun

class Items(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        once = pathlib.Path("hung")
        if index == 20 and not once.exists():
            once.touch()
            time.sleep(600)
        return torch.tensor(float(index))

def train(run):
    loader = chainrun.DataLoader(Items(), batch_size=2, num_workers=2)
    run.register(loader=loader)
    for _ in run.epochs(1):
        for x in loader:
            run.step(x=x.sum())
"""


def test_a_worker_that_hangs_does_not_keep_the_segment_from_ending(tmp_path):
    """It was asked for a batch ahead of the cut; the next segment makes that batch."""
    (tmp_path / "hangs.py").write_text(HANGS)
    (tmp_path / "e.yaml").write_text("function: hangs.py:train")
    command = [sys.executable, "-m", "chainrun", "run", "e.yaml", "--interrupt-at", "8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "hung").exists()
    assert "done after 20 steps and 2 segments" in done.stdout + done.stderr
