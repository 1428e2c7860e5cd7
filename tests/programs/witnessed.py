"""A training whose handoffs are witnessed; its data set hangs or raises where told, in the first segment only."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import chainrun

sys.path.insert(0, str(Path(__file__).parent))
import parts


class Bad(parts.Noisy):
    """The item behind the cut hangs, or raises, the first time."""

    def __init__(self, fault: str, once: str) -> None:
        super().__init__(24)
        self.fault, self.once = fault, Path(once)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 12 and self.fault != "none" and not self.once.exists():
            self.once.touch()
            if self.fault == "raises":
                raise RuntimeError("a bad sector")
            time.sleep(600)
        return super().__getitem__(index)


def train(run: chainrun.Run, workers: int, fault: str, folder: str):
    torch.manual_seed(run.rank)
    model = parts.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = chainrun.DataLoader(Bad(fault, f"{folder}/once"), batch_size=4, num_workers=workers)
    run.register(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(2):
        for batch in loader:
            loss = model(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
    return loss.item().hex()
