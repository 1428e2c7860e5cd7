"""One segment at a time writes to a run directory, and a dead one stands in nobody's way."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from functools import partialmethod
from pathlib import Path

import pytest

from chainrun import experiment
from chainrun import lock as module
from chainrun.allocation import Allocation
from chainrun.checkpoint import writer
from chainrun.checkpoint.store import Store
from chainrun.errors import CheckpointError
from chainrun.launch import submit
from chainrun.lock import STALE, Lock, Locked, holder
from chainrun.rundir import RunDir
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

HOLD = str(Path(__file__).parent / "faults" / "hold.py")


@pytest.fixture
def run(tmp_path) -> RunDir:
    return RunDir(tmp_path / "run").create()


@pytest.fixture
def keeper(run):
    """A process that holds the lock; its parent does not wait for it unless the test does."""
    process = subprocess.Popen([sys.executable, HOLD, str(run.path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"None\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def write(run: RunDir, **fields) -> dict:
    """Write the lock of another holder: on this host, alive and beating, unless told otherwise."""
    me = Lock(run, "other", 0)._me
    found = {**me, "time": time.time(), **fields}
    run.lock.write_text(json.dumps(found))
    return found


def test_the_holder_is_alone_until_it_releases(run):
    """A second segment is refused with the first one's name, and gets the lock once that is released."""
    first, second = Lock(run, "first", 0), Lock(run, "second", 0)
    assert first.acquire() is None
    assert first.held()
    with pytest.raises(Locked, match=rf"{run.path}: job first on .*, pid {os.getpid()}; wait .* or cancel"):
        second.acquire(wait=0)
    assert not second.held()
    assert not second.beat(step=1)
    first.release()
    assert second.acquire(wait=0) is None
    assert second.held()
    assert not first.held()


def test_a_waiting_segment_takes_over_when_the_live_holder_goes(run, keeper):
    """A killed holder is noticed within a second by one that waits for it."""
    lock = Lock(run, "next", 0)
    with pytest.raises(Locked):
        lock.acquire(wait=0.6)
    keeper.kill()
    keeper.wait()
    began = time.monotonic()
    assert lock.acquire(wait=10) == f"process {keeper.pid} has ended"
    assert time.monotonic() - began < 1


def test_a_holder_is_dead_although_its_parent_has_not_looked(run, keeper):
    """A zombie still has its pid and its start time; it holds nothing."""
    assert holder(run)["alive"]
    keeper.kill()
    until = time.monotonic() + 5
    while holder(run)["alive"] and time.monotonic() < until:
        time.sleep(0.01)
    state = Path(f"/proc/{keeper.pid}/stat").read_text().rpartition(")")[2].split()[0]
    assert state == "Z"
    assert not holder(run)["alive"]
    assert "has ended" in Lock(run, "next", 0).acquire(wait=0)


def test_a_pid_that_was_given_to_another_process_holds_nothing(run):
    """A live process with the holder's pid, but born at another time, is not the holder."""
    write(run, pid=os.getpid(), born="1")
    assert not holder(run)["alive"]
    assert Lock(run, "next", 0).acquire(wait=0) == f"process {os.getpid()} has ended"


def test_a_holder_on_another_host_lives_as_long_as_its_heart_beats(run, monkeypatch):
    """Its pid says nothing here: it is respected up to the age of its last beat, and taken over after that."""
    monkeypatch.setattr(module, "LOOK", 0.0)
    write(run, host="elsewhere", pid=os.getpid(), time=time.time() - STALE + 10)
    assert holder(run)["alive"]
    with pytest.raises(Locked, match="job other on elsewhere"):
        Lock(run, "next", 0).acquire(wait=0)
    write(run, host="elsewhere", pid=os.getpid(), time=time.time() - STALE - 1)
    assert not holder(run)["alive"]
    lock = Lock(run, "next", 0)
    assert lock.acquire(wait=0) == f"no heartbeat for {STALE + 1:.0f} s"
    assert holder(run)["host"] == socket.gethostname()


@pytest.mark.parametrize("skew", [-3600, 3600])
def test_a_clock_that_goes_wrong_elsewhere_neither_kills_a_holder_nor_keeps_it_alive(run, monkeypatch, skew):
    """What counts is whether beats are seen to come: an hour's difference between two machines' clocks changes nothing."""
    monkeypatch.setattr(module, "LOOK", 0.5)
    monkeypatch.setattr(module, "STALE", 0.8)
    sleep = time.sleep

    def beats(seconds: float) -> None:
        """Between two looks a beat comes, however busy this machine is."""
        sleep(seconds)
        write(run, host="elsewhere", time=time.time() + skew)

    beats(0)
    lock = Lock(run, "next", 0)
    with monkeypatch.context() as while_it_lives:
        while_it_lives.setattr(time, "sleep", beats)
        with pytest.raises(Locked):
            lock.acquire(wait=1.6)
    assert "no heartbeat" in lock.acquire(wait=60)


def test_a_process_id_of_another_container_or_boot_says_nothing(run):
    """Two containers may have one host name: the process that is missing here may well live there."""
    write(run, machine="another boot", pid=2**22 + 1)
    assert holder(run)["alive"]
    with pytest.raises(Locked):
        Lock(run, "next", 0).acquire(wait=0)


def test_a_beat_that_comes_too_late_does_not_take_the_lock_back(run, monkeypatch):
    """A holder that stands still in the middle of a beat, and is taken over, writes over nobody's lock."""
    old = Lock(run, "old", 0)
    old.acquire()
    new = Lock(run, "old", 1)
    write_at = os.pwrite

    def late(*args) -> int:
        monkeypatch.setattr(os, "pwrite", write_at)
        assert new.acquire(wait=0) == "start 0 of this job has ended"
        return write_at(*args)

    monkeypatch.setattr(os, "pwrite", late)
    old.beat(step=3)
    assert new.held()
    assert not old.held()
    assert not old.beat(step=4)
    assert holder(run)["restart"] == 1


