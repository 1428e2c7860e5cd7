"""When a segment saves and ends: the watch's rules under a clock that the test turns, and real ranks agreeing."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from chainrun.training.rhythm import Pace
from chainrun.training.stop import Lead, Signals, Watch, Wish

PROGRAMS = Path(__file__).parent / "programs"


class Clock:
    """Wall and monotonic time, turned by hand; the wall may jump."""

    def __init__(self) -> None:
        self.now, self.jump = 1000.0, 1e9

    def wall(self) -> float:
        return self.now + self.jump

    def monotonic(self) -> float:
        return self.now


class Bench:
    """A watch without its thread: `look` is one turn of it."""

    def __init__(self, tmp_path: Path, *, limit: float | None = None, **keys) -> None:
        self.clock, self.signals, self.boundary = Clock(), Signals(), 0
        self.end = None if limit is None else self.clock.wall() + limit
        arguments = {
            "signals": self.signals,
            "end": lambda: self.end,
            "stop_file": tmp_path / "STOP",
            "every": None,
            "lead": None,
            "passed": lambda: self.boundary,
            "step": lambda: self.boundary,
            "first_save": lambda: 2.0,
            "saving": lambda: False,
            "beat": lambda: None,
            "agreement": None,
            "leads": True,
            "pace": Pace(),
            **keys,
        }
        self.watch = Watch(**arguments, wall=self.clock.wall, monotonic=self.clock.monotonic)
        self.watch._read_end()

    def look(self) -> Wish | None:
        self.watch._observe()
        return self.watch._local_wish()

    def train(self, seconds: float, step: float) -> Wish | None:
        """Let steps go by; return the first wish."""
        until = self.clock.now + seconds
        while self.clock.now < until:
            self.clock.now += step
            self.boundary += 1
            if wish := self.look():
                return wish
        return None


def test_the_clock_stops_in_time_for_a_step_a_save_and_a_margin(tmp_path):
    """Four hours are used up to the learned step and save time, and not a minute less."""
    bench = Bench(tmp_path, limit=4 * 3600)
    assert bench.train(4 * 3600, step=10.0).reason == "walltime"
    assert 10 + 2 < bench.watch.time_left() < 60


def test_a_warning_up_to_a_minute_early_does_not_end_the_segment_early(tmp_path):
    """SLURM's warning may come 60 s before it was asked for; the end of the job decides."""
    bench = Bench(tmp_path, limit=600)
    assert bench.train(510, step=1.0) is None
    bench.signals.warned = True
    assert bench.train(600, step=1.0).reason == "walltime"
    assert bench.watch.time_left() < 25


def test_a_warning_far_from_the_end_is_somebody_elses_and_ends_the_segment(tmp_path):
    """A signal hours before the limit means preemption, or a person: stop at the next boundary."""
    bench = Bench(tmp_path, limit=4 * 3600)
    assert bench.train(60, step=1.0) is None
    bench.signals.warned = True
    assert bench.train(2, step=1.0) == Wish("stop", "signal")


def test_a_warning_without_a_known_end_ends_the_segment(tmp_path):
    """Where nobody says when the job ends, its warning is all there is."""
    bench = Bench(tmp_path)
    bench.signals.warned = True
    assert bench.look() == Wish("stop", "signal")


def test_a_preemption_that_shortens_the_end_is_noticed_at_its_warning(tmp_path):
    """The end is read again when the warning comes."""
    bench = Bench(tmp_path, limit=4 * 3600)
    assert bench.train(30, step=1.0) is None
    bench.end = bench.clock.wall() + 20
    bench.signals.warned = True
    assert bench.train(20, step=1.0).reason == "walltime"
    assert bench.watch.time_left() > 2


def test_a_limit_changed_while_running_is_noticed(tmp_path):
    """A lengthened limit is used, a shortened one kept."""
    bench = Bench(tmp_path, limit=600)
    bench.end += 3600
    assert bench.train(1200, step=1.0) is None
    bench.end -= 3600 - 900
    assert bench.train(400, step=1.0).reason == "walltime"


def test_a_jump_of_the_wall_clock_does_not_move_the_deadline(tmp_path):
    """Between two readings of the end only the monotonic clock counts."""
    bench = Bench(tmp_path, limit=50)
    bench.clock.jump -= 7200
    assert bench.train(50, step=1.0).reason == "walltime"


