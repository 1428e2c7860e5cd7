"""What a `Run` reads when it starts and writes when a save is due: its checkpoints, and the metrics with them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chainrun import journal
from chainrun.allocation import Allocation
from chainrun.checkpoint import image, writer
from chainrun.checkpoint.store import Committed, Store, rank_file, read_committed
from chainrun.errors import CheckpointError, RestoreError
from chainrun.lock import Locked
from chainrun.rundir import RunDir
from chainrun.training import stop
from chainrun.training.metrics import Metrics
from chainrun.training.stop import Wish


@dataclass
class Setting:
    """What a segment gives its `Run`; the defaults are those of a `Run` made by hand."""

    allocation: Allocation = field(default_factory=Allocation)
    group: Any = field(default_factory=writer.Alone)
    name: str = "run"
    id: str = "run"
    segment: int = 1
    seed: int | None = 0
    save_every_steps: int | None = None
    keep: int = 2
    keep_every: int | None = None
    reshard: bool = False
    """Whether a checkpoint of another number of ranks may be gone on from."""
    watch: dict[str, Any] = field(default_factory=stop.alone)
    """Arguments of the `Watch` besides those that the run knows itself."""
    environment: dict[str, Any] = field(default_factory=dict)
    """Goes into the manifest."""
    may_write: Callable[[], bool] = lambda: True
    """Whether this segment (still) holds the run directory."""
    say: Callable[[str], None] = lambda line: print(f"chainrun: {line}", file=sys.stderr, flush=True)


class Saving:
    """The checkpoints and the metrics of one segment, on every rank."""

    def __init__(self, run: RunDir, setting: Setting) -> None:
        self._run, self._setting = run, setting
        self._rank = setting.allocation.rank
        self._store = Store(run)
        self._unready: str | None = None
        self.newest = Path()
        """The checkpoint that was committed last."""
        self.metrics = Metrics(run.metrics, active=self._rank == 0)

    def note(self, event: str, **fields: Any) -> None:
        """Record an event, if this is rank 0; a full disk does not end a training for it."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                journal.record(self._run, event, **fields)

    # ---- at the start

    def load(self) -> tuple[Committed, dict[str, Any]] | None:
        """Return the newest trusted checkpoint and this rank's part of it, None where there was none yet.

        Raises:
            RestoreError: no checkpoint can be trusted, or the newest is of another number of ranks.
        """
        name, problem = self._setting.group.broadcast(self._choose() if self._rank == 0 else None)
        if problem is not None:
            raise RestoreError(problem)
        if name is None:
            self.metrics.cut(0)
            return None
        checkpoint = read_committed(Path(name))
        ranks, mine = checkpoint.manifest["world_size"], self._setting.allocation.world_size
        if ranks != mine:
            self._allow(checkpoint.path.name, ranks, mine)
        try:
            saved: dict[str, Any] = image.read(checkpoint.path / rank_file(self._rank % ranks))
        except CheckpointError as error:
            raise RestoreError(str(error)) from error
        self.metrics.cut(saved["metrics"])
        return checkpoint, saved

    def _allow(self, name: str, ranks: int, mine: int) -> None:
        """Say what going on with another number of ranks means, if the experiment allows it."""
        if not self._setting.reshard:
            raise RestoreError(
                f"the checkpoint {name} was taken with {ranks} ranks, this job has {mine}; every rank has random "
                f"state of its own. Start {ranks} ranks again, or a new run, or set checkpoint.reshard: true to go "
                "on with other ranks, no longer bit for bit"
            )
        self.note("reshard", checkpoint=name, ranks_then=ranks, ranks_now=mine)
        self._setting.say(
            f"warning: the checkpoint {name} was taken with {ranks} ranks, this job has {mine}: DTensors are laid "
            f"out anew with the same values; of all else, random state too, rank r takes what rank r mod {ranks} had, "
            f"and a loader goes on after as many batches over all ranks; not bit for bit from here on"
        )

    def _choose(self) -> tuple[str | None, str | None]:
        """Return the newest trusted checkpoint's path, and why there is none where there should be one."""
        self._store.clean()
        flawed: list[tuple[Committed, str]] = []
        newest = self._store.newest(lambda checkpoint, why: flawed.append((checkpoint, why)))
        if newest is None:
            if not flawed:
                return None, None
            found = "; ".join(f"{checkpoint.path.name}: {why}" for checkpoint, why in flawed)
            return None, (
                f"no checkpoint in {self._run.checkpoints} can be trusted ({found}). The run does not begin again "
                "by itself: bring one back, or start a run of another name"
            )
        for checkpoint, why in flawed:
            aside = self._store.set_aside(checkpoint)
            self.note("fallback", path=checkpoint.path.name, reason=why)
            self._setting.say(
                f"the checkpoint {checkpoint.path.name} cannot be trusted ({why}); it is kept as {aside.name}, "
                f"going back to {newest.path.name}"
            )
        return str(newest.path), None

    # ---- at a boundary

    def settle_metrics(self) -> int:
        """Return the size of the metrics' file, all that was logged in it; note why not, for the save to tell."""
        self._unready = None
        try:
            return self.metrics.settle() if self._rank == 0 else 0
        except OSError as error:
            self._unready = f"{self._run.metrics} could not be written: {error.strerror}"
            return 0

    def save(self, wish: Wish, step: int, tree: dict[str, Any], about: dict[str, Any]) -> float | None:
        """Write and commit a checkpoint; return the seconds it took, None where a periodic one failed.

        Raises:
            CheckpointError: a rank could not write, and this was the segment's last save.
            RegisterError: the state holds what no checkpoint can.
            Locked: another segment has taken the run directory over.
        """
        setting = self._setting
        if not setting.may_write():
            raise Locked(
                f"another segment has taken over {self._run.path}: this one ends without writing, so that only "
                "one does"
            )
        about = {
            "run": setting.id,
            "segment": setting.segment,
            "reason": wish.reason,
            "environment": setting.environment,
            **about,
        }
        try:
            path, seconds = writer.save(self._store, setting.group, step, tree, about, self._unready)
            self.newest = path
        except CheckpointError as error:
            if wish.kind == "stop":
                raise
            # older checkpoints are untouched and the training is well: it goes on, and tries again in time
            self.note("unsaved", step=step, reason=str(error))
            setting.say(f"warning: {error}; the training goes on without it")
            return None
        if self._rank == 0:
            self.note(
                "checkpoint",
                segment=setting.segment,
                step=step,
                path=path.name,
                bytes=sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                seconds=round(seconds, 3),
                reason=wish.reason,
            )
            for _ in self._store.retire(setting.keep, setting.keep_every):
                pass
        return seconds

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a full disk: what counts is in the checkpoint
            self.metrics.flush()
