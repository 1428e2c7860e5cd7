"""`chainrun status`: where runs stand, as a table, one run in detail, or JSON. Never imports torch.

A run is a folder with an experiment.yaml, a group is a folder whose children are runs. SLURM is asked once for all runs,
and has a few seconds to answer. ``--json`` prints a list with one object a run, with these keys, null where unknown:

===============  ===========================================================================================
``name path``    the run directory
``group``        the folder that holds it, where that lies in the folder that was asked for; else null
``state``        done, failed, running, queued, held, stopped, cancelled or unknown
``remark next``  why, and what a person may do
``step total``   optimization steps done, and of the whole training
``fraction``     done of it, 0 to 1
``epoch``        of a running segment
``metrics``      its newest values
``segments``     how many there were
``job host ranks``  of the running segment, or the last one
``left``         seconds to its walltime
``rate``         steps a second while training
``end``          when the training ends at the pace of the chain so far, its waiting included; seconds since the epoch
``checkpoint``   the newest: ``path step size time``, bytes and seconds since the epoch
``queue``        jobs in the queue: ``job state reason start``, the start as SLURM expects it
``witness``      what the newest segment found when it compared itself with the one before
``error``        the last of the function
===============  ===========================================================================================
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from chainrun import journal
from chainrun.durations import rough_duration
from chainrun.errors import EXIT_DONE, UsageError
from chainrun.inspect_runs import size
from chainrun.launch import slurm
from chainrun.launch.slurm import Queued
from chainrun.launch.standing import Standing
from chainrun.rundir import RunDir, open_run

REDRAW = 2.0  # seconds between two looks of --watch
ASK = 15.0  # seconds for which it takes what SLURM has said
ASK_AGAIN = 60.0  # the same where SLURM has not answered
_HEADER = ("run", "state", "step", "segments", "ends", "last checkpoint", "")


def status(paths: list[Path], *, as_json: bool = False, watch: bool = False) -> int:
    """Print where runs stand.

    Args:
        paths: runs, or folders of runs.
        as_json: as a list of objects.
        watch: again and again, until Ctrl-C.
    """
    if watch and (as_json or not sys.stdout.isatty()):
        raise UsageError(
            "--watch redraws a terminal: it goes neither with --json nor into a file; leave it out there"
        )
    if watch:
        return _watch(paths)
    found = _found(paths)
    queue, problem = _ask([standing for _, standing in found])
    if as_json:
        print(json.dumps([plain(group, one, queue, problem) for group, one in found], indent=1))
    else:
        print("\n".join(_lines(paths, found, queue, problem)))
    return EXIT_DONE


def _lines(
    paths: list[Path], found: list[tuple[str, Standing]], queue: dict[str, Queued], problem: str
) -> list[str]:
    if len(paths) == 1 and len(found) == 1 and found[0][1].run.path == paths[0].absolute():
        from chainrun.status_of_one import detail

        return detail(found[0][1], queue, problem)
    return _table([plain(group, one, queue, problem) for group, one in found])


def _found(paths: list[Path]) -> list[tuple[str, Standing]]:
    """Return (group or an empty string, run) for all runs in the folders.

    Raises:
        UsageError: a folder does not exist, or holds no run.
    """
    found: list[tuple[str, Standing]] = []
    for path in paths:
        if _is_run(RunDir(path)):
            found.append(("", Standing(open_run(path))))
        elif path.is_dir():
            runs = [(group, Standing(run)) for group, run in _runs_in(path)]
            if not runs:
                raise UsageError(
                    f"there is no run in {path}; `chainrun run` and `submit` make one (dir: {path})"
                )
            found += runs
        else:
            raise UsageError(f"{path} does not exist; give a run directory, or a folder that holds some")
    return found


def _runs_in(folder: Path) -> Iterator[tuple[str, RunDir]]:
    """Yield the runs in a folder, then those of its groups."""
    children = _folders(folder.absolute())
    yield from (("", child) for child in children if _is_run(child))
    for child in children:
        if not _is_run(child):
            yield from ((child.path.name, each) for each in _folders(child.path) if _is_run(each))


def _folders(folder: Path) -> list[RunDir]:
    """Return what may be runs in a folder; nothing of one that may not be read."""
    try:
        with os.scandir(folder) as entries:
            return [
                RunDir(folder / name) for name in sorted(entry.name for entry in entries if entry.is_dir())
            ]
    except PermissionError:
        return []


def _is_run(run: RunDir) -> bool:
    return os.path.isfile(run.experiment)  # also where nobody may look


def _ask(found: list[Standing]) -> tuple[dict[str, Queued], str]:
    """Ask SLURM for the jobs of all runs at once."""
    return slurm.listing([job for one in found for job in one.open_jobs])


def plain(group: str, one: Standing, queue: dict[str, Queued], problem: str) -> dict[str, Any]:
    """Return all that is known of a run, as plain data."""
    state, newest = one.state(queue, problem), one.newest
    held: dict[str, Any] = one.held if one.alive and one.held else {}
    last = one.segments[-1].start if one.segments else {}
    witness = one.witness
    expected = state.word in ("running", "queued")
    return {
        "name": one.run.path.name,
        "path": str(one.run.path),
        "group": group or None,
        "state": state.word,
        "remark": state.remark or None,
        "next": state.command or None,
        "step": one.step,
        "total": one.total,
        "fraction": one.fraction,
        "epoch": held.get("epoch"),
        "metrics": held.get("metrics", {}),
        "segments": len(one.segments),
        "job": held.get("job", last.get("job")),
        "host": held.get("host", last.get("host")),
        "ranks": last.get("world_size"),
        "left": None if held.get("left") is None else max(0.0, held["left"] - (one.now - held["time"])),
        "rate": one.rate,
        "end": one.end if expected else None,
        "checkpoint": newest
        and {
            "path": str(newest.path),
            "step": newest.step,
            "size": newest.size,
            "time": newest.manifest["time"],
        },
        "queue": [{"job": job, **asdict(queue[job])} for job in one.open_jobs if job in queue],
        "witness": witness and journal.witnessed(witness),
        "error": (one.last("failed") or {}).get("error"),
    }


# ---- the table


def _table(runs: list[dict[str, Any]]) -> list[str]:
    rows = [_row(run) for run in runs]
    widths = [max(map(len, column)) for column in zip(_HEADER, *rows, strict=True)]
    lines, group = [_line(_HEADER, widths)], None
    for run, row in zip(runs, rows, strict=True):
        if run["group"] != group:
            group = run["group"]
            lines += ["", f"{group}: {_summary([each for each in runs if each['group'] == group])}"]
        lines.append(_line(row, widths))
    return lines


def _line(row: tuple[str, ...], widths: list[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    saved, now = "-", time.time()
    if run["checkpoint"]:
        saved = f"{size(run['checkpoint']['size'])}, {age(now - run['checkpoint']['time'])}"
    remark = (run["remark"] or "").partition("\n")[0]
    if run["state"] == "queued" and run["queue"] and run["queue"][0]["start"]:
        remark += f", starts about {stamp(run['queue'][0]['start'])}"
    if run["state"] in ("stopped", "held"):
        remark += f"; to go on: {run['next']}"
    if run["state"] == "running" and run["left"] is not None:
        remark += f", {rough_duration(run['left'])} to walltime"
    ends = stamp(run["end"]) if run["end"] else "-"
    return (run["name"], run["state"], steps(run), str(run["segments"]), ends, saved, remark)


def _summary(runs: list[dict[str, Any]]) -> str:
    """Return how many of a group's runs are in which state."""
    counts = Counter("waiting" if run["state"] in ("queued", "held") else run["state"] for run in runs)
    order = ("done", "running", "failed", "waiting")
    return ", ".join(
        f"{counts[state]} {state}" for state in dict.fromkeys([*order, *counts]) if counts[state]
    )


