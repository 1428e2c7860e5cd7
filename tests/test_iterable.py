"""A cut over an `IterableDataset` equals torch's loader in a plain program, bit for bit, or is refused."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from chain import WHOLE, cut, cut_everywhere, digest, marks, plain, sweep, sweep_boundaries
from torch.utils import data

import chainrun
from chainrun.errors import RegisterError, RestoreError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


# ---- data sets ---------------------------------------------------------------------------------------


def share(n: int) -> Iterator[int]:
    """This worker's indices: shards of uneven size, the last worker's is the shortest."""
    info = data.get_worker_info()
    if info is None:
        return iter(range(n))
    bounds = [n * (2 * w) // (info.num_workers * (w + 1)) for w in range(info.num_workers)] + [n]
    return iter(range(bounds[info.id], bounds[info.id + 1]))


def item(index: int, draw: float) -> torch.Tensor:
    return torch.tensor([index, draw, np.random.rand(), torch.rand(()).item()]).double()


class Shards(data.IterableDataset):
    """Draws from the global streams of the process that reads it; with `quiet`, from NumPy's only."""

    def __init__(self, n: int = 14, quiet: bool = False) -> None:
        self.n, self.quiet = n, quiet

    def __iter__(self) -> Any:
        for index in share(self.n):
            if self.quiet:
                yield torch.tensor([index, np.random.rand(), 0, 0]).double()
            else:
                yield item(index, random.random())


class Buffered(Shards):
    """Shuffles through a buffer, by a generator that lives as long as the iterator."""

    epoch = 0

    def __iter__(self) -> Any:
        chosen = random.Random(self.epoch)
        self.epoch += 1
        held: list[torch.Tensor] = []
        for each in super().__iter__():
            held.append(each)
            if len(held) > 4:
                yield held.pop(chosen.randrange(len(held)))
        chosen.shuffle(held)
        yield from held


