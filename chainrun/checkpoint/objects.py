"""Registered objects to plain trees of tensors and back, without losing a bit."""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch

from chainrun.checkpoint import buckets, sharded
from chainrun.checkpoint.attributes import Attributes, OfOptimizer
from chainrun.checkpoint.form import Form
from chainrun.checkpoint.gradients import Gradients
from chainrun.checkpoint.state import copied
from chainrun.errors import RegisterError, RestoreError


@runtime_checkable
class Stateful(Protocol):
    """Anything that gives its state and takes it back."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


def unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside DistributedDataParallel, DataParallel and torch.compile wrappers."""
    while True:
        if isinstance(module, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            module = module.module
        elif "_orig_mod" in module._modules:  # torch._dynamo.OptimizedModule, without importing dynamo
            module = module._orig_mod  # type: ignore[assignment]
        else:
            return module


_MAKE_IT_SO = (
    "make the same change before run.register(...) too, where run.epoch or run.global_step, which are restored by "
    "then, tell that it was done"
)
_HOOKS = {
    f"_optimizer_{which}_hooks"
    for which in ("step_post", "state_dict_pre", "state_dict_post", "load_state_dict_post")
}
OWN = "chainrun: its own"
"""The key of what an optimizer's state_dict() returns in a form of its own, beside what torch's would."""
_MARK = "_chainrun_mark"  # the attribute of a registered module


class _Mark:
    """Lies in a registered module and notes copies: one that is not registered would be of restored weights."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.copies: weakref.WeakSet[_Mark] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Mark:
        copy = _Mark(self.name)
        self.copies.add(copy)
        return copy

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled module does not need chainrun


class _Module:
    """A module; wrappers do not show in the names, so that a checkpoint fits with and without them."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self._name, self._module = name, unwrap(module)
        vars(self._module)[_MARK] = _Mark(name)
        sharded.note(self._module)
        self._attributes = Attributes(self._module, but=_MARK)
        self._form = Form(self._module)
        buckets.check(self._module)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        sharded.put_away(self._module)
        return list(self._module.parameters())

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        sharded.put_away(self._module)
        return self._module.named_parameters()

    def copies(self) -> list[_Mark]:
        """Return the marks of the copies that are alive."""
        alive = vars(self._module)[_MARK].copies
        if alive:
            gc.collect()  # one that holds itself lives on for a while
        return list(alive)

    def marks(self) -> Iterator[Any]:
        """Yield the marks in it."""
        for module in self._module.modules():
            yield vars(module).get(_MARK)

    def extra(self) -> dict[str, Any]:
        """Return what has changed since it was registered and is not in state_dict()."""
        return {
            "attributes": self._attributes.changed(),
            "buckets": buckets.capture(self._module),
            "form": self._form.changed(),
        }

    def load_extra(self, extra: dict[str, Any]) -> None:
        self._attributes.restore(extra["attributes"])
        buckets.restore(self._module, extra["buckets"])
        self._form.expect(extra.get("form", {}))

    def averaged(self) -> set[int]:
        """See `buckets.averaged`."""
        return buckets.averaged(self._module)

    def check_names(self) -> None:
        """See, where the first loop begins, that its tensors have the names that they had when it was registered.

        Raises:
            RegisterError: they have not.
        """
        if others := self._form.other_tensors():
            more = f"; and {len(others) - 4} more" * (len(others) > 4)
            raise RegisterError(
                f"the module '{self._name}' was changed after it was registered: {'; '.join(others[:4])}{more}. A resumed "
                "function registers it as it was before, and what a checkpoint holds would not fit: call "
                f"run.register({self._name}=...) after the change"
            )

    def check(self) -> None:
        """See, at the first boundary after a restore, that it is made of what it was made of.

        Raises:
            RestoreError: it is not.
        """
        for place, then, mine in self._form.lost():
            raise RestoreError(
                f"the module '{self._name}' is not made as it was when the run was cut: '{place.strip('.')}' was {then} "
                f"and is {mine} here. A turn that is over has changed it, and a resumed function does not come by there: "
                f"{_MAKE_IT_SO}. Nothing was lost"
            )

    def state_dict(self) -> Any:
        return self._module.state_dict()

    def load_state_dict(self, state: Any) -> None:
        differences = list(_differences(self._module.state_dict(), state, self._resized()))
        if differences:
            shown = "; ".join(differences[:5]) + (
                f"; and {len(differences) - 5} more" * (len(differences) > 5)
            )
            raise RestoreError(
                f"the module '{self._name}' is not the one that was saved: {shown}. Nothing was restored; "
                "build it as it was, or start a new run. If the training itself changes it (torch.nn.utils.prune, a "
                f"layer that is added): {_MAKE_IT_SO}"
            )
        self._module.load_state_dict(state)

    def _resized(self) -> set[str]:
        """Return the names of the buffers that their module gives another shape when it loads them.

        torch.ao's observers do: how many channels there are they learn from the first batch.
        """
        return {
            f"{path}.{name}".lstrip(".")
            for path, module in self._module.named_modules(remove_duplicate=False)
            if type(module).__module__.startswith("torch.ao.quantization.")
            for name in module._buffers
        }


def _differences(mine: Any, saved: Any, resized: set[str]) -> Iterator[str]:
    for key in mine.keys() - saved.keys():
        yield f"{key} is not in the checkpoint"
    for key in saved.keys() - mine.keys():
        yield f"{key} is in the checkpoint only"
    for key in mine.keys() & saved.keys():
        a, b = mine[key], saved[key]
        if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
            continue
        if torch.nn.parameter.is_lazy(a):
            continue
        if a.shape != b.shape and not (key in resized and a.numel() <= 1):
            yield f"{key} has shape {tuple(a.shape)}, in the checkpoint {tuple(b.shape)}"
        elif a.dtype != b.dtype:
            yield f"{key} is {a.dtype}, in the checkpoint {b.dtype}"
        elif sharded.is_sharded(a) != sharded.is_sharded(b):
            kinds = ("a plain tensor", "a DTensor")
            yield f"{key} is {kinds[sharded.is_sharded(a)]}, in the checkpoint {kinds[sharded.is_sharded(b)]}"


class _Optimizer:
    """An optimizer; its tensors come back in the dtype they had.

    `torch.optim.Optimizer.load_state_dict` casts floating-point state to the parameter's dtype, which loses
    bits where an optimizer keeps fp32 state of bf16 parameters.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self._name, self._optimizer = name, optimizer
        self._deferred: Any = None  # a state with groups that were added later
        self._restored: dict[
            int, dict[str, Any]
        ] = {}  # what it has been given at `register`, by its parameters' numbers
        if not vars(optimizer).keys() >= _HOOKS:
            _complete(name, optimizer)
        self.gradients = Gradients(name, lambda: self.parameters)
        self._attributes = OfOptimizer(optimizer)
        optimizer.register_step_post_hook(lambda *_: self.gradients.mark())

    @property
    def parameters(self) -> list[torch.Tensor]:
        return [parameter for group in self._optimizer.param_groups for parameter in group["params"]]

    def by_objects(self) -> Iterator[str]:
        """Yield the names of attributes with tensors by modules or parameters, unless it has a state_dict() of its own."""
        own = type(self._optimizer).state_dict is not torch.optim.Optimizer.state_dict
        return iter(()) if own else self._attributes.by_objects()

    @property
    def is_scheduled(self) -> bool:
        """Whether a learning-rate scheduler was built for it."""
        return hasattr(self._optimizer.step, "_wrapped_by_lr_sched")

    @property
    def _inner(self) -> dict[str, torch.optim.Optimizer]:
        """Optimizers in its attributes with a state that is not its own: state_dict() rarely tells of it."""
        return {name: one for name, one in self._optimizers.items() if one.state is not self._optimizer.state}

    @property
    def _optimizers(self) -> dict[str, torch.optim.Optimizer]:
        own = vars(self._optimizer)
        return {name: value for name, value in own.items() if isinstance(value, torch.optim.Optimizer)}

    def extra(self) -> dict[str, Any]:
        """Return what it is known by, and what has changed of its attributes since it was registered."""
        return {**self._known_by(), "attributes": self._attributes.changed()}

    def _known_by(self) -> dict[str, Any]:
        """Return what the parameters' order and the algorithm are known by, and the state of optimizers inside."""
        shapes = [list(parameter.shape) for parameter in self.parameters]
        inner = {name: one.state_dict() for name, one in self._inner.items()}
        return {"kind": type(self._optimizer).__qualname__, "shapes": shapes, "inner": inner}

    def load_extra(self, saved: dict[str, Any]) -> None:
        self._restored = {}
        here = self._known_by()
        saved = {**saved, "inner": sorted(saved["inner"])} | {"states": saved["inner"]}
        here["inner"] = sorted(here["inner"])
        for key, mine in here.items():
            found = saved[key]
            if mine != found:
                raise RestoreError(
                    f"the optimizer '{self._name}' is not the one that was saved: it has {mine}, the checkpoint "
                    f"{found}; build it as it was, or start a new run"
                )
        for name, one in self._inner.items():
            _set_state(one, copied(saved["states"][name]))
        if "attributes" in saved:
            self._attributes.restore(saved["attributes"])

    def drives(self, thing: Any) -> bool:
        return getattr(thing, "optimizer", None) is self._optimizer

    def state_dict(self) -> Any:
        """Return what its state_dict() does; where that is of a form of its own, beside what torch's would."""
        found = self._optimizer.state_dict()
        if self._is_of_torchs_form(found):
            return found
        return {**torch.optim.Optimizer.state_dict(self._optimizer), OWN: found}

    def _is_of_torchs_form(self, found: Any) -> bool:
        if not isinstance(found, dict) or not {"state", "param_groups"} <= found.keys():
            return False
        if not isinstance(found["state"], dict):
            return False
        states = [self._optimizer.state.get(parameter, {}) for parameter in self.parameters]
        return all(_keys(found["state"].get(n, {})) == _keys(state) for n, state in enumerate(states))

    def groups(self, names: dict[int, str]) -> list[list[str | None]]:
        """Return the names of the parameters of each group, None where nobody knows one."""
        return [[names.get(id(p)) for p in group["params"]] for group in self._optimizer.param_groups]

    def add_groups(self, groups: list[list[str | None]], parameters: dict[str, torch.nn.Parameter]) -> None:
        """Add the groups that were added inside a loop, which a resumed function does not run again.

        Raises:
            RestoreError: some of their parameters belong to no registered module.
        """
        if self._deferred is None:
            return
        state, self._deferred = self._deferred, None
        for group in groups[len(self._optimizer.param_groups) :]:
            if any(name not in parameters for name in group):
                raise RestoreError(
                    f"the optimizer '{self._name}' has {len(self._optimizer.param_groups)} parameter groups, the "
                    f"checkpoint {len(groups)}: add_param_group() was called inside a loop, with parameters of no "
                    "registered module. Register the module before the loop, or call add_param_group() before it"
                )
            self._optimizer.add_param_group({"params": [parameters[str(name)] for name in group]})
        self.load_state_dict(state)

    def load_state_dict(self, state: Any) -> None:
        optimizer = self._optimizer
        if len(state["param_groups"]) > len(optimizer.param_groups):
            self._deferred = state  # the function may add them on its way to the loop
            return
        self._deferred = None
        sharing = [one for one in self._optimizers.values() if one.param_groups is optimizer.param_groups]
        sharing_state = [one for one in self._optimizers.values() if one.state is optimizer.state]
        try:
            with warnings.catch_warnings():  # the real part of complex state; all of it comes back below
                warnings.filterwarnings("ignore", "Casting complex values")
                copy = copied(state, self._restored_again(state))
                if OWN in copy:
                    self._load_own(copy.pop(OWN))
                    torch.optim.Optimizer.load_state_dict(optimizer, copy)
                else:
                    optimizer.load_state_dict(copy)
        except (ValueError, KeyError) as error:
            raise RestoreError(
                f"the optimizer '{self._name}' is not the one that was saved: {error}"
            ) from error
        for group, saved_group in zip(optimizer.param_groups, state["param_groups"], strict=True):
            for parameter, index in zip(group["params"], saved_group["params"], strict=True):
                for key, value in state["state"].get(index, {}).items():
                    live = optimizer.state[parameter][key]
                    if isinstance(value, torch.Tensor) and live.dtype != value.dtype:
                        optimizer.state[parameter][key] = value.to(live.device, copy=True)
                self._restored[index] = {**optimizer.state.get(parameter, {})}
        for one in sharing:
            one.param_groups = optimizer.param_groups
        for one in sharing_state:
            one.state = optimizer.state
        # an earlier process has called step(): else a scheduler warns that it was called first
        optimizer._opt_called = True  # type: ignore[attr-defined]

    def _load_own(self, state: Any) -> None:
        try:
            self._optimizer.load_state_dict(state)
        except Exception as error:
            raise RestoreError(
                f"the optimizer '{self._name}' ({type(self._optimizer).__name__}) did not take what its own state_dict() had "
                f"given: {type(error).__name__}: {error}"
            ) from error

    def _restored_again(self, state: Any) -> dict[int, Any]:
        """Give the tensors of the first restore their content again; return them by the ids of the saved ones.

        The state is restored at `register` and where the loop goes on. New memory of many bytes costs more than a copy.
        """
        found: dict[int, Any] = {}
        for index, mine in self._restored.items():
            for key, saved in state["state"].get(index, {}).items():
                live: Any = mine.get(key)
                if (
                    _is_plain(saved)
                    and _is_plain(live)
                    and (saved.shape, saved.dtype) == (live.shape, live.dtype)
                ):
                    with torch.no_grad():
                        found[id(saved)] = live.copy_(saved)
        return found


def _complete(name: str, optimizer: torch.optim.Optimizer) -> None:
    """Give an optimizer whose __init__ does not call torch's what that would: hooks, and a step() that calls them.

    Raises:
        RegisterError: it lacks more than that.
    """
    missing = [each for each in ("defaults", "param_groups", "state") if not hasattr(optimizer, each)]
    if missing:
        raise RegisterError(
            f"register({name}=...) was given a {type(optimizer).__name__} whose __init__ does not call "
            f"super().__init__(params, defaults) and that lacks what torch needs ({', '.join(missing)}): call it"
        )
    torch.optim.Optimizer.__setstate__(optimizer, {})  # as when one is unpickled
    for each in [each for each in vars(optimizer) if each.startswith("_optimizer_")]:
        # the class's step(), which is the others' too, asks for them now
        if not hasattr(type(optimizer), each):
            setattr(type(optimizer), each, OrderedDict())


def _keys(state: Any) -> Any:
    return {*state} if isinstance(state, dict) else type(state)


def _is_plain(value: Any) -> bool:
    return type(value) is torch.Tensor and value.layout is torch.strided and not value.is_quantized


def _set_state(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """Set an optimizer to its saved state and its groups' settings, all else of it left as it is."""
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in saved_group.items() if key != "params"})
        for parameter, index in zip(group["params"], saved_group["params"], strict=True):
            optimizer.state.pop(parameter, None)
            if index in saved["state"]:
                optimizer.state[parameter] = {
                    key: value.to(parameter.device)
                    if isinstance(value, torch.Tensor) and value.dim()
                    else value
                    for key, value in saved["state"][index].items()
                }


