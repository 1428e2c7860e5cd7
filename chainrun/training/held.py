"""What of the user's variables a cut may lose, for a handoff: as `variables.Held`, and stricter.

Passed over is what is registered and what belongs to it; a dict that only lacks keys, which may be a cache; what
installed packages keep to themselves. Of what is large a sample is looked at.
"""

from __future__ import annotations

import contextlib
import dis
import enum
import functools
import gc
import inspect
import itertools
import queue
import re
import sys
import time
import types
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from chainrun.checkpoint.bits import fingerprint
from chainrun.owned import FOREIGN, RECORDS, fields, is_users_module, is_users_own
from chainrun.training import carried, clocks, rng, variables
from chainrun.training.liveness import PROPERTY, Code, is_in_a_loop
from chainrun.training.variables import NoMark

_ITEMS, _ELEMENTS = 1000, 1 << 16  # of what is longer or larger a sample is looked at
_DEPTH, _WIDTH = 5, 64
_CODES = 2000  # functions of the user's that are read
ATOMS = (bool, int, float, complex, str, bytes, type(None))
_BY_KEY = (dict, OrderedDict, defaultdict)
_LISTS = (list, tuple, deque)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_DATA = (*_LISTS, torch.Tensor, np.ndarray)
_VALUES = (*ATOMS, *_LISTS, *_BY_KEY, *_TENSORS)
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_LOADERS = ("chainrun.training.data", "chainrun.training.one_pass")
_NOT_SAVED = (*ATOMS, types.ModuleType, types.FunctionType, types.MethodType, type)
_NOT_FOLLOWED = (*ATOMS, type, types.ModuleType, types.CodeType)
_REACH = 5000  # objects
WEIGHTS = "weights"
"""The kind of a dict that is a copy of a module's state_dict(), and of a list that is one of its parameters."""
_CALLS = ("__self__", "func", "args", "keywords")  # which the code that makes a call does not name
_CODE = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type)


class Place(NamedTuple):
    """Where a value is held, and its mark; as a list in JSON."""

    kind: str
    register: bool
    """Whether it can be registered."""
    mark: str
    base: str
    """The variable's name."""
    function: str | None
    """The function whose variable it is, None for a module's."""
    parts: list[str]
    """The attributes that lead from the variable to it, by their names."""
    of: str = ""
    """The name of the place that holds the same object, where this is another way to it."""

    @property
    def is_variable(self) -> bool:
        """Whether a function's variable holds it itself."""
        return self.function is not None and not self.parts


LONG = "long="
"""What the mark of a long dict begins with; after it comes that of its keys, then that of its values."""


