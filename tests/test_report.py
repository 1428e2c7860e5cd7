"""`chainrun report`: what it tells of runs of every kind, and that no run breaks it.

The journals are written by the real recording functions, under a clock of the test's own.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from chainrun import cli, experiment, journal, report
from chainrun.allocation import Allocation
from chainrun.checkpoint.store import FORMAT, MANIFEST, seal
from chainrun.launch import ends, slurm, submit
from chainrun.lock import Lock
from chainrun.report import curves, look, page, reading, story
from chainrun.rundir import RunDir, append_lines
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

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


def words_of(run: Written) -> str:
    """Return the page without its figures, which take most of the time."""
    return page.run_page(told(run), curves.read(run.run), "", "", "")


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


def rows(html: str, heading: str) -> list[list[str]]:
    """Return the cells' texts of the first table below a heading of a page."""
    part = html.partition(f"<h2>{heading}</h2>")[2].partition("<h2>")[0].partition("</table>")[0]
    found = []
    for row in re.findall(r"<tr>(.*?)</tr>", part, re.DOTALL):
        cells = re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row, re.DOTALL)
        found.append([re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", cell)).strip() for cell in cells])
    return found


class Balanced(HTMLParser):
    """Checks that every element is closed where it should be, and that nothing is loaded from elsewhere."""

    VOID = ("meta", "br")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert name not in ("script", "link", "img", "iframe", "b" * 2)
        assert not any(key.startswith("on") for key in given)
        for key in ("src", "href", "xlink:href"):
            assert "//" not in (given.get(key) or "")
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def check(html: str) -> None:
    """Check that a page is whole and loads nothing."""
    parser = Balanced()
    parser.feed(html)
    assert parser.open == []
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(svg)


ENDINGS = [
    ("walltime", lambda r: r.stop("walltime").hand_over(), "walltime"),
    ("preempted, saved", lambda r: r.stop("walltime", state="PREEMPTED").hand_over(), "preemption"),
    ("preempted by SIGTERM", lambda r: r.stop("terminated", state="PREEMPTED").hand_over(), "preemption"),
    ("preempted, killed", lambda r: r.lose("PREEMPTED"), "preemption"),
    ("node failed", lambda r: r.lose("NODE_FAIL"), "node failure"),
    (
        "node failed, saved",
        lambda r: r.stop("terminated", state="NODE_FAIL").hand_over("requeued by SLURM"),
        "node failure",
    ),
    ("scontrol requeue", lambda r: r.stop("terminated").hand_over("requeued by SLURM"), "requeued"),
    ("scontrol requeue, killed", lambda r: r.lose("REQUEUED"), "requeued"),
    ("limit, killed", lambda r: r.lose("TIMEOUT"), "walltime, killed"),
    ("memory", lambda r: r.lose("OUT_OF_MEMORY"), "out of memory"),
    ("killed", lambda r: r.lose(""), "killed"),
    (
        "scancel",
        lambda r: r.stop("terminated").hand_over(None, refused="the job was cancelled with scancel"),
        "cancelled",
    ),
    ("chainrun cancel", lambda r: r.note("cancel").stop("cancelled"), "cancelled"),
    ("--interrupt-at", lambda r: r.stop("interrupt"), "interrupted"),
    ("USR2 by hand", lambda r: r.stop("signal").hand_over(), "warned"),
    (
        "crash",
        lambda r: r.note("failed", segment=1, rank=0, node="n1", step=9, error="ValueError: x", retry=True),
        "crash",
    ),
]


@pytest.mark.parametrize(("write", "label"), [end[1:] for end in ENDINGS], ids=[end[0] for end in ENDINGS])
def test_each_end_is_shown_for_what_it_was(tmp_path, monkeypatch, write, label):
    """The row of a segment says how it ended, and the next segment's that it is done."""
    run = Written(tmp_path / "runs", monkeypatch).submitted("7").begin().train(50).save().train(5)
    write(run)
    run.begin().train(10).done()
    html = words_of(run)
    check(html)
    found = [row[1] for row in rows(html, "Segments")[1:]]
    assert found[0].startswith(label), found
    assert found[1] == "done"
    assert f"{label}, done." in html


def test_the_time_with_nodes_is_all_accounted_for(tmp_path, monkeypatch):
    """Phases follow each other without gap or overlap, and add up to the waits and the time with nodes."""
    for segment in told(long_chain(tmp_path, monkeypatch, 26)).segments:
        phases = segment.phases()
        assert phases[0][1] == segment.asked
        assert phases[-1][2] == segment.ended
        assert all(before[2] == after[1] for before, after in itertools.pairwise(phases))
        assert all(begin < end for _, begin, end in phases)
        waits = sum(segment.seconds(phase) for phase in story.WAITS)
        assert math.isclose(waits, segment.began - segment.asked, abs_tol=1e-3)
        known = sum(segment.seconds(phase) for phase in story.PHASES)
        assert math.isclose(known, waits + segment.allocated, abs_tol=1e-3)


def test_a_handoff_costs_what_passes_from_the_last_step_to_the_next(tmp_path, monkeypatch):
    """The parts of a handoff are those that the clock saw: save, hand over, hold, queue, start, restore, first step."""
    run = (
        Written(tmp_path, monkeypatch)
        .submitted("7")
        .begin()
        .train(100)
        .stop("walltime", unused=12.5)
        .hand_over()
    )
    run.begin(queue=200, start=30, restore=20).train(10).done()
    found = told(run)
    (handoff,) = found.handoffs()
    expected = {"save": 4, "handoff": 1.5, "hold": 100, "queue": 100, "start": 30, "restore": 20, "train": 1}
    assert {phase: round(seconds, 2) for phase, seconds in handoff.parts.items()} == expected
    assert math.isclose(handoff.seconds, sum(expected.values()), abs_tol=0.01)
    assert found.segments[0].unused == 12.5
    assert found.segments[0].lost_steps == 0
    assert found.cuts == [(101, found.segments[0])]


def test_lost_work_is_what_the_next_segment_does_again(tmp_path, monkeypatch):
    """Of a killed segment counts what its last checkpoint holds; steps and seconds after that are lost, and no goodput."""
    run = Written(tmp_path, monkeypatch).submitted("7").begin().train(99).save(stall=0.0).train(30)
    run.lose("NODE_FAIL", after=50).begin()
    run.train(9).done()
    first, second = told(run).segments
    assert (first.to_step, second.from_step, first.lost_steps, second.lost_steps) == (180, 100, 80, 0)
    assert math.isclose(first.seconds("train"), 99, abs_tol=0.01)  # a fresh start's first step is set-up, too
    assert math.isclose(first.seconds("lost"), 4 + 80, abs_tol=0.01)
    assert math.isclose(first.allocated, 31 + 99 + 4 + 80, abs_tol=0.01)
    assert math.isclose(told(run).goodput or 0, 109 / (first.allocated + second.allocated), rel_tol=0.01)
    assert math.isclose(told(run).node_hours, 2 * told(run).allocated / 3600)
    assert math.isclose(told(run).gpu_hours, 8 * told(run).allocated / 3600)


def test_a_checkpoint_that_was_not_trusted_costs_its_steps(tmp_path, monkeypatch):
    """Where a later segment goes back behind a checkpoint, what was trained for that one is lost."""
    run = (
        Written(tmp_path, monkeypatch)
        .submitted("7")
        .begin()
        .train(49)
        .save(stall=0.0)
        .train(50)
        .stop("walltime")
    )
    run.hand_over()
    run.step = 50
    run.begin().train(60).done()
    found = told(run)
    assert found.segments[0].lost_steps == 50
    assert math.isclose(found.segments[0].seconds("train"), 49, abs_tol=0.01)
    assert found.segments[1].lost_steps == 0


def test_a_run_that_goes_on_is_told_until_now(tmp_path, monkeypatch, capsys):
    """The newest segment of a run that is alive is running: nothing of it is lost, and its time passes."""
    run = Written(tmp_path / "runs", monkeypatch).submitted("7").begin().train(50).save().train(5)
    lock = Lock(run.run, "7", 0)
    lock.acquire()
    lock.beat(step=60, fraction=0.25)
    now, later = (told(run, now=run.now + more) for more in (10, 100))
    assert now.state == later.state == "running"
    assert now.segments[-1].ending.kind == "running"
    assert (now.steps, now.fraction, now.segments[-1].lost_steps, now.total("lost")) == (60, 0.25, 0, 0)
    assert math.isclose(later.total("train") - now.total("train"), 90, abs_tol=0.01)
    assert "25% of the training" in page_of(run, tmp_path, capsys)
    lock.release()
    assert told(run).state == "stopped"
    assert told(run, queue={"7": ("PENDING", "Priority")}).remark == "job 7 is pending (Priority)"


@pytest.mark.parametrize("segments", [0, 1, 100])
def test_runs_of_no_segment_and_of_a_hundred_have_a_page(tmp_path, monkeypatch, capsys, segments):
    """An empty run says that nothing has begun; a hundred segments make a page of less than 2 MB."""
    run = (
        long_chain(tmp_path / "runs", monkeypatch, segments)
        if segments
        else Written(tmp_path / "r", monkeypatch)
    )
    html = page_of(run, tmp_path, capsys)
    check(html)
    assert len(html) < 2e6
    assert ("No segment has begun yet" in html) == (segments == 0)
    assert len(rows(html, "Segments")[1:]) == segments


DAMAGE = [
    lambda v: None,
    lambda v: "x",
    lambda v: [v],
    lambda v: {"a": v},
    lambda v: -1,
    lambda v: math.nan,
    lambda v: 1e30,
]


@pytest.mark.parametrize("seed", range(8))
def test_damaged_lines_break_no_report(tmp_path, monkeypatch, seed):
    """Lines that are torn, lack fields or hold others than expected are told as well as they can be."""
    draw = random.Random(seed)
    run = long_chain(tmp_path, monkeypatch, 14)
    run.note("failed", segment=1, rank=0, step=1, error="x").note(
        "drift", segment=2, changes=["torch: 1 -> 2"]
    )
    run.note("exclude", node="n1", failures=2).note("space", reason="full", removed=["step-1"]).note("cancel")
    lines = run.run.journal.read_text().splitlines()
    for index in range(1, len(lines)):
        if draw.random() < 0.3:
            line = json.loads(lines[index])
            key = draw.choice(list(line))
            line[key] = draw.choice(DAMAGE)(line[key])
            lines[index] = json.dumps(line)
        elif draw.random() < 0.1:
            lines[index] = lines[index][: draw.randrange(len(lines[index]))]
    run.run.journal.write_text("\n".join(lines))
    check(words_of(run))
    html, _ = report._of_run(run.run, {}) if seed < 4 else ("", None)  # drawing takes most of the time
    check(html)


def test_metrics_of_every_kind_are_told(tmp_path, monkeypatch, capsys):
    """NaN and infinity are counted, text is named and not drawn, names may come and go, and be hostile."""
    run = Written(tmp_path / "runs", monkeypatch).submitted("7").begin().train(300).done()
    lines: list[dict] = [{"step": step, "loss": 1 / step} for step in range(1, 301)]
    lines[40]["loss"], lines[41]["loss"], lines[42]["loss"] = math.nan, math.inf, 10**400
    lines[50] = {
        "step": 51,
        "<script>$x_{": 1,
        "naïve 損失": 0.5,
        "many": [1, 2],
        "word": "yes",
        "none": None,
    }
    lines += [{"step": 300, f"extra{number}": number} for number in range(40)] + [
        {"step": "x", "loss": 1},
        {},
    ]
    html = page_of(run.log(*lines), tmp_path, capsys)
    check(html)
    assert "loss: 3 values of 299 are not finite, the first at step 41" in html
    assert "not numbers, so not drawn: many (list), word (str)" in html
    assert "&lt;script&gt;$x_{" in html
    assert "naïve 損失" in html
    assert "extra39 = 39" in html


def test_weeks_of_metrics_are_drawn_from_a_few_numbers(tmp_path, monkeypatch):
    """A curve keeps a bounded number of buckets, with the extremes of all values and their mean."""
    curve = curves.Curve("loss")
    for step in range(1, 200_001):
        curve.add(step, -5.0 if step == 77_777 else float(step % 2))
    steps, means, lows, highs = curve.points()
    assert len(steps) <= curves.BUCKETS
    assert min(lows) == -5.0
    assert max(highs) == 1.0
    assert steps == sorted(steps)
    assert 199_000 < steps[-1] <= 200_000 + curve.width
    assert all(0.3 < mean < 0.6 for mean in means[1:-1])


def test_a_folder_of_runs_gets_a_row_each(tmp_path, monkeypatch, capsys):
    """The overview shows state, what differs between the experiments, steps and curves, and links to reports."""
    runs = tmp_path / "runs"
    for lr in (0.1, 0.01):
        run = (
            Written(runs / "sweep", monkeypatch, f"lr{lr}", args={"lr": lr}).submitted("7").begin().train(20)
        )
        run.log(*({"step": step, "loss": lr / step} for step in range(1, 21)))
        run.done() if lr == 0.1 else run.save()
    Written(runs, monkeypatch, "empty")
    assert cli.main(["report", str(runs / "sweep" / "lr0.1")]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(runs)]) == 0
    assert capsys.readouterr().out.split() == [str(runs / "report.html"), str(runs / "report.png")]
    html = (runs / "report.html").read_text()
    check(html)
    head, *found = rows(html, "Runs")
    assert head[:3] == ["run", "state", "lr"]
    assert [row[:3] for row in found] == [
        ["empty it has not started", "stopped", look.NOTHING],
        ["lr0.01 nobody carries it on", "stopped", "0.01"],
        ["lr0.1", "done", "0.1"],
    ]
    assert 'href="sweep/lr0.1/report.html"' in html
    assert html.count("<polyline") == 2


def test_where_the_report_goes(tmp_path, monkeypatch, capsys):
    """By default into the run; a .png alone where that is named; other names and places are refused in one line."""
    run = Written(tmp_path / "runs", monkeypatch).submitted("7").begin().train(5).done().run
    assert cli.main(["report", str(run.path)]) == 0
    assert run.report.exists()
    assert run.report.with_suffix(".png").exists()
    assert cli.main(["report", str(run.path), "-o", str(tmp_path / "only.png")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["only.png", "runs"]
    capsys.readouterr()
    for where, words in {"x.pdf": ".html or a .png", "missing/x.html": "could not be written"}.items():
        assert cli.main(["report", str(run.path), "-o", str(tmp_path / where)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "nothing").mkdir()
    for path, words in {
        tmp_path / "nothing": "there is no run in",
        tmp_path / "no": "does not exist",
    }.items():
        assert cli.main(["report", str(path)]) == 2
        assert words in capsys.readouterr().err


def test_the_report_imports_no_torch_and_names_what_it_lacks(tmp_path, monkeypatch):
    """It draws without torch; without matplotlib it says in one line what to install."""
    run = Written(tmp_path / "runs", monkeypatch).submitted("7").begin().train(5).done().run
    code = (
        "import sys\n"
        "from chainrun.cli import main\n"
        f"code = main(['report', {str(run.path)!r}])\n"
        "assert 'torch' not in sys.modules and 'submitit' not in sys.modules\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here')\n")
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "pip install 'chainrun[report]'" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_real_chain_on_this_machine_is_told(tmp_path, capsys):
    """What real segments write suffices: two cuts by --interrupt-at, their handoffs, witnesses, curves and the end."""
    programs = Path(__file__).parent / "programs"
    described = {"function": f"{programs / 'faulty.py'}:exact", "dir": str(tmp_path / "runs")}
    run, _ = submit.prepare(experiment.from_dict({"name": "real", **described}, tmp_path), tmp_path)
    before = dict(os.environ)
    for number, cuts in enumerate([{4}, {9}, set()]):
        here = Allocation(scheduler="local", job=f"here{number}", interrupt_at=frozenset(cuts))
        run_segment(run, here, Signals())
        journal.record(run, "handoff", how="local")  # as `chainrun run` does
    os.environ.clear()
    os.environ.update(before)
    html = page_of(run, tmp_path, capsys)
    check(html)
    found = rows(html, "Segments")[1:]
    assert [row[1].partition(" cut")[0] for row in found] == ["interrupted", "interrupted", "done"]
    assert [row[5] for row in found] == ["0 → 4", "4 → 9", "9 → 15"]
    assert "2 of 2 handoffs that left a witness went on identically" in html
    assert [row[0] for row in rows(html, "What each handoff cost")[1:]] == ["1 → 2", "2 → 3"]
    for segment in told(run).segments:
        assert segment.first_step is not None
        assert segment.seconds("train") > 0
        assert segment.seconds("start") > 0
    assert told(run).goodput > 0


# ---- why a job ended, from what SLURM has left in its log ---------------------------------------------


@pytest.mark.parametrize(
    ("words", "state"),
    [
        ("slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT {} DUE TO PREEMPTION ***", "PREEMPTED"),
        (
            "slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT {} DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***",
            "NODE_FAIL",
        ),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT {} DUE TO TIME LIMIT ***", "TIMEOUT"),
        ("slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT {} DUE TO JOB REQUEUE ***", "REQUEUED"),
        ("slurmstepd-n1: error: *** JOB 7 ON n1 CANCELLED AT {} ***", ""),
        ("slurmstepd: error: *** JOB 77 ON n1 CANCELLED AT {} DUE TO PREEMPTION ***", ""),
        ("loss 0.5", ""),
    ],
)
def test_slurms_last_words_to_a_job_say_why_it_ended(tmp_path, monkeypatch, words, state):
    """In the forms of 22.05 and 24.11; those to an earlier start of the job, or to another one, are passed over."""
    monkeypatch.setattr(slurm, "ask", lambda *command, **more: slurm.Answer(False, "not here"))
    began = 1_790_000_000.0
    stamps = [time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(began + after)) for after in (-30, 40)]
    log = tmp_path / "7_0_log.err"
    log.write_text(f"slurmstepd: error: *** STEP 7.0 ON n1 CANCELLED AT {stamps[0]} DUE TO TIME LIMIT ***\n")
    assert ends.state_of(tmp_path, "7", ["n1"], began, again=True) == ""
    with log.open("a") as file:
        file.write(words.format(stamps[1]) + "\n")
    assert ends.state_of(tmp_path, "7", ["n1"], began, again=True) == state


@pytest.mark.parametrize(
    ("node", "state"),
    [
        ("State=DOWN*+DRAIN BootTime=2026-01-01T00:00:00", "NODE_FAIL"),
        ("State=IDLE+NOT_RESPONDING BootTime=2026-01-01T00:00:00", "NODE_FAIL"),
        ("State=IDLE BootTime=2036-01-01T00:00:00", "NODE_FAIL"),
        ("State=IDLE BootTime=2026-01-01T00:00:00", ""),
        ("State=ALLOCATED BootTime=Unknown", ""),
    ],
)
def test_a_node_that_is_down_or_was_booted_since_has_failed(tmp_path, monkeypatch, node, state):
    """Where the log has no last words, the job's nodes say whether one of them failed."""
    answer = slurm.Answer(True, f"NodeName=n1 Arch=x86_64 {node}\n")
    monkeypatch.setattr(slurm, "ask", lambda *command, **more: answer)
    assert ends.state_of(tmp_path, "7", ["n1"], 1_790_000_000.0, again=True) == state


def test_durations_and_parts_read_well():
    """Two units at most, and what is nearly all never reads as all."""
    seconds = {
        0: "0s",
        0.004: "4ms",
        0.42: "0.42s",
        5.25: "5.2s",
        59.6: "60s",
        61: "1min 1s",
        7200: "2h",
        90061: "1d 1h",
    }
    assert {number: look.duration(number) for number in seconds} == seconds
    assert [look.part(x) for x in (0.0, 0.04, 0.5, 0.9999, 1.0)] == ["0.0%", "4.0%", "50%", "99.9%", "100%"]
