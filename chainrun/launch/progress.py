"""How a local chain shows itself: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from tqdm import tqdm

from chainrun import journal
from chainrun.durations import format_duration
from chainrun.lock import holder
from chainrun.rundir import RunDir

LINE_EVERY = 10.0  # seconds between two plain lines


class Progress:
    """Follows a run's journal and lock, and prints what is new."""

    def __init__(self, run: RunDir, *, quiet: bool) -> None:
        self._run, self._quiet = run, quiet
        self._known = sum(1 for _ in journal.events(run))
        self._printed = time.monotonic()
        self._bar: Any = None
        if not quiet and sys.stderr.isatty():
            form = "{desc} {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}]{postfix}"
            self._bar = tqdm(total=1.0, desc="chainrun", bar_format=form)

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
        for event in list(journal.events(self._run))[self._known :]:
            self._known += 1
            line = _tell(event)
            if line:
                self.write(line)
        held = holder(self._run)
        if not held or "step" not in held or not held["alive"]:
            return
        fraction = held["fraction"]
        values = " ".join(f"{name} {value:.4g}" for name, value in held["metrics"].items())
        left = (
            "" if held["left"] is None else f", {format_duration(round(max(0.0, held['left'])))} to walltime"
        )
        text = f"segment {held['segment']}, step {held['step']}, epoch {held['epoch']}{left}  {values}"
        if self._bar is not None:
            if fraction is not None:
                self._bar.n = fraction
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._printed >= LINE_EVERY:
            self._printed = time.monotonic()
            self.write(text + ("" if fraction is None else f"  {fraction:.0%}"))

    def finish(self) -> None:
        if self._bar is not None:
            self._bar.n = 1.0
            self._bar.refresh()


def _tell(event: dict[str, Any]) -> str | None:
    kind = event["event"]
    if kind == "segment":
        how = (
            f"resumes at step {event['step']} from {event['checkpoint']}"
            if event["resumed"]
            else "fresh start"
        )
        return f"segment {event['segment']}: {how}"
    if kind == "stop":
        return f"segment {event['segment']} stops at step {event['step']}: {event['reason']}"
    if kind == "failed" and event["retry"]:
        return f"segment {event['segment']} failed at step {event['step']}, trying again: {event['error']}"
    if kind == "fallback":
        return f"checkpoint {event['path']} cannot be trusted: {event['reason']}"
    if kind == "drift":
        return f"warning: the environment has changed since the checkpoint: {'; '.join(event['changes'])}"
    if kind == "witness":
        return journal.witnessed(event)
    if kind == "space":
        removed = f"; removed {', '.join(event['removed'])} to make room" * bool(event["removed"])
        return f"warning: {event['reason']}{removed}"
    if kind == "unsaved":
        return f"no checkpoint at step {event['step']}: {event['reason']}"
    if kind == "deferred":
        return f"a stop or save at step {event['step']} waits: {event['reason']}"
    if kind == "warning":
        return f"warning: {event['reason']}"
    if kind == "done":
        return f"done after {event['step']} steps and {event['segment']} segments"
    return None
