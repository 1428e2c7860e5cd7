"""Every cut of a loop over `chainrun.DataLoader` equals torch's loader in a plain program, bit for bit."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chain import PlainRun, Segment, cut, digest, marks, plain, sweep, sweep_boundaries
from torch.utils import data

import chainrun
from chainrun.errors import RegisterError, RestoreError
from chainrun.training.stop import SegmentEnd

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


# ---- parts -------------------------------------------------------------------------------------------


class Noisy(data.Dataset):
    """Items with a draw from each of the three global generators, made where the item is made."""

    def __init__(self, length: int = 10) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()]).double()


class AtOnce(Noisy):
    """Fetches a batch with one call."""

    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] + random.random() for index in indices]


class Own(Noisy):
    """Draws from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numpy = np.random.default_rng(1)
        self.old = np.random.RandomState(2)
        self.python = random.Random(3)
        self.torch = torch.Generator().manual_seed(4)

    def __getitem__(self, index: int) -> torch.Tensor:
        draws = self.numpy.normal(), self.old.normal(), self.python.gauss(0, 1)
        return torch.tensor([index, *draws]).double() + torch.rand((), generator=self.torch)


MODULE_GENERATOR = np.random.default_rng(5)


def _jitter() -> float:
    return float(MODULE_GENERATOR.normal())


class OwnOfModule(Noisy):
    """Draws from a generator of its module, by way of a function, and from one of its class."""

    shared = random.Random(6)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, _jitter(), self.shared.random(), 0.0]).double()


class Slots:
    """A transform without ``__dict__``."""

    __slots__ = ("generator",)

    def __init__(self) -> None:
        self.generator = np.random.default_rng(7)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.generator.normal()


class Transformed(Noisy):
    def __init__(self) -> None:
        super().__init__()
        self.transforms = [Slots()]

    def __getitem__(self, index: int) -> torch.Tensor:
        return functools.reduce(
            lambda x, transform: transform(x), self.transforms, super().__getitem__(index)
        )


class Counting(Noisy):
    """Has state besides random generators, and says so."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __getitem__(self, index: int) -> torch.Tensor:
        self.count += 1
        return super().__getitem__(index) + self.count

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def drawing_collate(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(items) + random.random() + np.random.rand() + torch.rand(())


def collate_with(generator: np.random.Generator) -> Any:
    return lambda items: torch.stack(items) + generator.normal()


def seeding_init(worker: int) -> None:
    seed = torch.utils.data.get_worker_info().seed % 2**32
    np.random.seed(seed)
    random.seed(worker)


def seeding_own(worker: int) -> None:
    data.get_worker_info().dataset.numpy = np.random.default_rng(100 + worker)


class Lazy(data.Sampler):
    """Draws each index when it is asked for, from the random stream that nothing else here uses."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(int(torch.randint(100, ())))
        for _ in range(self.n):
            yield int(torch.randint(self.n, (), generator=generator))


class Eager(Lazy):
    """Draws the permutation in ``iter()``."""

    def __iter__(self) -> Any:
        return iter(np.random.permutation(self.n).tolist())


class Interleaved(Lazy):
    """Draws each index when it is asked for, from the random stream that the training draws from too."""

    def __iter__(self) -> Any:
        for _ in range(self.n):
            yield random.randrange(self.n)


class CountingEpochs(Lazy):
    """Seeds itself with a counter of its own."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.passes = 0

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(np.random.default_rng(self.passes).permutation(self.n).tolist())


class Shuffling(Lazy):
    """Shuffles the same list again and again."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.indices = list(range(n))

    def __iter__(self) -> Any:
        random.shuffle(self.indices)
        return iter(list(self.indices))


class WithState(CountingEpochs):
    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes = state["passes"]


class NumpyIndices(Lazy):
    """Yields what marshal does not know."""

    def __iter__(self) -> Any:
        return iter(np.random.permutation(self.n))


