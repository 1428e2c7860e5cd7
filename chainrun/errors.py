"""What chainrun raises.

Every message names the thing, what was found, what was expected and what to do::

    ChainrunError
    ├── UsageError            exit code 2: the input or its use is wrong, nothing has run
    │   ├── ExperimentError   the experiment file, an override or the function it names
    │   └── ClusterError      SLURM is missing, refuses, or is not what the experiment asks for
    ├── RegisterError         an object given to `Run.register` or a loop that cannot be resumed exactly
    ├── CheckpointError       a checkpoint cannot be written, read or trusted
    │   └── DiskFullError     there is no space, or no quota, left for one
    ├── RestoreError          a checkpoint and the function that restores it do not fit
    └── RankFailed            another rank of the segment has failed, so that this one cannot go on
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: stopped with a checkpoint and not handed over


class ChainrunError(Exception):
    """The base of all errors that chainrun raises on purpose."""

    exit_code = EXIT_FAILED


class UsageError(ChainrunError):
    """The input, or the way it is used, is wrong; nothing has run."""

    exit_code = EXIT_USAGE


class ExperimentError(UsageError):
    """The experiment file, an override or the function it names is wrong."""


class ClusterError(UsageError):
    """SLURM is missing, refuses, or is not what the experiment asks for."""


class RegisterError(ChainrunError):
    """An object or a loop that could not be resumed exactly."""


class CheckpointError(ChainrunError):
    """A checkpoint cannot be written, read or trusted."""


class DiskFullError(CheckpointError):
    """A checkpoint could not be written for want of space, or of quota."""


class RestoreError(ChainrunError):
    """A checkpoint and the function that restores it do not fit."""


class RankFailed(ChainrunError):
    """Another rank of the segment has failed; what it says is why the segment ends."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the choice nearest to `word`, or an empty string."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{found[0]}'?)" if found else ""
