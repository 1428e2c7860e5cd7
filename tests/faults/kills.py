"""Kill segments of one run at random instants, look at the run after each kill, then let it finish.

    python kills.py RUN KILLS SEED

torch is imported once; every segment is a fork of this process, in a process group of its own, so that it
starts within milliseconds and dies, with its loader's workers, by one SIGKILL. Prints one JSON line a segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch._dynamo  # noqa: F401 imported here so that no segment has to: optimizers do

import chainrun.training.run  # noqa: F401
from chainrun import journal
from chainrun.allocation import Allocation
from chainrun.checkpoint.store import Store, flaw
from chainrun.rundir import RunDir
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


def prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def start(run: RunDir, number: int) -> int:
    """Fork one segment; return its pid, which is its process group's too."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            log = os.open(run.jobs / f"{number:06d}_0_log.out", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            allocation = Allocation(scheduler="local", job=f"job{number}", restart=0)
            outcome = run_segment(run, allocation, Signals().install())
            os._exit(0 if outcome.kind == "done" else 1)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(2)
    with contextlib.suppress(PermissionError, ProcessLookupError):  # it was faster
        os.setpgid(pid, pid)
    return pid


def reap(group: int) -> int:
    """Wait for a segment and all its workers; return the segment's wait status."""
    found = os.waitpid(group, 0)[1]
    try:
        while True:
            os.waitpid(-group, 0)
    except ChildProcessError:
        return found


def look(run: RunDir, trace: Path) -> dict:
    """Return what the disk holds."""
    committed = Store(run).committed()
    lines = trace.read_text().splitlines() if trace.exists() else []
    return {
        "committed": [checkpoint.path.name for checkpoint in committed],
        "flaws": [why for checkpoint in committed if (why := flaw(checkpoint))],
        "step": committed[0].step if committed else 0,
        "done": json.loads(lines[-1])["step"] if lines else 0,
        "unfinished": [path.name for path in run.checkpoints.glob("*.tmp")],
        "segments": sum(1 for _ in journal.events(run, "segment")),
    }


def main(run: RunDir, trace: Path, kills: int, seed: int) -> None:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    chance = random.Random(seed)
    for number in range(kills + 1):
        pid = start(run, number)
        if number == kills:
            status = reap(pid)
            delay = None
        else:
            # half of them while a segment starts and restores, half while it trains and saves
            delay = chance.uniform(0.01, 0.3) if chance.random() < 0.5 else chance.uniform(0.3, 0.9)
            time.sleep(delay)
            os.killpg(pid, signal.SIGKILL)
            status = reap(pid)
        print(json.dumps({"delay": delay, "status": status, **look(run, trace)}), flush=True)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