class Kept(variables.Held):
    """Collects what the user's variables hold; `places` has it by names to be read.

    Args:
        registered: what checkpoints hold.
        names: the names of registered objects, by their ids.
        package: the name of the training function's own package, which may be an installed one.
        until: a value of `time.monotonic`, at which it gives up.
        lent: whether to look at data in a function's variable that belongs to what is registered as well: where it is
            restored, its owner may be given other data, and the variable not.
    """

    def __init__(
        self, registered: Iterable[Any], names: dict[int, str], package: str, until: float, *, lent: bool
    ) -> None:
        super().__init__([])
        self._lent = lent
        self._names, self._package, self._until = names, package, until
        self._registered = [*registered]
        self._passed_over = {id(thing) for thing in belonging(self._registered)}
        modules = [one for one in self._registered if isinstance(one, torch.nn.Module)]
        self._weights = [_names_in(one) for one in modules]
        self._shapes = [
            [each.shape for each in torch.nn.Module.parameters(one) if not torch.nn.parameter.is_lazy(each)]
            for one in modules
        ]
        self._saved |= self._passed_over
        self._base, self._prefix = "", ""
        self._function: str | None = None
        self._frames: list[types.FrameType] = []
        self._first: dict[
            int, tuple[str, str]
        ] = {}  # the name under which an object was found, and its function
        self._again: tuple[str, tuple[str, str]] | None = (
            None  # it is looked at under this name, and was under that
        )
        self.places: dict[str, Place] = {}
        self.givers: set[str] = set()
        """Names of what gives a default for a key that it lacks."""
        self.called: dict[str, list[types.CodeType]] = {}
        """Code that runs where a variable or an attribute of this name is called."""

    def look(self, frames: list[types.FrameType]) -> dict[str, tuple[str, bool, str]]:
        """Look at the frames' variables and their modules' globals."""
        self._frames = [*frames]
        for frame in self._frames:  # grows by those of generators
            for name, value in variables.locals_of(frame).items():
                where = f" in {frame.f_code.co_name}()"
                self._base, self._function, self._prefix = name, frame.f_code.co_name, name
                self._visit(value, name, where, _DEPTH)
        for module in variables.users_modules(frames):
            for name, value in list(vars(module).items()):
                if not name.startswith("__"):
                    self._base, self._function = name, None
                    self._prefix = f"{module.__name__}.{name}"
                    self._visit(value, self._prefix, "", _DEPTH)
        # a scheduler's lambdas, a loader's collate_fn: called by no code of the user's
        for owner in self._registered:
            given = [each for _, each in fields(owner)]
            lists = [each for each in given if type(each) in _LISTS and len(each) <= _WIDTH]
            given += itertools.chain(*lists)
            self.called.setdefault("__call__", []).extend(itertools.chain(*map(_code_called, given)))
        return self.found

    def _visit(self, value: Any, name: str, where: str, depth: int) -> None:
        kind = type(value)
        if time.monotonic() > self._until:
            return
        if codes := _code_called(value):  # under another name than its own: `step = self.training_step`
            last = (re.findall(r"\w+", name) or [name])[-1]
            if not name.endswith("]"):
                self.called.setdefault(last, []).extend(codes)
            elif kind is not types.FunctionType or "<" in value.__qualname__:
                # a hook, called by no name of its own; a module's functions by names may be of many uses
                self.called.setdefault("__call__", []).extend(codes)
        if kind is types.FunctionType or issubclass(kind, type):
            own = vars(value) if is_users_own(value) and depth else {}
            for inner, one in [*own.items()]:
                if not inner.startswith("__") and type(one) in _VALUES:
                    self._visit(one, f"{name}.{inner}", where, depth - 1)
                if type(one) is types.FunctionType and one.__defaults__:
                    self._visit_method(one, f"{name}.{inner}", depth)
        for inner, one in [*_bound_in(value), *self._kept_by(value)] if depth else ():
            self._visit(one, name + inner, where, depth - 1)
        which = self._names.get(id(value)) or _which(value)
        if which is not None:
            if self._function is not None or kind not in _CODE:
                self._add(name + where, kind, False, f"{fingerprint(which)} {which}")
            # what is put aside, to be put back: not all that an object has is in its state_dict()
            for inner, one in fields(value) if id(value) in self._names and self._is_own(kind) else ():
                if self._is_copy_of_weights(one):
                    self._note(one, f"{name}.{inner}", where)
            return
        if kind not in ATOMS and id(value) in self._passed_over:
            if self._lent and name == self._base and self._function is not None and kind in _DATA:
                with contextlib.suppress(NoMark):
                    self._note(value, name, where)
            return
        if kind is types.GeneratorType:
            self._visit_generator(value, name, where)
            return
        if issubclass(kind, torch.nn.Module) and (about := _of_module(value)) is not None:
            self._add(name + where, kind, False, f"{fingerprint(about)} {kind.__name__}")
        if self._is_own(kind):
            methods = (vars(one).get(method) for one in kind.__mro__ for method in ("__call__", "forward"))
            last = (re.findall(r"\w+", name) or [name])[-1]
            codes = [method.__code__ for method in methods if type(method) is types.FunctionType]
            self.called.setdefault(last, []).extend(codes)
        if kind in (*_BY_KEY, *_LISTS) or self._is_own(kind):
            first = self._first.setdefault(id(value), (name, where))
            if self._again is None and _is_another_way(first, (name, where)):
                seen, self._seen, self._again = self._seen, set(), (name, first)
                super()._visit(value, name, where, depth)
                self._seen, self._again = seen, None
                return
        super()._visit(value, name, where, depth)

    def _visit_method(self, method: Any, name: str, depth: int) -> None:
        """Look at the defaults of a class's method, which is called by its name, whatever the object is called."""
        about = self._base, self._function, self._prefix
        self._base, self._function, self._prefix = name.rpartition(".")[2], None, name
        for at, kept in self._kept_by(method):
            self._visit(kept, name + at, "", depth - 1)
        self._base, self._function, self._prefix = about

    def _kept_by(self, value: Any) -> Iterator[tuple[str, Any]]:
        """Yield what a function of the user's goes on with at its next call: a list that is a default, a `nonlocal` count."""
        if type(value) is not types.FunctionType or not is_users_own(value):
            return
        around = {*value.__code__.co_freevars}
        for name, one in carried.fields(value):
            if name in around:
                is_looked_at = any(name in frame.f_code.co_cellvars for frame in self._frames)
                goes_on = not is_looked_at and _is_read_first(value.__code__, name)
            else:
                goes_on = name not in vars(value) and type(one) in (list, deque, *_BY_KEY)
            if goes_on:
                yield f"({name})", one

    def _visit_generator(self, value: types.GeneratorType[Any, Any, Any], name: str, where: str) -> None:
        """Look at what a generator goes on with: as one value, or at each variable where it takes batches.

        Such a one is resumed with its loader, and has begun anew by then.
        """
        frame = value.gi_frame
        if (
            frame is None
            or value.gi_running
            or frame in self._frames
            or not _is_frame_of(frame, self._package)
        ):
            return
        if _takes_batches(value, frame):
            self._frames.append(frame)
            return
        values = variables.locals_of(frame)
        code = Code(functions_of([frame]), {("local", variable) for variable in values})
        live = code.live(frame.f_code, frame.f_lasti)
        held = {}
        for variable in sorted(values):
            try:
                if ("local", variable) in live:
                    held[variable] = self._mark(values[variable])
            except NoMark:
                continue
        again = is_in_a_loop(frame.f_code, frame.f_lasti)
        if held or not again:  # else it gives the same again
            about = [value.__qualname__, [*held.items()], None if again else frame.f_lasti]
            self._add(name + where, type(value), False, fingerprint(about))

    def _note(self, value: Any, name: str, where: str) -> None:
        kind = type(value)
        if kind in _BY_KEY:
            if kind is defaultdict:
                self.givers.add(name)
            if not self._is_copy_of_weights(value):
                if len(value) > _WIDTH:  # too many to be told one by one
                    with contextlib.suppress(NoMark):
                        about = (variables.mark(_sampled([*of])) for of in (value, value.values()))
                        self._add(name + where, kind, False, LONG + "=".join(about))
                raise NoMark  # key by key
            its_mark = variables.mark([[*value], *map(_sampled, value.values())])
            self._add(name + where, kind, False, its_mark)
            self.places[name + where] = self.places[name + where]._replace(kind=WEIGHTS)
            return
        if issubclass(kind, queue.Queue):  # what waits: told from another one by what its methods work on
            value, kind = value.queue, type(value.queue)
        elif issubclass(kind, (list, deque)) and kind not in _LISTS and self._is_own(kind):
            with contextlib.suppress(NoMark):
                base = list if issubclass(kind, list) else deque
                self._add(name + where, kind, False, self._mark([*base.__iter__(value)]))
            raise NoMark  # its attributes
        if kind in (set, frozenset):
            return  # what has been seen, mostly: it grows as a cache does
        if name != self._base and kind is torch.Tensor and not value.is_leaf:
            return  # with what it was computed from: of this turn only
        if not clocks.is_time(value):
            try:
                super()._note(value, name, where)
            except NoMark:
                if kind in _LISTS:  # of objects, which are looked at where they are few
                    self._add(name + where, kind, False, f"{fingerprint(len(value))} {len(value)} items")
                raise
            if kind in _LISTS and value and type(value[0]) in _TENSORS:
                holds = WEIGHTS if self._is_copy_of_weights(value) else "Tensor"
                self.places[name + where] = self.places[name + where]._replace(kind=holds)

    def _add(self, name: str, kind: type, register: bool, its_mark: str) -> None:
        if name not in self.places:
            path = path_of(name)[len(self._prefix) :]
            parts = [
                part for part in re.findall(r"\.(\w+)", re.sub(r"\[[^]]*\]", "", path)) if part not in _CALLS
            ]
            of = ""
            if self._again is not None:
                here, (first, where) = self._again
                of = first + path_of(name)[len(here) :] + where
            self.places[name] = Place(
                kind.__name__, register, its_mark, self._base, self._function, parts, of
            )

    def _mark(self, value: Any) -> str:
        found = variables.mark(_sampled(value))
        parts = type(value) not in (*_LISTS, Counter) or issubclass(
            type(next(iter(value), None)), torch.Tensor
        )
        if not parts and " " not in found and len(value) > 3:
            found += f" {len(value)} items"
        return found

    def _is_copy_of_weights(self, value: Any) -> bool:
        """Whether it is a state_dict() of a registered module, a part of one, or its parameters: never a cache."""
        if type(value) in _BY_KEY:
            return bool(value) and any(names.issuperset(value) for names in self._weights)
        if type(value) is not list or not value or len(value) > _ITEMS:
            return False
        return all(type(one) in _TENSORS for one in value) and [one.shape for one in value] in self._shapes

    def _children(self, value: Any) -> Iterator[tuple[str, Any]]:
        kind = type(value)
        if issubclass(kind, torch.nn.Module):
            own = object.__getattribute__(value, "__dict__")
            if _top(kind) not in FOREIGN:
                yield from ((f".{n}", v) for n, v in list(own.items()) if n not in variables.OF_MODULES)
            yield from ((f".{n}", v) for n, v in list(own["_modules"].items()))
        elif kind in (*_BY_KEY, *_LISTS, *RECORDS):
            yield from super()._children(value)
        elif issubclass(kind, tuple) and len(value) <= _WIDTH:
            yield from ((f"[{place}]", each) for place, each in enumerate(tuple.__iter__(value)))
        elif self._is_own(kind) or (_gives_state(kind) and _top(kind) not in FOREIGN):
            yield from variables.items_of(value)
            yield from ((f".{n}", v) for n, v in fields(value) if not n.startswith("__"))

    def _is_own(self, kind: type) -> bool:
        return is_users_own(kind) or (_top(kind) == self._package and _top(kind) not in FOREIGN)


