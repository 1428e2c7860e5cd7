"""Every cut of a loop over `chainrun.DataLoader` equals torch's loader in a plain program, bit for bit."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import gc
import multiprocessing
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from chain import WHOLE, Segment, cut, cut_everywhere, digest, marks, plain, sweep
from torch.utils import data

import chainrun
from chainrun.errors import RegisterError, RestoreError
from chainrun.training import contents

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


class Balanced(Lazy):
    """Shuffles the indices of each label in place, as samplers for contrastive losses do."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        labels = np.arange(n) % 2
        self.of = {label: np.where(labels == label)[0] for label in labels}
        self.used = {int(label): 0 for label in labels}
        self.names = collections.defaultdict(list, odd=[*range(1, n, 2)], even=[*range(0, n, 2)])

    def __iter__(self) -> Any:
        for label, indices in self.of.items():
            np.random.shuffle(indices)
            self.used[int(label)] += 1
        for indices in self.names.values():
            random.shuffle(indices)
        self.names["more"].append(sum(self.used.values()) % 2)
        return iter([*self.of[0], *self.names["odd"], self.names["more"][-1]][: self.n])


class Shuffling(Lazy):
    """Shuffles the same list again and again."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.indices = list(range(n))

    def __iter__(self) -> Any:
        random.shuffle(self.indices)
        return iter(list(self.indices))


class Pace:
    """How many of the indices are used so far."""

    def __init__(self) -> None:
        self.of = {"used": 6}


class Paced(Lazy):
    """A curriculum, whose pace the training sets."""

    def __init__(self, n: int, pace: Pace) -> None:
        super().__init__(n)
        self.pace = pace

    def __iter__(self) -> Any:
        return iter(np.random.permutation(self.pace.of["used"]).tolist() * 2)


class Plain:
    """A sampler that is no torch.utils.data.Sampler, and counts."""

    def __init__(self, n: int) -> None:
        self.n, self.passes = n, 0

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Any:
        self.passes += 1
        return iter(np.random.default_rng(self.passes).permutation(self.n).tolist())


class PlainPairs:
    """Its batches."""

    def __init__(self, sampler: Plain) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler) // 2

    def __iter__(self) -> Any:
        indices = [*self.sampler]
        return iter([indices[at : at + 2] for at in range(0, len(indices), 2)])


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


def _go_faster(loader: Any, epoch: int) -> None:
    loader.sampler.pace.of["used"] += epoch


def _set_epoch(loader: Any, epoch: int) -> None:
    loader.sampler.set_epoch(epoch)


def _fresh_module() -> OwnOfModule:
    """As a new process finds it."""
    MODULE_GENERATOR.bit_generator.state = np.random.default_rng(5).bit_generator.state
    OwnOfModule.shared.seed(6)
    return OwnOfModule()


VARIANTS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain order": (4, {}),
    "shuffled": (4, {"shuffle": True}),
    "last batch dropped": (3, {"shuffle": True, "drop_last": True}),
    "no batches": (4, {"dataset": lambda: Noisy(4), "shuffle": True, "batch_size": None}),
    "own generator": (4, {"shuffle": True, "generator": Made(lambda d: torch.Generator().manual_seed(9))}),
    "replacement": (4, _sampler(lambda d: data.RandomSampler(d, replacement=True))),
    "weighted": (4, _sampler(lambda d: data.WeightedRandomSampler(torch.arange(10) + 1.0, 10))),
    "subset sampler": (3, _sampler(lambda d: data.SubsetRandomSampler(range(2, 10)))),
    "lazy sampler": (4, _sampler(lambda d: Lazy(10))),
    "eager sampler": (4, _sampler(lambda d: Eager(10))),
    "counting sampler": (4, _sampler(lambda d: CountingEpochs(10))),
    "shuffling sampler": (4, _sampler(lambda d: Shuffling(10))),
    "balanced sampler": (4, _sampler(lambda d: Balanced(10))),
    "paced sampler": (4, {**_sampler(lambda d: Paced(10, Pace())), "per_epoch": _go_faster}),
    "plain samplers": (4, {"batch_size": 1, "batch_sampler": Made(lambda d: PlainPairs(Plain(8)))}),
    "sampler with state": (4, _sampler(lambda d: WithState(10))),
    "numpy indices": (4, _sampler(lambda d: NumpyIndices(10))),
    "batch sampler": (4, {"batch_size": 1, "batch_sampler": Made(lambda d: Pairs(10))}),
    "distributed": (
        2,
        {
            **_sampler(lambda d: data.DistributedSampler(d, num_replicas=2, rank=1, seed=3)),
            "per_epoch": _set_epoch,
        },
    ),
    "drawing collate": (4, {"shuffle": True, "collate_fn": drawing_collate}),
    "collate with a generator": (
        4,
        {"shuffle": True, "collate_fn": Made(lambda d: collate_with(np.random.default_rng(8)))},
    ),
    "batches at once": (4, {"dataset": AtOnce, "shuffle": True}),
    "subset": (3, {"dataset": lambda: data.Subset(Noisy(20), range(3, 12)), "shuffle": True}),
    "subset at once": (3, {"dataset": lambda: data.Subset(AtOnce(20), range(3, 12)), "shuffle": True}),
    "own generators": (4, {"dataset": Own, "shuffle": True}),
    "generators of module and class": (4, {"dataset": _fresh_module, "shuffle": True}),
    "generator in a transform": (4, {"dataset": Transformed, "shuffle": True}),
    "data set with state": (4, {"dataset": Counting, "shuffle": True}),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_loader_without_workers_is_exact_at_every_cut(name: str) -> None:
    """Data set, sampler and training draw from the same streams; every cut continues them."""
    per_epoch, options = VARIANTS[name]
    quick = name not in ("shuffled", "own generator", "shuffling sampler")
    sweep(training(epochs=3, **options), 3 * per_epoch, quick=quick)


@pytest.mark.skipif(WHOLE, reason="`make exact` does the one above with workers too")
@pytest.mark.parametrize("name", VARIANTS)
def test_loader_with_workers_is_exact_at_every_cut(name: str) -> None:
    """The workers' streams go on where the last batch handed out left them."""
    per_epoch, options = VARIANTS[name]
    cut_everywhere(training(num_workers=2, epochs=2, **options), least=2 * per_epoch)


