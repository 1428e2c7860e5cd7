"""When a segment saves and when it ends: signals, the clock, and one decision for all ranks.

Signal handlers set a flag. A side thread, the `Watch`, looks at the flags, at the job's end and at the
``STOP`` file, and raises `Watch.pending`; the training loop reads that at every boundary. Nothing else
happens on the training path.
"""

from __future__ import annotations

import atexit
import multiprocessing.util
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

from chainrun.training.rhythm import Pace

TICK = 0.1  # seconds between two looks of the watch
REREAD_END = 60.0  # seconds between two questions for the job's end: limits are changed while jobs run
ASK_AGAIN = 2.0  # seconds for which an answer holds when the end seems to have come
SOON = 1.0  # seconds, generously, that all ranks need to settle on a boundary
FAR = 90.0  # a warning signal that comes this long before the job's end is not the walltime's


class Signals:
    """Notes the scheduler's signals, in the process that installed it only."""

    def __init__(self) -> None:
        self.warned = False
        self.terminated = False
        self._pid = os.getpid()

    def install(self) -> Signals:
        """Take USR2 (walltime, preemption) and TERM (preemption, cancel) over from whoever had them."""
        signal.signal(signal.SIGUSR2, self._note)
        signal.signal(signal.SIGTERM, self._note)
        return self

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a forked child inherits the handler, not the decision
        if signum == signal.SIGTERM:
            self.terminated = True
        else:
            self.warned = True


def kill(workers: list[Any]) -> None:
    """End loader workers that may hang: they ignore the signal with which torch and multiprocessing end them."""
    if not workers or threading.current_thread() is not threading.main_thread():
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's raises an error for a killed worker
    try:
        for worker in workers:
            worker.kill()
        for worker in workers:
            worker.join()
    finally:
        signal.signal(signal.SIGCHLD, handler)


_workers: weakref.WeakSet[Any] = weakref.WeakSet()


def end_with(iterator: Any) -> None:
    """Have the workers of torch's iterator ended where torch itself does not get that far.

    One that a variable holds to the last is never told to end them. One that is collected from a cycle, as of an
    exception and its traceback, has lost the threads that would tell them, and waits 5 seconds for each in vain.
    """
    workers = list(getattr(iterator, "_workers", ()))
    _workers.update(workers)
    weakref.finalize(iterator, _kill_living, workers).atexit = False


def _kill_living(workers: Iterable[Any]) -> None:
    mine = [
        worker for worker in workers if worker._parent_pid == os.getpid()
    ]  # not those of a forked child's parent
    kill([worker for worker in mine if worker.is_alive()])


# before what multiprocessing has registered, which sends its children a signal that they ignore and waits for them
assert multiprocessing.util
atexit.register(_kill_living, _workers)


@dataclass(frozen=True)
class Lead:
    """How many seconds before the job's end a segment stops, and what they are for; in seconds."""

    seconds: float
    gap: float = 0.0
    """For what may come before the next boundary; 0, as the others, where the experiment says how many in all."""
    save: float = 0.0
    """For the checkpoint."""
    margin: float = 0.0
    """For the handoff, and for what nobody foresees."""
    most: float = 0.0
    """Not more than so many, a quarter of the job's time."""

    def __str__(self) -> str:
        if not self.margin:
            return f"{self.seconds:.3g} s before the end, as configured"
        parts = f"{self.gap:.3g} s for what comes before the next boundary, {self.save:.3g} s to save, {self.margin:.3g} s of margin"
        cut = ", but at most a quarter of the job" if self.most == self.seconds else ""
        return f"{self.seconds:.3g} s before the end: {parts}{cut}"


@dataclass(frozen=True)
class Wish:
    """What is to happen at a boundary, and why."""

    kind: Literal["save", "stop"]
    reason: str
    lead: dict[str, float] = field(default_factory=dict)
    """Of the walltime: the fields of `Lead`."""


class SegmentEnd(BaseException):
    """Unwinds the user's function at the boundary that ends the segment.

    Not an `Exception`, so that ``except Exception`` in a training loop does not swallow it.
    """

    def __init__(self, wish: Wish) -> None:
        super().__init__(f"the segment ends: {wish.reason}")
        self.wish = wish


class Agreement(Protocol):
    """Lets the side threads of all ranks settle on one boundary."""

    def answer(self) -> None: ...

    def ask(self, round_: int, wish: Wish) -> None: ...

    def announced(self, round_: int) -> Wish | None: ...

    def post(self, round_: int, boundary: int) -> None: ...

    def posted(self, round_: int) -> int | None: ...


