"""A copy of the state is made only where there is memory for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from chainrun.checkpoint import memory
from chainrun.checkpoint.public import Checkpoint
from chainrun.checkpoint.store import Store
from chainrun.rundir import RunDir
from chainrun.training.run import Run
from chainrun.training.saving import Setting

MEMINFO = "MemTotal: 100 kB\nMemAvailable: 64 kB\n"


def tree(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_the_machine_says_how_much_it_has_left(tmp_path: Path) -> None:
    """Without control groups that is all there is to know; nothing known is None."""
    assert memory.available(tree(tmp_path, {"meminfo": MEMINFO}), tmp_path / "none") == 64 << 10
    assert memory.available(tmp_path / "none", tmp_path / "none") is None
    assert (memory.available() or 1) > 0


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_job_counts_wherever_above_the_process_it_is(tmp_path: Path, version: int) -> None:
    """Of the job's limit is left what nobody has taken, the page cache aside; a step without one has none."""
    job, cache = (
        ("slurm/job_1", "inactive_file") if version == 2 else ("memory/slurm/job_1", "total_inactive_file")
    )
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    line = "0::/slurm/job_1/step_0\n" if version == 2 else "9:cpu:/x\n4:cpuset,memory:/slurm/job_1/step_0\n"
    proc = tree(tmp_path / "proc", {"meminfo": MEMINFO, "self/cgroup": line})
    groups = {f"{job}/{names[0]}": "50000\n", f"{job}/{names[1]}": "45000\n"}
    groups |= {f"{job}/memory.stat": f"anon 1\n{cache} 4000\n", f"{job}/step_0/{names[0]}": "max\n"}
    assert memory.available(proc, tree(tmp_path / "cgroup", groups)) == 50000 - 45000 + 4000


def test_without_memory_for_a_copy_the_training_waits_for_its_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once, with both numbers, and every checkpoint is made."""
    monkeypatch.setattr(memory, "available", lambda: 1_000_000)
    said: list[str] = []
    run = Run(tmp_path, setting=Setting(save_every_steps=2, background=True, say=said.append))
    model = torch.nn.Linear(10, 10)
    run.register(model=model)
    for index in run.steps(4):
        torch.nn.init.constant_(model.weight, index + 1.0)
    run._close()
    assert len(said) == 1
    assert "2 MB of memory are needed and 1 MB available; the training waits" in said[0]
    saved = {each.step: Checkpoint(each.path).load()["model"] for each in Store(RunDir(tmp_path)).committed()}
    assert {step: float(model["weight"][0, 0]) for step, model in saved.items()} == {2: 2.0, 4: 4.0}
