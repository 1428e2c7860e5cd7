"""The commands as a person types them: what they say, how they end, and what is true afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from chainrun import cli, experiment
from chainrun.allocation import Allocation
from chainrun.checkpoint.store import Store, flaw
from chainrun.launch import cancel, submit
from chainrun.rundir import RunDir
from chainrun.segment import Outcome, run_segment
from chainrun.training.stop import Signals

FAULTS = Path(__file__).parent / "faults"
sys.path.insert(0, str(FAULTS))
import train as training  # noqa: E402

pytestmark = pytest.mark.xdist_group("commands")  # `finished` is made once, not in each test process

STARTED: list[subprocess.Popen] = []


class Exp:
    """An experiment file, its run, and the commands on it."""

    def __init__(self, folder: Path, function: str = "train.py:train", **keys) -> None:
        self.folder = folder
        self.run = RunDir(folder / "runs" / "exp")
        self.trace = folder / "trace"
        self.keys = {"function": f"{FAULTS}/{function}", "dir": str(folder / "runs"), **keys}
        if function == "train.py:train":
            self.keys["args"] = {"trace": str(self.trace), **self.keys.get("args", {})}
        self.file = folder / "exp.yaml"
        self.file.write_text(json.dumps(self.keys))

    def start(self, *words: str, **options) -> subprocess.Popen:
        """Start `chainrun run` in a process group of its own; its output goes to FOLDER/log."""
        command = [sys.executable, "-m", "chainrun", "run", str(self.file), *words]
        return self.popen(command, **options)

    def popen(self, command: list[str], **options) -> subprocess.Popen:
        with open(self.folder / "log", "a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, **options)
        STARTED.append(process)
        return process

    def finish(self, *words: str, code: int = 0, **options) -> str:
        """Run `chainrun run` to its end; return what it said."""
        found = self.start(*words, **options).wait(300)
        said = self.said()
        assert found == code, said
        (self.folder / "log").unlink()
        return said

    def said(self) -> str:
        return (self.folder / "log").read_text()

    def events(self, *kinds: str) -> list[dict]:
        lines = self.run.journal.read_text().splitlines() if self.run.journal.exists() else []
        return [event for event in map(json.loads, lines) if not kinds or event["event"] in kinds]

    def segment(self, *overrides: str) -> Outcome:
        """Carry the run through one segment in this process."""
        described = experiment.load(self.file, overrides)
        run, how = submit.prepare(described, self.folder, override=True)
        assert how != "done"
        segment = len(self.events("segment"))
        return run_segment(run, Allocation(scheduler="local", job=f"test{segment}"), Signals())


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Undo what a segment in this process exports; end what a test that failed has left running."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(condition: Callable[[], object], what: str, process: subprocess.Popen, exp: Exp) -> None:
    """Wait until something is true of a running chain."""
    until = time.monotonic() + 60
    while not condition():
        if time.monotonic() > until or process.poll() is not None:
            pytest.fail(f"{what} did not happen (exit code {process.poll()}):\n{exp.said()}")
        time.sleep(0.02)


def steps_done(exp: Exp) -> int:
    path = Path(f"{exp.trace}.0")
    return path.read_text().count("\n") if path.exists() else 0


def main(capsys: pytest.CaptureFixture[str], *words: str, code: int) -> str:
    """Run a command in this process; return what it said."""
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == code
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return said.out + said.err


def group_is_empty(process: subprocess.Popen) -> bool:
    """Whether no live process of a group is left; zombies nobody waits for do not count."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == process.pid and fields[0] not in "ZX":
            return False
    return True


# ---- wrong input: exit code 2, and nothing has run


