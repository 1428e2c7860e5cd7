"""What one process of one job does: prepare, call the user's function, say how it ended."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from chainrun import breakers, experiment, function, journal, pace, snapshot
from chainrun.allocation import Allocation
from chainrun.checkpoint.ahead import Ahead
from chainrun.errors import ChainrunError, RankFailed, UsageError
from chainrun.lock import BEAT, Lock, Locked
from chainrun.project import git_state
from chainrun.rundir import RunDir, check_format, read_json, write_durably
from chainrun.training.rhythm import Pace
from chainrun.training.stop import Lead, SegmentEnd, Signals

if TYPE_CHECKING:
    from chainrun.training.run import Run


LINE_EVERY = 60.0  # seconds between two lines in a job's log that say where the training is


@dataclass(frozen=True)
class Outcome:
    """How a segment ended."""

    kind: Literal["done", "stopped", "failed", "retry", "idle", "halted", "locked", "lost", "follows"]
    """``retry``: failed, and may be tried again from the last checkpoint. ``idle``: there was nothing to do,
    the run is done, failed or cancelled, or its chain has stopped. ``halted``: the chain must not go on by itself.
    ``locked``: another segment carries the run. ``lost``: another rank was killed, and this one could not go on alone.
    ``follows``: another rank has failed, says so, and sees to what comes next."""
    reason: str = ""
    step: int = 0
    options: str = ""
    """Of ``halted``: what has to be added to the command that goes on."""


def say(line: str) -> None:
    """Print a line to this rank's log; a full disk does not end a training for it."""
    with contextlib.suppress(OSError):
        print(f"chainrun: {line}", file=sys.stderr, flush=True)


def run_segment(
    run: RunDir, allocation: Allocation, signals: Signals, began: Callable[[], None] = lambda: None
) -> Outcome:
    """Carry the run on until its function returns or the segment has to end.

    Args:
        began: called on rank 0 when the run is this segment's and may go on.
    """
    if run.done.exists():
        return Outcome("idle", "the run is done")
    if run.stop.exists():
        return Outcome("idle", "the run was cancelled")
    if run.failed.exists():
        return Outcome("idle", "the run has failed")
    if run.halted.exists():
        return Outcome("idle", "the chain has stopped")
    try:
        check_format(run)
    except UsageError as error:  # the run is well, and not ours to write into
        say(str(error))
        return Outcome("locked", str(error))
    segment = _Segment(run, allocation, signals, began)
    try:
        return segment.carry()
    except SegmentEnd as end:
        step = segment.training.global_step if segment.training else 0
        unused = segment.training.time_left() if segment.training else float("inf")
        if allocation.rank == 0:
            segment.note(
                "stop",
                segment=segment.number,
                step=step,
                reason=end.wish.reason,
                unused_seconds=round(unused, 1) if unused < float("inf") else None,
                lead={name: round(seconds, 3) for name, seconds in end.wish.lead.items()} or None,
            )
            why = end.wish.reason + (f", {Lead(**end.wish.lead)}" if end.wish.lead else "")
            say(f"segment {segment.number} stops at step {step} ({why}), checkpoint committed")
        return Outcome("stopped", end.wish.reason, step)
    except Locked as error:  # the run is well, in other hands
        say(str(error))
        return Outcome("locked", str(error))
    except BaseException as error:
        return segment.fail(error)
    finally:
        segment.close()


