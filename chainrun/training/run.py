"""`Run`: what the user's training function holds in its hands."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chainrun.checkpoint import buckets, objects, sharded, state
from chainrun.checkpoint.store import Committed
from chainrun.checkpoint.writer import ready
from chainrun.errors import RegisterError, RestoreError
from chainrun.rundir import RunDir
from chainrun.training import data, rng, turns, variables, worker
from chainrun.training.diagnosis import Diagnosis
from chainrun.training.extent import Extent
from chainrun.training.passes import Pass
from chainrun.training.position import CHANGED, Position
from chainrun.training.registry import Registry
from chainrun.training.rhythm import Pace
from chainrun.training.saving import Saving, Setting
from chainrun.training.stop import SegmentEnd, Watch, Wish

_NEVER = sys.maxsize


class Run:
    """A training that may be cut at any step boundary and goes on bit for bit.

    chainrun makes one for every segment and hands it to the training function. Made by hand on a folder it
    works in a unit test, without SLURM and without an experiment file; a second one on the same folder goes
    on from the newest checkpoint there.

    Args:
        dir: the run directory.
        setting: what a segment knows of its job and its experiment; none for a run made by hand.

    Raises:
        RestoreError: the folder's checkpoints cannot be trusted, or are of another number of ranks.

    Attributes:
        state: the user's own values, saved and restored; plain data and tensors.
        global_step: optimization steps done since the run began.
        epoch: index of the current turn of `epochs`.
        segment: number of the present segment, from 1.
        resumed: whether this segment goes on from a checkpoint.
        rank, world_size, local_rank: as in torch.distributed.
        device: this rank's accelerator, the CPU where there is none.
        seed: the experiment's seed.
        id: stable over all segments, for experiment trackers.
        dir: the run directory.
        restored_from: the checkpoint that this segment goes on from, None at a fresh start.
    """

    def __init__(self, dir: str | os.PathLike[str], *, setting: Setting | None = None) -> None:
        self._setting = setting = setting or Setting(name=Path(dir).name, id=Path(dir).name)
        self.dir = Path(dir).absolute()
        self._run = RunDir(self.dir).create()
        allocation = setting.allocation
        self.rank, self.world_size = allocation.rank, allocation.world_size
        self.local_rank = allocation.local_rank
        self.id, self.seed, self.segment = setting.id, setting.seed, setting.segment
        self.device = _device(self.local_rank)
        self.global_step = 0
        self.epoch = 0
        self.state: dict[str, Any] = {}
        self._saving = Saving(self._run, setting, self._note_saved, self._wake, self.time_left)
        self._metrics = self._saving.metrics
        self._registry = Registry(setting.say, self._bind, self.world_size)
        self.on_batch: Callable[[str, Any], None] | None = None
        self.on_place: Callable[[], None] | None = None  # told where a checkpoint is taken, or was
        self._ranges: dict[str, dict[str, Any]] = {}
        self._extent = Extent()
        self._due: Wish | None = None
        self._deferred = self._told_of_lacks = self._told_of_shared = False
        self._ended: Wish | None = None
        self._saved_at: tuple[int, str | None] | None = None
        self._warned = False
        self.restored_from: Committed | None = None
        target = None
        if found := self._saving.load():
            self.restored_from, saved = found
            self._registry.restore_from(*found, reshard=setting.reshard)
            self.global_step, self.epoch, target = saved["global_step"], saved["epoch"], saved["position"]
            self.state = state.copied(saved["state"])
            self._extent = Extent(self.restored_from.manifest.get("total"))
            setting.watch["pace"] = Pace(**self.restored_from.manifest["pace"])
        self.resumed = self.restored_from is not None
        registry = self._registry
        outside = variables.codes_around(sys._getframe())
        streams = (registry.random_state, registry.set_random_state)
        self._position = Position(target, self._go_on, *streams, outside)
        about = (self._run, setting, registry, self._position, self.restored_from)
        self._diagnosis = Diagnosis(*about, self._belongings, self._warn)
        self._watch = Watch(
            **setting.watch,
            stop_file=self._run.stop,
            passed=lambda: self._position.boundaries,
            step=lambda: self.global_step,
            first_save=self._guess_save_seconds,
            saving=lambda: self._saving.busy,
        )
        self._checked = False
        self._begun = self.resumed
        self._gone_on: float | None = None  # when the function had come to the checkpoint's place
        self._first_due = self._next_due(self.global_step)
        self._next = 0  # the first step looks whether something was forgotten

    # ---- what the loop knows -------------------------------------------------------------------

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def time_left(self) -> float:
        """Return the seconds until the job is killed; infinite where it has no limit."""
        return self._watch.time_left()

    # ---- registering and restoring -------------------------------------------------------------

    def register(self, **objects: Any) -> None:
        """Say what belongs to the training's state; restore it at once where there is a checkpoint.

        Takes anything with ``state_dict`` and ``load_state_dict`` (modules, also wrapped by DDP or
        torch.compile, optimizers, schedulers, scalers, samplers), `chainrun.DataLoader`, and generators
        (torch.Generator, numpy.random.Generator and RandomState, random.Random). May be called several times,
        before the loop.

        Raises:
            RegisterError: the object cannot be saved or resumed exactly; it is called inside a loop, which a resumed
                function may enter in a later turn.
            RestoreError: the checkpoint lacks the name, or what it holds does not fit.
        """
        if self._position.inside is not None and objects:
            raise RegisterError(
                f"register({next(iter(objects))}=...) was called inside run.{self._position.inside}(): a function that "
                "is resumed in a later turn would not come by. Build and register everything before the loop"
            )
        for name, thing in objects.items():
            self._registry.add(name, thing)

    def _bind(self, name: str, loader: data.DataLoader[Any]) -> data.Chain:
        counter = worker.Counter(self.seed or 0, self.rank)
        chain = data.bind(loader, name, self._position, self._at_head, counter)
        chain.on_batch = self.on_batch
        return chain

    def _go_on(self) -> None:
        """The function has come to the place of the checkpoint: from here on it is the same training."""
        saved, lines = self._registry.go_on()
        turns.check(saved.get("turns", {}), self._diagnosis.turns)
        state.refilled(self.state, state.copied(saved["state"]))
        self.global_step, self.epoch = saved["global_step"], saved["epoch"]
        self._gone_on = time.monotonic()
        rng.restore(rng.from_tensors(saved["rng"]))
        if self._diagnosis.expects_witness:
            owner = saved["position"]["owner"]
            self._diagnosis.hear(owner, self._witnessed, self.global_step)
            self._diagnosis.compare_variables(owner, saved["ranges"])
        for line in lines:
            self._diagnosis.tell(line)
        if self.on_place is not None:
            self.on_place()

    def _witnessed(self) -> dict[str, Any]:
        return {"rng": rng.to_tensors(rng.capture()), **self._registry.state(), "state": self.state}

    # ---- loops ---------------------------------------------------------------------------------

    def epochs(self, n: int) -> Iterator[int]:
        """Yield the epochs' indices 0 … n-1; a resumed run enters the interrupted one again."""
        if self._position.inside is not None:
            raise RegisterError(
                "run.epochs() inside run.epochs() or run.steps() cannot be resumed; use one range"
            )
        what, mark = self._position.begin("epochs")
        if what == "skip":
            return
        exhausted = False
        self._position.note_bound(mark)
        try:
            place = self._resume_range("epochs", what)
            for index in range(place["index"], n):
                self._ranges["epochs"] = {"index": index, "of": n, "random": None}
                if place["entered"]:
                    # the code between `for epoch` and the loader runs again and draws what it drew then
                    self._registry.set_random_state(place["random"])
                else:
                    self._at_head(mark)
                place["entered"] = False
                self.epoch = index
                self._ranges["epochs"] = {"index": index, "of": n, "random": self._registry.random_state()}
                self._position.push("epochs", what)
                try:
                    yield index
                finally:
                    self._position.pop()
            self._ranges["epochs"] = {"index": max(n, place["index"]), "of": n, "random": None}
            self._position.end_is_near(mark)
            self._at_head(mark)
            exhausted = True
        finally:
            self._position.end(mark, exhausted=exhausted)

    def steps(self, n: int) -> Iterator[int]:
        """Yield the steps' indices 0 … n-1; the end of each turn is a step boundary.

        A turn counts as one step of `global_step`, unless it calls `step` itself.
        """
        if self._position.inside == "steps":
            raise RegisterError("run.steps() inside run.steps() cannot be resumed; use one range")
        what, mark = self._position.begin("steps")
        if what == "skip":
            return
        self._position.push("steps", what)
        exhausted = False
        self._position.note_bound(mark)
        try:
            place = self._resume_range("steps", what)
            for index in range(place["index"], n):
                self._ranges["steps"] = {"index": index, "of": n, "random": None}
                self._at_head(mark)
                before = self.global_step
                self._position.advance(mark)
                yield index
                if self.global_step == before:
                    self.step()
                self._position.turn()
            self._ranges["steps"] = {"index": max(n, place["index"]), "of": n, "random": None}
            self._position.end_is_near(mark)
            self._at_head(mark)
            exhausted = True
        finally:
            self._position.pop()
            self._position.end(mark, exhausted=exhausted)

    def _resume_range(self, loop: str, what: str) -> dict[str, Any]:
        """Return where a range starts; arrive where the checkpoint was taken at its head."""
        place: dict[str, Any] = {"index": 0, "entered": False}
        if what == "resume":
            assert self._registry.saved is not None
            saved = self._registry.saved["ranges"][loop]
            place = {**saved, "entered": saved["random"] is not None}
            if self._position.owns(loop):
                self._position.arrive()
                place["entered"] = False
        return place

    def step(self, **metrics: Any) -> None:
        """One optimization step is done: log its metrics; a step boundary.

        Args:
            metrics: numbers or tensors; a device tensor is read later, without waiting for it here.

        Raises:
            CheckpointError: a checkpoint that is due cannot be written.
        """
        if not self._position.boundary():
            return
        self.global_step += 1
        if metrics:
            self._metrics.add(self.global_step, metrics)
        if self._watch.pending or self._due is not None or self.global_step >= self._next:
            self._consider()

    def poll(self) -> None:
        """A boundary that counts no step, for long evaluation loops."""
        if self._position.boundary() and (self._watch.pending or self._due is not None):
            self._consider()

    def save(self) -> None:
        """Take a checkpoint where the loop goes on, or at the next boundary; all ranks call it."""
        if not self._position.walking and self._due is None:
            # not here: a resumed function comes to loops and boundaries, and could not tell this place from them
            self._due = Wish("save", "requested")

    def log(self, **metrics: Any) -> None:
        """Log metrics at the present step."""
        if not self._position.walking:
            self._metrics.add(self.global_step, metrics)

    # ---- boundaries ----------------------------------------------------------------------------

    def _consider(self) -> None:
        """Something may be due at this boundary."""
        if self._ended is not None:
            raise SegmentEnd(self._ended)  # the function caught the first one
        self._saving.check()
        if not self._checked:
            self._checked, self._next = True, self._first_due
            self._setting.trains(None if self._gone_on is None else time.monotonic() - self._gone_on)
            self._position.refuse_by_hand()
            registered, things = self._registry.objects, [thing for _, thing in self._registry.things()]
            objects.check(registered)
            if not self.resumed:
                self._check_kinds(registered)
            self._diagnosis.first_boundary()
            for line in (
                *objects.forgotten(registered, things),
                *([] if self.resumed else objects.strangers(registered, things)),
            ):
                self._warn(line)
            if not things and not self.state:
                self._warn(
                    "nothing is registered, so a checkpoint holds no weights and a resumed run begins with fresh ones; "
                    "call run.register(model=..., optimizer=...) before the loop"
                )
        lacks = self._position.lacks
        if lacks is not None and not self._told_of_lacks and self.is_main:
            self._told_of_lacks = True
            self._warn(
                f"the code after the loop over '{lacks[0]}' reads {_named(lacks[1])}, which only that loop gives a value: "
                "a function that is resumed behind it goes through that code again, and fails. Write the loop around it "
                "as `for epoch in run.epochs(n):`, or give the variable a value before it"
            )
        if self.global_step >= self._next:
            if self.global_step in self._setting.allocation.interrupt_at:
                self._due = Wish("stop", "interrupt")
            elif self._due is None:
                self._due = Wish("save", "periodic")
            self._next = self._next_due(self.global_step)
        if self._watch.pending:
            wish = self._watch.decide(self._position.boundaries)
            if wish is not None and (self._due is None or self._due.kind == "save"):
                self._due = wish
        if self._due is not None:
            self._wish(self._due)

    def _check_kinds(self, registered: dict[str, objects.Stateful]) -> None:
        """See before the first save, which may be that of the job's last seconds, that a checkpoint can hold the state."""
        with rng.untouched():
            states = objects.states_of_others(registered)
        refused = ready({"objects": states, "state": self.state}).refused
        if refused is not None:
            raise RegisterError(refused)

    def _warn(self, line: str) -> None:
        """Say, in the log and in the journal, what the function forgets."""
        self._setting.say(f"warning: {line}")
        self._saving.note("warning", segment=self.segment, step=self.global_step, reason=line)

    def _next_due(self, after: int) -> int:
        """The next global step at which something is due, known without asking anybody."""
        steps = [step for step in self._setting.allocation.interrupt_at if step > after]
        steps += [step for step in self._setting.allocation.save_at if step > after]
        every = self._setting.save_every_steps
        if every:
            steps.append((after // every + 1) * every)
        return min(steps, default=_NEVER)

    def _wish(self, wish: Wish) -> None:
        self._due = wish
        if not self._position.has_head():
            self._position.refuse_by_hand()
            self._capture(None)

    def _at_head(self, head: Pass) -> None:
        """A loop asks for its next turn; the rest of the boundary's loop body has run."""
        if not self._begun:
            self._begun = True
            objects.check_names(self._registry.objects)
        self._diagnosis.look(head)
        if self._due is not None and self._position.is_head(head):
            self._capture(head)

    def _capture(self, head: Pass | None) -> None:
        """Take the checkpoint that is due; end the segment if that is what is due."""
        wish = self._due
        assert wish is not None
        why = self._hindrance(head)
        if why is not None:
            if head is None:
                self._next = 0  # no loop asks again: the next step does
            if not self._deferred:
                self._deferred = True
                self._saving.note("deferred", step=self.global_step, reason=why)
                if self.is_main:
                    self._setting.say(f"a {wish.kind} ({wish.reason}) waits: {why}")
            return
        if head is None and self._position.inside is None and not self._warned and self.is_main:
            self._warned = True
            self._warn(
                "run.step() is called outside of run.epochs(), run.steps() and registered loaders; to "
                "resume, everything before this boundary has to run again. Use run.epochs() or run.steps()"
            )
        self._due, self._deferred = None, False
        owner = head.loop if head else None
        here = (self._position.boundaries, owner)
        if self._saved_at != here or not self._saving.committed():
            tree = self._tree(owner)
            self._tell_of_shared_memory()
            self._save(wish, tree)
            self._saved_at = here
            if wish.kind == "stop":
                self._diagnosis.leave(self._saving.newest, wish, tree, owner, self.time_left())
        if wish.kind == "stop":
            self._ended = wish
            self._watch.pending, self._next = True, 0  # a function that catches it gets it again
            self._position.over = True
            raise SegmentEnd(wish)

    def _tell_of_shared_memory(self) -> None:
        if self._told_of_shared or not self.is_main:
            return
        shared = objects.shared(self._registry.things(), self.state)
        if shared is not None:
            self._told_of_shared = True
            self._warn(
                f"run.state{shared[0]} shares its memory with '{shared[1]}', which is saved by itself: after a resume it is a "
                "copy, which does not change with that. Keep a copy of your own: tensor.clone(), copy.deepcopy(model.state_dict())"
            )

    def _hindrance(self, head: Pass | None) -> str | None:
        """Return why the state at this boundary could not be gone on from, None where it can."""
        loop = self._position.hindrance(head)
        if loop is not None:
            return f"the loop over '{loop}' has handed out a batch that is still in use"
        over = self._position.passed_on(head)
        if over is not None:
            return (
                f"the code after the loop over '{over[0]}' reads {_named(over[1])}, which that loop changes"
            )
        for name, thing in self._registry.things():
            if isinstance(thing, torch.nn.Module) and sharded.unreduced(thing):
                return f"gradients of '{name}' are still to be reduced over the ranks"
            if self.global_step == 1 and isinstance(thing, torch.nn.Module) and buckets.is_static(thing):
                return f"DDP with static_graph finds the order in which it sums '{name}' in its second step"
        return None

    def _tree(self, owner: str | None) -> dict[str, Any]:
        """This rank's state, ready to be written."""
        if self.on_place is not None:
            self.on_place()
        return {
            **self._registry.state(),
            "state": self.state,
            "loaders": {name: chain.state_dict() for name, chain in self._registry.loaders.items()},
            "rng": rng.to_tensors(rng.capture()),
            "position": self._position.capture(owner),
            "ranges": self._ranges,
            "turns": self._diagnosis.turns,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "metrics": self._saving.settle_metrics(),
        }

    def _belongings(self) -> list[Any]:
        """Return what checkpoints hold."""
        loaders = [each for chain in self._registry.loaders.values() for each in chain.belongings]
        return [self.state, *self.things(), *loaders]

    def _save(self, wish: Wish, tree: dict[str, Any], **about: Any) -> None:
        extent = {key: value for key, value in self.progress().items() if key in ("total", "fraction")}
        about = {"epoch": self.epoch, **extent, "pace": dict(vars(self._watch.pace)), **about}
        self._saving.save(wish, self.global_step, tree, about)
        self._watch.saved()

    def _note_saved(self, seconds: float) -> None:
        self._watch.pace.note_save(seconds)

    def _wake(self) -> None:
        """Look at the next boundary what the thread that saves has to say."""
        self._next = 0

    def _guess_save_seconds(self) -> float:
        """Before the first save was timed: 100 MB/s, which a busy shared filesystem still gives."""
        return 0.5 + self._registry.size / 100e6

    @property
    def passed_a_boundary(self) -> bool:
        """Whether the training has come to a step boundary, in this segment or one before."""
        return self.resumed or self._position.boundaries > 0

    # ---- for `chainrun verify` -----------------------------------------------------------------

    @property
    def walking(self) -> bool:
        """Whether the function is on its way to the checkpoint's place."""
        return self._position.walking

    def registered(self) -> Iterator[tuple[str, objects.Stateful]]:
        """Yield the registered objects that are not loaders, by name."""
        yield from self._registry.objects.items()

    def things(self) -> list[Any]:
        """Return all that was registered, and what chainrun made for it."""
        made = [chain.inner for chain in self._registry.loaders.values()]
        return [thing for _, thing in self._registry.things()] + made

    # ---- for the segment -----------------------------------------------------------------------

    def _start(self) -> None:
        self._watch.start()

    def _settle(self) -> None:
        """The function has returned: wait for the save under way."""
        self._saving.committed()

    def _finish(self, result: Any) -> None:
        """The function has returned: keep what it trained."""
        if self._ended is not None:
            raise SegmentEnd(self._ended)  # the function caught the first one, and left its loops
        if self._position.walking:
            raise RestoreError(
                "the function returned before it came to the place where the checkpoint at step "
                f"{self.global_step} was taken ({self._position.describe_target()}): {CHANGED}"
            )
        self._save(Wish("stop", "end"), self._tree(None), ended=True, result=result)

    def progress(self) -> dict[str, Any]:
        """Return where the training is, for displays: ``step total fraction epoch metrics left``, None if unknown."""
        passes = [chain.passed() for chain in self._registry.loaders.values()]
        total, fraction = self._extent.look(self.global_step, self._ranges, passes)
        shown = {k: v for k, v in self._metrics.latest.items() if isinstance(v, float) and k != "step"}
        return {
            "step": self.global_step,
            "total": total,
            "epoch": self.epoch,
            "fraction": fraction,
            "metrics": dict(list(shown.items())[:3]),
            "left": None if self.time_left() == float("inf") else round(self.time_left(), 1),
        }

    def _close(self) -> None:
        self._watch.close()
        for chain in self._registry.loaders.values():
            chain.close()
        self._saving.close()


def _named(variables: Sequence[str]) -> str:
    return " and ".join(f"`{name}`" for name in variables[:3])


def _device(local_rank: int) -> torch.device:
    """This rank's accelerator; where the scheduler shows each task only its own, that is the first."""
    if not torch.accelerator.is_available():
        return torch.device("cpu")
    device = torch.accelerator.current_accelerator()
    if device is None:
        return torch.device("cpu")
    return torch.device(device.type, local_rank % torch.accelerator.device_count())
