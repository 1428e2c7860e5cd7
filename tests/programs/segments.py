"""Carry a run through segments of several ranks: python segments.py RUN SEGMENT...

A segment is ``RANKS:STEP``, cut at a step, or ``RANKS:``, to the end. torch is imported once; every rank is a
fork of this process. Prints how each rank of each segment ended, a JSON line a segment.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path

import torch._dynamo
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torch.distributed.tensor.parallel

import chainrun.training.run  # noqa: F401
from chainrun.allocation import Allocation
from chainrun.rundir import RunDir
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

KINDS = ["done", "stopped", "failed", "retry", "idle", "locked"]


def carry(run: RunDir, allocation: Allocation) -> None:
    """Be one rank; the exit status says how it ended."""
    try:
        log = os.open(run.jobs / f"{allocation.job}_{allocation.rank}_log.err", os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        torch.set_num_threads(1)
        os._exit(KINDS.index(run_segment(run, allocation, Signals().install()).kind))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def ended(pids: list[int]) -> list[str]:
    """Wait for the ranks; kill the others when one was killed, as a launcher does."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] == -signal.SIGKILL:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    return [KINDS[code] if 0 <= code < len(KINDS) else str(code) for code in map(codes.get, pids)]


def main(run: RunDir, segments: list[str]) -> None:
    for number, segment in enumerate(segments):
        ranks, _, step = segment.partition(":")
        pids = []
        for rank in range(int(ranks)):
            allocation = Allocation(
                scheduler="local",
                job=f"{os.getpid()}{number}",
                rank=rank,
                local_rank=rank,
                world_size=int(ranks),
                local_world_size=int(ranks),
                interrupt_at=frozenset([int(step)] if step else []),
            )
            pid = os.fork()
            if pid == 0:
                carry(run, allocation)
            pids.append(pid)
        print(json.dumps(ended(pids)), flush=True)


if __name__ == "__main__":
    main(RunDir(Path(sys.argv[1])), sys.argv[2:])