def test_a_beat_keeps_a_lock_alive_and_carries_the_progress(run):
    """The age starts again with each beat, and what the holder says can be read by others."""
    lock = Lock(run, "mine", 2)
    lock.acquire()
    before = holder(run)["time"]
    time.sleep(0.01)
    assert lock.beat(step=7, epoch=1)
    found = holder(run)
    assert found["time"] > before
    assert (found["job"], found["restart"], found["step"], found["epoch"]) == ("mine", 2, 7, 1)
    assert lock.held()


def test_the_next_start_of_a_requeued_job_does_not_wait_for_the_first(run):
    """SLURM starts a job again only when its earlier start has ended, on whatever host that was."""
    write(run, host="elsewhere", job="77", restart=0)
    with pytest.raises(Locked):
        Lock(run, "78", 1).acquire(wait=0)
    with pytest.raises(Locked):
        Lock(run, "77", 0).acquire(wait=0)
    assert Lock(run, "77", 1).acquire(wait=0) == "start 0 of this job has ended"


def test_release_removes_only_ones_own_lock(run):
    """A segment that has lost its lock leaves the new holder's alone, in its beats and at its end."""
    old = Lock(run, "old", 0)
    old.acquire()
    new = write(run, job="new")
    assert not old.held()
    assert not old.beat(step=3)
    old.release()
    assert json.loads(run.lock.read_text()) == new
    run.lock.unlink()
    old.release()
    assert not old.beat()
    assert not run.lock.exists()


def test_a_torn_lock_is_respected_for_a_moment_only(run):
    """Who creates a lock has not yet written it; what stays unreadable was left by a crash."""
    for torn in ("", '{"job": "x", "ho', "[]", "null"):
        run.lock.write_text(torn)
        soon = time.time() + 3600  # however long this test is kept waiting
        os.utime(run.lock, (soon, soon))
        with pytest.raises(Locked):
            Lock(run, "next", 0).acquire(wait=0)
        assert not (holder(run) or {}).get("alive")
        old = time.time() - module.BEAT - 1
        os.utime(run.lock, (old, old))
        lock = Lock(run, "next", 0)
        assert lock.acquire(wait=0) == "unreadable lock"
        lock.release()


def test_of_many_that_find_a_dead_holder_exactly_one_takes_over(run):
    """Eight processes on the same instant, fifty times: never two, never none."""
    done = subprocess.run(
        [sys.executable, HOLD, str(run.path), "8", "50"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rounds = Counter(tuple(json.loads(line)) for line in done.stdout.splitlines())
    assert rounds == {(1, 1): 50}


def test_what_a_killed_holder_left_is_cleaned_up(run):
    """The half-written beat of a killed holder does not stay for ever."""
    (run.path / ".lock.4711").write_text("{")
    write(run, pid=os.getpid(), born="1")
    lock = Lock(run, "next", 0)
    lock.acquire(wait=0)
    lock.beat(step=1)
    lock.release()
    assert {path.name for path in run.path.iterdir()} == {"checkpoints", "jobs"}


def test_a_segment_that_finds_the_run_held_leaves_it_alone(run, keeper, monkeypatch, capsys):
    """A second start says who trains, and writes neither FAILED nor an event that would end the first."""
    described = experiment.from_dict(
        {"name": "run", "function": "json:dumps", "dir": str(run.path.parent)}, run.path
    )
    submit.create(run, described)
    before = run.journal.read_text()
    monkeypatch.setattr(Lock, "acquire", partialmethod(Lock.acquire, wait=0.5))
    outcome = run_segment(run, Allocation(job="other"), Signals())
    assert outcome.kind == "locked"
    assert "another segment is writing" in capsys.readouterr().err
    assert not run.failed.exists()
    assert run.journal.read_text() == before
    assert holder(run)["pid"] == keeper.pid


@pytest.mark.parametrize("first", ["the old start", "the new start"])
def test_a_start_that_was_taken_over_right_before_its_commit_commits_nothing_more(run, first):
    """The lock is still its own when it looks, and is not when it commits: the new start has taken that place away.

    What it has committed before the new start looks is what the new one goes on from: never two futures.
    """
    old, new = Lock(run, "7", 0), Lock(run, "7", 1)
    stores = {lock: Store(run, f"7-{number}") for number, lock in enumerate((old, new))}
    found = []

    def save(lock: Lock, step: int, hold=lambda: None) -> None:
        tree, about = {"objects": {}, "state": {}}, {"restart": lock._me["restart"]}
        writer.save(stores[lock], writer.Alone(), step, writer.ready(tree), about, hold=hold)

    def taken_over() -> None:
        assert old.held()  # the old start's last look; here its machine stands still
        if first == "the new start":
            new.acquire(wait=0)
            stores[new].clean()
            found.append(stores[new].newest())
            save(new, 5)

    old.acquire()
    if first == "the old start":
        save(old, 5, taken_over)
        new.acquire(wait=0)
        stores[new].clean()
        found.append(stores[new].newest())
        assert found[0].step == 5
    else:
        with pytest.raises(CheckpointError, match="No such file"):
            save(old, 5, taken_over)
        assert found == [None]
    (committed,) = Store(run).committed()
    assert Store(run).flaw(committed) is None
    assert committed.manifest["restart"] == (first == "the new start")
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000005"]
    assert not old.held()
