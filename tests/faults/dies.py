"""A module whose import ends the process without a word, from the second time on, as a broken library may."""

from __future__ import annotations

import os
from pathlib import Path

import torch

MARK = Path(os.environ["DIES_MARK"])
if MARK.exists():
    os._exit(139)
MARK.touch()


def train(run):
    run.register(model=torch.nn.Linear(2, 2))
    for _ in run.steps(10):
        pass
