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

import functools
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch.utils.data import DataLoader as TorchDataLoader
from torch.utils.data import Dataset, IterableDataset

from chainrun.errors import RegisterError, RestoreError
from chainrun.training import carried, contents, holders, rng
from chainrun.training.fills import Fills
from chainrun.training.indices import Again, Counted, State, draws_at_first, samplers_in
from chainrun.training.iterable import Endless, Turns, carriers
from chainrun.training.one_pass import (
    Batches,
    OnePass,
    Skipped,
    from_plain,
    place_from_plain,
    place_to_plain,
    to_plain,
    workers_from_plain,
    workers_to_plain,
)
from chainrun.training.passes import Pass as Mark
from chainrun.training.position import Position
from chainrun.training.stop import end_with
from chainrun.training.worker import Collate, Counter, InitWorker, Items

T = TypeVar("T")

_LENGTH = "length of the data set"


# torch's iterators over loaders that are not registered (yet)
_early: weakref.WeakKeyDictionary[Any, weakref.WeakSet[Any]] = weakref.WeakKeyDictionary()


class DataLoader(TorchDataLoader[T]):
    """`torch.utils.data.DataLoader`, resumable exactly at every batch once it is registered.

    Takes torch's arguments and gives torch's stream. A loader that is not registered is torch's loader.

    An `IterableDataset` goes on from its ``state_dict``, or its iterator's; one without makes the batches of the
    running epoch again, and is checked to have come to the same place.

    Args:
        rng: ``"torch"``, torch's own random streams in the workers; or ``"counter"``: what data set and collate
            function draw is seeded by (seed, rank, pass, batch, place in the batch), another stream than torch's,
            the same under any `num_workers`, which may then differ from segment to segment.

    Raises:
        RegisterError: at construction, for what cannot be resumed exactly: ``in_order=False`` with workers, where
            the order of batches depends on timing; a torchdata `IterDataPipe`; ``rng="counter"`` with an
            `IterableDataset`, whose shards depend on the number of workers.
    """

    def __init__(
        self, dataset: Dataset[T], *args: Any, rng: Literal["torch", "counter"] = "torch", **kwargs: Any
    ) -> None:
        super().__init__(dataset, *args, **kwargs)
        self.rng = rng
        if rng not in ("torch", "counter"):
            raise RegisterError(f"chainrun.DataLoader was given rng={rng!r}; it is 'torch' or 'counter'")
        if isinstance(dataset, getattr(torch.utils.data, "IterDataPipe", ())):
            raise RegisterError(
                f"chainrun.DataLoader was given an IterDataPipe ({type(dataset).__name__}), whose shuffling torch "
                "seeds in ways that cannot be repeated from outside; write it as an IterableDataset"
            )
        if rng == "counter" and isinstance(dataset, IterableDataset):
            raise RegisterError(
                f"chainrun.DataLoader was given rng='counter' with an IterableDataset ({type(dataset).__name__}): "
                "which worker reads what depends on their number, so that its batches cannot be numbered; leave "
                "rng='torch', or use a data set with __getitem__ and __len__"
            )
        if self.num_workers and not getattr(self, "in_order", True):
            raise RegisterError(
                "chainrun.DataLoader was given in_order=False with workers; the order of batches then depends "
                "on timing and no resume can repeat it. Leave in_order=True"
            )
        self._chain: Chain | None = None

    def __iter__(self) -> Any:
        chain = getattr(self, "_chain", None)
        if chain is not None:
            return chain.iterate()
        if getattr(self, "rng", "torch") == "counter":
            raise RegisterError(
                "a chainrun.DataLoader with rng='counter' is used without being registered; what it draws is seeded "
                "by the run: call run.register(loader=...) first"
            )
        iterator = super().__iter__()
        _early.setdefault(self, weakref.WeakSet()).add(iterator)
        return iterator


