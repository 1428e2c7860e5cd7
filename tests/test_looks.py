"""What a person sees of a chain: status, logs, progress lines, notifications."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_commands import Exp, main
from test_commands import environment as environment  # noqa: PLC0414 a fixture

from chainrun import experiment, journal, pace
from chainrun.allocation import Allocation
from chainrun.checkpoint.store import Store
from chainrun.durations import rough_duration
from chainrun.launch import chain, local, notify, standing, submit
from chainrun.lock import Lock
from chainrun.rundir import RunDir
from chainrun.segment import Outcome
from chainrun.training.extent import Extent

pytestmark = pytest.mark.xdist_group("looks")  # its run is made once, not in each test process

PROGRAMS = Path(__file__).parent / "programs"
TELL = 'echo "$CHAINRUN_EVENT|$CHAINRUN_NAME|$CHAINRUN_STEP|$CHAINRUN_MESSAGE|$CHAINRUN_RUN" >> {told}'


def speaks(folder: Path, **keys) -> Exp:
    """Return the experiment that prints on both streams, and tells FOLDER/told of its chain's end."""
    folder.mkdir(parents=True, exist_ok=True)
    keys.setdefault("notify", TELL.format(told=folder / "told"))
    exp = Exp(folder, "train.py:other", **keys)
    exp.keys["function"] = f"{PROGRAMS}/speaks.py:train"
    exp.file.write_text(json.dumps(exp.keys))
    return exp


def told(exp: Exp) -> list[list[str]]:
    path = exp.folder / "told"
    return [line.split("|") for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Exp:
    """A run that stopped after its first segment, was let go on, failed, and was let go on to its end; and `logs -f`."""
    exp = speaks(tmp_path_factory.mktemp("spoken"), chain={"max_segments": 1})
    exp.finish("--interrupt-at", "7", code=75)
    shutil.copytree(exp.run.path, exp.folder / "halted")
    exp.finish(code=1, env={**os.environ, "FAIL_AT": "12"})
    shutil.copytree(exp.run.path, exp.folder / "failed")
    process = exp.start()
    follow = [sys.executable, "-m", "chainrun", "logs", "-f", str(exp.run.path)]
    with open(exp.folder / "followed", "w") as file, open(exp.folder / "followed.err", "w") as errors:
        while not exp.events("continue")[1:]:
            time.sleep(0.02)
            assert process.poll() is None
        follower = subprocess.Popen(follow, stdout=file, stderr=errors)
    assert process.wait(60) == 0, exp.said()
    assert follower.wait(20) == 0
    return exp


# ---- logs


def without_last_words(log: str) -> list[str]:
    """Return a log's lines without those of submitit's, which may come when the run is over."""
    return [line for line in log.splitlines() if not line.startswith("submitit INFO")]


def test_logs_are_one_log_with_every_start_marked(spoken, capsys):
    """Each segment's lines stand under its mark, output and errors in the order in which they were printed."""
    said = main(capsys, "logs", spoken.run.path, code=0)
    marks = [line for line in said.splitlines() if line.startswith("────")]
    starts = spoken.events("segment")
    for mark, start, more in zip(
        marks,
        starts,
        (
            "fresh ────",
            "resumed at step 7 · the one before: interrupt at step 7; the chain stopped: it has had 1 segments, ",
            "resumed at step 7 · the one before: failed at step 11: ValueError: planted at step 12 ────",
        ),
        strict=True,
    ):
        assert f"segment {start['segment']} · job {start['job']} on {start['host']} · " in mark
        assert f" · {more}" in mark
    lines = [line for line in said.splitlines() if re.match(r"step \d+ on|────", line)]
    expected = []
    for first, last in ((1, 7), (8, 12), (8, 20)):
        expected += ["────"]
        expected += [
            f"step {step} on {what}" for step in range(first, last + 1) for what in ("output", "errors")
        ]
    assert [re.sub("────.*", "────", line) for line in lines] == expected
    followed = (spoken.folder / "followed").read_text()
    assert without_last_words(followed) == without_last_words(said)
    assert (spoken.folder / "followed.err").read_text() == "chainrun: the run is done\n"


def test_a_segments_first_line_says_what_it_is(spoken, capsys):
    """Fresh, or resumed from which checkpoint and how long that took; before all else that chainrun says there."""
    for segment, first in (
        (1, r"segment 1: fresh start"),
        (3, r"segment 3: resuming at step 7 from step-00000007 \(read and verified in \d+\.\d\d s\)"),
    ):
        said = main(capsys, "logs", spoken.run.path, "--segment", segment, code=0)
        own = [line for line in said.splitlines() if line.startswith("chainrun: ")]
        assert re.fullmatch(f"chainrun: {first}", own[0])
        assert said.count("────") == 2
    assert "has no log of segment 9: it has had 3" in main(
        capsys, "logs", spoken.run.path, "--segment", "9", code=2
    )
    last = main(capsys, "logs", spoken.run.path, "-n", "3", code=0)
    assert last == "".join(main(capsys, "logs", spoken.run.path, code=0).splitlines(keepends=True)[-3:])


def test_logs_that_are_followed_end_where_a_chain_stops_by_itself(spoken, tmp_path, capsys, monkeypatch):
    """With HALTED, as of a chain on SLURM, and without, as of one here; and they say why and how to go on."""
    monkeypatch.setattr("chainrun.logs.GRACE", 0.5)
    run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "run")))
    local_stop = main(capsys, "logs", "-f", run.path, code=0)
    assert (
        "chainrun: the chain has stopped: it has had 1 segments, chain.max_segments is 1; to go on: "
        in local_stop
    )
    run.halted.write_text(json.dumps({"why": "a reason", "command": "a command"}))
    said = main(capsys, "logs", "-f", run.path, code=0)
    assert said.splitlines()[-1] == "chainrun: the chain has stopped: a reason; to go on: a command"
    assert "step 7 on errors" in said


