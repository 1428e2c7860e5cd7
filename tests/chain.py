"""One training function as the plain PyTorch program and as chainrun carries it, cut anywhere, in this process.

A function under test is called as ``train(run, DataLoader)``. `plain` gives it a stand-in for `Run`, whose
ranges are Python's, and torch's own loader: no line of chainrun runs. `cut` gives it a real `Run` and
`chainrun.DataLoader`, stops it where told, and starts it again from its first line on the same directory.
What a function logs and returns is compared; `marks` are everything that must be equal at a step.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import chainrun
from chainrun.allocation import Allocation
from chainrun.checkpoint import writer
from chainrun.rundir import RunDir
from chainrun.training import distributed
from chainrun.training.saving import Setting
from chainrun.training.stop import SegmentEnd, Wish

Train = Callable[[Any, Any], Any]
WHOLE = "CHAINRUN_EXACT" in os.environ  # see everywhere.py


@dataclass(frozen=True)
class Place:
    """Where this process trains: one of some ranks, with loaders of another kind than the function asks for."""

    rank: int = 0
    ranks: int = 1
    folder: Path | None = None
    """Shared by the ranks."""
    loaders: Any = None
    """Makes of a loader class the one that the function is given."""


place = Place()


@contextlib.contextmanager
def varied(**changes: Any) -> Iterator[None]:
    """Train elsewhere."""
    global place  # noqa: PLW0603
    before, place = place, replace(place, **changes)
    try:
        yield
    finally:
        place = before


def _loader(kind: Any) -> Any:
    return kind if place.loaders is None else place.loaders(kind)


def digest(*values: Any) -> str:
    """Return a fingerprint of tensors and plain values, dtype and shape included."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype}{tuple(value.shape)}".encode())
            found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(value, (list, tuple)):
            found.update(digest(*value).encode())
        elif isinstance(value, dict):
            found.update(digest(*(item for pair in value.items() for item in pair)).encode())
        else:
            found.update(repr(value).encode())
    return found.hexdigest()[:12]


def random_state() -> str:
    """Return a fingerprint of the three global generators."""
    name, keys, *rest = np.random.get_state()
    return digest(random.getstate(), name, keys.tolist(), rest, torch.get_rng_state())


def marks(batch: Any = None, *things: Any) -> dict[str, str]:
    """Return what must be equal at a step: the batch, the random state, the state of some objects."""
    found = {"batch": digest(batch), "random": random_state()}
    for index, thing in enumerate(things):
        found[f"state{index}"] = digest(thing.state_dict() if hasattr(thing, "state_dict") else thing)
    return found


def seed() -> None:
    """Seed as a segment does before it calls the function; every rank otherwise."""
    random.seed(place.rank)
    np.random.seed(place.rank)
    torch.manual_seed(place.rank)


class PlainRun:
    """Stands for `chainrun.Run` in the plain program: ranges, and a list for the metrics."""

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.global_step = self.epoch = self._boundaries = 0
        self.resumed = False

    def register(self, **objects: Any) -> None:
        pass

    def epochs(self, n: int) -> Iterator[int]:
        for self.epoch in range(n):
            yield self.epoch

    def steps(self, n: int) -> Iterator[int]:
        for index in range(n):
            before = self.global_step
            yield index
            if self.global_step == before:
                self.step()

    def step(self, **metrics: Any) -> None:
        self._boundaries += 1
        self.global_step += 1
        if metrics:
            self.log(**metrics)

    def poll(self) -> None:
        self._boundaries += 1

    def save(self) -> None:
        pass

    def log(self, **metrics: Any) -> None:
        plain = {k: v.item() if isinstance(v, torch.Tensor) else v for k, v in metrics.items()}
        self.lines.append({"step": self.global_step, **plain})


@dataclass
class Trained:
    """What came out of a training."""

    lines: list[dict[str, Any]]
    result: Any
    random: str
    segments: int = 1
    said: list[str] = field(default_factory=list)
    stopped_at: list[int] = field(default_factory=list)
    """The global step at which each segment but the last ended."""
    boundaries: int = 0
    """Of the plain program."""

    def difference(self, other: Trained) -> str | None:
        """Say where the other training differs first, None where it is identical."""
        for mine, its in zip(self.lines, other.lines, strict=False):
            if mine != its:
                keys = [key for key in {**mine, **its} if mine.get(key) != its.get(key)]
                return f"at step {mine['step']}: {', '.join(keys)} differ: {mine} and {its}"
        if len(self.lines) != len(other.lines):
            return f"{len(self.lines)} and {len(other.lines)} logged lines"
        if self.result != other.result:
            return f"results {self.result} and {other.result}"
        return None if self.random == other.random else "the random state at the end"


def plain(train: Train) -> Trained:
    """Run the plain program."""
    run = PlainRun()
    seed()
    result = train(run, _loader(torch.utils.data.DataLoader))
    return Trained(json.loads(json.dumps(run.lines)), result, random_state(), boundaries=run._boundaries)


def steps_of(trained: Trained) -> int:
    """Return how many steps it logged."""
    return max((line["step"] for line in trained.lines), default=0)


