"""A `torch.utils.data.DataLoader` that resumes at any batch, bit for bit.

Uninterrupted it is torch's loader: the same batches and the same draws. To resume it needs what no other
process can recompute: the random state of every worker after the last batch that was *handed out* (workers
run ahead; what they prefetched is thrown away with them and made again). Only public hooks of torch's loader
are used:

- the collate function, last to run in a worker, sends the worker's random state along with the batch;
- the sampler is wrapped, so that how far it was drawn is known;
- on resume the pass is rebuilt under the random state of its beginning (``iter()`` draws the workers' seed,
  the sampler its permutation), the indices already used are drawn and dropped without loading anything, and
  ``k mod num_workers`` empty turns bring batch ``k`` to the worker that it would have gone to;
- ``worker_init_fn`` sets the worker's random state, after the user's own has run.
"""

from __future__ import annotations

import marshal
import pickle
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import xxhash
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data import DataLoader as TorchDataLoader

from chainrun.errors import RegisterError, RestoreError
from chainrun.training import rng
from chainrun.training.position import Pass as Mark
from chainrun.training.position import Position

T = TypeVar("T")


# ---- in the worker -------------------------------------------------------------------------------


class _Shipment(NamedTuple):  # a named tuple keeps its type through torch's pin_memory
    batch: Any
    worker: int
    state: bytes


class _EmptyTurn:
    """Stands for the indices of a batch that is not to be loaded."""


class _Dataset(Dataset[Any]):
    """The user's data set, except that an empty turn loads nothing."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __getitem__(self, index: Any) -> Any:
        return index if isinstance(index, _EmptyTurn) else self.dataset[index]

    def __getitems__(self, indices: Any) -> Any:
        if isinstance(indices, _EmptyTurn):
            return indices
        if getattr(self.dataset, "__getitems__", None):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]

    def __len__(self) -> int:
        return len(self.dataset)


def _state_of(dataset: Any, collate: Any) -> list[Any]:
    return [rng.capture(), [rng.get(g) for g in rng.find_generators(dataset, collate)]]


class _Collate:
    """The user's collate function; in a worker it sends the random state along."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate

    def __call__(self, items: Any) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.collate(items)
        if isinstance(items, _EmptyTurn):
            return _Shipment(None, -1, b"")
        batch = self.collate(items)
        return _Shipment(batch, worker.id, pickle.dumps(_state_of(worker.dataset, self.collate), protocol=5))


class _InitWorker:
    """The user's worker_init_fn, then the saved random state."""

    def __init__(self, init: Callable[[int], None] | None, collate: Any, states: dict[int, bytes]) -> None:
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
        if worker in self.states:
            state, generators = pickle.loads(self.states[worker])
            found = rng.find_generators(dataset, self.collate)
            rng.put_all(found, generators, f"data set {type(dataset).__name__} in worker {worker}")
            rng.restore(state)


# ---- the sampler ---------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """How far a sampler was drawn."""

    handed_out: int
    drawn: int
    ended: bool
    digest: int


class _Stream:
    """One iteration over the sampler, counted; and repeated from a count."""

    def __init__(self, source: Iterator[Any], again: _Drawn | None, turns: int) -> None:
        self._source, self._again, self._turns = source, again, turns
        self._queue: deque[Any] = deque()
        self._digest = xxhash.xxh3_64()
        self.drawn, self.ended, self.stopped = 0, False, False

    def __iter__(self) -> _Stream:
        return self

    def __next__(self) -> Any:
        if self._again:
            self.repeat()
        if self._queue:
            return self._queue.popleft()
        if self.ended or self.stopped:
            raise StopIteration
        return self._draw()

    def _draw(self) -> Any:
        try:
            indices = next(self._source)
        except StopIteration:
            self.ended = True
            raise
        self.drawn += 1
        try:
            self._digest.update(marshal.dumps(indices, 2))
        except ValueError:
            pass  # indices of a type of the user's: counted, not compared
        return indices

    def repeat(self) -> None:
        """Draw again what was drawn; queue what had not been handed out.

        The sampler may draw from a shared generator, also once more when it ends, so at every boundary it
        must have been asked exactly as often as in the uninterrupted run.
        """
        again, self._again = self._again, None
        if again is None:
            return
        self._queue.extend(_EmptyTurn() for _ in range(self._turns))
        try:
            for n in range(again.drawn):
                indices = self._draw()
                if n >= again.handed_out:
                    self._queue.append(indices)
            if again.ended:
                next(iter(self._draw, None), None)
        except StopIteration:
            pass
        if (self.drawn, self.ended, self.digest()) != (again.drawn, again.ended, again.digest):
            raise RestoreError(
                "the sampler did not repeat the indices it had given before the checkpoint: its length or "
                "its order depends on something that is not saved (a changed data set, a counter of its own "
                "without state_dict, the hash seed); give it state_dict/load_state_dict, or draw from the "
                "global or its own generator only"
            )

    def digest(self) -> int:
        value: int = self._digest.intdigest() & (2**63 - 1)
        return value