def steps(run: dict[str, Any]) -> str:
    """Return how far a run is."""
    if run["total"] is None:
        return str(run["step"])
    of = f" of {run['total']}" if run["total"] > run["step"] else ""
    return f"{run['step']}{of} ({run['fraction']:.0%})"


def age(seconds: float) -> str:
    return rough_duration(max(1, seconds)) + " ago"


def stamp(at: float) -> str:
    """Return a time of the near future or past, for people."""
    return time.strftime("%b %d %H:%M", time.localtime(at))


# ---- --watch


def _watch(paths: list[Path]) -> int:
    """Redraw the terminal until Ctrl-C: every line is written over the old one, so that nothing flickers."""
    queue: dict[str, Queued] = {}
    problem, asked = "", -float("inf")
    out = sys.stdout
    out.write("\x1b[?25l\x1b[2J")  # without a cursor, all clear
    try:
        while True:
            found = _found(paths)
            if time.monotonic() - asked > (ASK_AGAIN if problem else ASK):
                queue, problem = _ask([standing for _, standing in found])
                asked = time.monotonic()
            screen = shutil.get_terminal_size()
            lines = [time.strftime("%Y-%m-%d %H:%M:%S, Ctrl-C ends this"), ""]
            lines += _lines(paths, found, queue, problem)
            if len(lines) >= screen.lines:
                lines = [*lines[: screen.lines - 2], f"… {len(lines) - screen.lines + 2} more lines"]
            out.write("\x1b[H" + "".join(f"{line[: screen.columns]}\x1b[K\n" for line in lines) + "\x1b[J")
            out.flush()
            time.sleep(REDRAW)
    except KeyboardInterrupt:
        return EXIT_DONE
    finally:
        out.write("\x1b[?25h")
        out.flush()