def _names_in(module: torch.nn.Module) -> frozenset[str]:
    """Return the names in a module's state_dict(), with and without those of wrappers."""
    kinds = (torch.nn.Module.named_parameters, torch.nn.Module.named_buffers)
    names = [name for named in kinds for name, _ in named(module)]
    return frozenset([*names, *(name.removeprefix("module.").removeprefix("_orig_mod.") for name in names)])


def _takes_batches(generator: types.GeneratorType[Any, Any, Any], frame: types.FrameType) -> bool:
    """Whether a loader, or an iterator over one, is within a generator's reach."""
    level: list[Any] = [generator, *(frame.f_globals.get(name) for name in frame.f_code.co_names)]
    seen = {id(frame.f_globals), *map(id, level)}
    for _ in range(_DEPTH):
        level = [one for one in gc.get_referents(*level) if id(one) not in seen]
        if any(type(one).__module__ in _LOADERS for one in level):
            return True
        seen.update(map(id, level))
        level = [one for one in level if type(one) not in _NOT_FOLLOWED and _top(type(one)) != "chainrun"]
        if len(seen) > _REACH:
            break
    return False


def _which(value: Any) -> str | None:
    """Return what a function, a class, a dtype or an enum's member is told from others by, None of all else."""
    kind = type(value)
    if issubclass(kind, enum.Enum):
        return f"{kind.__qualname__}.{value.name}"
    if kind in _NAMED:
        return str(value)
    if kind is functools.partial:
        given = [each for each in (*value.args, *value.keywords.items()) if _is_plain(each)]
        return f"partial({_which(value.func)}, {given})"
    if kind in _CODE or issubclass(kind, type):
        line = f" in line {value.__code__.co_firstlineno}" if value.__name__ == "<lambda>" else ""
        return f"{value.__qualname__}{line}"
    return None


