"""What a module keeps beside its state_dict: plain attributes, those of the user's objects in it and of its hooks, and
buffers that are not persistent.

Saved is what has changed since the module was registered. Contents are compared: what writes through ``.data`` or
a NumPy view leaves no other trace.
"""

from __future__ import annotations

import ast
import enum
import marshal
import types
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from chainrun.checkpoint import kinds, state
from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.sharded import map_tensors
from chainrun.errors import RegisterError
from chainrun.owned import RECORDS, fields, is_users_own

_SCALARS = (bool, int, float, str, type(None), bytes, torch.dtype, torch.device)
_CONTAINERS = (list, tuple, dict, OrderedDict, Counter, set)
_WIDTH = 4096  # a longer container is state only if it holds numbers and strings alone
_TORCHS_OWN = vars(torch.nn.Module()).keys() - {"training"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""The attributes of a module that hold its hooks."""
_OPTIMIZERS_OWN = {  # and what begins with _optimizer_
    *("defaults", "state", "param_groups", "_zero_grad_profile_name", "_opt_called"),
    "_warned_capturable_if_run_uncaptured",
}
_DEPTH = 3  # how deep the user's objects are followed
_WHICH = "[which]"  # beside the items of a container: their keys
_FEW = 64  # in how long lists, tuples and dicts they are looked for
_ABSENT: Any = object()
_OTHER: Any = object()  # what is no state


class _Built:
    """What a place held when the module was registered."""

    def __init__(self, value: Any) -> None:
        self.tree = _split(value)
        self.mark = _mark(self.tree.pop(""))
        # a tensor may be large; a list costs nothing that its mark does not
        self._object: Callable[[], Any] = (
            weakref.ref(value) if isinstance(value, torch.Tensor) else lambda: value
        )

    def value(self) -> Any:
        """Return it as it was, if it is plain."""
        assert isinstance(self.mark, bytes)
        return kinds.join({"": marshal.loads(self.mark), **self.tree})[""]

    def is_replaced_by(self, value: Any) -> bool:
        return self._object() is not value


def _mark(value: Any) -> bytes | str:
    """Return what differs where a value does: of plain values, what they are made from again."""
    try:
        return marshal.dumps(value, 2)  # later versions tell equal objects from shared ones
    except ValueError:
        return fingerprint(value)


def _split(value: Any) -> dict[str, Any]:
    """Return what a checkpoint holds in a value's place, and beside it the kinds: see `kinds.split`."""
    try:
        # what is long is state only if it is plain, and costs too much to be looked through
        is_long = isinstance(value, (list, tuple, dict, set, deque)) and len(value) > _WIDTH
        return {"": value} if is_long or _is_state(value) else kinds.split({"": value})
    except RecursionError:  # it holds itself
        return {"": value}


def _owner_of(hook: Any) -> Any:
    """Return the object whose method a hook is, or the hook itself, which may be an object."""
    return hook.__self__ if isinstance(hook, types.MethodType) else hook


def _is_followed(value: Any) -> bool:
    """Whether it is an object of the user's without a state_dict of its own."""
    kind = type(value)
    return (
        (is_users_own(kind) or kind in RECORDS)
        and not issubclass(kind, (torch.nn.Module, torch.Tensor, torch.optim.Optimizer, type))
        and not hasattr(kind, "state_dict")
        and (type(getattr(value, "__dict__", None)) is dict or bool(fields(value)))
    )


def _items_of(value: Any, depth: int = _DEPTH) -> list[tuple[Any, Any]]:
    """Return what is in a short list, tuple or dict of the user's objects, by its place or key; of others nothing."""
    if type(value) not in (list, tuple, dict, OrderedDict) or len(value) > _FEW or not depth:
        return []
    items = [*(value.items() if isinstance(value, dict) else enumerate(value))]
    known = all(type(key) is int or (type(key) is str and "." not in key) for key, _ in items)
    return items if known and any(_is_followed(one) or _items_of(one, depth - 1) for _, one in items) else []


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

    State are numbers, strings, None, tensors and arrays, and lists, tuples, dicts, sets and deques of them, also in
    objects of the user's; whether a parameter requires_grad; and buffers that are not persistent. An object that has
    got a file or the like since it was built is left alone: its other attributes may tell that it has.

    Args:
        module: just built, and not yet restored.
        but: the name of attributes that are none of the user's.
    """

    def __init__(self, module: Any, but: str) -> None:
        self._module, self._but = module, but
        self._objects: dict[str, Any] = {}  # the user's objects in it, by every place where they are
        built = dict(self._all())
        self._objects_built = self._objects
        self._others = {path for path, value in built.items() if value is _OTHER}
        self._built = {path: _Built(value) for path, value in built.items() if value is not _OTHER}

    def _all(self) -> Iterator[tuple[str, Any]]:
        self._objects, seen = {}, set[int]()
        for path, module in self._module.named_modules(remove_duplicate=False):
            for name, value in vars(module).items():
                if name not in _TORCHS_OWN and name != self._but:
                    yield from self._in_attribute(f"{path}.{name}", value, seen)
                elif name in HOOKS:
                    for place, hook in enumerate([*value.values()]):
                        yield from self._in_attribute(f"{path}.{name}.{place}", _owner_of(hook), seen)
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    yield f"{path}.{name}.requires_grad", parameter.requires_grad
            for name in sorted(module._non_persistent_buffers_set):
                yield f"{path}.{name}", module._buffers.get(name)

    def _in_attribute(self, path: str, value: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
        """Yield what an attribute holds that may be state, and what of the objects in it is none."""
        found = self._in_object(path, value, _DEPTH, seen)
        return ((place, one) for place, one in found if one is not _OTHER or place != path)

    def _in_object(self, path: str, value: Any, depth: int, seen: set[int]) -> Iterator[tuple[str, Any]]:
        if _is_state(_split(value)[""]):
            yield path, value
            return
        if isinstance(value, enum.Enum):  # of a class that is made in a function
            return
        if items := _items_of(value):
            if id(value) not in seen:
                seen.add(id(value))
                yield f"{path}.{_WHICH}", [key for key, _ in items]
                for key, one in items:
                    yield from self._in_object(f"{path}.[{key!r}]", one, depth, seen)
            return
        if not depth or not _is_followed(value):
            yield path, _OTHER
            return
        self._objects[path] = value
        if id(value) not in seen:
            seen.add(id(value))
            for name, inner in fields(value):
                yield from self._in_object(f"{path}.{name}", inner, depth - 1, seen)

    def _here(self) -> dict[str, Any]:
        """Return the values that may be state, by their places."""
        found = dict(self._all())
        opened = {path for path, value in found.items() if value is _OTHER and path not in self._others}
        left_alone = {path.rpartition(".")[0] for path in opened}
        return {
            path: value
            for path, value in found.items()
            if value is not _OTHER and path.rpartition(".")[0] not in left_alone
        }

    def changed(self) -> dict[str, Any]:
        """Return what is not as it was, by its place; where another object has come; the kinds of device."""
        values: dict[str, Any] = {}
        replaced, devices, places = [], {}, {}
        for path, value in self._here().items():
            built, tree = self._built.get(path), _split(value)
            plain = tree.pop("")
            if (built is not None and built.mark == _mark(plain)) or not _can_be_saved(plain):
                continue
            # an activation that is kept: its value, without what it was computed from
            values[path] = map_tensors(plain, (), lambda _, t: t if t.is_leaf else t.detach())
            if built is None or built.is_replaced_by(value):
                replaced.append(path)
            devices[path] = _device_of(plain).type
            if tree:
                places[path] = tree
        found = {"values": values, "replaced": replaced, "devices": devices, "kinds": places}
        return {**found, "objects": self._which()}

    def _which(self) -> dict[str, list[str]]:
        """Return where another object of the user's is than when it was built: where that was, or of which class it is."""
        was = {id(one): place for place, one in reversed(self._objects_built.items())}
        found = {}
        for place, one in self._objects.items():
            if place in self._objects_built and one is not self._objects_built[place]:
                known = was.get(id(one))
                found[place] = ["new", type(one).__qualname__] if known is None else ["is", known]
        return found

    def _replace_objects(self, which: dict[str, list[str]]) -> tuple[str, ...]:
        """Put the objects in those places; return the places where one of another class is."""
        others = []
        for place, (how, what) in which.items():
            live = self._objects_built.get(place)
            if how == "is":
                self._put(place, self._objects_built.get(what, live))
            elif type(live).__qualname__ != what:
                others.append(f"{place}.")
            elif self._objects.get(place) is live:  # which others may hold, who have not changed it
                self._put(place, state.duplicate(live))
        return tuple(others)

    def restore(self, saved: dict[str, Any]) -> None:
        """Set what `changed` returned, and what had not changed then to what it was when this one was built."""
        self._here()
        others = self._replace_objects(saved.get("objects", {}))
        here = self._here()
        for path, value in saved["values"].items():
            if path.startswith(others):
                continue
            live = here.get(path, _ABSENT)
            placed = self._placed(value, live, saved["devices"][path])
            placed = kinds.join({"": placed, **state.copied(saved["kinds"].get(path, {}))})[""]
            self._set(path, _ABSENT if path in saved["replaced"] else live, placed)
        for path, live in here.items():
            built = self._built.get(path)
            if path in saved["values"] or built is None or isinstance(built.mark, str):
                continue  # one with tensors in it may share their memory with a weight, and is left
            if built.mark != _mark(_split(live)[""]):
                self._set(path, live, built.value())

    def _set(self, path: str, live: Any, value: Any) -> None:
        """Set an attribute, in place where `live` may be known to others too."""
        new = state.refilled(live, value)
        if new is not live:
            self._put(path, new)

    def _put(self, path: str, value: Any) -> None:
        where, _, name = path.rpartition(".")
        owner: Any = self._module
        for part in where.strip(".").split("."):
            if part.startswith("["):
                owner = dict(_items_of(owner)).get(ast.literal_eval(part[1:-1]))
            elif isinstance(owner, OrderedDict):  # of hooks
                owner = _owner_of([*owner.values()][int(part)]) if int(part) < len(owner) else None
            else:
                owner = getattr(owner, part, None) if part else owner
        if name == _WHICH:  # objects that have come cannot be made again
            return
        if name.startswith("["):
            if isinstance(owner, (list, dict)):
                owner[ast.literal_eval(name[1:-1])] = value
        elif owner is not None:  # an object that the training makes is made by it again
            state.set_attribute(owner, name, value)

    def _tensors(self) -> Iterable[torch.Tensor]:
        return list(self._module.parameters())

    def _placed(self, value: Any, live: Any, kind: str) -> Any:
        """Return a copy of a value, its tensors on the device where they were."""
        device = _device_of(live)
        if device.type != kind:
            mine = (t.device for t in self._tensors() if t.device.type == kind)
            device = next(mine, torch.device(kind))

        def moved(_: Any, tensor: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return tensor.to(device, copy=True).requires_grad_(tensor.requires_grad)

        return map_tensors(state.copied(value), (), moved)


class OfOptimizer(Attributes):
    """The attributes of an optimizer of somebody's own that are not torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer, but="")

    def _own(self) -> Iterator[tuple[str, Any]]:
        if not type(self._module).__module__.startswith("torch.optim"):
            for name, value in list(vars(self._module).items()):
                if name not in _OPTIMIZERS_OWN and not name.startswith("_optimizer_"):
                    yield name, value

    def _all(self) -> Iterator[tuple[str, Any]]:
        self._objects, seen = {}, set[int]()
        for name, value in self._own():
            yield from self._in_attribute(f".{name}", value, seen)

    def by_objects(self) -> Iterator[str]:
        """Yield the names of dicts that hold tensors by modules or parameters, of which there are others after a resume."""
        for name, value in self._own():
            if isinstance(value, dict):
                by = [key for key, one in value.items() if isinstance(one, torch.Tensor)]
                if any(isinstance(key, (torch.nn.Module, torch.Tensor)) for key in by):
                    yield name

    def _tensors(self) -> Iterable[torch.Tensor]:
        return (tensor for group in self._module.param_groups for tensor in group["params"])


def _device_of(value: Any) -> torch.device:
    """Return the device of the first tensor in a value, the CPU where there is none."""
    found: list[torch.device] = []

    def look(_: Any, tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor.device)
        return tensor

    map_tensors(value, (), look)
    return found[0] if found else torch.device("cpu")