class _Sampler:
    """The sampler as torch's loader sees it."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.stream = _Stream(iter(()), None, 0)
        self.prepare(None, 0, None)

    def prepare(self, again: _Drawn | None, turns: int, before_second: Callable[[], None] | None) -> None:
        """Say how the next iteration begins.

        Args:
            again: how far to repeat an earlier one.
            turns: empty turns to give first.
            before_second: called before torch asks the second time (a loader with workers does).
        """
        self._again, self._turns, self._before_second, self._asked = again, turns, before_second, 0

    def __iter__(self) -> Iterator[Any]:
        self._asked += 1
        if self._asked == 2 and self._before_second is not None:
            self._before_second()
        # iter() of the user's sampler runs here, as often as torch asks: eager ones draw in it
        self.stream = _Stream(iter(self.sampler), self._again, self._turns)
        return self.stream

    def __len__(self) -> int:
        return len(self.sampler)


# ---- in the training process ---------------------------------------------------------------------


def _stateful(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class DataLoader(TorchDataLoader[T]):
    """`torch.utils.data.DataLoader`, resumable exactly at every batch once it is registered.

    Takes torch's arguments and gives torch's stream. A loader that is not registered is torch's loader.

    Raises:
        RegisterError: at construction, for what cannot be resumed exactly: an `IterableDataset`, or
            ``in_order=False`` with workers, where the order of batches depends on timing.
    """

    def __init__(self, dataset: Dataset[T], *args: Any, **kwargs: Any) -> None:
        super().__init__(dataset, *args, **kwargs)
        if isinstance(dataset, IterableDataset):
            raise RegisterError(
                f"chainrun.DataLoader was given an IterableDataset ({type(dataset).__name__}); only map-style "
                "data sets (with __getitem__ and __len__) are resumed exactly. Wrap the data in a map-style "
                "data set, or draw it in a run.steps() loop and register what holds the position"
            )
        if self.num_workers and not getattr(self, "in_order", True):
            raise RegisterError(
                "chainrun.DataLoader was given in_order=False with workers; the order of batches then depends "
                "on timing and no resume can repeat it. Leave in_order=True"
            )
        self._chain: _Chain | None = None

    def __iter__(self) -> Any:
        chain = getattr(self, "_chain", None)
        return super().__iter__() if chain is None else chain.iterate()


class _Chain:
    """What makes one registered loader resumable."""

    def __init__(
        self, loader: DataLoader[Any], name: str, position: Position, on_head: Callable[[Mark], None]
    ) -> None:
        self.loader, self.name, self.loop = loader, name, f"loader:{name}"
        self.position, self.on_head = position, on_head
        self.saved: dict[str, Any] | None = None  # the checkpoint's state, until the loop goes on
        self.workers: dict[int, bytes] = {}  # each worker's random state after its last batch handed out
        self.birth: list[Any] | None = None  # random state under which persistent workers were born
        self.sampler = _Sampler(None)
        self.on_batch: Callable[[str, Any], None] | None = None  # told of every batch, to record it
        self._inner: TorchDataLoader[Any] | None = None
        self._pass: _Pass | None = None

    @property
    def persistent(self) -> bool:
        return bool(self.loader.persistent_workers and self.loader.num_workers)

    @property
    def inner(self) -> TorchDataLoader[Any] | None:
        """The torch loader that does the work."""
        return self._inner

    @property
    def index_sampler(self) -> Any:
        batch_sampler = self.loader.batch_sampler
        return self.loader.sampler if batch_sampler is None else batch_sampler

    # ---- the random state of this process that the loader draws from

    def _generators(self) -> list[rng.Generator]:
        return rng.find_generators(self.loader.generator, self.loader.sampler, self.loader.batch_sampler)

    def parent_state(self) -> list[Any]:
        sampler = self.index_sampler
        own = sampler.state_dict() if _stateful(sampler) else None
        return [rng.capture(), [rng.get(g) for g in self._generators()], own]

    def set_parent_state(self, state: list[Any], *, sampler: bool = False) -> None:
        if sampler and state[2] is not None:
            self.index_sampler.load_state_dict(state[2])
        rng.put_all(self._generators(), state[1], f"sampler of the loader '{self.name}'")
        rng.restore(state[0])

    # ---- passes

    def iterate(self) -> Iterator[Any]:
        what, mark = self.position.begin(self.loop)
        if self._pass is not None:
            self._pass.leave()
            self._pass.drain()
        if what == "skip":
            return iter(())
        self._pass = _Pass(self, mark)
        if what == "resume":
            self._pass.resume()
            if self.position.owns(self.loop):
                self.position.arrive()
        else:
            self._pass.start()
        return _Batches(self._pass)

    def build(
        self, again: _Drawn | None, turns: int, before_second: Callable[[], None] | None
    ) -> Iterator[Any]:
        """Begin an iteration of torch's loader; the arguments are those of `_Sampler.prepare`."""
        loader = self.loader
        if self._inner is None or not self.persistent or again is not None:
            continued = again is not None or before_second is not None
            self.sampler = _Sampler(self.index_sampler)
            options: dict[str, Any] = {
                "num_workers": loader.num_workers,
                "collate_fn": _Collate(loader.collate_fn),
                "pin_memory": loader.pin_memory,
                "timeout": loader.timeout,
                "worker_init_fn": _InitWorker(
                    loader.worker_init_fn, loader.collate_fn, dict(self.workers) if continued else {}
                ),
                "multiprocessing_context": loader.multiprocessing_context,
                "generator": loader.generator,
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
            if loader.batch_sampler is None:
                options.update(batch_size=None, sampler=self.sampler)
            else:
                options["batch_sampler"] = self.sampler
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch said it when the user's loader was built
                self._inner = TorchDataLoader(_Dataset(loader.dataset), **options)
        self.sampler.prepare(again, turns, before_second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = iter(self._inner)
        if loader.num_workers == 0:
            self.sampler.stream.repeat()
        for _ in range(turns):
            next(batches)
        self.sampler.prepare(None, 0, None)
        return batches

    def fraction(self) -> float:
        """Return how much of the running pass is done, 0 where none runs."""
        running = self._pass is not None and self._pass.running
        return self._pass.handed_out / max(1, len(self.loader)) if running and self._pass else 0.0

    def close(self) -> None:
        """End the workers."""
        if self._pass is not None:
            self._pass.close()
        self._pass = self._inner = None

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's place as tensors and plain data."""
        loader = self.loader
        if self._pass is not None:
            self._pass.drain()
        own = rng.find_generators(loader.dataset, loader.collate_fn) if loader.num_workers == 0 else []
        return {
            "num_workers": loader.num_workers,
            "prefetch_factor": loader.prefetch_factor,
            "now": _to_plain(self.parent_state()),
            "own": [rng.to_tensor(rng.get(g)) for g in own],
            "workers": {worker: _to_plain(pickle.loads(data)) for worker, data in self.workers.items()},
            "birth": self.birth and _to_plain(self.birth),
            "pass": self._pass.state_dict() if self._pass is not None and self._pass.running else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state for the loader's next pass.

        Raises:
            RestoreError: the loader has other workers than the one that was saved.
        """
        for key in ("num_workers", "prefetch_factor"):
            mine = getattr(self.loader, key)
            if state[key] != mine:
                raise RestoreError(
                    f"the loader '{self.name}' has {key}={mine}, the checkpoint was taken with {state[key]}: "
                    f"its workers' random streams could not be continued; set {key}={state[key]}"
                )
        self.saved = state
        self.recall()

    def recall(self) -> None:
        """Take the workers' states from the checkpoint."""
        assert self.saved is not None
        workers = self.saved["workers"].items()
        self.workers = {worker: pickle.dumps(_from_plain(state), protocol=5) for worker, state in workers}
        self.birth = self.saved["birth"] and _from_plain(self.saved["birth"])

    def go_on(self) -> None:
        """Undo what the walk to the checkpoint's place did to this loader."""
        if self.saved is None:
            return
        if self._pass is not None and self._pass.resumed:
            if self._pass.handed_out != self.saved["pass"]["drawn"][0]:
                self._pass.resume()
        else:
            self.recall()
            self._inner = None
        now = _from_plain(self.saved["now"])
        rng.put_all(self._generators(), now[1], f"sampler of the loader '{self.name}'")
        own = rng.find_generators(self.loader.dataset, self.loader.collate_fn)
        if self.loader.num_workers == 0:
            states = [rng.from_tensor(tensor) for tensor in self.saved["own"]]
            rng.put_all(own, states, f"data set of the loader '{self.name}'")


def _to_plain(state: list[Any]) -> list[Any]:
    streams, generators, *rest = state
    return [rng.to_tensors(streams), [rng.to_tensor(g) for g in generators], *rest]


def _from_plain(state: list[Any]) -> list[Any]:
    streams, generators, *rest = state
    return [rng.from_tensors(streams), [rng.from_tensor(g) for g in generators], *rest]


class _Pass:
    """One pass over the batches of a registered loader."""

    def __init__(self, chain: _Chain, mark: Mark) -> None:
        self.chain, self._mark = chain, mark
        self._batches: Iterator[Any] = iter(())
        self._began: list[Any] = []  # the parent's random state when the pass began
        self._in_flight = False
        self.handed_out = 0
        self.running = True
        self.resumed = False

    def start(self) -> None:
        """Begin at the first batch."""
        chain = self.chain
        self._began = began = chain.parent_state()
        before_second = None
        if not chain.persistent or chain.birth is None:
            chain.birth = began if chain.persistent else None
            chain.workers = {}
        elif chain._inner is None:  # workers of an earlier process: born again, then as they were left
            chain.set_parent_state(chain.birth)
            before_second = lambda: chain.set_parent_state(began)  # noqa: E731
        self._batches = chain.build(None, 0, before_second)

    def resume(self) -> None:
        """Move to the checkpoint's batch; no item is loaded, the random state stays as it is."""
        chain = self.chain
        assert chain.saved is not None
        chain.recall()
        saved = chain.saved["pass"]
        again = _Drawn(*saved["drawn"])
        self._began = began = _from_plain(saved["began"])
        self.handed_out, self.resumed = again.handed_out, True
        workers = chain.loader.num_workers
        exhausted = workers > 0 and again.ended and again.handed_out == again.drawn
        if exhausted and not chain.persistent:  # only the end of the loop is left, which needs no worker
            chain.sampler.stream = _Stream(iter(()), None, 0)
            chain.sampler.stream.drawn, chain.sampler.stream.ended = again.drawn, True
            return
        present = chain.parent_state()
        chain.set_parent_state(began, sampler=True)
        before_second = None
        if chain.birth is not None and chain.birth != began:
            chain.set_parent_state(chain.birth)
            before_second = lambda: chain.set_parent_state(began)  # noqa: E731
        turns = 0 if exhausted or not workers else again.handed_out % workers
        self._batches = chain.build(again, turns, before_second)
        chain.set_parent_state(present)

    def state_dict(self) -> dict[str, Any]:
        stream = self.chain.sampler.stream
        drawn = _Drawn(self.handed_out, stream.drawn, stream.ended, stream.digest())
        return {"began": _to_plain(self._began), "drawn": list(drawn)}

    def next(self) -> Any:
        chain = self.chain
        chain.on_head(self._mark)
        try:
            batch = next(self._batches)
        except StopIteration:
            self.leave(exhausted=True)
            raise
        if chain.loader.num_workers:
            batch, worker, state = batch
            chain.workers[worker] = state
        self.handed_out += 1
        chain.position.advance(self._mark)
        if chain.on_batch is not None:
            chain.on_batch(chain.name, batch)
        return batch

    def leave(self, *, exhausted: bool = False) -> None:
        """The pass is over, by its end or by a break."""
        if not self.running:
            return
        self.running = False
        self._in_flight = self.chain.persistent and not exhausted
        if not self._in_flight:
            self._batches = iter(())  # ends the workers, as the end of torch's own iterator does
        self.chain.position.end(self._mark, exhausted=exhausted)

    def close(self) -> None:
        self._in_flight = False
        self._batches = iter(())

    def drain(self) -> None:
        """Note where persistent workers end: they still compute what they had been sent before a break."""
        if self._in_flight:
            self._in_flight = False
            self.chain.sampler.stream.stopped = True
            for _, worker, state in self._batches:
                self.chain.workers[worker] = state


class _Batches(Iterator[Any]):
    """The iterator that the loop holds; when the loop drops it, the pass is over."""

    def __init__(self, one_pass: _Pass) -> None:
        self._pass = one_pass

    def __next__(self) -> Any:
        return self._pass.next()

    def __len__(self) -> int:
        return len(self._pass.chain.loader)

    def __del__(self) -> None:
        self._pass.leave()


def bind(
    loader: DataLoader[Any], name: str, position: Position, on_head: Callable[[Mark], None]
) -> _Chain:
    """Make a loader resumable within a run.

    Raises:
        RegisterError: the loader is registered twice, or was iterated over before.
    """
    if loader._chain is not None and loader._chain.position is position:
        raise RegisterError(f"one loader is registered twice, as '{loader._chain.name}' and as '{name}'")
    loader._chain = _Chain(loader, name, position, on_head)
    return loader._chain
