"""The user's function: found and checked without running the file it is in, and loaded in the job."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import reprlib
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from chainrun.errors import ExperimentError, nearest

if TYPE_CHECKING:
    from chainrun.experiment import Experiment


@dataclass(frozen=True)
class FunctionSource:
    """Where the user's function is: in a file of its own (`module` is None) or in an importable module."""

    path: Path | None
    """The Python file; None for a module without one, such as a compiled one."""
    module: str | None
    """The module's full name; None for `path.py:function`."""
    name: str
    """The function's name."""


def find_function(experiment: Experiment | str, base: Path) -> FunctionSource:
    """Find the function of an experiment, or `path.py:function`, and check that it is there, importing nothing.

    Files are looked up in `base`, then in the current directory; modules on `sys.path` first, then there.
    """
    spec = experiment if isinstance(experiment, str) else experiment.function
    where, _, name = spec.rpartition(":")
    is_file = where.endswith(".py")
    if not all(part.isidentifier() for part in (name, *([] if is_file else where.split(".")))):
        allowed = "path.py:function or package.module:function"
        raise ExperimentError(f"function: found {spec}; allowed: {allowed}")
    path = _find_file(where, base) if is_file else _find_module(where, base)
    if path is not None:
        names = _bindings(path)
        if name not in names and "*" not in names:
            definitions = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            defined = [one for one, nodes in names.items() if isinstance(nodes[-1], definitions)]
            found = f"found no {name} at the top level of {path}{nearest(name, names)}"
            allowed = f"what it defines there: {', '.join(defined) or 'no functions or classes'}"
            raise ExperimentError(f"function: {found}; allowed: {allowed}")
    return FunctionSource(path, None if is_file else where, name)


def check_arguments(source: FunctionSource, args: Mapping[str, Any]) -> None:
    """Check that `function(run, **args)` fits the signature; only a plain `def`, seen in the file, shows it."""
    bound = _bindings(source.path).get(source.name, []) if source.path else []
    if len(bound) != 1 or not isinstance(bound[0], ast.FunctionDef) or bound[0].decorator_list:
        return
    spec, where = bound[0].args, f"{source.name} in {source.path}"
    positional = [*spec.posonlyargs, *spec.args]
    required = positional[1 : len(positional) - len(spec.defaults)]
    if not (positional or spec.vararg) or any(one in spec.posonlyargs for one in required):
        allowed = f"one that can be called as {source.name}(run, **args)"
        raise ExperimentError(f"function: found {where} with ({ast.unparse(spec)}); allowed: {allowed}")
    required += [one for one, value in zip(spec.kwonlyargs, spec.kw_defaults, strict=True) if value is None]
    names = [one.arg for one in positional[max(1, len(spec.posonlyargs)) :] + spec.kwonlyargs]
    allowed = ", ".join(names) or "no arguments"
    for key in args:
        if key not in names and spec.kwarg is None:
            near = nearest(key, names)
            raise ExperimentError(f"args.{key}: unknown argument of {where}{near}; allowed: {allowed}")
    for one in required:
        if one.arg not in args:
            raise ExperimentError(f"args.{one.arg}: missing for {where}; allowed: {allowed}")


def load_function(source: FunctionSource) -> Callable[..., Any]:
    """Import the module of a function and return the function; what fails in there is an ExperimentError."""
    file = str(source.path or source.module)
    try:
        module = _import_module(source.module, source.path) if source.module else _import_file(Path(file))
    except ExperimentError:
        raise
    except SyntaxError as error:
        where = f"{error.filename or file}:{error.lineno}"
        raise ExperimentError(f"{where}: syntax error: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((f":{frame.lineno}" for frame in reversed(frames) if frame.filename == file), "")
        raise ExperimentError(f"{file}{line}: cannot be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, source.name, None)
    if callable(function):
        return function  # type: ignore[no-any-return]
    found = f"found {reprlib.repr(function)}" if hasattr(module, source.name) else "not defined when imported"
    raise ExperimentError(f"function: {source.name} in {file}: {found}; allowed: a function of a run")


def _find_file(where: str, base: Path) -> Path:
    paths = [Path(os.path.abspath(os.path.join(folder, os.path.expanduser(where)))) for folder in (base, "")]
    file = next(filter(os.path.isfile, paths), None)
    if file is None:
        near = nearest(paths[0].name, (one.name for path in paths for one in path.parent.glob("*.py")))
        raise ExperimentError(f"function: no file {' or '.join(map(str, dict.fromkeys(paths)))}{near}")
    if "." in file.stem or file.stem in {*sys.stdlib_module_names, "chainrun", "numpy", "torch"}:
        found = f"{file}, which has a dot in its name or the name of one of Python's or PyTorch's own modules"
        raise ExperimentError(f"function: found {found}; allowed: a name free to import: rename the file")
    return file


def _find_module(module: str, base: Path) -> Path | None:
    """Find the file of a module; its parents run only where they lie behind an import hook."""
    if file := _module_file(module, sys.path):
        return file
    reason = ""
    try:
        if spec := importlib.util.find_spec(module):
            return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    except ModuleNotFoundError:
        pass
    except (Exception, SystemExit) as error:
        reason = f" ({type(error).__name__}: {error})"
    if file := _module_file(module, (str(base), os.getcwd())):
        return file
    places = f"in {os.path.abspath(base)} or {os.getcwd()}"
    raise ExperimentError(f"function: no module {module} on sys.path, {places}{reason}")


def _module_file(module: str, folders: Iterable[str]) -> Path | None:
    inner = module.replace(".", os.sep)
    tails = (os.path.join(inner, "__init__.py"), f"{inner}.py")
    files = (Path(os.path.abspath(os.path.join(folder, tail))) for folder in folders for tail in tails)
    return next(filter(os.path.isfile, files), None)


def _bindings(file: Path) -> dict[str, list[ast.AST]]:
    """Find what binds each name at the top level of a file, in `if` and `try` too; `*` is a star import."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the module is imported
            todo: list[ast.AST] = [ast.parse(file.read_bytes(), str(file))]
    except SyntaxError as error:
        raise ExperimentError(f"{file}:{error.lineno}: syntax error: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{file}: cannot be read as Python: {error}") from error
    found: dict[str, list[ast.AST]] = {}
    for node in todo:  # grows on the way
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.setdefault(node.name, []).append(node)  # what is inside is not at the top level
            continue
        if isinstance(node, ast.alias):
            found.setdefault((node.asname or node.name).split(".")[0], []).append(node)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.setdefault(node.id, []).append(node)
        todo += ast.iter_child_nodes(node)
    return found


_imported: set[str] = set()  # the modules that `_import_file` registered, and may replace


def _import_file(file: Path) -> ModuleType:
    """Import a file under its stem, as `python file.py` lets others import it, so that spawned workers can."""
    name = file.stem
    if (loaded := sys.modules.get(name)) is not None:
        other = getattr(loaded, "__file__", None)
        if other and os.path.exists(other) and os.path.samefile(other, file):
            return loaded
        if name not in _imported:
            problem = f"another module {name} is imported already ({other or 'built in'}); rename the file"
            raise ExperimentError(f"function: found {file}, but {problem}")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _imported.add(name)
    return module


def _import_module(module: str, file: Path | None) -> ModuleType:
    if file is not None:  # found beside the experiment, perhaps
        root = str(file.parents[module.count(".") + (file.name == "__init__.py")])
        if root not in sys.path:
            sys.path.append(root)
    return importlib.import_module(module)
