"""From an experiment to a run directory, and from there through submitit to a SLURM job."""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chainrun import experiment, function, journal
from chainrun.errors import ClusterError, ExperimentError, UsageError
from chainrun.experiment import Experiment
from chainrun.launch import slurm
from chainrun.launch.job import Job
from chainrun.lock import holder
from chainrun.rundir import RunDir, write_durably

LEAST_LEAD, MOST_LEAD = 10.0, 120.0  # seconds that SLURM's own warning comes before the end, where lead: auto


def prepare(described: Experiment, base: Path, *, override: bool = False) -> tuple[RunDir, str]:
    """Create the run directory of an experiment, or open it to go on.

    Returns:
        The run and ``new``, ``continued`` or ``done``.

    Raises:
        UsageError: the directory cannot be written; a segment of the run is alive; the experiment differs
            from the one that the run was started with and `override` is not set.
        ExperimentError: the function is missing, or its arguments do not fit.
    """
    source = function.find_function(described, base)
    function.check_arguments(source, described.args)
    run = RunDir(described.run_dir)
    if not run.experiment.exists():
        create(run, described)
        return run, "new"
    changes = experiment.diff(experiment.load(run.experiment), described)
    if changes and not override:
        raise UsageError(
            f"{run.path} was started with another experiment:\n  "
            + "\n  ".join(changes)
            + "\ngo on as it was, choose another name or dir, or give --override to go on with the change"
        )
    if run.done.exists():
        return run, "done"
    held = holder(run)
    if held and held["alive"]:
        raise UsageError(
            f"{run.path} is being trained now, by job {held['job']} on {held['host']}; `chainrun status "
            f"{run.path}` shows it, `chainrun cancel {run.path}` ends it"
        )
    alive = slurm.states(jobs_of(run))
    if alive:
        job, (state, reason) = next(iter(alive.items()))
        raise UsageError(
            f"{run.path} has job {job} in the queue ({state}, {reason}); `chainrun cancel {run.path}` removes it"
        )
    run.create()
    if changes:
        write_durably(run.experiment, experiment.to_yaml(described).encode())
    for marker in (run.stop, run.failed):
        marker.unlink(missing_ok=True)
    journal.record(run, "continue", changes=changes)
    return run, "continued"


def create(run: RunDir, described: Experiment) -> None:
    """Make the run directory of an experiment, with the experiment frozen in it."""
    run.create()
    write_durably(run.experiment, experiment.to_yaml(described).encode())
    journal.record(run, "created", id=f"{described.name}-{uuid.uuid4().hex[:8]}")


def jobs_of(run: RunDir) -> list[str]:
    """Return the ids of the SLURM jobs that were submitted for a run, newest last."""
    submitted = journal.events(run, "submitted", "handoff")
    jobs = [str(event["job"]) for event in submitted if event.get("job")]
    return list(dict.fromkeys(jobs))


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
        "signal_delay_s": warning(described),
        "wckey": None,
        # the same order of sets in every segment; then the experiment's own lines
        "setup": ["export PYTHONHASHSEED=${PYTHONHASHSEED:-0}", *options.setup],
        "srun_args": ["--kill-on-bad-exit=1"],  # a rank that failed must not leave the others waiting
        "additional_parameters": {
            "requeue": True,  # submitit does not pass it, and sites may default to no
            **{key: value for key, value in options.extra.items() if value is not False},
        },
    }
    executor = submitit.SlurmExecutor(folder=run.jobs, max_num_timeout=1_000_000)
    executor.update_parameters(
        **{key: value for key, value in parameters.items() if value is not None or key == "wckey"}
    )
    return executor


def script(run: RunDir, described: Experiment) -> str:
    """Return the sbatch script that `submit_job` would submit."""
    executor = _executor(run, described, None)
    return str(executor._make_submission_file_text(executor._submitit_command_str, "dry-run"))


def submit_job(run: RunDir, described: Experiment, dependency: str | None = None) -> str:
    """Submit one job that carries the run on; return its id.

    Raises:
        ClusterError: SLURM is missing or refuses.
    """
    slurm.need()
    executor = _executor(run, described, dependency)
    with _outside_of_any_job():
        try:
            job = executor.submit(Job(str(run.path)))
        except Exception as error:
            lines = [line for line in str(error).splitlines() if line.strip()]
            raise ClusterError(
                f"sbatch refused the job: {lines[-1] if lines else error}; `--dry-run` shows the script"
            ) from error
    journal.record(run, "submitted", job=str(job.job_id))
    return str(job.job_id)


@contextlib.contextmanager
def _outside_of_any_job() -> Iterator[None]:
    """Hide the present job's variables from sbatch, which would take them for options of the new one."""
    keep = {"SLURM_CONF"}
    hidden = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("SLURM_", "SBATCH_", "SRUN_", "SUBMITIT_")) and name not in keep
    }
    for name in hidden:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(hidden)