def _bound_in(value: Any) -> list[tuple[str, Any]]:
    """Return what a call of a method or a partial is given with it, by their names."""
    if type(value) is types.MethodType:
        return [(".__self__", value.__self__)]
    if type(value) is functools.partial:
        named = [(f".keywords[{name!r}]", each) for name, each in value.keywords.items()]
        return [(".func", value.func), *((f".args[{n}]", each) for n, each in enumerate(value.args)), *named]
    return []


@functools.lru_cache(maxsize=4096)
def _is_read_first(code: types.CodeType, name: str) -> bool:
    """Whether a function reads a variable from around it before it sets it."""
    steps = (step for step in dis.get_instructions(code) if step.argval == name and "FAST" not in step.opname)
    return all("STORE" not in step.opname for step in itertools.islice(steps, 1))


def _code_called(value: Any) -> list[types.CodeType]:
    """Return the code of the user's that a call of a function runs, of a method, a decorated one or a partial."""
    while type(value) is types.MethodType or type(value) is functools.partial:
        value = value.__func__ if type(value) is types.MethodType else value.func
    if type(value) is not types.FunctionType:
        return []
    return ([value.__code__] if is_users_own(value) else []) + _code_called(vars(value).get("__wrapped__"))


def differ(one: str, other: str) -> bool:
    """Whether two marks tell of other values; not where a long dict has got other keys, as a cache does."""
    if one.startswith(LONG) and other.startswith(LONG):
        return one != other and one.split("=")[:2] == other.split("=")[:2]
    return one != other