BROKEN = {
    "broken YAML": (
        "name: [x\nfunction: f.py:f\n",
        r"exp\.yaml: not valid YAML \(line 2, column \d+\): ",
    ),
    "an unknown key": (
        "function: functions.py:loops\ncheckpoint: {evry: 5}\n",
        r"exp\.yaml:2: checkpoint\.evry: unknown key \(did you mean 'every'\?\); allowed: every, keep, keep_every",
    ),
    "a wrong type": (
        "function: functions.py:loops\nseed: many\n",
        r"exp\.yaml:2: seed: found many; allowed: a whole number, at least 0",
    ),
    "a missing function": (
        "function: functions.py:loop\n",
        r"function: found no loop at the top level of .*/functions\.py \(did you mean 'loops'\?\); allowed: .*loops",
    ),
    "a missing file": (
        "function: function.py:loops\n",
        r"function: no file .*/function\.py.* \(did you mean 'functions\.py'\?\)",
    ),
    "a missing argument": (
        "function: functions.py:loops\nargs: {epochs: 2}\n",
        r"args\.steps: missing for loops in .*functions\.py; .*: epochs, steps",
    ),
    "a mistyped argument": (
        "function: functions.py:loops\nargs: {epochs: 2, step: 3}\n",
        r"args\.step: unknown argument of loops in .* \(did you mean 'steps'\?\); allowed: epochs, steps",
    ),
    "no text at all": ("", r"exp\.yaml: function: "),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("command", ["run", "submit"])
def test_a_wrong_experiment_is_refused_before_anything_exists(what, command, tmp_path, capsys, monkeypatch):
    """The message names the file, the key and the nearest right one; no run directory is made."""
    text, message = BROKEN[what]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "functions.py").write_text((FAULTS / "functions.py").read_text())
    (tmp_path / "exp.yaml").write_text(text)
    if command == "submit":
        monkeypatch.setattr("chainrun.launch.slurm.need", lambda: None)
    said = main(capsys, command, tmp_path / "exp.yaml", "slurm.time=1h", code=2)
    assert re.search(rf"^chainrun: .*{message}", said), said
    assert not (tmp_path / "runs").exists()