class _Other:
    """Any other object with state_dict and load_state_dict; it never gets hold of the saved tensors."""

    def __init__(self, name: str, thing: Stateful) -> None:
        self._name, self._thing = name, thing

    @property
    def thing(self) -> Stateful:
        return self._thing

    def state_dict(self) -> Any:
        return _with_inner_schedulers(self._thing)

    def load_state_dict(self, state: Any) -> None:
        try:
            _load_inner_schedulers(self._thing, copied(state))
        except RestoreError:
            raise
        except Exception as error:
            raise RestoreError(
                f"'{self._name}' ({type(self._thing).__name__}) did not take its saved state: "
                f"{type(error).__name__}: {error}"
            ) from error


_INNER = "chainrun: state_dict"
_MANY = 4096  # a longer container in run.state is data


def _with_inner_schedulers(thing: Any) -> Any:
    """Return an object's state_dict, with those of schedulers in the place of what it holds of these themselves.

    ``LRScheduler.state_dict`` gives all of ``__dict__``, a scheduler that follows a warm-up too.
    """
    found = thing.state_dict()
    inner = _inner_schedulers(thing, found)
    states = {key: {_INNER: _with_inner_schedulers(one)} for key, one in inner.items()}
    return {**found, **states} if inner else found


def _load_inner_schedulers(thing: Any, state: Any) -> None:
    """Have an object load what `_with_inner_schedulers` returned."""
    known = _inner_schedulers(thing, getattr(thing, "__dict__", None)) if isinstance(state, dict) else {}
    inner = {key for key in known if isinstance(state.get(key), dict) and _INNER in state[key]}
    for key in inner:
        _load_inner_schedulers(known[key], state[key][_INNER])
    thing.load_state_dict(
        {key: value for key, value in state.items() if key not in inner} if inner else state
    )