class Pairs(data.Sampler):
    """A batch sampler: batches of uneven size, from the global streams."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Any:
        order = np.random.permutation(self.n).tolist()
        for size in (1, 2, 3, 4):
            yield [order.pop() for _ in range(size)]


# ---- one loader, cut everywhere ----------------------------------------------------------------------


def training(
    dataset: Any = Noisy, epochs: int = 3, per_epoch: Any = None, per_batch: Any = None, **options: Any
) -> Any:
    """Return a training over one loader that draws from all three streams itself too.

    `dataset` makes the data set; options that are made from it are given as functions in `Made`.
    """
    options = {"batch_size": 3, **options}

    def train(run: Any, DataLoader: Any) -> str:
        items = dataset()
        made = {k: v.make(items) if isinstance(v, Made) else v for k, v in options.items()}
        loader = DataLoader(items, **made)
        model = torch.nn.Linear(4, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for epoch in run.epochs(epochs):
            _ = random.random(), np.random.rand(), torch.rand(())
            if per_epoch is not None:
                per_epoch(loader, epoch)
            for x in loader:
                loss = model(torch.nn.functional.dropout(x, 0.2)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                _ = random.random(), np.random.rand()
                run.step(loss=loss, **marks(x, model))
                if per_batch is not None and per_batch(run):
                    break
            run.log(after=torch.rand(()))
        return digest(model.state_dict(), optimizer.state_dict())

    return train


@dataclass
class Made:
    """An argument of the loader that is made from the data set."""

    make: Any


def _sampler(make: Any) -> dict[str, Any]:
    return {"sampler": Made(make)}


def _set_epoch(loader: Any, epoch: int) -> None:
    loader.sampler.set_epoch(epoch)


def _fresh_module() -> OwnOfModule:
    """As a new process finds it."""
    MODULE_GENERATOR.bit_generator.state = np.random.default_rng(5).bit_generator.state
    OwnOfModule.shared.seed(6)
    return OwnOfModule()


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain order": (12, {}),
    "shuffled": (12, {"shuffle": True}),
    "last batch dropped": (9, {"shuffle": True, "drop_last": True}),
    "no batches": (12, {"dataset": lambda: Noisy(4), "shuffle": True, "batch_size": None}),
    "own generator": (12, {"shuffle": True, "generator": Made(lambda d: torch.Generator().manual_seed(9))}),
    "replacement": (12, _sampler(lambda d: data.RandomSampler(d, replacement=True))),
    "weighted": (12, _sampler(lambda d: data.WeightedRandomSampler(torch.arange(10) + 1.0, 10))),
    "subset sampler": (9, _sampler(lambda d: data.SubsetRandomSampler(range(2, 10)))),
    "lazy sampler": (12, _sampler(lambda d: Lazy(10))),
    "eager sampler": (12, _sampler(lambda d: Eager(10))),
    "counting sampler": (12, _sampler(lambda d: CountingEpochs(10))),
    "shuffling sampler": (12, _sampler(lambda d: Shuffling(10))),
    "sampler with state": (12, _sampler(lambda d: WithState(10))),
    "numpy indices": (12, _sampler(lambda d: NumpyIndices(10))),
    "batch sampler": (12, {"batch_size": 1, "batch_sampler": Made(lambda d: Pairs(10))}),
    "distributed": (
        6,
        {
            **_sampler(lambda d: data.DistributedSampler(d, num_replicas=2, rank=1, seed=3)),
            "per_epoch": _set_epoch,
        },
    ),
    "drawing collate": (12, {"shuffle": True, "collate_fn": drawing_collate}),
    "collate with a generator": (
        12,
        {"shuffle": True, "collate_fn": Made(lambda d: collate_with(np.random.default_rng(8)))},
    ),
    "batches at once": (12, {"dataset": AtOnce, "shuffle": True}),
    "subset": (9, {"dataset": lambda: data.Subset(Noisy(20), range(3, 12)), "shuffle": True}),
    "subset at once": (9, {"dataset": lambda: data.Subset(AtOnce(20), range(3, 12)), "shuffle": True}),
    "own generators": (12, {"dataset": Own, "shuffle": True}),
    "generators of module and class": (12, {"dataset": _fresh_module, "shuffle": True}),
    "generator in a transform": (12, {"dataset": Transformed, "shuffle": True}),
    "data set with state": (12, {"dataset": Counting, "shuffle": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loader_without_workers_is_exact_at_every_cut(name: str) -> None:
    """Data set, sampler and training draw from the same streams; every cut continues them."""
    steps, options = VARIANTS[name]
    sweep(training(**options), steps)


@pytest.mark.parametrize("name", VARIANTS)
def test_loader_with_two_workers_is_exact_at_every_cut(name: str) -> None:
    """The workers' streams go on where the last batch handed out left them."""
    steps, options = VARIANTS[name]
    sweep(training(num_workers=2, **options), steps, quick=True)


WORKERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (12, {"num_workers": 1}),
    "three": (12, {"num_workers": 3}),
    "prefetch 1": (12, {"num_workers": 2, "prefetch_factor": 1}),
    "prefetch 4": (12, {"num_workers": 2, "prefetch_factor": 4}),
    "init seeds": (12, {"num_workers": 2, "worker_init_fn": seeding_init}),
    "init makes a generator": (12, {"num_workers": 2, "worker_init_fn": seeding_own, "dataset": Own}),
    "persistent": (12, {"num_workers": 2, "persistent_workers": True}),
    "persistent, prefetch 4": (12, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4}),
    "persistent, own generators": (12, {"num_workers": 2, "persistent_workers": True, "dataset": Own}),
    "persistent, data set with state": (
        12,
        {"num_workers": 2, "persistent_workers": True, "dataset": Counting},
    ),
    "persistent, eager sampler": (
        12,
        {"num_workers": 2, "persistent_workers": True, "shuffle": False, **_sampler(lambda d: Eager(10))},
    ),
    "persistent, shuffling sampler": (
        12,
        {"num_workers": 2, "persistent_workers": True, "shuffle": False, **_sampler(lambda d: Shuffling(10))},
    ),
    "persistent, drawing collate": (
        12,
        {"num_workers": 2, "persistent_workers": True, "collate_fn": drawing_collate},
    ),
    "persistent, own generator": (
        12,
        {
            "num_workers": 2,
            "persistent_workers": True,
            "generator": Made(lambda d: torch.Generator().manual_seed(9)),
        },
    ),
}


@pytest.mark.parametrize("name", WORKERS)
def test_workers_of_every_kind_are_exact_at_every_cut(name: str) -> None:
    """Numbers of workers, prefetching, worker_init_fn and workers that live over the epochs."""
    steps, options = WORKERS[name]
    sweep(training(**{"shuffle": True, **options}), steps, quick=True)
