"""What a module keeps beside its state_dict: plain attributes, and buffers that are not persistent.

Saved is what has changed since the module was registered. Contents are compared: what writes through ``.data`` or
a NumPy view leaves no other trace.
"""

from __future__ import annotations

import marshal
import weakref
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from chainrun.checkpoint import state
from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.sharded import map_tensors
from chainrun.errors import RegisterError

_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, dict, OrderedDict, Counter, set)
_WIDTH = 4096  # a longer container is state only if it holds numbers and strings alone
_TORCHS_OWN = vars(torch.nn.Module()).keys() - {"training"}
_ABSENT: Any = object()


class _Built:
    """What a place held when the module was registered."""

    def __init__(self, value: Any) -> None:
        self.mark = _mark(value)
        # a tensor may be large; a list costs nothing that its mark does not
        self._object: Callable[[], Any] = (
            weakref.ref(value) if isinstance(value, torch.Tensor) else lambda: value
        )

    def is_replaced_by(self, value: Any) -> bool:
        return self._object() is not value


def _mark(value: Any) -> bytes | str:
    """Return what differs where a value does: of plain values, what they are made from again."""
    try:
        return marshal.dumps(value, 2)  # later versions tell equal objects from shared ones
    except ValueError:
        return fingerprint(value)


def _is_state(value: Any, depth: int = 8) -> bool:
    if type(value) in _SCALARS or type(value) is torch.Tensor:
        return True
    if type(value) not in _CONTAINERS or not depth:
        return False
    try:
        marshal.dumps(value, 2)
        return True
    except ValueError:
        items = [*value, *value.values()] if isinstance(value, dict) else value
        return len(items) <= _WIDTH and all(_is_state(item, depth - 1) for item in items)


def _can_be_saved(value: Any) -> bool:
    try:
        state.check(value, "")
        return True
    except RegisterError:
        return False


class Attributes:
    """The attributes of a module and of all in it that its state_dict() leaves out.

    State are numbers, strings, None and tensors, and lists, tuples, dicts and sets of them; whether a parameter
    requires_grad; and buffers that are not persistent.

    Args:
        module: just built, and not yet restored.
        but: the name of attributes that are none of the user's.
    """

    def __init__(self, module: torch.nn.Module, but: str) -> None:
        self._module, self._but = module, but
        self._built = {path: _Built(value) for path, value in self._all()}

    def _all(self) -> Iterator[tuple[str, Any]]:
        for path, module in self._module.named_modules(remove_duplicate=False):
            for name, value in vars(module).items():
                if name not in _TORCHS_OWN and name != self._but and _is_state(value):
                    yield f"{path}.{name}", value
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{path}.{name}.requires_grad", parameter.requires_grad
            for name in sorted(module._non_persistent_buffers_set):
                yield f"{path}.{name}", module._buffers.get(name)

    def changed(self) -> dict[str, Any]:
        """Return what is not as it was, by its place; where another object has come; the kinds of device."""
        values: dict[str, Any] = {}
        replaced, devices = [], {}
        for path, value in self._all():
            built = self._built.get(path)
            if (built is not None and built.mark == _mark(value)) or not _can_be_saved(value):
                continue
            # an activation that is kept: its value, without what it was computed from
            values[path] = map_tensors(value, (), lambda _, t: t if t.is_leaf else t.detach())
            if built is None or built.is_replaced_by(value):
                replaced.append(path)
            devices[path] = _device_of(value).type
        return {"values": values, "replaced": replaced, "devices": devices}

    def restore(self, saved: dict[str, Any]) -> None:
        """Set what `changed` returned, and what had not changed then to what it was when this one was built."""
        here = dict(self._all())
        for path, value in saved["values"].items():
            live = here.get(path, _ABSENT)
            placed = self._placed(value, live, saved["devices"][path])
            self._set(path, _ABSENT if path in saved["replaced"] else live, placed)
        for path, live in here.items():
            built = self._built.get(path)
            if path in saved["values"] or built is None or isinstance(built.mark, str):
                continue  # one with tensors in it may share their memory with a weight, and is left
            if built.mark != _mark(live):
                self._set(path, live, marshal.loads(built.mark))

    def _set(self, path: str, live: Any, value: Any) -> None:
        """Set an attribute, in place where `live` may be known to others too."""
        alike = type(live) is type(value)
        if alike and isinstance(value, torch.Tensor) and _fits(live, value):
            with torch.no_grad():
                live.copy_(value)  # it may be a view
        elif alike and isinstance(value, (dict, list)):
            state.refill(live, value)
        elif alike and isinstance(value, set):
            live.clear()
            live.update(value)
        else:
            where, _, name = path.rpartition(".")
            owner: Any = self._module
            for part in where.strip(".").split("."):
                owner = getattr(owner, part) if part else owner
            setattr(owner, name, value)

    def _placed(self, value: Any, live: Any, kind: str) -> Any:
        """Return a copy of a value, its tensors on the device where they were."""
        device = _device_of(live)
        if device.type != kind:
            mine = (t.device for t in self._module.parameters() if t.device.type == kind)
            device = next(mine, torch.device(kind))

        def moved(_: Any, tensor: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tensor.to(device, copy=True).requires_grad_(tensor.requires_grad)

        return map_tensors(state.copied(value), (), moved)


def _fits(live: torch.Tensor, value: torch.Tensor) -> bool:
    return (live.shape, live.dtype, live.layout) == (value.shape, value.dtype, value.layout)


def _device_of(value: Any) -> torch.device:
    """Return the device of the first tensor in a value, the CPU where there is none."""
    found: list[torch.device] = []

    def look(_: Any, tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.device)
        return tensor

    map_tensors(value, (), look)
    return found[0] if found else torch.device("cpu")
