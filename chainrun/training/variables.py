"""What the user's code holds in variables, for `chainrun verify`: a mark of each value, by a name to be read.

Only looks: no method of the user's is called, no property read. Followed are the local variables of the
functions that are running, the globals of their modules, plain containers, and attributes of objects. What
has no mark is passed over.
"""

from __future__ import annotations

import collections
import dis
import enum
import inspect
import itertools
import sys
import types
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
import xxhash

from chainrun.owned import FOREIGN, RECORDS, is_users_module, is_users_own, top
from chainrun.training import rng

_NUMBERS = (bool, int, float, complex, str, bytes, type(None))
_DICTS = (dict, collections.OrderedDict, collections.defaultdict, collections.Counter)
_LISTS = (list, tuple, collections.deque)
_SETS = (set, frozenset)
_STATEFUL = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler)
_DEPTH, _WIDTH = 5, 64  # how deep attributes are followed; longer containers of objects hold data
_ITEMS, _BYTES = 100_000, 1 << 26  # what is larger is data, not a value that is carried along
OF_MODULES = {*vars(torch.nn.Module())}  # what torch keeps in a module
_ASKED = {
    *("resumed", "segment", "restored_from", "time_left"),
    *("time", "time_ns", "perf_counter", "monotonic", "now", "utcnow", "today"),
    *("getpid", "urandom", "uuid1", "uuid4", "token_bytes", "SystemRandom", "gethostname"),
}


class NoMark(Exception):
    """A value that cannot be told from another without running code of its own."""


def mark(tree: Any) -> str:
    """Return what a tree of tensors, arrays and plain values is told from others by, bit for bit.

    A single number or short text is shown after a space: ``4f02… 0.25``.

    Raises:
        NoMark: something else is in it, or too much.
    """
    digest = xxhash.xxh3_64()
    for part in _bytes(tree):
        digest.update(part)
    shown = _shown(tree)
    return digest.hexdigest() + (f" {shown}" if shown is not None else "")


def _shown(value: Any) -> str | None:
    if type(value) in (torch.Tensor, torch.nn.Parameter) and value.numel() == 1 and not value.is_sparse:
        value = value.item()
    if issubclass(type(value), np.generic):
        value = value.item()
    if type(value) in (*_NUMBERS, itertools.count) or (type(value) in (*_LISTS, *_DICTS) and len(value) <= 3):
        text = repr(value) if type(value) in (*_NUMBERS, itertools.count) else _short(value)
        return text if text is not None and len(text) <= 60 else None
    return None


def _short(value: Any) -> str | None:
    items = [*value.keys(), *value.values()] if type(value) in _DICTS else [*value]
    return repr(value) if all(type(item) in _NUMBERS for item in items) else None


def _bytes(tree: Any, depth: int = _DEPTH) -> Iterator[bytes]:
    kind = type(tree)
    if kind in _NUMBERS:
        yield (tree.hex() if kind is float else repr(tree)).encode()
    elif kind in (torch.Tensor, torch.nn.Parameter):
        yield from _tensor_bytes(tree)
    elif kind is np.ndarray or issubclass(kind, np.generic):
        if tree.dtype.kind not in "biufcSUmM" or tree.nbytes > _BYTES:
            raise NoMark
        yield f"{tree.dtype}{tree.shape}".encode() + tree.tobytes()
    elif kind is itertools.count:
        yield repr(tree).encode()
    elif (kind in (*_DICTS, *_LISTS, *_SETS) or issubclass(kind, tuple)) and depth and len(tree) <= _ITEMS:
        items: Iterable[Any] = tuple.__iter__(tree) if issubclass(kind, tuple) else tree
        if kind in _DICTS:
            items = itertools.chain.from_iterable(dict.items(tree))
        elif kind in _SETS:
            if any(type(item) not in _NUMBERS for item in tree):
                raise NoMark
            items = sorted(tree, key=repr)
        yield f"{kind.__name__}{len(tree)}".encode()
        for item in items:
            yield from _bytes(item, depth - 1)
    else:
        raise NoMark


def _tensor_bytes(tensor: torch.Tensor) -> Iterator[bytes]:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta or tensor.nbytes > _BYTES:
        raise NoMark
    plain = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
    yield f"{plain.dtype}{tuple(plain.shape)}".encode()
    if plain.numel():
        yield plain.flatten().view(torch.uint8).numpy().tobytes()


def users_frames(frame: types.FrameType | None) -> list[types.FrameType]:
    """Return the frames of the user's code, from `frame` outwards to the call of the training function."""
    found = []
    while frame is not None and frame.f_globals.get("__name__") != "chainrun.segment":
        if top(frame.f_globals.get("__name__")) not in FOREIGN:
            found.append(frame)
        frame = frame.f_back
    return found