def path_of(name: str) -> str:
    """Return the part of a place's name that is without its function."""
    return name.partition(" in ")[0]


def _is_another_way(first: tuple[str, str], then: tuple[str, str]) -> bool:
    """Whether two paths to an object begin at two variables, of which one holds it in something else."""
    bases = [(re.split(r"[.\[]", path)[0], function) for path, function in (first, then)]
    return bases[0] != bases[1] and any(
        path != base for (path, _), (base, _) in zip((first, then), bases, strict=True)
    )


def _is_plain(value: Any) -> bool:
    return type(value) in ATOMS or (type(value) is tuple and all(map(_is_plain, value)))


def _of_module(value: torch.nn.Module) -> list[Any] | None:
    """Return what a module without weights is told from others by, None of one with weights."""
    if any(True for one in (torch.nn.Module.parameters, torch.nn.Module.buffers) for _ in one(value)):
        return None
    found = []
    for module in torch.nn.Module.modules(value):
        settings = {
            name: setting
            for name, setting in vars(module).items()
            if name not in variables.OF_MODULES and _is_plain(setting) and _top(type(module)) in FOREIGN
        }
        found.append([type(module).__qualname__, settings])
    return found


def _top(kind: type) -> str:
    return str(kind.__module__).partition(".")[0]


def _gives_state(kind: type) -> bool:
    return all(any(name in vars(one) for one in kind.__mro__) for name in ("state_dict", "load_state_dict"))


def belonging(roots: Iterable[Any]) -> list[Any]:
    """Return things and what they hold, as far as attributes and short containers lead to it."""
    found: dict[int, Any] = {}
    todo = [(root, _DEPTH) for root in roots]
    while todo:
        value, depth = todo.pop()
        # a method's owner is of the user's, and no checkpoint has what it holds: `collate_fn=self.collate`
        if type(value) in _NOT_SAVED or id(value) in found:
            continue
        found[id(value)] = value
        if not depth:
            continue
        if isinstance(value, dict):
            inner: Iterable[Any] = dict.values(value) if len(value) <= _ITEMS else ()
        elif type(value) in (*_LISTS, set, frozenset):
            inner = value if len(value) <= _ITEMS else ()
        elif issubclass(type(value), (torch.Tensor, *rng.GENERATORS)) or _top(type(value)) == "chainrun":
            inner = ()
        else:
            inner = [each for _, each in fields(value)]
            if isinstance(value, torch.nn.Module):  # however deep
                inner = [*inner, *torch.nn.Module.modules(value), *torch.nn.Module.parameters(value)]
                inner += torch.nn.Module.buffers(value)
        todo += ((each, depth - 1) for each in list(inner))
    return list(found.values())


