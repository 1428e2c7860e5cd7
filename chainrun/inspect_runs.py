"""The commands that only look: status, logs, show. torch is imported for the inside of a checkpoint alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chainrun import journal
from chainrun.checkpoint.store import Committed, Store, flaw, read_committed
from chainrun.durations import format_duration
from chainrun.errors import EXIT_DONE, EXIT_FAILED, UsageError
from chainrun.lock import holder
from chainrun.rundir import RunDir, open_run, parse_checkpoint, read_json


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
    for job in reversed(jobs_of(run)):
        if job in queue:
            state, reason = queue[job]
            return state.lower(), f"job {job}" + (f" ({reason})" if reason not in ("None", "") else "")
    last = journal.last(run, "segment", "stop", "handoff") or {}
    if last.get("event") == "handoff" and last.get("refused"):
        return "stopped", last["refused"]
    return "stopped", "" if last else "not started"


def status(paths: list[Path]) -> int:
    """Print one line a run."""
    from chainrun.launch import slurm
    from chainrun.launch.submit import jobs_of

    runs = list(_runs(paths))
    open_jobs = [job for run in runs if not run.done.exists() for job in jobs_of(run)[-1:]]
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


def show(path: Path) -> int:
    """Print a run's story, or what a checkpoint holds."""
    path = path.absolute().resolve()
    if parse_checkpoint(path.name):
        return _show_checkpoint(read_committed(path))
    run = open_run(path)
    state, remark = _state(run, {})
    print(f"{run.path}: {state}{f' ({remark})' if remark else ''}")
    for event in journal.events(run):
        fields = {k: v for k, v in event.items() if k not in ("time", "event", "traceback") and v is not None}
        stamp = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
        print(f"{stamp}  {event['event']:<10}  " + "  ".join(f"{k}={v}" for k, v in fields.items()))
    for checkpoint in Store(run).committed():
        age = _age(time.time() - checkpoint.manifest["time"])
        print(f"checkpoint {checkpoint.path}  step {checkpoint.step}  {size(checkpoint.size)}  {age}")
    if run.done.exists():
        print(f"result: {read_json(run.result)}")
    return EXIT_DONE


def _show_checkpoint(checkpoint: Committed) -> int:
    from chainrun.checkpoint import image, sharded, state

    manifest = checkpoint.manifest
    print(f"{checkpoint.path}")
    for key in ("run", "step", "epoch", "segment", "reason", "world_size"):
        print(f"  {key:<12} {manifest[key]}")
    print(f"  {'written':<12} {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(manifest['time']))}")
    for key, value in manifest["environment"].items():
        print(f"  {key:<12} {value}")
    why = flaw(checkpoint)
    print(f"  {'verified':<12} {'yes, every file has its stated size and hash' if why is None else why}")
    if why is not None:
        return EXIT_FAILED
    for name, file in sorted(manifest["files"].items()):
        print(f"{name}  {size(file['size'])}")
        if name.startswith(sharded.FOLDER):
            continue
        tree = image.read(checkpoint.path / name)
        for kind in ("objects", "loaders"):
            for key, value in tree[kind].items():
                print(f"  {key:<12} {size(state.nbytes(value)):>8}  {_count(value)} tensors")
        print(f"  {'state':<12} {', '.join(map(str, tree['state'])) or '-'}")
        print(f"  {'random':<12} {', '.join(tree['rng'])}")
    return EXIT_DONE


def _count(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(_count(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(_count(value) for value in tree)
    return int(hasattr(tree, "nbytes"))
