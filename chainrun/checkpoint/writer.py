"""One save, by all ranks: every rank its file, rank 0 the manifest, last of all the rename."""

from __future__ import annotations

import base64
import contextlib
import errno
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from chainrun.checkpoint import image, kinds, replicas, sharded, state
from chainrun.checkpoint.layout import Planner
from chainrun.checkpoint.store import FORMAT, MANIFEST, Committed, Store, rank_file, seal
from chainrun.errors import CheckpointError, DiskFullError, RegisterError
from chainrun.rundir import make_dir, write_durably


class Group(Protocol):
    """The ranks of a segment, as far as a save needs them; values are JSON."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any] | None:
        """Return every rank's value on rank 0, None on the others."""

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on every rank."""


class Alone:
    """The group of a single process."""

    rank = 0
    world_size = 1

    def gather(self, value: Any) -> list[Any] | None:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class Ready:
    """One rank's state as it will be written."""

    tree: dict[str, Any]
    shards: dict[str, Any]
    """The DTensors that were in it, by key."""
    refused: str | None = None
    """Why no checkpoint can hold it."""
    staged: image.Staging | None = None
    """Holds a copy of the tree, which is written instead."""


def ready(tree: dict[str, Any]) -> Ready:
    """Take the sharded tensors out of a rank's state, and look whether a checkpoint can hold it."""
    try:
        rest, shards = sharded.split(tree)
        try:
            _check(rest)
        except RegisterError:
            rest = kinds.split(rest)
            _check(rest)
        return Ready(rest, shards)
    except RecursionError:
        return Ready({}, {}, "the state contains itself, or is nested too deeply")
    except RegisterError as error:
        return Ready({}, {}, str(error))


def _check(tree: dict[str, Any]) -> None:
    for key, value in tree.items():
        state.check(value, "run.state" if key == "state" else key)


def without_replicas(group: Group, mine: Ready) -> Ready:
    """Leave out what rank 0 holds too; every rank calls it.

    It is done before the state is copied: the other ranks have next to nothing left to copy and to keep.
    """
    if group.world_size == 1:
        return mine
    marks = base64.b64encode(replicas.marks(mine.tree)).decode() if group.rank == 0 else None
    marks = group.broadcast(marks)
    return mine if group.rank == 0 else replace(mine, tree=replicas.split(mine.tree, base64.b64decode(marks)))


def copied(mine: Ready, staging: image.Staging) -> Ready:
    """Copy the state, so that the training may go on with it.

    Raises:
        CheckpointError: there is too little memory.
    """
    staging.stage(mine.tree)
    return replace(mine, shards=state.copied(mine.shards), staged=staging)


def save(
    store: Store,
    group: Group,
    step: int,
    mine: Ready,
    about: dict[str, Any],
    unready: str | None = None,
    hold: Callable[[], None] = lambda: None,
    planner: Planner | None = None,
    progress: image.Progress | None = None,
) -> tuple[Path, float]:
    """Write and commit one checkpoint; every rank calls it. Return its path and the seconds it took.

    Args:
        step: the global step, which names the directory.
        mine: this rank's state.
        about: what the manifest says besides sizes and hashes.
        unready: why this rank cannot save now; the other ranks are told.
        hold: called on rank 0 right before the commit; raises where it must not happen any more.
        planner: keeps the file's layout for the next save.
        progress: of this rank's file.

    Raises:
        CheckpointError: a rank could not write; nothing was committed, older checkpoints are untouched.
        DiskFullError: one could not for want of space.
        RegisterError: the state of a rank holds what no checkpoint can.
    """
    began = time.perf_counter()
    path = store.folder / "unnamed"  # as long as its name could not be looked for
    problem: str | None = None
    if group.rank == 0:
        try:
            make_dir(store.folder)
            path = store.path_for(step)
            store.begin(path)
        except OSError as error:
            problem = f"{error.filename or store.folder} could not be made: {image.said(error, store.folder)}"
    name, problem = group.broadcast([str(path), problem])
    path = Path(name)
    temporary = store.temporary(path)
    report: dict[str, Any] = {
        "error": problem or mine.refused or unready,
        "refused": problem is None and mine.refused is not None,
    }
    if report["error"] is None:
        try:
            report = _write(temporary, group.rank, mine, planner, progress)
        except (CheckpointError, OSError) as error:
            report |= {"error": str(error), "full": _is_full(error)}
    reports = group.gather(report)
    kind = ""
    if reports is not None:
        kind = next((kind for kind in ("refused", "full") if any(one.get(kind) for one in reports)), "")
        problem = _commit(store, temporary, path, reports, {**about, "step": step}, hold)
    problem, kind = group.broadcast([problem, kind])
    if problem is not None:
        if group.rank == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
        raise _ERRORS[kind](f"no checkpoint at step {step}: {problem}")
    return path, time.perf_counter() - began


_ERRORS = {"": CheckpointError, "full": DiskFullError, "refused": RegisterError}


def _is_full(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error is not None and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _write(
    temporary: Path, rank: int, mine: Ready, planner: Planner | None, progress: image.Progress | None
) -> dict[str, Any]:
    """Write one rank's files; return its report.

    Raises:
        CheckpointError, OSError: they cannot be written.
    """
    size, digest = image.write(temporary / rank_file(rank), mine.staged or mine.tree, planner, progress)
    own: dict[str, Any] = {"size": size, "xxh3_128": digest}
    if "replicated" in mine.tree:
        own["with"] = [rank_file(0)]
    files, plan = {rank_file(rank): own}, None
    if mine.shards:
        folder = temporary / sharded.FOLDER
        folder.mkdir(exist_ok=True)
        written, plan = sharded.write(folder, rank, mine.shards)
        files |= {f"{sharded.FOLDER}/{name}": file for name, file in written.items()}
    return {"error": None, "refused": False, "files": files, "plan": plan}


def _commit(
    store: Store,
    temporary: Path,
    path: Path,
    reports: list[dict[str, Any]],
    about: dict[str, Any],
    hold: Callable[[], None],
) -> str | None:
    """Check every rank's report and commit; return what went wrong."""
    for rank, report in enumerate(reports):
        if report["error"] is not None:
            return f"rank {rank}: {report['error']}"
    files = {name: file for report in reports for name, file in report["files"].items()}
    try:
        if plans := [report["plan"] for report in reports if report["plan"] is not None]:
            written = sharded.finish(temporary / sharded.FOLDER, plans)
            files |= {f"{sharded.FOLDER}/{name}": file for name, file in written.items()}
        for name, file in files.items():
            size = (temporary / name).stat().st_size
            if size != file["size"]:
                return f"{name} has {size} bytes instead of {file['size']}"
        manifest = {
            "format": FORMAT,
            **about,
            "world_size": len(reports),
            "time": time.time(),
            "files": files,
        }
        write_durably(temporary / MANIFEST, seal(manifest))
        hold()
        committed: Committed = store.commit(temporary, path)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{temporary} could not be committed: {image.said(error, store.folder)}"
    store.trust(committed)
    return None
