"""What a state holds besides torch's and Python's plainest: NumPy's numbers and arrays, deques, named tuples, enumerations.

A learning rate from `np.linspace`, a best value from `np.mean`, a replay memory. But a file that plain
``torch.load(weights_only=True)`` opens holds none. So what comes nearest is in their places: a number, a tensor, a
list, a dict, a name. Beside them is said where, and of which kinds they were.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import importlib
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from chainrun.errors import RestoreError
from chainrun.owned import is_users_own

PLACES = "numpys"
"""The key in a rank's tree."""

FACTORIES = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, set, deque, Counter)}
"""What may make the values of a defaultdict, by name."""
_NUMBERS = {
    *((kind, False) for kind in "biufc"),
    ("c", True),
}  # of NumPy, by kind and whether of more than 8 bytes
_OF_CLASSES = ("own", "named", "member")
_CONTAINERS = (dict, OrderedDict, Counter, list, tuple)


def split(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree without such values; what has none in it is the same object."""
    taken = _Taken({})
    rest: dict[str, Any] = taken.without(tree, ())
    if views := _sharing(taken.arrays):
        taken = _Taken(views)
        rest = taken.without(tree, ())
    return {**rest, PLACES: taken.places} if taken.places else tree


def join(tree: dict[str, Any], *, classes: bool = True) -> dict[str, Any]:
    """Put the values into a tree that `split` returned, in place.

    Args:
        classes: also values of classes of the user's, whose modules are imported; else what was saved for them is left.

    Raises:
        RestoreError: there is no such class any more.
    """
    made: dict[Any, tuple[Any, Any]] = {}
    for keys, kind in tree.pop(PLACES, ()):
        if classes or kind[0] not in _OF_CLASSES:
            _put(tree, keys, kind, made)
    return tree


def named(thing: Any) -> str | None:
    """Return the name by which a class or a function is found again, None of one that is not: made in a function."""
    name = getattr(thing, "__name__", "")
    module, path = getattr(thing, "__module__", None), getattr(thing, "__qualname__", name)
    # builtin functions of torch and NumPy do not tell where they are
    names = (f"{module}:{path}", f"torch:{name}", f"numpy:{name}", f"builtins:{path}")
    return next((each for each in names if name and _found(each) is thing), None)


def found_again(name: str, *bases: type) -> Any:
    """Return the class or the function that `named` gave this name.

    Args:
        bases: it has to be a class that is one of these: a checkpoint cannot have just anything called.

    Raises:
        RestoreError: there is none.
    """
    with contextlib.suppress(ImportError):  # the function may import it only when it runs
        importlib.import_module(name.partition(":")[0])
    found = _found(name)
    if found is None or (bases and not (isinstance(found, type) and issubclass(found, bases))):
        raise RestoreError(
            f"a checkpoint holds a value of the class {name.replace(':', '.')}, which is not there any more: bring it back"
        )
    return found


def _found(name: str) -> Any:
    module, _, path = name.partition(":")
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    return found


def is_named_tuple(value: Any) -> bool:
    """Whether it is a tuple of a class with names for its items."""
    return isinstance(value, tuple) and hasattr(type(value), "_fields")


def is_member(value: Any) -> bool:
    """Whether it is a member of an enumeration that is found again, or a combination of flags."""
    known = isinstance(value, enum.Flag) or (
        isinstance(value, enum.Enum) and value.name in type(value).__members__
    )
    return known and named(type(value)) is not None


def base_of(kind: Any) -> Any:
    """Return dict or list, if it is a class of the user's that is one, and is found again: ``cfg.lr`` for ``cfg["lr"]``."""
    base = next((base for base in (dict, list) if issubclass(kind, base)), None)
    if base is None or base is kind or issubclass(kind, defaultdict) or not is_users_own(kind):
        return None
    return base if named(kind) else None


def content_of(value: Any) -> Any:
    """Return what is in a dict or list of whatever class, in one of Python's own; none of its methods is called."""
    if isinstance(value, OrderedDict):
        return dict(OrderedDict.items(value))
    return dict(dict.items(value)) if isinstance(value, dict) else [*list.__iter__(value)]


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return the attributes of a dict or list of a class of the user's; None where they are its keys."""
    own = getattr(value, "__dict__", None)
    if own is value:
        return None
    return {**own} if type(own) is dict else {}


def fill(thing: Any, content: Any, attributes: dict[str, Any] | None) -> None:
    """Give a dict or list of whatever class this content and these attributes; none of its own methods is called."""
    if isinstance(thing, dict):
        base = OrderedDict if isinstance(thing, OrderedDict) else dict
        base.clear(thing)
        for key, one in content.items():
            base.__setitem__(thing, key, one)
    else:
        list.__setitem__(thing, slice(None), content)
    own = getattr(thing, "__dict__", None)
    if attributes is None:
        object.__setattr__(thing, "__dict__", thing)
    elif type(own) is dict:
        own.clear()
        own.update(attributes)


def is_plain_array(value: Any) -> bool:
    """Whether a NumPy array or number has content that a tensor holds; matrices and masked arrays have more."""
    kind = type(value)
    known = kind is np.ndarray or issubclass(kind, np.generic)
    size = value.dtype.itemsize if known else 0
    return known and (value.dtype.kind, size > 8) in _NUMBERS and size <= 16 and bool(value.dtype.isnative)


def _plain(value: Any) -> tuple[Any, Any]:
    """Return what is saved in a value's place, and its kind, from which `_made` makes it; None of all else."""
    kind = type(value)
    if isinstance(value, np.generic):
        plain = value.item()
        if type(plain) in (bool, int, float, complex):  # text, dates, numbers that Python has not
            return plain, value.dtype.str
    elif isinstance(value, np.ndarray):
        if is_plain_array(value):
            plain = value.flags.writeable and all(stride >= 0 for stride in value.strides)
            try:  # not in another order: sums depend on it
                return torch.from_numpy(value if plain else value.copy(order="K")), ["array"]
            except TypeError:  # a kind of number that torch has not
                return None, None
    elif kind is deque:
        return [*value], ["deque", value.maxlen]
    elif kind is frozenset:
        return {*value}, ["frozenset"]
    elif kind is defaultdict:
        factory = getattr(value.default_factory, "__name__", None)
        if value.default_factory is FACTORIES.get(str(factory)):
            return dict(value), ["defaultdict", factory]
    elif is_member(value):
        return name_of(value), ["member", named(kind)]
    elif is_named_tuple(value) and (name := named(kind)):
        return [*value], ["named", name]
    elif base_of(kind):
        return [content_of(value), attributes_of(value)], ["own", named(kind)]
    return None, None


def _made(plain: Any, kind: Any) -> Any:
    """Return the value of that kind."""
    if isinstance(kind, str):
        return np.dtype(kind).type(plain)
    which, *about = kind
    if which == "array":
        return plain.numpy()
    if which == "deque":
        return deque(plain, about[0])
    if which == "frozenset":
        return frozenset(plain)
    if which == "defaultdict":
        return defaultdict(FACTORIES.get(about[0]), plain)
    if which == "own":
        return made_of(about[0], *plain)
    return member(about[0], plain) if which == "member" else named_tuple(about[0], plain)


def named_tuple(name: str, items: Iterable[Any]) -> Any:
    """Return the named tuple of these items."""
    return found_again(name, tuple)(*items)


def name_of(member: enum.Enum) -> Any:
    """Return what a member is found again by: its name, of flags their number."""
    return member.value if isinstance(member, enum.Flag) else member.name


def member(name: str, of: Any) -> Any:
    """Return the member of an enumeration for which `name_of` returned this."""
    kind = found_again(name, enum.Enum)
    if isinstance(of, str) and of not in kind.__members__:
        raise RestoreError(
            f"a checkpoint holds {kind.__qualname__}.{of}, and there is no such member any more"
        )
    return kind[of] if isinstance(of, str) else kind(of)


def made_of(name: str, content: Any, attributes: dict[str, Any] | None) -> Any:
    """Return an object of a user's class that is a dict or a list."""
    kind = found_again(name, dict, list)
    made = kind.__new__(kind)  # what its __init__ does was done when it was made
    fill(made, content, attributes)
    return made


class _Taken:
    """What is taken out of a tree.

    Args:
        known: what is in the place of some objects, and its kind, by their ids.
    """

    def __init__(self, known: dict[int, Any]) -> None:
        self._known = known
        self.places: list[Any] = []
        self.arrays: list[tuple[Any, torch.Tensor]] = []
        """Those of NumPy, and the tensors that use their memory; None beside a tensor that is one."""

    def without(self, value: Any, keys: tuple[Any, ...]) -> Any:
        if id(value) in self._known:
            made, kind = self._known[id(value)]
            if kind is not None:
                self.places.append((list(keys), kind))
            return made
        plain, kind = _plain(value)
        if kind is None:
            plain = value
        if type(plain) in _CONTAINERS:
            plain = self._without_inside(plain, keys)
        if kind is None and isinstance(plain, torch.Tensor) and _is_in_memory(plain):
            self.arrays.append((None, plain))
        if kind is not None and isinstance(plain, torch.Tensor):
            self.arrays.append((value, plain))
            self._known[id(value)] = plain, kind
        elif type(plain) in _CONTAINERS and type(plain) is not tuple:  # which is made anew in every place
            self._known[id(value)] = plain, kind
        if kind is not None:
            self.places.append((list(keys), kind))  # after what is in it
        return plain

    def _without_inside(self, value: Any, keys: tuple[Any, ...]) -> Any:
        content = dict(value if isinstance(value, dict) else enumerate(value))
        rest = {key: self.without(one, (*keys, key)) for key, one in content.items()}
        if all(rest[key] is one for key, one in content.items()):
            return value
        if isinstance(value, tuple):
            return tuple(rest.values())
        made = copy.copy(value)
        for key, one in rest.items():
            made[key] = one
        return made


def _sharing(arrays: list[tuple[Any, torch.Tensor]]) -> dict[int, Any]:
    """Return tensors in one memory for those arrays that have some in common, as views of one array, by their ids."""
    if all(array is None or array.base is None for array, _ in arrays):
        return {}
    numbered = enumerate(tensor for _, tensor in arrays)
    spans = sorted((t.data_ptr(), t.data_ptr() + _extent(t), n) for n, t in numbered if t.numel())
    found: dict[int, Any] = {}
    group: list[int] = []
    start = end = 0
    for low, high, number in (*spans, (sys.maxsize, sys.maxsize, -1)):
        if low < end:
            group.append(number)
            end = max(end, high)
            continue
        if len(group) > 1:
            found |= _in_one_memory([arrays[each] for each in group], start, end)
        group, start, end = [number], low, high
    return found


def _is_in_memory(tensor: torch.Tensor) -> bool:
    kind = type(tensor) is torch.Tensor or type(tensor) is torch.nn.Parameter
    return kind and tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_nested


def _extent(tensor: torch.Tensor) -> int:
    """Return how many bytes there are from a tensor's first number to behind its last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())


def _in_one_memory(arrays: list[tuple[Any, torch.Tensor]], start: int, end: int) -> dict[int, Any]:
    """Return the tensors of such arrays, whose memory begins and ends at these addresses; of others' memory none."""
    whole = next((array for array, _ in arrays if array is not None), None)
    if whole is None:
        return {}
    while isinstance(whole.base, np.ndarray):
        whole = whole.base
    owners = [tensor for array, tensor in arrays if array is None]
    if isinstance(whole.base, torch.Tensor):  # as of what was loaded
        owners.append(whole.base)
    if owners:
        memory = owners[0].untyped_storage()
    else:
        raw = np.asarray(whole).ravel(order="K").view(np.uint8)
        at = raw.__array_interface__["data"][0]
        if not raw.flags.writeable or start < at:
            return {}
        memory = torch.from_numpy(raw[start - at : end - at]).untyped_storage()
    at = memory.data_ptr()
    if start < at or at + memory.nbytes() < end:
        return {}
    found = {}
    for array, tensor in arrays:
        if array is None:
            continue
        offset, rest = divmod(tensor.data_ptr() - at, tensor.element_size())
        if rest:
            return {}
        view = torch.empty(0, dtype=tensor.dtype).set_(memory, offset, tensor.shape, tensor.stride())
        found[id(array)] = view, ["array"]
    return found


def _put(value: Any, keys: Sequence[Any], kind: Any, made: dict[Any, tuple[Any, Any]]) -> Any:
    if not keys:
        if not isinstance(value, (list, dict, torch.Tensor)):
            return _made(value, kind)
        # one object in two places stays one
        key: Any = id(value)
        if isinstance(value, torch.Tensor) and value.numel():
            key = value.data_ptr(), value.shape, value.stride(), value.dtype
        if key not in made:
            made[key] = value, _made(value, kind)
        return made[key][1]
    first, *rest = keys
    new = _put(value[first], rest, kind, made)
    if isinstance(value, tuple):
        return (*value[:first], new, *value[first + 1 :])
    value[first] = new
    return value