class _Segment:
    def __init__(
        self, run: RunDir, allocation: Allocation, signals: Signals, began: Callable[[], None]
    ) -> None:
        self._began = began
        self._run, self._allocation, self._signals = run, allocation, signals
        self._lock = Lock(run, allocation.job, allocation.restart)
        self._control: Any = None
        self._ahead: Ahead | None = None
        self._locked = False
        self._retries = 0
        self._failed = False
        self._beaten = 0.0
        self._early: list[str] | None = []  # said before the segment's first line, to be printed after it
        self._rate, self._told = pace.Rate(), time.monotonic()
        self.training: Run | None = None
        self.number = 0

    def carry(self) -> Outcome:
        run, allocation = self._run, self._allocation
        described = experiment.load(run.experiment)
        self._retries = described.chain.retry_errors
        if allocation.rank == 0:
            before = read_json(run.lock)
            taken_over = self._lock.acquire()
            self._locked = True
            if taken_over:
                self._say(f"took the lock over: {taken_over}")
            if allocation.scheduler == "slurm":
                self._note_start(before or {})
                trip = breakers.tripped(run, described.chain)
                if trip is not None:  # those before were killed, and could not ask
                    return Outcome("halted", trip.why, options=trip.options)
            self._began()
            self.number = 1 + sum(1 for _ in journal.events(run, "segment"))
        self._ahead = Ahead(run, allocation.rank)
        if described.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        import torch

        from chainrun.checkpoint.writer import Alone
        from chainrun.training import distributed, environment, rng
        from chainrun.training.record import Recorder
        from chainrun.training.run import Run
        from chainrun.training.saving import Setting

        if described.deterministic:
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.benchmark = False
        self._control = distributed.connect(allocation, run)
        group = self._control or Alone()
        self.number = group.broadcast(self.number)
        source = snapshot.frozen_source(run) or function.find_function(described, run.path)
        snapshot.use(run)
        train = function.load_function(source)
        every = described.checkpoint.every
        created = journal.last(run, "created") or {}
        limits = described.local if allocation.scheduler == "local" else described.slurm
        keep_every = described.checkpoint.keep_every
        setting = Setting(
            allocation=allocation,
            group=group,
            name=described.name,
            id=created.get("id", described.name),
            segment=self.number,
            seed=described.seed,
            save_every_steps=every.steps if isinstance(every, experiment.Steps) else None,
            keep=described.checkpoint.keep,
            keep_every=keep_every.steps if keep_every else None,
            reshard=described.checkpoint.reshard,
            ahead=self._ahead,
            background=True,
            watch={
                "signals": self._signals,
                "end": allocation.end,
                "every": every if isinstance(every, float) else None,
                "lead": limits.lead if isinstance(limits.lead, float) else None,
                "beat": self._beat,
                "agreement": self._control,
                "leads": allocation.rank == 0,
                "pace": Pace(),
            },
            environment=environment.facts(allocation, self._git(source)) if allocation.rank == 0 else {},
            may_write=lambda: not self._locked or self._lock.held(),
            trains=self._trains if allocation.rank == 0 else lambda seconds: None,
            say=self._say if allocation.rank == 0 else lambda line: None,
        )
        if allocation.rank == 0:  # one run there too; what a person has set counts
            os.environ.setdefault("WANDB_RUN_ID", setting.id)
            os.environ.setdefault("WANDB_RESUME", "allow")
        began = time.perf_counter()
        self.training = training = Run(run.path, setting=setting)
        self._ahead.close()
        seconds = time.perf_counter() - began
        newest = training.restored_from
        if newest is not None and newest.manifest.get("ended"):  # killed between its last two acts
            return self._done(newest.manifest["result"])
        if allocation.rank == 0:  # before the line in the log, whose reader asks the journal
            journal.record(
                run,
                "segment",
                segment=self.number,
                job=allocation.job,
                restart=allocation.restart,
                host=allocation.host,
                world_size=allocation.world_size,
                resumed=training.resumed,
                step=training.global_step,
                checkpoint=newest and newest.path.name,
                seconds=round(seconds, 3),
            )
        if newest is None:
            first = "fresh start"
        else:
            first = f"resuming at step {training.global_step} from {newest.path.name} (read and verified in {seconds:.2f} s)"
        self._begin(f"segment {self.number}: {first}")
        if allocation.rank == 0:
            drift = environment.drift(newest.manifest["environment"], setting.environment) if newest else []
            drift += snapshot.installed_drift(run)
            if drift:
                journal.record(run, "drift", segment=self.number, changes=drift)
                say(
                    "warning: the results may differ from here on, the environment has changed: "
                    + "; ".join(drift)
                )
        if allocation.record is not None:
            Recorder(training, Path(allocation.record))
        if described.seed is not None:
            rng.seed_all(described.seed)
        training._start()
        result = train(training, **described.args)
        training._settle()
        if self._control is not None:
            self._control.returned()
        result = _plain(result)
        training._finish(result)
        if not training.passed_a_boundary and allocation.rank == 0:
            why = (
                f"{described.function.rpartition(':')[2]}() returned without one step boundary, so no checkpoint could "
                "be taken on its way and a walltime would have killed it; call run.step() after every optimizer step, "
                "or loop over run.steps(n)"
            )
            self.note("warning", segment=self.number, step=training.global_step, reason=why)
            say(f"warning: {why}")
        return self._done(result)

    def _git(self, source: function.FunctionSource) -> dict[str, str]:
        frozen = snapshot.frozen_git(self._run)
        if frozen is not None:
            return frozen
        return git_state(source.path.parent if source.path else self._run.path)

    def _say(self, line: str) -> None:
        """Print a line, or keep it until the segment's first one is printed."""
        if self._early is None:
            say(line)
        else:
            self._early.append(line)

    def _begin(self, first: str | None) -> None:
        """Print the segment's first line, and what had to wait for it."""
        early, self._early = self._early or [], None
        for line in ([] if first is None else [first]) + early:
            say(line)

    def _note_start(self, holder: dict[str, Any]) -> None:
        """Record that this job has started, and that the one before was killed where it has not said how it ended.

        Args:
            holder: what the lock said before it was ours.
        """
        run, allocation = self._run, self._allocation
        before = breakers.starts(list(journal.events(run)))[-1:]
        if before and before[0].end is None:
            job, restart = before[0].event["job"], before[0].event["restart"]
            seen, step = (journal.last(run) or {})["time"], None
            if (holder.get("job"), holder.get("restart")) == (job, restart):
                seen, step = max(seen, holder["time"]), holder.get("step")
            journal.record(
                run,
                "lost",
                job=job,
                restart=restart,
                segment=before[0].segment,
                state=allocation.ended(job, before[0].event["nodes"], before[0].event["time"]),
                last_seen=seen,
                step=step,
            )
        journal.record(
            run,
            "start",
            job=allocation.job,
            restart=allocation.restart,
            nodes=list(allocation.nodes),
            gpus=allocation.gpus,
        )

    def _trains(self, seconds: float | None) -> None:
        """Record that the first step is done."""
        assert self.training is not None
        took = None if seconds is None else round(seconds, 3)
        step, queued = self.training.global_step, self._allocation.queued()
        self.note("trains", segment=self.number, step=step, seconds=took, **queued)

    def _done(self, result: Any) -> Outcome:
        assert self.training is not None
        step = self.training.global_step
        if self._allocation.rank == 0:
            write_durably(self._run.result, json.dumps(result, indent=1).encode())
            self.note("done", segment=self.number, step=step)
            write_durably(self._run.done, b"")
            say(journal.done_after(step, self.number))
        return Outcome("done", step=step)

    def note(self, event: str, **fields: Any) -> None:
        """Record how the segment ended; it ended so also where the journal cannot be written."""
        try:
            journal.record(self._run, event, **fields)
        except OSError as error:
            say(f"warning: {self._run.journal} could not be written: {error.strerror}")

    def fail(self, error: BaseException) -> Outcome:
        """Record why, where the next reader looks: the journal, FAILED and this rank's log."""
        self._failed = True
        self._begin(None)
        step = self.training.global_step if self.training else 0
        rank = self._allocation.rank
        if self._lock.lost():  # the orphan of a node that had failed: what it meets is not the run's
            why = f"another segment has taken over {self._run.path}; this one ends: {error}"
            say(why)
            return Outcome("locked", why, step)
        if isinstance(error, RankFailed):
            say(f"rank {rank} ends at step {step}: {error}")
            return Outcome("follows", str(error), step)
        if isinstance(error, ChainrunError):
            text = message = str(error)
        else:
            frames = traceback.TracebackException.from_exception(error)
            text = "".join(frames.format())
            message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if self.training and self.training.resumed:
                from chainrun.training.passed_on import explain  # not before the function has loaded torch

                with contextlib.suppress(Exception):  # what failed is said without it too
                    if hint := explain(error):
                        text, message = f"{text}{hint}\n", f"{message}; {hint}"
        gone = self._control.gone() if self._control else None
        if gone is not None:
            # as if this one had been killed too: the run is well, and its next start goes on
            say(f"rank {gone} is gone, so rank {rank} ends at step {step}, with: {message}")
            return Outcome("lost", message, step)
        where = f"rank {rank} failed in segment {self.number} at step {step}: "
        say(where + text)
        # an error of the user's function may be the machine's; what chainrun refuses, it refuses again
        retry = not isinstance(error, ChainrunError) and _failures(self._run, self.number) < self._retries
        try:
            journal.record(
                self._run,
                "failed",
                segment=self.number,
                rank=rank,
                node=self._allocation.node_name,
                step=step,
                error=message,
                traceback=text,
                retry=retry,
            )
            if not retry and not self._run.failed.exists():
                write_durably(self._run.failed, (where + text).encode())
            if self._control is not None:
                self._control.fail()
        except Exception as problem:
            say(f"that could not be recorded in {self._run.path}: {problem}")
        return Outcome("retry" if retry else "failed", message, step)

    def _beat(self) -> None:
        training, now = self.training, time.monotonic()
        often = self._allocation.scheduler == "local"  # a shared filesystem is asked for less
        if self._locked and training is not None and (often or now - self._beaten >= BEAT):
            self._beaten = now
            if not self._lock.beat(segment=self.number, **training.progress()):
                self._signals.terminated = (
                    True  # no more steps; the save at the stop finds the lock lost and ends it
                )
            self._report(now)

    def _report(self, now: float) -> None:
        """Print where the training is, now and then, from the side thread."""
        assert self.training is not None
        at = self.training.progress()
        self._rate.note(now, at["step"])
        if now - self._told >= LINE_EVERY:
            self._told = now
            say(f"segment {self.number}, {pace.line(at, self._rate.value)}")

    def close(self) -> None:
        self._begin(None)
        if self.training is not None:
            self.training._close()
        if self._control is not None and not self._failed:
            self._control.leave()
        if self._locked:  # the last act: from here on another segment may write
            self._lock.release()


def _failures(run: RunDir, before: int) -> int:
    """Return how many segments have failed since a person last looked, without one that fails on several ranks now."""
    failed: set[int] = set()
    for event in journal.events(run, "failed", "continue"):
        failed = failed | {event["segment"]} if event["event"] == "failed" else set()
    return len(failed - {before})


def _plain(result: Any) -> Any:
    """Return the function's result as JSON can hold it; after weeks of training a result never fails."""

    def convert(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else repr(value)

    return json.loads(json.dumps(result, default=convert, skipkeys=True))
