"""One small job that tries out on the nodes what a chain needs, and what it found.

The job is submitted as a training is: through submitit, with the experiment's partition, nodes and options. Every
rank writes what it finds into a folder beside the run directory, which the doctor reads and removes.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from chainrun.errors import ClusterError
from chainrun.experiment import Experiment
from chainrun.launch import slurm, submit
from chainrun.launch.job import Job
from chainrun.rundir import RunDir, read_json, write_durably

LIMIT = (
    120.0  # seconds, the job's time limit: SLURM's unit is the minute, and one is gone before a step is up
)
ASKED = 60.0  # seconds before the end at which the warning is asked for; SLURM sends it up to 60 s earlier
LAST = 20.0  # seconds before the end at which the job waits no longer for it
IMPORTS = 300.0  # seconds that importing torch and the function may take
SETTLE = 5.0  # seconds in which files that a job has left must show here; an NFS client looks every 3 to 60 s

_LOADS = """
import json, sys
from pathlib import Path
import torch
found = {"torch": torch.__version__, "gpus": torch.cuda.device_count(), "error": None}
if len(sys.argv) > 1:
    from chainrun import function
    from chainrun.errors import ChainrunError
    try:
        function.load_function(function.find_function(sys.argv[1], Path(sys.argv[2])))
    except ChainrunError as error:
        found["error"] = str(error)
print("chainrun:" + json.dumps(found))
"""


def load_apart(function: str | None, base: Path, timeout: float = IMPORTS) -> dict[str, Any]:
    """Import torch, and a function, in a process of its own; ``error`` says what failed, None where nothing did.

    Returns:
        ``torch`` (its version), ``gpus``, ``seconds`` that it took, ``error``.
    """
    began = time.monotonic()
    command = [sys.executable, "-c", _LOADS, *([function, str(base)] if function else [])]
    # SLURM's warning reaches children too, and would kill one that does not expect it
    command = ["/bin/sh", "-c", 'trap "" USR2; exec "$@"', "sh", *command]
    found: dict[str, Any] = {"torch": None, "gpus": 0}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired:
        return {**found, "seconds": timeout, "error": f"importing it took longer than {timeout:.0f} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("chainrun:")]
    if lines:
        found = json.loads(lines[-1].removeprefix("chainrun:"))
    else:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        found["error"] = last[0] if last else f"Python ended with {done.returncode}"
    return {**found, "seconds": round(time.monotonic() - began, 1)}


class Probe(Job):
    """What the job does, on every node. Its first start tries everything out, its second says that it is one."""

    def __init__(self, path: str, function: str | None, base: str) -> None:
        super().__init__(path)
        self.function, self.base = function, base

    def __call__(self) -> None:
        warned: list[float] = []
        signal.signal(signal.SIGUSR2, lambda *_: warned.append(time.time()))
        # submitit ignores it, and a requeue would wait for KillWait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        run, place = RunDir(Path(self.path)), slurm.allocation()
        end = place.end()
        found: dict[str, Any] = {
            "host": place.host,
            "node": os.environ.get("SLURMD_NODENAME", place.host),
            "restart": os.environ.get("SLURM_RESTART_COUNT"),
            "token": _token(run),
            "ranks": place.world_size,
            "end": end,
            "end_in_environment": "SLURM_JOB_END_TIME" in os.environ,
            "python": platform.python_version(),
            "executable": sys.executable,
        }
        _write(run, place.restart, place.rank, found)
        if place.restart:
            return
        last = (end or time.time() + LIMIT) - LAST
        if place.rank == 0:
            found["sbatch"] = _submit_held(run)
        found["loaded"] = load_apart(self.function, Path(self.base), timeout=max(1.0, last - time.time()))
        _write(run, 0, place.rank, found)
        while not warned and time.time() < last:
            time.sleep(0.2)
        found["warned"] = warned[0] if warned else None
        found["tried"] = True
        if place.rank == 0:
            until = time.time() + 10.0  # the others have had the same signal
            while len(_tried(run)) < place.world_size - 1 and time.time() < until:
                time.sleep(0.2)
            found["seen"] = sorted(one["node"] for one in read(run, 0))  # of the others' files
            _write(run, 0, 0, found)
            answer = slurm.requeue(place.job)
            if answer.ok:
                time.sleep(60)  # until SLURM kills us
            found["requeue"] = "SLURM said yes and did nothing" if answer.ok else answer.text
        _write(run, 0, place.rank, found)


def _submit_held(run: RunDir) -> dict[str, Any]:
    """Submit this very job a second time from inside it, held, and cancel it at once."""
    with submit._outside_of_any_job():
        answer = slurm.ask("sbatch", "--hold", "--parsable", str(_script(run)))
    if not answer.ok:
        return {"ok": False, "text": answer.text}
    job = answer.text.strip().partition(";")[0]
    slurm.cancel(job)  # the doctor does so too at its end, should this have failed
    return {"ok": True, "text": job}


def _script(run: RunDir) -> Path:
    return run.path / "held.sh"


def _token(run: RunDir) -> str | None:
    with suppress(OSError):
        return (run.path / "token").read_text()
    return None


def _write(run: RunDir, start: int, rank: int, found: dict[str, Any]) -> None:
    write_durably(run.path / f"start-{start}-rank-{rank}.json", json.dumps(found).encode())


def read(run: RunDir, start: int) -> list[dict[str, Any]]:
    """Return what the ranks of one start of the job have written so far, by rank."""
    paths = sorted(run.path.glob(f"start-{start}-rank-*.json"), key=lambda p: int(p.stem.rpartition("-")[2]))
    return [found for path in paths if isinstance(found := read_json(path), dict)]


def _tried(run: RunDir) -> list[dict[str, Any]]:
    return [one for one in read(run, 0) if one.get("tried")]


# ---- the doctor's side ------------------------------------------------------------------------------


def probe(described: Experiment, base: Path, function: str | None) -> dict[str, Any]:
    """Submit the job, wait for both its starts, remove all that it made; what it found.

    Returns:
        ``first`` and ``second``: what the ranks of the two starts wrote; ``token``; ``job``; ``state``: SLURM's last
        word on it; ``log``: the last lines of its log.

    Raises:
        ClusterError: SLURM refuses the job, or the folder for it cannot be made.
        KeyboardInterrupt: the user has had enough; the job is cancelled.
    """
    name = f"doctor-{uuid.uuid4().hex[:8]}"
    options = replace(described.slurm, time=LIMIT, tasks_per_node=1, lead=ASKED)
    described = replace(described, name=name, slurm=options)
    run, token, job = RunDir(described.run_dir), uuid.uuid4().hex, ""
    made = next((one for one in reversed(run.path.parents) if not one.exists()), run.path)
    with _ends_like_ctrl_c():
        try:
            run.jobs.mkdir(parents=True)
            write_durably(run.path / "token", token.encode())
            write_durably(_script(run), submit.script(run, described).encode())
            job = _submit(run, described, Probe(str(run.path), function, str(base)))
            state = _wait(run, job, described.slurm.nodes)
            _settle(run, described.slurm.nodes)
            return {
                "job": job,
                "state": state,
                "token": token,
                "first": read(run, 0),
                "second": read(run, 1),
                "log": _log(run),
            }
        except OSError as error:
            raise ClusterError(
                f"the probe's folder {run.path} cannot be written: {error.strerror}"
            ) from error
        except KeyboardInterrupt:
            print(f"chainrun: the probe{f', job {job},' * bool(job)} is cancelled", file=sys.stderr)
            raise
        finally:
            _remove(run, made)


def _submit(run: RunDir, described: Experiment, task: Probe) -> str:
    executor = submit._executor(run, described, None)
    with submit._outside_of_any_job():
        try:
            return str(executor.submit(task).job_id)
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ClusterError(f"sbatch refused the probe: {lines[-1] if lines else error}") from error


def _wait(run: RunDir, job: str, nodes: int) -> str:
    """Follow the job until it has ended for good; return SLURM's last word on its state."""
    state, said, unknown = "PENDING", "", 0
    began = time.monotonic()
    with tqdm(total=1, bar_format="{desc} [{elapsed}]", disable=not sys.stderr.isatty()) as bar:
        while unknown < 3:
            record = slurm.job_record(job)
            unknown = 0 if record else unknown + 1  # an answer that fails once may come the next time
            state = record.get("JobState", state)
            if state not in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "REQUEUED"):
                break
            if (
                "held" in record.get("Reason", "").lower()
            ):  # after a failed launch, say: it would wait for ever
                return f"held ({record['Reason']})"
            text = f"probe, job {job}: {_phase(run, record, nodes)}"
            bar.set_description_str(text)
            if text != said and not sys.stderr.isatty():
                print(f"chainrun: {time.monotonic() - began:3.0f} s  {text}", file=sys.stderr, flush=True)
            said = text
            time.sleep(0.5)
    return state


