"""One pass over the batches of a registered loader: begun, resumed, gone through, left."""

from __future__ import annotations

import dis
import pickle
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from chainrun.checkpoint.bits import fingerprint
from chainrun.errors import RegisterError, RestoreError
from chainrun.training import carried, holders, passed_on, rng, wrapped
from chainrun.training.indices import Again, Alone, Counted, Drawn, State
from chainrun.training.iterable import Place
from chainrun.training.packed import without_folders
from chainrun.training.passes import Pass as Mark
from chainrun.training.worker import End

if TYPE_CHECKING:
    from chainrun.training.data import Chain

_FIRST = 2  # passes of a process over a loader: the later ones are asked like these
_LOOPS = {dis.opmap[name] for name in ("FOR_ITER", "SEND", "YIELD_FROM") if name in dis.opmap}


def to_plain(state: State) -> list[Any]:
    return [rng.to_tensors(state[0]), carried.to_plain(state[1]), *map(place_to_plain, state[2:])]


def from_plain(state: list[Any]) -> State:
    return [rng.from_tensors(state[0]), carried.from_plain(state[1]), *map(place_from_plain, state[2:])]


def place_to_plain(place: Place) -> list[Any]:
    return [pickle.loads(place.state) if place.state else None, place.over, place.given]


def place_from_plain(place: list[Any]) -> Place:
    return Place(pickle.dumps(place[0], protocol=5) if place[0] is not None else b"", *place[1:])


def workers_to_plain(workers: dict[int, bytes]) -> dict[int, Any]:
    return {worker: to_plain(pickle.loads(state)) for worker, state in workers.items()}


def workers_from_plain(workers: dict[int, Any]) -> dict[int, bytes]:
    return {worker: pickle.dumps(from_plain(state), protocol=5) for worker, state in workers.items()}


