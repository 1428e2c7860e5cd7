"""Sweeps: what a grid is, how its points are named, and that the end of one chain starts the next, once."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from chainrun import cli, experiment, sweep
from chainrun.errors import ExperimentError, UsageError
from chainrun.launch import group, slurm, submit
from chainrun.rundir import GroupDir, RunDir

TRAIN = """
import chainrun, torch

def train(run, lr=0.1, bad=0.0, text=""):
    weight = torch.nn.Linear(2, 2)
    run.register(weight=weight)
    for i in run.steps(3):
        if lr == bad:
            raise ValueError("a bad lr")
    return {"lr": lr, "seed": run.seed}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "train.py").write_text(TRAIN)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(text: str, *overrides: str) -> sweep.Sweep:
    Path("exp.yaml").write_text(f"function: train.py:train\nslurm: {{time: 1min}}\n{text}")
    return sweep.load("exp.yaml", overrides)


def names(text: str, *overrides: str) -> list[str]:
    return [point.name for point in load(text, *overrides).points]


def test_a_grid_is_every_combination_from_file_and_command_line(folder):
    """The last axis runs fastest; each point is a run of its own in the group's folder."""
    grid = ["lr=0.1,seed=0", "lr=0.1,seed=1", "lr=0.01,seed=0", "lr=0.01,seed=1"]
    assert names("sweep: {args.lr: [0.1, 0.01], seed: range(2)}") == grid
    assert names("", "args.lr=0.1,0.01", "seed=range(2)") == grid
    found = load("parallel: 3", "args.lr=0.1,0.01", "seed=range(2)")
    assert [(p.experiment.args, p.experiment.seed) for p in found.points][2] == ({"lr": 0.01}, 0)
    assert {p.experiment.run_dir.parent for p in found.points} == {folder / "runs" / "exp"}
    text = found.text()
    assert "4 chains: args.lr (2) x seed (2), 3 at once" in text


def test_one_value_ends_the_sweep_of_its_key(folder):
    """On the command line one value replaces those of the file, and without any the experiment is one run."""
    text = "sweep: {args.lr: [0.1, 0.01], seed: range(2)}"
    assert names(text, "seed=7") == ["lr=0.1", "lr=0.01"]
    found = load(text, "seed=7", "args.lr=1.0")
    assert (found.axes, [p.name for p in found.points]) == ({}, ["exp"])
    assert names(text, "args.lr=3,4", "seed=range(4,6)") == [
        "lr=3,seed=4",
        "lr=3,seed=5",
        "lr=4,seed=4",
        "lr=4,seed=5",
    ]


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("args.text='a,b'", ["a,b"]),
        ("args.text=[a, b]", [["a", "b"]]),
        ("args.text={a: 1, b: 2}", [{"a": 1, "b": 2}]),
        ("args.text=[a,b],[c]", [["a", "b"], ["c"]]),
        ("args.text=it's,fine", ["it's", "fine"]),
        ("args.text='a,b',c", ["a,b", "c"]),
        ("args.text=1e-2,true,null", [0.01, True, None]),
        ("args.text=range(3) of them", ["range(3) of them"]),
        ("sweep.args.text=[x, 'range(2)']", ["x", "range(2)"]),
    ],
)
def test_quotes_and_brackets_hold_one_value(override, values, folder):
    """A comma is between values only outside of quotes and brackets."""
    assert [point.experiment.args["text"] for point in load("", override).points] == values


def test_a_comma_belongs_to_the_value_of_other_keys(folder):
    """SLURM's lists stay what they are; any key can be swept by `sweep.KEY`."""
    found = load("", "slurm.partition=gpu,cpu")
    assert (found.axes, found.points[0].experiment.slurm.partition) == ({}, "gpu,cpu")
    assert names("", "sweep.slurm.nodes=[1, 2]") == ["nodes=1", "nodes=2"]


