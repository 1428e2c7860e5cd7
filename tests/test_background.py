"""Periodic saves are written beside the training: of the state at their boundary, in order, none lost."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from chainrun import journal
from chainrun.checkpoint import image
from chainrun.checkpoint.public import Checkpoint
from chainrun.checkpoint.store import Store
from chainrun.checkpoint.writer import Alone
from chainrun.errors import CheckpointError, RegisterError
from chainrun.lock import Locked
from chainrun.rundir import RunDir
from chainrun.training.run import Run
from chainrun.training.saving import Setting
from chainrun.training.stop import SegmentEnd


class Gate(Alone):
    """A group that holds every save up, right before its commit, until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()

    def gather(self, value: Any) -> list[Any] | None:
        if isinstance(value, dict):  # a save's report
            self.reached.set()
            assert self.open.wait(60)
        return [value]


class Bench:
    """A run whose saves are held up; weights are the number of the step."""

    def __init__(self, folder: Path, every: int = 2, **setting: Any) -> None:
        self.gate, self.said = Gate(), []
        self.folder = folder
        self.run = Run(
            folder,
            setting=Setting(
                save_every_steps=every,
                background=True,
                group=self.gate,
                say=self.said.append,
                **setting,
            ),
        )
        self.model = torch.nn.Linear(100, 100)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        self.run.register(model=self.model, optimizer=self.optimizer)

    def step(self, index: int) -> None:
        with torch.no_grad():
            self.model.weight.fill_(index + 1)
        self.run.log(weight=index + 1)

    def saved(self) -> dict[int, float]:
        """Return by step the weight that the committed checkpoints hold."""
        found = Store(RunDir(self.folder)).committed()
        return {each.step: float(Checkpoint(each.path).load()["model"]["weight"][0, 0]) for each in found}


def test_the_training_goes_on_while_a_save_is_written(tmp_path):
    """What is saved is the state of the save's boundary, however far the training has come since."""
    bench = Bench(tmp_path)
    for index in bench.run.steps(4):
        bench.step(index)
        if index == 3:
            assert bench.gate.reached.wait(60)
            assert bench.saved() == {}
            bench.gate.open.set()
    bench.run._close()
    assert bench.saved() == {2: 2.0, 4: 4.0}
    event = next(journal.events(RunDir(tmp_path), "checkpoint"))
    assert event["step"] == 2
    assert event["stall"] >= event["waited"] >= 0


def test_a_save_that_is_due_waits_for_the_one_under_way(tmp_path):
    """None is skipped where it is asked for by its step: the loop waits, and the journal says how long."""
    bench = Bench(tmp_path, every=1)
    threading.Timer(0.5, bench.gate.open.set).start()
    for index in bench.run.steps(3):
        bench.step(index)
    bench.run._close()
    events = list(journal.events(RunDir(tmp_path), "checkpoint"))
    assert [event["step"] for event in events] == [1, 2, 3]
    assert events[1]["waited"] > events[0]["waited"]
    assert bench.saved() == {2: 2.0, 3: 3.0}


def test_a_stop_at_the_boundary_of_a_save_under_way_waits_for_it(tmp_path):
    """It is committed when the segment ends, once."""
    bench = Bench(tmp_path)
    threading.Timer(0.5, bench.gate.open.set).start()
    with pytest.raises(SegmentEnd):
        for index in bench.run.steps(9):
            bench.step(index)
            if index == 1:
                bench.run._setting.watch["signals"].terminated = True
                bench.run._watch.start()
                while not bench.run._watch.pending:
                    time.sleep(0.01)
    bench.run._close()
    assert bench.saved() == {2: 2.0}