def test_wrong_words_on_the_command_line_are_refused(tmp_path, capsys):
    """Overrides, cuts and walltimes are checked as the file is; so are the directories of looking commands."""
    exp = Exp(tmp_path, "functions.py:loops", args={"epochs": 1, "steps": 1})
    for words, message in {
        ("run", exp.file, "args.epochs"): "override args.epochs: found no key=value",
        ("run", exp.file, "chekpoint.keep=3"): r"chekpoint: unknown key \(did you mean 'checkpoint'\?\)",
        ("run", exp.file, "--interrupt-at", "7,x"): "--interrupt-at 7,x: give global steps from 1 on",
        ("run", exp.file, "--interrupt-at", "0"): "--interrupt-at 0: give global steps from 1 on",
        ("run", exp.file, "--walltime", "soon"): "--walltime: ",
        (
            "run",
            tmp_path / "ex.yaml",
        ): r"ex\.yaml: .*No such file or directory \(did you mean 'exp\.yaml'\?\)",
        ("status", tmp_path / "nowhere"): "nowhere does not exist",
        ("status", tmp_path): f"there is no run in {tmp_path}",
        ("logs", tmp_path): "is not a run directory: it holds no experiment.yaml",
        ("show", tmp_path / "nowhere"): "is not a run directory: it does not exist",
        ("cancel", tmp_path): "is not a run directory",
    }.items():
        assert re.search(f"chainrun: .*{message}", main(capsys, *words, code=2)), words
    for words in (["fly"], [], ["run"], ["logs"], ["run", str(exp.file), "--fast"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2
    assert not exp.run.path.exists()


def test_submit_without_slurm_says_what_is_missing(tmp_path, capsys, monkeypatch):
    """Exit code 2, the name of the missing command, and the way out; --dry-run needs no SLURM."""
    exp = Exp(tmp_path, "functions.py:loops", args={"epochs": 1, "steps": 1}, slurm={"time": "1h"})
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    said = main(capsys, "submit", exp.file, code=2)
    assert "SLURM's sbatch is not on PATH" in said
    assert "chainrun run" in said
    assert not exp.run.path.exists()


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, capsys):
    """Below a regular file nobody can make a directory, not even root; the message names the run directory."""
    (tmp_path / "file").write_text("not a folder")
    exp = Exp(
        tmp_path, "functions.py:loops", args={"epochs": 1, "steps": 1}, dir=str(tmp_path / "file" / "runs")
    )
    said = main(capsys, "run", exp.file, code=2)
    assert f"the run directory {tmp_path / 'file' / 'runs' / 'exp'} cannot be written: " in said
    assert "choose another with dir=PATH" in said


# ---- a run from start to end, looked at from all sides


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Exp:
    """A run of two segments that has ended, and what `logs -f` showed of it meanwhile."""
    exp = Exp(tmp_path_factory.mktemp("finished"), args={"steps": 20})
    process = exp.start("--interrupt-at", "7")
    wait(exp.run.experiment.exists, "the run's directory", process, exp)
    follow = [sys.executable, "-m", "chainrun", "logs", "-f", str(exp.run.path)]
    with open(exp.folder / "followed", "w") as file:
        follower = subprocess.Popen(follow, stdout=file, stderr=subprocess.STDOUT)
    assert process.wait(60) == 0, exp.said()
    assert follower.wait(10) == 0
    return exp


def test_a_run_says_what_it_does(finished):
    """One line for each start, stop and the end, and where the run is."""
    lines = [
        re.sub(r"in \d+\.\d\d s", "in x s", line)
        for line in finished.said().splitlines()
        if not re.match(r"chainrun: segment \d, step", line)
    ]
    assert lines == [
        "chainrun: segment 1: fresh start",
        "chainrun: segment 1 stops at step 7: interrupt",
        "chainrun: segment 2: resumes at step 7 from step-00000007 (read and verified in x s)",
        "chainrun: witnessed at step 7: state, random streams and next batch identical",
        "chainrun: done after 20 steps and 2 segments",
        f"done: {finished.run.path}",
    ]
    assert json.loads(finished.run.result.read_text())["sum"] > 0


def test_logs_shows_all_segments_and_follows_over_handoffs(finished, capsys):
    """The output of every segment is there in order, the same in both modes."""
    said = main(capsys, "logs", finished.run.path, code=0)
    followed = (finished.folder / "followed").read_text()
    for text in (said, followed.removesuffix("chainrun: the run is done\n")):
        lines = [line for line in text.splitlines() if line.startswith("chainrun: ")]
        assert lines[0] == "chainrun: segment 1: fresh start"
        assert lines[1] == "chainrun: segment 1 stops at step 7 (interrupt), checkpoint committed"
        assert lines[2].startswith(
            "chainrun: segment 2: resuming at step 7 from step-00000007 (read and verified"
        )
        assert lines[3:] == [
            "chainrun: witnessed at step 7: state, random streams and next batch identical",
            "chainrun: done after 20 steps and 2 segments",
        ]
    mine, theirs = (
        [line for line in text.splitlines() if not line.startswith("submitit INFO")]
        for text in (said, followed)
    )
    assert theirs == [*mine, "chainrun: the run is done"]
    said = main(capsys, "logs", finished.run.path, "--rank", "1", code=2)
    assert "has no log of rank 1 yet; its first job has not started, or has fewer ranks" in said


def test_status_shows_where_every_run_stands(finished, tmp_path, capsys):
    """A line a run with its step, segments and last checkpoint; a run that never started has one too."""
    header, line = main(capsys, "status", finished.run.path.parent, code=0).splitlines()
    assert header.split() == ["run", "state", "step", "segments", "ends", "last", "checkpoint"]
    assert re.fullmatch(r"exp +done +20 \(100%\) +2 +- +\d+(\.\d+)? kB, \w[\w ]* ago", line), line
    fresh = Exp(tmp_path, args={"steps": 20})
    submit.prepare(experiment.load(fresh.file), tmp_path)
    lines = main(capsys, "status", fresh.run.path, finished.run.path, code=0).splitlines()
    assert lines[1].split()[:9] == ["exp", "stopped", "0", "0", "-", "-", "not", "started;", "to"]
    assert lines[2].split()[:2] == ["exp", "done"]


def test_show_tells_a_runs_story_and_what_a_checkpoint_holds(finished, capsys, monkeypatch):
    """Every event in order and the result; of a checkpoint its objects, whether it is whole, and from where."""
    said = main(capsys, "show", finished.run.path, code=0)
    kinds = re.findall(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (\w+)", said, re.MULTILINE)
    assert kinds == [event["event"] for event in finished.events()]
    expected = {"created", "code", "segment", "trains", "checkpoint", "stop", "handoff", "witness", "done"}
    assert expected == set(kinds)
    assert "result: {'state': " in said
    checkpoint = Store(finished.run).committed()[0].path
    said = main(capsys, "show", checkpoint, "--verify", code=0)
    for text in (
        "step         20",
        "verified     yes",
        "model ",
        "optimizer",
        "loader",
        "state        sum",
        "random       python, numpy, torch",
    ):
        assert text in said, text
    monkeypatch.chdir(checkpoint)
    assert main(capsys, "show", ".", "--verify", code=0) == said


def test_show_of_a_damaged_checkpoint_names_the_flaw_and_fails(finished, tmp_path, capsys):
    """Exit code 1, and why the checkpoint would not be restored."""
    for name, text in {
        "rank-00000.pt": "verified     no: the content of rank-00000.pt has changed since it was written",
        "manifest.json": "cannot be used: it holds no valid manifest.json",
    }.items():
        checkpoint = tmp_path / name / "step-00000020"
        checkpoint.mkdir(parents=True)
        for file in Store(finished.run).committed()[0].path.iterdir():
            data = file.read_bytes()
            (checkpoint / file.name).write_bytes(data if file.name != name else data[:9] + b"!" + data[10:])
        assert text in main(capsys, "show", checkpoint, "--verify", code=1)


def test_a_finished_run_leaves_at_once(finished, capsys):
    """Started again it says that it is done, exits with 0 and writes nothing; so does a job that starts late."""
    before = {path: path.read_bytes() for path in finished.run.path.rglob("*") if path.is_file()}
    began = time.monotonic()
    said = main(capsys, "run", finished.file, code=0)
    assert f"{finished.run.path} is done; its result is in {finished.run.result}" in said
    assert run_segment(finished.run, Allocation(), Signals()) == Outcome("idle", "the run is done")
    assert time.monotonic() - began < 2
    assert "is done already" in main(capsys, "cancel", finished.run.path, code=0)
    assert {path: path.read_bytes() for path in finished.run.path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "words",
    [
        "status DIR",
        "status DIR --json",
        "logs DIR",
        "show DIR",
        "show CHECKPOINT",
        "--help",
        "run --help",
        "--version",
    ],
)
def test_commands_that_only_look_never_import_torch(finished, words):
    """Nor NumPy or submitit, whatever the run has been through; they answer quickly."""
    checkpoint = Store(finished.run).committed()[0].path
    arguments = words.replace("DIR", str(finished.run.path)).replace("CHECKPOINT", str(checkpoint)).split()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "chainrun", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    print(f"chainrun {words}: {time.monotonic() - began:.2f} s")
    assert done.returncode == 0, done.stderr
    imported = {
        line.rpartition("|")[2].strip()
        for line in done.stderr.splitlines()
        if line.startswith("import time:")
    }
    assert "chainrun.cli" in imported
    assert not imported & {"torch", "numpy", "submitit"}


def test_a_reader_that_has_seen_enough_is_no_error(finished):
    """`chainrun show DIR | head -1` ends with 0 on both sides, and without a word about a broken pipe."""
    for command in ("show", "logs", "status"):
        line = f"set -o pipefail; {sys.executable} -m chainrun {command} {finished.run.path} | true"
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), command


# ---- stopping and going on


def test_ctrl_c_saves_and_the_same_command_goes_on_exactly(tmp_path, capsys):
    """Exit code 75, how to go on, no process left; the whole equals a plain program bit for bit."""
    exp = Exp(tmp_path, args={"steps": 60, "nap": 0.02}, checkpoint={"every": None})
    command = [sys.executable, str(FAULTS / "train.py"), str(tmp_path / "plain"), "60"]
    with subprocess.Popen(command) as plain:
        process = exp.start()
        wait(lambda: steps_done(exp) > 3, "the third step", process, exp)
        said = main(capsys, "run", exp.file, code=2)
        assert f"{exp.run.path} is being trained now, by job " in said
        assert re.search(r"exp +running +\d+ ", main(capsys, "status", exp.run.path.parent, code=0))
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(30) == 75, exp.said()
        assert group_is_empty(process)
        step = exp.events("stop")[-1]["step"]
        assert "saving a checkpoint, then stopping; once more to kill" in exp.said()
        assert (
            f"stopped at step {step} with a checkpoint; to go on: chainrun run {exp.run.experiment}"
            in exp.said()
        )
        assert "stopped" in main(capsys, "status", exp.run.path, code=0)

        said = main(capsys, "run", exp.file, "args.steps=80", "seed=1", code=2)
        assert "was started with another experiment:\n  args.steps: 60 -> 80\n  seed: 0 -> 1\n" in said
        assert "--override" in said
        said = exp.finish("checkpoint.every={steps: 11}", "--override")
        assert f"segment 2: resumes at step {step} from step-{step:08d}" in said
        assert exp.events("continue")[-1]["changes"] == ["checkpoint.every: null -> {steps: 11}"]
    assert plain.returncode == 0
    assert training.read(f"{exp.trace}.0") == training.read(tmp_path / "plain.0")
    saved = torch.load(Store(exp.run).committed()[0].path / "rank-00000.pt", weights_only=True)["objects"][
        "model"
    ]
    final = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert all(torch.equal(saved[key], final[key]) for key in final)


def test_ctrl_c_while_a_segment_starts_ends_the_chain_too(tmp_path):
    """However early it comes, the command ends soon and leaves no process behind."""
    exp = Exp(tmp_path, args={"steps": 2000, "nap": 0.05})
    for delay in (0.0, 0.2, 0.4, 0.7, 1.0):
        before = len(exp.events())
        process = exp.start()
        wait(lambda: len(exp.events()) > before, "the start", process, exp)  # noqa: B023
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGINT)
        code = process.wait(30)
        assert group_is_empty(process), exp.said()
        stopped = len(exp.events("stop"))
        print(f"Ctrl-C {delay} s after the start: {code}, {exp.said().splitlines()[-1:]}")
        assert code in ([75] if stopped else [1, 130]), exp.said()  # 130: before anything was started
        if code != 130:
            assert ("stopped at step" if stopped else "stopped before it could save") in exp.said()
        assert not exp.run.failed.exists()
        if stopped:
            break


