"""Typical mistakes, in the order in which people make them: one message each, and no traceback.

A message names the thing, says what was found, and what to do; each case here has the three in its pattern. Cases
are commands as a person types them; what fails in the function is run in this process as a segment of a job is.
Others are held elsewhere: a full disk, a checkpoint that fits no more, SLURM's refusals (test_faults.py,
test_commands.py, test_doctor.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

from chainrun import breakers, cli, experiment, journal
from chainrun.allocation import Allocation
from chainrun.launch import submit
from chainrun.lock import Lock
from chainrun.rundir import RunDir
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

FUNCTIONS = Path(__file__).parent / "faults" / "mistakes.py"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder as a user has it, to be in; what a segment exports is undone."""
    before = dict(os.environ)
    shutil.copy(FUNCTIONS, tmp_path / "train.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "train", raising=False)  # of another test in this process
    (tmp_path / "exp.yaml").write_text("name: exp\nfunction: train.py:train\nslurm: {time: 1h}\n")
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def said(capsys: pytest.CaptureFixture[str], words: str, code: int) -> str:
    """Run a command; return what it said, which is one message without a traceback."""
    capsys.readouterr()
    try:
        found = cli.main(words.split())
    except SystemExit as ended:  # argparse
        found = int(ended.code or 0)
    out, err = capsys.readouterr()
    assert found == code, out + err
    assert "Traceback" not in err
    assert err.count("chainrun: ") == 1, err
    return err


# the command, and the one message: the thing, what was found, what to do
COMMANDS = {
    "a key with a typing error": (
        "run exp.yaml slurm.tiem=2h",
        r"slurm\.tiem: unknown key \(did you mean 'time'\?\); allowed: time, nodes,",
    ),
    "an unknown section": (
        "run exp.yaml chekpoint.keep=3",
        r"chekpoint: unknown key \(did you mean 'checkpoint'\?\)",
    ),
    "a value of the wrong type": (
        "run exp.yaml seed=many",
        r"seed: found many; allowed: a whole number, at least 0",
    ),
    "tasks below 1": (
        "run exp.yaml local.tasks=0",
        r"local\.tasks: found 0; allowed: a whole number, at least 1",
    ),
    "a duration without a unit that exists": (
        "run exp.yaml checkpoint.every=4x",
        r"checkpoint\.every: found 4x.*; allowed: a duration such as 2d, 4h",
    ),
    "a walltime below SLURM's unit": (
        "submit exp.yaml slurm.time=30s",
        r"slurm\.time: found 30s.*shorter than SLURM's unit, 1min; allowed: ",
    ),
    "an override without a value": ("run exp.yaml args.lr", r"override args\.lr: found no key=value"),
    "a handoff that there is not": (
        "run exp.yaml chain.handoff=restart",
        r"chain\.handoff: found restart; allowed: auto \| requeue \| resubmit \| ahead",
    ),
    "an experiment file that is not there": (
        "run exp.yml",
        r"exp\.yml: .*No such file or directory \(did you mean 'exp\.yaml'\?\)",
    ),
    "the Python file in place of the experiment": ("run train.py", r"train\.py: .*(YAML|mapping)"),
    "a function file that is not there": (
        "run exp.yaml function=trian.py:train",
        r"function: no file .*trian\.py \(did you mean 'train\.py'\?\)",
    ),
    "a function that is not there": (
        "run exp.yaml function=train.py:trian",
        r"function: found no trian at the top level of .*train\.py \(did you mean 'train'\?\); allowed: ",
    ),
    "an argument that the function has not": (
        "run exp.yaml args.learning_rate=1",
        r"args\.learning_rate: unknown argument of train in .*; allowed: lr, steps, width",
    ),
    "a directory below a file": (
        "run exp.yaml dir=train.py",
        r"the run directory .*/train\.py/exp cannot be written: .*; choose another with dir=PATH",
    ),
    "cuts that are no steps": (
        "run exp.yaml --interrupt-at 0,x",
        r"--interrupt-at 0,x: give global steps from 1 on, separated by commas",
    ),
    "a walltime in words": (
        "run exp.yaml --walltime soon",
        r"--walltime: found 'soon'; allowed: a duration such as 2d",
    ),
    "fewer jobs than one": ("submit exp.yaml --jobs 0", r"--jobs 0: at least 1 is needed"),
    "too few steps to verify": (
        "verify exp.yaml --steps 1",
        r"--steps 1: at least 2 are needed, one before the cut and one after",
    ),
    "a run that is not there": (
        "show runs/exq",
        r"runs/exq is not a run directory: it does not exist; give the folder",
    ),
    "a folder without runs": ("status .", r"there is no run in \.; `chainrun run` and `submit` make one"),
    "a step in place of a checkpoint": (
        "export 420 -o weights.safetensors",
        r"there is no checkpoint .*420",
    ),
    "cancel of the experiment file": (
        "cancel exp.yaml",
        r"exp\.yaml is not a run directory: .*; give the folder",
    ),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_mistake_on_the_command_line_is_one_message(what, capsys, folder):
    """Exit code 2, or 1 where a file is wrong; nothing was made."""
    words, message = COMMANDS[what]
    err = said(capsys, words, 1 if what == "a step in place of a checkpoint" else 2)
    assert re.search(message, err), err
    assert not (folder / "runs").exists()


def test_submit_without_a_time_limit(capsys, monkeypatch, folder):
    """SLURM's default would be anybody's guess: the key is named, with an example."""
    monkeypatch.setattr("chainrun.launch.slurm.need", lambda *commands: None)
    (folder / "exp.yaml").write_text("name: exp\nfunction: train.py:train\n")
    err = said(capsys, "submit exp.yaml", 2)
    assert "slurm.time is missing: how long may one job run? For example slurm.time=4h" in err


def test_submit_where_there_is_no_slurm(capsys, monkeypatch, folder):
    """The missing command, and what works without it."""
    monkeypatch.setenv("PATH", str(folder))
    assert re.search(
        r"SLURM's sbatch is not on PATH: submit from a login node .*`chainrun run`",
        said(capsys, "submit exp.yaml", 2),
    )


def test_run_on_a_run_that_is_running(capsys, folder):
    """Who has it, and how to see or end it."""
    run, _ = submit.prepare(experiment.load(folder / "exp.yaml"), folder)
    lock = Lock(run, "4711", 0)
    lock.acquire()
    try:
        err = said(capsys, "run exp.yaml", 2)
    finally:
        lock.release()
    assert re.search(r"runs/exp is being trained now, by job 4711 on .*`chainrun cancel", err), err


def test_run_with_a_changed_experiment(capsys, folder):
    """What has changed, from what to what, and the three ways on."""
    submit.prepare(experiment.load(folder / "exp.yaml"), folder)
    err = said(capsys, "run exp.yaml args.lr=0.5", 2)
    assert re.search(
        r"was started with another experiment:\n  args\.lr: .* -> 0\.5\n.*another name or dir, or give --override",
        err,
    )


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ({"format": 99, "version": "9.9"}, r"has format 99, made by chainrun 9\.9; .*reads format 1: go on with the chainrun that made it, or a newer"),
        ({"format": 0, "version": "0.0"}, r"has format 0, made by chainrun 0\.0; .*go on with chainrun 0\.0, or start a new run"),
        ({"format": "x"}, r"has format x, made by chainrun \(unknown version\)"),
    ],
)  # fmt: skip
def test_a_run_that_another_chainrun_made(first, message, capsys, folder):
    """Every command and a job that starts say the format, who made it and what to do; nothing is written."""
    run, _ = submit.prepare(experiment.load(folder / "exp.yaml"), folder)
    lines = run.journal.read_text().splitlines()
    assert json.loads(lines[0])["format"] == 1
    run.journal.write_text(
        json.dumps({**json.loads(lines[0]), "version": None, **first}).replace(', "version": null', "") + "\n"
    )
    before = {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()}
    for words in ("run exp.yaml", "show runs/exp", "logs runs/exp", "status runs/exp", "cancel runs/exp"):
        assert re.search(message, said(capsys, words, 2)), words
    assert cli.main(["status"]) == 0  # beside others it is listed
    assert re.search(message, capsys.readouterr().out)
    outcome = run_segment(run, Allocation(scheduler="local", job="1"), Signals())
    assert (outcome.kind, bool(re.search(message, outcome.reason))) == ("locked", True)
    assert {path.name: path.read_bytes() for path in run.path.iterdir() if path.is_file()} == before


