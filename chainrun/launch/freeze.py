"""At submission: freeze the function's project, and say how it differs from what was frozen before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from chainrun import function, journal, snapshot
from chainrun.errors import ExperimentError, UsageError
from chainrun.experiment import Experiment
from chainrun.project import Project, survey_folder, survey_source
from chainrun.rundir import RunDir
from chainrun.segment import say
from chainrun.shipped import Shipped, shipped_before


def survey(described: Experiment, base: Path) -> Project | None:
    """Look at the code as it is now, for many runs of it; None where it is not there any more."""
    try:
        return survey_source(function.find_function(described, base), described.dir)
    except ExperimentError:
        if not RunDir(described.run_dir).frozen.exists():
            raise
        return None


def look(described: Experiment, base: Path, shipped: Shipped | None, project: Project | None) -> Project:
    """Look at the code as it is now; the function must be there, and take the arguments."""
    if shipped is not None:
        shipped.check_arguments(described.args)
        return survey_folder(shipped.source, Path.cwd(), None, described.dir)
    source = project.source if project else function.find_function(described, base)
    function.check_arguments(source, described.args)
    return project or survey_source(source, described.dir)


def changed_code(
    run: RunDir,
    now: Callable[[], Project],
    shipped: Shipped | None,
    *,
    override: bool,
    keep_code: bool,
) -> Project | None:
    """Compare the code with what is frozen; return the project where it is to be frozen anew."""
    new = not (run.frozen.exists() and run.code.exists())
    try:
        project = now()
    except ExperimentError as error:
        if new or (override and not keep_code):
            raise
        drift = [] if shipped_before(run) else [str(error)]
    else:
        if new:
            return project
        drift = snapshot.differences(run, project) + ([] if shipped is None else shipped.differences(run))
    packages = snapshot.changed_packages(run)
    if packages:
        say(f"the environment is not that of the submission:{snapshot.shorten(packages)}")
    if not drift:
        return None
    if override and not keep_code:
        say(f"{run.path} goes on with the code as it is now:{snapshot.shorten(drift)}")
        return project
    if run.failed.exists() and not keep_code:
        raise UsageError(
            f"{run.path} failed, and its code has changed since it was submitted:{snapshot.shorten(drift)}\n"
            "to go on with the changed code, say because it is corrected: --override (override=True from Python); "
            "with the code as it was submitted: --frozen (frozen=True)"
        )
    say(
        f"{run.path} goes on with the code that was submitted, from {run.code}; since then:{snapshot.shorten(drift)}\n"
        "to go on with the code as it is now: --override (override=True from Python)"
    )
    return None


def freeze(run: RunDir, project: Project, shipped: Shipped | None) -> None:
    try:
        snapshot.freeze(run, project)
        if shipped is not None:
            shipped.write(run)
    except OSError as error:
        raise UsageError(f"the code could not be frozen in {run.code}: {error}") from error


def note(run: RunDir, project: Project) -> None:
    journal.record(run, "code", files=len(project.files), root=str(project.root), **project.git)
