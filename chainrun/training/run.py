"""`Run`: what the user's training function holds in its hands."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from chainrun.checkpoint import buckets, objects, sharded, shards, state
from chainrun.checkpoint.store import Committed
from chainrun.errors import RegisterError, RestoreError
from chainrun.rundir import RunDir
from chainrun.training import carried, data, passed_on, resharding, rng, witness, worker
from chainrun.training.extent import Extent
from chainrun.training.lost import Variables
from chainrun.training.position import Pass, Position
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
        self._objects: dict[str, objects.Stateful] = {}
        self._loaders: dict[str, Any] = {}
        self._registered: dict[int, tuple[str, Any]] = {}  # by id, which is unique while the object lives
        self.on_batch: Callable[[str, Any], None] | None = None
        self.on_place: Callable[[], None] | None = None  # told where a checkpoint is taken, or was
        self._ranges: dict[str, dict[str, Any]] = {}
        self._extent = Extent()
        self._variables = Variables(self._belongings, self._names)
        self._looks = 3  # at variables where a loop begins, until the first boundary
        self._due: Wish | None = None
        self._deferred = self._told_of_lacks = False
        self._ended: Wish | None = None
        self._saved_at: tuple[int, str | None] | None = None
        self._size = 0  # bytes of the registered weights and two moments each
        self._warned = False
        self.restored_from: Committed | None = None
        self._saved: dict[str, Any] | None = None
        self._shards: shards.Shards | None = None
        if found := self._saving.load():
            self.restored_from, self._saved = found
            self._shards = shards.Shards(self.restored_from.path, self._saved, reshard=setting.reshard)
            self.global_step, self.epoch = self._saved["global_step"], self._saved["epoch"]
            self.state = state.copied(self._saved["state"])
            self._extent = Extent(self.restored_from.manifest.get("total"))
            setting.watch["pace"] = Pace(**self.restored_from.manifest["pace"])
        self.resumed = self._saved is not None
        target = self._saved and self._saved["position"]
        self._position = Position(target, self._go_on, self._random_state, self._set_random_state)
        self._watch = Watch(
            **setting.watch,
            stop_file=self._run.stop,
            passed=lambda: self._position.boundaries,
            step=lambda: self.global_step,
            first_save=self._guess_save_seconds,
            saving=lambda: self._saving.busy,
        )
        self._checked = False
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
            if name in self._objects or name in self._loaders:
                raise RegisterError(
                    f"register({name}=...) was called twice; every name stands for one object"
                )
            if id(thing) in self._registered:
                raise RegisterError(
                    f"register({name}=...) was given the object that is registered as "
                    f"'{self._registered[id(thing)][0]}'; register it once"
                )
            saved = self._saved_for(name)
            if isinstance(thing, data.DataLoader):
                counter = worker.Counter(self.seed or 0, self.rank)
                chain = data.bind(thing, name, self._position, self._at_head, counter)
                chain.on_batch = self.on_batch
                self._loaders[name] = chain
                if saved is not None:
                    chain.load_state_dict(self._moved(chain, saved))
            else:
                self._objects[name] = self._adapt(name, thing)
                if saved is not None and not isinstance(thing, rng.GENERATORS):
                    self._load(name)  # generators come last, as all that is random
            self._registered[id(thing)] = (name, thing)
            if isinstance(thing, torch.nn.Module):
                self._register_inside(name, thing)
                self._size += 3 * sum(parameter.nbytes for parameter in thing.parameters())

    def _register_inside(self, name: str, module: torch.nn.Module) -> None:
        """Have the generators that a module keeps, or its code uses, among what is registered."""
        found = [
            one
            for one in carried.find(*objects.unwrap(module).modules(), generators_only=True)
            if id(one) not in self._registered and one is not torch.default_generator
        ]
        if found:
            self._objects[f"{name}.generators"] = rng.Inside(name, found)

    def _adapt(self, name: str, thing: Any) -> objects.Stateful:
        if isinstance(thing, rng.GENERATORS):
            return rng.Registered(thing)
        if isinstance(thing, torch.utils.data.DataLoader):
            raise RegisterError(
                f"register({name}=...) was given a torch.utils.data.DataLoader, which cannot be resumed "
                "exactly; build it as chainrun.DataLoader(...), with the same arguments"
            )
        if type(thing).__name__ == "StatefulDataLoader":
            self._setting.say(
                f"warning: '{name}' is torchdata's StatefulDataLoader, which does not restore its workers' "
                "random state; chainrun.DataLoader does"
            )
        return objects.adapt(name, thing)

    def _saved_for(self, name: str) -> Any:
        if self._saved is None:  # at a fresh start, and where the function has gone on to its next phase
            return None
        for kind in ("objects", "loaders"):
            if name in self._saved[kind]:
                return self._saved[kind][name]
        known = ", ".join([*self._saved["objects"], *self._saved["loaders"]]) or "nothing"
        raise RestoreError(
            f"register({name}=...): the checkpoint at step {self.global_step} has no '{name}', it holds {known}; "
            "register what it holds under the same names, or start a new run"
        )

    def _moved(self, chain: data.Chain, saved: dict[str, Any]) -> dict[str, Any]:
        """Return a loader's state for the present number of ranks."""
        assert self.restored_from is not None
        then = self.restored_from.manifest["world_size"]
        return saved if then == self.world_size else resharding.moved(chain, saved, then, self.world_size)

    def _load(self, name: str) -> None:
        """Set a registered object to what was saved of it."""
        assert self._saved is not None and self._shards is not None
        thing, saved = self._objects[name], self._saved["objects"][name]
        thing.load_state_dict(self._shards.fill(("objects", name), saved, shards.counterparts(thing)))

    def _load_gradients(self) -> None:
        assert self._saved is not None and self._shards is not None
        saved, things = self._saved["gradients"], self._objects

        def parameter(keys: sharded.Keys) -> tuple[Any, bool]:
            _, owner, place = keys
            return things[owner].parameters[place], False  # type: ignore[attr-defined]

        objects.load_gradients(things, self._shards.fill(("gradients",), saved, parameter))

    def _go_on(self) -> None:
        """The function has come to the place of the checkpoint: from here on it is the same training."""
        saved = self._saved
        assert saved is not None
        missing = [
            n for n in (*saved["objects"], *saved["loaders"]) if n not in {*self._objects, *self._loaders}
        ]
        if missing:
            raise RestoreError(
                f"the checkpoint at step {saved['global_step']} holds '{missing[0]}', which the function has not "
                f"registered; call run.register({missing[0]}=...) before the loop"
            )
        for name in self._objects:
            if name in saved["objects"]:  # a module that has got a generator since then
                self._load(name)
        objects.load_extras(self._objects, saved["extras"])
        self._load_gradients()
        lines = [line for chain in self._loaders.values() for line in chain.go_on()]
        state.refill(self.state, saved["state"])
        self.global_step, self.epoch = saved["global_step"], saved["epoch"]
        self._saved = self._shards = None
        self._gone_on = time.monotonic()
        rng.restore(rng.from_tensors(saved["rng"]))
        if self._is_witnessed():
            owner = saved["position"]["owner"]
            self._hear_witness(owner)
            rng.restore(rng.from_tensors(saved["rng"]))  # a state_dict() may draw
            self._compare_variables(owner, saved["ranges"])
        for line in lines:
            self._tell_of_lost(line)
        if self.on_place is not None:
            self.on_place()

    def _random_state(self) -> dict[str, Any]:
        """Return all that is random, and where the loaders' workers are, as tensors and plain data."""
        generators = {n: o.state_dict() for n, o in self._objects.items() if isinstance(o, rng.Registered)}
        loaders = {name: chain.snapshot() for name, chain in self._loaders.items()}
        return {"global": rng.to_tensors(rng.capture()), "generators": generators, "loaders": loaders}

    def _set_random_state(self, saved: dict[str, Any]) -> None:
        """Go back to it, as far as its owners are registered by now."""
        for name, chain in self._loaders.items():
            if name in saved["loaders"]:
                chain.set_snapshot(saved["loaders"][name])
        for name in saved["generators"].keys() & self._objects.keys():
            self._objects[name].load_state_dict(saved["generators"][name])
        rng.restore(rng.from_tensors(saved["global"]))

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
        try:
            place = self._resume_range("epochs", what)
            for index in range(place["index"], n):
                self._ranges["epochs"] = {"index": index, "of": n, "random": None}
                if place["entered"]:
                    # the code between `for epoch` and the loader runs again and draws what it drew then
                    self._set_random_state(place["random"])
                else:
                    self._at_head(mark)
                place["entered"] = False
                self.epoch = index
                self._ranges["epochs"] = {"index": index, "of": n, "random": self._random_state()}
                self._position.push("epochs", what)
                try:
                    yield index
                finally:
                    self._position.pop()
            self._ranges["epochs"] = {"index": max(n, place["index"]), "of": n, "random": None}
            mark.passed_on = passed_on.to_the_code_after()
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
            mark.passed_on = passed_on.to_the_code_after()
            self._at_head(mark)
            exhausted = True
        finally:
            self._position.pop()
            self._position.end(mark, exhausted=exhausted)

    def _resume_range(self, loop: str, what: str) -> dict[str, Any]:
        """Return where a range starts; arrive where the checkpoint was taken at its head."""
        place: dict[str, Any] = {"index": 0, "entered": False}
        if what == "resume":
            assert self._saved is not None
            saved = self._saved["ranges"][loop]
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
            self._checked, self._next, self._looks = True, self._first_due, 0
            self._setting.trains(None if self._gone_on is None else time.monotonic() - self._gone_on)
            self._position.refuse_by_hand()
            objects.check(self._objects)
            self._note_variables(partial(self._variables.note_first, self._position.boundaries))
            things = [thing for _, thing in self._registered.values()]
            for line in (
                *objects.forgotten(self._objects, things),
                *([] if self.resumed else objects.strangers(self._objects, things)),
            ):
                self._warn(line)
            if not self._registered and not self.state:
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
        if self._looks and head.advanced is None:
            self._look_at_variables()
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
            self._save(wish, tree)
            self._saved_at = here
            if wish.kind == "stop":
                self._leave_witness(wish, tree, owner)
        if wish.kind == "stop":
            self._ended = wish
            self._watch.pending, self._next = True, 0  # a function that catches it gets it again
            self._position.over = True
            raise SegmentEnd(wish)

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
        for name, thing in self._registered.values():
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
            **self._registered_state(),
            "loaders": {name: chain.state_dict() for name, chain in self._loaders.items()},
            "rng": rng.to_tensors(rng.capture()),
            "position": self._position.capture(owner),
            "ranges": self._ranges,
            "global_step": self.global_step,
            "epoch": self.epoch,
            "metrics": self._saving.settle_metrics(),
        }

    def _registered_state(self) -> dict[str, Any]:
        """What is registered, besides loaders, and the user's own values."""
        return {
            "objects": {name: thing.state_dict() for name, thing in self._objects.items()},
            "extras": objects.extras(self._objects),
            "gradients": objects.gradients(self._objects),
            "state": self.state,
        }

    def _leave_witness(self, wish: Wish, tree: dict[str, Any], owner: str | None) -> None:
        """What follows would be the next batch: leave its fingerprint, and the state's, for the next segment."""
        seconds = witness.seconds_for(self.time_left(), wish.reason)
        about = (tree, self._generators(), self._chain_of(owner))
        held = partial(self._variables.noted, self._variables.frames(), self._position.boundaries)
        for line in witness.give(self._saving.newest, self.rank, *about, seconds, held):
            self._setting.say(line)

    def _is_witnessed(self) -> bool:
        """Whether the segment before should have left a witness of what this rank has restored."""
        if self.restored_from is None:
            return False
        about = self.restored_from.manifest
        return witness.is_expected(about["reason"]) and about["world_size"] == self.world_size

    def _hear_witness(self, owner: str | None) -> None:
        """Compare what the segment before left with what was restored, and with what comes next."""
        assert self.restored_from is not None
        step = self.global_step
        try:
            # on every rank, whatever each finds: a state_dict() may need the others
            tree = {"rng": rng.to_tensors(rng.capture()), **self._registered_state()}
            testimony = witness.read(self.restored_from.path, self.rank)
            if not testimony:
                self._setting.say(f"no witness at step {step}: the segment before could not leave one")
                return
            tell = partial(witness.report, self._run, self._setting, step)
            witness.hear(testimony, tree, self._generators(), self._chain_of(owner), tell)
        except Exception as error:  # a diagnosis: the training is well without it
            self._setting.say(f"no witness at step {step}: {type(error).__name__}: {error}")

    def _belongings(self) -> list[Any]:
        """Return what checkpoints hold."""
        loaders = [each for chain in self._loaders.values() for each in chain.belongings]
        return [self.state, *self.things(), *loaders]

    def _look_at_variables(self) -> None:
        """A loop begins, before the segment's first boundary."""
        if not self.resumed:
            self._looks -= 1
            self._note_variables(self._variables.note_begin)
        elif self._variables.waits:
            self._note_variables(partial(self._variables.hear_later, self._tell_of_lost))

    def _names(self) -> dict[int, str]:
        """Return the names of the registered objects, by their ids."""
        return {key: name for key, (name, _) in self._registered.items()}

    def _note_variables(self, note: Callable[[], None]) -> None:
        try:
            note()
        except Exception as error:  # as below
            self._setting.say(f"what variables hold is not followed: {type(error).__name__}: {error}")

    def _compare_variables(self, owner: str | None, ranges: dict[str, dict[str, Any]]) -> None:
        """Tell of variables that the cut has lost, and that the function goes on to read."""
        assert self.restored_from is not None
        chain = self._chain_of(owner)
        try:
            told = witness.variables(self.restored_from.path, self.rank)
            see_next = None if chain is None else chain.see_next
            gives = {loop: place["index"] < place["of"] for loop, place in ranges.items()}
            epochs = ranges.get("epochs", {"index": 0, "of": 0})
            around = owner != "epochs" and epochs["index"] + 1 < epochs["of"]
            about = (see_next, gives.get(str(owner)), around)
            again = owner is None and self._position.inside == "epochs"
            self._variables.hear(told, *about, self._tell_of_lost, again=again)
        except Exception as error:  # a diagnosis: the training is well without it
            self._setting.say(f"what variables hold was not compared: {type(error).__name__}: {error}")

    def _tell_of_lost(self, line: str) -> None:
        if self.is_main:
            self._warn(line)
        else:
            print(f"chainrun: rank {self.rank}: warning: {line}", file=sys.stderr, flush=True)

    def _generators(self) -> list[str]:
        return [name for name, thing in self._objects.items() if isinstance(thing, rng.Registered)]

    def _chain_of(self, owner: str | None) -> data.Chain | None:
        return next((chain for chain in self._loaders.values() if chain.loop == owner), None)

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
        return 0.5 + self._size / 100e6

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
        yield from self._objects.items()

    def things(self) -> list[Any]:
        """Return all that was registered, and what chainrun made for it."""
        made = [chain.inner for chain in self._loaders.values()]
        return [thing for _, thing in self._registered.values()] + made

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
                f"{self.global_step} was taken ({self._position.describe_target()}): its loops or its arguments "
                "have changed; go back to the code that wrote the checkpoint, or start a new run"
            )
        self._save(Wish("stop", "end"), self._tree(None), ended=True, result=result)

    def progress(self) -> dict[str, Any]:
        """Return where the training is, for displays: ``step total fraction epoch metrics left``, None if unknown."""
        passes = [chain.passed() for chain in self._loaders.values()]
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
        for chain in self._loaders.values():
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
