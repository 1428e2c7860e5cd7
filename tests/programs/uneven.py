"""Ranks that train by themselves at different speeds, each with random draws of its own."""

from __future__ import annotations

import random
import time
from pathlib import Path

import torch

import chainrun


def train(run: chainrun.Run, steps: int, trace: str):
    torch.manual_seed(run.rank)
    random.seed(run.rank)
    weight = torch.nn.Linear(3, 3)
    run.register(weight=weight)
    run.state.setdefault("seen", [])
    for _ in run.steps(steps):
        with torch.no_grad():
            weight.weight.add_(torch.randn(3, 3) * random.random())
        run.state["seen"].append(weight.weight.sum().item().hex())
        time.sleep(0.05 + 0.05 * run.rank)
    Path(f"{trace}.{run.rank}").write_text("\n".join(run.state["seen"]))
