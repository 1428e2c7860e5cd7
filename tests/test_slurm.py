"""Chains on a real SLURM: real walltimes, real requeues, real cancels."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm_cluster import ENVIRONMENT, Cluster, beside

sys.path.insert(0, str(Path(__file__).parent / "programs"))
import fingerprint

# in one group, so that what `beside` starts runs beside the others; `running` starts it
pytestmark = [pytest.mark.slurm, pytest.mark.xdist_group("slurm"), pytest.mark.usefixtures("running")]
PROGRAMS = Path(__file__).parent / "programs"


class Chain:
    """One run, driven by the command line."""

    def __init__(self, cluster, folder: Path, **keys) -> None:
        self.cluster, self.folder = cluster, folder
        self.run = folder / "runs" / "chain"
        self.trace = folder / "trace"
        described = {
            "name": "chain",
            "function": f"{PROGRAMS / 'chained.py'}:train",
            "dir": str(folder / "runs"),
            **keys,
        }
        described["args"] = {"trace": str(self.trace), **described["args"]}
        self.file = folder / "chain.yaml"
        self.file.write_text(json.dumps(described))

    def command(self, *words: str, code: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "chainrun", *words],
            env=self.cluster.env,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def submit(self) -> str:
        self.command("submit", str(self.file))
        return self.events("submitted")[-1]["job"]

    def events(self, *kinds: str) -> list[dict]:
        journal = self.run / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []
        return [line for line in lines if not kinds or line["event"] in kinds]

    def wait(self, condition, seconds: float, what: str) -> None:
        """Wait for a condition, twice as long as it takes on a machine that has other things to do too."""
        until = time.monotonic() + 2 * seconds
        while not condition():
            if time.monotonic() > until:
                logs = "\n".join(
                    f"== {p.name}\n{p.read_text()}" for p in sorted(self.run.glob("jobs/*_log.*"))
                )
                pytest.fail(f"{what} did not happen within {seconds} s\n{self.events()}\n{logs}")
            time.sleep(0.3)

    def wait_done(self, seconds: float) -> None:
        over = [self.run / "DONE", self.run / "FAILED"]
        self.wait(lambda: any(marker.exists() for marker in over), seconds, "the end of the run")
        assert over[0].exists(), over[1].read_text()


def plain(folder: Path, epochs: int, ranks: int = 1) -> Path:
    """Run the plain program without interruption; return where its trace is."""
    trace = folder / "plain"
    environment = {k: v for k, v in ENVIRONMENT.items() if not k.startswith("SLURM_")}
    processes = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for rank in range(ranks):
        if ranks > 1:
            environment |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
            environment |= {"MASTER_PORT": str(port)}
        command = [sys.executable, str(PROGRAMS / "plain.py"), str(trace), str(epochs)]
        processes.append(subprocess.Popen(command, env=dict(environment)))
    assert [process.wait(400) for process in processes] == [0] * ranks
    return trace


def assert_same(chain: Chain, reference: Path, ranks: int = 1) -> None:
    for rank in range(ranks):
        mine = fingerprint.read(chain.trace.with_suffix(f".{rank}"))
        assert mine == fingerprint.read(reference.with_suffix(f".{rank}"))


def test_a_job_that_finds_the_run_done_leaves_at_once(slurm_cluster, tmp_path):
    """A restart of a finished run does nothing and exits with 0."""
    chain = Chain(slurm_cluster, tmp_path, args={"epochs": 1}, slurm={"time": "5min"})
    job = chain.submit()
    chain.wait_done(60)
    slurm_cluster.wait_job(job, {"COMPLETED"}, 30)
    before = chain.events()
    slurm_cluster.run("scontrol", "requeue", job)
    slurm_cluster.wait_job(job, {"PENDING", "RUNNING"}, 30)
    slurm_cluster.wait_job(job, {"COMPLETED"}, 60)
    assert chain.events() == before
    assert "is done" in chain.command("submit", str(chain.file))


def test_scancel_and_cancel_stop_the_chain_for_good_and_submit_goes_on_exactly(slurm_cluster, tmp_path):
    """A cancelled run is saved, not requeued; submitted again it ends as if nothing had happened."""
    reference = plain(tmp_path, 5)
    told = tmp_path / "told"
    chain = Chain(
        slurm_cluster,
        tmp_path,
        args={"epochs": 5, "nap": 0.25},
        slurm={"time": "5min"},
        notify=f'echo "$CHAINRUN_EVENT: $CHAINRUN_MESSAGE" >> {told}',
    )
    job = chain.submit()
    chain.wait(lambda: (chain.trace.with_suffix(".0")).exists(), 60, "the first step")
    slurm_cluster.run("scancel", job)
    slurm_cluster.wait_job(job, {"CANCELLED"}, 30)
    time.sleep(8)  # longer than a requeue would take
    assert slurm_cluster.job(job)["JobState"] == "CANCELLED"
    assert chain.events("stop")[-1]["reason"] == "terminated"
    assert "scancel" in chain.events("handoff")[-1]["refused"]

    job = chain.submit()
    chain.wait(lambda: len(chain.events("segment")) == 2, 60, "the second segment")
    time.sleep(2)
    before = (
        told.read_text().splitlines() if told.exists() else []
    )  # SLURM may have killed the job before it could
    assert "is cancelled" in chain.command("cancel", str(chain.run))
    (line,) = told.read_text().splitlines()[len(before) :]
    assert line.startswith("stopped: the run was cancelled")
    assert chain.events("stop")[-1]["reason"] == "cancelled"
    assert "cancelled" in chain.command("status", str(chain.run))

    chain.submit()
    chain.wait_done(90)
    assert_same(chain, reference)


def test_a_function_that_raises_fails_the_run_with_its_traceback(slurm_cluster, tmp_path):
    """The job fails, nothing is requeued, and the journal and the log hold the user's own frames."""
    chain = Chain(
        slurm_cluster,
        tmp_path,
        args={"epochs": 2, "fail_at": 3},
        slurm={"time": "5min"},
        notify=f'echo "$CHAINRUN_EVENT: $CHAINRUN_MESSAGE" >> {tmp_path}/told',
    )
    job = chain.submit()
    chain.wait((chain.run / "FAILED").exists, 60, "the failure")
    slurm_cluster.wait_job(job, {"FAILED"}, 30)
    failed = chain.events("failed")[-1]
    assert failed["error"] == "ValueError: planted at step 3"
    assert "chained.py" in failed["traceback"]
    assert (tmp_path / "told").read_text() == "failed: ValueError: planted at step 3\n"
    assert "planted at step 3" in chain.command("logs", str(chain.run))
    assert "failed" in chain.command("status", str(chain.run))