def test_a_job_that_is_requeued_appends_and_is_marked_at_each_start(spoken, tmp_path, capsys, monkeypatch):
    """Of one job's log with three starts, the second of which was killed before its segment, all is told apart."""
    run = RunDir(tmp_path / "run").create()
    shutil.copy(spoken.run.experiment, run.experiment)
    first, second = (path.read_text() for path in (spoken.run.logs(0)[0], spoken.run.logs(0)[-2]))
    second = second.replace("segment 3: ", "segment 2: ")
    text = first + f"{second.splitlines()[0]}\nImporting\n" + second
    (run.jobs / "77_0_log.out").write_text(text)
    (run.jobs / "77_0_log.err").write_text("slurmstepd: error: *** STEP 77.0 CANCELLED ***\n")
    where = {"host": "n1", "world_size": 1, "job": "77", "checkpoint": "step-00000007", "seconds": 0.1}
    for restart, segment in ((0, 1), (1, None), (2, 2)):
        journal.record(run, "start", job="77", restart=restart, nodes=["n1"], gpus=0)
        if segment is None:
            continue
        resumed = segment > 1
        journal.record(
            run, "segment", segment=segment, restart=restart, resumed=resumed, step=7 * resumed, **where
        )
        journal.record(run, "stop", segment=segment, step=7, reason="walltime", unused_seconds=20.0)
        journal.record(run, "handoff", how="requeue", job="77")
    said = main(capsys, "logs", run.path, code=0)
    marks = [line for line in said.splitlines() if line.startswith("────")]
    assert marks[0].startswith("──── segment 1 · job 77 on n1 · ")
    assert marks[1] == "──── job 77 starts ────"
    assert marks[2].endswith("resumed at step 7 · the one before: walltime at step 7, requeued ────")
    assert len(marks) == 3
    assert said.splitlines()[-1].startswith("slurmstepd")
    assert "Importing" not in main(capsys, "logs", run.path, "--segment", "2", code=0)
    monkeypatch.setattr("chainrun.logs.CHUNK", 50)  # of a log too long to be held at once
    assert main(capsys, "logs", run.path, code=0) == said

    lines = run.journal.read_text().splitlines(keepends=True)
    run.journal.write_text("".join(line for line in lines if '"restart": 1, "nodes"' not in line))
    lines = main(capsys, "logs", run.path, code=0).splitlines()  # the start that was killed has left no event
    resumes = next(
        number for number, line in enumerate(lines) if line.startswith("chainrun: segment 2: resuming")
    )
    assert lines[resumes - 1] == marks[2]


# ---- status


