"""A training that fills the disk of its run before its last save."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


def train(run, disk: str, leave: int | None):
    model = torch.nn.Linear(100_000, 2)
    run.register(model=model)
    for index in run.steps(4):
        if index == 3 and leave is not None:
            while not (
                run.dir / "checkpoints" / "step-00000003"
            ).exists():  # it is written beside the training
                time.sleep(0.01)
            free = os.statvfs(disk)
            (Path(disk) / "filler").write_bytes(bytes(free.f_bavail * free.f_frsize - leave))
