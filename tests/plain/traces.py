"""What a training did, step by step, to the last bit; for the plain programs and for chainrun's runs alike.

Imports nothing of chainrun: the plain programs beside this file are the independent reference.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

TRACE, METRICS, RESULT = "trace.jsonl", "metrics.jsonl", "result.json"


def fingerprint(value: Any) -> str:
    """Return a hash over every bit of tensors, arrays, numbers and texts in dicts, lists and tuples."""
    digest = hashlib.blake2b(digest_size=12)
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    digest.update(f"<{type(value).__name__}>".encode())
    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
        digest.update(f"{value.dtype} {tuple(value.shape)}".encode() + array.numpy().tobytes())
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape}".encode() + value.tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=repr):
            _feed(digest, key)
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, float):
        digest.update(value.hex().encode())
    else:
        assert isinstance(value, (int, str, type(None))), f"nothing is known of the bits of {value!r}"
        digest.update(repr(value).encode())
    digest.update(b"</>")


class Trace:
    """Writes one JSON line a step to a folder; a later segment of the same training appends to it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)

    def step(
        self, step: int, *, batch: Any, loss: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> None:
        """Note the state right after an optimization step, the first of which has number 1.

        Args:
            batch: what the model was given in this step.
            loss: of this step; a tensor or a number.
        """
        line = {
            "step": step,
            "batch": fingerprint(list(batch)),
            "loss": (loss.item() if isinstance(loss, torch.Tensor) else loss).hex(),
            "weights": fingerprint(dict(model.state_dict())),
            "optimizer": fingerprint(optimizer.state_dict()),
            "python": fingerprint(random.getstate()),
            "numpy": fingerprint(np.random.get_state()),
            "torch": fingerprint(torch.get_rng_state()),
        }
        self._append(TRACE, line)

    def log(self, step: int, **metrics: Any) -> None:
        """Note metrics, in the form that chainrun gives them."""
        plain = {key: v.tolist() if isinstance(v, torch.Tensor) else v for key, v in metrics.items()}
        self._append(METRICS, {"step": step, **plain})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as file:  # written at once, so that a kill loses no step
            file.write(json.dumps(line) + "\n")


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Return the lines of a trace, by step; a step that was done again after a crash counts once.

    Raises:
        AssertionError: it was not done as it had been before.
    """
    lines: dict[int, dict[str, Any]] = {}
    for text in (Path(folder) / TRACE).read_text().splitlines():
        line = json.loads(text)
        before = lines.setdefault(line["step"], line)
        assert before == line, f"step {line['step']} was done again, differently: {line}, before {before}"
    return [lines[step] for step in sorted(lines)]


def main(train: Callable[..., Any]) -> None:
    """Run a plain training: ``python article.py FOLDER ['{"epochs": 1}']``; the folder gets trace and result."""
    folder, args = Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
    result = train(Trace(folder), **args)
    (folder / RESULT).write_text(json.dumps(result))