class Chain:
    """What makes one registered loader resumable."""

    def __init__(
        self,
        loader: DataLoader[Any],
        name: str,
        position: Position,
        on_head: Callable[[Mark], None],
        counter: Counter,
    ) -> None:
        self.loader, self.name, self.loop = loader, name, f"loader:{name}"
        self.position, self.on_head = position, on_head
        self.thread = threading.get_ident()
        self.saved: dict[str, Any] | None = None  # the checkpoint's state
        self.workers: dict[int, bytes] = {}  # each worker's state after its last batch handed out
        self.birth: State | None = None  # the state under which persistent workers were born
        self.on_batch: Callable[[str, Any], None] | None = None  # told of every batch, to record it
        self.turns: Turns | None = None  # of an iterable data set
        self.passes = 0
        self.counter = counter if loader.rng == "counter" else None
        samplers = list(samplers_in(loader.batch_sampler, loader.sampler))
        if isinstance(loader.dataset, IterableDataset):
            self.turns = Turns(loader.dataset, loader.batch_size, loader.drop_last)
            samplers = []
        stateless = [sampler for sampler in samplers if not carried.is_stateful(sampler)]
        others = (loader.dataset, *samplers)
        self._attributes: list[Any] = [contents.Attributes(sampler, *others) for sampler in stateless]
        if self.turns and not (carried.is_stateful(loader.dataset) and loader.num_workers == 0):
            self._attributes.append(contents.Contents(loader.dataset))
        parts = (loader.collate_fn,) if self.turns else (loader.dataset, loader.collate_fn)
        self._attributes += contents.of_parts(*parts)
        self._fills = Fills(self._attributes)
        self.draws_late = not all(map(draws_at_first, samplers))
        self.sampler = Counted(None, self)
        self._endless = Endless()
        self._inner: TorchDataLoader[Any] | None = None
        self._pass: OnePass | None = None
        self._stands_in = False  # the function has got a `Skipped`
        self._unclear: str | None = None  # why the next pass could not be resumed
        self._registered_with = self._items()

    @property
    def persistent(self) -> bool:
        return bool(self.loader.persistent_workers and self.loader.num_workers)

    @property
    def inner(self) -> TorchDataLoader[Any] | None:
        """The torch loader that does the work."""
        return self._inner

    @property
    def index_sampler(self) -> Any:
        if self.turns:
            return self._endless
        batch_sampler = self.loader.batch_sampler
        return self.loader.sampler if batch_sampler is None else batch_sampler

    @property
    def numbers(self) -> int | None:
        """The number of the running pass, where what is drawn depends on it."""
        return self.passes if self.counter else None

    @property
    def belongings(self) -> list[Any]:
        """What the checkpoint holds as the loader's: its parts, and what was found in them."""
        loader = self.loader
        parts = [
            loader.dataset,
            loader.sampler,
            loader.batch_sampler,
            loader.collate_fn,
            loader.worker_init_fn,
        ]
        return [loader, *parts, *self._carriers()]

    # ---- what the loader draws from and carries in this process

    def _carriers(self) -> list[carried.Carrier]:
        loader = self.loader
        parts = (loader.generator, loader.sampler, loader.batch_sampler, loader.dataset)
        found = carried.find(*parts, loader.collate_fn, loader.worker_init_fn)
        if self.turns:  # the place in an iterable data set is kept by `Turns`
            found = carriers(loader.dataset, found)
        return found + self._attributes

    def parent_state(self) -> State:
        return [rng.capture(), carried.get(self._carriers())]

    def set_parent_state(self, state: State) -> None:
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
            "workers": workers_to_plain(self.workers),
            "birth": self.birth and to_plain(self.birth),
            "place": self.turns and place_to_plain(self.turns.place),
            "passes": self.passes,
        }

    def set_snapshot(self, saved: dict[str, Any]) -> None:
        """Go back to a snapshot; the global streams are left alone. The next pass has new workers."""
        if self._pass is None or not self._pass.running:
            self.close()
            self.recall(saved)
            if self.turns and not self.loader.num_workers:
                self.turns.recall(place_from_plain(saved["place"]), inside=False)
        self.passes = saved["passes"]
        carried.put(self._carriers(), carried.from_plain(saved["carried"]), f"the loader '{self.name}'")

    def recall(self, saved: dict[str, Any]) -> None:
        """Take the workers' states from a snapshot."""
        self.workers = workers_from_plain(saved["workers"])
        self.birth = saved["birth"] and from_plain(saved["birth"])

    def note_early(self, *, ended: bool) -> None:
        """A pass over an iterable data set was left early; note what would make the next one unclear.

        Args:
            ended: the data of one of its workers had ended.
        """
        lives_on = self.persistent or not self.loader.num_workers
        if self.persistent and ended:
            self._unclear = (
                "after the data of one of its workers had ended: how far the others, which live on "
                "(persistent_workers), then read ahead depends on timing. Leave persistent_workers=False, or go "
                "through all of it"
            )
        elif lives_on and self._has_state():
            self._unclear = (
                "and its data set has state_dict: after a resume nothing tells whether its next iter() goes on there "
                "or begins again. Use workers that end with each pass (num_workers=1, persistent_workers=False), go "
                "through all of it, or take the batches from one iterator inside run.steps()"
            )

    def _has_state(self) -> bool:
        if self.turns and not self.loader.num_workers:
            return bool(self.turns.place.state)
        return any(pickle.loads(state)[2].state for state in self.workers.values())

    # ---- passes

    def iterate(self, *, taken_up: bool = False) -> Iterator[Any]:
        """Begin a pass; `taken_up` is the one that a variable held when the checkpoint was taken."""
        if self._stands_in and not taken_up and self.position.is_waiting(self.loop):
            self.position.forget_waiting(self.loop)
        if self._pass is not None:
            self._pass.superseded = self._pass.running
            self._pass.leave()
            self._pass.drain()
        if self._unclear is not None:
            raise RegisterError(f"a pass over the loader '{self.name}' was left early {self._unclear}")
        what, mark = self.position.begin(self.loop)
        self.passes += 1
        if what == "skip":
            self._stands_in = True
            return Skipped(self, mark)
        self._pass = OnePass(self, mark)
        if what == "resume":
            self._pass.resume()
            self.position.resumed(mark)
        else:
            self._pass.start()
            if mark.begun is None and mark.line is not None:
                streams = rng.to_tensors(rng.capture())
                mark.begun = {"global": streams, "generators": {}, "loaders": {}}
        return Batches(self._pass)

    def build(
        self,
        again: Again | None,
        before_second: Callable[[], None] | None,
        inside: frozenset[int] = frozenset(),
        repeated: int = 0,
    ) -> Iterator[Any]:
        """Begin an iteration of torch's loader; the first two arguments are those of `Counted.prepare`.

        Args:
            inside: the workers whose state is of this pass.
            repeated: so many batches are made again, and not sent.
        """
        loader = self.loader
        if self._inner is None or not self.persistent:
            continued = again is not None or before_second is not None
            collate = Collate(loader.collate_fn, self.counter)
            states = dict(self.workers) if continued else {}
            init = InitWorker(loader.worker_init_fn, collate, states, inside)
            self.sampler = Counted(self.index_sampler, self)
            options: dict[str, Any] = {
                "num_workers": loader.num_workers,
                "collate_fn": collate,
                "pin_memory": loader.pin_memory,
                "timeout": loader.timeout,
                "worker_init_fn": init,
                "multiprocessing_context": loader.multiprocessing_context,
                # torch draws the workers' seed from it as often as it makes workers
                "generator": torch.Generator() if self.counter else loader.generator,
                "prefetch_factor": loader.prefetch_factor,
                "persistent_workers": loader.persistent_workers,
            }
            if loader.batch_sampler is None or self.turns:
                options.update(batch_size=None, sampler=self.sampler)
            else:
                options["batch_sampler"] = self.sampler
            items = self.turns or Items(loader.dataset, self.counter)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch said it when the user's loader was built
                self._inner = TorchDataLoader(items, **options)
        self._endless.repeated = repeated
        self.sampler.prepare(again, before_second)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batches = iter(self._inner)
        end_with(batches)
        if loader.num_workers == 0:
            self.sampler.stream.repeat()
            if self.turns and again is None:
                self.turns.begin()  # where torch makes its fetcher
            if self.counter and again is None:
                self.sampler.stream.prime()
        for _ in range(again.turns if again else 0):
            next(batches)
        self.sampler.prepare(None, None)
        return batches

    def renew(self) -> None:
        """The next pass has workers of its own, which begin where `workers` says."""
        self._inner = None
        assert self.saved is not None
        self.passes = self.saved["passes"]

    def passed(self) -> tuple[int, int, bool]:
        """Return how many batches of the pass are handed out, of how many (0: unknown), and whether it runs."""
        runs = self._pass is not None and self._pass.running
        length = self.length()
        return self._pass.handed_out if length and runs and self._pass else 0, length, runs

    def length(self) -> int:
        """Return the number of batches, 0 where it is unknown."""
        try:
            return len(self.loader)
        except TypeError:  # an iterable data set need not know
            return 0

    def close(self) -> None:
        """End the workers."""
        if self._pass is not None:
            self._pass.close()
        self._pass = self._inner = None

    # ---- for the witness of a handoff

    def peek(self) -> Any:
        """Return the next batch of the running pass, which is of no further use.

        Raises:
            StopIteration: the pass is at its end.
        """
        assert self._pass is not None
        return self._pass.make()

    def see_next(self, see: Callable[[bool, Any], None]) -> None:
        """Have `see` called before the next batch is handed out: with False and the batch, or True at the end."""
        assert self._pass is not None
        earlier = self._pass.see

        def both(ended: bool, batch: Any) -> None:
            if earlier is not None:
                earlier(ended, batch)
            see(ended, batch)

        self._pass.see = both

    @property
    def processes(self) -> list[Any]:
        """Return the workers of the running pass."""
        return self._pass.processes if self._pass else []

    # ---- state

    def state_dict(self) -> dict[str, Any]:
        """Return the loader's place as tensors and plain data."""
        if self.saved is not None and self.position.is_waiting(
            self.loop
        ):  # not taken up since the last resume
            return self.saved
        place = self._pass.state_dict() if self._pass is not None and self._pass.running else None
        rest = {"pass": place, "items": self._items(), "large": self._fills.marks()}
        return {"built": self._built(), **self.snapshot(), **rest}

    def _built(self) -> dict[str, Any]:
        """Return what must not change while a run goes on."""
        loader = self.loader
        names = ["rng", "batch_size", "drop_last"]
        if not self.counter:
            names += ["num_workers", "prefetch_factor", "persistent_workers"]
        return {
            **{name: getattr(loader, name) for name in names},
            "sampler": type(loader.sampler).__name__,
            "batch_sampler": type(loader.batch_sampler).__name__,
            _LENGTH: self._registered_with,
        }

    def _items(self) -> int | None:
        """Return the length of the data set, which may change between two passes; None where it has none."""
        try:
            return len(self.loader.dataset)  # type: ignore[arg-type]
        except (TypeError, NotImplementedError):  # an iterable one need not have a length
            return None

    def check_length(self) -> None:
        """See that the data set is as long as in the pass that is to go on.

        Raises:
            RestoreError: it is not.
        """
        assert self.saved is not None
        then, now = self.saved.get("items", self._items()), self._items()
        if then != now:
            raise RestoreError(
                f"the data set of the loader '{self.name}' has {now} items, and had {then} in the pass that the "
                "checkpoint was taken in: its batches could not be continued; give it the same items before the loop"
            )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Keep the state for the loader's next pass.

        Raises:
            RestoreError: the loader is not the one that was saved.
        """
        for name, mine in self._built().items():
            found = state["built"][name]
            # one that is built from run.state is by now as long as it was at the cut
            if found != mine and not (name == _LENGTH and mine == state.get("items")):
                raise RestoreError(
                    f"the loader '{self.name}' has {name} {mine}, the checkpoint was taken with {found}: its "
                    "batches could not be continued; build it as it was, or start a new run"
                )
        self.saved = state

    def go_on(self) -> list[str]:
        """Undo what the walk to the checkpoint's place did to this loader; return what to warn of."""
        saved = self.saved
        if saved is None:
            return []
        if (path := self.position.holder_of(self.loop)) is not None:
            holders.give(path, self.position.outside, functools.partial(self.iterate, taken_up=True))
        running = self._pass if self._pass is not None and self._pass.running else None
        place = saved["pass"]
        if place and running and not (running.resumed and running.handed_out == place["drawn"][0]):
            running.resume()
        self.set_snapshot(saved)
        where = f"the loader '{self.name}'"
        carriers, states = self._carriers(), carried.from_plain(saved["carried"])
        contents.check(carriers, states, where)
        lines = (*self._fills.changed(saved.get("large", {})), *contents.replaced(carriers, states))
        return [f"{where}: {line}" for line in lines]


