"""The same chain on this machine: every segment a fresh process group, with real signals.

Each segment is submitted afresh through submitit's local executor, which sends USR2 before a segment's end
and kills what is left at the end; its own restarts (six at most) are not used.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from chainrun import breakers, journal
from chainrun.checkpoint.store import Store
from chainrun.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE
from chainrun.experiment import Experiment
from chainrun.launch import notify
from chainrun.launch.job import LOCAL, Job
from chainrun.launch.progress import Progress
from chainrun.launch.standing import Standing
from chainrun.lock import holder
from chainrun.rundir import RunDir

_FOREVER = 10 * 365 * 24 * 3600.0
_ENDS = ("stop", "failed")
_GRACE = 20.0  # seconds for the other ranks to end after one has failed or was killed


class _Asked:
    """Notes that a person, or the system, wants the chain to end; counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.times += 1


@contextmanager
def _interruptible() -> Iterator[_Asked]:
    asked = _Asked()
    before = {s: signal.signal(s, asked) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def run_chain(
    run: RunDir,
    described: Experiment,
    interrupt_at: Sequence[int] = (),
    walltime: float | None = None,
    *,
    quiet: bool = False,
) -> int:
    """Carry a run to its end on this machine; return the exit code.

    Args:
        interrupt_at: global steps at which a segment ends as if its walltime had come.
        walltime: seconds that a segment may last, instead of the experiment's ``local.walltime``.
        quiet: print nothing but warnings and errors.
    """
    code = None
    with _interruptible() as asked:
        with Progress(run, quiet=quiet) as progress:
            while code is None:
                limit = walltime or described.local.walltime
                end = None if limit is None else time.time() + limit
                process = _start(run, described, interrupt_at, limit)
                code = _watch(run, described, process, asked, progress, end)
        if code != EXIT_USAGE:
            _tell(run)
    return code


def _tell(run: RunDir) -> None:
    """Let the experiment's ``notify`` know how the chain has ended."""
    if run.done.exists():
        notify.notify(run, "finished", journal.finished(run))
    elif run.failed.exists():
        notify.notify(run, "failed", (journal.last(run, "failed") or {}).get("error", "the run has failed"))
    else:
        state = Standing(run).state({})
        notify.notify(
            run, "stopped", f"{state.remark or state.word}; to go on: chainrun run {run.experiment}"
        )


def run_one(run: RunDir, described: Experiment, interrupt_at: Sequence[int], **more: Any) -> int:
    """Run one segment, quietly and without a walltime; return the exit code, 75 where it was cut.

    Args:
        more: further fields of `Allocation` that the segment is told of, as JSON.
    """
    with _interruptible() as asked, Progress(run, quiet=True) as progress:
        process = _start(run, described, interrupt_at, None, **more)
        code = _watch(run, described, process, asked, progress)
        return EXIT_STOPPED if code is None else code


def _start(
    run: RunDir, described: Experiment, interrupt_at: Sequence[int], walltime: float | None, **more: Any
) -> Any:
    """Start one segment; return the process that controls its ranks."""
    import submitit

    local = described.local
    segment = 1 + sum(1 for _ in journal.events(run, "segment"))
    limit = _FOREVER if walltime is None else math.ceil(walltime)
    lead = local.lead if isinstance(local.lead, float) else max(1.0, 0.25 * limit)
    executor = submitit.LocalExecutor(folder=run.jobs, max_num_timeout=1_000_000)
    executor.update_parameters(
        timeout_min=limit / 60 + 1e-6,  # submitit cuts it to whole seconds
        signal_delay_s=math.ceil(lead),
        tasks_per_node=local.tasks,
        visible_gpus=_gpus(),
        gpus_per_node=len(_gpus()),
    )
    told = {
        "segment": segment,
        "end": None if walltime is None else time.time() + walltime,
        "interrupt_at": list(interrupt_at),
        **more,
    }
    os.environ[LOCAL] = json.dumps(told)
    os.environ.setdefault("PYTHONHASHSEED", "0")
    # Ctrl-C reaches the whole process group: here it means "save and stop", so only we listen to it
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        job = executor.submit(Job(str(run.path)))
    finally:
        signal.signal(signal.SIGINT, handler)
        del os.environ[LOCAL]
    return job._process  # type: ignore[attr-defined]


def _gpus() -> list[int]:
    """Return the indices of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [int(index) for index in visible.split(",") if index.strip().isdigit()]
    return sorted(int(p.name[6:]) for p in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", p.name))


def _watch(
    run: RunDir,
    described: Experiment,
    process: Any,
    asked: _Asked,
    progress: Progress,
    end: float | None = None,
) -> int | None:
    """Wait for a segment's end; return the exit code, None where the next segment is to start.

    Args:
        end: when its walltime comes, in seconds since the epoch.
    """
    told, told_at = 0, 0.0
    followed = journal.Follower(run, skip=True)
    ends: list[dict[str, Any]] = []  # of this segment
    ranks: set[int] = set()
    lost_at: float | None = None
    while process.poll() is None:
        time.sleep(0.2)
        progress.update()
        now = time.monotonic()
        if asked.times > told:
            told = asked.times
            if told == 1:
                progress.write("saving a checkpoint, then stopping; once more to kill")
            else:
                _kill_tasks(process.pid)
        if told and now - told_at >= 1.0:
            # again and again, since a rank that is just starting may not hear the first; submitit's
            # controller passes it on to every rank
            told_at = now
            process.send_signal(signal.SIGTERM)
        alive = _tasks(process.pid)
        ranks |= alive
        ends += [event for event in followed.new() if event["event"] in _ENDS]
        failed = any(event["event"] == "failed" for event in ends)
        if lost_at is None and (failed or (alive and alive != ranks)):
            lost_at = now
        if lost_at is not None and now - lost_at > _GRACE:
            _kill_tasks(process.pid)  # ranks that wait for one that has failed, or was killed
    progress.update()
    if run.done.exists():
        progress.finish()
        return EXIT_DONE
    if run.failed.exists():
        print(f"chainrun: {run.failed.read_text().rstrip()}", file=sys.stderr)
        print(
            f"chainrun: the run {run.path} has failed; `chainrun logs {run.path}` shows all", file=sys.stderr
        )
        return EXIT_FAILED
    again = f"to go on: chainrun run {run.experiment}"
    ends += [event for event in followed.new() if event["event"] in _ENDS]
    event = ends[-1] if ends else None
    held = holder(run)
    if event is None and held and held["alive"]:
        progress.write(f"the run is being trained already, by process {held['pid']}; nothing was done")
        return EXIT_USAGE
    if event is None:
        newest = Store(run).latest()
        what = (
            f"the newest checkpoint is of step {newest.step}" if newest else "no checkpoint had been written"
        )
        how = "cancelled" if run.stop.exists() else "stopped" if asked.times else None
        if (
            how is None and end is not None and time.time() >= end
        ):  # submitit kills at the limit, and so does SLURM
            what += (
                "; its walltime came before a step boundary: call run.step() after every optimizer step and run.poll() "
                "in long evaluations, or give it more time (--walltime)"
            )
        progress.write(f"{how or 'the segment was killed'} before it could save; {what}; {again}")
        return EXIT_STOPPED if how and newest else EXIT_FAILED
    if asked.times or event.get("reason") in ("cancelled", "terminated"):
        progress.write(f"stopped at step {event['step']} with a checkpoint; {again}")
        return EXIT_STOPPED
    trip = breakers.tripped(run, described.chain)
    if trip is not None:
        journal.record(run, "handoff", how=None, refused=trip.why)
        progress.write(f"the chain stops here: {trip.why}; {again}{trip.options}")
        return EXIT_STOPPED
    journal.record(run, "handoff", how="local")
    return None


def _tasks(controller: int) -> set[int]:
    """Return the pids of the ranks that submitit's controller has started and not yet seen end."""
    try:
        return {
            int(pid) for pid in Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        }
    except OSError:
        return set()


def _kill_tasks(controller: int) -> None:
    """Kill the ranks; submitit's controller then ends by itself."""
    for pid in _tasks(controller):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