def test_a_second_ctrl_c_kills_a_function_that_comes_to_no_boundary(tmp_path):
    """The command ends, says what is left, and the next start goes on from there."""
    mark = tmp_path / "hangs"
    exp = Exp(
        tmp_path,
        "functions.py:hangs",
        args={"at": 5, "mark": str(mark)},
        checkpoint={"every": {"steps": 2}},
    )
    process = exp.start()
    wait(mark.exists, "step 5", process, exp)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(15) == 75, exp.said()
    assert group_is_empty(process)
    assert (
        "stopped before it could save; the newest checkpoint is of step 4; to go on: chainrun run"
        in exp.said()
    )


def test_cancel_saves_and_ends_a_running_chain_until_it_is_run_again(tmp_path, capsys):
    """cancel returns when the run is saved, the chain exits with 75, and `run` takes it up again exactly."""
    exp = Exp(tmp_path, args={"steps": 60, "nap": 0.03}, checkpoint={"every": None})
    process = exp.start()
    wait(lambda: steps_done(exp) > 3, "the third step", process, exp)
    said = main(capsys, "cancel", exp.run.path, code=0)
    step = exp.events("stop")[-1]["step"]
    assert (
        f"{exp.run.path} is cancelled; its newest checkpoint is of step {step}; to go on after all: " in said
    )
    assert f"chainrun run {exp.run.experiment}" in said
    assert process.wait(15) == 75, exp.said()
    assert exp.events("stop")[-1]["reason"] == "cancelled"
    assert re.search(r"exp +cancelled +\d+", main(capsys, "status", exp.run.path.parent, code=0))
    assert run_segment(exp.run, Allocation(), Signals()).kind == "idle"
    exp.finish()
    assert list(training.read(f"{exp.trace}.0")) == list(range(1, 61))
    assert not exp.run.stop.exists()


