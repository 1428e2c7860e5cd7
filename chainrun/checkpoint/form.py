"""What a module is made of, besides tensors and values: the classes of its parts, functions in attributes, hooks.

No checkpoint holds code. A training that swaps a layer, an activation or a hook inside its loop has the old one when it
is resumed in a later turn; noted is what is not as it was when the module was registered, so that this is seen.
"""

from __future__ import annotations

import types
from collections.abc import Iterator

import torch

from chainrun.checkpoint.attributes import HOOKS
from chainrun.owned import is_users_own

_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_TORCHS_OWN = vars(torch.nn.Module()).keys()
_NOTHING = "nothing"


class Form:
    """Follows what a module is made of.

    Args:
        module: just built, and not yet restored.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module
        self._built = dict(self._parts())
        self._tensors = self._saved_tensors()
        self._lost: dict[str, tuple[str, str]] = {}  # by place what it was, and what was here instead

    def _parts(self) -> Iterator[tuple[str, str]]:
        for path, module in self._module.named_modules(remove_duplicate=False):
            yield path, type(module).__qualname__
            own = vars(module)
            for name in HOOKS:
                hooks = [hook for hook in own.get(name, {}).values() if is_users_own(_function(hook))]
                if hooks:
                    yield f"{path}.{name}", " and ".join(_name(hook) for hook in hooks)
            for name, value in own.items():
                if name not in _TORCHS_OWN and isinstance(value, _FUNCTIONS):
                    yield f"{path}.{name}", _name(value)

    def _saved_tensors(self) -> set[str]:
        """Return the names that are in its state_dict()."""
        return {
            f"{path}.{name}".lstrip(".")
            for path, module in self._module.named_modules(remove_duplicate=False)
            for name, tensor in (*module._parameters.items(), *module._buffers.items())
            if tensor is not None and name not in module._non_persistent_buffers_set
        }

    def other_tensors(self) -> list[str]:
        """Say which tensors have come and gone since it was built."""
        here = self._saved_tensors()
        come, gone = sorted(here - self._tensors), sorted(self._tensors - here)
        return [*(f"'{name}' has come" for name in come), *(f"'{name}' has gone" for name in gone)]

    def changed(self) -> dict[str, str]:
        """Return what is not as it was built, by its place."""
        return {place: here for place, (_, here) in self._differences(self._built).items()}

    def expect(self, saved: dict[str, str]) -> None:
        """Note what is not as `changed` said: the turn that begins may still make it so."""
        self._lost = self._differences({**self._built, **saved})

    def _differences(self, then: dict[str, str]) -> dict[str, tuple[str, str]]:
        """Return what it was and what it is, by the places where that differs."""
        here = dict(self._parts())
        pairs = {place: (then.get(place, _NOTHING), here.get(place, _NOTHING)) for place in {**then, **here}}
        return {place: (was, now) for place, (was, now) in pairs.items() if was != now}

    def lost(self) -> Iterator[tuple[str, str, str]]:
        """Yield what the turn has not made so: the place, what it was, and what it is."""
        here = dict(self._parts()) if self._lost else {}
        for place, (then, mine) in self._lost.items():
            if here.get(place, _NOTHING) == mine:
                yield place, then, mine
        self._lost = {}


def _function(hook: object) -> object:
    return getattr(hook, "__func__", hook) if isinstance(hook, _FUNCTIONS) else type(hook)


def _name(function: object) -> str:
    kind = _function(function)
    code = getattr(kind, "__code__", None)
    line = f" in line {code.co_firstlineno}" if code is not None and code.co_name == "<lambda>" else ""
    return f"{getattr(kind, '__qualname__', kind)}{line}"
