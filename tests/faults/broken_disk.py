"""Trainings whose disk fails, each in a process of its own; the shim disk.c has to be preloaded.

    python broken_disk.py CASES

CASES is a JSON file: a list of cases, see `train` for what they say. torch is imported once; every case is a fork.
Prints one JSON line a case: what the training said, how it ended, what is on the disk.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import steps as training
import torch._dynamo

import chainrun.training.run  # noqa: F401
from chainrun import experiment
from chainrun.allocation import Allocation
from chainrun.checkpoint.store import Store, flaw
from chainrun.launch import submit
from chainrun.rundir import read_lines
from chainrun.segment import run_segment
from chainrun.training.stop import Signals

EVERY, STEPS = 3, 12
FOREVER = 1 << 30


def fault(call="", part="", skip=0, times=0, error=0):
    """Let the disk fail from here on; not any more without arguments."""
    ctypes.CDLL(None).disk_fault(call.encode(), part.encode(), skip, times, error)


def remove(path):
    """Remove a directory, at once."""
    gone = path.rename(Path(f"{path.parents[1]}.gone"))
    shutil.rmtree(gone)


def remove_in_a_save(run, path):
    """Remove a directory as soon as a save has written its file, and before it goes on."""
    fault("fsync", "rank-00000.pt", 0, 1, -500)
    before = set(run.dir.glob("checkpoints/step-*.tmp"))  # what is kept to be written over

    def when_it_is_there():
        while not [one for one in run.dir.glob("checkpoints/step-*.tmp/rank-*") if one.parent not in before]:
            time.sleep(0.01)
        remove(next(one for one in run.dir.glob(path) if one not in before))

    threading.Thread(target=when_it_is_there).start()


def mount(folder, how):
    subprocess.run(["mount", "-o", f"remount,{how}", folder], check=True)


def train(run, rank, at, until, what, ballast=0):
    """Train for `STEPS` steps.

    Args:
        rank: the one whose disk fails, in the first segment.
        at: before this step the disk begins to fail.
        until: before this step it is well again; 0 for never.
        what: the arguments of `fault`, or the name of a directory that is removed, or "readonly".
        ballast: numbers that make the checkpoint larger.
    """
    torch.set_num_threads(1)
    model, optimizer = training.parts()
    model.register_buffer("ballast", torch.zeros(ballast), persistent=ballast > 0)
    run.register(model=model, optimizer=optimizer)
    for index in run.steps(STEPS):
        if index in (at, until) and run.rank == rank and run.segment == 1:
            run._saving.settle()  # the removal of older checkpoints comes after the save
            begin(run, what) if index == at else end(run, what)
        run.log(loss=training.learn(model, optimizer))
    return sum(float(parameter.detach().double().sum()) for parameter in model.parameters())


def begin(run, what):
    if isinstance(what, list):
        fault(*what)
    elif what == "readonly":
        mount(run.dir.parents[1], "ro")
    elif what == "run":
        remove(run.dir)
    elif what == "checkpoints":
        remove(run.dir / "checkpoints")
    elif what == "checkpoints in a save":
        remove_in_a_save(run, "checkpoints")
    else:
        remove_in_a_save(run, "checkpoints/step-*.tmp")


def end(run, what):
    Path(f"{run.dir.parents[1]}.then").write_text(json.dumps(on_disk(run._run)))
    mount(run.dir.parents[1], "rw") if what == "readonly" else fault()


def on_disk(run):
    """Return by name what is committed: None where it is whole, else what is wrong."""
    return {each.path.name: flaw(each) for each in Store(run).committed()}


def segment(run, number, said):
    """Carry the run on in a fork of this process; return how that ended, None where it did not."""
    ear, mouth = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
            outcome = run_segment(run, Allocation(scheduler="local", job=f"job{number}"), Signals())
            left = [each.name for each in threading.enumerate() if each is not threading.main_thread()]
            os.write(mouth, json.dumps([outcome.kind, outcome.reason, left]).encode())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(mouth)
    if not select.select([ear], [], [], 60)[0]:
        os.kill(pid, signal.SIGKILL)  # it hangs
    os.waitpid(pid, 0)
    with open(ear) as answer:
        return json.loads(answer.read() or "null")


def carry(folder, case):
    """Train, a second time where the first one fails; return all that came of it."""
    described = experiment.from_dict(
        {
            "name": "broken",
            "function": f"{__file__}:train",
            "dir": str(folder / "runs"),
            "args": case,
            "checkpoint": {"every": {"steps": EVERY}},
        },
        folder,
    )
    run = submit.prepare(described, folder)[0]
    then = Path(f"{folder}.then")
    found = []
    for number in range(2):
        said = Path(f"{folder}.said{number}")
        ended = segment(run, number, said)
        if case["what"] == "readonly" and number == 0:
            mount(folder, "rw")
        found.append({"ended": ended, "said": said.read_text().splitlines(), "disk": on_disk(run)})
        if (ended and ended[0] == "done") or not run.path.exists():
            break
        run.failed.unlink(missing_ok=True)  # as the same command does, given again
    return {
        "segments": found,
        "then": json.loads(then.read_text()) if then.exists() else None,
        "exists": run.path.exists(),
        "result": json.loads(run.result.read_text()) if run.result.exists() else None,
        "metrics": list(read_lines(run.metrics)),
    }


def main(cases):
    for case in cases:
        print(json.dumps(carry(Path(case.pop("folder")), case)), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
