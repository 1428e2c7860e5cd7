"""A function that is in no file, of a notebook's cell or a prompt, is carried along in the run directory.

cloudpickle writes it by value, with the functions, classes and values of the notebook that it uses; modules go
by their names. In the job it becomes a module of its own, ``shipped_function``, in a file that can be imported:
so loader workers that are spawned find the data set classes too. The job needs the same version of Python, and
what cannot be pickled (open files, locks, generators) has to be made inside of the function.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from chainrun.errors import ExperimentError, UsageError
from chainrun.function import FunctionSource
from chainrun.rundir import RunDir, read_json, write_durably

MOST = 64_000_000  # bytes
_PLAIN = (str, int, float, bool, bytes, type(None))

_MODULE = '''"""{name}(), as it was defined in a notebook or at a prompt when the run was submitted."""

from chainrun.shipped import load

globals().update(load(__file__, __name__))
'''


@dataclass(frozen=True)
class Shipped:
    """A function, pickled."""

    function: Callable[..., Any]
    pickled: bytes
    marks: dict[str, str]
    """Of the function and of what it uses: name -> hash of the code or value."""

    @property
    def source(self) -> FunctionSource:
        return FunctionSource(None, RunDir(Path()).shipped.stem, self.function.__name__)

    def check_arguments(self, args: Mapping[str, Any]) -> None:
        """Check that the function can be called as ``function(run, **args)``."""
        try:
            inspect.signature(self.function).bind(None, **args)
        except TypeError as error:
            found = f"{self.function.__name__}{inspect.signature(self.function)}"
            raise ExperimentError(
                f"args: {error}; found {found}, which is called with the run first"
            ) from None

    def differences(self, run: RunDir) -> list[str]:
        """List how it differs from what was shipped with a run."""
        then, now = (read_json(_marks(run)) or {}).get("marks", {}), self.marks
        names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
        return [
            f"{name}: {'new' if name not in then else 'not used' if name not in now else 'changed'}"
            for name in names
        ]

    def write(self, run: RunDir) -> None:
        """Write the function into the frozen code of a run."""
        run.shipped.with_suffix(".pkl").write_bytes(self.pickled)
        about = {"python": list(sys.version_info[:2]), "marks": self.marks}
        write_durably(_marks(run), json.dumps(about, indent=1).encode())
        write_durably(run.shipped, _MODULE.format(name=self.function.__name__).encode())


def shipped_before(run: RunDir) -> bool:
    """Whether a run's function was shipped, so that there is no file to compare it with."""
    return run.shipped.exists()


def ship(function: Callable[..., Any]) -> Shipped:
    """Pickle a function with what it uses.

    Raises:
        UsageError: something it uses cannot be pickled, or is large.
    """
    import cloudpickle

    name = getattr(function, "__name__", repr(function))
    try:
        pickled = cloudpickle.dumps(function)
    except Exception as error:
        raise UsageError(
            f"{name}() uses something that cannot be taken along to a job ({type(error).__name__}: {error}): "
            "make it inside of the function, or move the function to a file"
        ) from error
    if len(pickled) > MOST:
        raise UsageError(
            f"{name}() uses variables of {len(pickled) / 1e6:.0f} MB in all, {MOST / 1e6:.0f} MB can be taken along to "
            "a job: load data inside of the function"
        )
    return Shipped(function, pickled, dict(_mark(function)))


def load(file: str, module: str) -> dict[str, Any]:
    """Return what a shipped function and its neighbours are called, with themselves; `module` is theirs now."""
    about = json.loads(Path(file).with_suffix(".json").read_bytes())
    if about["python"] != list(sys.version_info[:2]):
        then, now = (".".join(map(str, version)) for version in (about["python"], sys.version_info[:2]))
        raise RuntimeError(f"the function was shipped by Python {then}, this is {now}: use the same")
    function = pickle.loads(Path(file).with_suffix(".pkl").read_bytes())
    home, scope = function.__module__, function.__globals__
    scope["__name__"] = module
    found = {name: value for name, value in scope.items() if not name.startswith("__")}
    found[function.__name__] = function
    for value in found.values():
        if isinstance(value, type | FunctionType) and value.__module__ == home:
            value.__module__ = module
    return found


def _marks(run: RunDir) -> Path:
    return run.shipped.with_suffix(".json")


def _mark(function: Any) -> Iterator[tuple[str, str]]:
    """Yield a function, and what it uses of its own module, by name, with a hash of each."""
    todo, seen = [(function.__name__, function)], {function.__name__}
    for name, value in todo:  # grows on the way
        members = [value]
        if isinstance(value, type):
            members = [one for _, one in sorted(vars(value).items()) if isinstance(one, FunctionType)]
        said = [repr(value)] if isinstance(value, _PLAIN) else []
        for one in members:
            if not isinstance(one, FunctionType):
                continue
            said += [*_text(one.__code__), repr(one.__defaults__), repr(one.__kwdefaults__)]
            for used in sorted(_names(one.__code__) - seen):
                other = one.__globals__.get(used)
                mine = getattr(other, "__module__", None) == function.__module__
                if used in one.__globals__ and (mine or isinstance(other, _PLAIN)):
                    seen.add(used)
                    todo.append((used, other))
        yield name, hashlib.sha256("\n".join(said).encode()).hexdigest()[:16]


def _names(code: CodeType) -> set[str]:
    inner = [one for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*(_names(one) for one in inner))


def _text(code: CodeType) -> Iterator[str]:
    yield code.co_code.hex()
    yield repr((code.co_names, code.co_varnames))
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield from _text(one)
        else:
            yield repr(sorted(one, key=repr) if isinstance(one, frozenset) else one)
