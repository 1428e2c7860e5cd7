"""What the training function has registered, and how it gets back what a checkpoint holds of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from chainrun.checkpoint import objects, sharded, shards
from chainrun.checkpoint.store import Committed
from chainrun.errors import RegisterError, RestoreError
from chainrun.training import carried, data, resharding, rng


class Registry:
    """The registered objects and loaders by name.

    Args:
        say: prints a line.
        bind: makes the chain of a loader that is registered under a name.
        world_size: the number of ranks.

    Attributes:
        objects, loaders: what is registered, by name.
        size: bytes of the registered weights and two moments each.
        saved: what the checkpoint holds, until the function has come to its place; None at a fresh start.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        bind: Callable[[str, data.DataLoader[Any]], data.Chain],
        world_size: int,
    ) -> None:
        self._say, self._bind, self._world_size = say, bind, world_size
        self.objects: dict[str, objects.Stateful] = {}
        self.loaders: dict[str, data.Chain] = {}
        self._registered: dict[int, tuple[str, Any]] = {}  # by id, which is unique while the object lives
        self.size = 0
        self.saved: dict[str, Any] | None = None
        self._shards: shards.Shards | None = None
        self._world_size_then = world_size

    def restore_from(self, found: Committed, saved: dict[str, Any], *, reshard: bool) -> None:
        """Have every object restored as it is registered."""
        self.saved = saved
        self._shards = shards.Shards(found.path, saved, reshard=reshard)
        self._world_size_then = found.manifest["world_size"]

    # ---- registering ---------------------------------------------------------------------------

    def add(self, name: str, thing: Any) -> None:
        """Register an object; restore it where there is a checkpoint. Errors: see `Run.register`."""
        if name in self.objects or name in self.loaders:
            raise RegisterError(f"register({name}=...) was called twice; every name stands for one object")
        if id(thing) in self._registered:
            raise RegisterError(
                f"register({name}=...) was given the object that is registered as "
                f"'{self._registered[id(thing)][0]}'; register it once"
            )
        saved = self._saved_for(name)
        if isinstance(thing, data.DataLoader):
            self.loaders[name] = chain = self._bind(name, thing)
            if saved is not None:
                if self._world_size_then != self._world_size:
                    saved = resharding.moved(chain, saved, self._world_size_then, self._world_size)
                chain.load_state_dict(saved)
        else:
            self.objects[name] = self._adapt(name, thing)
            if saved is not None and not isinstance(thing, rng.GENERATORS):
                self._load(name)  # generators come last, as all that is random
        self._registered[id(thing)] = (name, thing)
        if isinstance(thing, torch.nn.Module):
            self._add_generators_of(name, thing)
            self.size += 3 * sum(parameter.nbytes for parameter in thing.parameters())

    def _add_generators_of(self, name: str, module: torch.nn.Module) -> None:
        """Have the generators that a module keeps, or its code uses, among what is registered."""
        found = [
            one
            for one in carried.find(*objects.unwrap(module).modules(), generators_only=True)
            if id(one) not in self._registered and one is not torch.default_generator
        ]
        if found:
            self.objects[f"{name}.generators"] = rng.Inside(name, found)

    def _adapt(self, name: str, thing: Any) -> objects.Stateful:
        if isinstance(thing, rng.GENERATORS):
            return rng.Registered(thing)
        if isinstance(thing, torch.utils.data.DataLoader):
            raise RegisterError(
                f"register({name}=...) was given a torch.utils.data.DataLoader, which cannot be resumed "
                "exactly; build it as chainrun.DataLoader(...), with the same arguments"
            )
        if type(thing).__name__ == "StatefulDataLoader":
            self._say(
                f"warning: '{name}' is torchdata's StatefulDataLoader, which does not restore its workers' "
                "random state; chainrun.DataLoader does"
            )
        return objects.adapt(name, thing)

    def _saved_for(self, name: str) -> Any:
        if self.saved is None:  # at a fresh start, and where the function has gone on to its next phase
            return None
        for kind in ("objects", "loaders"):
            if name in self.saved[kind]:
                return self.saved[kind][name]
        known = ", ".join([*self.saved["objects"], *self.saved["loaders"]]) or "nothing"
        raise RestoreError(
            f"register({name}=...): the checkpoint at step {self.saved['global_step']} has no '{name}', it holds {known}; "
            "register what it holds under the same names, or start a new run"
        )

    # ---- restoring -----------------------------------------------------------------------------

    def _load(self, name: str) -> None:
        """Set a registered object to what was saved of it."""
        assert self.saved is not None and self._shards is not None
        thing, saved = self.objects[name], self.saved["objects"][name]
        thing.load_state_dict(self._shards.fill(("objects", name), saved, shards.counterparts(thing)))

    def _load_gradients(self) -> None:
        assert self.saved is not None and self._shards is not None
        things = self.objects

        def parameter(keys: sharded.Keys) -> tuple[Any, bool]:
            _, owner, place = keys
            return things[owner].parameters[place], False  # type: ignore[attr-defined]

        objects.load_gradients(things, self._shards.fill(("gradients",), self.saved["gradients"], parameter))

    def go_on(self) -> tuple[dict[str, Any], list[str]]:
        """The function has come to the checkpoint's place: restore all that was not there to be restored before.

        Returns:
            What the checkpoint held, and what the loaders tell of.

        Raises:
            RestoreError: the function has not registered what the checkpoint holds.
        """
        saved = self.saved
        assert saved is not None
        missing = [
            n for n in (*saved["objects"], *saved["loaders"]) if n not in {*self.objects, *self.loaders}
        ]
        if missing:
            raise RestoreError(
                f"the checkpoint at step {saved['global_step']} holds '{missing[0]}', which the function has not "
                f"registered; call run.register({missing[0]}=...) before the loop"
            )
        for name in self.objects:
            if name in saved["objects"]:  # a module that has got a generator since then
                self._load(name)
        objects.load_extras(self.objects, saved["extras"])
        self._load_gradients()
        lines = [line for chain in self.loaders.values() for line in chain.go_on()]
        self.saved = self._shards = None
        return saved, lines

    # ---- what is captured ----------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return the state of what is registered, besides loaders."""
        with rng.untouched():
            return {
                "objects": {name: thing.state_dict() for name, thing in self.objects.items()},
                "extras": objects.extras(self.objects),
                "gradients": objects.gradients(self.objects),
            }

    def random_state(self) -> dict[str, Any]:
        """Return all that is random, and where the loaders' workers are, as tensors and plain data."""
        generators = {name: self.objects[name].state_dict() for name in self.generators()}
        loaders = {name: chain.snapshot() for name, chain in self.loaders.items()}
        return {"global": rng.to_tensors(rng.capture()), "generators": generators, "loaders": loaders}

    def set_random_state(self, saved: dict[str, Any]) -> None:
        """Go back to it, as far as its owners are registered by now."""
        for name, chain in self.loaders.items():
            if name in saved["loaders"]:
                chain.set_snapshot(saved["loaders"][name])
        for name in saved["generators"].keys() & self.objects.keys():
            self.objects[name].load_state_dict(saved["generators"][name])
        rng.restore(rng.from_tensors(saved["global"]))

    # ---- looking -------------------------------------------------------------------------------

    def things(self) -> Iterator[tuple[str, Any]]:
        """Yield the names and the objects as they were registered."""
        yield from self._registered.values()

    def names(self) -> dict[int, str]:
        """Return the names of the registered objects, by their ids."""
        return {key: name for key, (name, _) in self._registered.items()}

    def generators(self) -> list[str]:
        """Return the names of the registered generators."""
        return [name for name, thing in self.objects.items() if isinstance(thing, rng.Registered)]

    def chain_of(self, loop: str | None) -> data.Chain | None:
        """Return the loader of a loop."""
        return next((chain for chain in self.loaders.values() if chain.loop == loop), None)
