"""Large lists and dicts of a data set: what the training changed is told after a cut, what loading fills is a cache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from chain import cut

LARGE = 10_000  # numbers, 80 KB


class Weighted(torch.utils.data.Dataset[Any]):
    """Items that are weighted by numbers which the training may change."""

    def __init__(self) -> None:
        self.weights: Any = [1.0] * LARGE
        self.by_name: Any = {f"item {n}": 1.0 for n in range(LARGE)}
        self.extra: list[float] = []

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        target = {}
        target[index] = self.weights[index] * self.by_name[f"item {index}"]
        return torch.full((2,), target[index] + len(self.extra))

    def note(self, index: int, weight: float) -> None:
        self.weights[index] = weight


class Aware:
    """A transform that keeps large numbers too."""

    def __init__(self) -> None:
        self.table = [0.5] * LARGE

    def __call__(self, x: Any) -> Any:
        return x * self.table[3]


class Transformed(Weighted):
    def __init__(self) -> None:
        super().__init__()
        self.transform = Aware()

    def __getitem__(self, index: int) -> Any:
        return self.transform(super().__getitem__(index))


def by_hand(items: Any, step: int) -> None:
    items.weights[0] = 1.0 + step


def by_its_method(items: Any, step: int) -> None:
    items.note(0, 1.0 + step)


def by_name(items: Any, step: int) -> None:
    items.by_name["item 1"] = 1.0 + step


def grown(items: Any, step: int) -> None:
    items.extra += [float(step)] * LARGE


def inside(items: Any, step: int) -> None:
    items.transform.table[0] = 1.0 + step


def training(dataset: Any, change: Any, workers: int = 0) -> Any:
    def train(run: Any, DataLoader: Any) -> None:
        items = dataset()
        loader = DataLoader(items, batch_size=2, num_workers=workers)
        run.register(model=torch.nn.Linear(2, 1), loader=loader)
        for _ in run.epochs(2):
            for _ in loader:
                if change is not None:
                    change(items, run.global_step)
                run.step()

    return train


def told(train: Any) -> list[str]:
    return [line for line in cut(train, (3,)).said if line.startswith("warning: the loader")]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (
            by_hand,
            "the attribute 'weights' of Weighted is not what it was when the run was cut (other items)",
        ),
        (by_its_method, "'weights'"),
        (by_name, "'by_name'"),
        (grown, "'extra' of Weighted is not what it was when the run was cut (30,000 items then, 0 here)"),
        (inside, "'transform.table' of Transformed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_large_list_that_the_training_changed_is_told(change: Any, named: str, workers: int) -> None:
    """At the resume, once, whatever the workers' copies hold; with what to do."""
    (line,) = told(training(Transformed if change is inside else Weighted, change, workers))
    assert line.startswith("warning: the loader 'loader': ")
    assert named in line
    assert "give the data set state_dict and load_state_dict" in line


class Sample:
    def __init__(self) -> None:
        self.weight, self.image = 1.0, None

    def load(self) -> Any:
        if self.image is None:
            self.image = torch.zeros(2)
        return self.image + self.size

    @functools.cached_property
    def size(self) -> int:
        return 3


class Sampled(Weighted):
    """Many objects: each keeps what it has loaded, the training sets its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.samples = [Sample() for _ in range(100)]

    def __getitem__(self, index: int) -> Any:
        self.samples[index].loaded = index  # type: ignore[attr-defined]
        return super().__getitem__(index) + self.samples[index].load()


def weighted(items: Any, step: int) -> None:
    items.samples[step].weight = 2.0


def test_an_attribute_of_one_of_many_objects_is_told() -> None:
    """They are too many to be carried; what the data set's own code sets in them while it loads is a cache."""
    (line,) = told(training(Sampled, weighted, 0))
    assert "the attribute 'samples' of Sampled is not what it was when the run was cut (other items)" in line
    assert not told(training(Sampled, None, 0))


class Caching(Weighted):
    """Keeps what it has made, and what was asked for, in all the ways that there are."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, Any] = {}
        self.rows: list[Any] = [None] * LARGE
        self.asked: list[int] = []
        self.parts: list[dict[int, Any]] = [{}]
        self.known: dict[int, Any] = {}
        self.transform = Keeping()

    def __getitem__(self, index: int) -> Any:
        if index not in self.made:
            self.made[index] = super().__getitem__(index)
        self.asked.extend([index] * LARGE)
        self.parts[0][index] = bytes(LARGE)
        rows = self.rows
        rows[index] = self.made[index]
        return self.transform(self.looked_up(index)) + self.rows[index]

    def looked_up(self, index: int) -> Any:
        return self.known.setdefault(index, torch.zeros(LARGE))[0]


class Keeping:
    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, x: Any) -> Any:
        remember(self, x)
        return x


def remember(one: Keeping, x: Any) -> None:
    one.seen += [float(x)] * LARGE


class AtOnce(Caching):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self[index] for index in indices]


@pytest.mark.parametrize("dataset", [Weighted, Caching, AtOnce])
def test_what_is_filled_while_loading_is_a_cache(dataset: Any) -> None:
    """No workers, so that the training process has filled it: it is made again, and nothing is told."""
    assert told(training(dataset, None)) == []
