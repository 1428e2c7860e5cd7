"""What runs in a loader's worker: the user's data set and functions, and the random state sent along."""

from __future__ import annotations

import pickle
import signal
from collections.abc import Callable
from typing import Any, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from chainrun.training import carried, rng


class Shipment(NamedTuple):  # a named tuple keeps its type through torch's pin_memory
    batch: Any
    worker: int
    state: bytes


class EmptyTurn:
    """Stands for the indices of a batch that is not to be loaded."""


class Items(Dataset[Any]):
    """The user's data set, except that an empty turn loads nothing."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        return index if isinstance(index, EmptyTurn) else self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        if isinstance(indices, EmptyTurn):
            return indices
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]

    def __len__(self) -> int:
        return len(self.dataset)


class Collate:
    """The user's collate function; in a worker it sends the random state along."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.carriers = 0  # how many were found when the worker began

    def __call__(self, items: Any) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.collate(items)
        if isinstance(items, EmptyTurn):
            return Shipment(None, -1, b"")
        batch = self.collate(items)
        found = carried.find(worker.dataset, self.collate)
        carried.refuse_new(self.carriers, len(found), f"data set {type(worker.dataset).__name__} in a worker")
        state = [rng.capture(), carried.get(found)]
        return Shipment(batch, worker.id, pickle.dumps(state, protocol=5))


class InitWorker:
    """The user's worker_init_fn, then the saved random state."""

    def __init__(
        self, init: Callable[[int], None] | None, collate: Collate, states: dict[int, bytes]
    ) -> None:
        self.init, self.collate, self.states = init, collate, states

    def __call__(self, worker: int) -> None:
        # A scheduler signals every process of the job. The decision is the training process's alone:
        # a worker that died of the warning would take the checkpoint with it.
        for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        info: Any = get_worker_info()
        dataset = info.dataset.dataset
        object.__setattr__(info, "dataset", dataset)  # what user code finds there is its own data set
        if self.init is not None:
            self.init(worker)
        found = carried.find(dataset, self.collate.collate)
        self.collate.carriers = len(found)
        if worker in self.states:
            streams, states = pickle.loads(self.states[worker])
            carried.put(found, states, f"data set {type(dataset).__name__} in worker {worker}")
            rng.restore(streams)