def test_status_of_one_run_tells_all_of_it(spoken, capsys):
    """What it does, where, how every segment ended, the last error, and what to do."""
    said = main(capsys, "status", spoken.folder / "failed", code=0)
    assert said.splitlines()[0] == "failed  failed  ValueError: planted at step 12"
    for pattern in (
        r"step +7 of 20 \(35%\)\n",
        r"pace +\S+ (steps/s|s/step), \S+ of training left\n",
        r"checkpoint +step 7, [\d.]+ kB, \w[\w ]* ago; 1 kept: /",
        r"segments +2: 1 interrupt, 1 failed\n",
        r" 1 +\w+ \d+ [\d:]+  job \d+ on \S+, fresh: interrupt at step 7; the chain stopped: it has had 1 segments",
        r" 2 +\w+ \d+ [\d:]+  job \d+ on \S+, from step 7: failed at step 11: ValueError: planted at step 12\n",
        r"witness +witnessed at step 7: state, random streams and next batch identical\n",
        r"last error +ValueError: planted at step 12 \(segment 2, rank 0, step 11, \w[\w ]* ago\)\n",
        r"next +chainrun logs \S+/failed shows all; once it is mended: chainrun run \S+/failed/experiment.yaml\n",
    ):
        assert re.search(pattern, said), (pattern, said)
    said = main(capsys, "status", spoken.folder / "halted", code=0)
    assert said.startswith("halted  stopped  it has had 1 segments, chain.max_segments is 1\n")
    assert re.search(r"to go on +chainrun run \S+/halted/experiment.yaml\n", said)


def test_status_of_a_running_segment_knows_its_pace_and_walltime(spoken, tmp_path, capsys):
    """Step of total, metrics, the time to walltime, the projected end; from the lock that the segment holds."""
    run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "run")))
    journal.record(run, "continue", changes=[])
    where = {"job": "9", "restart": 0, "host": "here", "world_size": 2}
    start = {
        "segment": 2,
        **where,
        "resumed": True,
        "step": 100,
        "checkpoint": "step-00000100",
        "seconds": 0.1,
    }
    lines = run.journal.read_text()
    run.journal.write_text(
        lines + json.dumps({"time": time.time() - 100, "event": "segment", **start}) + "\n"
    )
    lock = Lock(run, "9", 0)
    lock.acquire()
    at = {
        "step": 300,
        "total": 1300,
        "fraction": 300 / 1300,
        "epoch": 3,
        "metrics": {"loss": 0.25},
        "left": 3600.0,
    }
    lock.beat(segment=2, **at)
    (found,) = json.loads(main(capsys, "status", "--json", run.path, code=0))
    assert (found["state"], found["step"], found["total"]) == ("running", 300, 1300)
    assert found["left"] == pytest.approx(3600.0, abs=60)
    assert found["rate"] == pytest.approx(2.0, rel=0.2)
    assert found["end"] == pytest.approx(time.time() + 500, abs=120)
    said = main(capsys, "status", run.path, code=0)
    assert re.search(r"step +300 of 1300 \(23%\), epoch 3, loss 0\.25\n", said)
    assert re.search(r"now +segment 2: job 9 on \S+, 2 ranks, heard of \w[\w ]* ago\n", said)
    assert re.search(r"walltime +in \w[\w ]*, at ", said)
    row = main(capsys, "status", tmp_path, code=0).splitlines()[1]
    assert re.match(r"run +running +300 of 1300 \(23%\) +2 +\w\w\w \d\d \d\d:\d\d +", row)
    assert row.endswith(" to walltime")
    lock.release()


def test_status_finds_runs_in_groups_and_sums_them_up(spoken, tmp_path, capsys):
    """A run is a folder with an experiment.yaml, a group is a folder whose children are runs."""
    for name, origin in (("alone", "halted"), ("sweep/lr=1", "failed"), ("sweep/lr=2", "failed")):
        shutil.copytree(spoken.folder / origin, tmp_path / name)
    shutil.copytree(spoken.run.path, tmp_path / "sweep" / "lr=3")
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    lines = main(capsys, "status", tmp_path, code=0).splitlines()
    assert [line.split()[:2] for line in lines if line] == [
        ["run", "state"],
        ["alone", "stopped"],
        ["sweep:", "1"],
        ["lr=1", "failed"],
        ["lr=2", "failed"],
        ["lr=3", "done"],
    ]
    assert "sweep: 1 done, 2 failed" in lines
    found = json.loads(main(capsys, "status", tmp_path, "--json", code=0))
    assert [one["group"] for one in found] == [None, "sweep", "sweep", "sweep"]
    assert len(main(capsys, "status", tmp_path / "sweep", code=0).splitlines()) == 4