def test_cancel_between_two_segments_ends_the_chain(tmp_path, capsys):
    """A STOP that the next segment finds when it starts is not taken for the stop of the last one."""
    exp = Exp(tmp_path, "functions.py:loops", args={"epochs": 9, "steps": 1})
    process = exp.start("--interrupt-at", "2,4,6,8")
    wait(lambda: exp.events("handoff"), "the first handoff", process, exp)
    assert cancel.cancel(exp.run.path) == 0
    assert process.wait(30) == 75, exp.said()
    assert len(exp.events("segment")) == 1
    assert "cancelled before it could save; the newest checkpoint is of step 2" in exp.said()


# ---- failures: exit code 1


def test_a_function_that_raises_fails_the_run_with_its_own_frames(tmp_path, capsys):
    """Output, FAILED and journal have the traceback; once the function is right the run goes on."""
    exp = Exp(
        tmp_path, "functions.py:raises", args={"at": 8, "steps": 12}, checkpoint={"every": {"steps": 3}}
    )
    said = exp.finish(code=1)
    line = (
        (FAULTS / "functions.py")
        .read_text()
        .splitlines()
        .index('    raise ValueError(f"planted at step {step}")')
    )
    for text in (said, exp.run.failed.read_text(), exp.events("failed")[-1]["traceback"]):
        assert f'functions.py", line {line + 1}, in deeper' in text
        assert "in raises" in text
        assert "ValueError: planted at step 8" in text
    assert "rank 0 failed in segment 1 at step 7: " in said
    assert f"the run {exp.run.path} has failed; `chainrun logs {exp.run.path}` shows all" in said
    assert exp.events("failed")[-1]["error"] == "ValueError: planted at step 8"
    assert "planted at step 8" in main(capsys, "logs", exp.run.path, code=0)
    assert re.search(
        r"exp +failed +6 .*ValueError: planted at step 8", main(capsys, "status", exp.run.path.parent, code=0)
    )
    assert run_segment(exp.run, Allocation(), Signals()).kind == "idle"

    assert exp.segment("args.at=99").kind == "done"
    assert not exp.run.failed.exists()
    assert [event["step"] for event in exp.events("segment")] == [0, 6]


