"""Many chains of one example, every segment a process of its own, in the time of one `import torch`.

    python sweep.py FOLDER EXAMPLE '{"workers": 2}' '{"cut-3": {"cuts": [3]}, "whole": {}}'

A chain is described by the steps of its ``cuts``, and for a crash by ``save_every`` and ``kill_at``, a step at
which its first segment kills itself. Its folder, FOLDER/NAME, gets the trace, what was printed in ``log``, and
the run directory in ``run``. Segments are forked from this process, which never computes.
"""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._dynamo  # torch's optimizers import it when they are first used: here once for all segments
import traced

from chainrun.allocation import Allocation
from chainrun.training.run import Run
from chainrun.training.saving import Setting
from chainrun.training.stop import SegmentEnd

DONE, CUT, FAILED, MOST = 0, 75, 1, 50


def fork(work: Callable[[], int]) -> int:
    """Start a process that does the work and exits with what it returns; return its id."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = FAILED
    try:
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def segment(folder: Path, example: str, args: dict[str, Any], described: dict[str, Any]) -> int:
    """Carry a chain on to its next cut or its end, as `chainrun.segment` does."""
    run = Run(
        folder / "run",
        setting=Setting(
            allocation=Allocation(interrupt_at=frozenset(described.get("cuts", ()))),
            save_every_steps=described.get("save_every"),
            say=lambda line: print(f"{folder.name}: {line}", flush=True),
        ),
    )
    if "kill_at" in described and not run.resumed:
        run.step = killing(run, run.step, described["kill_at"])  # type: ignore[method-assign]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    run._start()
    try:
        run._finish(traced.train(run, example, str(folder), **args))
    except SegmentEnd:
        return CUT
    finally:
        run._close()
    return DONE


def killing(run: Run, step: Callable[..., None], kill_at: int) -> Callable[..., None]:
    """Return a `run.step` during which the machine fails."""

    def step_or_die(**metrics: Any) -> None:
        step(**metrics)
        if run.global_step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    return step_or_die


def chain(folder: Path, example: str, args: dict[str, Any], described: dict[str, Any]) -> int:
    """Run segments until one is done; what they print goes to ``log`` in the chain's folder."""
    folder.mkdir()
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for _ in range(MOST):
        child = fork(partial(segment, folder, example, args, described))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code in (DONE, FAILED):
            return code
    print(f"not done after {MOST} segments")
    return FAILED


def main() -> int:
    """Run all chains, as many at once as there are processors; return 0 if all of them were done."""
    folder, example = Path(sys.argv[1]), sys.argv[2]
    args, chains = json.loads(sys.argv[3]), json.loads(sys.argv[4])
    torch.set_num_threads(1)
    traced.load(traced.EXAMPLES / f"{example}.py", f"example_{example}")
    gc.freeze()  # spares every segment a collection of all that was imported
    waiting, running, failed = list(chains), {}, []
    while waiting or running:
        if waiting and len(running) < len(os.sched_getaffinity(0)):
            name = waiting.pop(0)
            running[fork(partial(chain, folder / name, example, args, chains[name]))] = name
        else:
            child, status = os.wait()
            name = running.pop(child)
            if status:
                failed.append(name)
                print(f"---- {name} failed:\n{(folder / name / 'log').read_text()}")
    return FAILED if failed else DONE


if __name__ == "__main__":
    sys.exit(main())