def codes_around(frame: types.FrameType | None) -> frozenset[types.CodeType]:
    """Return the code of a frame and of all that called it: what ran before a run was begun does not begin anew."""
    found = set()
    while frame is not None:
        found.add(frame.f_code)
        frame = frame.f_back
    return frozenset(found)


def frames_within(outside: frozenset[types.CodeType]) -> list[types.FrameType]:
    """Return the frames of the user's functions that call, from inside out, without what ran before the run was begun."""
    found = users_frames(sys._getframe(1))
    return [one for one in found if one.f_code not in outside and one.f_code.co_flags & inspect.CO_OPTIMIZED]


def users_modules(frames: list[types.FrameType]) -> list[types.ModuleType]:
    """Return the modules of the frames, and the user's own ones that they use."""
    found: dict[str, types.ModuleType] = {}
    todo = [str(frame.f_globals.get("__name__")) for frame in frames]
    for name in todo:  # grows on the way
        module = sys.modules.get(name)
        if name in found or type(module) is not types.ModuleType:
            continue
        found[name] = module
        for value in vars(module).values():
            used = value if type(value) is types.ModuleType else None
            if type(value) in (types.FunctionType, type):
                used = sys.modules.get(value.__module__)
            if used is not None and is_users_module(used):
                todo.append(used.__name__)
    return list(found.values())


def locals_of(frame: types.FrameType) -> dict[str, Any]:
    """Return a frame's variables, and leave no second reference to them behind."""
    seen = frame.f_locals
    values = dict(seen)
    if type(seen) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        seen.clear()  # until Python 3.13 a copy that lives on with the frame, and keeps what is dropped alive
    return values


def asked(frames: list[types.FrameType]) -> dict[str, str]:
    """Return which of the names that make runs differ the user's code asks for, and in which function.

    The code is that of the frames, and of the functions and classes that it names.
    """
    found: dict[str, str] = {}
    todo = [(frame.f_code, frame.f_globals, frame.f_code.co_name) for frame in frames]
    done = set()
    for code, names, where in todo:  # grows on the way
        if code in done:
            continue
        done.add(code)
        todo += [(const, names, where) for const in code.co_consts if type(const) is types.CodeType]
        todo += [(f.__code__, f.__globals__, f.__qualname__) for f in _functions(code, names)]
        for step in dis.get_instructions(code):
            attribute = "ATTR" in step.opname or "METHOD" in step.opname
            imported = "GLOBAL" in step.opname and step.argval != "time"  # the module has that name as well
            if step.argval in _ASKED and (attribute or imported):
                found.setdefault(str(step.argval), where)
    return found


def _functions(code: types.CodeType, names: dict[str, Any]) -> Iterator[types.FunctionType]:
    """Yield the user's functions that code names, and the methods of the classes."""
    values = [names.get(name) for name in code.co_names]
    for module in [value for value in values if type(value) is types.ModuleType and is_users_module(value)]:
        values += [vars(module).get(name) for name in code.co_names]
    for value in values:
        kinds = [one for one in value.__mro__ if is_users_own(one)] if isinstance(value, type) else []
        for each in [value, *(member for kind in kinds for member in vars(kind).values())]:
            if isinstance(each, (staticmethod, classmethod)):
                each = each.__func__  # noqa: PLW2901
            if type(each) is types.FunctionType and is_users_own(each):
                yield each