def _sampled(value: Any, depth: int = _DEPTH) -> Any:
    """Return a part of what is large, from all over it, with its size."""
    kind = type(value)
    if kind in (torch.Tensor, torch.nn.Parameter) and value.layout is torch.strided:
        if value.numel() > _ELEMENTS and value.is_contiguous() and not value.is_quantized:
            flat = value.detach().view(-1)
            return [list(value.shape), flat[:: flat.numel() // _ELEMENTS + 1]]
    elif kind is np.ndarray and value.size > _ELEMENTS and value.flags.contiguous:
        return [list(value.shape), value.reshape(-1)[:: value.size // _ELEMENTS + 1]]
    elif kind in _LISTS and depth:
        if len(value) > _ITEMS:
            step = len(value) // _ITEMS + 1
            value = [len(value), *(each for n, each in enumerate(value) if not n % step)]
        return [_sampled(each, depth - 1) for each in value]
    return value


def frames(
    frame: types.FrameType | None, outside: frozenset[types.CodeType]
) -> tuple[list[types.FrameType], str]:
    """Return the frames of the user's code, from inside out, and the name of the training function's package.

    Args:
        outside: code that ran before the run was begun.
    """
    found = [one for one in variables.users_frames(frame) if one.f_code not in outside]
    found = [one for one in found if one.f_code.co_flags & inspect.CO_OPTIMIZED]
    package = str(found[-1].f_globals.get("__name__")).partition(".")[0] if found else ""
    return [one for one in found if _is_frame_of(one, package)], package


def managers() -> int:
    """Return a number that is larger, the more context managers made of generators there are: each refers to its class."""
    return sys.getrefcount(contextlib._GeneratorContextManager)


def within_managers(package: str) -> list[types.FrameType]:
    """Return the frames of the user's functions under `contextlib.contextmanager` that are entered, from inside out.

    They are no caller's, and go on where their ``with`` block ends. Found among all objects, which takes some 10 ms.
    """
    kind = contextlib._GeneratorContextManager
    generators: list[Any] = [one.gen for one in gc.get_objects() if type(one) is kind]
    entered = [
        one.gi_frame for one in reversed(generators) if inspect.getgeneratorstate(one) == "GEN_SUSPENDED"
    ]
    return [frame for frame in entered if _is_frame_of(frame, package)]


def _is_frame_of(frame: types.FrameType, package: str) -> bool:
    name = str(frame.f_globals.get("__name__"))
    module = sys.modules.get(name)
    return name.partition(".")[0] == package or (type(module) is types.ModuleType and is_users_module(module))


def functions_of(frames: list[types.FrameType]) -> dict[str, list[types.CodeType]]:
    """Return the code of the user's functions by the names that run them: of the frames and of their modules."""
    todo = [("", frame.f_code) for frame in frames]
    seen: set[int] = set()
    for module in variables.users_modules(frames):
        for value in list(vars(module).values()):
            kinds = [one for one in value.__mro__ if is_users_own(one)] if isinstance(value, type) else []
            for each in [value, *(member for kind in kinds for member in vars(kind).values())]:
                if id(each) not in seen:
                    seen.add(id(each))
                    todo += _code_of(each)
    found: dict[str, list[types.CodeType]] = {}
    known: set[types.CodeType] = set()
    while todo and len(known) < _CODES:
        before, code = todo.pop()
        if code not in known:
            known.add(code)
            found.setdefault(before + code.co_name, []).append(code)
            todo += [("", const) for const in code.co_consts if type(const) is types.CodeType]
    return found


def _code_of(thing: Any) -> list[tuple[str, types.CodeType]]:
    before = ""
    if isinstance(thing, property):
        functions, before = [thing.fget, thing.fset], PROPERTY
    elif isinstance(thing, (staticmethod, classmethod)):
        functions = [thing.__func__]
    else:
        functions = [vars(thing).get("__wrapped__"), thing] if type(thing) is types.FunctionType else []
    return [(before, one.__code__) for one in functions if type(one) is types.FunctionType]
