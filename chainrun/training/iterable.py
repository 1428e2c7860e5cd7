"""An `IterableDataset` seen as a map-style data set of turns, so that it is resumed like one.

torch asks its workers in turn, one batch a turn, and leaves out a worker whose data has ended. Here every
worker keeps its turn, and says in it that its data has ended; the order of batches is the same, and a
turn's number says which worker's it is. To resume, the data set or its iterator, where they have
``state_dict``, are set to what they said after the last batch handed out (the protocol of torchdata's
StatefulDataLoader: ``load_state_dict``, then ``iter``). Others make the batches of the running pass again.
"""

from __future__ import annotations

import itertools
import os
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from chainrun.checkpoint.bits import fingerprint
from chainrun.errors import RestoreError
from chainrun.training import carried, contents, rng
from chainrun.training.worker import EmptyTurn, End, Repeated

_NOTHING: Any = object()


@dataclass(frozen=True, slots=True)
class Turn:
    """Asks for one batch."""

    number: int  # of the pass: another one than last time begins the data anew
    repeated: bool  # it was handed out before the checkpoint: made again, and not sent


class Endless:
    """The sampler: turns without end."""

    def __init__(self) -> None:
        self._number = 0
        self.repeated = 0  # so many turns of the next pass were handed out before

    def __iter__(self) -> Iterator[Turn]:
        self._number += 1
        number, repeated = self._number, self.repeated
        return (Turn(number, n < repeated) for n in itertools.count())


class Place(NamedTuple):
    """Where a worker's data is."""

    state: bytes  # pickled states of data set and iterator after the last batch; empty where they have none
    over: bool  # nothing comes any more in this pass
    given: str = ""  # fingerprint of what was given in this pass, where there is no state


def carriers(dataset: Any, found: list[carried.Carrier]) -> list[carried.Carrier]:
    """Return those whose state is kept beside the place in the data; its own state_dict says the rest."""
    if carried.is_stateful(dataset):
        return [one for one in found if isinstance(one, rng.GENERATORS)]
    return found


class Turns(Dataset[Any]):
    """The user's data set by turns; a worker has a copy, without workers the training process holds it."""

    def __init__(self, dataset: Any, batch_size: int | None, drop_last: bool) -> None:
        self.dataset = dataset
        self._batch_size, self._drop_last = batch_size, drop_last
        self._iterator: Any = None
        self._number: int | None = None
        self._begun = False  # for the pass whose first turn is still to come
        self._over = self._said = False
        self._last = b""
        self._given = ""
        self._contents: list[contents.Contents] = []

    def note_contents(self, collate: Callable[[Any], Any]) -> None:
        """From here on, what data set and collate function keep in attributes is state, unless they have their own."""
        self._contents = contents.of_parts(collate, large=False)
        if not carried.is_stateful(self.dataset):
            self._contents.append(contents.Contents(self.dataset))

    def carriers(self, collate: Callable[[Any], Any]) -> list[carried.Carrier]:
        return carriers(self.dataset, carried.find(self.dataset, collate)) + self._contents

    @property
    def place(self) -> Place:
        return Place(self._last, self._over, self._given)

    def begin(self) -> None:
        """Begin a pass, as torch's fetcher does when it is made."""
        self._iterator = iter(self.dataset)
        self._begun, self._over, self._said = True, False, False
        self._last = self._state()
        self._given = ""

    def recall(self, place: Place, *, inside: bool) -> None:
        """Go to a place of an earlier process; random state is left to the caller.

        Args:
            inside: the next turn goes on there; else it begins a pass.

        Raises:
            RestoreError: the data set does not take its state.
        """
        if place.state:
            self._last = place.state
            self._load(pickle.loads(place.state))
            if place.over:  # what it does at its end is done now
                while next(self._iterator, _NOTHING) is not _NOTHING:
                    pass
        self._begun, self._over, self._said = inside, inside and place.over, False

    def _load(self, saved: dict[str, Any]) -> None:
        if saved["dataset"] is not None:
            self.dataset.load_state_dict(saved["dataset"])
        self._iterator = iter(self.dataset)
        if self._is(saved):
            return
        if saved["iterator"] is not None:
            self._iterator.load_state_dict(saved["iterator"])
        elif self._iterator is self.dataset:  # its iter() begins again
            self.dataset.load_state_dict(saved["dataset"])
        if not self._is(saved):
            raise RestoreError(
                f"the data set {type(self.dataset).__name__} did not go on where it was: after load_state_dict "
                "and iter() its state is not what was saved; its __iter__ must go on from the loaded state, or "
                "its iterator have state_dict and load_state_dict too"
            )

    def _is(self, saved: dict[str, Any]) -> bool:
        state = self._state()
        return bool(state) and fingerprint(pickle.loads(state)) == fingerprint(saved)

    def _state(self) -> bytes:
        states = {
            "dataset": self.dataset.state_dict() if carried.is_stateful(self.dataset) else None,
            "iterator": None,
        }
        if self._iterator is not self.dataset and carried.is_stateful(self._iterator):
            states["iterator"] = self._iterator.state_dict()
        return pickle.dumps(states, protocol=5) if any(v is not None for v in states.values()) else b""

    def __getitem__(self, turn: Any) -> Any:
        if isinstance(turn, EmptyTurn):
            return turn
        if turn.number != self._number:
            if not self._begun:
                self.begin()
            self._number, self._begun = turn.number, False
        items = _NOTHING if self._over else self._take()
        if items is _NOTHING:
            self._over, first, self._said = True, not self._said, True
            return End(first)
        if not self._over:
            self._last = self._state()
        if not self._last:
            digest = xxhash.xxh3_64(self._given.encode())
            _feed(digest, items)
            self._given = digest.hexdigest()
        return Repeated(items) if turn.repeated else items

    def _take(self) -> Any:
        """Return what torch's fetcher gives to the collate function."""
        if self._batch_size is None:
            return next(self._iterator, _NOTHING)
        items: list[Any] = []  # with next() alone, as torch does: iter() sets some iterators back
        while len(items) < self._batch_size and (item := next(self._iterator, _NOTHING)) is not _NOTHING:
            items.append(item)
        self._over = len(items) < self._batch_size
        return _NOTHING if not items or (self._over and self._drop_last) else items


def _feed(digest: Any, items: Any) -> None:
    """Add what is sure to be the same where the data repeats itself: not objects, nor paths of a job's own."""
    if isinstance(items, dict):
        _feed(digest, list(items.values()))
    elif isinstance(items, (list, tuple)):
        for item in items:
            _feed(digest, item)
    elif isinstance(items, bytes):
        digest.update(items)
    elif isinstance(items, str):
        digest.update(b"" if os.sep in items else items.encode(errors="surrogatepass"))
    elif (
        isinstance(items, (bool, int, float, complex, np.number))
        or (isinstance(items, np.ndarray) and not items.dtype.hasobject)
        or (type(items) is torch.Tensor and items.layout is torch.strided and not items.is_nested)
    ):
        digest.update(fingerprint(items).encode())