def test_a_start_that_dies_without_a_word_ends_the_chain(tmp_path):
    """It is not taken for the segment before, which had stopped well, and tried again for ever."""
    exp = Exp(tmp_path, "dies.py:train")
    environment = {**os.environ, "DIES_MARK": str(tmp_path / "mark")}
    said = exp.finish("--interrupt-at", "4", code=1, env=environment)
    assert (
        "the segment was killed before it could save; the newest checkpoint is of step 4; to go on: " in said
    )
    assert len(exp.events("segment")) == 1
    assert Store(exp.run).newest().step == 4


def test_the_death_of_one_rank_ends_the_chain(tmp_path):
    """The other rank, which would wait for it for ever, is ended; the next start goes on."""
    exp = Exp(
        tmp_path,
        "functions.py:pids",
        args={"folder": str(tmp_path), "steps": 60},
        local={"tasks": 2},
        checkpoint={"every": {"steps": 10}},
    )
    code = "import sys; from chainrun.launch import local; local._GRACE = 2; from chainrun.cli import main; "
    command = [sys.executable, "-c", code + f"sys.exit(main(['run', {str(exp.file)!r}]))"]
    process = exp.popen(command)
    wait(lambda: len(exp.events("checkpoint")) > 1, "the second checkpoint", process, exp)
    os.kill(int((tmp_path / "pid.1").read_text()), signal.SIGKILL)
    assert process.wait(30) == 1, exp.said()
    assert group_is_empty(process)
    newest = Store(exp.run).newest()
    assert newest.step % 10 == 0
    assert f"the newest checkpoint is of step {newest.step}; to go on: " in exp.said()

    # another number of ranks cannot go on with it
    said = exp.finish("local.tasks=1", "--override", code=1)
    assert "was taken with 2 ranks, this job has 1; every rank has random state of its own" in said
    assert flaw(newest) is None
    exp.finish("local.tasks=2", "--override")
    assert exp.events("segment")[-1]["step"] == newest.step