def test_a_run_from_before_formats_were_recorded_is_format_1(capsys, folder):
    """Its first event says nothing about it, and it is read."""
    run, _ = submit.prepare(experiment.load(folder / "exp.yaml"), folder)
    run.journal.write_text(json.dumps({"time": 1.0, "event": "created", "id": "exp-1"}) + "\n")
    assert cli.main(["status"]) == 0


# the function, how the segment ends, and the one message
FAILURES = {
    "torch's own loader": (
        "plain_loader",
        r"register\(loader=\.\.\.\) was given a torch\.utils\.data\.DataLoader, .*; build it as chainrun\.DataLoader",
    ),
    "batches out of order": ("out_of_order", r"in_order=False.*"),
    "a model that is not registered": (
        "forgot_the_model",
        r"'optimizer' trains 2 parameters, the first of shape \(1, 1\), that no registered object holds; .*Register the module they belong to",
    ),
    "a list in place of a module": (
        "a_list_of_modules",
        r"register\(models=\.\.\.\) was given a list, which has no state_dict and load_state_dict; .*run\.state",
    ),
    "a value that cannot be saved": ("unsaveable", r"state\.best is a (builtins\.)?object"),
    "ranges inside each other": ("nested", r"run\.epochs\(\) inside run\.epochs\(\) or run\.steps\(\) cannot be resumed; use one"),
    "one object under two names": ("two_names", r"register\(ema=\.\.\.\) was given the object that is registered as 'model'; register it once"),
}  # fmt: skip