def test_names_are_safe_and_distinct(folder):
    """What a folder's name cannot hold is replaced, with a hash so that two values never share a name."""
    found = names("", "args.text='a/b','a b',-1,x", "args.lr=-0.5,1e-5")
    assert len(set(found)) == len(found)
    assert "text=-1,lr=-0.5" in found
    assert all("/" not in name and " " not in name for name in found)
    assert len(names("", f"args.text={'y' * 500},{'y' * 501}")) == 2


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("sweep: [1]", (), ["exp.yaml:3", "mapping"]),
        ("sweep: {args.lr: 0.1}", (), ["exp.yaml:3", "args.lr", "found 0.1", "[0.1, 0.01]"]),
        ("sweep: {seed: range(0)}", (), ["seed", "found []"]),
        ("sweep: {args.lr: [1, 1]}", (), ["found 1 twice"]),
        ("sweep: {name: [a, b]}", (), ["cannot be swept"]),
        ("sweep: {args.sead: [1, 2], sead: [1, 2]}", (), ["sead", "did you mean 'seed'"]),
        ("parallel: 0", ("seed=1,2"), ["parallel", "found 0"]),
        ("", ("parallel=many", "seed=1,2"), ["parallel", "found many"]),
        ("", ("args.lr=1,,2",), ["empty value", "quotes"]),
        ("", ("seed=1,x",), ["seed", "found x"]),
    ],
)
def test_a_mistake_in_a_grid_is_one_clear_error(text, overrides, words, folder):
    """It names the key, what was found and what is allowed, before anything exists."""
    with pytest.raises(ExperimentError) as error:
        load(text, *([overrides] if isinstance(overrides, str) else overrides))
    assert all(word in str(error.value) for word in words), error.value


def test_more_than_a_thousand_chains_are_to_be_confirmed(folder, capsys):
    """The number is shown, and nothing is written."""
    load("")
    assert cli.main(["run", "exp.yaml", "seed=range(1001)"]) == 2
    said = capsys.readouterr()
    assert "1001 chains" in said.out
    assert "--yes" in said.err
    assert not Path("runs").exists()
    sweep.confirm(load("", "seed=range(1001)"), confirmed=True)


def test_run_goes_on_after_a_point_that_fails(folder, capsys, monkeypatch):
    """One after the other; the exit code says that not all have finished, and again only those are run."""
    load("args: {bad: 0.1}")
    assert cli.main(["run", "exp.yaml", "args.lr=0.1,0.2"]) == 1
    said = capsys.readouterr()
    assert "1 of 2 have not finished: lr=0.1" in said.err
    found = GroupDir(folder / "runs" / "exp")
    assert [run.done.exists() for run in found.runs()] == [False, True]
    assert json.loads(found.runs()[1].result.read_text()) == {"lr": 0.2, "seed": 0}
    one, other = (run.code / "train.py" for run in found.runs())
    assert one.samefile(other)  # a thousand points have one copy of the project
    written = json.loads(found.sweep.read_text())
    assert written["axes"] == {"args.lr": [0.1, 0.2]}
    assert written["points"][1] == {"name": "lr=0.2", "values": {"args.lr": 0.2}}
    ran = []
    monkeypatch.setattr(group.local, "run_chain", lambda run, *_: ran.append(run.path.name) or 0)
    assert cli.main(["run", "exp.yaml", "args.lr=0.1,0.2,0.3"]) == 0
    assert ran == ["lr=0.1", "lr=0.3"]
    assert json.loads(found.sweep.read_text())["axes"] == {"args.lr": [0.1, 0.2, 0.3]}
    with pytest.raises(UsageError, match="is a group of runs"):
        submit.prepare(experiment.load("exp.yaml"), folder)
    assert cli.main(["cancel", "runs/exp"]) == 0
    assert [run.stop.exists() for run in found.runs()] == [True, False, True]