def test_a_rank_that_is_killed_is_no_error_of_those_that_wait_for_it(tmp_path):
    """What torch.distributed says to them then does not make the run a failed one."""
    args = {"folder": str(tmp_path), "steps": 8}
    exp = Exp(
        tmp_path, "functions.py:together", args=args, local={"tasks": 2}, checkpoint={"every": {"steps": 2}}
    )
    said = exp.finish(code=1)
    newest = Store(exp.run).newest()
    assert f"killed before it could save; the newest checkpoint is of step {newest.step}; to go on: " in said
    assert not exp.run.failed.exists()
    assert not exp.events("failed")
    assert "rank 1 is gone, so rank 0 ends at step " in "".join(
        log.read_text() for log in exp.run.jobs.glob("*log.*")
    )
    exp.finish()
    assert exp.events("segment")[-1]["step"] == newest.step


MISFITS = {
    "a registered name is missing": (
        {"names": "ab"},
        {"names": "a"},
        r"the checkpoint at step 3 holds 'b', which the function has not registered; call run\.register\(b=\.\.\.\)",
    ),
    "a registered name is new": (
        {"names": "ab"},
        {"names": "abc"},
        r"register\(c=\.\.\.\): the checkpoint at step 3 has no 'c', it holds a, b; register what it holds",
    ),
    "a shape differs": (
        {"names": "a"},
        {"names": "a", "width": 3},
        r"the module 'a' is not the one that was saved: weight has shape \(1, 3\), in the checkpoint \(1, 2\)\. Nothing",
    ),
    "a dtype differs": (
        {"names": "a"},
        {"names": "a", "dtype": "float64"},
        r"the module 'a' is not the one that was saved: (weight|bias) is torch\.float64, in the checkpoint torch\.float32",
    ),
    "the optimizer has other groups": (
        {"names": "ao", "rates": 1},
        {"names": "ao", "rates": 2},
        r"the optimizer 'o' is not the one that was saved: loaded state dict has a different number of parameter groups",
    ),
    "the loader has other workers": (
        {"names": "al"},
        {"names": "al", "rates": 3},
        r"the loader 'l' has num_workers.2, the checkpoint was taken with 0: ",
    ),
}