class Held:
    """Collects the marks of what variables hold: by name the kind, whether it can be registered, the mark.

    Args:
        things: what is registered; its saved state is compared by itself.
    """

    def __init__(self, things: list[Any]) -> None:
        self.found: dict[str, tuple[str, bool, str]] = {}
        self._things = {id(thing) for thing in things}
        self._saved = {
            id(tensor)
            for thing in things
            if issubclass(type(thing), torch.nn.Module)
            for tensor in (*thing.parameters(), *thing.buffers())
        }
        self._seen: set[int] = {id(torch.default_generator)}

    def look(self, frames: list[types.FrameType]) -> dict[str, tuple[str, bool, str]]:
        """Return what the frames' variables and their modules' globals hold."""
        for frame in frames:
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED:
                for name, value in locals_of(frame).items():
                    self._visit(value, name, f" in {frame.f_code.co_name}()", _DEPTH)
        for module in users_modules(frames):
            for name, value in list(vars(module).items()):
                if not name.startswith("__"):
                    self._visit(value, f"{module.__name__}.{name}", "", _DEPTH)
        return self.found

    def _visit(self, value: Any, name: str, where: str, depth: int) -> None:
        kind = type(value)
        if kind in (types.ModuleType, types.FunctionType, types.MethodType, type) or id(value) in self._saved:
            return
        if kind not in _NUMBERS:
            if id(value) in self._seen:
                return
            self._seen.add(id(value))
        try:
            self._note(value, name, where)
        except NoMark:
            if depth:
                for inner, child in self._children(value):
                    self._visit(child, name + inner, where, depth - 1)
        except Exception:  # a tensor without data, an object half built: nothing can be said of it
            return

    def _note(self, value: Any, name: str, where: str) -> None:
        kind = type(value)
        registered = id(value) in self._things
        if issubclass(kind, rng.GENERATORS):
            if not registered and kind in rng.GENERATORS:
                self._add(name + where, kind, True, xxhash.xxh3_64_hexdigest(rng.get(value)))
        elif issubclass(kind, torch.nn.Module):
            state = [*torch.nn.Module.parameters(value), *torch.nn.Module.buffers(value)]
            if any(id(tensor) not in self._saved for tensor in state):
                self._add(name + where, kind, True, self._mark([tensor.data for tensor in state]))
                self._saved |= {id(tensor) for tensor in state}  # not its parts once more
            raise NoMark  # its attributes
        elif issubclass(kind, _STATEFUL):
            if not registered:
                self._add(name + where, kind, True, self._mark(_state(value)))
        else:
            self._add(name + where, kind, False, self._mark(value))

    def _mark(self, value: Any) -> str:
        return mark(value)

    def _add(self, name: str, kind: type, register: bool, its_mark: str) -> None:
        self.found.setdefault(name, (kind.__name__, register, its_mark))

    def _children(self, value: Any) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        yield from items_of(value)
        if kind in (*_DICTS, *_LISTS):
            return
        if issubclass(kind, torch.nn.Module):
            own = object.__getattribute__(value, "__dict__")
            yield from ((f".{n}", v) for n, v in list(own.items()) if n not in OF_MODULES)
            yield from ((f".{n}", v) for n, v in list(own["_modules"].items()))
        elif (
            kind in RECORDS
            or top(kind.__module__) not in FOREIGN
            or issubclass(kind, (torch.utils.data.Dataset, torch.utils.data.DataLoader))
        ):
            try:
                own = object.__getattribute__(value, "__dict__")
            except AttributeError:  # it has slots, or is a tuple
                return
            if type(own) is dict:
                shared = {
                    n: v for each in kind.__mro__[::-1] if is_users_own(each) for n, v in vars(each).items()
                }
                own = {**{n: v for n, v in shared.items() if type(v) in _NUMBERS}, **own}
                yield from ((f".{n}", v) for n, v in list(own.items()) if not n.startswith("__"))


def items_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield what is in a short dict or list, be it of a class of the user's: ``cfg.noise`` for ``cfg["noise"]``."""
    kind = type(value)
    base: Any = next((one for one in (dict, *_LISTS) if issubclass(kind, one)), None)
    if base is None or not (kind in (*_DICTS, *_LISTS) or is_users_own(kind)):
        return
    if base.__len__(value) <= _WIDTH:
        items = dict.items(value) if base is dict else enumerate(base.__iter__(value))
        yield from ((f"[{_shown_key(key, at)}]", each) for at, (key, each) in enumerate(items))


def _shown_key(key: Any, at: int) -> str:
    """Return the name of a key; of what has none, a module or a parameter, its place."""
    kind = type(key)
    if kind in _NUMBERS:
        return repr(key)
    if isinstance(key, enum.Enum) or kind in (types.FunctionType, types.BuiltinFunctionType, type):
        return f"{kind.__name__}.{key.name}" if isinstance(key, enum.Enum) else key.__qualname__
    if kind is tuple and all(type(one) in _NUMBERS for one in key):
        return repr(key)
    return f"key {at}"


def _state(thing: Any) -> Any:
    """Return the state of an optimizer, a scheduler or a scaler as far as it is plain, without its methods."""
    own = vars(thing)
    if issubclass(type(thing), torch.optim.Optimizer):
        groups = own["param_groups"]
        moments = [own["state"].get(parameter, {}) for group in groups for parameter in group["params"]]
        return [_plain(each) for each in (*moments, *groups)]
    return _plain(own)


def _plain(values: dict[str, Any]) -> dict[str, str]:
    found = {}
    for name, value in values.items():
        try:
            if name != "params":
                found[str(name)] = mark(value)
        except NoMark:
            continue
    return found