def segment(function: str, folder: Path, *overrides: str, cut: tuple[int, ...] = (), ranks: int = 1):
    """Carry the run through one segment in this process."""
    described = experiment.load(folder / "exp.yaml", [f"function=train.py:{function}", *overrides])
    run, _ = submit.prepare(described, folder, override=True)
    allocation = Allocation(scheduler="local", job="1", interrupt_at=frozenset(cut))
    return run, run_segment(run, allocation, Signals())


@pytest.mark.parametrize("what", FAILURES)
def test_a_mistake_in_the_function_is_one_message(what, folder, capsys):
    """The run fails with it, in its log, in FAILED and in the journal, and without chainrun's own frames."""
    function, message = FAILURES[what]
    run, outcome = segment(function, folder, "checkpoint.every={steps: 1}")
    assert outcome.kind == "failed"
    for text in (
        outcome.reason,
        run.failed.read_text(),
        journal.last(run, "failed")["error"],
        capsys.readouterr().err,
    ):
        assert re.search(message, text), text
        assert "Traceback" not in text


WARNINGS = {
    "a loop without a boundary": (
        "no_boundary",
        r"no_boundary\(\) returned without one step boundary, .*; call run\.step\(\) after every optimizer step",
    ),
    "nothing is registered": (
        "forgot_everything",
        r"nothing is registered, so a checkpoint holds no weights .*; call run\.register\(model=\.\.\.",
    ),
    "steps outside of every range": (
        "outside",
        r"run\.step\(\) is called outside of run\.epochs\(\), .*Use run\.epochs\(\) or run\.steps\(\)",
    ),
}


@pytest.mark.parametrize("what", WARNINGS)
def test_what_would_not_resume_well_is_one_warning(what, folder, capsys):
    """In the log, and in the journal for `chainrun run` and `show`; the run itself ends well."""
    function, message = WARNINGS[what]
    run, outcome = segment(function, folder, "checkpoint.every={steps: 2}")
    assert outcome.kind == "done"
    (warning,) = journal.events(run, "warning")
    assert re.search(message, warning["reason"]), warning
    assert capsys.readouterr().err.count(f"warning: {warning['reason']}") == 1


def test_a_correct_function_is_warned_of_nothing(folder, capsys):
    """The warnings are for mistakes."""
    run, outcome = segment("train", folder, "checkpoint.every={steps: 2}")
    assert (outcome.kind, list(journal.events(run, "warning"))) == ("done", [])
    assert "warning" not in capsys.readouterr().err


def test_a_resume_that_does_not_fit(folder, capsys):
    """Another shape, another number of ranks, a checkpoint removed by hand: refused, and the run is not begun again."""
    run, outcome = segment("train", folder, cut=(2,))
    assert outcome.kind == "stopped"
    _, outcome = segment("train", folder, "args.width=2")
    assert re.search(
        r"the module 'model' is not the one that was saved: .*weight has shape \(2, 1\), in the checkpoint \(1, 1\)",
        outcome.reason,
    )
    shutil.rmtree(run.checkpoint(2))
    _, outcome = segment("train", folder)
    assert re.search(
        r"holds no checkpoint, but one was committed at step 2 and has been removed since.*bring it back, or start",
        outcome.reason,
    )
    assert not RunDir(folder / "runs" / "exp").done.exists()


def test_a_walltime_that_comes_before_a_boundary(folder, capsys):
    """Exit code 1; what the walltime came before, which calls are missing, and the command that goes on."""
    capsys.readouterr()
    assert cli.main(["run", "exp.yaml", "function=train.py:never", "--walltime", "3s"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert re.search(
        r"killed before it could save; no checkpoint had been written; its walltime came before a step boundary: call "
        r"run\.step\(\) after every optimizer step .*\(--walltime\); to go on: chainrun run .*/exp/experiment\.yaml",
        err,
    )


def test_jobs_that_slurm_ended_at_their_walltime_are_told_apart_from_crashes(folder):
    """The chain stops after two of them, and says which calls are missing."""
    run, _ = submit.prepare(experiment.load(folder / "exp.yaml"), folder)
    for job in ("1", "2"):
        journal.record(run, "start", job=job, restart=0, nodes=["node1"], gpus=0)
        journal.record(run, "segment", segment=int(job), job=job, resumed=False, step=0)
        journal.record(run, "lost", job=job, restart=0, segment=int(job), state="TIMEOUT", last_seen=0.0)
    trip = breakers.tripped(run, experiment.load(folder / "exp.yaml").chain)
    assert trip is not None
    assert re.search(
        r"2 segments in a row .*killed at its walltime before .* call run\.step\(\) .*slurm\.time", trip.why
    )