def test_a_long_evaluation_between_steps_makes_the_lead_longer(tmp_path):
    """The longest gap between two boundaries has to fit in before the end."""
    bench = Bench(tmp_path, limit=4 * 3600)
    bench.train(100, step=1.0)
    short = bench.watch.lead().seconds
    bench.train(300, step=300.0)
    assert bench.watch.lead().seconds > short + 300


def epochs(
    bench: Bench, count: int, *, steps: int = 100, evaluation: float = 300.0, step: float = 1.0
) -> Wish | None:
    """Let epochs go by, a long evaluation after each; return the first wish, at whatever boundary."""
    for _ in range(count):
        if wish := bench.train(steps * step, step) or bench.train(evaluation, evaluation + step):
            return wish
    return None


def test_an_evaluation_that_comes_regularly_counts_only_where_it_comes_next(tmp_path):
    """Once its rhythm is known, the training goes on until a step no longer fits, or until the next evaluation does not."""
    bench = Bench(tmp_path, limit=4 * 3600)
    assert epochs(bench, 4) is None
    assert bench.watch.lead().seconds < 30
    assert bench.train(95, step=1.0) is None
    assert bench.watch.lead().seconds < 30
    bench.train(4, step=1.0)
    assert bench.watch.lead().seconds > 300  # the evaluation is next

    bench.end = bench.clock.wall() + 250  # it does not fit in any more
    bench.watch._read_end()
    assert bench.look().reason == "walltime"


def test_between_two_evaluations_a_segment_uses_its_time_to_the_last_step(tmp_path):
    """What is left at the stop is less than a save, a step and 15 s, however long the evaluations are."""
    bench = Bench(tmp_path, limit=36 * 401 + 70)
    assert epochs(bench, 40).reason == "walltime"
    save, step = 2.0, 1.0
    assert 1.5 * save < bench.watch.time_left() < save + step + 15 + 1.1


def test_an_evaluation_out_of_its_rhythm_may_come_at_any_time(tmp_path):
    """When the expected one has not come, the lead is that for an evaluation that comes next, until a new rhythm is seen."""
    bench = Bench(tmp_path, limit=40 * 3600)
    epochs(bench, 4)
    bench.train(102, step=1.0)
    assert bench.watch.lead().seconds > 300
    epochs(bench, 1)
    epochs(bench, 4, steps=50)
    assert bench.watch.lead().seconds < 30


def test_a_pause_much_longer_than_any_before_is_not_taken_for_an_evaluation(tmp_path):
    """A filesystem that hung once for longer than all evaluations counts as what may happen again."""
    bench = Bench(tmp_path, limit=40 * 3600)
    epochs(bench, 4)
    bench.train(1000, step=1000.0)
    assert bench.watch.lead().seconds > 1000


def test_the_lead_says_what_it_is_for(tmp_path):
    """A reader of the journal sees why a segment stopped when it did."""
    bench = Bench(tmp_path, limit=3600)
    wish = bench.train(3600, step=10.0)
    assert "11 s for what comes before the next boundary" in str(Lead(**wish.lead))
    wish = Bench(tmp_path, limit=60, lead=20.0).train(60, step=1.0)
    assert "20 s before the end, as configured" in str(Lead(**wish.lead))


def test_warm_up_before_the_first_boundary_is_no_gap(tmp_path):
    """Import, compilation and the first batch do not make the lead longer for ever."""
    bench = Bench(tmp_path, limit=4 * 3600)
    bench.clock.now += 600
    bench.look()
    bench.train(10, step=1.0)
    assert bench.watch.lead().seconds < 30


def test_the_term_signal_and_the_stop_file_end_the_segment_at_once(tmp_path):
    """Preemption without warning, scancel and `chainrun cancel`."""
    bench = Bench(tmp_path, limit=3600)
    bench.signals.terminated = True
    assert bench.look() == Wish("stop", "terminated")
    bench = Bench(tmp_path)
    (tmp_path / "STOP").touch()
    assert bench.look() == Wish("stop", "cancelled")