def _inner_schedulers(thing: Any, found: Any) -> dict[str, Any]:
    """Return the schedulers among what an object has of its own attributes."""
    if not isinstance(found, dict):
        return {}
    own, kind = getattr(thing, "__dict__", {}), torch.optim.lr_scheduler.LRScheduler
    return {key: one for key, one in found.items() if isinstance(one, kind) and own.get(key) is one}


def adapt(name: str, thing: Any) -> Stateful:
    """Return what saves and restores a registered object.

    Raises:
        RegisterError: it has no state_dict and load_state_dict.
    """
    if isinstance(thing, torch.nn.Module):
        fsdp = sys.modules.get("torch.distributed.fsdp")
        if fsdp and any(isinstance(each, fsdp.FullyShardedDataParallel) for each in thing.modules()):
            raise RegisterError(
                f"register({name}=...) was given a module in FullyShardedDataParallel, whose state only all ranks "
                "together can gather; shard it with torch.distributed.fsdp.fully_shard(module) instead"
            )
        return _Module(name, thing)
    if isinstance(thing, torch.optim.Optimizer):
        return _Optimizer(name, thing)
    if isinstance(thing, Stateful) and not isinstance(thing, type):
        return _Other(name, thing)
    raise RegisterError(
        f"register({name}=...) was given a {type(thing).__name__}, which has no state_dict and "
        "load_state_dict; give it both, or keep plain values (numbers, lists, dicts, tensors) in run.state"
    )


