"""How long `chainrun status` takes: a folder of runs as a month of training leaves them.

python benchmarks/status.py [RUNS] [SEGMENTS]    (100 runs of 40 segments)
"""

from __future__ import annotations

import json
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chainrun import experiment
from chainrun.checkpoint.store import seal
from chainrun.rundir import RunDir

SAVES = 16  # checkpoints of a segment: four hours, one every 15 minutes
STEPS = 500  # from one to the next


def make(folder: Path, number: int, segments: int) -> None:
    """Write a run directory: done, failed, running, halted or waiting in the queue, by its number."""
    keys = {
        "name": f"lr{number:03d}",
        "function": "train.py:train",
        "dir": str(folder),
        "args": {"lr": number / 1000},
    }
    described = experiment.from_dict(keys, folder)
    run = RunDir(described.run_dir).create()
    run.experiment.write_text(experiment.to_yaml(described))
    total = segments * SAVES * STEPS * 2
    at, step, job = time.time() - segments * 5 * 3600, 0, str(4_000_000 + number)
    lines: list[dict] = [
        {"time": at, "event": "created", "id": f"lr{number:03d}-0123abcd"},
        {"time": at, "event": "submitted", "job": job},
    ]
    for segment in range(1, segments + 1):
        at += 3600
        about = {"job": job, "restart": segment - 1}
        lines.append({"time": at, "event": "start", **about, "nodes": ["node017"], "gpus": 4})
        saved = f"step-{step:08d}" if step else None
        more = {"host": "node017", "world_size": 4, "resumed": bool(step), "step": step, "checkpoint": saved}
        lines.append({"time": at, "event": "segment", "segment": segment, **about, **more, "seconds": 1.9})
        compared = {"compared": ["state", "random streams", "next batch"], "differs": []}
        if step:
            for rank in range(4):
                who = {"segment": segment, "rank": rank, "step": step, "identical": True}
                lines.append({"time": at, "event": "witness", **who, **compared})
        for save in range(SAVES):
            at, step = at + 900, step + STEPS
            times = {"seconds": 2.413, "waited": 0.0, "stall": 0.217}
            what = {"segment": segment, "step": step, "path": f"step-{step:08d}", "bytes": 1_200_000_000}
            reason = "walltime" if save == SAVES - 1 else "periodic"
            lines.append({"time": at, "event": "checkpoint", **what, **times, "reason": reason})
        ends = {"segment": segment, "step": step}
        lines.append({"time": at, "event": "stop", **ends, "reason": "walltime", "unused_seconds": 21.4})
        lines.append({"time": at, "event": "handoff", "how": "requeue", "job": job})
    run.journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for newest in (step - STEPS, step):
        path = run.checkpoint(newest)
        path.mkdir()
        files = {f"rank-{rank:05d}.pt": {"size": 300_000_000, "xxh3_128": "0" * 32} for rank in range(4)}
        about = {
            "format": 2,
            "step": newest,
            "total": total,
            "fraction": newest / total,
            "time": at,
            "epoch": 3,
        }
        about |= {"world_size": 4, "environment": {f"fact {n}": "0" * 20 for n in range(15)}, "files": files}
        (path / "manifest.json").write_bytes(seal(about))
    kind = ("done", "failed", "running", "halted", "waits")[number % 5]
    if kind in ("done", "failed"):
        getattr(run, kind).write_bytes(b"")
    elif kind == "halted":
        run.halted.write_text(json.dumps({"why": "it has had 100 segments", "command": "chainrun submit"}))
    elif kind == "running":
        born = Path("/proc/1/stat").read_text().rpartition(")")[2].split()[19]
        holder = {"job": job, "restart": segments, "host": socket.gethostname(), "pid": 1, "born": born}
        place = {"segment": segments, "step": step + 10, "total": total, "fraction": 0.5, "epoch": 3}
        place |= {"metrics": {"loss": 0.123}, "left": 7000.0}
        run.lock.write_text(json.dumps({**holder, "time": time.time(), **place}))


def main(runs: int = 100, segments: int = 40, repeats: int = 7) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for number in range(runs):
            make(Path(folder), number, segments)
        size = sum(path.stat().st_size for path in Path(folder).glob("*/journal.jsonl"))
        print(f"{runs} runs of {segments} segments, {size / 1e6:.1f} MB of journals")
        for words in ("status", "status --json", "--help"):
            command = [sys.executable, "-m", "chainrun", *words.split()]
            command += [] if words == "--help" else [folder]
            seconds, processor = [], []
            for _ in range(repeats):
                began, used = time.perf_counter(), _used()
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
                seconds.append(time.perf_counter() - began)
                processor.append(_used() - used)
            wall, cpu = statistics.median(seconds), statistics.median(processor)
            print(
                f"chainrun {words}: {wall:.3f} s (fastest {min(seconds):.3f} s), of the processor {cpu:.3f} s"
            )


def _used() -> float:
    """Return the processor's seconds of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
