"""``rng="counter"``: what a batch draws depends on its number alone, so that any number of workers resumes it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from chain import cut, digest, marks, some
from test_loader import AtOnce, Counting, Lazy, Noisy, Own, collate_with, drawing_collate
from torch.utils import data

import chainrun
from chainrun.errors import RegisterError
from chainrun.training import rng
from chainrun.training.worker import Counter, Numbered

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


def training(dataset: Any = Noisy, **options: Any) -> Any:
    options = {"batch_size": 3, "shuffle": True, "rng": "counter", **options}

    def train(run: Any, DataLoader: Any) -> str:
        loader = DataLoader(dataset(), **options)
        model = torch.nn.Linear(4, 2).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        run.register(model=model, optimizer=optimizer, loader=loader)
        for _ in run.epochs(3):
            _ = torch.rand(()), np.random.rand()
            look = digest(next(iter(loader)))
            for x in loader:
                loss = model(torch.nn.functional.dropout(x, 0.2)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.step(loss=loss, look=look, **marks(x, model))
            run.log(after=torch.rand(()))
        return digest(model.state_dict(), optimizer.state_dict())

    return train


VARIANTS: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "no batches": {"dataset": lambda: Noisy(4), "batch_size": None},
    "batches at once": {"dataset": AtOnce},
    "own generators": {"dataset": Own},
    "drawing collate": {"collate_fn": drawing_collate},
    "collate with a generator": {"collate_fn": collate_with(np.random.default_rng(8))},
    "lazy sampler": {"shuffle": False, "sampler": Lazy(10)},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_any_number_of_workers_gives_and_resumes_the_same_stream(name: str) -> None:
    """No workers, two, three, lasting ones, and another number in every segment: the same training."""
    options = VARIANTS[name]
    reference = cut(training(**options))
    assert len({line["batch"] for line in reference.lines if "batch" in line}) == 12  # none drawn twice
    kinds: list[dict[str, Any]] = [
        {"num_workers": 2},
        {},
        {"num_workers": 3, "prefetch_factor": 1},
        {"num_workers": 1, "persistent_workers": True},
    ]
    for kind in kinds:
        assert reference.difference(cut(training(**options, **kind))) is None, kind
    changing = [training(**options, **kinds[n % len(kinds)]) for n in range(14)]
    for cuts in (some(range(1, 13)), range(2, 13, 3)):
        trained = cut(changing, cuts)
        assert reference.difference(trained) is None, f"cut at {list(cuts)}"
        assert len(trained.stopped_at) >= len(cuts) - 1


def test_the_training_process_keeps_its_streams() -> None:
    """Without workers the batches are made in the training process, whose own draws they must not touch."""
    own = np.random.default_rng(1)
    before, mine = rng.capture(), rng.get(own)
    with Counter(0, 0).lend(Numbered([1], 0, 0), [own]) as seed:
        seed(0)
        drawn = (torch.rand(()).item(), np.random.rand(), own.normal())
        seed(0)
        assert drawn == (torch.rand(()).item(), np.random.rand(), own.normal())
    assert (before, mine) == (rng.capture(), rng.get(own))


def test_every_part_of_the_number_counts() -> None:
    """Another seed, rank, pass, batch or slot draws something else."""
    drawn = set()
    for seed, rank, number, batch, slot in [
        (0,) * 5,
        *(tuple(int(n == m) for m in range(5)) for n in range(5)),
    ]:
        with Counter(seed, rank).lend(Numbered([1], number, batch), []) as reseed:
            reseed(slot)
            drawn.add((torch.rand(()).item(), np.random.rand()))
    assert len(drawn) == 6


def test_what_cannot_be_numbered_is_refused() -> None:
    """An iterable data set, one with state, a loader without a run, a word that is none."""

    class Endless(data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([])

    with pytest.raises(RegisterError, match="rng='counter' with an IterableDataset"):
        chainrun.DataLoader(Endless(), rng="counter")
    with pytest.raises(RegisterError, match="a data set with state of its own"):
        cut(training(Counting))
    with pytest.raises(RegisterError, match="without being registered"):
        iter(chainrun.DataLoader(Noisy(), rng="counter"))
    with pytest.raises(RegisterError, match="'torch' or 'counter'"):
        chainrun.DataLoader(Noisy(), rng="counters")