class Own(Shards):
    """Has a generator of its own, which goes on from pass to pass."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.generator = np.random.default_rng(3)

    def __iter__(self) -> Any:
        for each in super().__iter__():
            yield each + self.generator.normal()


class Eager(Shards):
    """Draws when its iterator is made."""

    def __iter__(self) -> Any:
        offset = np.random.rand() + torch.rand(()).item()
        return iter([each + offset for each in list(super().__iter__())])


class Stateful(Shards):
    """Keeps its position, and begins at it; at its end it begins again."""

    def __init__(self, n: int = 14, quiet: bool = False) -> None:
        super().__init__(n, quiet)
        self.done = 0

    def __iter__(self) -> Any:
        for index in list(share(self.n))[self.done :]:
            self.done += 1
            yield item(index, random.random())
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class Flagged(Stateful):
    """Begins anew at every iter(), but for the one after load_state_dict."""

    loaded = False

    def __iter__(self) -> Any:
        if not self.loaded:
            self.done = 0
        self.loaded = False
        for index in list(share(self.n))[self.done :]:
            self.done += 1
            yield item(index, random.random())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.loaded = True


class OwnIterator(Stateful):
    """Is its own iterator, which iter() sets back."""

    def __iter__(self) -> Any:
        self.done = 0
        return self

    def __next__(self) -> torch.Tensor:
        mine = list(share(self.n))
        if self.done == len(mine):
            raise StopIteration
        self.done += 1
        return item(mine[self.done - 1], random.random())


class Cursor:
    """An iterator with state."""

    def __init__(self, n: int) -> None:
        self.mine, self.done = list(share(n)), 0

    def __iter__(self) -> Cursor:
        return self

    def __next__(self) -> torch.Tensor:
        if self.done == len(self.mine):
            raise StopIteration
        self.done += 1
        return item(self.mine[self.done - 1], random.random())

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done = state["done"]


class Cursors(Shards):
    """Its iterator has the state."""

    def __iter__(self) -> Any:
        return Cursor(self.n)


class BufferedWithState(Stateful):
    """Shuffles through a buffer that is part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[torch.Tensor] = []

    def __iter__(self) -> Any:
        for index in list(share(self.n))[self.done :]:
            self.done += 1
            self.held.append(item(index, random.random()))
            if len(self.held) > 3:
                yield self.held.pop(random.randrange(len(self.held)))
        while self.held:
            yield self.held.pop()
        self.done = 0

    def state_dict(self) -> dict[str, Any]:
        return {"done": self.done, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.done, self.held = state["done"], state["held"]


# ---- a training over one -----------------------------------------------------------------------------


def collate(items: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(items) + np.random.rand()


def training(
    dataset: Any, epochs: int = 4, most: int | None = None, between: bool = False, **options: Any
) -> Any:
    """Return a training that leaves every pass after `most` batches, with a boundary `between` epochs if told.

    Its own draws are torch's: a data set without state that is read in this process may not share them.
    """
    options = {"batch_size": 3, **options}

    def train(run: Any, DataLoader: Any) -> str:
        loader = DataLoader(dataset(), **options)
        model = torch.nn.Linear(4, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(epochs):
            for x in loader:
                loss = model(torch.nn.functional.dropout(x, 0.2)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.step(loss=loss, **marks(x, model))
                if most and run.global_step % most == 0:
                    break
            run.log(after=torch.rand(()))
            if between:
                run.poll()
        return digest(model.state_dict(), optimizer.state_dict())

    return train


SETS = {
    "shards": Shards,
    "buffered": Buffered,
    "own generator": Own,
    "eager": Eager,
    "state": Stateful,
    "state, by a flag": Flagged,
    "its own iterator": OwnIterator,
    "iterator with state": Cursors,
    "buffer in the state": BufferedWithState,
}


@pytest.mark.parametrize("workers", [1, 3] if WHOLE else [2])
@pytest.mark.parametrize("name", SETS)
def test_shards_of_workers_are_exact_at_every_cut(name: str, workers: int) -> None:
    """Uneven shards, random draws in the workers; with state it goes on there, without it is gone through again."""
    cut_everywhere(training(SETS[name], epochs=2, num_workers=workers), least=10)


@pytest.mark.parametrize("name", SETS)
def test_data_that_lives_over_the_epochs_is_exact_at_every_cut(name: str) -> None:
    """Persistent workers keep their streams, and what the data set counts, from epoch to epoch."""
    cut_everywhere(training(SETS[name], epochs=2, num_workers=2, persistent_workers=True), least=10)


IN_PROCESS = {
    "quiet shards": lambda: Shards(quiet=True),
    "own generator": Own,
    "state": Stateful,
    "state, by a flag": Flagged,
    "its own iterator": OwnIterator,
    "iterator with state": Cursors,
    "buffer in the state": BufferedWithState,
}


@pytest.mark.parametrize("name", IN_PROCESS)
def test_data_read_by_the_training_process_is_exact_at_every_cut(name: str) -> None:
    """With state it may draw from the streams that the training draws from too."""
    cut_everywhere(training(IN_PROCESS[name]), least=20)


OPTIONS: dict[str, dict[str, Any]] = {
    "short batches dropped": {"drop_last": True},
    "no batches": {"batch_size": None},
    "one batch ahead": {"prefetch_factor": 1},
    "a collate function that draws": {"collate_fn": collate},
    "spawned": {"num_workers": 1, "multiprocessing_context": "spawn", "epochs": 1},
    "left early": {"most": 3},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("kind", ["buffered", "state"])
def test_options_of_the_loader_are_exact_at_every_cut(name: str, kind: str) -> None:
    """They mean what they mean to torch."""
    options = {"num_workers": 2, "epochs": 2, **OPTIONS[name]}
    train = training(SETS[kind], **options)
    if name == "spawned":
        assert plain(train).difference(cut(train, (3,))) is None
    else:
        cut_everywhere(train)


def test_passes_of_persistent_workers_left_early_are_exact() -> None:
    """What they had been sent before the break is computed, and counts."""
    for dataset in (lambda: Shards(60), lambda: Buffered(60)):
        cut_everywhere(training(dataset, num_workers=2, persistent_workers=True, most=2))


def test_two_loaders_in_step_are_exact() -> None:
    """A map-style and an iterable one, the shorter ends the epoch."""

    def train(run: Any, DataLoader: Any) -> str:
        model = torch.nn.Linear(4, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        ours = DataLoader(Buffered(), batch_size=2, num_workers=1)
        other = DataLoader(torch.rand(12, 4).double(), batch_size=3, shuffle=True)
        run.register(model=model, optimizer=optimizer, ours=ours, other=other)
        for _ in run.epochs(3):
            for x, y in zip(ours, other, strict=False):
                loss = model(x).square().mean() + model(y).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.step(loss=loss, **marks([x, y], model))
        return digest(model.state_dict())

    cut_everywhere(train)


class Forever(Shards):
    """Never ends."""

    def __iter__(self) -> Any:
        while True:
            yield item(1, random.random())


def test_an_endless_stream_is_exact() -> None:
    """One pass over data without an end, in a range of steps."""

    def train(run: Any, DataLoader: Any) -> str:
        model = torch.nn.Linear(4, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        loader = DataLoader(Forever(), batch_size=2, num_workers=2)
        run.register(model=model, optimizer=optimizer, loader=loader)
        batches = iter(loader)
        for _ in run.steps(20):
            x = next(batches)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss, **marks(x, model))
        return digest(model.state_dict())

    sweep(train, 20, quick=True)


def test_an_epoch_set_from_outside_is_exact() -> None:
    """An attribute that the loop sets reaches the workers of the resumed epoch too."""

    class Seeded(Shards):
        epoch = 0

        def __iter__(self) -> Any:
            yield from np.random.default_rng(self.epoch).normal(size=(8, 4))

    def train(run: Any, DataLoader: Any) -> str:
        dataset = Seeded()
        model = torch.nn.Linear(4, 2).double()
        loader = DataLoader(dataset, batch_size=2, num_workers=1)
        run.register(model=model, loader=loader)
        for epoch in run.epochs(3):
            for x in loader:
                run.step(loss=x.sum(), **marks(x))
            dataset.epoch = epoch + 1
        return digest(model.state_dict())

    cut_everywhere(train)


LIVING: list[dict[str, Any]] = [{}, {"num_workers": 1, "persistent_workers": True}]


class InPlace(data.IterableDataset):
    """Shuffles its list in place: every epoch begins with the order of the last one."""

    def __init__(self, length: int = 8) -> None:
        self.generator = np.random.RandomState(3)
        self.files = [f"folder/{n}" for n in range(length)]

    def __iter__(self) -> Any:
        self.generator.shuffle(self.files)
        for file in self.files[:8]:
            yield torch.full((4,), float(file.split("/")[1])).double()


class Inner(data.IterableDataset):
    """Counts its passes in objects inside."""

    def __init__(self) -> None:
        self.source = data.ChainDataset([Buffered(4, quiet=True), Buffered(5, quiet=True)])

    def __iter__(self) -> Any:
        yield from self.source


class Slotted:
    """A sum in a slot."""

    __slots__ = ("total",)

    def __init__(self) -> None:
        self.total = 0.0


class Kinds(data.IterableDataset):
    """Keeps something of each kind over the epochs."""

    def __init__(self) -> None:
        self.weights, self.tensor = np.zeros(4), torch.zeros(4).double()
        self.last: Any = collections.deque([0.0], maxlen=3)
        self.counts: dict[Any, Any] = {"passes": 0, ("pair", 1): [torch.zeros(2)]}
        self.seen: set[int] = set()
        self.phase, self.pair, self.slotted = "first", (0, 1.0), Slotted()

    def __iter__(self) -> Any:
        if self.counts["passes"] == 2:
            self.phase = "later"
        for n in range(8):
            self.weights += n
            self.tensor.add_(0.5)
            self.last.append(self.weights.sum())
            self.seen.add(n * self.counts["passes"] % 5)
            self.counts["pair", 1][0] += 1
            self.pair = (self.pair[0] + 1, self.pair[1] * 0.5)
            self.slotted.total += sum(self.last)
            found = [
                *self.last,
                len(self.seen),
                self.counts["pair", 1][0].sum(),
                *self.pair,
                self.slotted.total,
            ]
            offset = float(sum(found)) + (self.phase == "later")
            yield torch.from_numpy(self.weights.copy()) + self.tensor + offset
        self.counts["passes"] += 1


@pytest.mark.parametrize("options", LIVING, ids=["process", "worker"])
@pytest.mark.parametrize("dataset", [InPlace, Inner, Kinds])
def test_attributes_that_live_over_the_epochs_are_exact_at_every_cut(dataset: Any, options: Any) -> None:
    """The order of a list, sums in arrays, counters of objects inside: also cut between two epochs."""
    sweep_boundaries(training(dataset, between=True, **options), 16)


@pytest.mark.parametrize("options", LIVING, ids=["process", "worker"])
def test_a_long_list_that_has_changed_is_refused_between_epochs_too(options: Any) -> None:
    """It is not saved, and no item of the next epoch would tell. As long as it has not changed a cut is exact."""
    train = training(lambda: InPlace(20_000), between=True, **options)
    reference = plain(train)
    for boundary in (1, 3):  # inside the first epoch
        assert reference.difference(cut(train, after=(boundary,))) is None
    with pytest.raises(RestoreError, match="'files' of the data set InPlace had changed"):
        cut(train, after=(4,))
    train = training(InPlaceOnce, between=True, **options)
    assert plain(train).difference(cut(train, after=(2, 2, 3))) is None


class InPlaceOnce(InPlace):
    """The long list is data: a pass works on a copy."""

    def __init__(self) -> None:
        super().__init__(20_000)

    def __iter__(self) -> Any:
        files = self.files[:8]
        self.generator.shuffle(files)
        yield from (torch.full((4,), float(file.split("/")[1])).double() for file in files)


# ---- refused -----------------------------------------------------------------------------------------


def test_data_that_does_not_repeat_itself_is_refused_at_resume() -> None:
    """Going through it again has to come to the same place."""
    first = training(Shards, num_workers=2)

    class Different(Shards):
        def __iter__(self) -> Any:
            random.random()
            yield from super().__iter__()

    with pytest.raises(RestoreError, match=r"did not repeat the batches.*worker 0"):
        cut([first, training(Different, num_workers=2)], (2,))
    quiet = training(lambda: Shards(quiet=True))
    with pytest.raises(RestoreError, match=r"did not repeat the batches.*'python'"):
        cut([quiet, training(lambda: Different(quiet=False))], (2,))


class Hidden(data.IterableDataset):
    """Counts its passes where nobody looks."""

    def __init__(self) -> None:
        self.passes = itertools.count()

    def __iter__(self) -> Any:
        number = next(self.passes)
        yield from torch.full((8, 4), float(number)).double()


@pytest.mark.parametrize("options", LIVING, ids=["process", "worker"])
def test_data_that_repeats_its_draws_and_not_its_items_is_refused_at_resume(options: Any) -> None:
    """What lives over the epochs without being saved shows in the items, where the random streams agree."""
    train = training(Hidden, **options)
    assert plain(train).difference(cut(train, (2,))) is None
    with pytest.raises(RestoreError, match="did not repeat the batches"):
        cut(train, (5,))


def test_paths_and_objects_are_not_taken_for_items_that_changed() -> None:
    """A path of the job's own scratch folder, or an object, does not refuse a resume of the same data."""
    jobs = itertools.count()

    class Files(data.IterableDataset):
        def __init__(self) -> None:
            self.folder = f"/scratch/{next(jobs)}"

        def __iter__(self) -> Any:
            for n in range(8):
                yield {
                    "path": f"{self.folder}/{n}",
                    "made": [object()],
                    "x": torch.full((4,), float(n)).double(),
                }

    def xs(items: list[Any]) -> torch.Tensor:
        return torch.stack([item["x"] for item in items])

    cut_everywhere(training(Files, epochs=1, collate_fn=xs))


def test_data_that_takes_turns_with_the_training_is_refused_at_once() -> None:
    """Read in the training process without state, from a stream that the training draws from."""
    with pytest.raises(RegisterError, match="iterable data set of the loader 'loader' draws from the stream"):
        cut(training(Shards))


def test_state_that_iter_forgets_is_refused_at_resume() -> None:
    """A data set whose iter() begins again after load_state_dict would give other batches."""

    class Forgets(Stateful):
        def __iter__(self) -> Any:
            self.done = 0
            return super().__iter__()

    with pytest.raises(RestoreError, match="did not go on where it was"):
        cut(training(Forgets), (2,))


def test_leaving_early_after_a_worker_had_ended_is_refused() -> None:
    """How far the others read ahead then depends on timing, with torch's own loader too."""
    with pytest.raises(RegisterError, match="left early after the data of one of its workers had ended"):
        cut(training(Shards, num_workers=3, persistent_workers=True, most=4))


@pytest.mark.parametrize("options", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_leaving_data_with_state_early_is_refused_where_it_lives_on(options: dict[str, Any]) -> None:
    """Whether its next iter() begins again or goes on is not in its state."""
    with pytest.raises(RegisterError, match="left early and its data set has state_dict"):
        cut(training(Flagged, most=2, **options))


def test_data_pipes_are_refused_when_the_loader_is_built() -> None:
    """Torch seeds their shuffling in ways of its own."""
    with pytest.raises(RegisterError, match="IterDataPipe"):
        chainrun.DataLoader(data.datapipes.iter.IterableWrapper([1, 2]))