def bind(
    loader: DataLoader[Any],
    name: str,
    position: Position,
    on_head: Callable[[Mark], None],
    counter: Counter,
) -> Chain:
    """Make a loader resumable within a run.

    Args:
        counter: seeds what a loader with ``rng="counter"`` draws.

    Raises:
        RegisterError: the loader is registered twice; it has ``rng="counter"`` and a data set with state of its own.
            An iterator that was made before raises it where it is asked for a batch.
    """
    if loader._chain is not None and loader._chain.position is position:
        raise RegisterError(f"one loader is registered twice, as '{loader._chain.name}' and as '{name}'")
    if loader.rng == "counter":
        for one in carried.find(loader.dataset, loader.collate_fn):
            if not isinstance(one, rng.GENERATORS):
                raise RegisterError(
                    f"the loader '{name}' has rng='counter' and a data set with state of its own "
                    f"({type(one).__name__}), which depends on what its worker did before; leave rng='torch'"
                )
    for iterator in _early.pop(loader, ()):
        iterator._next_data = functools.partial(_refuse_early, name)  # which torch's __next__ calls
    loader._chain = Chain(loader, name, position, on_head, counter)
    return loader._chain


def _refuse_early(name: str) -> None:
    raise RegisterError(
        f"an iterator over the loader '{name}' was made before run.register() and is asked for a batch after it: it is "
        "torch's own, whose place no checkpoint holds. Register the loader first, and make the iterator then"
    )