SQUEUE = """#!/bin/sh
echo called >> {calls}
printf '7|PENDING|2030-01-02T03:04:05|Priority\\n8|PENDING|N/A|JobHeldUser\\n9|RUNNING|2026-01-01T00:00:00|None\\n'
"""


def test_status_asks_slurm_once_for_all_runs(spoken, tmp_path, capsys, monkeypatch):
    """Each run in the queue is shown with the reason and the start that SLURM expects; where it hangs, with that."""
    for job in ("7", "8", "9", "10"):
        run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "runs" / f"run{job}")))
        journal.record(run, "continue", changes=[])
        journal.record(run, "submitted", job=job)
    tools = tmp_path / "tools"
    tools.mkdir()
    squeue = tools / "squeue"
    squeue.write_text(SQUEUE.format(calls=tmp_path / "calls"))
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    rows = dict(
        line.split(maxsplit=1) for line in main(capsys, "status", tmp_path / "runs", code=0).splitlines()
    )
    assert rows["run7"].startswith("queued ")
    assert rows["run7"].endswith("job 7 (Priority), starts about Jan 02 03:04")
    assert rows["run8"].startswith("held ")
    assert rows["run8"].endswith("; to go on: scontrol release 8")
    assert rows["run9"].startswith("running ")
    assert rows["run9"].endswith("job 9 is starting")
    assert rows["run10"].startswith("stopped ")
    assert (tmp_path / "calls").read_text() == "called\n"
    found = json.loads(main(capsys, "status", tmp_path / "runs" / "run7", "--json", code=0))[0]
    assert (found["queue"][0]["job"], found["queue"][0]["reason"]) == ("7", "Priority")
    assert chain.Chain(tmp_path / "runs" / "run8").state == "held"

    monkeypatch.setattr("chainrun.launch.slurm._QUESTION", 0.2)
    squeue.write_text("#!/bin/sh\nexec sleep 600\n")
    said = main(capsys, "status", tmp_path / "runs", code=0)
    assert said.count("unknown") == 4
    assert "job 7: squeue did not answer within" in said


def test_status_without_slurm_says_what_it_can(spoken, tmp_path, capsys, monkeypatch):
    """A run whose job may wait is unknown, the others are what they are."""
    run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "runs" / "one")))
    journal.record(run, "continue", changes=[])
    journal.record(run, "submitted", job="7")
    shutil.copytree(spoken.run.path, tmp_path / "runs" / "two")
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    lines = main(capsys, "status", tmp_path / "runs", code=0).splitlines()
    assert re.match(r"one +unknown +7 .* job 7: squeue is not on PATH", lines[1])
    assert lines[2].split()[:2] == ["two", "done"]


def test_a_watched_status_redraws_in_place_until_ctrl_c(spoken, capsys):
    """Each look is written over the one before, without clearing the screen between them; the exit code is 0."""
    assert "--watch redraws a terminal" in main(capsys, "status", "--watch", spoken.folder, code=2)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "chainrun", "status", "--watch", str(spoken.folder)]
    process = subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=theirs, start_new_session=True)
    os.close(theirs)
    shown, until = b"", time.monotonic() + 60
    try:
        while shown.count(b"\x1b[H") < 3 and time.monotonic() < until:
            if select.select([ours], [], [], 1.0)[0]:
                shown += os.read(ours, 65536)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        os.close(ours)
    assert shown.count(b"\x1b[H") >= 3
    assert shown.count(b"\x1b[2J") == 1
    assert shown.count(b"failed  ") >= 2


def test_how_segments_ended_is_told_in_words():
    """Walltime, failure, a kill that SLURM explains, one that nobody does, and what made the next one happen."""
    events = []
    for number, ends in enumerate(
        (
            [
                {"event": "stop", "step": 5, "reason": "walltime"},
                {"event": "handoff", "how": "resubmit", "job": "2"},
            ],
            [{"event": "lost", "state": "NODE_FAIL"}],
            [],
            [{"event": "failed", "step": 9, "error": "E: x\nmore"}],
            [],
        ),
        start=1,
    ):
        events.append({"event": "segment", "segment": number})
        events += [{"segment": number, **end} for end in ends]
    assert [each.ending() for each in standing.segments(events)] == [
        "walltime at step 5, job 2 submitted",
        "killed without a word, SLURM says NODE_FAIL",
        "killed without a word",
        "failed at step 9: E: x",
        "",
    ]


