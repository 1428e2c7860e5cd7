"""`chainrun report`: what it tells of runs of every kind, and that no run breaks it.

The journals are written by the real recording functions, under a clock of the test's own.
"""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from chainrun.checkpoint.store import FORMAT, MANIFEST, seal
from chainrun import cli, experiment, journal
from chainrun.launch import submit
from chainrun.report import story
from chainrun.rundir import RunDir, append_lines

T0 = 1_780_000_000.0


class Written:
    """A run whose journal is written under a clock that the test moves."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str = "written", **keys) -> None:
        self.now = T0
        monkeypatch.setattr(journal, "time", SimpleNamespace(time=lambda: self.now))
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "train.py").write_text("def train(run, lr=0.1): ...\n")
        described = {"name": name, "function": "train.py:train", "dir": str(folder), **keys}
        self.run = RunDir(folder / name)
        submit.create(self.run, experiment.from_dict(described, folder))
        self.step = self.segments = self.starts = 0
        self.job = "0"
        self.lost: dict | None = None
        self.saved = 0

    def note(self, event: str, after: float = 0.0, **fields) -> Written:
        self.now += after
        journal.record(self.run, event, **fields)
        return self

    def submitted(self, job: str) -> Written:
        self.job, self.starts = job, 0
        return self.note("submitted", job=job)

    def begin(
        self, *, queue: float = 60.0, start: float = 20.0, restore: float = 10.0, trains: bool = True
    ) -> Written:
        """Let a job start, restore, and do its first step, which takes a second."""
        asked = self.now
        self.now += queue
        if self.lost is not None:
            self.note("lost", **self.lost)
            self.lost, self.step = None, self.saved
        granted, self.segments, resumed = self.now, self.segments + 1, self.step > 0
        name = f"step-{self.step:08d}" if resumed else None
        self.note("start", 2, job=self.job, restart=self.starts, nodes=["n1", "n2"], gpus=8)
        self.starts += 1
        about = {
            "segment": self.segments,
            "job": self.job,
            "restart": self.starts - 1,
            "host": "n1",
            "world_size": 8,
        }
        self.note(
            "segment", start - 2 + restore / 2, **about, resumed=resumed, step=self.step, checkpoint=name, seconds=restore / 2
        )  # fmt: skip
        if not trains:
            return self
        self.step += 1
        times = {"submitted": asked, "eligible": asked + queue / 2, "granted": granted}
        return self.note(
            "trains",
            restore / 2 + 1,
            segment=self.segments,
            step=self.step,
            seconds=1.0 if resumed else None,
            **times,
        )

    def train(self, steps: int, *, seconds: float = 1.0) -> Written:
        self.step += steps
        self.now += steps * seconds
        return self

    def save(self, reason: str = "periodic", *, seconds: float = 4.0, stall: float | None = 0.5) -> Written:
        self.saved = self.step
        about = {"path": f"step-{self.step:08d}", "bytes": 2_000_000_000, "seconds": seconds, "waited": 0.0}
        if stall is not None:
            about["stall"] = stall
        self._commit(self.run.checkpoint(self.step))
        return self.note("checkpoint", seconds, segment=self.segments, step=self.step, **about, reason=reason)

    def _commit(self, path: Path) -> None:
        """Make what is a checkpoint to whoever looks, and retire all but two."""
        path.mkdir()
        about = {"format": FORMAT, "step": self.step, "time": self.now, "files": {}, "world_size": 8}
        (path / MANIFEST).write_bytes(seal(about))
        for old in sorted(self.run.checkpoints.iterdir())[:-2]:
            shutil.rmtree(old)

    def stop(self, reason: str, *, unused: float | None = 30.0, **taken) -> Written:
        self.save(reason, stall=None)
        self.note("stop", 1, segment=self.segments, step=self.step, reason=reason, unused_seconds=unused)
        if taken:
            self.note("taken", 0.1, job=self.job, restart=self.starts - 1, **taken)
        return self

    def done(self) -> Written:
        self.save("end", stall=None).note("done", segment=self.segments, step=self.step)
        self.run.done.touch()
        return self

    def hand_over(self, how: str | None = "requeue", **fields) -> Written:
        return self.note("handoff", 0.5, how=how, **({"job": self.job} if how else {}), **fields)

    def lose(self, state: str, *, after: float = 100.0) -> Written:
        """Let the job be killed some seconds after what it did last; the next one to begin notices."""
        about = {"job": self.job, "restart": self.starts - 1, "segment": self.segments, "state": state}
        self.lost = {**about, "last_seen": self.now + after, "step": self.step + int(after)}
        self.now += after + 200
        return self

    def log(self, *lines: dict) -> Written:
        append_lines(self.run.metrics, list(lines))
        return self


def told(run: Written | RunDir, **keys) -> story.Story:
    found = run.run if isinstance(run, Written) else run
    return reading.tell(found, keys.pop("queue", {}), **keys)


def page_of(run: Written | RunDir, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command; return the page."""
    path = (run.run if isinstance(run, Written) else run).path
    assert cli.main(["report", str(path), "-o", str(tmp_path / "out.html")]) == 0
    assert capsys.readouterr().out.splitlines() == [str(tmp_path / "out.html"), str(tmp_path / "out.png")]
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    return (tmp_path / "out.html").read_text()


def long_chain(
    folder: Path, monkeypatch: pytest.MonkeyPatch, segments: int = 40, name: str = "long"
) -> Written:
    """Return a run of many segments of four hours that ended in every way."""
    draw = random.Random(3)
    run = Written(folder, monkeypatch, name, args={"lr": 3e-4}, slurm={"time": "4h"}).submitted("811")
    ends = ["walltime"] * 8 + ["preemption", "node", "walltime", "killed", "requeued"]
    for number in range(segments):
        queue = draw.choice([121, 300, 900, 4000, 9000])
        run.begin(queue=queue, start=draw.uniform(20, 60), restore=draw.uniform(20, 90))
        how = ends[number % len(ends)]
        for _ in range(draw.randint(3, 7) if how != "walltime" else 7):
            run.train(1800 + draw.randint(-20, 20)).save(seconds=12, stall=draw.uniform(0.2, 2))
        if number + 1 == segments:
            run.train(600).done()
        elif how == "walltime":
            run.train(900).stop("walltime", unused=draw.uniform(20, 90)).hand_over()
        elif how == "preemption":
            run.train(300).stop("terminated", unused=5000, state="PREEMPTED").hand_over()
        elif how == "requeued":
            run.train(300).stop("terminated", unused=7000, state="REQUEUED").hand_over("requeued by SLURM")
        else:
            run.lose("NODE_FAIL" if how == "node" else "OUT_OF_MEMORY", after=700)
        if number and how != "killed":
            about = {"rank": 0, "identical": True, "compared": ["state", "random streams", "next batch"]}
            run.note("witness", segment=run.segments, step=run.step, **about, differs=[])
    lines = [
        {
            "step": s,
            "loss": 4 * math.exp(-s / 60000) + 1.5 + draw.gauss(0, 0.15),
            "lr": 3e-4 * min(1, s / 4000),
        }
        for s in range(1, run.step, 20)
    ]
    lines += [
        {"step": s, "accuracy": 1 - math.exp(-s / 90000) + draw.gauss(0, 0.01)}
        for s in range(1000, run.step, 5000)
    ]
    return run.log(*lines)