@dataclass
class Segment:
    """One segment of a chain; makes its `Run`, and closes it."""

    dir: Path
    interrupt_at: Iterable[int] = ()
    after: int | None = None
    """Stop at the boundary of this number in the segment, be it a step or a poll."""
    said: list[str] = field(default_factory=list)
    number: int = 0

    def __enter__(self) -> chainrun.Run:
        ranks = {"rank": place.rank, "world_size": place.ranks, "local_rank": place.rank}
        allocation = Allocation(
            **ranks,
            local_world_size=place.ranks,
            restart=self.number,
            interrupt_at=frozenset(self.interrupt_at),
        )
        self.group: Any = None
        if place.ranks > 1:
            self.group = distributed.connect(allocation, RunDir(self.dir).create())
        setting = Setting(allocation=allocation, group=self.group or writer.Alone(), say=self.said.append)
        seed()
        self.run = run = chainrun.Run(self.dir, setting=setting)
        if self.after is not None:
            due = self.after
            run._watch.pending = True
            run._watch.decide = lambda boundary: Wish("stop", "test") if boundary >= due else None  # type: ignore[method-assign]
        return run

    def __exit__(self, *exc: object) -> None:
        self.run._close()
        if self.group is not None:
            self.group.leave()
            del self.run, self.group
            gc.collect()  # not later, in a worker: the connection is this process's


def memory() -> str | None:
    """Return a folder in memory, if there is room: hundreds of checkpoints would wait for the disk a quarter of the time."""
    folder = "/dev/shm"
    return folder if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 1 << 30 else None


def cut(
    train: Train | Sequence[Train],
    steps: Iterable[int] = (),
    *,
    after: Sequence[int] = (),
    dir: Path | None = None,
    most: int = 60,
) -> Trained:
    """Carry the function through segments until it returns.

    Args:
        train: the function; of several, one a segment, the last for all others.
        steps: global steps at which a segment ends.
        after: for the first segments, the number of boundaries after which each ends.
        dir: the run directory, by default a fresh one.
        most: more segments than this fail.
    """
    if dir is None:
        if place.folder is not None:
            return cut(train, steps, after=after, dir=_shared(place.folder), most=most)
        with tempfile.TemporaryDirectory(dir=memory()) as fresh:
            return cut(train, steps, after=after, dir=Path(fresh), most=most)
    functions = [train] if callable(train) else list(train)
    said: list[str] = []
    stopped: list[int] = []
    for number in range(most):
        segment = Segment(dir, steps, after[number] if number < len(after) else None, said, number)
        with segment as run:
            try:
                result = functions[min(number, len(functions) - 1)](run, _loader(chainrun.DataLoader))
                state = random_state()
                run._finish(None)
            except SegmentEnd:
                stopped.append(run.global_step)
                continue
        return Trained(metrics(dir), result, state, number + 1, said, stopped)
    raise AssertionError(f"no end after {most} segments; they stopped at {stopped}")


_count = 0


def _shared(folder: Path) -> Path:
    """Return the folder of the next chain, the same on every rank."""
    global _count  # noqa: PLW0603
    _count += 1
    fresh = folder / str(_count)
    fresh.mkdir(exist_ok=True)
    return fresh


def metrics_file(rank: int) -> str:
    return f"metrics-{rank}.jsonl" if rank else "metrics.jsonl"


def metrics(dir: Path) -> list[dict[str, Any]]:
    file = dir / metrics_file(place.rank)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def lost(trained: Trained) -> list[str]:
    """Return what was said of variables that a cut loses; of a training that is exact that is nothing."""
    return [line for line in trained.said if "when the run was cut" in line or "what variables hold" in line]


def whole(train: Train, **options: bool) -> None:
    """In `make exact`, check a training everywhere: see `everywhere.everywhere`, whose options these are."""
    if WHOLE:
        from everywhere import everywhere  # which imports this file

        everywhere(train, **options)


def some(every: Sequence[int]) -> list[int]:
    """Return at which of these each test cuts one chain: at all in `make exact`, else at a sixth, other ones for each."""
    if WHOLE:
        return [*every]
    test = os.environ.get("PYTEST_CURRENT_TEST", "").partition(" (")[0]
    return sorted(random.Random(test).sample(every, -(-len(every) // 6)))


def sweep(train: Train, steps: int, *, quick: bool = False) -> Trained:
    """Check that a training of so many steps is the plain one, uncut and cut everywhere; return the plain one.

    Args:
        quick: two chains, cut at every step and at every third, instead of single cuts as well.
    """
    reference = plain(train)
    every = range(1, steps + 1)
    chains: list[Iterable[int]] = [(), every, every[1::3]]
    if not quick:
        chains += [(step,) for step in some(every)]
    for cuts in chains:
        trained = cut(train, cuts)
        difference = reference.difference(trained)
        assert difference is None, f"cut at {list(cuts)}: {difference}"
        assert lost(trained) == []
        # a cut after which no loop asks for a turn is not needed: the function has returned
        assert trained.stopped_at == list(cuts)[: len(trained.stopped_at)]
        assert len(trained.stopped_at) >= len(list(cuts)) - 1
    whole(train)
    return reference


def cut_everywhere(train: Train, *, least: int = 1) -> Trained:
    """Check that a training is the plain one, uncut and cut after every step; return the plain one.

    Args:
        least: so many steps it must have.
    """
    reference = plain(train)
    every = range(1, steps_of(reference) + 1)
    assert len(every) >= least
    for cuts in ((), every):
        trained = cut(train, cuts)
        assert reference.difference(trained) is None, f"cut at {list(cuts)}: {reference.difference(trained)}"
        assert lost(trained) == []
        assert len(trained.stopped_at) >= len(cuts) - 1
    whole(train)
    return reference


def sweep_boundaries(train: Train, boundaries: int, **options: bool) -> Trained:
    """As `sweep`, for cuts at boundaries, steps and polls; one cut a chain, and one at every boundary."""
    reference = plain(train)
    for after in [*((n,) for n in some(range(1, boundaries + 1))), (1,) * boundaries]:
        trained = cut(train, after=after)
        difference = reference.difference(trained)
        assert difference is None, f"cut after {after} boundaries: {difference}"
        assert lost(trained) == []
        assert trained.segments > 1
    whole(train, polls=True, **options)
    return reference