def test_a_chain_ends_when_a_limit_of_its_own_is_reached(slurm_cluster, tmp_path):
    """With max_segments reached the run stops with a checkpoint, exit code 75, and the command that goes on."""
    chain = Chain(
        slurm_cluster,
        tmp_path,
        args={"epochs": 20, "nap": 0.3},
        chain={"max_segments": 1},
        slurm={"time": "5min"},
    )
    job = chain.submit()
    chain.wait(lambda: (chain.trace.with_suffix(".0")).exists(), 60, "the first step")
    slurm_cluster.run("scancel", "--signal=USR2", job)
    slurm_cluster.wait_job(job, {"FAILED"}, 30)
    assert slurm_cluster.job(job)["ExitCode"].startswith("75")
    assert chain.events("stop")[-1]["reason"] == "signal"
    assert "max_segments is 1" in chain.events("handoff")[-1]["refused"]
    assert "to go on: chainrun submit" in chain.command("logs", str(chain.run))


def test_a_chain_submitted_from_python_gives_its_result(slurm_cluster, tmp_path):
    """`chainrun.submit` returns a handle that waits for the run and has what the function returned."""
    code = f"""
import chainrun
chain = chainrun.submit({str(PROGRAMS / "chained.py:train")!r}, name="python", dir="runs",
    args={{"trace": {str(tmp_path / "trace")!r}, "epochs": 1}}, slurm={{"time": "5min"}})
assert chain.state in ("queued", "running"), chain.state
assert chain.wait(90) == "done"
print(chain.result(), chain.checkpoints[0].step)
"""
    done = slurm_cluster.run(sys.executable, "-c", code, cwd=tmp_path, timeout=120)
    assert "weights" in done.stdout
    assert done.stdout.split()[-1] == "12"


