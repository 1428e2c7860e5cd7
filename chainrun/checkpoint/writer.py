"""One save, by all ranks: every rank its file, rank 0 the manifest, last of all the rename."""

from __future__ import annotations

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any, Protocol

from chainrun.checkpoint import image, sharded, state
from chainrun.checkpoint.store import FORMAT, MANIFEST, Committed, Store, rank_file, seal
from chainrun.errors import CheckpointError, RegisterError
from chainrun.rundir import write_durably


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


def save(
    store: Store,
    group: Group,
    step: int,
    tree: dict[str, Any],
    about: dict[str, Any],
    unready: str | None = None,
) -> tuple[Path, float]:
    """Write and commit one checkpoint; every rank calls it. Return its path and the seconds it took.

    Args:
        step: the global step, which names the directory.
        tree: this rank's state.
        about: what the manifest says besides sizes and hashes.
        unready: why this rank's state cannot be saved; the other ranks are told.

    Raises:
        CheckpointError: a rank could not write; nothing was committed, older checkpoints are untouched.
        RegisterError: the state of a rank holds what no checkpoint can.
    """
    began = time.perf_counter()
    path, temporary = Path(), Path()
    problem: str | None = None
    if group.rank == 0:
        path = store.path_for(step)
        temporary = store.temporary(path)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            problem = f"{temporary} could not be made: {image.said(error, store.folder)}"
    name, problem = group.broadcast([str(path), problem])
    path = Path(name)
    temporary = store.temporary(path)
    report: dict[str, Any] = {"error": problem or unready}
    if report["error"] is None:
        try:
            tree, shards = sharded.split(tree)
            for key, value in tree.items():
                state.check(value, "run.state" if key == "state" else key)
            size, digest = image.write(temporary / rank_file(group.rank), tree)
            files, plan = {rank_file(group.rank): {"size": size, "xxh3_128": digest}}, None
            if shards:
                folder = temporary / sharded.FOLDER
                folder.mkdir(exist_ok=True)
                written, plan = sharded.write(folder, group.rank, shards)
                files |= {f"{sharded.FOLDER}/{name}": file for name, file in written.items()}
            report = {"error": None, "files": files, "plan": plan}
        except RecursionError:
            report = {"error": "the state contains itself, or is nested too deeply", "refused": True}
        except (RegisterError, CheckpointError, OSError) as error:
            report = {"error": str(error), "refused": isinstance(error, RegisterError)}
    reports = group.gather(report)
    refused = False
    if reports is not None:
        refused = any(one.get("refused") for one in reports)
        problem = _commit(store, temporary, path, reports, {**about, "step": step})
    problem, refused = group.broadcast([problem, refused])
    if problem is not None:
        if group.rank == 0:
            with contextlib.suppress(OSError):
                shutil.rmtree(temporary)
        raise (RegisterError if refused else CheckpointError)(f"no checkpoint at step {step}: {problem}")
    return path, time.perf_counter() - began


def _commit(
    store: Store, temporary: Path, path: Path, reports: list[dict[str, Any]], about: dict[str, Any]
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
        committed: Committed = store.commit(temporary, path)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"{temporary} could not be committed: {image.said(error, store.folder)}"
    store.trust(committed)
    return None