def test_a_job_that_was_killed_is_explained_by_slurms_memory_or_its_accounting(
    spoken, tmp_path, capsys, monkeypatch
):
    """squeue remembers for minutes, sacct for months; where neither says anything, nothing is said."""
    run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "run")))
    journal.record(run, "continue", changes=[])
    journal.record(run, "submitted", job="7")
    where = {"job": "7", "restart": 0, "host": "n1", "world_size": 1, "checkpoint": "step-00000007"}
    journal.record(run, "segment", segment=2, **where, resumed=True, step=7, seconds=0.1)
    tools = tmp_path / "tools"
    tools.mkdir()
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    unknown = "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1"
    remembers = 'case "$*" in *--states=all*) echo "7|NODE_FAIL|None";; esac'
    for squeue, sacct, said in (
        (remembers, "exit 1", "NODE_FAIL"),
        (unknown, "printf 'OUT_OF_MEMORY\\n'", "OUT_OF_MEMORY"),
        (unknown, "printf 'CANCELLED by 1000\\n'", "CANCELLED"),
        (unknown, "echo 'Slurm accounting storage is disabled' >&2; exit 1", None),
    ):
        for name, text in (("squeue", squeue), ("sacct", sacct)):
            (tools / name).write_text(f"#!/bin/sh\n{text}\n")
            (tools / name).chmod(0o755)
        shown = main(capsys, "status", run.path, code=0)
        assert shown.startswith(
            "run  stopped  killed without a word: a crash, no memory left, or its node failed\n"
        )
        found = re.search(r"SLURM says +(\w+)", shown)
        assert (found and found[1]) == said


# ---- the journal, progress


def test_a_follower_reads_every_event_once_and_no_half_ones(tmp_path):
    """Also a line that is being written, and one that a crash has torn; `brief` keeps the newest checkpoint."""
    run = RunDir(tmp_path).create()
    follower = journal.Follower(run)
    assert follower.new() == []
    journal.record(run, "stop", step=1)
    assert [event["step"] for event in follower.new()] == [1]
    with open(run.journal, "a") as file:
        file.write('{"time": 1, "event": "sto')
    assert follower.new() == []
    for step in (2, 3):  # behind the torn line
        journal.record(run, "checkpoint", step=step, path=f"step-{step}")
    assert [event["step"] for event in follower.new()] == [2, 3]
    assert follower.new() == []
    assert journal.Follower(run, skip=True).new() == []
    assert [(event["event"], event["step"]) for event in journal.brief(run)] == [
        ("stop", 1),
        ("checkpoint", 3),
    ]


def test_the_line_that_says_where_a_training_is():
    """Step of total, metrics, rate, time to walltime, time left; and what is not known is not said."""
    rate = pace.Rate()
    assert rate.value is None
    for second in range(0, 40, 5):
        rate.note(second, 2 * second)
    assert rate.value == pytest.approx(2.0)
    at = {
        "step": 70,
        "total": 1270,
        "fraction": 70 / 1270,
        "epoch": 1,
        "metrics": {"loss": 0.123456},
        "left": 4000.0,
    }
    assert pace.line(at, rate.value) == (
        "step 70 of 1270 (6%), epoch 1, loss 0.1235, 2 steps/s, 1h 7min to walltime, 10min of training left"
    )
    assert pace.line({**at, "total": None, "metrics": {}, "left": None}, None) == "step 70, epoch 1"
    rate.note(41, 10)  # went back
    assert rate.value is None
    assert [rough_duration(s) for s in (0.4, 59.6, 90, 3700, 200_000)] == [
        "0s",
        "1min",
        "1min 30s",
        "1h 2min",
        "2d 8h",
    ]