WORKERS: dict[str, dict[str, Any]] = {
    "one": {"num_workers": 1},
    "three": {"num_workers": 3},
    "prefetch 1": {"num_workers": 2, "prefetch_factor": 1},
    "prefetch 4": {"num_workers": 2, "prefetch_factor": 4},
    "init seeds": {"num_workers": 2, "worker_init_fn": seeding_init},
    "init makes a generator": {"num_workers": 2, "worker_init_fn": seeding_own, "dataset": Own},
    "persistent": {"num_workers": 2, "persistent_workers": True},
    "persistent, prefetch 4": {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 4},
    "persistent, own generators": {"num_workers": 2, "persistent_workers": True, "dataset": Own},
    "persistent, data set with state": {"num_workers": 2, "persistent_workers": True, "dataset": Counting},
    "persistent, eager sampler": {
        "num_workers": 2,
        "persistent_workers": True,
        "shuffle": False,
        **_sampler(lambda d: Eager(10)),
    },
    "persistent, shuffling sampler": {
        "num_workers": 2,
        "persistent_workers": True,
        "shuffle": False,
        **_sampler(lambda d: Shuffling(10)),
    },
    "persistent, drawing collate": {
        "num_workers": 2,
        "persistent_workers": True,
        "collate_fn": drawing_collate,
    },
    "persistent, own generator": {
        "num_workers": 2,
        "persistent_workers": True,
        "generator": Made(lambda d: torch.Generator().manual_seed(9)),
    },
}


@pytest.mark.parametrize("name", WORKERS)
def test_workers_of_every_kind_are_exact_at_every_cut(name: str) -> None:
    """Numbers of workers, prefetching, worker_init_fn and workers that live over the epochs."""
    cut_everywhere(training(**{"shuffle": True, **WORKERS[name]}), least=12)


# ---- several loaders, and loops left early -----------------------------------------------------------


def parts() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(4, 2).double()
    return model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)


def learn(run: Any, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *batches: torch.Tensor) -> None:
    """One optimization step, on everything that is given."""
    loss = sum(model(torch.nn.functional.dropout(x, 0.2)).square().mean() for x in batches)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.step(loss=loss, **marks(batches, model))


WORKER_KINDS: dict[str, dict[str, Any]] = {
    "no workers": {},
    "two workers": {"num_workers": 2},
    "persistent": {"num_workers": 2, "persistent_workers": True},
}
each_kind = pytest.mark.parametrize("kind", WORKER_KINDS)


@each_kind
def test_two_zipped_loaders(kind: str) -> None:
    """Both loaders go on at their own places, also where the shorter one ends the loop."""
    options = WORKER_KINDS[kind]

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        long = DataLoader(Noisy(9), batch_size=2, shuffle=True, **options)
        short = DataLoader(Noisy(8), batch_size=2, shuffle=True, **options)
        run.register(model=model, optimizer=optimizer, long=long, short=short)
        for epoch in run.epochs(2):
            order = (long, short) if epoch else (short, long)
            for x, y in zip(*order, strict=False):
                learn(run, model, optimizer, x, y)
        return digest(model.state_dict())

    sweep(train, 8, quick=kind != "no workers")


@each_kind
def test_training_and_evaluation_loaders_in_turn(kind: str) -> None:
    """An evaluation over a registered loader follows each epoch; a cut comes before or after it as a whole."""
    options = WORKER_KINDS[kind]

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        loader = DataLoader(Noisy(7), batch_size=2, shuffle=True, **options)
        held_out = DataLoader(Noisy(4), batch_size=2, shuffle=True, **options)
        run.register(model=model, optimizer=optimizer, loader=loader, held_out=held_out)
        for _ in run.epochs(3):
            for x in loader:
                learn(run, model, optimizer, x)
            run.log(accuracy=sum(model(x).sum() for x in held_out), **marks(torch.rand(2)))
        return digest(model.state_dict())

    sweep(train, 12, quick=kind != "no workers")


@each_kind
def test_endless_second_loader_held_over_the_epochs(kind: str) -> None:
    """As FixMatch does: ``it = iter(unlabeled)`` once, ``next(it)`` every step, begun again where it ends."""
    options = WORKER_KINDS[kind]

    def train(run: Any, DataLoader: Any) -> str:
        labeled = DataLoader(Noisy(6), batch_size=2, shuffle=True, **options)
        unlabeled = DataLoader(Noisy(8), batch_size=2, shuffle=True, **options)
        model, optimizer = parts()
        run.register(model=model, optimizer=optimizer, labeled=labeled, unlabeled=unlabeled)
        it = iter(unlabeled)
        torch.rand(3)  # lazily drawn permutations are drawn after this
        for _ in run.epochs(4):
            for x in labeled:
                try:
                    u = next(it)
                except StopIteration:
                    it = iter(unlabeled)
                    u = next(it)
                learn(run, model, optimizer, x, u)
        return digest(model.state_dict())

    sweep(train, 12, quick=kind != "no workers")


