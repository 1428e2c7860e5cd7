"""The events of a chain, one JSON line each in ``journal.jsonl``.

Events and their fields (every line also has ``time`` in seconds since the epoch and ``event``):

=============  =======================================================================================
``start``      a SLURM job starts, before anything else: ``job restart nodes gpus``
``lost``       a job was killed without a word, as the next one sees: ``job restart segment state last_seen``
``segment``    a segment starts: ``segment job restart host world_size resumed step checkpoint seconds``
``checkpoint`` a checkpoint is committed: ``segment step path bytes seconds waited stall reason``; of the
               training, ``waited`` is what it stood still for the save before and ``stall`` in all; a save
               without ``stall`` was not made beside it
``created``    the run directory is made: ``id``
``submitted``  a job is submitted: ``job``
``space``      there is no room for the next checkpoint: ``reason removed``
``unsaved``    a periodic save failed: ``step reason``
``fallback``   a checkpoint was not trusted: ``path reason``
``drift``      the environment has changed since the checkpoint: ``segment changes``
``witness``    what a segment saw first is what the one before saw next: ``segment rank step identical
               compared differs``
``deferred``   a stop or save waits for a place where it is exact: ``step reason``
``stop``       a segment ends at a boundary: ``segment step reason unused_seconds``
``handoff``    what makes the next segment happen: ``segment how`` or ``refused``
``failed``     the user's function or chainrun failed: ``segment rank node step error traceback
               retry``
``exclude``    the next jobs keep away from a node: ``node failures``
``done``       the function returned: ``segment step``
``cancel``     a person ended the chain
``continue``   a person let an ended chain go on: ``changes``
``code``       the function's project is frozen, at first or anew: ``files root`` and of git ``git_commit git_changes``
=============  =======================================================================================
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from chainrun.rundir import RunDir, append_lines, read_lines


def record(run: RunDir, event: str, **fields: Any) -> None:
    """Append one event."""
    append_lines(run.journal, [{"time": round(time.time(), 3), "event": event, **fields}])


def events(run: RunDir, *kinds: str) -> Iterator[dict[str, Any]]:
    """Yield the events of the given kinds, all of them without one, oldest first."""
    for line in read_lines(run.journal):
        if not kinds or line.get("event") in kinds:
            yield line


def last(run: RunDir, *kinds: str) -> dict[str, Any] | None:
    """Return the newest event of the given kinds."""
    newest = None
    for newest in events(run, *kinds):  # noqa: B007 the loop's last value is what is wanted
        pass
    return newest


def witnessed(event: dict[str, Any]) -> str:
    """Return a ``witness`` event in a sentence."""
    step, compared, differs = event["step"], event["compared"], event["differs"]
    if differs:
        shown = ", ".join(differs[:5]) + f" and {len(differs) - 5} more" * (len(differs) > 5)
        return f"warning: at step {step} this differs from what the segment before had: {shown}"
    *most, last = compared
    return f"witnessed at step {step}: {', '.join(most)}{' and ' * bool(most)}{last} identical"
