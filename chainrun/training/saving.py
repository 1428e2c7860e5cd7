"""What a `Run` reads when it starts and writes when a save is due: its checkpoints, and the metrics with them."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chainrun import journal
from chainrun.allocation import Allocation
from chainrun.checkpoint import reader, writer
from chainrun.checkpoint.ahead import Ahead, files_of
from chainrun.checkpoint.image import CHUNK, RING, Progress, Staging
from chainrun.checkpoint.layout import Planner
from chainrun.checkpoint.store import Committed, Store, flaw, read_committed
from chainrun.checkpoint.writer import Ready
from chainrun.errors import CheckpointError, DiskFullError, RestoreError
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
    ahead: Ahead | None = None
    """What is being read already."""
    background: bool = False
    """Whether the training goes on while a periodic save is written; a `Run` made by hand is never closed, and a
    process may end at any line of it."""
    may_write: Callable[[], bool] = lambda: True
    """Whether this segment (still) holds the run directory."""
    trains: Callable[[float | None], None] = lambda seconds: None
    """Told when the segment's first step is done, and how long it took since the restore; None at a fresh start."""
    say: Callable[[str], None] = lambda line: print(f"chainrun: {line}", file=sys.stderr, flush=True)


class Saving:
    """The checkpoints and the metrics of one segment, on every rank.

    One thread writes all of them, in order. The training waits for it before the segment ends, and before the next
    save; else it waits for the copy of its state only.

    Args:
        told: called with the seconds that each save took, by that thread.
        left: returns the seconds until the job is killed.
        wake: called by that thread where `check` has something to raise.
    """

    def __init__(
        self,
        run: RunDir,
        setting: Setting,
        told: Callable[[float], None],
        wake: Callable[[], None],
        left: Callable[[], float] = lambda: float("inf"),
    ) -> None:
        self._run, self._setting, self._told, self._wake, self._left = run, setting, told, wake, left
        self._rank = setting.allocation.rank
        place = setting.allocation
        # SLURM may start a job again while a start that it has lost still runs
        self._store = Store(run, f"{place.job}-{place.restart}" if place.scheduler == "slurm" else "")
        self._store.recycles = setting.background  # a `Run` made by hand is never closed
        self._unready: str | None = None
        self._is_slow = False  # there is no memory for a copy of the state, and that has been said
        self._is_short = False  # there is no room for the next checkpoint, and that has been said
        self._found: dict[str, Any] | None = None  # what was read of the checkpoint that is looked at
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="chainrun-save")
        self._planner = Planner()
        self._staging = Staging(self._planner)
        self._running: Future[bool] | None = None
        self._tidying: Future[None] = Future()
        self._tidying.set_result(None)
        self._progress = Progress()  # of the save that was begun last
        self._seconds = 0.0  # that the last committed one took
        self._device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None
        self.newest = Path()
        """The checkpoint that was committed last."""
        self.metrics = Metrics(run.metrics, active=self._rank == 0, may_write=setting.may_write)

    def note(self, event: str, **fields: Any) -> None:
        """Record an event, if this is rank 0; a full disk does not end a training for it."""
        if self._rank == 0:
            with contextlib.suppress(OSError):
                journal.record(self._run, event, **fields)

    # ---- at the start

    def load(self) -> tuple[Committed, dict[str, Any]] | None:
        """Return the newest trusted checkpoint and this rank's part of it, None where there was none yet.

        Every rank reads and verifies its own files, and they agree on the newest checkpoint in which all are whole.

        Raises:
            RestoreError: no checkpoint can be trusted, or the newest is of another number of ranks.
        """
        group = self._setting.group
        if self._rank == 0:
            name, problem = group.broadcast(self._choose())["end"]
        else:
            while "end" not in (order := group.broadcast(None)):
                group.gather(self._read(Path(order["read"])))
            name, problem = order["end"]
        if problem is not None:
            raise RestoreError(problem)
        if name is None:
            self.metrics.cut(0)
            return None
        checkpoint = read_committed(Path(name))
        ranks, mine = checkpoint.manifest["world_size"], self._setting.allocation.world_size
        if ranks != mine:
            self._allow(checkpoint.path.name, ranks, mine)
        saved, self._found = self._found, None
        assert saved is not None
        self.metrics.cut(saved["metrics"])
        if self._rank == 0:
            self._look_for_room()
        return checkpoint, saved

    def _read(self, path: Path) -> str | None:
        """Read this rank's part of a checkpoint and verify its files; return why it cannot be trusted."""
        self._found = None
        try:
            checkpoint = read_committed(path)
            ranks, mine = checkpoint.manifest["world_size"], self._setting.allocation.world_size
            rank = self._rank % ranks
            self._found = reader.read(checkpoint, rank, self._setting.ahead)
        except CheckpointError as error:
            return str(error).replace(f"{path}/", "")
        read = files_of(checkpoint, rank)
        shared_out = sorted(checkpoint.manifest["files"])[self._rank :: mine]
        return flaw(checkpoint, [name for name in shared_out if name not in read])

    def _judge(self, checkpoint: Committed) -> str | None:
        """Let every rank verify its files of a checkpoint; return why it cannot be trusted."""
        why = flaw(checkpoint, hashes=False)
        if why is None:
            group = self._setting.group
            group.broadcast({"read": str(checkpoint.path)})
            why = next(filter(None, group.gather(self._read(checkpoint.path))), None)
        if why is None:
            self._store.trust(checkpoint)
        return why

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

    def _choose(self) -> dict[str, tuple[str | None, str | None]]:
        """Return as ``end`` the newest trusted checkpoint's path, and why there is none where there should be one."""
        self._store.clean()
        flawed: list[tuple[Committed, str]] = []
        newest = self._store.newest(lambda checkpoint, why: flawed.append((checkpoint, why)), self._judge)
        if newest is None:
            if not flawed:
                lost = journal.last(self._run, "checkpoint")
                return {"end": (None, None if lost is None else self._removed(lost))}
            found = "; ".join(f"{checkpoint.path.name}: {why}" for checkpoint, why in flawed)
            problem = (
                f"no checkpoint in {self._run.checkpoints} can be trusted ({found}). The run does not begin again "
                "by itself: bring one back, or start a run of another name"
            )
            return {"end": (None, problem)}
        for checkpoint, why in flawed:
            aside = self._store.set_aside(checkpoint)
            self.note("fallback", path=checkpoint.path.name, reason=why)
            self._setting.say(
                f"the checkpoint {checkpoint.path.name} cannot be trusted ({why}); it is kept as {aside.name}, "
                f"going back to {newest.path.name}"
            )
        return {"end": (str(newest.path), None)}

    def _removed(self, lost: dict[str, Any]) -> str:
        return (
            f"{self._run.checkpoints} holds no checkpoint, but one was committed at step {lost['step']} and has been "
            "removed since. The run does not begin again by itself: bring it back, or start a run of another name"
        )

    # ---- at a boundary

    def settle_metrics(self) -> int:
        """Return the size of the metrics' file, all that was logged in it; note why not, for the save to tell."""
        self._unready = None
        try:
            return self.metrics.flush() if self._rank == 0 else 0
        except OSError as error:
            self._unready = f"{self._run.metrics} could not be written: {error.strerror}"
            return 0

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._running is not None and not self._running.done()

    def check(self) -> None:
        """Raise what ended a save in the background, if it ends the training too."""
        if self._running is not None and self._running.done():
            self._running.result()

    def settle(self) -> None:
        """Wait until nothing is under way, the removal of older checkpoints included."""
        self.committed()
        self._tidying.result()

    def committed(self) -> bool:
        """Wait for the save under way, if there is one; return whether the last one begun was committed."""
        return self._running is None or self._running.result()

    def save(self, wish: Wish, step: int, tree: dict[str, Any], about: dict[str, Any]) -> None:
        """Take the state as it is now and commit it; a periodic one in the background, the others at once.

        Raises:
            CheckpointError: a rank could not write, and this was the segment's last save.
            RegisterError: the state holds what no checkpoint can.
            Locked: another segment has taken the run directory over.
        """
        began = time.perf_counter()
        if wish.kind == "stop" and self.busy:
            self._finish_or_give_up()
        self.committed()
        if self._tidying.done():
            self._tidying.result()  # raises what it should not have raised
        waited = time.perf_counter() - began
        about = {
            "run": self._setting.id,
            "segment": self._setting.segment,
            "reason": wish.reason,
            "environment": self._setting.environment,
            **about,
        }
        mine = writer.without_replicas(self._setting.group, writer.ready(tree))
        background = self._setting.background and wish.kind == "save" and mine.refused is None
        if background:
            try:
                mine = writer.copied(mine, self._staging)
            except CheckpointError as error:
                background = False
                if not self._is_slow:
                    self._is_slow = True
                    self._setting.say(
                        f"warning: {error}; the training waits while a checkpoint is written, which then takes "
                        f"{RING * CHUNK >> 20} MB"
                    )
        stall = time.perf_counter() - began if background else None
        self._progress = Progress()
        self._running = self._thread.submit(
            self._write, wish, step, mine, about, self._unready, waited=waited, stall=stall
        )
        if not background:
            self._running.result()
        if not background and wish.kind == "save":
            self._tidying.result()

    def _finish_or_give_up(self) -> None:
        """Give the save under way up if, of it and of the last one, there is time for one only.

        Where there is time for neither, the older state is the one that is safe soonest. One rank that gives it
        up is enough, and none waits for it.
        """
        rest, left = self._progress.left(self._seconds), self._left()
        last = self._seconds or rest
        if last <= left < rest + 1.2 * last:
            self._progress.abandoned = True

    def _write(
        self,
        wish: Wish,
        step: int,
        mine: Ready,
        about: dict[str, Any],
        unready: str | None,
        **times: float | None,
    ) -> bool:
        """Write and commit a checkpoint, in the thread; return whether it was committed."""
        try:
            if self._device is not None:
                torch.accelerator.set_device_index(
                    self._device
                )  # every thread has a current device of its own
            return self._commit(wish, step, mine, about, unready, times)
        except BaseException:
            self._wake()
            raise

    def _commit(
        self,
        wish: Wish,
        step: int,
        mine: Ready,
        about: dict[str, Any],
        unready: str | None,
        times: dict[str, float | None],
    ) -> bool:
        setting = self._setting
        self._hold()
        if self._rank == 0 and not self._store.folder.exists():
            setting.say(
                f"warning: {self._store.folder} is gone, and with it every checkpoint before step {step}; "
                "it is made again"
            )
        if unready is None and self._rank == 0:
            try:
                self.metrics.sync()
            except OSError as error:
                unready = f"{self._run.metrics} could not be written: {error.strerror}"
        try:
            path, seconds = self._save(step, mine, about, unready)
            self.newest = path
        except CheckpointError as error:
            self._hold()  # or that is why
            if wish.kind == "stop":
                raise
            # older checkpoints are untouched and the training is well: it goes on, and tries again in time
            self.note("unsaved", step=step, reason=str(error))
            setting.say(f"warning: {error}; the training goes on without it")
            return False
        self._seconds = seconds
        self._told(seconds)
        if self._rank == 0:
            self.note(
                "checkpoint",
                segment=setting.segment,
                step=step,
                path=path.name,
                bytes=_size(path),
                seconds=round(seconds, 3),
                **{name: round(value, 3) for name, value in times.items() if value is not None},
                reason=wish.reason,
            )
            if wish.kind == "stop":
                self._store.recycles = False
            self._tidying = self._thread.submit(self._tidy)
        return True

    def _tidy(self) -> None:
        """Retire older checkpoints, in the thread: the last save of a segment is safe without waiting for it."""
        with contextlib.suppress(OSError):  # tried again after the next save
            for _ in self._store.retire(self._setting.keep, self._setting.keep_every):
                pass
        self._look_for_room()

    def _save(self, step: int, mine: Ready, about: dict[str, Any], unready: str | None) -> tuple[Path, float]:
        """Write and commit; where the disk or a quota is full, again without the older checkpoints."""
        group, progress = self._setting.group, self._progress
        try:
            return writer.save(
                self._store, group, step, mine, about, unready, self._hold, self._planner, progress
            )
        except DiskFullError as error:
            if not group.broadcast(self._make_room(str(error)) if self._rank == 0 else None):
                raise
            return writer.save(
                self._store, group, step, mine, about, unready, self._hold, self._planner, progress
            )

    def _make_room(self, why: str) -> bool:
        """Remove all checkpoints but the newest good one, and those kept for ever; return whether there were some."""
        removed = []
        self._store.recycles = False  # on a disk this full every byte is somebody's
        dropped = self._store.drop_spare()
        with contextlib.suppress(OSError):  # what was removed until then makes room too
            for each in self._store.retire(1, self._setting.keep_every):
                removed.append(each.path.name)
        if removed:
            self.note("space", reason=why, removed=removed)
            self._setting.say(f"warning: {why}; removed {', '.join(removed)} to make room")
        return dropped or bool(removed)

    def _look_for_room(self) -> None:
        """Make room for the next checkpoint while there is time, on rank 0; say so where there is none."""
        try:
            newest = self._store.latest()
        except OSError:
            return
        if newest is None:
            return

        def short() -> str | None:
            disk = os.statvfs(self._store.folder)
            free = disk.f_bavail * disk.f_frsize + self._store.spare_bytes
            if free >= newest.size * 1.05:
                return None
            return f"{free / 1e6:.1f} MB are free in {self._store.folder}, a checkpoint needs {newest.size / 1e6:.1f} MB"

        with contextlib.suppress(OSError):
            why = short()
            if why is not None and self._make_room(why):
                why = short()
            if why is not None and not self._is_short:
                self.note("space", reason=why, removed=[])
                self._setting.say(
                    f"warning: {why}: the next one will fail. Make room before the job ends, or what is trained from "
                    "here on is lost"
                )
            self._is_short = why is not None

    def _hold(self) -> None:
        """Raise if the run directory is gone, or another segment has taken it over."""
        if not self._run.path.is_dir():
            raise CheckpointError(
                f"the run directory {self._run.path} is gone: it was removed or renamed while the training ran. "
                "Nothing can be saved any more, so the training ends; bring it back to go on"
            )
        if not self._setting.may_write():
            raise Locked(
                f"another segment has taken over {self._run.path}: this one ends without writing, so that only "
                "one does"
            )

    def close(self) -> None:
        """Wait for the save under way, which may still be committed; what ended it has been said, or is of no use."""
        with contextlib.suppress(BaseException):
            self.committed()
        self._thread.shutdown()
        self._store.drop_spare()
        with contextlib.suppress(OSError):  # a full disk: what counts is in the checkpoint
            self.metrics.flush()


def _size(folder: Path) -> int | None:
    """Return the bytes of all files of a checkpoint; None where it has been removed meanwhile."""
    try:
        return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    except OSError:
        return None
