"""The committed checkpoints of a run: newest, trusted, retired. What is not committed does not exist.

A checkpoint is a directory with one file a rank and ``manifest.json``, which states each file's size and
xxh3_128. It is written as ``step-….tmp``, the manifest last, and renamed when all of it is on disk. Loading,
retention and status ask the same question of the same function: `Store.flaw`.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chainrun.errors import CheckpointError
from chainrun.rundir import RunDir, fsync_dir, parse_checkpoint, read_json

FORMAT = 1
MANIFEST = "manifest.json"


def rank_file(rank: int) -> str:
    return f"rank-{rank:05d}.pt"


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
        """Bytes of all ranks' files."""
        return sum(int(file["size"]) for file in self.manifest["files"].values())


def read_committed(path: Path) -> Committed:
    """Return the checkpoint in a directory.

    Raises:
        CheckpointError: it was not committed, or by a newer chainrun.
    """
    manifest = read_json(path / MANIFEST)
    if not isinstance(manifest, dict) or "files" not in manifest:
        what = "does not exist" if not path.exists() else f"holds no valid {MANIFEST}: it was never committed"
        raise CheckpointError(f"the checkpoint {path} {what}")
    if manifest["format"] > FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {manifest['format']}, this chainrun reads up to {FORMAT}; "
            "use the chainrun that wrote it, or a newer one"
        )
    return Committed(path, manifest)


def flaw(checkpoint: Committed, *, hashes: bool = True) -> str | None:
    """Return why a checkpoint cannot be trusted, None where every file has its stated size and hash."""
    for name, stated in checkpoint.manifest["files"].items():
        path = checkpoint.path / name
        try:
            size = path.stat().st_size
            if size != stated["size"]:
                return f"{name} has {size} bytes instead of {stated['size']}"
            if hashes:
                from chainrun.checkpoint import image  # torch: not for commands that only look

                if image.digest(path) != stated["xxh3_128"]:
                    return f"the content of {name} has changed since it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


class Store:
    """The checkpoints of one run directory."""

    def __init__(self, run: RunDir) -> None:
        self._run = run
        self._trusted: set[Path] = set()  # verified, or written, by this process

    def committed(self) -> list[Committed]:
        """Return all committed checkpoints, newest first, whether or not they can be trusted."""
        found = []
        if self._run.checkpoints.is_dir():
            for path in self._run.checkpoints.iterdir():
                if parse_checkpoint(path.name):
                    try:
                        found.append(read_committed(path))
                    except CheckpointError:
                        continue
        return sorted(found, key=lambda c: parse_checkpoint(c.path.name) or (0, 0), reverse=True)

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

    def newest(self, on_flaw: Callable[[Committed, str], None] = lambda c, why: None) -> Committed | None:
        """Return the newest checkpoint that can be trusted.

        Args:
            on_flaw: told of each newer one that cannot, and why.
        """
        for checkpoint in self.committed():
            why = self.flaw(checkpoint)
            if why is None:
                return checkpoint
            on_flaw(checkpoint, why)
        return None

    def path_for(self, step: int) -> Path:
        """Return a free name for a checkpoint at `step`."""
        repeat = 0
        while (path := self._run.checkpoint(step, repeat)).exists():
            repeat += 1
        return path

    def temporary(self, path: Path) -> Path:
        return path.with_name(path.name + ".tmp")

    def set_aside(self, checkpoint: Committed) -> Path:
        """Rename a checkpoint that cannot be trusted, so that its name is free; it is kept to be looked at."""
        target = checkpoint.path.with_name(f"{checkpoint.path.name}.flawed-{int(time.time())}")
        os.rename(checkpoint.path, target)
        fsync_dir(target.parent)
        return target

    def clean(self) -> None:
        """Remove what crashed saves left. Only for the holder of the run's lock."""
        for path in self._run.checkpoints.glob("step-*.tmp"):
            shutil.rmtree(path, ignore_errors=True)

    def commit(self, temporary: Path, path: Path) -> Committed:
        """Make a complete directory the checkpoint, durably."""
        fsync_dir(temporary)
        os.rename(temporary, path)
        fsync_dir(path.parent)
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
        for checkpoint in self.committed():
            if good >= keep:
                retired.append(checkpoint)
            elif self.flaw(checkpoint) is None:
                good += 1
        for checkpoint in reversed(retired):
            if keep_every and checkpoint.step % keep_every == 0:
                continue
            # the manifest goes first: a half-removed directory is then no checkpoint
            (checkpoint.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(checkpoint.path, ignore_errors=True)
            yield checkpoint
