"""For sbatch scripts that a person writes and submits: open the run, then be one rank of one segment.

``slurm/chain.sbatch`` is such a script. In it::

    RUN=$(python -m chainrun.launch.sbatch open EXP [k=v …])    # once: makes the run directory, or opens it
    srun … python -m chainrun.launch.sbatch segment "$RUN"      # on every rank: what a submitted job does

The chain is handed over by requeueing the script's job; a job of chainrun's own making would not have its lines.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from chainrun import experiment, journal
from chainrun.errors import EXIT_DONE, ChainrunError, UsageError
from chainrun.launch import slurm, submit
from chainrun.launch.job import Job
from chainrun.rundir import RunDir, check_format

_USAGE = "python -m chainrun.launch.sbatch open EXP [k=v …] [--override] [--frozen], or segment RUN; see slurm/chain.sbatch"
_REQUEUE = "chain.handoff=requeue"


def open_for_job(file: Path, overrides: Sequence[str], job: str, restart: int) -> RunDir:
    """Make the run directory of an experiment, or open it, for the job that asks.

    Args:
        overrides: as on the command line, ``--override`` and ``--frozen`` among them.
        job: id of the job in which this runs.
        restart: how often SLURM has started it before: a requeued job goes on as it was.

    Raises:
        UsageError: the experiment is wrong, or another job trains the run.
    """
    flags = {"--override", "--frozen"}.intersection(overrides)
    overrides = [word for word in overrides if word not in flags]
    described = experiment.load(file, [*overrides, _REQUEUE])
    run = RunDir(described.run_dir)
    if run.experiment.exists():
        check_format(run)
        if restart and job in submit.jobs_of(run):
            return run
    run, how = submit.prepare(
        described, file.absolute().parent, override="--override" in flags, keep_code="--frozen" in flags
    )
    if how != "done":
        script = slurm.job_record(job).get("Command", "SCRIPT").split()[0]  # its arguments follow
        again = shlex.join(["sbatch", script, str(file.absolute()), *overrides])
        journal.record(run, "submitted", job=job, command=again)
    return run


def main(words: Sequence[str]) -> int:
    """Run ``open`` or ``segment``; return the exit code."""
    try:
        if len(words) < 2 or words[0] not in ("open", "segment"):
            raise UsageError(f"found {' '.join(words) or 'nothing'}; usage: {_USAGE}")
        if "SLURM_JOB_ID" not in os.environ:
            raise UsageError(f"this is no SLURM job: {words[0]} is for a script given to sbatch ({_USAGE})")
        if words[0] == "open":
            job, restart = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
            print(open_for_job(Path(words[1]), words[2:], job, restart).path)
        else:
            Job(words[1])()
    except ChainrunError as error:
        print(f"chainrun: {error}", file=sys.stderr)
        return error.exit_code
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
