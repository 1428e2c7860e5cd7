"""The committed checkpoints of a run: newest, trusted, retired. What is not committed does not exist.

A checkpoint is a directory with one file a rank, the shards of what is spread over ranks, and
``manifest.json``, which states each file's size and xxh3_128, and its own. It is written as ``step-….tmp``, the
manifest last, and renamed when all of it is on disk; to remove it, it is renamed back first. Loading, retention
and status ask the same question of the same function: `Store.flaw`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from chainrun.checkpoint import recycled
from chainrun.checkpoint.source import digest
from chainrun.errors import CheckpointError
from chainrun.rundir import RunDir, fsync_dir, parse_checkpoint, read_json

FORMAT = 2
MANIFEST = "manifest.json"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


def witness_file(rank: int) -> str:
    """Return the name of a file that is added after the commit; no checkpoint needs it."""
    return f"witness-{rank:05d}.json"


@dataclass(frozen=True)
class Committed:
    """A committed checkpoint: its directory and what its manifest says."""

    path: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    @property
    def size(self) -> int:
        """Bytes of all its files but the manifest."""
        return sum(int(file["size"]) for file in self.manifest["files"].values())


def seal(manifest: dict[str, Any]) -> bytes:
    """Return the text of a manifest, with its own hash in it."""
    return json.dumps({**manifest, "xxh3_128": _digest(manifest)}, indent=1).encode()


def _digest(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "xxh3_128"}
    return str(xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode()))


def _read(path: Path) -> Committed | str:
    """Return the checkpoint in a directory, or why there is none that could be read."""
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        return f"it holds no valid {MANIFEST}"
    if manifest["format"] != FORMAT:
        which = "a newer" if manifest["format"] > FORMAT else "an older"
        return (
            f"it has format {manifest['format']}, written by {which} chainrun; this one reads format {FORMAT}: "
            "go on with the chainrun that wrote it"
        )
    if manifest.get("xxh3_128") != _digest(manifest):
        return f"the content of {MANIFEST} has changed since it was written"
    return Committed(path, manifest)


def read_committed(path: Path) -> Committed:
    """Return the checkpoint in a directory.

    Raises:
        CheckpointError: it was not committed, its manifest is damaged, or a newer chainrun wrote it.
    """
    found = _read(path)
    if isinstance(found, Committed):
        return found
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint {path}")
    if not (path / MANIFEST).exists():
        found = f"it holds no {MANIFEST}: it was never committed"
    raise CheckpointError(f"the checkpoint {path} cannot be used: {found}")


def flaw(
    checkpoint: Committed,
    files: Iterable[str] | None = None,
    *,
    hashes: bool = True,
    read: Callable[[int], object] = lambda count: None,
) -> str | None:
    """Return why a checkpoint cannot be trusted, None where every file has its stated size and hash.

    Args:
        files: the names of those that are looked at; None for all.
        hashes: whether to read the files; else only their sizes are compared.
        read: told how many bytes were read, again and again.
    """
    for name in checkpoint.manifest["files"] if files is None else files:
        stated, path = checkpoint.manifest["files"][name], checkpoint.path / name
        try:
            size = path.stat().st_size
            if size != stated["size"]:
                return f"{name} has {size} bytes instead of {stated['size']}"
            if hashes and digest(path, read) != stated["xxh3_128"]:
                return f"the content of {name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


class Store:
    """The checkpoints of one run directory.

    Args:
        writer: names who writes, so that two never write into one directory, whatever they take themselves for.
    """

    def __init__(self, run: RunDir, writer: str = "") -> None:
        self._run, self._owner = run, f".{writer}" if writer else ""
        self.folder = run.checkpoints
        self.recycles = False
        """Whether the files of one retired checkpoint are kept for the next save to write over."""
        self._spare: Path | None = None
        self._trusted: set[Path] = set()  # verified, or written, by this process

    def _directories(self) -> list[tuple[tuple[int, int], Path]]:
        """Return ((step, repeat), directory) of all that bear a checkpoint's name, newest first."""
        if not self.folder.is_dir():
            return []
        paths = list(self.folder.iterdir())
        return sorted(((place, p) for p in paths if (place := parse_checkpoint(p.name))), reverse=True)

    def committed(self) -> list[Committed]:
        """Return the committed checkpoints, newest first, whether or not their files can be trusted."""
        found = (_read(path) for _, path in self._directories())
        return [one for one in found if isinstance(one, Committed)]

    def latest(self) -> Committed | None:
        """Return the checkpoint that was committed last, whether or not its files can be trusted."""
        found = (_read(path) for _, path in self._directories())
        return next((one for one in found if isinstance(one, Committed)), None)

    def flaw(self, checkpoint: Committed) -> str | None:
        """Return why a checkpoint cannot be trusted; asked once a process, the answer is kept if good."""
        if checkpoint.path in self._trusted:
            return flaw(checkpoint, hashes=False)
        found = flaw(checkpoint)
        if found is None:
            self._trusted.add(checkpoint.path)
        return found

    def trust(self, checkpoint: Committed) -> None:
        self._trusted.add(checkpoint.path)

    def newest(
        self,
        on_flaw: Callable[[Committed, str], None] = lambda c, why: None,
        judge: Callable[[Committed], str | None] | None = None,
    ) -> Committed | None:
        """Return the newest checkpoint that can be trusted.

        Args:
            on_flaw: told of each newer one that cannot, and why.
            judge: asked why a checkpoint cannot be trusted, instead of `flaw`.
        """
        judge = judge or self.flaw
        for _, path in self._directories():
            found = _read(path)
            if isinstance(found, Committed):
                checkpoint, why = found, judge(found)
                if why is None:
                    return checkpoint
            elif (path / MANIFEST).exists():
                checkpoint, why = Committed(path, {}), found
            else:
                continue  # never committed: it does not exist
            on_flaw(checkpoint, why)
        return None

    def path_for(self, step: int) -> Path:
        """Return a name for a checkpoint at `step` that sorts after all that are there."""
        taken = [repeat for (at, repeat), _ in self._directories() if at == step]
        return self._run.checkpoint(step, max(taken, default=-1) + 1)

    def temporary(self, path: Path) -> Path:
        """Return where a checkpoint is written until it is committed."""
        return path.with_name(f"{path.name}{self._owner}.tmp")

    def begin(self, path: Path) -> Path:
        """Make the directory in which a checkpoint is put together, of a retired one where that is kept.

        Raises:
            OSError: it cannot be made.
        """
        temporary = self.temporary(path)
        shutil.rmtree(temporary, ignore_errors=True)
        spare, self._spare = self._spare, None
        if spare is not None:
            with contextlib.suppress(OSError):
                os.rename(spare, temporary)
                return temporary
            shutil.rmtree(spare, ignore_errors=True)
        temporary.mkdir()
        return temporary

    @property
    def spare_bytes(self) -> int:
        """Bytes on the disk that the next save writes over."""
        try:
            return sum(file.stat().st_size for file in self._spare.iterdir()) if self._spare else 0
        except OSError:
            return 0

    def drop_spare(self) -> bool:
        """Remove what is kept for the next save; return whether there was something."""
        spare, self._spare = self._spare, None
        if spare is not None:
            shutil.rmtree(spare, ignore_errors=True)
        return spare is not None

    def _keep(self, removed: Path, names: set[str]) -> bool:
        """Keep a retired directory's files of these names for the next save; return whether it was done."""
        if not self.recycles or self._spare is not None or not recycled.is_possible(removed):
            return False
        try:
            (removed / MANIFEST).unlink()  # first of all: what is written over never looks like a checkpoint
            for path in list(removed.iterdir()):
                if path.is_dir():
                    shutil.rmtree(path)
                elif path.name not in names:
                    path.unlink()
            fsync_dir(removed)
            fsync_dir(self.folder)  # after a power cut it must not be there under its old name
        except OSError:
            return False
        self._spare = removed
        return True

    def set_aside(self, checkpoint: Committed) -> Path:
        """Rename a checkpoint that cannot be trusted, so that its name is free; it is kept to be looked at."""
        target = checkpoint.path.with_name(f"{checkpoint.path.name}.flawed-{time.time_ns()}")
        os.rename(checkpoint.path, target)
        fsync_dir(target.parent)
        return target

    def clean(self) -> None:
        """Remove what crashed saves and removals left. Only for the holder of the run's lock, which it has just taken.

        This is the fence against a start that has lost the lock and does not know it yet: its commit renames the
        directory that it wrote, and so does this. If its rename comes first, its checkpoint is there for whoever looks
        after this; if ours does, it finds nothing to commit.
        """
        for path in self.folder.glob("step-*.tmp"):
            gone = self.folder / f"step-gone-{time.time_ns()}.tmp"
            with contextlib.suppress(OSError):
                os.rename(path, gone)
            shutil.rmtree(gone, ignore_errors=True)
        fsync_dir(
            self.folder
        )  # a save killed right after its rename is durable before the run goes on from it

    def commit(self, temporary: Path, path: Path) -> Committed:
        """Make a complete directory the checkpoint, durably.

        Raises:
            OSError: it is none.
        """
        fsync_dir(temporary)
        os.rename(temporary, path)
        try:
            fsync_dir(path.parent)
        except OSError:
            os.rename(path, temporary)
            raise
        checkpoint = read_committed(path)
        self.trust(checkpoint)
        return checkpoint

    def retire(self, keep: int, keep_every: int | None) -> Iterator[Committed]:
        """Remove, oldest first, the checkpoints beyond the newest `keep` good ones; yield what was removed.

        A flawed one neither counts as kept nor pushes out a good one. Those at a multiple of `keep_every`
        steps stay for ever.
        """
        good = 0
        retired = []
        found = self.committed()
        newest = found[0] if found else None
        for checkpoint in found:
            if good >= keep:
                retired.append(checkpoint)
            elif self.flaw(checkpoint) is None:
                good += 1
        for checkpoint in reversed(retired):
            assert newest is not None
            if keep_every and checkpoint.step % keep_every == 0:
                continue
            # renamed first: a crash leaves no half of a checkpoint under its name, and `clean` finds the rest
            removed = self.temporary(checkpoint.path)
            try:
                os.rename(checkpoint.path, removed)
            except OSError:
                continue  # tried again after the next save
            self._trusted.discard(checkpoint.path)
            if not self._keep(removed, {name for name in newest.manifest["files"] if "/" not in name}):
                shutil.rmtree(removed, ignore_errors=True)
            yield checkpoint
