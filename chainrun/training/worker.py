"""What runs in a loader's worker: the user's data set and functions, and the random state sent along."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import signal
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import xxhash
from torch.utils.data import Dataset, get_worker_info

from chainrun.training import carried, contents, rng

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


class Shipment(NamedTuple):  # a named tuple keeps its type through torch's pin_memory
    batch: Any
    worker: int
    state: bytes
    ended: bool = False


class EmptyTurn:
    """Stands for the indices of a batch that is not to be loaded."""


class End(NamedTuple):
    """Stands for a batch where the data has ended."""

    first: bool  # it is said for the first time in this pass


class Repeated(NamedTuple):
    """Items of a batch that the training has had: made again, and not sent."""

    items: Any


class Numbered(NamedTuple):
    """The indices, later the items, of a batch whose draws depend on its number alone."""

    content: Any
    number: int  # of the pass
    batch: int


class Source(Protocol):
    """The user's data set as torch's loader sees it."""

    dataset: Any

    def note_contents(self, collate: Callable[[Any], Any]) -> None: ...

    def carriers(self, collate: Callable[[Any], Any]) -> list[carried.Carrier]: ...


class Counter:
    """Seeds every random stream by (seed, rank, pass, batch, slot), so that nothing has to be remembered."""

    def __init__(self, seed: int, rank: int) -> None:
        self._seed, self._rank = seed, rank

    @contextlib.contextmanager
    def lend(self, batch: Numbered, carriers: list[carried.Carrier]) -> Iterator[Callable[[int], None]]:
        """Take the process's streams and those of `carriers` for a batch; gives what seeds them for a slot."""
        # a worker has no other use for its streams
        kept = (rng.capture(), carried.get(carriers)) if get_worker_info() is None else None

        def seed(slot: int) -> None:
            place = struct.pack("<QQQQq", self._seed % 2**64, self._rank, batch.number, batch.batch, slot)
            rng.seed_streams(xxhash.xxh3_64_intdigest(place), carriers)

        try:
            yield seed
        finally:
            if kept is not None:
                carried.put(carriers, kept[1], "a data set whose draws are seeded by their number")
                rng.restore(kept[0])


class Items(Dataset[Any]):
    """The user's data set, except that an empty turn loads nothing and that draws may be seeded.

    Args:
        counter: seeds each item; None leaves the streams alone.
    """

    def __init__(self, dataset: Any, counter: Counter | None = None) -> None:
        self.dataset, self._counter = dataset, counter
        self._contents: list[contents.Contents] = []

    def note_contents(self, collate: Callable[[Any], Any]) -> None:
        """From here on, what data set and collate function keep in attributes is state, unless they have their own."""
        self._contents = contents.of_parts(self.dataset, collate, large=False)

    def carriers(self, collate: Callable[[Any], Any]) -> list[carried.Carrier]:
        return carried.find(self.dataset, collate) + self._contents

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, EmptyTurn):
            return index
        if isinstance(index, Numbered):
            return self._seeded(index, self._fetch_one)
        return self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        if isinstance(indices, EmptyTurn):
            return indices
        if isinstance(indices, Numbered):
            return self._seeded(indices, self._fetch)
        return self._fetch(indices, lambda slot: None)

    def _fetch_one(self, index: Any, seed: Callable[[int], None]) -> Any:
        seed(0)
        return self.dataset[index]

    def _fetch(self, indices: Any, seed: Callable[[int], None]) -> Any:
        if getattr(self.dataset, "__getitems__", None):
            seed(0)
            return self.dataset.__getitems__(indices)
        items = []
        for slot, index in enumerate(indices):
            seed(slot)
            items.append(self.dataset[index])
        return items

    def _seeded(self, batch: Numbered, fetch: Callable[[Any, Callable[[int], None]], Any]) -> Numbered:
        assert self._counter is not None
        with self._counter.lend(batch, carried.find(self.dataset)) as seed:
            return batch._replace(content=fetch(batch.content, seed))

    def __len__(self) -> int:
        return len(self.dataset)


class Collate:
    """The user's collate function; in a worker it sends along what a resume needs."""

    def __init__(self, collate: Callable[[Any], Any], counter: Counter | None = None) -> None:
        self.collate, self._counter = collate, counter
        self._source: Source | None = None
        self._carriers = 0

    def begin(self, source: Source) -> None:
        """Note what a worker begins with."""
        self._source, self._carriers = source, len(source.carriers(self.collate))

    def __call__(self, items: Any) -> Any:
        if isinstance(items, Numbered):
            assert self._counter is not None
            with self._counter.lend(items, carried.find(self.collate)) as seed:
                seed(-1)
                return self.collate(items.content)
        worker = get_worker_info()
        if isinstance(items, EmptyTurn):
            return Shipment(None, -1, b"")
        batch = None
        if isinstance(items, Repeated):
            self.collate(items.items)
        elif not isinstance(items, End):
            batch = self.collate(items)
        if worker is None:
            return items if isinstance(items, End) else batch
        if isinstance(items, End) and not items.first:
            return Shipment(None, worker.id, b"", ended=True)
        assert self._source is not None
        found = self._source.carriers(self.collate)
        carried.refuse_new(
            self._carriers, len(found), f"data set {type(worker.dataset).__name__} in a worker"
        )
        state = [rng.capture(), carried.get(found), *_place(self._source)]
        return Shipment(batch, worker.id, pickle.dumps(state, protocol=5), ended=isinstance(items, End))


def _place(source: Any) -> list[Any]:
    return [source.place] if hasattr(source, "place") else []


def _keep_heap() -> None:
    """Let glibc keep the memory of one batch for the next one.

    By default it gives the end of the heap back to the system whenever a batch's items are freed, and the next
    batch pays a page fault for every 4 KiB: a quarter of a worker's time on images, and more with the small
    blocks of our own above them. Both thresholds are set, since setting either ends their adjustment (mallopt(3));
    32 MiB is as far as that goes by itself.
    """
    if any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return  # the user has tuned it
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 64 << 20)


class InitWorker:
    """The user's worker_init_fn, then the saved state.

    Args:
        states: by worker, what it sent along with the last batch that counts.
        inside: the workers for which that was a batch of the pass that begins now.
    """

    def __init__(
        self,
        init: Callable[[int], None] | None,
        collate: Collate,
        states: dict[int, bytes],
        inside: frozenset[int],
    ) -> None:
        self.init, self.collate, self.states, self.inside = init, collate, states, inside

    def __call__(self, worker: int) -> None:
        # A scheduler signals every process of the job. The decision is the training process's alone:
        # a worker that died of the warning would take the checkpoint with it.
        for signum in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(signum, signal.SIG_IGN)
        _keep_heap()
        info: Any = get_worker_info()
        source = info.dataset
        object.__setattr__(info, "dataset", source.dataset)  # what user code finds there is its own data set
        source.note_contents(self.collate.collate)
        if self.init is not None:
            self.init(worker)
        self.collate.begin(source)
        if worker in self.states:
            streams, states, *place = pickle.loads(self.states[worker])
            if place:
                source.recall(place[0], inside=worker in self.inside)
            found = source.carriers(self.collate.collate)
            where = f"data set {type(source.dataset).__name__} in worker {worker}"
            carried.put(found, states, where)
            contents.check(found, states, where)
            rng.restore(streams)
