"""`chainrun show` of a run: its story, event by event. Never imports torch."""

from __future__ import annotations

import json
import time

from chainrun import journal
from chainrun.checkpoint.store import Store
from chainrun.durations import format_duration
from chainrun.errors import EXIT_DONE
from chainrun.launch.standing import Standing
from chainrun.rundir import RunDir, read_json


def _age(seconds: float) -> str:
    return format_duration(max(1, round(seconds))) + " ago"


def size(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def show(run: RunDir, *, as_json: bool) -> int:
    """Print a run's story."""
    now = Standing(run).state({})
    checkpoints = Store(run).committed()
    result = read_json(run.result) if run.done.exists() else None
    if as_json:
        kept = [{"path": str(one.path), "step": one.step, "size": one.size} for one in checkpoints]
        about = {"path": str(run.path), "state": now.word, "remark": now.remark or None, "result": result}
        print(json.dumps({**about, "events": list(journal.events(run)), "checkpoints": kept}, indent=1))
        return EXIT_DONE
    print(f"{run.path}: {now.word}{f' ({now.remark})' if now.remark else ''}")
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
