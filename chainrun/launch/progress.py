"""How a local chain shows itself: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from chainrun import journal, pace
from chainrun.lock import holder
from chainrun.rundir import RunDir

LINE_EVERY = 10.0  # seconds between two plain lines


class Progress:
    """Follows a run's journal and lock, and prints what is new."""

    def __init__(self, run: RunDir, *, quiet: bool) -> None:
        self._run, self._quiet = run, quiet
        self._journal = journal.Follower(run, skip=True)
        self._rate, self._segment = pace.Rate(), 0
        self._printed = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            form = "{bar:20} {desc}"
            self._bar = tqdm(total=1.0, desc="starting", bar_format=form, dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()

    def write(self, line: str) -> None:
        """Print one line above the bar."""
        if self._bar is not None:
            self._bar.write(f"chainrun: {line}", file=sys.stderr)
        else:
            print(f"chainrun: {line}", file=sys.stderr, flush=True)

    def update(self) -> None:
        """Print the events that are new, and where the training is."""
        if self._quiet:
            return
        for event in self._journal.new():
            line = journal.tell(event)
            if line:
                self.write(line)
        held = holder(self._run)
        if not held or "step" not in held or not held["alive"]:
            return
        if held["segment"] != self._segment:  # the time between two is not trained
            self._rate, self._segment = pace.Rate(), held["segment"]
        self._rate.note(held["time"], held["step"])
        text = f"segment {held['segment']}, {pace.line(held, self._rate.value)}"
        if self._bar is not None:
            self._bar.n = held["fraction"] or 0.0
            self._bar.set_description_str(text)
        elif time.monotonic() - self._printed >= LINE_EVERY:
            self._printed = time.monotonic()
            self.write(text)

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.n = 1.0
            self._bar.set_description_str("done", refresh=False)
            self._bar.refresh()
