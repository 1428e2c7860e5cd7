"""What `chainrun verify` compares: a mark of each part of the training's state, after every step.

Each line of the file has ``at``, ``step`` and ``rank``; ``at`` is ``start`` (all is registered, nothing has
run), ``step``, or ``place`` (a checkpoint is taken here, or a resumed run has arrived here). ``parts`` holds by
component and entry what must be equal; ``held`` what the user's variables hold, which says why it is not;
``unregistered`` (of a place) what is alive and was not registered; ``asked`` see `variables.asked`.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch.utils.data.dataloader import _BaseDataLoaderIter

from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.objects import OWN
from chainrun.rundir import append_lines
from chainrun.training import rng, variables
from chainrun.training.worker import Collate

if TYPE_CHECKING:
    from chainrun.training.run import Run

UNREGISTERED = "an unregistered loader"


def entries(tree: Any, path: str = "") -> dict[str, str]:
    """Return the mark of each leaf of a state_dict by its path, ``0.weight`` or ``state.0.exp_avg``."""
    found: dict[str, str] = {}
    for place, leaf in leaves(tree, path):
        try:
            found[place] = variables.mark(leaf)
        except variables.NoMark:
            found[place] = fingerprint(leaf)
    return found


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of a state_dict by their paths; a list of plain values is one."""
    items: Any = ()
    if isinstance(tree, dict):
        items = tree.items()
    elif isinstance(tree, (list, tuple)) and any(isinstance(v, (dict, torch.Tensor)) for v in tree):
        items = enumerate(tree)
    if not items:
        yield path, tree
    for key, value in items:
        if key == OWN:  # it may go by ids, which no other process has
            continue
        yield from leaves(value, f"{path}.{key}" if path else str(key))


def _joined(batches: list[dict[str, str]]) -> dict[str, str]:
    if len(batches) == 1:
        return batches[0]
    return {f"{n}.{path}".strip("."): it for n, batch in enumerate(batches) for path, it in batch.items()}


class Recorder:
    """Writes the lines of one rank, from inside `Run`."""

    def __init__(self, run: Run, path: Path) -> None:
        self._run, self._path = run, path
        self._batches: dict[str, list[dict[str, str]]] = {}  # since the last step, or the last place
        self._step, self._register = run.step, run.register
        run.step, run.register = self.step, self.register  # type: ignore[method-assign]
        run.on_batch, run.on_place = self._batch, self._place
        self._watch_unregistered()

    def _batch(self, loader: str, batch: Any) -> None:
        if not self._run.walking:
            self._batches.setdefault(loader, []).append(entries(batch))

    def _watch_unregistered(self) -> None:
        next_of = _BaseDataLoaderIter.__next__

        def watched(batches: Any) -> Any:
            batch = next_of(batches)
            if not isinstance(batches._collate_fn, Collate):
                self._batch(UNREGISTERED, batch)
            return batch

        _BaseDataLoaderIter.__next__ = watched  # type: ignore[method-assign, assignment]

    def register(self, **objects: Any) -> None:
        """Do what `Run.register` does, and record what the training begins with."""
        self._register(**objects)
        if not self._run.resumed and self._run.global_step == 0:
            frames = variables.users_frames(sys._getframe(1))
            self._write("start", 0, self._state(), frames, asked=variables.asked(frames))

    def step(self, **metrics: Any) -> None:
        """Record, then do what `Run.step` does, which may end the segment."""
        run = self._run
        if not run.walking:
            parts = {f"batch of {name}": _joined(each) for name, each in self._batches.items()}
            parts["metrics"] = entries(metrics)
            frames = variables.users_frames(sys._getframe(1))
            self._write("step", run.global_step + 1, {**parts, **self._state()}, frames)
        self._batches = {}
        self._step(**metrics)

    def _place(self) -> None:
        run, self._batches = self._run, {}  # a run that begins here has not had them
        frames = variables.users_frames(sys._getframe(1))
        self._write("place", run.global_step, self._state(), frames, unregistered=self._unregistered())

    def _state(self) -> dict[str, dict[str, str]]:
        run = self._run
        parts = {name: entries(thing.state_dict()) for name, thing in run.registered()}
        parts["run.state"] = entries(run.state)
        for name, state in rng.capture().items():
            parts[f"random state: {name}"] = {"": xxhash.xxh3_64_hexdigest(state)}
        return parts

    def _write(
        self, at: str, step: int, parts: dict[str, dict[str, str]], frames: list[FrameType], **more: Any
    ) -> None:
        line = {"at": at, "step": step, "rank": self._run.rank, "parts": parts, **more}
        append_lines(self._path, [{**line, "held": variables.Held(self._run.things()).look(frames)}])

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
