"""A small training with one planted fault, for `chainrun verify`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import chainrun

sys.path.insert(0, str(Path(__file__).parent))
import parts


def train(run: chainrun.Run, fault: str):
    model = parts.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    loader = chainrun.DataLoader(parts.Noisy(20), batch_size=4, shuffle=True)
    things = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
    run.register(**{name: thing for name, thing in things.items() if name != fault})
    average = 0.0
    for _ in run.epochs(3):
        for batch in loader:
            loss = model(batch).square().mean()
            if fault == "clock":
                loss = loss * (1 + time.time() % 1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            average = 0.9 * average + 0.1 * loss.item()
            if fault != "no step":
                run.step(loss=average if fault == "local" else loss)