def test_the_number_of_all_steps_is_learned_from_the_loops():
    """Exact where a batch is a step, whatever other loaders do; near where gradients are accumulated."""
    epochs = {"epochs": {"index": 1, "of": 3}}
    extent = Extent()
    assert extent.look(20, epochs, [(0, 20, False)]) == (
        None,
        1 / 3,
    )  # between two passes, nothing learned yet
    assert extent.look(24, epochs, [(5, 20, True), (0, 4, False)]) == (
        60,
        24 / 60,
    )  # its step is not counted yet
    assert extent.look(40, epochs, [(0, 20, False), (2, 4, True)]) == (60, 40 / 60)  # an evaluation
    assert Extent().look(12, epochs, [(4, 20, True)]) == (30, 12 / 30)  # two batches a step
    assert Extent().look(7, {"steps": {"index": 7, "of": 50}}, []) == (50, 7 / 50)
    assert (
        Extent(100).look(7, {"epochs": {"index": 0, "of": 2}}, [])[0] == 100
    )  # as the segment before had learned
    assert Extent().look(60, {"epochs": {"index": 3, "of": 3}}, []) == (60, 1.0)
    assert Extent().look(5, {}, []) == (None, None)
    assert Extent(100).look(5, {}, []) == (100, 0.05)


def test_a_jobs_log_has_a_line_now_and_then(tmp_path, capsys, monkeypatch):
    """With step, total and metrics, written beside the training; the checkpoint knows how long the training is."""
    monkeypatch.setattr("chainrun.segment.LINE_EVERY", 0.0)
    exp = speaks(tmp_path, args={"steps": 60, "epochs": 2}, checkpoint={"every": {"steps": 50}})
    monkeypatch.setattr("chainrun.training.stop.TICK", 0.001)
    monkeypatch.setattr("chainrun.training.run.Run.step", _slowly(exp))
    assert exp.segment().kind == "done"
    said = capsys.readouterr().err
    assert re.search(r"chainrun: segment 1, step \d+( of 120 \(\d+%\))?, epoch \d", said), said
    (_, older) = Store(exp.run).committed()
    assert older.manifest["total"] == 120
    assert older.manifest["fraction"] == pytest.approx(older.step / 120)


def _slowly(exp: Exp):
    from chainrun.training.run import Run

    step = Run.step

    def slowly(self, **metrics):
        time.sleep(0.03)
        step(self, **metrics)

    return slowly


# ---- notifications


def test_the_end_of_a_chain_is_told_once(spoken):
    """Stopped by its limit, failed, finished: each end with its reason and step; a handoff tells nobody."""
    path = str(spoken.run.path)
    stopped, failed, finished = told(spoken)
    assert stopped[:3] == ["stopped", "exp", "7"]
    assert stopped[3].startswith("it has had 1 segments, chain.max_segments is 1; to go on: chainrun run ")
    assert failed == ["failed", "exp", "7", "ValueError: planted at step 12", path]
    assert finished == ["finished", "exp", "20", "done after 20 steps and 3 segments", path]
    assert [(event["of"], event["problem"]) for event in spoken.events("notified")] == [
        ("stopped", None),
        ("failed", None),
        ("finished", None),
    ]


def test_a_run_that_is_cancelled_tells_so_once(spoken, tmp_path, capsys):
    """By the command where nothing runs; a second cancel tells nobody, a run that has told of its end neither."""
    run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "run")))
    described = experiment.load(run.experiment)
    text = experiment.to_yaml(described).replace(str(spoken.folder / "told"), str(tmp_path / "told"))
    run.experiment.write_text(text)
    main(capsys, "cancel", run.path, code=0)
    assert not (tmp_path / "told").exists()  # it had stopped before, and told so
    run.notified.unlink()
    main(capsys, "cancel", run.path, code=0)
    main(capsys, "cancel", run.path, code=0)
    assert (tmp_path / "told").read_text().startswith("stopped|exp|7|the run was cancelled|")
    assert (tmp_path / "told").read_text().count("\n") == 1


@pytest.mark.parametrize(
    ("command", "problem"),
    [("exit 3", "ended with exit code 3"), ("sleep 600 & sleep 600", "did not end within 0 s")],
)
def test_a_notification_that_fails_harms_nothing(command, problem, tmp_path, capsys, monkeypatch):
    """It is noted in journal and log, and one that hangs is ended with all that it has started."""
    exp = speaks(tmp_path, notify=command)
    run, _ = submit.prepare(experiment.load(exp.file), tmp_path)
    monkeypatch.setattr(notify, "TIMEOUT", 0.3)
    notify.notify(run, "finished", "a message")
    assert problem in capsys.readouterr().err
    assert exp.events("notified")[0]["problem"] == problem
    run.notified.unlink()
    shutil.rmtree(run.path)
    notify.notify(run, "finished", "a message")  # the run directory is gone


