"""Weights & Biases, MLflow and TensorBoard see one run over a chain; offline, and read back from their files.

Each example is cut at step 3 as by a walltime, fails at step 7 after a checkpoint at step 6, and goes on: step 7 is
trained twice.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chainrun import journal
from chainrun.rundir import RunDir

EXAMPLES = Path(__file__).parents[1] / "examples" / "trackers"
STEPS = 9
# three segments in one process: one import of torch, and of what the tracker brings
SEGMENTS = """
import os, pathlib, sys
import chainrun
from chainrun import experiment
from chainrun.allocation import Allocation
from chainrun.launch import submit
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

step = chainrun.Run.step
def failing(run, **metrics):
    if run.global_step == 7 and run.segment == 2:
        raise RuntimeError("planted")
    step(run, **metrics)
chainrun.Run.step = failing
described = experiment.load(pathlib.Path(sys.argv[1]), ["args.steps=9", "checkpoint.every={steps: 3}"])
for number in (1, 2, 3):
    run, _ = submit.prepare(described, pathlib.Path(sys.argv[1]).parent)
    at = frozenset([3] if number == 1 else [])
    outcome = run_segment(run, Allocation(scheduler="local", job=str(number), interrupt_at=at), Signals())
    for name in [] if "keep" in sys.argv else ["WANDB_RUN_ID", "WANDB_RESUME"]:
        del os.environ[name]  # as in a process of its own
    print("outcome", outcome.kind)
"""


def train(name: str, folder: Path, *words: str, **environment: str) -> RunDir:
    """Run the three segments of an example; return its run directory."""
    done = subprocess.run(
        [sys.executable, "-c", SEGMENTS, str(EXAMPLES / f"with_{name}.yaml"), *words],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    kinds = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("outcome")]
    assert kinds == ["stopped", "failed", "done"], done.stdout + done.stderr
    run = RunDir(folder / "runs" / f"with_{name}")
    assert [event["step"] for event in journal.events(run, "segment")] == [0, 3, 6]
    return run


def losses(run: RunDir) -> dict[int, float]:
    """Return what chainrun's own metrics say, each step once."""
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {line["step"]: line["loss"] for line in lines}


def test_tensorboard_purges_what_was_logged_after_the_checkpoint(tmp_path):
    """Three event files read back as one curve: every step once, with chainrun's own values."""
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train("tensorboard", tmp_path)
    assert len(list((run.path / "tensorboard").glob("events.*"))) == 3
    curve = accumulators.EventAccumulator(str(run.path / "tensorboard")).Reload().Scalars("loss")
    assert [point.step for point in curve] == list(range(1, STEPS + 1))
    assert {point.step: point.value for point in curve} == pytest.approx(losses(run))
    unpurged = accumulators.EventAccumulator(str(run.path / "tensorboard"), purge_orphaned_data=False)
    assert [point.step for point in unpurged.Reload().Scalars("loss")].count(7) == 2  # it was there twice


def test_mlflow_goes_on_with_one_run_and_logs_no_step_twice(tmp_path):
    """A SQLite store has one run for the chain, and every step once in it."""
    for needed in ("mlflow", "sqlalchemy", "alembic"):
        pytest.importorskip(needed)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    run = train("mlflow", tmp_path, MLFLOW_TRACKING_URI=uri)
    import sqlite3

    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        tags = list(database.execute("select run_uuid, value from tags where key = 'chainrun'"))
        found = list(
            database.execute("select run_uuid, step, value from metrics where key = 'loss' order by step")
        )
    ((uuid, tag),) = tags
    assert tag == journal.last(run, "created")["id"]
    assert {row[0] for row in found} == {uuid}
    assert [row[1] for row in found] == list(range(1, STEPS + 1))
    assert {row[1]: row[2] for row in found} == losses(run)


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a `.wandb` file: protobuf in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, text, block = file.read_bytes(), 7, b"", 32768
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        text += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(text)
            text = b""
            yield record


def history(file: Path) -> tuple[str, dict[int, float]]:
    """Return the run id in a `.wandb` file, and its losses by step."""
    ids, points = set(), {}
    for record in records(file):
        if record.HasField("run"):
            ids.add(record.run.run_id)
        elif record.HasField("history"):
            items = {
                item.nested_key[0] if item.nested_key else item.key: item for item in record.history.item
            }
            points[int(items["_step"].value_json)] = float(items["loss"].value_json)
    (found,) = ids
    return found, points


def test_wandb_gets_one_id_and_a_planned_cut_doubles_no_step(tmp_path):
    """Offline, each segment has a file under the run's id. Only the step after the crash is in two, with one value."""
    pytest.importorskip("wandb")
    run = train("wandb", tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    files = sorted((run.path / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    found = [history(file) for file in files]
    assert {name for name, _ in found} == {journal.last(run, "created")["id"]}
    assert [list(points) for _, points in found] == [[1, 2, 3], [4, 5, 6, 7], [7, 8, 9]]
    assert found[1][1][7] == found[2][1][7]
    assert {step: value for _, points in found for step, value in points.items()} == losses(run)


def test_an_id_of_ones_own_is_left_alone(tmp_path):
    """WANDB_RUN_ID from outside counts."""
    pytest.importorskip("wandb")
    own = {"WANDB_RUN_ID": "mine", "WANDB_RESUME": "must"}
    run = train("wandb", tmp_path, "keep", WANDB_MODE="offline", WANDB_SILENT="true", **own)
    files = list((run.path / "wandb").glob("offline-run-*/*.wandb"))
    assert {history(file)[0] for file in files} == {"mine"}
