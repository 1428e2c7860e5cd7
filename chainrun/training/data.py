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
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias, TypeVar

import xxhash
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from chainrun.errors import RegisterError, RestoreError
from chainrun.training import carried, rng
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


class _Collate:
    """The user's collate function; in a worker it sends the random state along."""

    def __init__(self, collate: Callable[[Any], Any]) -> None:
        self.collate = collate
        self.carriers = 0  # how many were found when the worker began

    def __call__(self, items: Any) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.collate(items)
        if isinstance(items, _EmptyTurn):
            return _Shipment(None, -1, b"")
        batch = self.collate(items)
        found = carried.find(worker.dataset, self.collate)
        carried.refuse_new(self.carriers, len(found), f"data set {type(worker.dataset).__name__} in a worker")
        state = [rng.capture(), carried.get(found)]
        return _Shipment(batch, worker.id, pickle.dumps(state, protocol=5))


class _InitWorker:
    """The user's worker_init_fn, then the saved random state."""

    def __init__(
        self, init: Callable[[int], None] | None, collate: _Collate, states: dict[int, bytes]
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


# ---- the sampler ---------------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """How far a sampler was drawn."""

    handed_out: int
    drawn: int
    ended: bool
    digest: int


_State: TypeAlias = "list[Any]"  # of this process: global streams, then what the loader's parts carry


class _Again(NamedTuple):
    """What it takes to draw from a sampler as far as another process did."""

    how_far: _Drawn
    first: _State | None  # of the process, at the first draw
    turns: int  # empty turns to give first


class _Stream:
    """One iteration over the sampler, counted; and repeated from a count."""

    def __init__(self, source: Iterator[Any], again: _Again | None, chain: _Chain) -> None:
        self._source, self._again, self._chain = source, again, chain
        self._queue: deque[Any] = deque()
        self._digest = xxhash.xxh3_64()
        self._replayed: rng.State = {}  # the streams as a repetition, with nothing drawn between, has them
        self.first: _State | None = None
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
        if self.first is None:
            self.first = self._chain.parent_state()
            self._replayed = self._chain.streams() if self._chain.draws_late else {}
        before = self._chain.streams() if self._chain.draws_late else {}
        try:
            indices = next(self._source)
        except StopIteration:
            self.ended = True
            raise
        finally:
            if before:
                self._compare(before)
        self.drawn += 1
        self._digest.update(_bytes_of(indices))
        return indices

    def _compare(self, before: rng.State) -> None:
        """Refuse a sampler and a training that take turns in drawing from one stream."""
        after = self._chain.streams()
        for stream, state in before.items():
            if after.get(stream) == state:
                continue
            if self._replayed.get(stream, state) != state:
                raise RegisterError(
                    f"the sampler of the loader '{self._chain.name}' draws from the stream '{stream}' batch after "
                    "batch, and so does something else between two batches; a resume could not repeat its draws "
                    "alone. Give the sampler a generator of its own, or let it draw everything when it begins"
                )
            self._replayed[stream] = after[stream]

    def repeat(self) -> None:
        """Draw again what was drawn; queue what had not been handed out.

        The sampler may draw from a shared generator, also once more when it ends, so at every boundary it
        must have been asked exactly as often as in the uninterrupted run.
        """
        if self._again is None:
            return
        (again, first, turns), self._again = self._again, None
        self._queue.extend(_EmptyTurn() for _ in range(turns))
        if first is not None:
            self._chain.set_parent_state(first)
        try:
            for n in range(again.drawn):
                indices = self._draw()
                if n >= again.handed_out:
                    self._queue.append(indices)
            if again.ended:
                self._draw()
        except StopIteration:
            pass
        if (self.drawn, self.ended, self.digest()) != (again.drawn, again.ended, again.digest):
            raise RestoreError(
                f"the sampler of the loader '{self._chain.name}' did not repeat the indices that it had given "
                "before the checkpoint: they depend on something that is not saved (another data set, an object "
                "that the training changes, the hash seed); give it state_dict and load_state_dict"
            )

    def digest(self) -> int:
        value: int = self._digest.intdigest() & (2**63 - 1)
        return value


def _bytes_of(indices: Any) -> bytes:
    try:
        return marshal.dumps(indices, 2)
    except ValueError:  # not plain Python
        if isinstance(indices, (list, tuple)):
            return b",".join(_bytes_of(index) for index in indices)
        if hasattr(indices, "tolist"):  # NumPy, torch
            return _bytes_of(indices.tolist())
        return type(indices).__name__.encode()  # of the user's own: counted, not compared


class _Sampler:
    """The sampler as torch's loader sees it."""

    def __init__(self, sampler: Any, chain: _Chain) -> None:
        self.sampler, self._chain = sampler, chain
        self.stream = _Stream(iter(()), None, chain)
        self.prepare(None, None)

    def prepare(self, again: _Again | None, before_second: Callable[[], None] | None) -> None:
        """Say how the next iteration begins.

        Args:
            again: how far to repeat an earlier one.
            before_second: called before torch asks the second time (a loader with workers does).
        """
        self._again, self._before_second, self._asked = again, before_second, 0

    def __iter__(self) -> Iterator[Any]:
        self._asked += 1
        if self._asked == 2 and self._before_second is not None:
            self._before_second()
        # iter() of the user's sampler runs here, as often as torch asks: eager ones draw in it
        self.stream = _Stream(iter(self.sampler), self._again, self._chain)
        return self.stream

    def __len__(self) -> int:
        return len(self.sampler)


# ---- in the training process ---------------------------------------------------------------------


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
        self.thread = threading.get_ident()
        self.saved: dict[str, Any] | None = None  # the checkpoint's state
        self.workers: dict[int, bytes] = {}  # each worker's state after its last batch handed out
        self.birth: _State | None = None  # the state under which persistent workers were born
        self.on_batch: Callable[[str, Any], None] | None = None  # told of every batch, to record it
        samplers = list(_samplers(loader.batch_sampler, loader.sampler))
        stateless = [sampler for sampler in samplers if not carried.is_stateful(sampler)]
        self._attributes = [carried.Attributes(sampler, loader.dataset) for sampler in stateless]
        self.draws_late = not all(map(_draws_at_first, samplers))
        self.sampler = _Sampler(None, self)
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

    # ---- what the loader draws from and carries in this process

    def _carriers(self) -> list[carried.Carrier]:
        loader = self.loader
        parts = (loader.generator, loader.sampler, loader.batch_sampler, loader.dataset)
        found = carried.find(*parts, loader.collate_fn, loader.worker_init_fn)
        return found + self._attributes

    def parent_state(self) -> _State:
        return [rng.capture(), carried.get(self._carriers())]

    def set_parent_state(self, state: _State) -> None:
        carried.put(self._carriers(), state[1], f"the loader '{self.name}'")
        rng.restore(state[0])

    def streams(self) -> rng.State:
        """Return the state of every generator that a sampler could draw from."""
        own = [carrier for carrier in self._carriers() if isinstance(carrier, rng.GENERATORS)]
        named = {f"{type(g).__module__}.{type(g).__name__} {n}": rng.get(g) for n, g in enumerate(own)}
        return {**rng.capture(), **named}

    def refuse_new_carriers(self, before: int) -> None:
        """Refuse generators that were made while the first batch was."""
        carried.refuse_new(before, len(self._carriers()), f"the loader '{self.name}'")

    def snapshot(self) -> dict[str, Any]:
        """Return all but the place in the running pass, as tensors and plain data."""
        if self._pass is not None:
            self._pass.drain()
        return {
            "carried": carried.to_plain(carried.get(self._carriers())),
            "workers": {worker: _to_plain(pickle.loads(data)) for worker, data in self.workers.items()},
            "birth": self.birth and _to_plain(self.birth),
        }

    def set_snapshot(self, saved: dict[str, Any]) -> None:
        """Go back to a snapshot; the global streams are left alone. The next pass has new workers."""
        if self._pass is None or not self._pass.running:
            self.recall(saved)
            self._inner = None
        carried.put(self._carriers(), carried.from_plain(saved["carried"]), f"the loader '{self.name}'")

    def recall(self, saved: dict[str, Any]) -> None:
        """Take the workers' states from a snapshot."""
        workers = saved["workers"].items()
        self.workers = {worker: pickle.dumps(_from_plain(state), protocol=5) for worker, state in workers}
        self.birth = saved["birth"] and _from_plain(saved["birth"])

    # ---- passes

    def iterate(self) -> Iterator[Any]:
        if self._pass is not None:
            self._pass.superseded = self._pass.running
            self._pass.leave()
            self._pass.drain()
        what, mark = self.position.begin(self.loop)
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

    def build(self, again: _Again | None, before_second: Callable[[], None] | None) -> Iterator[Any]:
        """Begin an iteration of torch's loader; the arguments are those of `_Sampler.prepare`."""
        loader = self.loader
        if self._inner is None or not self.persistent or again is not None:
            continued = again is not None or before_second is not None
            collate = _Collate(loader.collate_fn)
            init = _InitWorker(loader.worker_init_fn, collate, dict(self.workers) if continued else {})
            self.sampler = _Sampler(self.index_sampler, self)
            options: dict[str, Any] = {
                "num_workers": loader.num_workers,
                "collate_fn": collate,
                "pin_memory": loader.pin_memory,
                "timeout": loader.timeout,
                "worker_init_fn": init,
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
        self.sampler.prepare(again, before_second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = iter(self._inner)
        if loader.num_workers == 0:
            self.sampler.stream.repeat()
        for _ in range(again.turns if again else 0):
            next(batches)
        self.sampler.prepare(None, None)
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
        place = self._pass.state_dict() if self._pass is not None and self._pass.running else None
        return {"built": self._built(), **self.snapshot(), "pass": place}

    def _built(self) -> dict[str, Any]:
        """Return what must not change while a run goes on."""
        loader = self.loader
        names = ("num_workers", "prefetch_factor", "persistent_workers", "batch_size", "drop_last")
        try:
            length = len(loader.dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):
            length = None
        return {
            **{name: getattr(loader, name) for name in names},
            "sampler": type(loader.sampler).__name__,
            "batch_sampler": type(loader.batch_sampler).__name__,
            "length of the data set": length,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state for the loader's next pass.

        Raises:
            RestoreError: the loader is not the one that was saved.
        """
        for name, mine in self._built().items():
            found = state["built"][name]
            if found != mine:
                raise RestoreError(
                    f"the loader '{self.name}' has {name} {mine}, the checkpoint was taken with {found}: its "
                    "batches could not be continued; build it as it was, or start a new run"
                )
        self.saved = state

    def go_on(self) -> None:
        """Undo what the walk to the checkpoint's place did to this loader."""
        saved = self.saved
        if saved is None:
            return
        running = self._pass if self._pass is not None and self._pass.running else None
        place = saved["pass"]
        if place and running and not (running.resumed and running.handed_out == place["drawn"][0]):
            running.resume()
        self.set_snapshot(saved)


def _samplers(*roots: Any) -> Iterator[Any]:
    """Yield the samplers, and those that they hold."""
    for root in roots:
        if root is not None:
            yield root
            inner = getattr(root, "__dict__", {}).values()
            yield from _samplers(*(value for value in inner if isinstance(value, Sampler)))


def _draws_at_first(sampler: Any) -> bool:
    """Whether it is known to draw from a generator when it begins, and at its end, only."""
    own = type(sampler).__module__.partition(".")[0] == "torch"
    return own and not getattr(sampler, "replacement", False)


def _to_plain(state: _State) -> list[Any]:
    return [rng.to_tensors(state[0]), carried.to_plain(state[1])]


def _from_plain(state: list[Any]) -> _State:
    return [rng.from_tensors(state[0]), carried.from_plain(state[1])]


class _Pass:
    """One pass over the batches of a registered loader."""

    def __init__(self, chain: _Chain, mark: Mark) -> None:
        self.chain, self._mark = chain, mark
        self._batches: Iterator[Any] = iter(())
        self._began: _State = []  # the process's state when the pass began
        self._bore = False  # whether persistent workers were born with it
        self._in_flight = False
        self.handed_out = 0
        self.running = True
        self.resumed = False
        self.superseded = False

    def start(self) -> None:
        """Begin at the first batch."""
        chain = self.chain
        self._began = began = chain.parent_state()
        before_second = None
        if not chain.persistent or chain.birth is None:
            self._bore = chain.persistent
            chain.birth = began if self._bore else None
            chain.workers = {}
        elif chain.inner is None:  # workers of an earlier process: born again, then as they were left
            chain.set_parent_state(chain.birth)
            before_second = lambda: chain.set_parent_state(began)  # noqa: E731
        self._batches = chain.build(None, before_second)

    def resume(self) -> None:
        """Move to the checkpoint's batch; no item is loaded, the process's state stays as it is."""
        chain = self.chain
        assert chain.saved is not None
        chain.recall(chain.saved)
        saved = chain.saved["pass"]
        how_far = _Drawn(*saved["drawn"])
        self._began = began = _from_plain(saved["began"])
        self._bore = saved["bore"]
        self.handed_out, self.resumed = how_far.handed_out, True
        workers = chain.loader.num_workers
        exhausted = workers > 0 and how_far.ended and how_far.handed_out == how_far.drawn
        turns = 0 if exhausted or not workers else how_far.handed_out % workers
        again = _Again(how_far, saved["first"] and _from_plain(saved["first"]), turns)
        if exhausted and not chain.persistent:  # only the end of the loop is left, which needs no worker
            chain.sampler = _Sampler(None, chain)
            chain.sampler.stream.drawn, chain.sampler.stream.ended = how_far.drawn, True
            return
        present = chain.parent_state()
        before_second = None
        chain.set_parent_state(began)
        if chain.birth is not None and not self._bore:
            chain.set_parent_state(chain.birth)
            before_second = lambda: chain.set_parent_state(began)  # noqa: E731
        self._batches = chain.build(again, before_second)
        chain.set_parent_state(present)

    def state_dict(self) -> dict[str, Any]:
        stream = self.chain.sampler.stream
        return {
            "began": _to_plain(self._began),
            "bore": self._bore,
            "first": stream.first and _to_plain(stream.first),
            "drawn": list(_Drawn(self.handed_out, stream.drawn, stream.ended, stream.digest())),
        }

    def next(self) -> Any:
        chain = self.chain
        if threading.get_ident() != chain.thread:
            raise RegisterError(
                f"the loader '{chain.name}' is used from a thread that did not register it; it would run ahead of "
                "run.step() by an unknown number of batches. Give the loader workers (num_workers=) instead"
            )
        if self.superseded:
            raise RegisterError(
                f"two passes over the loader '{chain.name}' are used at the same time; a resume could not tell "
                "them apart: build and register a second loader for the second loop"
            )
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
        if self.handed_out == 1 and self._began:
            chain.refuse_new_carriers(len(self._began[1]))
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
        if not self.chain.persistent:
            self.chain.workers = {}
        self.chain.position.end(self._mark, exhausted=exhausted)

    def close(self) -> None:
        self.running = self._in_flight = False
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


def bind(loader: DataLoader[Any], name: str, position: Position, on_head: Callable[[Mark], None]) -> _Chain:
    """Make a loader resumable within a run.

    Raises:
        RegisterError: the loader is registered twice, or was iterated over before.
    """
    if loader._chain is not None and loader._chain.position is position:
        raise RegisterError(f"one loader is registered twice, as '{loader._chain.name}' and as '{name}'")
    loader._chain = _Chain(loader, name, position, on_head)
    return loader._chain
