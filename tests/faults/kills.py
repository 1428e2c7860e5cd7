"""Kill segments of one run at random instants, most of them in a save, look at the run after each kill, then let it finish.

    python kills.py RUN KILLS SEED RANKS

torch is imported once; every rank is a fork of this process, in a process group of its own, so that it starts within
milliseconds and dies, with its loader's workers, by one SIGKILL. Prints one JSON line a segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import signal
import statistics
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


def start(run: RunDir, number: int, rank: int, ranks: int, stop_at: int | None) -> int:
    """Fork one rank of a segment that stops at a step; return its pid, which is its process group's too."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setpgid(0, 0)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            log = os.open(run.jobs / f"{number:06d}_{rank}_log.out", os.O_WRONLY | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            allocation = Allocation(
                rank=rank,
                world_size=ranks,
                local_rank=rank,
                local_world_size=ranks,
                scheduler="local",
                job=f"job{number}",
                restart=0,
                interrupt_at=frozenset() if stop_at is None else frozenset({stop_at}),
            )
            outcome = run_segment(run, allocation, Signals().install())
            os._exit({"done": 0, "stopped": 75}.get(outcome.kind, 1))
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
    told = [event["path"] for event in journal.events(run, "checkpoint")]
    return {
        "committed": [checkpoint.path.name for checkpoint in committed],
        "flaws": [why for checkpoint in committed if (why := flaw(checkpoint))],
        "step": committed[0].step if committed else 0,
        "told": told[-2:],
        "done": json.loads(lines[-1])["step"] if lines else 0,
        "unfinished": {
            path.name: sorted(file.name for file in path.iterdir()) for path in run.checkpoints.glob("*.tmp")
        },
        "segments": sum(1 for _ in journal.events(run, "segment")),
        "failed": run.failed.exists(),
    }


def await_save(run: RunDir, journal_size: int, newest: int, skip: int, seconds: float) -> None:
    """Come back when a segment that was just started has begun a save, after it has begun `skip` others."""
    until = time.monotonic() + seconds
    seen: set[str] = set()
    while time.monotonic() < until and len(seen) <= skip:
        time.sleep(0.0005)
        with open(run.journal, "rb") as file:
            file.seek(journal_size)
            if b'"event": "segment"' not in file.read():
                continue  # what unfinished saves are there are those of the segment before
        names = [name for name in os.listdir(run.checkpoints) if name.endswith(".tmp")]
        seen |= {name for name in names if int(name[5:13]) > newest}


def save_seconds(run: RunDir) -> float:
    """Return how long saves take, as far as known."""
    times = [event["seconds"] for event in journal.events(run, "checkpoint")][-20:]
    return statistics.median(times) if times else 0.05


def main(run: RunDir, trace: Path, kills: int, seed: int, ranks: int) -> None:
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    chance = random.Random(seed)
    newest = 0
    for number in range(kills + 1):
        aim = (
            chance.choices(("start", "training", "save", "last save"), (1, 1, 3, 3))[0]
            if number < kills
            else None
        )
        stop_at = newest + chance.randint(1, 7) if aim == "last save" else None
        journal_size = run.journal.stat().st_size
        pids = [start(run, number, rank, ranks, stop_at) for rank in range(ranks)]
        delay = None
        if aim is not None:
            if aim == "start":
                delay = chance.uniform(0.01, 0.3)
            elif aim == "training":
                delay = chance.uniform(0.3, 0.9)
            else:
                await_save(run, journal_size, newest, chance.choice((0, 0, 1)) if aim == "save" else 0, 3.0)
                delay = chance.uniform(0.0, 1.2) * save_seconds(run)
            time.sleep(delay)
            chance.shuffle(pids)
            alone = chance.choice((0.0, 0.05, 0.3))  # seconds that the other ranks live on
            for pid in pids:
                os.killpg(pid, signal.SIGKILL)
                time.sleep(alone if pid != pids[-1] else 0)
        statuses = [reap(pid) for pid in pids]
        found = look(run, trace)
        print(
            json.dumps({"aim": aim, "delay": delay, "statuses": statuses, "stop_at": stop_at, **found}),
            flush=True,
        )
        newest = found["step"]


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])), Path(sys.argv[2]), *map(int, sys.argv[3:]))