@each_kind
def test_loop_left_by_break(kind: str) -> None:
    """A ``break`` after some batches, with what was prefetched beyond it thrown away."""
    options = WORKER_KINDS[kind]

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        loader = DataLoader(Noisy(20), batch_size=2, shuffle=True, **options)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(3):
            for x in loader:
                learn(run, model, optimizer, x)
                run.state["n"] = run.state.get("n", 0) + 1
                if run.state["n"] % 3 == 0:
                    break
            run.log(drawn=torch.rand(()))
        return digest(model.state_dict())

    sweep(train, 9, quick=kind != "no workers")


@each_kind
def test_look_at_the_first_batch_before_the_loop(kind: str) -> None:
    """``next(iter(loader))`` before the training, and before each epoch, gives the same batch on a resume."""
    options = WORKER_KINDS[kind]

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        loader = DataLoader(Noisy(6), batch_size=2, shuffle=True, **options)
        run.register(model=model, optimizer=optimizer, loader=loader)
        sample = next(iter(loader))
        for _ in run.epochs(3):
            other = next(iter(loader))
            for x in loader:
                learn(run, model, optimizer, x, sample, other)
        return digest(model.state_dict())

    sweep(train, 9, quick=kind != "no workers")


@each_kind
def test_pass_over_the_data_before_the_training(kind: str) -> None:
    """Statistics gathered over the registered loader are the same on a resume, not those of no batches."""
    options = WORKER_KINDS[kind]

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        loader = DataLoader(Noisy(6), batch_size=2, shuffle=True, **options)
        run.register(model=model, optimizer=optimizer, loader=loader)
        mean = sum(x.sum() for x in loader)
        for _ in run.epochs(2):
            offset = sum(x.sum() for x in loader)
            for x in loader:
                learn(run, model, optimizer, x - mean - offset)
        return digest(model.state_dict(), mean)

    sweep(train, 6, quick=kind != "no workers")


def test_data_set_used_by_the_training_process_too() -> None:
    """Workers begin an epoch with the data set as the training process then has it."""

    def train(run: Any, DataLoader: Any) -> str:
        model, optimizer = parts()
        items = Own()
        loader = DataLoader(items, batch_size=4, shuffle=True, num_workers=2)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(3):
            for x in loader:
                learn(run, model, optimizer, x, items[0][None])
        return digest(model.state_dict())

    sweep(train, 9, quick=True)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked(method: str) -> None:
    """They are set to the same state."""
    train = training(epochs=1, shuffle=True, num_workers=1, multiprocessing_context=method)
    reference = plain(train)
    assert reference.difference(cut(train, (3,))) is None


@pytest.mark.parametrize("workers", [0, 1])
def test_an_iterator_that_was_made_before_its_loader_was_registered_is_refused(workers: int) -> None:
    """It is torch's own; one that is only looked at before is held by a variable, and does no harm."""

    def train(run: Any, DataLoader: Any, goes_on: bool) -> None:
        loader = DataLoader(Noisy(), batch_size=4, shuffle=True, num_workers=workers)
        batches = iter(loader)
        next(batches)
        run.register(loader=loader)
        for _ in run.epochs(2):
            for batch in loader:
                run.step(**marks(batch))
        if goes_on:
            next(batches)

    does_not = functools.partial(train, goes_on=False)
    if workers:  # torch waits for those of iterators that nobody asks any more, 5 seconds now and then
        assert plain(does_not).difference(cut(does_not, (3,))) is None
    else:
        cut_everywhere(does_not)
    with pytest.raises(
        RegisterError, match=r"loader 'loader' was made before run\.register\(\) and is asked"
    ):
        cut(functools.partial(train, goes_on=True))


def test_unregistered_loader_is_torchs() -> None:
    """Without `register` nothing is added: the same batches, the same draws."""

    def train(run: Any, DataLoader: Any) -> str:
        loader = DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=1)
        return digest([x for _ in range(2) for x in loader])

    assert plain(train).difference(cut(train)) is None


# ---- refused -----------------------------------------------------------------------------------------


def test_batches_out_of_order_are_refused_when_the_loader_is_built() -> None:
    """Their order depends on timing."""
    with pytest.raises(RegisterError, match="in_order=False"):
        chainrun.DataLoader(Noisy(), num_workers=1, in_order=False)
    chainrun.DataLoader(Noisy(), in_order=False)  # means nothing without workers


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "num_workers": ({"num_workers": 2}, "num_workers 2, the checkpoint was taken with 1"),
    "no workers": ({"num_workers": 0}, "num_workers 0, the checkpoint was taken with 1"),
    "prefetch_factor": ({"prefetch_factor": 3}, "prefetch_factor 3, the checkpoint was taken with 2"),
    "persistent_workers": ({"persistent_workers": True}, "persistent_workers True"),
    "batch_size": ({"batch_size": 4}, "batch_size 4, the checkpoint was taken with 3"),
    "drop_last": ({"drop_last": True}, "drop_last True"),
    "shuffle": ({"shuffle": True}, "sampler RandomSampler, the checkpoint was taken with SequentialSampler"),
    "length": ({"dataset": lambda: Noisy(11)}, "length of the data set 11, the checkpoint was taken with 10"),
}