def test_no_periodic_save_is_due_while_one_is_under_way(tmp_path):
    """A disk slower than the interval gives fewer checkpoints, not a training that waits for it."""
    busy = [True]
    bench = Bench(tmp_path, every=900.0, saving=lambda: busy[0])
    assert bench.train(2000, step=1.0) is None
    busy[0] = False
    assert bench.train(2, step=1.0) == Wish("save", "periodic")


def test_periodic_saves_are_counted_from_the_last_save(tmp_path):
    """Every 15 minutes means 15 minutes after the last one, whoever asked for it."""
    bench = Bench(tmp_path, every=900.0)
    assert bench.train(890, step=1.0) is None
    bench.watch.saved()
    assert bench.train(890, step=1.0) is None
    assert bench.train(20, step=1.0) == Wish("save", "periodic")


def test_handlers_only_set_flags_and_only_in_the_process_that_installed_them():
    """A forked child that gets the signal decides nothing."""
    before = {s: signal.getsignal(s) for s in (signal.SIGUSR2, signal.SIGTERM)}
    try:
        signals = Signals().install()
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGUSR2)
            os._exit(int(signals.warned))
        assert os.waitpid(child, 0)[1] == 0
        assert not signals.warned
        os.kill(os.getpid(), signal.SIGUSR2)
        assert signals.warned
        assert not signals.terminated
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.terminated
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Told:
    """The agreement between ranks as a dict, in one process."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.asked, self.posts = ranks, {}, {}

    def of(self, rank: int) -> object:
        told = self

        class One:
            def ask(self, round_, wish):
                told.asked.setdefault(round_, wish)

            def announced(self, round_):
                return told.asked.get(round_)

            def post(self, round_, boundary):
                told.posts.setdefault(round_, {})[rank] = boundary

            def posted(self, round_):
                posts = told.posts.get(round_, {})
                return max(posts.values()) if len(posts) == told.ranks else None

        return One()


@pytest.mark.parametrize("seed", range(30))
def test_all_ranks_settle_on_one_boundary_in_any_interleaving(tmp_path, seed):
    """Whatever the order of the threads' turns, every rank stops at the same boundary, none has passed it."""
    draw = random.Random(seed)
    ranks = draw.choice([2, 3, 4])
    told = Told(ranks)
    benches = [Bench(tmp_path, agreement=told.of(rank)) for rank in range(ranks)]
    stopped: dict[int, int] = {}
    benches[draw.randrange(ranks)].signals.terminated = True
    for _ in range(10_000):
        rank = draw.randrange(ranks)
        bench = benches[rank]
        if draw.random() < 0.5:
            bench.watch._settle(bench.watch._agreement, bench.look())
        elif rank not in stopped:
            waits = bench.watch.pending and not bench.watch._decided.is_set()
            if not waits:
                bench.boundary += 1
                decided = bench.watch.pending and bench.watch._decided.is_set()
                if decided and bench.watch.decide(bench.boundary):
                    stopped[rank] = bench.boundary
        if len(stopped) == ranks:
            break
    assert len(stopped) == ranks
    assert len(set(stopped.values())) == 1


def test_three_real_ranks_save_and_stop_together_though_one_is_slow(tmp_path):
    """Saves that rank 0's clock asks for and cuts fall on common steps of three uneven ranks; each goes on exactly."""
    # no walltime: a busy machine may take longer than any to import torch three times
    described = {
        "function": f"{PROGRAMS / 'uneven.py'}:train",
        "dir": str(tmp_path / "runs"),
        "args": {"steps": 60, "trace": str(tmp_path / "trace")},
        "checkpoint": {"every": "0.3s"},
        "local": {"tasks": 3},
    }
    results = {}
    for name, cuts in (("cut", ["--interrupt-at", "30"]), ("whole", [])):
        described["args"]["trace"] = str(tmp_path / name)
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps({"name": name, **described}))
        command = [sys.executable, "-m", "chainrun", "run", str(file), *cuts]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
        results[name] = [(tmp_path / f"{name}.{rank}").read_text() for rank in range(3)]
    events = [json.loads(x) for x in (tmp_path / "runs/cut/journal.jsonl").read_text().splitlines()]
    assert sum(e["event"] == "segment" for e in events) == 2
    assert any(e.get("reason") == "periodic" for e in events)
    assert {e["world_size"] for e in events if e["event"] == "segment"} == {3}
    assert results["cut"] == results["whole"]