def test_every_rank_of_a_failed_segment_leaves_after_the_command_has_ended(tmp_path, monkeypatch):
    """SLURM ends all ranks when one leaves: those that do not tell wait for the one that does."""
    exp = speaks(tmp_path, notify=f"sleep 1; {TELL.format(told=tmp_path / 'told')}")
    run, _ = submit.prepare(experiment.load(exp.file), tmp_path)
    code = "import sys; from pathlib import Path; from chainrun.launch import notify; from chainrun.rundir import RunDir;"
    code += "notify.notify(RunDir(Path(sys.argv[1])), 'failed', f'rank {sys.argv[2]}', 4);"
    code += "print(Path(sys.argv[3]).read_text())"
    words = [sys.executable, "-c", code, str(run.path)]
    ranks = [
        subprocess.Popen([*words, str(rank), str(tmp_path / "told")], stdout=subprocess.PIPE, text=True)
        for rank in range(3)
    ]
    assert all("failed|exp|4|rank " in rank.communicate(timeout=60)[0] for rank in ranks)
    assert len(told(exp)) == 1


def test_a_job_on_slurm_tells_of_its_end_and_not_of_a_handoff(tmp_path, monkeypatch):
    """Whatever ends the chain in a job: done, failed, halted; a job that starts once more on a run that is done too."""
    from chainrun.launch import handoff, job
    from chainrun.training.stop import Signals

    exp = speaks(tmp_path)
    run, _ = submit.prepare(experiment.load(exp.file), tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin") + ":/bin:/usr/bin")  # no queue to ask
    monkeypatch.setattr(handoff, "hand_over", lambda *args: True)
    place = Allocation(scheduler="slurm", job="1", nodes=("n1",))
    outcomes = []
    monkeypatch.setattr("chainrun.segment.run_segment", lambda *args: outcomes.pop())
    outcomes.append(Outcome("stopped", "walltime", 3))
    job._carry(run, place, Signals())
    assert told(exp) == []
    outcomes.append(Outcome("failed", "E: x", 4))
    with pytest.raises(SystemExit):
        job._carry(run, Allocation(rank=1, scheduler="slurm", job="1"), Signals())
    run.notified.unlink()
    outcomes.append(Outcome("halted", "a limit", 5, " k=v"))
    with pytest.raises(SystemExit):
        job._carry(run, place, Signals())
    run.notified.unlink()
    journal.record(run, "done", segment=1, step=20)
    run.done.write_bytes(b"")
    for _ in range(2):
        outcomes.append(Outcome("idle", "the run is done"))
        job._carry(run, place, Signals())
    assert [line[:3:2] + line[3:4] for line in told(exp)] == [
        ["failed", "4", "E: x"],
        ["stopped", "0", f"a limit; to go on: chainrun submit {run.experiment} k=v"],
        ["finished", "0", "done after 20 steps and 1 segment"],
    ]


def test_slurms_own_mails_are_passed_through(tmp_path, capsys):
    """What `slurm.extra` says of mails stands in the script."""
    extra = {"mail-type": "END,FAIL,TIME_LIMIT", "mail-user": "me@example.org"}
    exp = speaks(tmp_path, slurm={"time": "1h", "extra": extra})
    said = main(capsys, "submit", exp.file, "--dry-run", code=0)
    assert "#SBATCH --mail-type=END,FAIL,TIME_LIMIT\n" in said
    assert "#SBATCH --mail-user=me@example.org\n" in said


def test_a_chain_here_tells_of_a_stop_that_nobody_explains(spoken, tmp_path, capsys):
    """A segment that was killed without a word: the command that carried it says so."""
    run = RunDir(Path(shutil.copytree(spoken.folder / "halted", tmp_path / "run")))
    run.notified.unlink()
    text = run.experiment.read_text().replace(str(spoken.folder / "told"), str(tmp_path / "told"))
    run.experiment.write_text(text)
    where = {"job": "9", "restart": 0, "host": "here", "world_size": 1, "checkpoint": None, "seconds": 0.1}
    journal.record(run, "segment", segment=2, **where, resumed=True, step=7)
    local._tell(run)
    assert (
        "|killed without a word: a crash, no memory left, or its node failed; to go on: "
        in (tmp_path / "told").read_text()
    )
