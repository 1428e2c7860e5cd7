"""The run directory: every file name inside it is spelled here and nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrun import __version__
from chainrun.errors import UsageError

FORMAT = 1  # of the run directory, kept in the journal's first event; raised when an older chainrun could misread it
OLDEST = 1  # the oldest format that this chainrun reads

_CHECKPOINT = re.compile(r"step-(\d{8,})(?:\.(\d+))?")


@dataclass(frozen=True)
class RunDir:
    """The paths of one run."""

    path: Path

    @property
    def experiment(self) -> Path:
        return self.path / "experiment.yaml"

    @property
    def code(self) -> Path:
        """The function's project as it was at submission; the jobs import it from here."""
        return self.path / "code"

    @property
    def frozen(self) -> Path:
        """What is in `code`, and of which commit: JSON, see `chainrun.snapshot`."""
        return self.path / "code.json"

    @property
    def environment(self) -> Path:
        """What the run was submitted from: JSON with Python, packages, command, folder."""
        return self.path / "environment.json"

    @property
    def shipped(self) -> Path:
        """The module in `code` of a function that was in no file, such as a notebook's."""
        return self.code / "shipped_function.py"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def journal(self) -> Path:
        return self.path / "journal.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def jobs(self) -> Path:
        """submitit's folder: scripts, pickles and one log per job and rank."""
        return self.path / "jobs"

    @property
    def lock(self) -> Path:
        return self.path / "lock"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def failed(self) -> Path:
        return self.path / "FAILED"

    @property
    def stop(self) -> Path:
        """Written by `chainrun cancel`: the running segment saves and ends, no further one starts."""
        return self.path / "STOP"

    @property
    def report(self) -> Path:
        """What `chainrun report` makes, beside a picture of the same name."""
        return self.path / "report.html"

    @property
    def halted(self) -> Path:
        """The chain has stopped by itself: JSON with ``why`` and the ``command`` that goes on."""
        return self.path / "HALTED"

    @property
    def notified(self) -> Path:
        """The experiment's ``notify`` was run for this end of the chain, or runs while the file is empty."""
        return self.path / "NOTIFIED"

    def rendezvous(self, job: str, restart: int) -> Path:
        """Where rank 0 of one segment writes the address that the other ranks connect to."""
        return self.jobs / f"{job}_{restart}_rendezvous.json"

    def claim(self, job: str, restart: int) -> Path:
        """Made by the rank that hands a failed segment over, the first of those that failed."""
        return self.jobs / f"{job}_{restart}_handoff"

    def checkpoint(self, step: int, repeat: int = 0) -> Path:
        """The directory of the checkpoint at `step`; `repeat` counts further boundaries at the same step."""
        return self.checkpoints / (f"step-{step:08d}" + (f".{repeat}" if repeat else ""))

    def logs(self, rank: int) -> list[Path]:
        """The log files of one rank, the job that wrote last behind the others, and its errors behind its output."""
        found = [*self.jobs.glob(f"*_{rank}_log.out"), *self.jobs.glob(f"*_{rank}_log.err")]
        wrote = {path.name.split("_")[0]: 0.0 for path in found}
        for path in found:
            job = path.name.split("_")[0]
            wrote[job] = max(wrote[job], path.stat().st_mtime)
        return sorted(found, key=lambda p: (wrote[p.name.split("_")[0]], p.name.endswith(".err")))

    def create(self) -> RunDir:
        """Create the directory and its folders.

        Raises:
            UsageError: the directory cannot be created or written.
        """
        try:
            for folder in (self.path, self.checkpoints, self.jobs):
                make_dir(folder)
            probe = self.path / f".probe-{os.getpid()}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UsageError(
                f"the run directory {self.path} cannot be written: {error.strerror or error}; "
                "choose another with dir=PATH, or make it writable"
            ) from error
        return self