def gradients(things: dict[str, Stateful]) -> dict[str, dict[int, torch.Tensor]]:
    """Return the gradients that are still to be used, by the name of the optimizer or, without one, the module."""
    optimizers = {name: thing for name, thing in things.items() if isinstance(thing, _Optimizer)}
    optimized = {id(parameter) for thing in optimizers.values() for parameter in thing.parameters}
    found = {name: thing.gradients.unused() for name, thing in optimizers.items()}
    for name, thing in things.items():
        if isinstance(thing, _Module):
            found[name] = {
                place: parameter.grad.detach()
                for place, parameter in enumerate(thing.parameters)
                if parameter.grad is not None and id(parameter) not in optimized
            }
    return found


def load_gradients(things: dict[str, Stateful], saved: dict[str, dict[int, torch.Tensor]]) -> None:
    """Set the gradients to those that were saved; after `load_extras`, which tells those that were left out."""
    owners = {name: thing for name, thing in things.items() if isinstance(thing, (_Module, _Optimizer))}
    for thing in owners.values():
        for parameter in thing.parameters:
            parameter.grad = None
    for name, thing in owners.items():
        parameters = thing.parameters
        for place, grad in saved[name].items():
            parameters[place].grad = grad.to(parameters[place].device, copy=True)
    modules = [thing for thing in owners.values() if isinstance(thing, _Module)]
    averaged = set().union(*(thing.averaged() for thing in modules))
    for thing in owners.values():
        if isinstance(thing, _Optimizer):
            thing.gradients.settle(averaged)


