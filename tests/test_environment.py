"""What the bits depend on besides the state is noted, and named at a restore where it has changed."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from chainrun import journal
from chainrun.allocation import Allocation
from chainrun.experiment import from_dict
from chainrun.launch import submit
from chainrun.rundir import RunDir
from chainrun.segment import run_segment
from chainrun.training import environment
from chainrun.training.stop import Signals

SWITCHES: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "python": lambda patch: patch.setattr(platform, "python_version", lambda: "3.99.0"),
    "torch": lambda patch: patch.setattr(torch, "__version__", "9.9"),
    "numpy": lambda patch: patch.setattr(np, "__version__", "9.9"),
    "cpu_capability": lambda patch: patch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other"),
    "machine": lambda patch: patch.setattr(platform, "machine", lambda: "other"),
    "threads": lambda patch: torch.set_num_threads(torch.get_num_threads() + 1),
    "default_dtype": lambda patch: torch.set_default_dtype(torch.float64),
    "deterministic": lambda patch: torch.use_deterministic_algorithms(True),
    "float32_matmul_precision": lambda patch: torch.set_float32_matmul_precision("medium"),
    "hash_seed": lambda patch: patch.setenv("PYTHONHASHSEED", "77"),
}


@pytest.fixture(autouse=True)
def _switched_back() -> Iterator[None]:
    threads, variables, path = torch.get_num_threads(), dict(os.environ), [*sys.path]
    yield
    for name in os.environ.keys() - variables.keys():
        del os.environ[name]  # a segment sets RANK and its kin
    os.environ.update(variables)
    sys.path[:] = path
    torch.set_num_threads(threads)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")


def test_no_fact_is_without_a_test() -> None:
    """Whoever adds one says here how it changes; those of a GPU are in test_gpu.py."""
    found = {*environment.facts(Allocation(), {})}
    if torch.cuda.is_available():
        found -= {name for name in found if name.startswith(("cuda", "cudnn", "gpu", "tf32"))}
    assert found == {*SWITCHES, "host"}


@pytest.mark.parametrize("name", SWITCHES)
def test_each_fact_that_has_changed_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone, with what it was and what it is."""
    before = environment.facts(Allocation(), {})
    SWITCHES[name](monkeypatch)
    now = environment.facts(Allocation(), {})
    assert environment.drift(before, now) == [f"{name}: {before[name]} -> {now[name]}"]


def test_another_commit_is_named_and_another_host_is_not() -> None:
    """The code counts; a node of the same kind computes the same."""
    before = environment.facts(Allocation(host="a"), {"commit": "1"})
    now = environment.facts(Allocation(host="b"), {"commit": "2", "changes": "9f"})
    assert environment.drift(before, now) == ["commit: 1 -> 2", "changes: not set -> 9f"]


def test_a_resumed_segment_says_what_has_changed(tmp_path: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """In its log and in the journal; the training goes on. Without a change it says nothing."""
    (tmp_path / "drifting.py").write_text("def train(run):\n    for _ in run.steps(6):\n        pass\n")
    described = from_dict({"name": "e", "function": f"{tmp_path}/drifting.py:train", "dir": "."}, tmp_path)
    run = RunDir(tmp_path / "e")
    submit.create(run, described, None, None)

    def segment(restart: int, at: int) -> None:
        allocation = Allocation(restart=restart, interrupt_at=frozenset({at}))
        run_segment(run, allocation, Signals())

    segment(0, 2)
    segment(1, 4)
    assert journal.last(run, "drift") is None
    torch.set_float32_matmul_precision("medium")
    segment(2, 9)
    changes = ["float32_matmul_precision: highest -> medium"]
    found = journal.last(run, "drift")
    assert found is not None and found["changes"] == changes
    assert f"the environment has changed: {changes[0]}" in capfd.readouterr().err
    assert json.loads(run.result.read_text()) is None
