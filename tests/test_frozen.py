"""What runs is what was submitted: code is frozen in the run directory, and a change of it is shown."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chainrun import cli, function, journal, snapshot
from chainrun import project as project_module
from chainrun.errors import UsageError
from chainrun.experiment import from_dict
from chainrun.launch import submit
from chainrun.rundir import RunDir

TRAIN = """
import os
from pathlib import Path

import torch

import helper

def train(run, gone=""):
    weight = torch.nn.Linear(2, 2)
    run.register(weight=weight)
    for i in run.steps(4):
        with torch.no_grad():
            weight.weight.add_(helper.value())
    beside = (Path(__file__).parent / "data" / "set.txt").read_text()
    return {"value": helper.value(), "beside": beside, "here": Path("here.txt").read_text(), "cwd": os.getcwd()}
"""
HELPER = "def value():\n    return {}\n"


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in git: a function, a module beside it, ignored data, a file that git does not know yet."""
    folder = tmp_path / "project"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "set.txt").write_text("data")
    (folder / "here.txt").write_text("here")
    (folder / ".gitignore").write_text("data/\n_version.py\n")
    (folder / "train.py").write_text(TRAIN)
    (folder / "helper.py").write_text(HELPER.format(1))
    (folder / "_version.py").write_text("version = 1\n")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    (folder / "helper.py").write_text(HELPER.format(2))
    (folder / "new.py").write_text("")
    (folder / "exp.yaml").write_text(json.dumps({"function": "train.py:train"}))
    monkeypatch.chdir(folder)
    return folder


def prepare(folder: Path, **options) -> tuple[RunDir, str]:
    described = from_dict({"name": "exp", "function": "train.py:train", "dir": "runs"}, folder)
    return submit.prepare(described, folder, **options)


