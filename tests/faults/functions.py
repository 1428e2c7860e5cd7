"""Training functions that go wrong, each in its way; no training happens in them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch

import chainrun


def deeper(step: int):
    raise ValueError(f"planted at step {step}")


def raises(run, at: int, steps: int):
    run.register(model=torch.nn.Linear(2, 2))
    for index in run.steps(steps):
        if index + 1 == at:
            deeper(at)


class Anything:
    """An object without a state."""


def registers(run, names: str = "ab", *, width: int = 2, dtype: str = "float32", rates: int = 1):
    """Register modules by their names, `o` an optimizer, `l` a loader, `p` torch's own, `x` anything; six steps."""
    module = torch.nn.Linear(width, 1, dtype=getattr(torch, dtype))
    data = list(range(12))
    for name in names:
        if name == "o":
            groups = [{"params": [p]} for p in module.parameters()]
            thing = torch.optim.SGD(groups[:rates], lr=0.1)
        elif name == "l":
            thing = chainrun.DataLoader(data, num_workers=rates - 1)
        elif name == "p":
            thing = torch.utils.data.DataLoader(data)
        elif name == "x":
            thing = Anything()
        else:
            thing = module if name == names[0] else torch.nn.Linear(width, 1)
        run.register(**{name: thing})
    for _ in run.steps(6):
        pass
    return "the end"


def loops(run, epochs: int, steps: int):
    """Loop over epochs and, inside, over steps."""
    run.register(model=torch.nn.Linear(2, 2))
    for _ in run.epochs(epochs):
        for _ in range(steps):
            run.step()
    return run.global_step


def hangs(run, at: int, mark: str):
    """Come to no boundary any more after a step, and say when that is."""
    run.register(model=torch.nn.Linear(2, 2))
    for index in run.steps(100):
        if index == at:
            Path(mark).touch()
            time.sleep(600)


def pids(run, folder: str, steps: int):
    """Say which process every rank is, and train slowly."""
    Path(folder, f"pid.{run.rank}").write_text(str(os.getpid()))
    run.register(model=torch.nn.Linear(2, 2))
    for _ in run.steps(steps):
        time.sleep(0.05)


def together(run, folder: str, steps: int):
    """Wait for the other ranks in every step; once, the last rank is killed while they wait for it."""
    torch.distributed.init_process_group("gloo")
    run.register(model=torch.nn.Linear(2, 2))
    mark = Path(folder, "killed")
    for _ in run.steps(steps):
        if run.global_step == 5 and run.rank == run.world_size - 1 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.all_reduce(torch.zeros(1))