def test_dry_run_shows_the_script_with_every_option(slurm_cluster, tmp_path):
    """What SLURM would be given can be read before it is given."""
    chain = Chain(
        slurm_cluster,
        tmp_path,
        args={"epochs": 1},
        slurm={"time": "4h", "setup": ["module load x"], "extra": {"constraint": "a100"}},
    )
    text = chain.command("submit", str(chain.file), "--dry-run")
    for line in ("--time=240", "--requeue", "--signal=USR2@120", "--constraint=a100", "module load x"):
        assert line in text
    assert not chain.run.exists()


SWEPT = """
import pathlib, time
import torch
import chainrun

def train(run, lr, folder):
    weight = torch.nn.Linear(2, 2)
    run.register(weight=weight)
    for i in run.steps(4):
        if lr == 0.2:
            raise ValueError("a bad lr")
        if i == 0:  # which are on their way at the same time
            pathlib.Path(folder, f"began-{lr}-{run.segment}").write_text(str(time.time()))
    return {"lr": lr, "code": CODE}

CODE = "as submitted"
"""


def test_a_sweep_of_frozen_code_runs_point_after_point(slurm_cluster, tmp_path):
    """The end of each chain submits the next, a failed one too; what the user edits meanwhile does not matter."""
    (tmp_path / "swept.py").write_text(SWEPT)
    chain = Chain(slurm_cluster, tmp_path, args={"folder": str(tmp_path)}, slurm={"time": "5min"})
    described = json.loads(chain.file.read_text()) | {"function": "swept.py:train"}
    described["args"] = {"folder": str(tmp_path)}
    chain.file.write_text(json.dumps(described))
    said = chain.command("submit", str(chain.file), "args.lr=0.1,0.2,0.3", "parallel=1")
    assert "3 chains: args.lr (3), 1 at once" in said
    (tmp_path / "swept.py").write_text("this is no Python\n")
    points = [chain.run / f"lr={lr}" for lr in (0.1, 0.2, 0.3)]
    chain.wait(lambda: (points[0] / "FAILED").exists() or (points[0] / "DONE").exists(), 200, "the first end")
    (tmp_path / "swept.py").unlink()
    chain.run = points[2]
    chain.wait_done(300)
    assert [(point / "DONE").exists() for point in points] == [True, False, True]
    assert "a bad lr" in (points[1] / "FAILED").read_text()
    for point, lr in ((points[0], 0.1), (points[2], 0.3)):
        assert json.loads((point / "result.json").read_text()) == {"lr": lr, "code": "as submitted"}
    submitted = [
        [
            line["time"]
            for line in map(json.loads, (point / "journal.jsonl").read_text().splitlines())
            if line["event"] == "submitted"
        ]
        for point in points
    ]
    assert [len(times) for times in submitted] == [1, 1, 1]
    ended = json.loads((points[0] / "journal.jsonl").read_text().splitlines()[-1])
    assert ended["event"] == "done"
    assert ended["time"] <= submitted[1][0] < submitted[2][0]


# ---- these wait for minutes, beside the others


