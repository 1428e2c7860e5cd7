"""The sampler of a resumable loader: how far it was drawn, and drawing it again as far."""

from __future__ import annotations

import contextlib
import marshal
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, TypeAlias

import xxhash
from torch.utils.data import Sampler

from chainrun.errors import RegisterError, RestoreError
from chainrun.training import rng
from chainrun.training.worker import EmptyTurn, Numbered


class Drawn(NamedTuple):
    """How far a sampler was drawn."""

    handed_out: int
    drawn: int
    ended: bool
    digest: int


State: TypeAlias = "list[Any]"  # of this process: global streams, then what the loader's parts carry


class Owner(Protocol):
    """The loader that draws, as far as its sampler needs to know it."""

    name: str
    draws_late: bool

    @property
    def numbers(self) -> int | None:
        """The number of the running pass, where batches are seeded by their number."""

    def parent_state(self) -> State: ...

    def set_parent_state(self, state: State) -> None: ...

    def streams(self) -> rng.State: ...


class Again(NamedTuple):
    """What it takes to draw from a sampler as far as another process did."""

    how_far: Drawn
    first: State | None  # of the process, at the first draw
    turns: int  # empty turns to give first


class Alone:
    """Sees to it that what draws batch after batch can be repeated without what happens between the batches.

    Args:
        owner: whose streams are watched.
        what: what draws, for the refusal.
        remedy: what to do instead.
    """

    def __init__(self, owner: Owner, what: str, remedy: str) -> None:
        self._owner, self._what, self._remedy = owner, what, remedy
        self._first = self._replayed = owner.streams()  # as a repetition, with nothing between, has them

    def check(self, before: rng.State) -> None:
        """Compare with the streams before the draw.

        Raises:
            RegisterError: this and something else take turns in drawing from one stream.
        """
        after = self._owner.streams()
        for stream, state in before.items():
            if after.get(stream) == state:
                continue
            if self._replayed.get(stream, state) != state:
                raise RegisterError(
                    f"{self._what} draws from the stream '{stream}' batch after batch, and so does something else "
                    f"between two batches; a resume could not repeat its draws alone. {self._remedy}"
                )
            self._replayed = {**self._replayed, stream: after[stream]}

    def reached(self) -> dict[str, str]:
        """Return a fingerprint of every stream that it has drawn from."""
        return {
            name: xxhash.xxh3_64_hexdigest(state)
            for name, state in self._replayed.items()
            if self._first.get(name) != state
        }


class Stream:
    """One iteration over the sampler, counted; and repeated from a count."""

    def __init__(self, source: Iterator[Any], again: Again | None, owner: Owner) -> None:
        self._source, self._again, self._owner = source, again, owner
        self._queue: deque[Any] = deque()
        self._digest = xxhash.xxh3_64()
        self._alone: Alone | None = None
        self._given = 0
        self.first: State | None = None
        self.drawn, self.ended, self.stopped = 0, False, False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Any:
        if self._again:
            self.repeat()
        if not self._queue and (self.ended or self.stopped):
            raise StopIteration
        indices = self._queue.popleft() if self._queue else self._draw()
        self._given += 1
        numbers = self._owner.numbers
        return indices if numbers is None else Numbered(indices, numbers, self._given - 1)

    def _draw(self) -> Any:
        if self.first is None:
            self.first = self._owner.parent_state()
            if self._owner.draws_late:
                self._alone = Alone(
                    self._owner,
                    f"the sampler of the loader '{self._owner.name}'",
                    "Give the sampler a generator of its own, or let it draw everything when it begins",
                )
        before = self._owner.streams() if self._alone else {}
        try:
            indices = next(self._source)
        except StopIteration:
            self.ended = True
            raise
        finally:
            if self._alone:
                self._alone.check(before)
        self.drawn += 1
        self._digest.update(_bytes_of(indices))
        return indices

    def prime(self) -> None:
        """Draw the first indices now, as a loader with workers does."""
        with contextlib.suppress(StopIteration):
            self._queue.append(self._draw())

    def repeat(self) -> None:
        """Draw again what was drawn; queue what had not been handed out.

        The sampler may draw from a shared generator, also once more when it ends, so at every boundary it
        must have been asked exactly as often as in the uninterrupted run.
        """
        if self._again is None:
            return
        (again, first, turns), self._again = self._again, None
        self._queue.extend(EmptyTurn() for _ in range(turns))
        self._given = again.handed_out
        if first is not None:
            self._owner.set_parent_state(first)
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
                f"the sampler of the loader '{self._owner.name}' did not repeat the indices that it had given "
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


class Counted:
    """The sampler as torch's loader sees it."""

    def __init__(self, sampler: Any, owner: Owner) -> None:
        self.sampler, self._owner = sampler, owner
        self.stream = Stream(iter(()), None, owner)
        self.prepare(None, None)

    def prepare(self, again: Again | None, before_second: Callable[[], None] | None) -> None:
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
        if self._asked == 2 and self._owner.numbers is not None:
            return self.stream  # with workers or without, it begins once
        # iter() of the user's sampler runs here, as often as torch asks: eager ones draw in it
        self.stream = Stream(iter(self.sampler), self._again, self._owner)
        return self.stream

    def __len__(self) -> int:
        return len(self.sampler)


def samplers_in(*roots: Any) -> Iterator[Any]:
    """Yield the samplers, and those that they hold."""
    for root in roots:
        if root is not None:
            yield root
            inner = getattr(root, "__dict__", {}).values()
            yield from samplers_in(*(value for value in inner if isinstance(value, Sampler)))


def draws_at_first(sampler: Any) -> bool:
    """Whether it is known to draw from a generator when it begins, and at its end, only."""
    own = type(sampler).__module__.partition(".")[0] == "torch"
    return own and not getattr(sampler, "replacement", False)