class OnePass:
    """One pass over the batches of a registered loader."""

    def __init__(self, chain: Chain, mark: Mark) -> None:
        self.chain, self._mark = chain, mark
        self._batches: Iterator[Any] = iter(())
        self._began: State = []  # the process's state when the pass began
        self._bore = False  # whether persistent workers were born with it
        self._in_flight = False
        self._seen: set[int] = set()  # workers of which a batch was handed out
        self._ended: set[int] = set()  # those whose data has ended
        self._workers_began: dict[int, bytes] = {}
        self._alone: Alone | None = None
        self.see: Callable[[bool, Any], None] | None = None  # told of the next batch, or that there is none
        self.handed_out = 0
        self.running = True
        self.resumed = False
        self.superseded = False
        self._failed = self._asked = False
        self.iterator: Callable[[], Any] = lambda: None  # what the function has got
        self._given: list[weakref.ref[torch.Tensor]] = []  # until it was looked for those who keep them
        self._length = (
            0 if chain.turns else chain.length()
        )  # 0 where it is not known; a sampler may say it wrong
        self._looked = False  # for iterators around it that no cut can go on from
        self._around = wrapped.Around()
        self._counts: list[int] = []  # of each enumerate() around it, when the checkpoint was taken

    def start(self) -> None:
        """Begin at the first batch."""
        chain = self.chain
        self._began = began = chain.parent_state()
        before_second = None
        if not chain.persistent or chain.birth is None or chain.counter:
            self._bore = chain.persistent and not chain.counter
            chain.birth = began if self._bore else None
            chain.workers = {}
        elif chain.inner is None:  # workers of an earlier process: born again, then as they were left
            chain.set_parent_state(chain.birth)
            before_second = lambda: chain.set_parent_state(began)  # noqa: E731
        self._workers_began = dict(chain.workers)
        self._batches = chain.build(None, before_second)

    def resume(self) -> None:
        """Move to the checkpoint's batch; no item is loaded, the process's state stays as it is."""
        chain = self.chain
        assert chain.saved is not None
        chain.check_length()
        chain.recall(chain.saved)
        chain.renew()
        saved = chain.saved["pass"]
        how_far = Drawn(*saved["drawn"])
        self._began = began = from_plain(saved["began"])
        self._bore, self._counts = saved["bore"], saved["counts"]
        self.handed_out, self.resumed = how_far.handed_out, True
        self._looked = how_far.handed_out > 1  # by the earlier process
        workers = chain.loader.num_workers
        self._seen = set(saved["seen"])
        repeats = chain.turns is not None and not self._knows_its_place()
        exhausted = workers > 0 and how_far.ended and how_far.handed_out == how_far.drawn
        turns = 0 if exhausted or not workers or chain.counter else how_far.handed_out % workers
        again = Again(how_far, saved["first"] and from_plain(saved["first"]), turns)
        if exhausted and not chain.persistent:  # only the end of the loop is left, which needs no worker
            chain.sampler = Counted(None, chain)
            chain.sampler.stream.drawn, chain.sampler.stream.ended = how_far.drawn, True
            return
        present = chain.parent_state()
        before_second = None
        chain.set_parent_state(began)
        if chain.birth is not None and not self._bore:
            chain.set_parent_state(chain.birth)
            before_second = lambda: chain.set_parent_state(began)  # noqa: E731
        self._workers_began = workers_from_plain(saved["workers began"])
        if repeats:
            self._repeat(again, before_second, saved["reached"])
        else:
            self._batches = chain.build(again, before_second, frozenset(self._seen))
            if chain.turns and not workers:
                chain.turns.recall(place_from_plain(chain.saved["place"]), inside=True)
        chain.set_parent_state(present)

    def _knows_its_place(self) -> bool:
        """Whether an iterable data set, or its iterators, said where they were."""
        chain = self.chain
        assert chain.saved is not None
        if not chain.loader.num_workers:
            return chain.saved["place"][0] is not None
        return any(pickle.loads(chain.workers[worker])[2].state for worker in self._seen)

    def _repeat(
        self, again: Again, before_second: Callable[[], None] | None, reached: dict[str, str]
    ) -> None:
        """Make the batches again that were handed out, and see that this came to the same place.

        Raises:
            RestoreError: it did not.
        """
        chain, count = self.chain, self.handed_out
        expected, chain.workers = chain.workers, dict(self._workers_began)
        if not self._workers_began:
            before_second = None
        self._batches = chain.build(None, before_second, repeated=count)
        if not chain.loader.num_workers and again.first:
            chain.set_parent_state(again.first)
        self.handed_out = 0
        say = f"the loader '{chain.name}' goes through the batches of this epoch again"
        for _ in tqdm(range(count), desc=say, unit="batch", delay=2, disable=not sys.stderr.isatty()):
            self._take()
        then, now_made = workers_to_plain(expected), workers_to_plain(chain.workers)
        differs = [
            f"worker {worker}"
            for worker in sorted(self._seen)
            if fingerprint(without_folders(now_made[worker])) != fingerprint(without_folders(then[worker]))
        ]
        now = self._alone.reached() if self._alone else {}
        differs += [
            f"the stream '{name}'" for name in {**now, **reached} if now.get(name) != reached.get(name)
        ]
        assert chain.turns is not None and chain.saved is not None
        if not chain.loader.num_workers and chain.turns.place != place_from_plain(chain.saved["place"]):
            differs.append("its items")
        if differs:
            raise RestoreError(
                f"the iterable data set of the loader '{chain.name}' did not repeat the batches that it had given "
                f"before the checkpoint ({', '.join(differs)}): it depends on something that is not saved; give it, "
                "or its iterator, state_dict and load_state_dict"
            )

    def state_dict(self) -> dict[str, Any]:
        stream = self.chain.sampler.stream
        return {
            "began": to_plain(self._began),
            "bore": self._bore,
            "first": stream.first and to_plain(stream.first),
            "seen": sorted(self._seen),
            "workers began": workers_to_plain(self._workers_began),
            "reached": self._alone.reached() if self._alone else {},
            "counts": wrapped.counts(self._around, self.iterator()),
            "drawn": list(Drawn(self.handed_out, stream.drawn, stream.ended, stream.digest())),
        }

    def next(self, *, by_hand: bool) -> Any:
        chain = self.chain
        self._mark.by_hand = by_hand
        if threading.get_ident() != chain.thread:
            raise RegisterError(
                f"the loader '{chain.name}' is used from a thread that did not register it; it would run ahead of "
                "run.step() by an unknown number of batches. Give the loader workers (num_workers=) instead"
            )
        if self.superseded:
            _refuse_two_passes(chain.name)
        if self._failed:
            raise RegisterError(
                f"the function goes on with the loader '{chain.name}' after an error in one of its batches; what its "
                "data was left in by that error is not known to a resume. Catch the error inside the data set, and "
                "return another item or None; or leave the loop"
            )
        if not self.running:
            raise StopIteration  # as an iterator says again and again; it is no place to go on from
        self._mark.passed_on = passed_on.NOTHING
        if not self._asked:
            self._asked = True
            if chain.passes <= _FIRST:
                chain.position.note_bound(self._mark)
        if self.handed_out and self.handed_out == self._length:
            self._end_is_near()
        if not self._looked and self.handed_out and self._mark.boundaries != chain.position.boundaries:
            self._looked = True  # only a pass with boundaries inside is ever cut
            if chain.passes <= _FIRST:
                wrapped.refuse(self._around, self.iterator(), chain.name)
                passed_on.refuse_ahead(self._given, chain.name)
                passed_on.refuse_collected(chain.name)
            self._given = []
        chain.on_head(self._mark)
        if self._counts:
            wrapped.set_counts(self._around, self.iterator(), self._counts)
            self._counts = []
        see, self.see = self.see, None
        try:
            batch = self.make()
        except StopIteration:
            if see is not None:
                see(True, None)
            self._end_is_near()
            self.leave(exhausted=True)
            raise
        if see is not None:
            see(False, batch)
        if not self._looked:
            self._given += passed_on.tensors_of(batch)
        if self.handed_out == 1 and self._began:
            chain.refuse_new_carriers(len(self._began[1]))
        chain.position.advance(self._mark)
        if chain.on_batch is not None:
            chain.on_batch(chain.name, batch)
        return batch

    def _end_is_near(self) -> None:
        """The loop asks for a batch, and there is none."""
        position = self.chain.position
        if self._mark.boundaries != position.boundaries and not position.walking and not position.over:
            position.end_is_near(self._mark)

    def make(self) -> Any:
        """Return the next batch.

        Raises:
            StopIteration: the pass is at its end.
        """
        while isinstance(batch := self._take(), End):
            if len(self._ended) == max(1, self.chain.loader.num_workers):
                raise StopIteration
        return batch

    def _take(self) -> Any:
        """Return the next batch, or `End` for the turn of a worker whose data has ended."""
        chain, worker = self.chain, 0
        alone = None
        if chain.turns and not chain.loader.num_workers and not chain.turns.place.state:
            alone = self._alone = self._alone or Alone(
                chain,
                f"the iterable data set of the loader '{chain.name}'",
                "Give it num_workers=1, a generator of its own, or state_dict and load_state_dict",
            )
            before = chain.streams()
        try:
            batch = next(self._batches)
        except StopIteration:
            raise
        except Exception:
            self._fail()
            raise
        if chain.loader.num_workers and not chain.counter:
            batch, worker, state, ended = batch
            self._seen.add(worker)
            if state:
                chain.workers[worker] = state
            if ended:
                batch = End(bool(state))
        if isinstance(batch, End):
            self._ended.add(worker)
        elif alone:
            alone.check(before)
        self.handed_out += 1
        return batch

    def _fail(self) -> None:
        """A batch could not be made; the function may catch that and go on with the next one."""
        if self.chain.turns or (self.chain.loader.num_workers and not self.chain.counter):
            self._failed = True  # the worker's random state, or the place in the data, did not come along
        else:
            self.handed_out += 1  # its indices are used

    def hand_out(self, iterator: Callable[[], Any]) -> None:
        """Note what the function gets, of which nothing here may keep it alive."""
        self.iterator = iterator
        self._mark.goes_on = lambda: wrapped.goes_on(iterator())
        self._mark.lives = lambda: iterator() is not None
        outside = self.chain.position.outside
        self._mark.holder = lambda: holders.find(iterator(), outside)

    def leave(self, *, exhausted: bool = False) -> None:
        """The pass is over, by its end or by a break."""
        if not self.running:
            return
        self.running = False
        self._in_flight = self.chain.persistent and not (exhausted and not self.chain.turns)
        if self.chain.turns and not exhausted and not self.chain.position.over:
            self.chain.note_early(ended=bool(self._ended))
        if not self._in_flight:
            self._batches = iter(())  # ends the workers, as the end of torch's own iterator does
        if not self.chain.persistent:
            self.chain.workers = {}
        self.chain.position.end(self._mark, exhausted=exhausted)

    @property
    def processes(self) -> list[Any]:
        """Its workers."""
        return list(getattr(self._batches, "_workers", ()))

    def close(self) -> None:
        self.running = self._in_flight = False
        self._batches = iter(())

    def drain(self) -> None:
        """Note where persistent workers end: they still compute what they had been sent before a break."""
        if self._in_flight:
            self._in_flight = False
            self.chain.sampler.stream.stopped = True
            left_early = len(self._ended) < self.chain.loader.num_workers
            for _, worker, state, ended in self._batches if not self.chain.counter else ():
                if state:
                    self.chain.workers[worker] = state
                if ended and left_early:
                    self.chain.note_early(ended=True)