@pytest.mark.parametrize(("seconds", "both"), [(599.0, False), (1e6, True), (400.0, True)])
def test_the_last_save_waits_for_the_one_under_way_if_there_is_time_for_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, both: bool
) -> None:
    """Else that one is given up, unless there is no time even for the last one alone: then it is the sooner safe."""
    bench = Bench(tmp_path)
    bench.gate.open.set()
    saving = bench.run._saving
    monkeypatch.setattr(image, "CHUNK", 1 << 12)
    real: Callable[..., int] = os.pwrite
    stopping = threading.Event()
    written = []

    def slow(*args: Any) -> int:
        """Come to a halt in the middle of the file until the segment stops, and on until it is given up."""
        written.append(args)
        if len(written) == 12:
            stopping.wait(30)
            until = time.monotonic() + (0.2 if both else 30)
            while not saving._progress.abandoned and time.monotonic() < until:
                time.sleep(0.01)
        return real(*args)

    monkeypatch.setattr(os, "pwrite", slow)
    with pytest.raises(SegmentEnd):
        for index in bench.run.steps(9):
            bench.step(index)
            if index == 2:
                saving._seconds = 500.0  # that a save takes
                bench.run._watch._end = time.monotonic() + seconds
                bench.run._setting.watch["signals"].terminated = True
                bench.run._watch.start()
                bench.run._watch._end = time.monotonic() + seconds
                while not bench.run._watch.pending:
                    time.sleep(0.01)
                stopping.set()
    bench.run._close()
    assert bench.saved() == ({2: 2.0, 3: 3.0} if both else {3: 3.0})
    unsaved = list(journal.events(RunDir(tmp_path), "unsaved"))
    assert ["given up for the last checkpoint" in event["reason"] for event in unsaved] == [True] * (not both)
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_a_save_that_fails_in_the_background_is_a_warning_and_is_made_again(tmp_path):
    """The training is told, goes on, and a stop at the same boundary makes its own checkpoint."""
    bench = Bench(tmp_path)
    bench.gate.open.set()
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(SegmentEnd):
        for index in bench.run.steps(9):
            bench.step(index)
            if index == 1:
                checkpoints.rename(tmp_path / "away")
                checkpoints.touch()  # no directory can be made in a file
            if index == 2:
                bench.run._saving.committed()
                assert "no checkpoint at step 2: " in bench.said[0]
                assert bench.said[0].endswith("; the training goes on without it")
                checkpoints.unlink()
                (tmp_path / "away").rename(checkpoints)
                bench.run._setting.watch["signals"].terminated = True
                bench.run._watch.start()
                while not bench.run._watch.pending:
                    time.sleep(0.01)
    bench.run._close()
    assert bench.saved() == {3: 3.0}


def test_a_final_save_that_fails_is_an_error(tmp_path):
    """The segment does not end as if its work were safe."""
    bench = Bench(tmp_path, every=100)
    bench.gate.open.set()
    with pytest.raises(CheckpointError, match="no checkpoint at step 1: "):
        for index in bench.run.steps(9):
            bench.step(index)
            (tmp_path / "checkpoints").rmdir()
            (tmp_path / "checkpoints").touch()
            bench.run._setting.watch["signals"].terminated = True
            bench.run._watch.start()
            while not bench.run._watch.pending:
                time.sleep(0.01)
    bench.run._close()


def test_a_segment_that_has_lost_its_run_hears_so_at_the_next_boundary(tmp_path):
    """A save under way when another segment takes over commits nothing, and ends the training."""
    mine = threading.Event()
    mine.set()
    bench = Bench(tmp_path, may_write=mine.is_set)
    with pytest.raises(Locked):
        for index in bench.run.steps(9):
            bench.step(index)
            if index == 2:
                assert bench.gate.reached.wait(60)
                mine.clear()
                bench.gate.open.set()
                while bench.run._saving.busy:
                    time.sleep(0.01)
            assert index <= 2
    bench.run._close()
    assert bench.saved() == {}


def test_what_no_checkpoint_can_hold_is_refused_at_the_save(tmp_path):
    """Not a step later, when the state may be another one."""
    bench = Bench(tmp_path)
    bench.gate.open.set()
    bench.run.state["bad"] = object()
    with pytest.raises(RegisterError, match=r"run\.state\.bad is a builtins\.object"):
        for index in bench.run.steps(9):
            bench.step(index)
            assert index < 2
    bench.run._close()