def _phase(run: RunDir, record: dict[str, str], nodes: int) -> str:
    restarted = record.get("Restarts", "0") != "0"
    if record.get("JobState") == "PENDING":
        why = record.get("Reason", "")
        why = f" ({why})" if why not in ("", "None") else ""
        return ("requeued, waits to start again" if restarted else "waits in the queue") + why
    if restarted:
        return "its second start"
    here = len(read(run, 0))
    return f"runs, {here} of {nodes} nodes have reported; waits for SLURM's warning (about a minute)"


def _settle(run: RunDir, nodes: int) -> None:
    """Give files written on other machines a moment to show here."""
    until = time.monotonic() + SETTLE
    while time.monotonic() < until and (len(_tried(run)) < nodes or not read(run, 1)):
        if (one := next(iter(read(run, 0)), None)) and "requeue" in one:
            return  # no second start
        time.sleep(0.2)


def _log(run: RunDir) -> list[str]:
    text = "\n".join(path.read_text(errors="replace") for path in sorted(run.jobs.glob("*_log.err")))
    return text.splitlines()[-5:]


def _remove(run: RunDir, made: Path) -> None:
    """Cancel what may still be in the queue, and delete the folder with those made for it."""
    # by their name, which is nobody else's: Ctrl-C may have come before the id was known
    name = f"--name={run.path.name}"
    slurm.ask("scancel", name)
    until = time.monotonic() + 15.0  # a job that is being killed writes its last lines
    while slurm.ask("squeue", "--noheader", name).text.strip() and time.monotonic() < until:
        time.sleep(0.2)
    shutil.rmtree(run.path, ignore_errors=True)
    for folder in run.path.parents:
        if not folder.is_relative_to(made):
            return
        with suppress(OSError):  # somebody else uses it by now
            folder.rmdir()


@contextmanager
def _ends_like_ctrl_c() -> Iterator[None]:
    """A terminal that goes away, or a kill, cancels the job too."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