class Watch:
    """The side thread of one rank.

    Args:
        signals: the flags of this process.
        end: asks for the job's end in seconds since the epoch.
        stop_file: its presence is a person's cancel.
        every: seconds between two periodic saves, None for none.
        lead: seconds before the job's end at which to stop, None to work it out from the pace.
        passed: the number of boundaries this rank has passed.
        step: the present global step.
        saving: whether a save is under way.
        beat: called about once a second, with a wish's kind or None.
        agreement: None for a single rank.
        wall, monotonic: the clocks.
    """

    def __init__(
        self,
        *,
        signals: Signals,
        end: Callable[[], float | None],
        stop_file: Path,
        every: float | None,
        lead: float | None,
        passed: Callable[[], int],
        step: Callable[[], int],
        first_save: Callable[[], float],
        saving: Callable[[], bool],
        beat: Callable[[], None],
        agreement: Agreement | None,
        leads: bool,
        pace: Pace,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.pending = False
        """Something is due: the loop must call `decide` at its next boundary."""
        self.pace = pace
        self._signals, self._end_of_job, self._stop_file = signals, end, stop_file
        self._every, self._lead, self._first_save = every, lead, first_save
        self._passed, self._step = passed, step
        self._saving, self._beat, self._agreement, self._leads = saving, beat, agreement, leads
        self._wall, self._monotonic = wall, monotonic
        self._over = threading.Event()
        self._decided = threading.Event()
        self._wish: Wish | None = None
        self._at = 0
        self._round = 0
        self._asked = False
        self._thread: threading.Thread | None = None
        now = monotonic()
        self._began = self._last_save = self._moved = self._beaten = now
        self._seen = self._seen_step = 0
        self._end: float | None = None  # on the monotonic clock, which does not jump
        self._said: float | None = None  # the same in seconds since the epoch, as it was answered
        self._end_read = -REREAD_END
        self._stop_looked = 0.0
        self._warned = False

    def start(self) -> None:
        self._read_end()
        self._thread = threading.Thread(target=self._run, name="chainrun-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join(timeout=2)  # it may wait for an answer of SLURM's; it is a daemon

    # ---- the training thread -------------------------------------------------------------------

    def decide(self, boundary: int) -> Wish | None:
        """Return what is due at this boundary; may wait for the other ranks' side threads."""
        if self._agreement is not None:
            self._decided.wait()
            if boundary < self._at:
                return None
        wish = self._wish
        self._decided.clear()
        self._wish, self._asked = None, False
        self._round += 1
        self.pending = False
        return wish

    def saved(self) -> None:
        """The training goes on after a save; the time it took is no gap between two boundaries."""
        self._last_save = self._moved = self._monotonic()

    def time_left(self) -> float:
        """Seconds until the job is killed; infinite where it has no limit."""
        return float("inf") if self._end is None else self._end - self._monotonic()

    def lead(self) -> Lead:
        """Return how many seconds before the job's end the segment stops, and why so many."""
        if self._lead is not None:
            return Lead(self._lead)
        limit = float("inf") if self._end is None else self._end - self._began
        margin = min(15.0, max(1.0, 0.02 * limit))
        gap = 1.1 * self.pace.gap(self._step(), SOON)
        save = 1.5 * (self.pace.save_seconds or self._first_save())
        most = max(0.25 * limit, margin)
        return Lead(min(gap + save + margin, most), gap, save, margin, most)

    # ---- the side thread -----------------------------------------------------------------------

    def _run(self) -> None:
        while not self._over.wait(TICK):
            self._observe()
            wish = self._local_wish()
            if self._agreement is None:
                if wish and not self.pending:
                    self._wish = wish
                    self.pending = True
            else:
                self._agreement.answer()
                self._settle(self._agreement, wish)

    def _observe(self) -> None:
        now = self._monotonic()
        warned = self._signals.warned and not self._warned
        due = (
            self.time_left() <= self.lead().seconds and now - self._end_read >= ASK_AGAIN
        )  # it may have been put off
        if warned or due or now - self._end_read >= REREAD_END:
            self._warned = self._signals.warned
            self._read_end()
            if (
                warned and self.time_left() <= FAR + self.lead().seconds
            ):  # the walltime's: from here on the clock decides
                self._signals.warned = self._warned = False
        passed = self._passed()
        if passed != self._seen:
            if self._seen:  # what comes before the first boundary is warm-up, not a gap
                self.pace.note_gap(now - self._moved, passed - self._seen, self._seen_step)
            self._seen, self._moved, self._seen_step = passed, now, self._step()
        if now - self._beaten >= 1.0:
            self._beaten = now
            self._beat()

    def _read_end(self) -> None:
        now = self._monotonic()
        self._end_read = now
        end = self._end_of_job()
        if end is not None and end == self._said:
            return  # whatever the wall clock has done since
        self._said = end
        self._end = None if end is None else now + (end - self._wall())

    def _local_wish(self) -> Wish | None:
        now = self._monotonic()
        if self._signals.terminated:
            return Wish("stop", "terminated")
        if now - self._stop_looked >= 1.0:
            self._stop_looked = now
            if self._stop_file.exists():
                return Wish("stop", "cancelled")
        lead = self.lead()
        if self.time_left() <= lead.seconds:
            return Wish("stop", "walltime", asdict(lead))
        if self._signals.warned and self._warned:  # not the walltime's
            return Wish("stop", "signal")
        due = self._leads and self._every is not None and now - self._last_save >= self._every
        if due and not self._saving():  # the one under way is on rank 0 until every rank is done
            return Wish("save", "periodic")
        return None

    def _settle(self, agreement: Agreement, wish: Wish | None) -> None:
        """One look at the round of the agreement that is under way.

        Every rank raises `pending` before it posts the boundaries it has passed, so the boundary settled
        on, one after the furthest, is one that every rank will still come to.
        """
        if self._decided.is_set():
            return
        if wish and not self._asked:
            self._asked = True
            agreement.ask(self._round, wish)
        if self._wish is None:
            announced = agreement.announced(self._round)
            if announced is None:
                return
            self.pending = True
            self._wish = announced
            agreement.post(self._round, self._passed())
        furthest = agreement.posted(self._round)
        if furthest is not None:
            self._at = furthest + 1
            self._decided.set()


def alone(beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Return the arguments of a `Watch` that only a cancel can wake: for a `Run` made by hand."""
    return {
        "signals": Signals(),
        "end": lambda: None,
        "every": None,
        "lead": None,
        "beat": beat,
        "agreement": None,
        "leads": True,
        "pace": Pace(),
    }