@pytest.mark.parametrize("after", [2, 4])
@pytest.mark.parametrize("what", CHANGES)
def test_loader_built_otherwise_is_refused_at_resume(what: str, after: int) -> None:
    """Whether it was cut within an epoch or between two: the batches could not be continued."""
    changed, message = CHANGES[what]
    before = training(num_workers=1, epochs=2)
    with pytest.raises(RestoreError, match=message):
        cut([before, training(**{"num_workers": 1, "epochs": 2, **changed})], (after,))


def growing(run: Any, DataLoader: Any) -> str:
    """A curriculum: every epoch has more items."""
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    subset = torch.utils.data.Subset(torch.randn(100, 2), range(4))  # type: ignore[arg-type]
    loader = DataLoader(subset, batch_size=2, shuffle=True)
    run.register(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(3):
        subset.indices = range(4 + 2 * epoch)
        for x in loader:
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
    return digest(model.state_dict())


def test_a_data_set_may_change_its_length_between_passes() -> None:
    cut_everywhere(growing, least=9)


def test_indices_in_the_state_that_grow_are_exact_at_every_cut() -> None:
    """Active learning: what has been labeled is kept in `run.state`, and a resumed function builds its subset from that."""

    def train(run: Any, DataLoader: Any) -> str:
        labeled = run.state.setdefault("labeled", [*range(6)])
        model, optimizer = parts()
        loader = DataLoader(data.Subset(Noisy(20), labeled), batch_size=3, shuffle=True)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for epoch in run.epochs(3):
            for batch in loader:
                learn(run, model, optimizer, batch)
            labeled += [6 + epoch, 12 + epoch % 2]
        return digest(model.state_dict())

    cut_everywhere(train, least=8)


def test_a_pass_over_another_length_is_refused_at_resume() -> None:
    """Where the loop has made it another one since it was registered, and does not do so again."""

    def once(run: Any, DataLoader: Any) -> None:
        dataset = [float(n) for n in range(8)]
        loader = DataLoader(dataset, batch_size=2)
        run.register(loader=loader)
        if not run.resumed:
            dataset.extend([8.0, 9.0])
        for _ in loader:
            run.step()

    with pytest.raises(RestoreError, match="has 8 items, and had 10 in the pass"):
        cut(once, (2,))


def test_sampler_that_does_not_repeat_is_refused_at_resume() -> None:
    """A sampler whose indices depend on what is not saved is found out before its batches are used."""
    first = training(sampler=Made(lambda d: [*range(10)]))
    other = training(sampler=Made(lambda d: [*range(1, 10), 0]))
    with pytest.raises(RestoreError, match="sampler of the loader 'loader' did not repeat"):
        cut([first, other], (2,))


def test_sampler_that_keeps_an_iterator_is_refused() -> None:
    """How far that has come no checkpoint can hold: it would give other indices from the second pass on."""

    class Stream(Lazy):
        def __init__(self, n: int) -> None:
            super().__init__(n)
            self.kept = (int(index) for index in iter(lambda: np.random.randint(n), -1))

        def __iter__(self) -> Any:
            return iter([next(self.kept) for _ in range(self.n)])

    with pytest.raises(
        RegisterError, match=r"the sampler Stream keeps an iterator in 'kept'.* in each __iter__\(\)"
    ):
        cut(training(sampler=Made(lambda d: Stream(10))))


@pytest.mark.parametrize("workers", [0, 2])
def test_sampler_that_takes_turns_with_the_training_is_refused_at_once(workers: int) -> None:
    """Draws of a sampler, one a batch, from the stream the training draws from cannot be repeated alone."""
    train = training(sampler=Made(lambda d: Interleaved(10)), num_workers=workers, batch_size=1)
    with pytest.raises(RegisterError, match="draws from the stream 'python' batch after batch"):
        cut(train)


class Late(Noisy):
    """Makes its generator when it is first used."""

    generator: Any = None

    def __getitem__(self, index: int) -> torch.Tensor:
        if self.generator is None:
            self.generator = np.random.default_rng(index)
        return super().__getitem__(index) + self.generator.normal()


@pytest.mark.parametrize("workers", [0, 2])
def test_generator_made_while_loading_is_refused_at_once(workers: int) -> None:
    """A resumed process could not know of it; the first batch says so, not the resume."""
    with pytest.raises(RegisterError, match="create them when the object is built"):
        cut(training(Late, num_workers=workers))


def test_loader_used_from_another_thread_is_refused() -> None:
    """A prefetching thread runs ahead of the training by an unknown number of batches."""

    def train(run: Any, DataLoader: Any) -> None:
        loader = DataLoader(Noisy())
        run.register(loader=loader)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(next, iter(loader)).result()

    with pytest.raises(RegisterError, match="used from a thread"):
        cut(train)


def test_two_passes_at_the_same_time_are_refused() -> None:
    """One loader in two running loops could not be told apart."""

    def train(run: Any, DataLoader: Any) -> None:
        loader = DataLoader(Noisy())
        run.register(loader=loader)
        for _ in zip(loader, loader, strict=True):
            run.step()

    with pytest.raises(RegisterError, match="two passes over the loader 'loader'"):
        cut(train)


HELD = """
import sys, torch, chainrun
run = chainrun.Run(sys.argv[1])
loader = chainrun.DataLoader(torch.arange(40.0), batch_size=2, num_workers=2)
run.register(loader=loader)
held = iter(loader)
print(next(held).tolist())
"""


def test_a_program_ends_although_a_variable_holds_an_iterator_with_workers(tmp_path: Path) -> None:
    """They ignore the signal with which Python ends them, and are not waited for."""
    command = [sys.executable, "-c", HELD, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0.0, 1.0]\n", "")


def test_workers_of_an_iterator_that_is_collected_from_a_cycle_are_not_waited_for(tmp_path: Path) -> None:
    """As that of a training whose error somebody keeps: torch cannot tell them to end any more."""
    others = multiprocessing.active_children()
    with Segment(tmp_path) as run:
        loader = chainrun.DataLoader(Noisy(), num_workers=2)
        run.register(loader=loader)
        held: list[Any] = [iter(loader)]
        next(held[0])
        workers = [one for one in multiprocessing.active_children() if one not in others]
        held.append(held)
        chain = run._registry.loaders["loader"]
        chain._pass = chain._inner = None
        del held
        for _ in range(50):  # while another thread collects, this does nothing
            gc.collect()
            if all(worker.exitcode is not None for worker in workers):
                break
            time.sleep(0.1)
        assert [worker.exitcode for worker in workers] == [-signal.SIGKILL] * 2


# ---- what data set and collate function keep in attributes ----------------------------------------------


class Crop:
    """A collate function that counts, and draws for itself."""

    def __init__(self) -> None:
        self.own, self.calls = random.Random(5), 0

    def __call__(self, items: list[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return (torch.stack(items) * self.own.random() + self.calls) / 100


class Remembering(Noisy):
    """Items that it has drawn come again, harder; what opens a file once has a flag for it."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.level, self.drawn = 1.0, {}
        self.labels = torch.zeros(length).double(), "a name"
        self.file, self.is_open = None, False
        self.cache: dict[int, bytes] = {}

    def __getitem__(self, index: int) -> torch.Tensor:
        if index not in self.drawn:
            self.drawn[index] = super().__getitem__(index)
        self.cache.setdefault(index, bytes(10_000))  # grows large, and is no state
        return self.drawn[index] * self.level + self.labels[0][index]


class Opening(Noisy):
    """Its flag must not come back without its file."""

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.is_open = False

    def __getitem__(self, index: int) -> torch.Tensor:
        if not self.is_open:
            self.file, self.is_open = open(__file__), True  # noqa: SIM115
        assert self.file.readable()
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
def test_attributes_of_data_and_collate_that_change_are_exact_at_every_cut(workers: int) -> None:
    """A level raised after each epoch, labels written at each step through another name, a cache of draws, a count."""

    def train(run: Any, DataLoader: Any) -> str:
        items = Remembering(8)
        labels = items.labels[0]
        model, optimizer = parts()
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = DataLoader(items, batch_size=2, shuffle=True, collate_fn=Crop(), **options)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(3):
            for batch in loader:
                labels[run.global_step % 8] += batch.sum()
                learn(run, model, optimizer, batch)
            items.level *= 1.5
        return digest(model.state_dict())

    cut_everywhere(train, least=12)


class Played(NamedTuple):
    number: int
    gain: float


class Replayed(Noisy):
    """What the training adds to, in containers of all kinds, and settings that it changes."""

    def __init__(self, settings: argparse.Namespace) -> None:
        super().__init__(8)
        self.settings, self.level = settings, multiprocessing.Value("d", 1.0)
        self.records = np.zeros(2, dtype=[("loss", "f8"), ("of", "U4")])
        self.wide = np.zeros(1, dtype=np.longdouble)
        self.prompt = torch.nn.Parameter(torch.zeros(4, dtype=torch.double))
        self.seen: Any = collections.Counter()
        self.of: Any = collections.defaultdict(list, {0: [1.0]})
        self.order: Any = collections.OrderedDict(first=1.0)
        self.deep = {"by": collections.defaultdict(dict, {"name": {"a": 1.0}})}
        self.played: Any = collections.deque([Played(0, 1.0)], maxlen=3)

    def __getitem__(self, index: int) -> torch.Tensor:
        parts = (
            self.settings.noise,
            self.level.value,
            self.seen[0],
            sum(self.of[0]),
            next(iter(self.order.values())),
        )
        parts += float(self.records["loss"].sum()), len(self.records["of"][0]), float(self.wide[0])
        numbers = (*parts, self.deep["by"]["name"]["a"], self.played[-1].gain, self.played[0].number)
        return super().__getitem__(index) + sum(numbers) / 10 + self.prompt.detach()

    def train(self, loss: float) -> None:
        self.prompt.data += loss
        self.records["loss"][1] += loss
        self.records["of"][0] += "a"
        self.wide += 1
        self.settings.noise *= 0.5
        self.level.value += 0.25
        self.seen[0] += 1
        self.of[0].append(loss)
        self.order["last"] = loss
        self.order.move_to_end("first")
        self.deep["by"]["name"]["a"] = loss
        self.played.append(Played(len(self.seen), loss))


@pytest.mark.parametrize("workers", [0, 1])
def test_containers_and_settings_that_the_training_changes_are_exact_at_every_cut(workers: int) -> None:
    """A Counter, a defaultdict, a deque of named tuples, a Namespace, a parameter, records, a number that workers share."""

    def train(run: Any, DataLoader: Any) -> str:
        items = Replayed(argparse.Namespace(noise=1.0, name="any"))
        model, optimizer = parts()
        options = {"num_workers": workers, "persistent_workers": workers > 0}
        loader = DataLoader(items, batch_size=2, shuffle=True, **options)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(3):
            for batch in loader:
                learn(run, model, optimizer, batch)
            items.train(batch.mean().item())
        assert [type(x).__name__ for x in (items.seen, items.of, items.played[0])] == [
            "Counter",
            "defaultdict",
            "Played",
        ]
        return digest(model.state_dict())

    cut_everywhere(train, least=12)


class Mode(enum.Enum):
    EASY = 1
    HARD = 2


class Moody(Noisy):
    def __init__(self, kind: type[enum.Enum]) -> None:
        super().__init__(8)
        self.mode, self.pace = kind(1), Pace()


def test_a_member_of_an_enumeration_is_left_as_it_is() -> None:
    """It is one object for all: what a data set or a sampler holds of it must not be written into another member."""

    class Local(enum.Enum):
        EASY = 1
        HARD = 2

    def training_with(kind: type[enum.Enum]) -> Any:
        def train(run: Any, DataLoader: Any) -> int:
            items, pace = Moody(kind), Pace()
            pace.mode = kind(1)  # type: ignore[attr-defined]
            loader = DataLoader(items, batch_size=2, sampler=Paced(8, pace))
            run.register(loader=loader)
            for _ in run.epochs(2):
                for batch in loader:
                    run.step(batch=batch.sum())
                items.mode = pace.mode = kind(2)  # type: ignore[attr-defined]
            return items.mode.value + pace.mode.value  # type: ignore[no-any-return, attr-defined]

        return train

    for kind in (Mode, Local):
        assert len(cut(training_with(kind), range(1, 12)).stopped_at) > 8
        assert [mode.value for mode in kind] == [1, 2]
    assert cut(training_with(Mode), range(1, 12)).result == 4


class Settings(dict):
    """Settings whose keys are attributes too."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class Losses(list):
    """Says which is the last one."""

    def last(self) -> float:
        return float(self[-1])


@dataclass(frozen=True)
class Strength:
    value: float


class Task:
    def __init__(self, number: int) -> None:
        self.number, self.wins = number, 0


class Choosing(Noisy):
    """What the training replaces: by another one of those that it has, or that the module has."""

    def __init__(self) -> None:
        super().__init__(8)
        self.mode, self.transform, self.dtype = Mode.EASY, torch.sin, torch.float64
        self.tasks: Any = [Task(number) for number in range(3)]
        self.active, self.pool = self.tasks[0], self.tasks[:1]
        self.settings, self.losses, self.strength = Settings(noise=1.0), Losses([1.0]), Strength(1.0)
        self.code, self.seen = b"ab", frozenset({1})

    def __getitem__(self, index: int) -> torch.Tensor:
        numbers = (
            self.mode.value,
            self.active.number,
            self.active.wins,
            len(self.pool),
            self.pool[-1].number,
        )
        numbers += (
            self.settings.noise,
            self.losses.last(),
            self.strength.value,
            self.code[0],
            sum(self.seen),
        )
        return self.transform(super().__getitem__(index) + sum(numbers) / 10).to(self.dtype).double()

    def train(self, loss: float, epoch: int) -> None:
        self.mode = Mode.HARD
        self.transform = torch.cos if self.transform is twice else twice
        self.active.wins += 1
        self.active = self.tasks[int(loss * 1e6) % 3]
        self.pool.append(self.tasks[int(loss * 1e5) % 3])
        self.tasks = self.tasks[::-1]
        self.settings.noise *= 0.5
        self.losses.append(loss)
        self.strength = Strength(loss)
        self.code, self.seen = self.code[::-1], self.seen | {len(self.losses)}
        self.dtype = torch.float32 if self.dtype == torch.float64 else torch.float64


def training_that_changes(kind: Any, workers: int, check: Any) -> Any:
    """Return a training that changes a data set of this kind after each epoch, and looks at it then."""

    def train(run: Any, DataLoader: Any) -> str:
        items = kind()
        model, optimizer = parts()
        loader = DataLoader(items, batch_size=2, shuffle=True, num_workers=workers)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for epoch in run.epochs(4):
            for batch in loader:
                learn(run, model, optimizer, batch)
            items.train(batch.abs().mean().item(), epoch)
            check(items, epoch)
        return digest(model.state_dict())

    return train


def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize("workers", [0, 1])
def test_what_the_training_replaces_by_another_one_is_exact_at_every_cut(workers: int) -> None:
    """Members, functions, objects of the data set's own; its own kinds of dicts and lists; what is frozen, bytes."""

    def check(items: Choosing, epoch: int) -> None:
        assert isinstance(items.settings, Settings) and isinstance(items.losses, Losses)
        assert any(items.active is task for task in items.tasks)

    cut_everywhere(training_that_changes(Choosing, workers, check), least=16)


LEVELS = [1.0, 0.5, 0.25]
TASKS = {"easy": Task(1), "mid": Task(2), "hard": Task(3)}


class Ring(list):
    """A list with a place of its own in it."""

    def __init__(self) -> None:
        super().__init__([0.0] * 3)
        self.place = 0

    def push(self, value: float) -> None:
        self[self.place] = value
        self.place = (self.place + 1) % len(self)


class Swapping(Noisy):
    """What the training puts in the place of what others hold too."""

    def __init__(self) -> None:
        super().__init__(8)
        self.levels, self.task, self.draw = LEVELS, TASKS["easy"], self.weak
        self.functions, self.scale = {"of": torch.sin}, functools.partial(scaled_by, by=1.0)
        self.stages, self.ring, self.both, self.lists = (
            collections.deque([Task(4), Task(5)]),
            Ring(),
            [1.0],
            [[2.0], [3.0]],
        )
        self.kept, self.later, self.lock = Task(6), Task(7), threading.Lock()

    def weak(self, x: torch.Tensor) -> torch.Tensor:
        return x + random.random()

    def strong(self, x: torch.Tensor) -> torch.Tensor:
        return x * random.random()

    def __getitem__(self, index: int) -> torch.Tensor:
        numbers = [
            len(self.levels),
            self.task.number,
            self.stages[0].number,
            *self.ring,
            *self.both,
            self.kept.number,
        ]
        x = self.draw(super().__getitem__(index) + sum(numbers) / 10)
        return self.scale(self.functions["of"](x))

    def train(self, loss: float, epoch: int) -> None:
        self.levels = LEVELS[: epoch % 3]
        self.task = TASKS[["mid", "easy", "hard", "easy"][epoch % 4]]
        self.draw = self.strong if epoch % 2 == 0 else self.weak
        self.functions["of"] = torch.cos if epoch % 2 == 0 else torch.tanh
        self.scale = functools.partial(scaled_by, by=loss)
        self.stages.rotate(1)
        self.ring.push(loss)
        self.both = self.lists[epoch % 2]
        self.lists[epoch % 2].append(loss)
        if epoch % 2 == 0:
            self.kept, self.later = self.later, self.kept
        self.kept.number += 1
        self.lock = threading.Lock()


def scaled_by(x: torch.Tensor, by: float) -> torch.Tensor:
    return x * by


@pytest.mark.parametrize("workers", [0, 1])
def test_what_others_hold_is_not_written_to(workers: int) -> None:
    """Where the training puts another one of the same kind in its place, that one is restored, and not the old one changed."""

    def check(items: Swapping, epoch: int) -> None:
        assert [len(LEVELS), *(task.number for task in TASKS.values())] == [3, 1, 2, 3]
        assert items.both is items.lists[epoch % 2]

    cut_everywhere(training_that_changes(Swapping, workers, check), least=16)


def test_a_list_that_a_sampler_no_longer_has_is_not_written_to() -> None:
    """`sampler.indices = order[:k]` leaves `order` alone, which the training goes on to use; a function comes back too."""

    def train(run: Any, DataLoader: Any) -> str:
        order, weights = [5, 3, 1, 0, 2, 4], torch.arange(6.0) + 1
        sampler: Any = data.SubsetRandomSampler(order)
        sampler.by = torch.sin
        weighted: Any = data.WeightedRandomSampler(weights, 6)  # type: ignore[arg-type]
        model, optimizer = parts()
        loader = DataLoader(Noisy(6), batch_size=2, sampler=sampler)
        second = DataLoader(Noisy(6), batch_size=3, sampler=weighted)
        run.register(model=model, optimizer=optimizer, loader=loader, second=second)
        for epoch in run.epochs(3):
            for batch, other in zip(loader, second, strict=False):
                learn(run, model, optimizer, batch + other[:1] * sampler.by(torch.tensor(1.0)))
            sampler.indices, sampler.by = order[epoch % 2 : epoch % 2 + 5], torch.cos
            weighted.weights = weights ** (epoch % 3)
            assert [order, weights.tolist()] == [[5, 3, 1, 0, 2, 4], [1, 2, 3, 4, 5, 6]]
        return digest(model.state_dict())

    cut_everywhere(train, least=6)


def test_what_a_data_set_rids_itself_of_is_not_kept() -> None:
    """An index in memory that is let go is not held by what follows the attributes."""

    class Table:
        pass

    Table.__module__ = "installed"
    items: Any = Noisy(4)
    items.table = Table()
    there = weakref.ref(items.table)
    found = contents.Contents(items, caches=True)
    items.table = None
    gc.collect()
    assert there() is None
    assert found.state_dict() == {".table": None}


def test_an_object_of_another_kind_in_a_data_set_is_told() -> None:
    """Nothing can make it again; that it is another one is said at the resume, also of one in a list."""

    def train(run: Any, DataLoader: Any) -> None:
        items = Noisy(4)
        items.transform, items.more, items.made = Task(1), [Task(2)], None  # type: ignore[attr-defined]
        items.level = 1.0  # type: ignore[attr-defined]
        loader = DataLoader(items, batch_size=2)
        run.register(loader=loader)
        for _ in run.epochs(2):
            for batch in loader:
                run.step(batch=batch.sum())
            items.transform = Pace()  # type: ignore[attr-defined]
            items.more.append(Task(3))  # type: ignore[attr-defined]
            items.made, items.level = Task(4), 2.0  # type: ignore[attr-defined]
        assert items.level == 2.0  # type: ignore[attr-defined]

    said = cut(train, (3,)).said
    assert any("'made' of Noisy" in line and "(Task then, NoneType here)" in line for line in said)
    assert any(
        "the attribute 'transform' of Noisy" in line and "(Pace then, Task here)" in line for line in said
    )
    assert any("'more' of Noisy" in line and "([Task, Task] then, [Task] here)" in line for line in said)
    assert not any("what it was" in line for line in cut(train, (1,)).said)


def collating_with(settings: dict[str, float]) -> Any:
    """Return a collate function that has its settings and a count from around it, and a list of its own."""
    calls = 0

    def collate(items: list[torch.Tensor], means: list[float] = [0.0]) -> torch.Tensor:  # noqa: B006
        nonlocal calls
        calls += 1
        means.append(torch.stack(items).mean().item())
        return torch.stack(items) * settings["noise"] + calls + sum(means)

    return collate


class Collating:
    def __init__(self, settings: dict[str, float]) -> None:
        self.settings, self.calls = settings, 0

    def collate(self, items: list[torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        return torch.stack(items) * self.settings["noise"] + self.calls


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("by", ["closure", "partial", "method"])
def test_what_a_collate_function_has_from_around_it_is_exact_at_every_cut(by: str, workers: int) -> None:
    """A dict that the training changes, a count of its own, a list that is the default of an argument."""

    def scaled(items: list[torch.Tensor], settings: dict[str, float]) -> torch.Tensor:
        return torch.stack(items) * settings["noise"]

    def train(run: Any, DataLoader: Any) -> str:
        settings = {"noise": 1.0}
        collate: Any = {
            "closure": collating_with(settings),
            "partial": functools.partial(scaled, settings=settings),
            "method": Collating(settings).collate,
        }[by]
        model, optimizer = parts()
        loader = DataLoader(Noisy(8), batch_size=2, shuffle=True, collate_fn=collate, num_workers=workers)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(3):
            for batch in loader:
                learn(run, model, optimizer, batch / 10)
            settings["noise"] *= 0.5
        return digest(model.state_dict())

    cut_everywhere(train, least=12)


def test_what_is_large_in_an_object_that_a_sampler_holds_is_not_carried() -> None:
    """It is copied when the loader is registered, and at every save: features of all items, a module's weights."""
    pace = Pace()
    pace.features = torch.zeros(20_000)  # type: ignore[attr-defined]
    sampler = Paced(10, pace)
    found = contents.Attributes(sampler, None)
    pace.features = torch.ones(20_000)  # type: ignore[attr-defined]
    pace.of["used"] += 1
    assert list(found.state_dict()) == ["pace.of"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_trainer_that_collates_and_holds_its_loader_is_exact_at_every_cut(workers: int) -> None:
    """All that it trains with is within the reach of its method, and registered by itself."""

    class Trainer:
        def __init__(self, run: Any, DataLoader: Any) -> None:
            self.run, (self.model, self.optimizer) = run, parts()
            self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 3)
            self.generator = torch.Generator().manual_seed(2)
            self.loader = DataLoader(
                Noisy(6), batch_size=2, shuffle=True, num_workers=workers, collate_fn=self.collate
            )
            run.register(
                model=self.model, optimizer=self.optimizer, scheduler=self.scheduler, loader=self.loader
            )

        def collate(self, items: list[torch.Tensor]) -> torch.Tensor:
            return torch.stack(items) + torch.rand((), generator=self.generator)

        def fit(self) -> str:
            for _ in self.run.epochs(3):
                for batch in self.loader:
                    learn(self.run, self.model, self.optimizer, batch)
                    self.scheduler.step()
            return digest(self.model.state_dict())

    cut_everywhere(lambda run, DataLoader: Trainer(run, DataLoader).fit(), least=8)


class Harder:
    """A transform that is harder each time; it is called."""

    def __init__(self) -> None:
        self.level = 1.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.level += 0.5
        return x * self.level / 10


class Compose:
    """As torchvision has it, which is an installed package and keeps no state of its own."""

    __module__ = "yaml"

    def __init__(self, transforms: list[Any]) -> None:
        self.transforms = transforms

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        for transform in self.transforms:
            x = transform(x)
        return x


class Transformed(Noisy):
    def __init__(self) -> None:
        super().__init__(8)
        self.transform, self.all = Harder(), Compose([Harder(), torch.nn.Identity(), Harder()])

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.all(self.transform(super().__getitem__(index)))


@pytest.mark.parametrize("workers", [0, 1])
def test_attributes_of_transforms_are_exact_at_every_cut(workers: int) -> None:
    """Objects of the user's that are called, also in a list of an installed class."""
    options = {"num_workers": workers, "persistent_workers": workers > 0}
    cut_everywhere(training(Transformed, batch_size=2, **options), least=8)


def test_an_attribute_that_tells_of_an_open_file_does_not_come_back_without_it() -> None:
    """The object is left alone, which for such flags is exact."""
    cut_everywhere(training(functools.partial(Opening, 8), batch_size=2, num_workers=1), least=8)


class Labelled(Noisy):
    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.labels = torch.zeros(length, 20_000)

    def __getitem__(self, index: int) -> torch.Tensor:
        return super().__getitem__(index) + self.labels[index].sum()


def test_a_large_tensor_of_the_data_that_has_changed_is_refused_at_resume() -> None:
    """Too large to be saved beside the checkpoint at every step; the message says what to do."""

    def train(run: Any, DataLoader: Any) -> None:
        items = Labelled(8)
        loader = DataLoader(items, batch_size=2)
        run.register(loader=loader)
        for _ in run.epochs(2):
            for batch in loader:
                items.labels += batch.sum()
                run.step(batch=batch.sum())

    with pytest.raises(RestoreError, match=r"'labels' of the data set Labelled had changed .* state_dict"):
        cut(train, [2])
