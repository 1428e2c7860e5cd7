"""The commands that only look at runs: status, logs, show. None imports torch."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from chainrun import journal
from chainrun.checkpoint.store import Store
from chainrun.durations import format_duration
from chainrun.errors import EXIT_DONE, UsageError
from chainrun.lock import holder
from chainrun.rundir import RunDir, open_run, read_json


def _runs(paths: list[Path]) -> Iterator[RunDir]:
    for path in paths:
        if (path / "experiment.yaml").is_file():
            yield open_run(path)
        elif path.is_dir():
            found = sorted(p.parent for p in path.glob("*/experiment.yaml"))
            if not found:
                raise UsageError(
                    f"there is no run in {path}; `chainrun run` and `submit` make one (dir: {path})"
                )
            yield from (open_run(p) for p in found)
        else:
            raise UsageError(f"{path} does not exist; give a run directory, or a folder that holds some")


def _age(seconds: float) -> str:
    return format_duration(max(1, round(seconds))) + " ago"


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _state(run: RunDir, queue: dict[str, tuple[str, str]]) -> tuple[str, str]:
    """Return a run's state and a remark."""
    from chainrun.launch import slurm
    from chainrun.launch.submit import jobs_of

    if run.done.exists():
        return "done", ""
    if run.failed.exists():
        return "failed", (journal.last(run, "failed") or {}).get("error", "").partition("\n")[0][:80]
    held = holder(run)
    if held and held["alive"]:
        return "running", f"job {held['job']} on {held['host']}"
    if run.stop.exists():
        return "cancelled", ""
    if run.halted.exists():
        halted = read_json(run.halted) or {}
        return "stopped", f"{halted.get('why')}; to go on: {halted.get('command')}"
    for job in jobs_of(run, recent=True):
        if job in queue:
            state, reason = queue[job]
            remark = slurm.held(job, state, reason)
            more = f" ({reason})" if reason not in ("None", "") else ""
            return ("held", remark) if remark else (state.lower(), f"job {job}{more}")
    last = journal.last(run, "segment", "stop", "handoff") or {}
    if last.get("event") == "handoff" and last.get("refused"):
        return "stopped", last["refused"]
    return "stopped", "" if last else "not started"


def status(paths: list[Path]) -> int:
    """Print one line a run."""
    from chainrun.launch import slurm
    from chainrun.launch.submit import jobs_of

    runs = list(_runs(paths))
    open_jobs = [job for run in runs if not run.done.exists() for job in jobs_of(run, recent=True)]
    queue = slurm.states(open_jobs)
    rows = [("run", "state", "step", "segments", "last checkpoint", "")]
    for run in runs:
        state, remark = _state(run, queue)
        held = holder(run) or {}
        newest = next(iter(Store(run).committed()), None)
        steps = max(held.get("step", 0), newest.step if newest else 0)
        fraction = 1.0 if state == "done" else held.get("fraction")
        shown = f"{steps}" + (f" ({fraction:.0%})" if fraction is not None else "")
        saved = "-"
        if newest is not None:
            saved = f"{size(newest.size)}, {_age(time.time() - newest.manifest['time'])}"
        segments = sum(1 for _ in journal.events(run, "segment"))
        rows.append((run.path.name, state, shown, str(segments), saved, remark))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    for row in rows:
        print(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]
            ).rstrip()
        )
    return EXIT_DONE


def logs(path: Path, rank: int, *, follow: bool) -> int:
    """Print one rank's output over all segments; with `follow`, until the run ends."""
    run = open_run(path)
    offsets: dict[Path, int] = {}
    seen = False
    while True:
        ended = run.done.exists() or run.failed.exists() or run.stop.exists()
        for log in run.logs(rank):
            with open(log, "rb") as file:
                file.seek(offsets.get(log, 0))
                data = file.read()
            if data:
                sys.stdout.buffer.write(data)
                sys.stdout.buffer.flush()
            offsets[log] = offsets.get(log, 0) + len(data)
            seen = True
        if not follow or ended:
            break
        time.sleep(0.5)
    if not seen:
        raise UsageError(
            f"{path} has no log of rank {rank} yet; its first job has not started, or has fewer ranks"
        )
    return EXIT_DONE


def show(run: RunDir, *, as_json: bool) -> int:
    """Print a run's story."""
    state, remark = _state(run, {})
    checkpoints = Store(run).committed()
    result = read_json(run.result) if run.done.exists() else None
    if as_json:
        kept = [{"path": str(one.path), "step": one.step, "size": one.size} for one in checkpoints]
        about = {"path": str(run.path), "state": state, "remark": remark or None, "result": result}
        print(json.dumps({**about, "events": list(journal.events(run)), "checkpoints": kept}, indent=1))
        return EXIT_DONE
    print(f"{run.path}: {state}{f' ({remark})' if remark else ''}")
    for event in journal.events(run):
        fields = {k: v for k, v in event.items() if k not in ("time", "event", "traceback") and v is not None}
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        print(f"{stamp}  {event['event']:<10}  " + "  ".join(f"{k}={v}" for k, v in fields.items()))
    for checkpoint in checkpoints:
        age = _age(time.time() - checkpoint.manifest["time"])
        print(f"checkpoint {checkpoint.path}  step {checkpoint.step}  {size(checkpoint.size)}  {age}")
    if run.done.exists():
        print(f"result: {result}")
    return EXIT_DONE