@beside
def test_walltimes_cut_one_process_and_two_nodes_and_both_equal_the_plain_program(tmp_path):
    """Jobs with a one-minute limit are cut by it at least twice and requeued, and nothing shows in the bits."""
    with Cluster.own() as cluster:
        (tmp_path / "one").mkdir()
        (tmp_path / "two").mkdir()
        # 120 steps of more than a second: more than two walltimes, on the fastest machine too
        one = Chain(
            cluster,
            tmp_path / "one",
            args={"epochs": 10, "nap": 1.05},
            slurm={"time": "1min"},
            notify=f'echo "$CHAINRUN_EVENT at $CHAINRUN_STEP: $CHAINRUN_MESSAGE" >> {tmp_path}/told',
        )
        two = Chain(
            cluster,
            tmp_path / "two",
            args={"epochs": 20, "nap": 1.05},
            slurm={"time": "1min", "nodes": 2, "tasks_per_node": 1},
        )
        for chain in (one, two):
            chain.submit()
        follow = [sys.executable, "-m", "chainrun", "logs", "-f", "--rank", "1", str(two.run)]
        with open(tmp_path / "followed", "w") as file:
            follower = subprocess.Popen(follow, stdout=file, stderr=file)
        references = plain(tmp_path / "one", 10), plain(tmp_path / "two", 20, ranks=2)
        for chain in (one, two):
            chain.wait_done(400)
        for chain, reference, ranks in ((one, references[0], 1), (two, references[1], 2)):
            assert_same(chain, reference, ranks)
            segments = chain.events("segment")
            assert len(segments) >= 3
            assert [s["restart"] for s in segments] == list(range(len(segments)))
            assert {s["world_size"] for s in segments} == {ranks}
            assert {s["reason"] for s in chain.events("stop")} == {"walltime"}
            assert {h["how"] for h in chain.events("handoff")} == {"requeue"}
            metrics = [json.loads(line) for line in (chain.run / "metrics.jsonl").read_text().splitlines()]
            assert [line["step"] for line in metrics] == list(range(1, len(metrics) + 1))
            saves = {event["step"]: event["seconds"] for event in chain.events("checkpoint")}
            for stop in chain.events("stop")[1:]:  # the first one learns
                assert stop["unused_seconds"] < saves[stop["step"]] + stop["lead"]["gap"] + 15
        log = one.command("logs", str(one.run))
        assert "segment 1: fresh start" in log
        assert "segment 3: resuming at step" in log
        assert follower.wait(30) == 0
        rank_1 = two.command("logs", str(two.run), "--rank", "1")
        followed = (tmp_path / "followed").read_text().removesuffix("chainrun: the run is done\n")
        said, shown = (
            [
                line for line in text.splitlines() if not line.startswith("submitit INFO")
            ]  # may come after the end
            for text in (rank_1, followed)
        )
        assert said == shown
        for chain, text in ((one, log), (two, rank_1)):
            marks = [line for line in text.splitlines() if line.startswith("────")]
            assert len(marks) == len(chain.events("segment"))
            for mark, start, stop in zip(
                marks[1:], chain.events("segment")[1:], chain.events("stop"), strict=True
            ):
                assert mark.startswith(f"──── segment {start['segment']} · job {start['job']} on ")
                assert mark.endswith(f"the one before: walltime at step {stop['step']}, requeued ────")
        assert "done" in one.command("status", str(one.run))
        segments = len(one.events("segment"))
        one.wait(lambda: one.events("notified"), 30, "the notification")
        told = (tmp_path / "told").read_text()
        assert told == f"finished at 120: done after 120 steps and {segments} segments\n"


@beside
def test_a_job_submitted_ahead_goes_on_and_none_is_left_over(tmp_path):
    """With handoff: ahead the next job waits in the queue from the start; the surplus one is cancelled."""
    with Cluster.own() as cluster:
        reference = plain(tmp_path, 4)
        chain = Chain(
            cluster,
            tmp_path,
            args={"epochs": 4, "nap": 0.25},
            chain={"handoff": "ahead"},
            slurm={"time": "5min"},
        )
        first = chain.submit()
        chain.wait(lambda: (chain.trace.with_suffix(".0")).exists(), 60, "the first step")
        assert len(chain.events("submitted")) == 2
        cluster.run("scancel", "--signal=USR2", first)
        chain.wait_done(90)
        assert_same(chain, reference)
        assert [e["how"] for e in chain.events("handoff")] == ["ahead"]
        jobs = [e["job"] for e in chain.events("submitted")]
        assert [e["job"] for e in chain.events("segment")] == jobs[:2]
        cluster.wait_job(jobs[2], {"CANCELLED"}, 30)