def extras(things: dict[str, Stateful]) -> dict[str, Any]:
    """Return what modules and optimizers are and keep besides their state_dict."""
    found = {
        name: thing.extra() for name, thing in things.items() if isinstance(thing, (_Module, _Optimizer))
    }
    names = {id(parameter): name for name, parameter in _named(things).items()}
    for name, thing in things.items():
        if isinstance(thing, _Optimizer):
            found[name]["groups"] = thing.groups(names)
            found[name]["left_out"] = thing.gradients.left_out()
    return found


def load_extras(things: dict[str, Stateful], saved: dict[str, Any]) -> None:
    """Set what `extras` returned.

    Raises:
        RestoreError: an optimizer is another one.
    """
    for name, thing in things.items():
        if isinstance(thing, _Optimizer):
            thing.add_groups(saved[name]["groups"], _named(things))
            thing.gradients.expect(saved[name]["left_out"])
        if isinstance(thing, (_Module, _Optimizer)):
            thing.load_extra(saved[name])


def _named(things: dict[str, Stateful]) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of the registered modules by the names of both."""
    return {
        f"{name}.{path}": parameter
        for name, thing in things.items()
        if isinstance(thing, _Module)
        for path, parameter in thing.named_parameters()
    }


def _modules(things: dict[str, Stateful]) -> list[_Module]:
    return [thing for thing in things.values() if isinstance(thing, _Module)]


def states_of_others(things: dict[str, Stateful]) -> dict[str, Any]:
    """Return what the user's own code makes: the state_dict() of what is no module, and no optimizer of torch's form."""
    found = {name: thing.state_dict() for name, thing in things.items() if not isinstance(thing, _Module)}
    others = {name: one for name, one in found.items() if isinstance(things[name], _Other) or OWN in one}
    return {name: one.get(OWN, one) if isinstance(one, dict) else one for name, one in others.items()}


def check_names(things: dict[str, Stateful]) -> None:
    """See, where the first loop begins, that the modules' tensors have the names that a resumed function finds.

    Raises:
        RegisterError: one's have not.
    """
    for module in _modules(things):
        module.check_names()


def check(things: dict[str, Stateful]) -> None:
    """See, at the first boundary after a restore, that the modules are made of what they were made of.

    Raises:
        RestoreError: one is not.
    """
    for module in _modules(things):
        module.check()


def forgotten(things: dict[str, Stateful], originals: list[Any]) -> Iterator[str]:
    """Yield what the registered optimizers show to be missing.

    Raises:
        RegisterError: parameters that an optimizer trains belong to no registered object, a copy of a registered
            module does not, or the ranks do not all pass the same boundaries.
    """
    if any(getattr(getattr(thing, "_join_config", None), "enable", False) for thing in originals):
        raise RegisterError(
            "run.step() is called inside model.join(): a rank that has no more inputs passes no boundaries, so "
            "that the ranks cannot stop together. Give all ranks equally many batches (DistributedSampler does, "
            "drop_last=True for a batch sampler), without join()"
        )
    modules = _modules(things)
    registered = {id(mark) for thing in modules for mark in thing.marks()}
    for thing in modules:
        for copy in thing.copies():
            if id(copy) not in registered:
                raise RegisterError(
                    f"the module '{copy.name}' was copied after it was registered, and the copy is not registered: a "
                    "resumed run would copy the restored weights instead. Copy it before run.register(...), or "
                    "register the copy too"
                )
    held = {id(parameter) for thing in modules for parameter in thing.parameters}
    others = any(isinstance(t, _Other) and not _of_torch(t.thing) for t in things.values())
    for name, optimizer in things.items():
        if not isinstance(optimizer, _Optimizer):
            continue
        free = [parameter for parameter in optimizer.parameters if id(parameter) not in held]
        if free and not others:
            raise RegisterError(
                f"the optimizer '{name}' trains {len(free)} parameters, the first of shape {tuple(free[0].shape)}, "
                "that no registered object holds; a resumed run would lose what they have learned. Register the "
                "module they belong to; make loose ones, torch.zeros(1, requires_grad=True), torch.nn.Parameter(...) "
                "and register torch.nn.ParameterList([...]) of them, which holds other tensors as copies"
            )
        if optimizer.is_scheduled and not any(map(optimizer.drives, originals)):
            yield (
                f"a learning-rate scheduler drives the optimizer '{name}' and is not registered; unless it is "
                "set anew in every step, a resumed run will have other learning rates"
            )
        for attribute in optimizer.by_objects():
            yield (
                f"the optimizer '{name}' keeps tensors in '{attribute}' by modules or parameters, which is not saved: a "
                "resumed run begins with what it is when it is built. Keep them in optimizer.state[parameter], or by the "
                "modules' names"
            )


def strangers(things: dict[str, Stateful], originals: list[Any]) -> Iterator[str]:
    """Yield the optimizers that train registered parameters, have state, and are not registered."""
    owners = {
        id(parameter): name
        for name, thing in things.items()
        if isinstance(thing, _Module)
        for parameter in thing.parameters
    }
    inside = {id(value) for thing in originals for value in getattr(thing, "__dict__", {}).values()}
    known = inside | {id(thing) for thing in originals}
    for one in gc.get_objects():
        if issubclass(type(one), torch.optim.Optimizer) and id(one) not in known and any(one.state.values()):
            trained = {owners.get(id(p)) for group in one.param_groups for p in group["params"]} - {None}
            if trained:
                yield (
                    f"an optimizer ({type(one).__name__}) that trains '{min(map(str, trained))}' is not registered; "
                    "a resumed run begins with a new one, without its state"
                )


def shared(things: Iterable[tuple[str, Any]], tree: Any) -> tuple[str, str] | None:
    """Return where in a tree there is a tensor in the memory of a registered module or optimizer, and of which one."""
    try:
        found = [(at, _memory_of(tensor)) for at, tensor in _tensors_in(tree)]
    except RecursionError:  # it holds itself, which is refused
        return None
    owned = (
        ((_memory_of(one), name) for name, thing in things for one in _own_tensors(thing)) if found else ()
    )
    owners = {memory: name for memory, name in owned if memory}
    return next(((at, owners[memory]) for at, memory in found if memory in owners), None)


def _own_tensors(thing: Any) -> Iterator[torch.Tensor]:
    if isinstance(thing, torch.nn.Module):
        yield from (*torch.nn.Module.parameters(thing), *torch.nn.Module.buffers(thing))
    elif isinstance(thing, torch.optim.Optimizer):
        yield from (one for _, one in _tensors_in([*getattr(thing, "state", {}).values()]))


def _tensors_in(tree: Any, at: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(tree, torch.Tensor):
        yield at, tree
    elif isinstance(tree, (dict, list, tuple)) and len(tree) <= _MANY:
        for key, one in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _tensors_in(one, f"{at}[{key!r}]")


def _memory_of(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor begins, 0 of one that has none of its own."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if plain and not tensor.is_nested else 0


def _of_torch(thing: Any) -> bool:
    return type(thing).__module__.partition(".")[0] == "torch"