@pytest.mark.parametrize("what", MISFITS)
def test_a_function_that_does_not_fit_its_checkpoint_is_refused(what, tmp_path, capsys):
    """One clear error, no traceback, nothing restored in part; with the right function the run goes on."""
    saved, found, message = MISFITS[what]
    exp = Exp(tmp_path, "functions.py:registers", args=saved, checkpoint={"every": {"steps": 3}})
    described = experiment.load(exp.file)
    run, _ = submit.prepare(described, tmp_path)
    cut = Allocation(scheduler="local", job="first", interrupt_at=frozenset([3]))
    assert run_segment(run, cut, Signals()) == Outcome("stopped", "interrupt", 3)
    before = {path.name: path.read_bytes() for path in run.checkpoint(3).iterdir()}

    capsys.readouterr()
    assert exp.segment(f"args={json.dumps(found)}").kind == "failed"
    said = capsys.readouterr().err
    assert re.search(rf"rank 0 failed in segment \d+ at step 3: .*{message}", said), said
    assert "Traceback" not in said
    assert re.search(message, exp.run.failed.read_text())
    assert {path.name: path.read_bytes() for path in run.checkpoint(3).iterdir()} == before

    assert exp.segment(f"args={json.dumps(saved)}") == Outcome("done", step=6)
    assert exp.run.result.read_text() == '"the end"'


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "ap",
            r"register\(p=\.\.\.\) was given a torch\.utils\.data\.DataLoader, .* build it as chainrun\.DataLoader",
        ),
        ("ax", r"register\(x=\.\.\.\) was given a Anything, which has no state_dict and load_state_dict"),
        ("aa", r"register\(a=\.\.\.\) was called twice"),
    ],
)
def test_what_cannot_be_resumed_is_refused_when_it_is_registered(names, message, tmp_path, capsys):
    """Before the first step, with the reason and what to do."""
    exp = Exp(tmp_path, "functions.py:registers", args={"names": names})
    outcome = exp.segment()
    assert (outcome.kind, outcome.step) == ("failed", 0)
    assert re.search(message, outcome.reason), outcome.reason
    assert "Traceback" not in capsys.readouterr().err


def test_a_function_whose_loops_have_changed_is_refused(tmp_path):
    """One that returns before the checkpoint's place, or loops past it, does not pass as trained."""
    exp = Exp(tmp_path, "functions.py:loops", args={"epochs": 3, "steps": 4})
    run, _ = submit.prepare(experiment.load(exp.file), tmp_path)
    cut = Allocation(scheduler="local", job="first", interrupt_at=frozenset([10]))
    assert run_segment(run, cut, Signals()) == Outcome("stopped", "interrupt", 10)
    outcome = exp.segment("args.epochs=2")
    assert outcome.kind == "failed"
    assert re.search(
        r"returned before it came to the place where the checkpoint at step 10 was taken", outcome.reason
    )
    outcome = exp.segment("args.steps=1")
    assert outcome.kind == "failed"
    assert "was taken" in outcome.reason
    assert not run.done.exists()
    assert exp.segment("args.epochs=3", "args.steps=4") == Outcome("done", step=12)


def test_two_ranks_cut_twice_equal_two_ranks_uncut(tmp_path):
    """DistributedDataParallel over gloo: the same bits on both ranks, whatever the number of segments."""
    keys = {"args": {"steps": 20, "ddp": True}, "local": {"tasks": 2}, "checkpoint": {"every": {"steps": 4}}}
    for name in ("cut", "uncut"):
        (tmp_path / name).mkdir()
    cut, uncut = Exp(tmp_path / "cut", **keys), Exp(tmp_path / "uncut", **keys)
    process = uncut.start()
    said = cut.finish("--interrupt-at", "5,12")
    assert process.wait(60) == 0, uncut.said()
    assert "segment 3: resumes at step 12" in said
    for rank in range(2):
        mine = training.read(f"{cut.trace}.{rank}")
        assert list(mine) == list(range(1, 21))
        assert mine == training.read(f"{uncut.trace}.{rank}")
    assert training.read(f"{cut.trace}.0")[20]["batch"] != training.read(f"{cut.trace}.1")[20]["batch"]
    assert cut.run.result.read_text() == uncut.run.result.read_text()
    assert [event["world_size"] for event in cut.events("segment")] == [2, 2, 2]