class Queue:
    """Stands for sbatch and squeue: notes what is submitted, in the order in which it is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.submitted: list[str] = []
        self.refuses = ""
        self.waiting: dict[str, tuple[str, str]] = {}
        monkeypatch.setattr(slurm, "need", lambda *commands: None)
        monkeypatch.setattr(
            slurm, "queue", lambda jobs, **_: {j: s for j, s in self.waiting.items() if j in jobs}
        )
        monkeypatch.setattr(submit, "submit_job", self.submit)

    def submit(self, run: RunDir, described: experiment.Experiment, after: object = ()) -> str:
        if self.refuses:
            raise submit.ClusterError(self.refuses)
        self.submitted.append(run.path.name)
        self.waiting[run.path.name] = ("PENDING", "")  # SLURM has a job before anybody can note its id
        submit.journal.record(run, "submitted", job=run.path.name)
        return run.path.name

    def end(self, run: RunDir, marker: Path | None = None) -> RunDir:
        """The chain ends; without a marker it was killed."""
        if marker is not None:
            marker.write_text("{}")
        self.waiting.pop(run.path.name, None)
        return run


@pytest.fixture
def queue(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Queue]:
    yield Queue(monkeypatch)


def start(*overrides: str) -> list[RunDir]:
    load("parallel: 2", *overrides)
    assert cli.main(["submit", "exp.yaml", *overrides]) == 0
    return GroupDir(Path("runs/exp").absolute()).runs()


def test_the_end_of_a_chain_submits_the_next_and_only_once(queue):
    """Done, failed, stopped and cancelled alike; a chain that looks twice, or starts, passes nothing on."""
    runs = start("seed=range(7)")
    assert queue.submitted == ["seed=0", "seed=1"]
    group.pass_on(runs[0])
    assert len(queue.submitted) == 2
    for n, marker in enumerate((runs[0].done, runs[1].failed, runs[2].halted, runs[3].stop)):
        queue.end(runs[n], marker)
        group.pass_on(runs[n])
        group.pass_on(runs[n])
        assert queue.submitted[2:] == [f"seed={k}" for k in range(2, 3 + n)]
    queue.end(runs[4])  # killed without a word: it tells nobody, and the other one that goes on sees it
    group.pass_on(runs[5])
    assert queue.submitted[-1] == "seed=6"
    queue.end(runs[5], runs[5].done)
    group.pass_on(runs[5])
    assert len(queue.submitted) == 7


def test_the_next_job_gets_nothing_that_this_one_put_into_the_environment(monkeypatch):
    """sbatch hands the environment on: a tracker's id of one run must not become the next one's."""
    monkeypatch.setattr(slurm, "begun", dict(os.environ))
    monkeypatch.setenv("WANDB_RUN_ID", "seed=0-1234")
    with submit._outside_of_any_job():
        assert "WANDB_RUN_ID" not in os.environ
    assert os.environ["WANDB_RUN_ID"] == "seed=0-1234"


def test_chains_that_end_at_the_same_time_start_different_points(queue):
    """Many at once, each on two ranks: as many new ones as have ended, none twice."""
    load("parallel: 8")
    assert cli.main(["submit", "exp.yaml", "seed=range(24)"]) == 0
    runs = GroupDir(Path("runs/exp").absolute()).runs()
    for run in runs[:8]:
        queue.end(run, run.done)
    gate = threading.Barrier(16)

    def pass_on(run: RunDir) -> None:
        gate.wait()
        group.pass_on(run)

    threads = [threading.Thread(target=pass_on, args=(run,)) for run in [*runs[:8], *runs[:8]]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(queue.submitted) == sorted(run.path.name for run in runs[:16])


def test_a_refusal_on_the_node_is_said_and_tried_again(queue, capsys):
    """Where sbatch is forbidden the group says which command goes on; the place is not lost."""
    runs = start("seed=range(4)")
    queue.end(runs[0], runs[0].done)
    queue.refuses = "sbatch is forbidden here"
    group.pass_on(runs[0])
    said = capsys.readouterr().err
    assert "seed=2 of the same group could not be submitted: sbatch is forbidden here" in said
    halted = json.loads(GroupDir(runs[0].path.parent).halted.read_text())
    assert halted["why"] == "sbatch is forbidden here"
    queue.refuses = ""
    queue.end(runs[1], runs[1].done)
    group.pass_on(runs[1])
    assert queue.submitted == ["seed=0", "seed=1", "seed=2", "seed=3"]


def test_submitting_again_fills_up_and_lets_failed_points_go_on(queue, capsys):
    """Points that are done or on their way are left alone, and no more than `parallel` are on their way."""
    runs = start("seed=range(5)")
    queue.end(runs[0], runs[0].done)
    queue.end(runs[1], runs[1].failed)
    assert cli.main(["submit", "exp.yaml", "seed=range(5)"]) == 0
    assert queue.submitted == ["seed=0", "seed=1", "seed=1", "seed=2"]
    assert "seed=0: is done" in capsys.readouterr().out
    group.pass_on(runs[0])
    assert len(queue.submitted) == 4
    assert cli.main(["submit", "exp.yaml", "seed=range(5)"]) == 0
    assert len(queue.submitted) == 4
    queue.end(runs[2], runs[2].done)
    group.pass_on(runs[2])
    assert queue.submitted[-1] == "seed=3"


def test_cancel_of_a_group_starts_no_further_point(queue, monkeypatch):
    """Those that wait for their turn are cancelled too, and the end of a chain starts none of them."""
    monkeypatch.setattr(slurm, "cancel", lambda job: slurm.Answer(True, ""))
    runs = start("seed=range(4)")
    queue.waiting.clear()
    assert cli.main(["cancel", "runs/exp"]) == 0
    assert all(run.stop.exists() for run in runs)
    group.pass_on(runs[0])
    assert queue.submitted == ["seed=0", "seed=1"]
