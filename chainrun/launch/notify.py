"""The experiment's ``notify``: a command of the user's, run once when the chain has ended.

Whoever sees the end first claims it, with a file that only one process can make: the ranks of a segment that failed,
the job that stops the chain, `chainrun run`, `chainrun cancel`. The others wait for the claimant's command: where one
rank of a SLURM step leaves, SLURM ends the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from typing import Literal

from chainrun import experiment, journal
from chainrun.checkpoint.store import Store
from chainrun.errors import ChainrunError
from chainrun.rundir import RunDir
from chainrun.segment import say

TIMEOUT = 30.0  # seconds that the command may take


def notify(
    run: RunDir, event: Literal["finished", "failed", "stopped"], message: str, step: int | None = None
) -> None:
    """Run the experiment's ``notify``, unless that was done for this end of the chain; never raises for what it does.

    Args:
        event: how the chain ended.
        message: why, in a line.
        step: at which optimization step; that of the newest checkpoint by default.
    """
    try:
        described = experiment.load(run.experiment)
        if described.notify is None or not _claim(run):
            return
        began = time.monotonic()
        if step is None:
            newest = Store(run).latest()
            step = newest.step if newest else 0
        told = {
            "CHAINRUN_EVENT": event,
            "CHAINRUN_RUN": str(run.path),
            "CHAINRUN_NAME": described.name,
            "CHAINRUN_MESSAGE": message.partition("\n")[0],
            "CHAINRUN_STEP": str(step),
        }
        problem = _run(described.notify, told)
        with contextlib.suppress(OSError):
            run.notified.write_text(json.dumps({"of": event}))  # whoever waits for it may go
        if problem:
            say(f"warning: notify was told that the chain has {event}, and {problem}: {described.notify}")
        seconds = round(time.monotonic() - began, 3)
        journal.record(run, "notified", of=event, seconds=seconds, problem=problem)
    except (
        OSError,
        ChainrunError,
    ) as error:  # a full disk, a run directory that is gone: the chain has ended anyway
        say(f"warning: notify could not be run: {error}")


def _claim(run: RunDir) -> bool:
    """Return whether this process is the one to tell; if not, wait for the one that is."""
    try:
        os.close(os.open(run.notified, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    except FileExistsError:
        with contextlib.suppress(FileNotFoundError):
            while (
                run.notified.stat().st_size == 0 and time.time() - run.notified.stat().st_mtime < TIMEOUT + 5
            ):
                time.sleep(0.1)
        return False
    return True


def _run(command: str, told: dict[str, str]) -> str | None:
    """Run a shell command; return what went wrong, in words that follow its subject."""
    # in a group of its own: all that it has started is killed with it
    process = subprocess.Popen(
        ["/bin/sh", "-c", command],
        env={**os.environ, **told},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        code = process.wait(TIMEOUT)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"did not end within {TIMEOUT:.0f} s"
    return f"ended with exit code {code}" if code else None