def _refuse_two_passes(name: str) -> None:
    raise RegisterError(
        f"two passes over the loader '{name}' are used at the same time; a resume could not tell them apart: build and "
        "register a second loader for the second loop"
    )


class Skipped(Iterator[Any]):
    """Gives nothing during the walk. A variable that holds it goes on with the pass that it held then."""

    def __init__(self, chain: Chain, mark: Mark) -> None:
        self._chain, self._mark = chain, mark
        self._batches: Iterator[Any] = iter(())

    def __next__(self) -> Any:
        if self._chain.position.is_waiting(self._chain.loop):
            self._batches = self._chain.iterate(taken_up=True)
        elif not self._chain.position.walking and not self._mark.exhausted:
            _refuse_two_passes(self._chain.name)  # as uncut: another one had begun before the cut
        return next(self._batches)


class Batches(Iterator[Any]):
    """The iterator that the loop holds; when the loop drops it, the pass is over."""

    def __init__(self, one_pass: OnePass) -> None:
        self._pass = one_pass
        one_pass.hand_out(weakref.ref(self))

    def __next__(self) -> Any:
        caller = sys._getframe(1)  # zip, enumerate and the like have no frame: it is the loop around them
        return self._pass.next(by_hand=caller.f_code.co_code[caller.f_lasti] not in _LOOPS)

    def __len__(self) -> int:
        return len(self._pass.chain.loader)

    def __del__(self) -> None:
        self._pass.leave()
