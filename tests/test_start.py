"""How a segment gets its state back: read by another process while torch is imported, given where it is used."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch

from chainrun.checkpoint import image, reader
from chainrun.checkpoint.ahead import Ahead
from chainrun.checkpoint.store import Store, rank_file
from chainrun.errors import CheckpointError
from chainrun.rundir import RunDir
from chainrun.training.run import Run
from chainrun.training.saving import Setting


def cut(folder: Path, steps: int, between=None) -> dict[str, torch.Tensor]:
    """Train with moments up to a global step, where a checkpoint is taken; return the moments.

    Args:
        between: called with the optimizer between `register` and the loop.
    """
    run = Run(folder, setting=Setting(save_every_steps=1))
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    run.register(model=model, optimizer=optimizer)
    if between is not None:
        between(optimizer)
    for step in run.steps(steps):
        model(torch.full((1, 300), float(step))).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {key: value.clone() for key, value in optimizer.state[model.weight].items()}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    cut(tmp_path / "run", 2)
    return RunDir(tmp_path / "run")


def test_what_is_read_ahead_is_what_is_on_the_disk(run: RunDir) -> None:
    """It is taken once; who asks again reads the file, and nothing of the other process is left."""
    newest = Store(run).latest()
    assert newest is not None
    path = newest.path / rank_file(0)
    ahead = Ahead(run, 0)
    memory = ahead.take(path)
    assert memory is not None and memory.xxh3_128 == newest.manifest["files"][path.name]["xxh3_128"]
    assert os.pread(memory._file, memory.size + 1, 0) == path.read_bytes()
    assert image.read(memory).keys() == image.read(path).keys()
    assert ahead.take(path) is None
    ahead.close()
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


@pytest.mark.parametrize("fault", ["changed", "cut", "removed"])
def test_a_fault_that_is_found_while_reading_ahead_is_told(run: RunDir, fault: str) -> None:
    """The same error as from reading then and there."""
    newest = Store(run).latest()
    assert newest is not None
    path = newest.path / rank_file(0)
    if fault == "changed":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif fault == "cut":
        os.truncate(path, path.stat().st_size - 1)
    else:
        path.unlink()
    ahead = Ahead(run, 0)
    with pytest.raises(CheckpointError) as told:
        reader.read(newest, 0, ahead)
    ahead.close()
    with pytest.raises(CheckpointError) as alone:
        reader.read(newest, 0)
    assert str(told.value) == str(alone.value)


def test_a_reader_that_is_killed_or_cannot_be_started_is_done_without(run: RunDir, monkeypatch) -> None:
    """A machine that is short of memory kills it first, or lets no process begin: the file is read then and there."""
    newest = Store(run).latest()
    assert newest is not None
    stopped = os.pipe()
    monkeypatch.setattr("chainrun.checkpoint.source.fill", lambda *_: os.read(stopped[0], 1))
    ahead = Ahead(run, 0)
    monkeypatch.undo()
    os.kill(ahead._child, signal.SIGKILL)
    assert reader.read(newest, 0, ahead)["global_step"] == 2
    ahead.close()
    for end in stopped:
        os.close(end)

    def full() -> int:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    assert reader.read(newest, 0, Ahead(run, 0))["global_step"] == 2


def test_moments_are_given_their_place_once(run: RunDir, tmp_path: Path) -> None:
    """Restored at `register` and again where the loop goes on, into the same memory."""
    places: list[list[int]] = []

    def look(optimizer: torch.optim.Optimizer) -> None:
        places.append([s["exp_avg"].data_ptr() for s in optimizer.state.values()])
        step = optimizer.step

        def stepped():
            places.append([s["exp_avg"].data_ptr() for s in optimizer.state.values()])
            return step()

        optimizer.step = stepped

    uncut = cut(tmp_path / "uncut", 3)
    resumed = cut(run.path, 3, look)
    assert places[0] == places[1] != []
    assert all(torch.equal(value, uncut[key]) for key, value in resumed.items())


@pytest.mark.parametrize("how", ["in place", "replaced", "other shape", "gone", "more"])
def test_what_the_function_does_to_moments_before_its_loop_leaves_no_trace(
    run: RunDir, tmp_path: Path, how: str
) -> None:
    """The second restore gives them what was saved, whatever lies there by then."""

    def spoil(optimizer: torch.optim.Optimizer) -> None:
        for its in optimizer.state.values():
            if how == "in place":
                its["exp_avg"].fill_(7)
            elif how == "replaced":
                its["exp_avg"] = torch.full_like(its["exp_avg"], 7)
            elif how == "other shape":
                its["exp_avg"].resize_(2, 2)
            elif how == "more":
                its["other"] = torch.ones(3)
        if how == "gone":
            optimizer.state.clear()

    uncut = cut(tmp_path / "uncut", 3)
    resumed = cut(run.path, 3, spoil)
    assert resumed.keys() == uncut.keys()
    assert all(torch.equal(value, uncut[key]) for key, value in resumed.items())
