"""Registered objects to plain trees of tensors and back, without losing a bit."""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch

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


class _Module:
    """A module; wrappers do not show in the names, so that a checkpoint fits with and without them."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self._name, self._module = name, unwrap(module)

    def state_dict(self) -> Any:
        return self._module.state_dict()

    def load_state_dict(self, state: Any) -> None:
        differences = list(_differences(self._module.state_dict(), state))
        if differences:
            shown = "; ".join(differences[:5]) + (
                f"; and {len(differences) - 5} more" * (len(differences) > 5)
            )
            raise RestoreError(
                f"the module '{self._name}' is not the one that was saved: {shown}. Nothing was restored; "
                "build it as it was, or start a new run"
            )
        self._module.load_state_dict(state)


def _differences(mine: Any, saved: Any) -> Iterator[str]:
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
        if a.shape != b.shape:
            yield f"{key} has shape {tuple(a.shape)}, in the checkpoint {tuple(b.shape)}"
        elif a.dtype != b.dtype:
            yield f"{key} is {a.dtype}, in the checkpoint {b.dtype}"


class _Optimizer:
    """An optimizer; its tensors come back in the dtype they had.

    `torch.optim.Optimizer.load_state_dict` casts floating-point state to the parameter's dtype, which loses
    bits where an optimizer keeps fp32 state of bf16 parameters.
    """

    def __init__(self, name: str, optimizer: torch.optim.Optimizer) -> None:
        self._name, self._optimizer = name, optimizer

    def state_dict(self) -> Any:
        return self._optimizer.state_dict()

    def load_state_dict(self, state: Any) -> None:
        optimizer = self._optimizer
        try:
            optimizer.load_state_dict(copy.deepcopy(state))
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
        # an earlier process has called step(): else a scheduler warns that it was called first
        optimizer._opt_called = True  # type: ignore[attr-defined]


class _Other:
    """Any other object with state_dict and load_state_dict; it never gets hold of the saved tensors."""

    def __init__(self, name: str, thing: Stateful) -> None:
        self._name, self._thing = name, thing

    def state_dict(self) -> Any:
        return self._thing.state_dict()

    def load_state_dict(self, state: Any) -> None:
        try:
            self._thing.load_state_dict(copy.deepcopy(state))
        except RestoreError:
            raise
        except Exception as error:
            raise RestoreError(
                f"'{self._name}' ({type(self._thing).__name__}) did not take its saved state: "
                f"{type(error).__name__}: {error}"
            ) from error


def adapt(name: str, thing: Any) -> Stateful:
    """Return what saves and restores a registered object.

    Raises:
        RegisterError: it has no state_dict and load_state_dict.
    """
    if isinstance(thing, torch.nn.Module):
        return _Module(name, thing)
    if isinstance(thing, torch.optim.Optimizer):
        return _Optimizer(name, thing)
    if isinstance(thing, Stateful) and not isinstance(thing, type):
        return _Other(name, thing)
    raise RegisterError(
        f"register({name}=...) was given a {type(thing).__name__}, which has no state_dict and "
        "load_state_dict; give it both, or keep plain values (numbers, lists, dicts, tensors) in run.state"
    )


_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device)
_KEYS = (*_PLAIN, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_INT_BITS = 2040  # torch.load's weights_only reader knows integers of up to 255 bytes
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple, set)


def check(tree: Any, path: str) -> None:
    """Refuse what ``torch.load(weights_only=True)`` would not open again.

    Raises:
        RegisterError: names the path and the type.
    """
    kind = type(tree)
    if kind is bytes and not tree:
        raise RegisterError(f"{path} is empty bytes, which a checkpoint cannot hold; use None")
    if kind is int and tree.bit_length() >= _INT_BITS:
        raise RegisterError(
            f"{path} is an int of {tree.bit_length()} bits; a checkpoint holds up to {_INT_BITS - 1}"
        )
    if isinstance(tree, torch.Tensor):
        if kind not in _TENSORS and kind not in torch.serialization.get_safe_globals():
            raise RegisterError(
                f"{path} is a tensor of the class {kind.__module__}.{kind.__qualname__}, which a checkpoint "
                "cannot hold; use plain tensors, or name the class in torch.serialization.add_safe_globals "
                "before the training and before every load"
            )
        check(vars(tree), f"{path}.__dict__")
    elif kind in _CONTAINERS:
        if isinstance(tree, dict):
            for key, value in tree.items():
                if type(key) not in _KEYS:
                    raise RegisterError(
                        f"{path} has a key of type {type(key).__qualname__}; use str or int keys"
                    )
                check(key, f"a key of {path}")
                check(value, f"{path}.{key}")
        else:
            for index, value in enumerate(tree):
                check(value, f"{path}[{index}]")
    elif kind not in _PLAIN:
        raise RegisterError(
            f"{path} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot hold; use numbers, "
            "strings, lists, dicts and tensors (float(x) of a NumPy scalar, torch.from_numpy(x) of an array)"
        )


def refill(live: Any, saved: Any) -> None:
    """Give a dict or list the content that was saved, in place: the function may hold on to what is inside."""
    if isinstance(live, dict):
        content: Any = {key: _refilled(live.get(key), value) for key, value in saved.items()}
        live.clear()  # the order of the keys is content too
        live.update(content)
    else:
        live[:] = [_refilled(live[n] if n < len(live) else None, value) for n, value in enumerate(saved)]


def _refilled(live: Any, saved: Any) -> Any:
    if isinstance(live, torch.Tensor) and isinstance(saved, torch.Tensor):
        if (live.shape, live.dtype) == (saved.shape, saved.dtype):
            with torch.no_grad():
                return live.copy_(saved)
    elif type(live) is type(saved) and isinstance(live, (dict, list)):
        refill(live, saved)
        return live
    return copy.deepcopy(saved)


def nbytes(tree: Any) -> int:
    """Return how many bytes the tensors of a tree hold."""
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        return sum(nbytes(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(nbytes(value) for value in tree)
    return 0