def test_a_run_does_not_see_that_its_files_change_or_vanish(project):
    """Files edited and deleted between two segments change nothing; data is found by cwd and beside the file."""
    run, _ = prepare(project)
    (project / "helper.py").write_text(HELPER.format(3))
    (project / "train.py").unlink()
    command = [sys.executable, "-m", "chainrun", "run", str(run.experiment), "--interrupt-at", "2"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "goes on with the code that was submitted" in done.stderr
    result = json.loads(run.result.read_text())
    assert result == {"value": 2, "beside": "data", "here": "here", "cwd": str(project)}
    assert [event["segment"] for event in journal.events(run, "segment")] == [1, 2]


def test_tracked_changed_and_new_files_are_frozen_and_data_is_linked(project):
    """Git's list is what is copied, with what can be imported beside it; the runs themselves are not."""
    prepare(project)
    (project / "big.bin").write_bytes(bytes(project_module.LARGE + 1))
    run, _ = submit.prepare(
        from_dict({"name": "two", "function": "train.py:train", "dir": "runs"}, project), project
    )
    frozen = json.loads(run.frozen.read_text())
    names = {".gitignore", "train.py", "helper.py", "new.py", "_version.py", "here.txt"}
    assert set(frozen["files"]) == names
    assert frozen["large"] == ["big.bin"]
    assert (run.code / "helper.py").read_text() == HELPER.format(2)
    assert (run.code / "data").is_symlink()
    assert (run.code / "big.bin").resolve() == project / "big.bin"
    assert not (run.code / "runs").exists()
    assert len(frozen["git"]["git_commit"]) == 40
    assert frozen["git"]["git_changes"] != "none"
    environment = json.loads(run.environment.read_text())
    assert environment["packages"]["torch"]
    assert environment["cwd"] == str(project)


def test_a_change_of_the_code_is_shown_and_taken_only_with_override(project, capsys):
    """Without --override the frozen code goes on; with it the new code is frozen, and the journal has both."""
    run, _ = prepare(project)
    assert prepare(project) == (run, "continued")
    assert "since then" not in capsys.readouterr().err
    (project / "helper.py").write_text(HELPER.format(3))
    (project / "new.py").unlink()
    (project / "exp.yaml").write_text('{"function": "train.py:train", "seed": 1}')
    (project / "README.md").write_text("prose")
    assert prepare(project)[1] == "continued"
    said = capsys.readouterr().err
    assert "helper.py: changed" in said
    assert "new.py: deleted" in said
    assert not {"exp.yaml", "README.md"} & set(said.replace(":", " ").split())
    assert "--override" in said
    assert (run.code / "helper.py").read_text() == HELPER.format(2)
    prepare(project, override=True, keep_code=True)
    assert (run.code / "helper.py").read_text() == HELPER.format(2)
    prepare(project, override=True)
    assert (run.code / "helper.py").read_text() == HELPER.format(3)
    assert not (run.code / "new.py").exists()
    assert len(list(journal.events(run, "code"))) == 2


def test_a_failed_run_asks_which_code_to_go_on_with(project):
    """A correction would be ignored, and the run fail again: both ways are named and neither is taken unasked."""
    run, _ = prepare(project)
    run.failed.write_text("it failed")
    (project / "helper.py").write_text(HELPER.format(3))
    with pytest.raises(UsageError, match=r"(?s)helper\.py: changed.*--override.*--frozen"):
        prepare(project)
    assert run.failed.exists()
    prepare(project, keep_code=True)
    assert not run.failed.exists()
    assert (run.code / "helper.py").read_text() == HELPER.format(2)
    run.failed.write_text("it failed")
    prepare(project, override=True)
    assert (run.code / "helper.py").read_text() == HELPER.format(3)


def test_the_options_are_those_of_the_command_line(project, capsys):
    """`run --frozen` and `run --override` reach the run; a failed one with changed code is exit code 2."""
    run, _ = prepare(project)
    run.failed.write_text("it failed")
    (project / "helper.py").write_text(HELPER.format(3))
    assert cli.main(["run", str(run.experiment)]) == 2
    assert "--frozen" in capsys.readouterr().err


def test_without_git_the_python_files_of_the_folder_are_frozen(tmp_path, monkeypatch):
    """Packages below it too; other runs, other Pythons and hidden folders are not."""
    for name in ("train.py", "pkg/__init__.py", "runs/old/code/x.py", "venv/lib/y.py", ".hidden/z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("def train(run):\n    pass\n")
    (tmp_path / "runs/old/journal.jsonl").write_text("")
    (tmp_path / "venv/pyvenv.cfg").write_text("")
    (tmp_path / "data.bin").write_bytes(b"data")
    monkeypatch.chdir(tmp_path)
    run, _ = prepare(tmp_path)
    assert set(json.loads(run.frozen.read_text())["files"]) == {"train.py", "pkg/__init__.py"}
    assert (run.code / "data.bin").read_bytes() == b"data"
    assert not (run.code / "venv").exists()


def test_a_folder_of_very_many_folders_gives_only_its_own_files(tmp_path, monkeypatch, capsys):
    """A function in a home directory does not make a submission walk all of it, and the message says so."""
    monkeypatch.setattr(project_module, "_MOST_FOLDERS", 5)
    for number in range(10):
        (tmp_path / f"d{number}").mkdir()
        (tmp_path / f"d{number}" / "x.py").write_text("")
    (tmp_path / "train.py").write_text("def train(run):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    run, _ = prepare(tmp_path)
    assert set(json.loads(run.frozen.read_text())["files"]) == {"train.py"}
    assert "git init" in capsys.readouterr().err


def test_an_installed_package_is_not_copied_and_its_version_is_noted(tmp_path, monkeypatch):
    """A function of site-packages stays there; another version at the next start is drift."""
    site = tmp_path / "site-packages" / "mypkg"
    site.mkdir(parents=True)
    (site / "__init__.py").write_text("")
    (site / "train.py").write_text("def train(run):\n    pass\n")
    monkeypatch.syspath_prepend(str(site.parent))
    described = from_dict(
        {"name": "exp", "function": "mypkg.train:train", "dir": str(tmp_path / "runs")}, tmp_path
    )
    run, _ = submit.prepare(described, tmp_path)
    frozen = json.loads(run.frozen.read_text())
    assert (frozen["files"], list(frozen["installed"])) == ({}, [str(site / "train.py")])
    assert snapshot.installed_drift(run) == []
    (site / "train.py").write_text("def train(run):\n    return 1\n")
    assert len(snapshot.installed_drift(run)) == 1


def test_frozen_modules_come_before_the_places_they_were_copied_from(project, monkeypatch):
    """Every folder of the project on sys.path has its frozen copy before it, and nothing else moves."""
    (project / "src").mkdir()
    (project / "src" / "inner.py").write_text("")
    run, _ = prepare(project)
    monkeypatch.setattr(sys, "path", ["/before", str(project / "src"), "/after", str(project)])
    snapshot.use(run)
    code = str(run.code)
    assert sys.path == ["/before", f"{code}/src", str(project / "src"), "/after", code, str(project)]
    source = snapshot.frozen_source(run)
    assert source == function.FunctionSource(run.code / "train.py", None, "train")
    assert os.path.samefile(json.loads(run.frozen.read_text())["root"], project)
