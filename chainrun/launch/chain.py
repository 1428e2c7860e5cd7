"""Chains from Python: `submit` to SLURM, `run` here, and a handle on either."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from chainrun import experiment, journal
from chainrun.checkpoint.store import Committed, Store
from chainrun.errors import ChainrunError, UsageError
from chainrun.experiment import Experiment
from chainrun.launch import cancel, local, slurm, submit
from chainrun.launch.standing import Standing
from chainrun.rundir import open_run, read_json
from chainrun.shipped import Shipped, ship

_GRACE = 30.0  # seconds that a job may be out of the queue without its end being written yet


class ChainFailed(ChainrunError):
    """The run failed, or stopped without anybody carrying it on."""


class Chain:
    """A handle on one run, whoever carries it.

    Args:
        path: the run directory.

    Raises:
        UsageError: there is no run there.
    """

    def __init__(self, path: str | Path) -> None:
        self._run = open_run(Path(path))
        self.path = self._run.path

    @property
    def state(self) -> str:
        """``done``, ``failed``, ``cancelled``, ``running``, ``queued``, ``held`` (a job that waits for a person),
        ``stopped``, or ``unknown`` where SLURM does not say whether a job waits."""
        return Standing(self._run).state().word

    @property
    def checkpoints(self) -> list[Committed]:
        """The committed checkpoints, newest first."""
        return Store(self._run).committed()

    def wait(self, timeout: float | None = None) -> str:
        """Wait until nobody carries the run any more; return its state.

        Args:
            timeout: seconds, None to wait as long as it takes.

        Raises:
            TimeoutError: it is still being carried.
        """
        began = stopped = time.monotonic()
        while True:
            now, state = time.monotonic(), self.state
            if state in ("done", "failed", "cancelled"):
                return state
            if state != "stopped":
                stopped = now
            elif now - stopped > _GRACE or self._run.halted.exists() or not submit.jobs_of(self._run):
                return state  # a chain of this machine has ended when its command has
            if timeout is not None and now - began > timeout:
                raise TimeoutError(f"{self.path} is {state} after {timeout} s")
            time.sleep(0.5)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the run's end and return what the function returned, as JSON holds it.

        Args:
            timeout: seconds, None to wait as long as it takes.

        Raises:
            ChainFailed: the run failed, was cancelled, or stopped; says why, and what goes on.
            TimeoutError: it is still being carried.
        """
        state = self.wait(timeout)
        if state == "done":
            return read_json(self._run.result)
        raise ChainFailed(
            f"{self.path} is {state}: {self._why(state)}; `chainrun logs {self.path}` shows all"
        )

    def _why(self, state: str) -> str:
        halted = read_json(self._run.halted) or {}
        if state == "stopped" and halted:
            return f"{halted.get('why')}; to go on: {halted.get('command')}"
        last = journal.last(self._run, "failed", "stop", "handoff", "cancel") or {}
        if state == "cancelled" or last.get("event") == "cancel":
            return "a person has cancelled it"
        if last.get("event") == "stop":
            return f"at step {last['step']}, with a checkpoint: {last['reason']}; the same call goes on"
        return str(last.get("error") or last.get("refused") or "it was killed before it could save")

    def __repr__(self) -> str:
        return f"<Chain {self.path}: {self.state}>"

    def cancel(self) -> None:
        """Save and end the run for good."""
        cancel.cancel(self.path)


class Described(NamedTuple):
    """What a call from Python stands for."""

    experiment: Experiment
    base: Path
    """The folder that its paths start from."""
    shipped: Shipped | None
    """The function, where it is in no file."""


def describe(
    function: Callable[..., Any] | str,
    *,
    args: Mapping[str, Any] | None,
    name: str | None,
    **keys: Any,
) -> Described:
    """Return what a call from Python stands for."""
    shipped = None
    if not isinstance(function, str):
        function, shipped = _find(function)
    data = {
        "name": name or function.rpartition(":")[2],
        "function": function,
        "args": dict(args or {}),
        **keys,
    }
    return Described(experiment.from_dict(data, Path.cwd()), Path.cwd(), shipped)


def _find(function: Callable[..., Any]) -> tuple[str, Shipped | None]:
    """Return how a job finds a function again, and the function itself where it is in no file."""
    name, module = getattr(function, "__qualname__", ""), getattr(function, "__module__", None) or ""
    if not inspect.isfunction(function) or not name.isidentifier():
        raise UsageError(
            f"{function!r} cannot be found again by a job: give a function that was defined with `def` at the top "
            "level of a file, a notebook or a prompt"
        )
    file = inspect.getsourcefile(function)
    if file is None or not Path(file).is_file() or Path(file).parent.name.startswith("ipykernel_"):
        made = ship(function)
        return f"{made.source.module}:{name}", made
    if "." in module:  # in a package: its relative imports need its full name
        return f"{module}:{name}", None
    return f"{Path(file).absolute()}:{name}", None


def submit_chain(
    function: Callable[..., Any] | str,
    *,
    args: Mapping[str, Any] | None = None,
    name: str | None = None,
    override: bool = False,
    frozen: bool = False,
    jobs: int = 1,
    **keys: Any,
) -> Chain:
    """Submit a training function to SLURM as a chain of jobs, or go on with its run.

    Args:
        function: at the top level of a file, a notebook or a prompt, or ``path.py:function``; called as
            ``function(run, **args)``. One that is in no file is taken along, see `chainrun.shipped`.
        args: plain values.
        name: of the run; by default the function's.
        override: go on with an existing run although the experiment has changed, and with the code as it is now.
        frozen: go on with the code that was submitted, also where the run failed and the code has changed.
        jobs: how many to submit at once, each to start after those before it, where jobs may not submit others.
        keys: the other keys of the experiment file: ``dir``, ``seed``, ``slurm={"time": "4h"}`` …

    Raises:
        UsageError: the input or SLURM refuses; nothing was submitted.
    """
    described, base, shipped = describe(function, args=args, name=name, **keys)
    slurm.need()
    submit.check(described)
    run, how = submit.prepare(described, base, override=override, keep_code=frozen, shipped=shipped)
    if how != "done":
        submit.submit_jobs(run, described, max(1, jobs))
    return Chain(run.path)


def run_chain(
    function: Callable[..., Any] | str,
    *,
    args: Mapping[str, Any] | None = None,
    name: str | None = None,
    walltime: float | None = None,
    interrupt_at: Sequence[int] = (),
    override: bool = False,
    frozen: bool = False,
    **keys: Any,
) -> Chain:
    """Run the same chain on this machine, to its end.

    Args:
        walltime: seconds after which every segment is cut, None for one uncut segment.
        interrupt_at: global steps at which a segment is cut.

    The other arguments are those of `submit_chain`.
    """
    described, base, shipped = describe(function, args=args, name=name, **keys)
    run, how = submit.prepare(described, base, override=override, keep_code=frozen, shipped=shipped)
    if how != "done":
        shown = sys.stderr.isatty() or "ipykernel" in sys.modules  # a script's output is the script's
        local.run_chain(run, described, interrupt_at, walltime, quiet=not shown)
    return Chain(run.path)
