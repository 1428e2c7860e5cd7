"""What `chainrun verify` compares: after every step, a fingerprint of each part of the training's state."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import xxhash

from chainrun.rundir import append_lines
from chainrun.training import rng

if TYPE_CHECKING:
    from chainrun.training.run import Run


def fingerprint(tree: Any) -> str:
    """Return the xxh3_64 of a tree of tensors and plain data: of the bits, so that -0.0 is not 0.0."""
    digest = xxhash.xxh3_64()
    for part in _parts(tree):
        digest.update(part)
    return str(digest.hexdigest())


def _parts(tree: Any) -> Iterator[bytes]:
    if isinstance(tree, torch.Tensor):
        tensor = tree.detach().cpu().contiguous()
        yield f"{tensor.dtype}{tuple(tensor.shape)}".encode()
        if tensor.is_sparse or tensor.is_quantized:
            yield repr(tensor).encode()
        elif tensor.numel():
            yield tensor.flatten().view(torch.uint8).numpy().tobytes()
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield repr(key).encode()
            yield from _parts(value)
    elif isinstance(tree, (list, tuple)):
        yield f"{len(tree)}".encode()
        for value in tree:
            yield from _parts(value)
    elif hasattr(tree, "tobytes"):  # NumPy
        yield f"{tree.dtype}{tree.shape}".encode() + tree.tobytes()
    else:
        yield (tree.hex() if isinstance(tree, float) else repr(tree)).encode()


class Recorder:
    """Writes one line a step and rank, from inside `Run.step`."""

    def __init__(self, run: Run, path: Path) -> None:
        self._run, self._path = run, path
        self._batches: dict[str, Any] = {}
        self._step = run.step
        run.step = self.step  # type: ignore[method-assign]
        run.on_batch = self._batch

    def _batch(self, loader: str, batch: Any) -> None:
        self._batches[loader] = batch

    def step(self, **metrics: Any) -> None:
        """Record, then do what `Run.step` does, which may end the segment."""
        run = self._run
        if not run.walking:
            parts: dict[str, str] = {f"batch of {k}": fingerprint(v) for k, v in self._batches.items()}
            parts["metrics"] = fingerprint(metrics)
            for name, thing in run.registered():
                parts[name] = fingerprint(thing.state_dict())
            parts["run.state"] = fingerprint(run.state)
            for name, state in rng.capture().items():
                parts[f"random state: {name}"] = xxhash.xxh3_64_hexdigest(state)
            line = {"step": run.global_step + 1, "rank": run.rank, "parts": parts}
            append_lines(self._path, [{**line, "unregistered": self._unregistered()}])
        self._step(**metrics)

    def _unregistered(self) -> list[str]:
        """Return the optimizers, schedulers and loaders that are alive and that nobody registered."""
        kinds = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.utils.data.DataLoader)
        known = {id(thing) for thing in self._run.things()}
        found = []
        for thing in gc.get_objects():
            kind = type(thing)  # isinstance() would ask proxies for what they stand for
            if issubclass(kind, kinds) and id(thing) not in known:
                found.append(f"{kind.__module__}.{kind.__qualname__}")
        return sorted(set(found))