@dataclass(frozen=True)
class GroupDir:
    """The paths of a group of runs, a sweep: a folder whose children are run directories."""

    path: Path

    @property
    def sweep(self) -> Path:
        """What the group is: JSON with ``name``, ``axes`` (key -> values), ``parallel`` and ``points`` (``name values``)."""
        return self.path / "sweep.json"

    @property
    def claims(self) -> Path:
        """Who has started which point, see `chainrun.launch.group`."""
        return self.path / "claims"

    @property
    def stop(self) -> Path:
        """Written by `chainrun cancel`: no further point starts."""
        return self.path / "STOP"

    @property
    def halted(self) -> Path:
        """The next point could not be submitted: JSON with ``why`` and the ``command`` that goes on."""
        return self.path / "HALTED"

    def runs(self) -> list[RunDir]:
        """The points' run directories that exist, in the order of the grid."""
        points = (read_json(self.sweep) or {}).get("points", [])
        found = [RunDir(self.path / point["name"]) for point in points]
        return [run for run in found if run.experiment.is_file()]

    def create(self) -> GroupDir:
        """Create the folder.

        Raises:
            UsageError: the directory cannot be written, or is a run's.
        """
        if (self.path / "experiment.yaml").exists():
            raise UsageError(
                f"{self.path} is a run, not a group of runs; choose another name or dir for the sweep"
            )
        try:
            make_dir(self.claims)
        except OSError as error:
            raise UsageError(
                f"the group's folder {self.path} cannot be written: {error.strerror or error}; "
                "choose another with dir=PATH, or make it writable"
            ) from error
        return self


def is_group(path: Path) -> bool:
    """Whether a folder is a group of runs."""
    return GroupDir(path).sweep.is_file()


def parse_checkpoint(name: str) -> tuple[int, int] | None:
    """Return (step, repeat) of a checkpoint directory's name, None for any other name."""
    match = _CHECKPOINT.fullmatch(name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def other_format(run: RunDir) -> str | None:
    """Return who made a run directory that this chainrun cannot read, and what to do; None where it can.

    Its ``created`` event says which format it has.
    """
    created = next(iter(read_lines(run.journal)), {})
    found = created.get("format", 1)  # the first runs did not say
    if isinstance(found, int) and OLDEST <= found <= FORMAT:
        return None
    known = f"format {FORMAT}" if OLDEST == FORMAT else f"formats {OLDEST} to {FORMAT}"
    maker = f"chainrun {created.get('version', '(unknown version)')}"
    older = isinstance(found, int) and found < OLDEST
    return (
        f"the run directory {run.path} has format {found}, made by {maker}; this is chainrun {__version__}, which "
        f"reads {known}: "
        + (
            f"go on with {maker}, or start a new run under another name"
            if older
            else "go on with the chainrun that made it, or a newer one (pip install --upgrade chainrun)"
        )
    )


def check_format(run: RunDir) -> None:
    """Check that this chainrun can read a run directory.

    Raises:
        UsageError: another chainrun made it, and what to do.
    """
    problem = other_format(run)
    if problem is not None:
        raise UsageError(problem)


def open_run(path: Path) -> RunDir:
    """Return the run directory at `path`, which must exist.

    Raises:
        UsageError: there is no run there, or another chainrun made it.
    """
    run = RunDir(path.absolute())
    if not run.experiment.is_file():
        what = "holds no experiment.yaml" if path.is_dir() else "does not exist"
        if is_group(path):
            what = f"is a group of runs, of a sweep; give one of them: {path}/…"
        raise UsageError(
            f"{path} is not a run directory: it {what}; give the folder that submit or run named"
        )
    check_format(run)
    return run


def fsync_dir(path: Path) -> None:
    """Make the entries of a directory durable: a rename is on disk only after this."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make durable what was written to a file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_dir(path: Path) -> None:
    """Make a directory and its missing parents, durably: what is committed inside is else lost with its entry."""
    missing = [each for each in (path, *path.parents) if not each.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for made in missing:
        fsync_dir(made.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Replace a small file so that after a crash it holds either the old or the new content, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    fsync_dir(path.parent)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, None where it is absent or not (yet) valid."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def append_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append JSON lines with one write, so that lines of several processes never mix.

    Raises:
        OSError: nothing was appended.
    """
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(fd).st_size
        if size and os.pread(fd, 1, size - 1) != b"\n":
            data = b"\n" + data  # a line that a crash has torn must not take ours with it
        try:
            while data:  # a disk that is nearly full takes a part of it, and then says so
                data = data[os.write(fd, data) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, size)
            raise
    finally:
        os.close(fd)


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON lines of a file; a line torn by a crash is passed over."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with contextlib.suppress(ValueError):
                    value = json.loads(line)
                    if isinstance(value, dict):
                        yield value
    except FileNotFoundError:
        return
