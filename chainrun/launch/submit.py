"""From an experiment to a run directory, and from there through submitit to a SLURM job."""

from __future__ import annotations

import contextlib
import math
import os
import shlex
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chainrun import __version__, breakers, experiment, function, journal, snapshot
from chainrun.errors import ClusterError, ExperimentError, UsageError
from chainrun.experiment import Experiment
from chainrun.launch import freeze, slurm
from chainrun.launch.job import Job
from chainrun.lock import holder
from chainrun.project import Project
from chainrun.rundir import FORMAT, RunDir, check_format, fsync_file, is_group, write_durably
from chainrun.shipped import Shipped

_SBATCH = 300.0  # seconds that sbatch may take where a person waits for it
_PATIENCE = 60.0  # seconds that a job may take to leave the queue after its last process
_LEAVING = "COMPLETING"
_TIMED_OUT = 124  # what timeout(1) ends with
# A warning that comes before Python listens would kill it: so it is ignored, the job's end is asked for anyway.
# exec, since under proctrack/cgroup only the first process of a rank gets signals at all.
_PYTHON = f"""/bin/sh -c 'trap "" USR2; exec "$@"' sh {shlex.quote(sys.executable)}"""
LEAST_LEAD, MOST_LEAD = 10.0, 120.0  # seconds that SLURM's own warning comes before the end, where lead: auto


def prepare(
    described: Experiment,
    base: Path,
    *,
    override: bool = False,
    keep_code: bool = False,
    shipped: Shipped | None = None,
    project: Project | None = None,
) -> tuple[RunDir, str]:
    """Create the run directory of an experiment, or open it to go on.

    Args:
        override: go on although the experiment has changed, and with the code as it is now.
        keep_code: go on with the frozen code, also where the run failed and the code has changed since.
        shipped: the function itself, where it is in no file that a job could import.
        project: the code as it is now, where it is known.

    Returns:
        The run and ``new``, ``continued`` or ``done``.

    Raises:
        UsageError: the directory cannot be written; a segment of the run is alive; the experiment differs
            from the one that the run was started with and `override` is not set; the run failed, the code has
            changed since, and neither `override` nor `keep_code` says with which to go on.
        ExperimentError: the function is missing, or its arguments do not fit.
    """
    run = RunDir(described.run_dir)
    if is_group(run.path):
        raise UsageError(
            f"{run.path} is a group of runs, a sweep; choose another name or dir for a single run"
        )
    if not run.experiment.exists():
        create(run, described, freeze.look(described, base, shipped, project), shipped)
        return run, "new"
    check_format(run)
    changes = experiment.diff(experiment.load(run.experiment), described)
    if changes and not override:
        raise UsageError(
            f"{run.path} was started with another experiment:\n  "
            + "\n  ".join(changes)
            + "\ngo on as it was, choose another name or dir, or give --override to go on with the change"
        )
    if run.done.exists():
        return run, "done"
    _nobody_carries(run)
    look = partial(freeze.look, described, base, shipped, project)
    project = freeze.changed_code(run, look, shipped, override=override, keep_code=keep_code)
    run.create()
    if project is not None:
        freeze.freeze(run, project, shipped)
        freeze.note(run, project)
    if changes:
        source = snapshot.frozen_source(run)
        assert source is not None
        function.check_arguments(source, described.args)
        write_durably(run.experiment, experiment.to_yaml(described).encode())
    for marker in (run.stop, run.failed, run.halted, run.notified):
        marker.unlink(missing_ok=True)
    journal.record(run, "continue", changes=changes)
    return run, "continued"


def _nobody_carries(run: RunDir) -> None:
    held = holder(run)
    if held and held["alive"]:
        raise UsageError(
            f"{run.path} is being trained now, by job {held['job']} on {held['host']}; `chainrun status "
            f"{run.path}` shows it, `chainrun cancel {run.path}` ends it"
        )
    if (
        run.halted.exists()
    ):  # jobs that were submitted beforehand and that nobody could cancel would join the chain
        slurm.cancel_waiting(jobs_of(run))
    alive = _in_the_queue(run)
    if alive:
        job, (state, reason) = next(iter(alive.items()))
        if state == _LEAVING:
            raise UsageError(
                f"{run.path} has ended, but SLURM is not rid of its job {job} yet (COMPLETING); go on once `squeue "
                f"--jobs={job}` does not list it any more"
            )
        waits = slurm.held(job, state, reason)
        raise UsageError(
            f"{run.path} has job {job} in the queue ({state}, {reason}); `chainrun cancel {run.path}` removes it"
            + f"; {waits}" * bool(waits)
        )


def _in_the_queue(run: RunDir) -> dict[str, tuple[str, str]]:
    """Return the states of the run's jobs in the queue; one that is leaving it is waited for.

    For some seconds after its last process a job is COMPLETING, whether it ends for good or comes back requeued.
    """
    until = time.monotonic() + _PATIENCE
    while True:
        alive = slurm.states(jobs_of(run))
        if all(state != _LEAVING for state, _ in alive.values()) or time.monotonic() > until:
            return alive
        time.sleep(0.5)


def create(
    run: RunDir,
    described: Experiment,
    project: Project | None = None,
    shipped: Shipped | None = None,
) -> None:
    """Make the run directory of an experiment, with the experiment and the code frozen in it.

    Args:
        project: what to freeze; without it the jobs import the function from where it is.
    """
    run.create()
    if project is not None:
        freeze.freeze(run, project, shipped)
    name = f"{described.name}-{uuid.uuid4().hex[:8]}"
    journal.record(run, "created", id=name, format=FORMAT, version=__version__)
    fsync_file(run.journal)  # the id is for the run's whole life
    if project is not None:
        freeze.note(run, project)
    write_durably(run.experiment, experiment.to_yaml(described).encode())  # last: it makes this a run


