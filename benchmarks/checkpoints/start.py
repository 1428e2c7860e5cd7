"""From the start of a process to its first resumed step: the training function, and the plain program beside it.

    python start.py CHECKPOINT TRACE LAYERS     the plain program

Each writes the times at which its phases end to TRACE, a JSON line of seconds since the epoch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

PHASES = ["imports", "model and optimizer", "restore", "first step"]


def build(layers: int) -> tuple[Any, Any]:
    import torch

    layer: Any = torch.nn.TransformerEncoderLayer
    blocks = (layer(768, 12, 3072, dropout=0.0, batch_first=True) for _ in range(layers))
    model = torch.nn.Sequential(*blocks)
    model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu")
    return model, torch.optim.AdamW(model.parameters())


def learn(model: Any, optimizer: Any) -> None:
    import torch

    model(torch.ones(1, 8, 768, device=next(model.parameters()).device)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def note(trace: str, times: list[float]) -> None:
    with open(trace, "a") as file:
        file.write(json.dumps(times) + "\n")


def train(run: Any, trace: str, layers: int) -> None:
    """The training of the chain, cut after every step."""
    times = [time.time()]
    model, optimizer = build(layers)
    times.append(time.time())
    run.register(model=model, optimizer=optimizer)
    for _ in run.steps(1000):
        times.append(time.time())  # everything is restored where the loop goes on
        learn(model, optimizer)
        times.append(time.time())
        note(trace, times)
        del times[2:]


def plain(checkpoint: str, trace: str, layers: int) -> None:
    import torch

    times = [time.time()]
    model, optimizer = build(layers)
    times.append(time.time())
    if Path(checkpoint).exists():
        saved = torch.load(checkpoint, weights_only=True, map_location="cpu")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
    times.append(time.time())
    learn(model, optimizer)
    times.append(time.time())
    note(trace, times)
    if not Path(checkpoint).exists():
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)


if __name__ == "__main__":
    plain(sys.argv[1], sys.argv[2], int(sys.argv[3]))
