"""What two trainings are compared by. Never imports chainrun."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import torch


def of_tensors(*tensors: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def of_random_state() -> str:
    digest = hashlib.sha256(repr(random.getstate()).encode())
    name, keys, position, has_gauss, gauss = np.random.get_state()
    digest.update(keys.tobytes() + repr((name, position, has_gauss, gauss)).encode())
    digest.update(torch.get_rng_state().numpy().tobytes())
    return digest.hexdigest()[:16]


def of_optimizer(optimizer: torch.optim.Optimizer) -> str:
    state = optimizer.state_dict()["state"]
    return of_tensors(*(value for entry in state.values() for value in entry.values()))


def trace(path: Path, step: int, batch: torch.Tensor, loss: torch.Tensor, model, optimizer) -> None:
    """Append one line with everything that must be equal after a step."""
    line = {
        "step": step,
        "batch": of_tensors(batch),
        "loss": loss.item().hex(),
        "weights": of_tensors(*model.state_dict().values()),
        "optimizer": of_optimizer(optimizer),
        "random": of_random_state(),
    }
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def trace_parts(path: Path, step: int, batch: torch.Tensor, losses, parts) -> None:
    """Append one line with everything that must be equal after a step of several trainings side by side."""
    line = {
        "step": step,
        "batch": of_tensors(batch),
        "losses": [loss.item().hex() for loss in losses],
        "parts": [of_tensors(*tensors) for tensors in parts],
        "random": of_random_state(),
    }
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> dict[int, dict]:
    """Return the lines by step; a step done again after a crash must have come out the same."""
    lines: dict[int, dict] = {}
    for text in path.read_text().splitlines():
        line = json.loads(text)
        assert lines.setdefault(line["step"], line) == line, f"step {line['step']} was repeated differently"
    return lines