def jobs_of(run: RunDir, *, recent: bool = False) -> list[str]:
    """Return the ids of the SLURM jobs that were submitted for a run, newest last.

    Args:
        recent: only those since a person last let the chain go on.
    """
    events = breakers.since_a_person_looked(run) if recent else journal.events(run)
    return journal.jobs(events)


def warning(described: Experiment) -> int:
    """Return how many seconds before the end SLURM is asked to send its warning."""
    lead = described.slurm.lead
    if isinstance(lead, float):
        return max(1, math.ceil(lead))
    return int(min(MOST_LEAD, max(LEAST_LEAD, 0.05 * (described.slurm.time or 0.0))))


def check(described: Experiment) -> None:
    """Check what only a submission to SLURM needs.

    Raises:
        ExperimentError: the time limit is missing.
    """
    if described.slurm.time is None:
        raise ExperimentError("slurm.time is missing: how long may one job run? For example slurm.time=4h")


def _executor(run: RunDir, described: Experiment, dependency: str | None) -> Any:
    import submitit

    check(described)
    options = described.slurm
    extra = {key: value for key, value in options.extra.items() if value is not False}
    exclude = [str(extra.pop("exclude"))] if "exclude" in extra else []
    exclude += breakers.excluded(run)
    assert options.time is not None
    parameters: dict[str, Any] = {
        "job_name": described.name,
        "time": int(options.time // 60),
        "nodes": options.nodes,
        "ntasks_per_node": options.tasks_per_node,
        "cpus_per_task": options.cpus_per_task,
        "gpus_per_node": options.gpus_per_node or None,
        "partition": options.partition,
        "dependency": dependency,
        "exclude": ",".join(exclude) or None,
        "signal_delay_s": warning(described),
        "wckey": None,
        # the same order of sets in every segment; then the experiment's own lines
        "setup": ["export PYTHONHASHSEED=${PYTHONHASHSEED:-0}", *options.setup],
        "srun_args": ["--kill-on-bad-exit=1"],  # a rank that failed must not leave the others waiting
        "additional_parameters": {
            "requeue": True,  # submitit does not pass it, and sites may default to no
            **extra,
        },
    }

    limit = slurm.patience(_SBATCH)

    class Executor(submitit.SlurmExecutor):
        """submitit's, whose sbatch could hang for ever."""

        def _make_submission_command(self, submission_file_path: Path) -> list[str]:
            return ["timeout", f"{limit:.1f}", *super()._make_submission_command(submission_file_path)]

    executor = Executor(folder=run.jobs, max_num_timeout=1_000_000, python=_PYTHON)
    executor.update_parameters(
        **{key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    )
    return executor


def script(run: RunDir, described: Experiment) -> str:
    """Return the sbatch script that `submit_job` would submit."""
    executor = _executor(run, described, None)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def rehearse(run: RunDir, described: Experiment) -> slurm.Answer:
    """Ask SLURM whether it would take the job of `submit_job`, and when it would start; submits nothing."""
    with tempfile.NamedTemporaryFile("w", prefix="chainrun-", suffix=".sh") as file, _outside_of_any_job():
        file.write(script(run, described))
        file.flush()
        # what it has to say is on standard error, whether it would take the job or not
        return slurm.ask("/bin/sh", "-c", 'exec sbatch --test-only "$0" 2>&1', file.name)


def submit_jobs(run: RunDir, described: Experiment, count: int) -> list[str]:
    """Submit a chain of jobs, each to start after all those before it; return their ids.

    A later one that SLURM refuses is no error: the first ones are the chain then, and hand over as any job does.

    Raises:
        ClusterError: SLURM is missing, or refuses the first job.
    """
    slurm.need()
    jobs: list[str] = []
    for _ in range(count):
        try:
            jobs.append(submit_job(run, described, after=jobs))
        except ClusterError as error:
            if not jobs:
                raise
            print(f"chainrun: {len(jobs)} of {count} jobs were submitted: {error}", file=sys.stderr)
            break
    return jobs


def submit_job(run: RunDir, described: Experiment, after: Sequence[str] = ()) -> str:
    """Submit one job that carries the run on; return its id.

    Args:
        after: jobs that must have ended before it starts, however they end.

    Raises:
        ClusterError: SLURM is missing or refuses.
    """
    slurm.need("sbatch", "srun")
    # not singleton: that does not wait for a job that is completing
    executor = _executor(run, described, f"afterany:{':'.join(after)}" if after else None)
    with _outside_of_any_job():
        try:
            job = executor.submit(Job(str(run.path)))
        except Exception as error:
            raise ClusterError(_why_refused(error)) from error
    journal.record(run, "submitted", job=str(job.job_id))
    return str(job.job_id)


def _why_refused(error: Exception) -> str:
    failed = error.__cause__
    if isinstance(failed, subprocess.CalledProcessError) and failed.returncode == _TIMED_OUT:
        return f"sbatch did not answer within {failed.cmd[1]} s"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"sbatch refused the job: {lines[-1] if lines else error}; `--dry-run` shows the script"


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide the present job from sbatch, which would take its variables for options and hand them on to the new one."""
    present = dict(os.environ)
    _set_environment(slurm.outside(slurm.begun or present))
    try:
        yield
    finally:
        _set_environment(present)


def _set_environment(variables: dict[str, str]) -> None:
    for name in set(os.environ) - set(variables):
        del os.environ[name]
    os.environ.update(variables)
