"""The experiment: what to run, how to chain it and where, checked in full before anything is submitted.

The dataclasses below are the one description of the file: their names are its keys, their types (with a
`_Rule` each) what is allowed, the text below a field what it means. Nothing here imports the user's code,
except `load_function`.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType, NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from chainrun import durations
from chainrun.errors import ExperimentError, nearest

Places = dict[tuple[str, ...], str]  # key -> where it was written: "digits.yaml:3", "override seed=1"


# ---- YAML: text to data and the place of every key, and back ---------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with `1e-2` a float, and with times (`12:00:00`), dates and `0123` left as text."""


class _Dumper(yaml.SafeDumper):
    """Puts in quotes what `_Loader` would otherwise not read as text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_SCALARS = {
    "bool": ("yYnNtTfFoO", r"yes|Yes|YES|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF"),
    "int": ("-+0123456789", r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+|0b[01]+)"),
    "float": (
        "-+.0123456789",
        r"[-+]?(([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(inf|Inf|INF))|\.(nan|NaN|NAN)",
    ),
    "null": (["~", "n", "N", ""], r"~|null|Null|NULL|"),
    "merge": ("<", r"<<"),
}
for _side in (_Loader, _Dumper):
    _side.yaml_implicit_resolvers = {}
    for _tag, (_first, _pattern) in _SCALARS.items():
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


_Dumper.add_representer(str, _represent_text)  # one line, whatever is in it


def _dump(value: Any, **style: Any) -> str:
    text: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, **style)
    return text


def _flow(value: Any) -> str:
    """Write a value on one line, as it would stand in the file; two values that differ never look alike."""
    try:
        text = _dump(value, default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()
    except (yaml.YAMLError, RecursionError):
        return repr(value)
    return repr(value) if "\n" in text else text  # bytes


def _show(value: Any) -> str:
    text = _flow(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _read_yaml(text: str, source: str) -> tuple[Any, Places]:
    """Return what one YAML text says, and the place of every key in it."""
    places: Places = {(): source}
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _find_keys(node, (), places, set())
        return (None if node is None else loader.construct_document(node)), places
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise ExperimentError(f"{source}: not valid YAML{where}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ExperimentError(f"{source}:{line}: found a character that YAML does not allow") from None
    except RecursionError:
        raise ExperimentError(f"{source}: nested too deeply") from None
    except (ValueError, LookupError, AttributeError) as error:  # a tag such as !!int before another value
        raise ExperimentError(f"{source}: not valid YAML: {error}") from None


def _find_keys(node: yaml.Node | None, at: tuple[str, ...], places: Places, seen: set[int]) -> None:
    """Note the line of every key; a key that stands twice in one mapping is an error (PyYAML takes the last)."""
    if not isinstance(node, yaml.CollectionNode) or id(node) in seen:  # seen: an alias leads here too
        return
    seen.add(id(node))
    lines: dict[tuple[str, str], int] = {}
    for n, item in enumerate(node.value):
        if isinstance(node, yaml.SequenceNode):
            _find_keys(item, (*at, str(n)), places, seen)
            continue
        key, value = item
        path, line = (*at, str(key.value)), key.start_mark.line + 1
        places[path] = f"{places[()]}:{line}"
        if first := lines.get((key.tag, path[-1])):
            problem = f"found a second time (first in line {first}); allowed: once"
            raise ExperimentError(f"{_At(places, path)}: {problem}")
        lines[key.tag, path[-1]] = line
        _find_keys(value, path, places, seen)


# ---- rules: what a kind of field allows, and how it is read ----------------------------------------------


@dataclass(frozen=True)
class _At:
    """A key, and the place where it was written, for error messages."""

    places: Places
    key: tuple[str, ...] = ()

    def __truediv__(self, name: str) -> _At:
        return _At(self.places, (*self.key, name))

    @property
    def dotted(self) -> str:
        return ".".join(self.key)

    def __str__(self) -> str:
        above = (self.key[:n] for n in range(len(self.key), -1, -1))
        place = next((self.places[key] for key in above if key in self.places), "")
        return ": ".join(filter(None, (place, self.dotted))) or "experiment"


@dataclass(frozen=True)
class _Rule:
    """What one type of field allows, in words, and its reader: a ValueError from it is the reason, if any."""

    allowed: str
    read: Callable[[Any, _At], Any]


def _whole(low: int, high: int | None = None) -> _Rule:
    def read(value: Any, at: _At) -> int:
        if type(value) is not int or value < low or (high is not None and value > high):  # a bool is no int
            raise ValueError
        return value

    return _Rule(f"a whole number, at least {low}" + (f" and at most {high}" if high else ""), read)


def _choice(*choices: Any) -> _Rule:
    def read(value: Any, at: _At) -> Any:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in choices):
            raise ValueError
        return value

    return _Rule(" | ".join(_show(choice) for choice in choices), read)


def _text(pattern: str = r".*\S.*") -> Callable[[Any, _At], str]:
    def read(value: Any, at: _At) -> str:
        if type(value) is not str:
            raise ValueError("which is text only in quotes" if isinstance(value, int | float) else "")
        if not (value.isprintable() and re.fullmatch(pattern, value)):
            raise ValueError
        return value

    return read


def _name(value: Any, at: _At) -> str:
    name = _text(r"\w[\w.+=@,-]*")(value, at)  # also safe in SLURM's file name patterns and in a shell
    if len(os.fsencode(name)) > 200:
        raise ValueError("which is longer than 200 bytes")
    return name


def _folder(value: Any, at: _At) -> Path:
    return Path(_text()(str(value) if isinstance(value, Path) else value, at))


def _seconds(value: Any, at: _At) -> float:
    return durations.read_duration(value)


def _minutes(value: Any, at: _At) -> float:
    """Round down to SLURM's unit."""
    if seconds := durations.read_duration(value) // 60 * 60:
        return seconds
    raise ValueError("which is shorter than SLURM's unit, 1min")


def _lines(value: Any, at: _At) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | NoneType) or any(type(line) is not str for line in value or ()):
        raise ValueError
    return tuple(value or ())


def _plain(value: Any, at: _At) -> Any:
    """Copy plain YAML data; anything else could not be frozen in the run directory."""
    if type(value) is list:
        return [_plain(item, at / str(n)) for n, item in enumerate(value)]
    if type(value) is dict:
        return {_plain_scalar(key, at): _plain(item, at / str(key)) for key, item in value.items()}
    return _plain_scalar(value, at)


def _plain_scalar(value: Any, at: _At) -> Any:
    if type(value) not in (str, int, float, bool, NoneType):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        allowed = "plain YAML data (str, int, float, bool, null, list, dict)"
        raise ExperimentError(f"{at}: found {_show(value)}, a {kind}; allowed: {allowed}")
    return value


def _args(value: Any, at: _At) -> dict[str, Any]:
    if not isinstance(value, Mapping | NoneType) or any(type(key) is not str for key in value or ()):
        raise ValueError
    try:
        return {key: _plain(item, at / key) for key, item in (value or {}).items()}
    except RecursionError:
        raise ExperimentError(f"{at}: found a value that contains itself; allowed: {_ARGS}") from None


# Options that chainrun sets in every job, and what to use in their place.
_SET_BY_CHAINRUN = {
    "job-name": "name",
    "wrap": "function",
    **dict.fromkeys(("output", "error", "open-mode"), "dir (the run directory holds the logs)"),
    "time": "slurm.time",
    "nodes": "slurm.nodes",
    "ntasks": "slurm.nodes and slurm.tasks_per_node",
    "ntasks-per-node": "slurm.tasks_per_node",
    "gpus-per-node": "slurm.gpus_per_node",
    "cpus-per-task": "slurm.cpus_per_task",
    "partition": "slurm.partition",
    "signal": "slurm.lead",
    **dict.fromkeys(("requeue", "no-requeue", "dependency"), "chain.handoff"),
    "array": "one submission per run, with overrides",
    **dict.fromkeys(("parsable", "quiet", "wait", "test-only"), "chainrun's own commands"),
}


def _extra(value: Any, at: _At) -> dict[str, str | int | bool]:
    """Read sbatch options; their names come back as sbatch spells them, without the leading dashes."""
    if not isinstance(value, Mapping | NoneType):
        raise ValueError
    options: dict[str, str | int | bool] = {}
    for key, setting in (value or {}).items():
        here, option = at / str(key), str(key).lstrip("-").replace("_", "-")
        if option in _SET_BY_CHAINRUN:
            instead = _SET_BY_CHAINRUN[option]
            raise ExperimentError(f"{here}: found --{option}, which chainrun sets itself; use {instead}")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
            raise ExperimentError(f"{here}: found {_show(key)}; allowed: a long option of sbatch")
        if option in options:
            raise ExperimentError(f"{here}: found --{option} a second time; allowed: once")
        if type(setting) not in (str, int, bool) or not str(setting).isprintable():
            allowed = "one line of text, a whole number, true or false (put other values in quotes)"
            raise ExperimentError(f"{here}: found {_show(setting)}; allowed: {allowed}")
        options[option] = setting
    return options


_ARGS = "a mapping from argument names to plain YAML data"
_FUNCTION = r"(?P<where>.*\S\.py|[^\W\d]\w*(\.[^\W\d]\w*)*):(?P<name>[^\W\d]\w*)"

Text = Annotated[str, _Rule("one line of text", _text())]
Name = Annotated[str, _Rule("letters, digits and . _ - + = @ , (a letter, digit or _ first)", _name)]
Function = Annotated[str, _Rule("path.py:function or package.module:function", _text(_FUNCTION))]
Folder = Annotated[Path, _Rule("a path", _folder)]
Flag = Annotated[bool, _choice(True, False)]
Count = Annotated[int, _whole(1)]
CountOrZero = Annotated[int, _whole(0)]
Seed = Annotated[int, _whole(0, 2**32 - 1)]  # NumPy's limit
Seconds = Annotated[float, _Rule(durations.ALLOWED, _seconds)]
Minutes = Annotated[float, _Rule(f"{durations.ALLOWED}, at least 1min", _minutes)]
Lines = Annotated[tuple[str, ...], _Rule("a list of shell lines", _lines)]
Args = Annotated[dict[str, Any], _Rule(_ARGS, _args)]
Extra = Annotated[dict[str, str | int | bool], _Rule("a mapping from sbatch options to values", _extra)]
Auto = Literal["auto"]


# ---- the keys of an experiment ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Steps:
    """A number of optimization steps, `{steps: 1000}`."""

    steps: Count
    """How many `run.step()`."""


@dataclass(frozen=True)
class Checkpoint:
    """When a run saves, and what it keeps."""

    every: Seconds | Steps | None = 900.0
    """Save this often; null: only at the end of each segment."""
    keep: Count = 2
    """How many of the newest checkpoints to keep."""
    keep_every: Steps | None = None
    """Keep the checkpoints at multiples of this for ever; null: none."""


@dataclass(frozen=True)
class ChainPolicy:
    """How segments follow each other, and when the chain gives up."""

    handoff: Literal["auto", "requeue", "resubmit", "ahead"] = "auto"
    """What makes the next segment happen; auto: whatever the cluster allows."""
    max_segments: Count = 100
    """The chain stops after this many segments."""
    stop_after_idle_segments: Count = 2
    """The chain stops after this many segments in a row without one new committed step."""
    retry_errors: CountOrZero = 0
    """How many crashes of the function to retry from the last checkpoint."""


def _check_lead(lead: float | str, key: str, limit: float | None) -> None:
    """Refuse a lead that leaves no time to train; the error's arguments are the field and the problem."""
    if limit is not None and isinstance(lead, float) and lead >= limit:
        found = f"found {durations.format_duration(lead)}, with {key} {durations.format_duration(limit)}"
        raise ValueError("lead", f"{found}; allowed: auto or a duration shorter than {key}")


@dataclass(frozen=True)
class Slurm:
    """The resources of one job, in SLURM's words."""

    time: Minutes | None = None
    """Time limit of one job in seconds, whole minutes; needed to submit."""
    nodes: Count = 1
    """Nodes of one job."""
    tasks_per_node: Count = 1
    """Ranks on each node."""
    gpus_per_node: CountOrZero = 0
    """GPUs on each node; 0: none are asked for."""
    cpus_per_task: Count | None = None
    """CPUs of each rank, its loader workers included; null: the cluster's default."""
    partition: Text | None = None
    """Partition; null: the cluster's default."""
    lead: Auto | Seconds = "auto"
    """Seconds before the limit at which to stop; auto: learned from the steps and saves so far."""
    setup: Lines = ()
    """Shell lines that run in the job before Python: module load, source."""
    extra: Extra = field(default_factory=dict)
    """Any other option of sbatch by its long name; true is an option without a value."""

    def __post_init__(self) -> None:
        _check_lead(self.lead, "slurm.time", self.time)


@dataclass(frozen=True)
class Local:
    """The same chain on this machine."""

    walltime: Seconds | None = None
    """Time limit of one segment in seconds; null: none."""
    tasks: Count = 1
    """Ranks."""
    lead: Auto | Seconds = "auto"
    """Seconds before the limit at which to stop; auto: learned from the steps and saves so far."""

    def __post_init__(self) -> None:
        _check_lead(self.lead, "local.walltime", self.walltime)


@dataclass(frozen=True)
class Experiment:
    """One run: what, with which arguments, and under which policies."""

    name: Name
    """Name of the run and of its directory; an experiment file's own name where it has none."""
    function: Function
    """`path.py:function` or `package.module:function`, called as `function(run, **args)`."""
    args: Args = field(default_factory=dict)
    """The function's arguments."""
    seed: Seed | None = 0
    """Seeds random, numpy and torch at the start; null leaves them alone."""
    dir: Folder = Path("runs")
    """The run lives in dir/name; relative to the current directory."""
    deterministic: Flag = False
    """true: `torch.use_deterministic_algorithms` and what belongs to it."""
    checkpoint: Checkpoint = Checkpoint()
    """When to save, what to keep."""
    chain: ChainPolicy = ChainPolicy()
    """How segments follow each other."""
    slurm: Slurm = field(default_factory=Slurm)
    """The resources of one job."""
    local: Local = Local()
    """The same chain on this machine."""

    @property
    def run_dir(self) -> Path:
        """The absolute path of the run directory."""
        return Path(os.path.abspath(self.dir)) / self.name


# ---- reading, writing, comparing -------------------------------------------------------------------------


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, with `k.e.y=value` overrides on top; every mistake is an ExperimentError."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        near = nearest(path.name, (file.name for file in path.parent.glob("*.y*ml")))
        raise ExperimentError(f"{path}: no such experiment file{near}") from None
    except IsADirectoryError:
        raise ExperimentError(f"{path}: found a directory; allowed: an experiment file (YAML)") from None
    except OSError as error:
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}: found bytes that are not UTF-8 text, at {error.start}") from None
    data, places = _read_yaml(text, str(path))
    if data is None:
        raise ExperimentError(f"{path}: found nothing in it; allowed: {_rule(Experiment).allowed}")
    return _experiment(data, path.parent, overrides, places, path.stem)


def from_dict(data: Mapping[str, Any], base: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Check an experiment from Python; `base` is the folder where a relative `function` is looked up first."""
    return _experiment(data, base, overrides, {}, None)


def to_yaml(experiment: Experiment) -> str:
    """Write the frozen form: every key, absolute paths; `load` reads an equal experiment from it."""
    return _dump(_thaw(experiment), default_flow_style=False, sort_keys=False)


def diff(old: Experiment, new: Experiment) -> list[str]:
    """List what differs as lines like `args.lr: 0.01 -> 0.1`."""
    before, after = dict(_leaves(_thaw(old))), dict(_leaves(_thaw(new)))
    keys = [key for key in before | after if before.get(key) != after.get(key)]
    above = {key[:n] for key in keys for n in range(len(key))}
    lines = []
    for key in keys:
        left, right = before.get(key, "not set"), after.get(key, "not set")
        if key not in above or "{}" not in (left, right):  # no `args: {} -> not set` above args.lr
            lines.append(f"{'.'.join(map(str, key))}: {left} -> {right}")
    return lines


def _experiment(
    data: Any, base: Path, overrides: Sequence[str], places: Places, name: str | None
) -> Experiment:
    """Check the data, and make the paths absolute that would mean another place elsewhere."""
    if isinstance(data, Mapping):
        data = dict(data)
        for override in overrides:
            _override(data, override, places)
        if name is not None:
            data.setdefault("name", name)
    experiment: Experiment = _convert(Experiment, data, _At(places))
    where, _, function = experiment.function.rpartition(":")
    files = [file for file in _places_of(where, base) if where.endswith(".py") and os.path.isfile(file)]
    return replace(
        experiment,
        function=f"{files[0]}:{function}" if files else experiment.function,  # else find_function complains
        dir=Path(os.path.abspath(os.path.expanduser(experiment.dir))),
    )


def _convert(hint: Any, value: Any, at: _At) -> Any:
    """Read a value by the first of its field's types that takes it."""
    types = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in types:
        return None
    reason = ""
    for kind in types:
        try:
            return _rule(kind).read(value, at)
        except ValueError as error:
            reason = str(error) or reason
    allowed = ", or ".join(_rule(kind).allowed for kind in types)
    words = [word for kind in types if get_origin(kind) is Literal for word in get_args(kind)]
    near = nearest(value, words) if isinstance(value, str) else ""
    found = f"found {_show(value)}{near}" + (f", {reason}" if reason else "")
    raise ExperimentError(f"{at}: {found}; allowed: {allowed}")


def _rule(kind: Any) -> _Rule:
    if kind is NoneType:
        return _choice(None)
    if get_origin(kind) is Literal:
        return _choice(*get_args(kind))
    if is_dataclass(kind):
        keys = ", ".join(f"{one.name}: ..." for one in fields(kind))
        return _Rule(f"{{{keys}}}", partial(_build, kind))
    rule: _Rule = get_args(kind)[-1]  # Annotated[type, rule]
    return rule


def _build(section: Any, value: Any, at: _At) -> Any:
    """Read one mapping as the dataclass that describes it; `slurm:` with nothing below it is all defaults."""
    if not isinstance(value, Mapping | NoneType):
        raise ValueError
    value, hints, given = value or {}, get_type_hints(section, include_extras=True), {}
    for key in value:
        if key not in hints:
            free = "".join(
                f"; any others go under {(at / k).dotted}" for k in ("args", "extra") if k in hints
            )
            near = nearest(str(key), hints)
            raise ExperimentError(f"{at / str(key)}: unknown key{near}; allowed: {', '.join(hints)}{free}")
    for one in fields(section):
        if one.name in value:
            given[one.name] = _convert(hints[one.name], value[one.name], at / one.name)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ExperimentError(f"{at / one.name}: missing; allowed: {_rule(hints[one.name]).allowed}")
    try:
        return section(**given)
    except ValueError as error:
        key, problem = error.args
        raise ExperimentError(f"{at / key}: {problem}") from None


def _override(data: dict[str, Any], override: str, places: Places) -> None:
    """Set one `k.e.y=value` in `data`, copying the mappings on its way."""
    dotted, equals, text = override.partition("=")
    path, source = tuple(dotted.strip().split(".")), f"override {override}"
    if not equals or not all(path):
        raise ExperimentError(f"{source}: found no key=value; allowed: a dotted key and a value: args.lr=0.1")
    for n, key in enumerate(path[:-1], 1):
        below = data.get(key)
        if not isinstance(below, Mapping | NoneType):
            found = f"found {_show(below)}, which has no keys below it"
            raise ExperimentError(
                f"{source}: {'.'.join(path[:n])}: {found}; allowed: {'.'.join(path[:n])}=VALUE"
            )
        data[key] = dict(below or {})
        data = data[key]
        places.setdefault(path[:n], source)
    data[path[-1]] = _read_yaml(text, source)[0]
    places[path] = source


def _thaw(value: Any) -> Any:
    """Turn an experiment back into what stands in its file; a float outside of free mappings is a duration."""
    if is_dataclass(value):
        return {one.name: _thaw(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, float):
        return durations.format_duration(value)
    if isinstance(value, Path):
        return os.path.abspath(value)
    return list(value) if isinstance(value, tuple) else value


def _leaves(value: Any, key: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    if isinstance(value, dict) and value:
        for name, item in value.items():
            yield from _leaves(item, (*key, name))
    else:
        yield key, _flow(value)


# ---- the user's function ---------------------------------------------------------------------------------


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
    spec = _convert(Function, spec, _At({}, ("function",)))
    where, _, name = spec.rpartition(":")
    if where.endswith(".py"):
        source = FunctionSource(_find_file(where, base), None, name)
    else:
        source = FunctionSource(_find_module(where, base), where, name)
    if source.path is not None:
        _check_defined(source.path, name)
    return source


def load_function(source: FunctionSource) -> Callable[..., Any]:
    """Import the module of a function and return the function; what fails in there is an ExperimentError."""
    file = str(source.path or source.module)
    try:
        module = _import_file(source.path) if source.path and not source.module else _import_module(source)
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
    if not callable(function):
        found = f"found {_show(function)}" if hasattr(module, source.name) else "not defined when imported"
        raise ExperimentError(f"function: {source.name} in {file}: {found}; allowed: a function of a run")
    return function  # type: ignore[no-any-return]


def _places_of(where: str, base: Path) -> list[Path]:
    """List the absolute paths that a relative one may mean, in the order of the lookup."""
    where = os.path.expanduser(where)
    return list(dict.fromkeys(Path(os.path.abspath(path)) for path in (os.path.join(base, where), where)))


def _find_file(where: str, base: Path) -> Path:
    places = _places_of(where, base)
    file = next((file for file in places if os.path.isfile(file)), None)
    if file is None:
        near = nearest(places[0].name, (one.name for folder in places for one in folder.parent.glob("*.py")))
        raise ExperimentError(f"function: no file {' or '.join(map(str, places))}{near}")
    if "." in file.stem or file.stem in {*sys.stdlib_module_names, "chainrun", "numpy", "torch"}:
        taken = (
            "a name with a dot" if "." in file.stem else f"the name of Python's or PyTorch's own {file.stem}"
        )
        raise ExperimentError(
            f"function: found {file}, {taken}; allowed: a name free to import: rename the file"
        )
    return file


def _find_module(module: str, base: Path) -> Path | None:
    """Find the file of a module; its parents run only where they lie behind an import hook."""
    inner = module.replace(".", os.sep)
    tails = (f"{inner}.py", os.path.join(inner, "__init__.py"))
    for folder in sys.path:
        for tail in tails:
            if os.path.isfile(os.path.join(folder, tail)):
                return Path(os.path.abspath(os.path.join(folder, tail)))
    reason = ""
    try:
        if spec := importlib.util.find_spec(module):
            return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None
    except ModuleNotFoundError:
        pass
    except Exception as error:
        reason = f" ({type(error).__name__}: {error})"
    for tail in tails:
        for file in _places_of(tail, base):
            if os.path.isfile(file):
                return file
    places = f"in {os.path.abspath(base)} or {os.getcwd()}"
    raise ExperimentError(f"function: no module {module} on sys.path, {places}{reason}")


def _check_defined(file: Path, name: str) -> None:
    """Look for a name at the top level of a file, in `if` and `try` too, but not in functions and classes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they come again when the module is imported
            todo: list[ast.AST] = [ast.parse(file.read_bytes(), str(file))]
    except SyntaxError as error:
        raise ExperimentError(f"{file}:{error.lineno}: syntax error: {error.msg}") from error
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{file}: cannot be read as Python: {error}") from error
    names = {}
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = True
            continue
        if isinstance(node, ast.alias):
            names[(node.asname or node.name).split(".")[0]] = False
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names[node.id] = False
        todo += ast.iter_child_nodes(node)
    if name not in names and "*" not in names:
        defined = ", ".join(one for one in reversed(names) if names[one]) or "no functions or classes"
        found = f"found no {name} at the top level of {file}{nearest(name, names)}"
        raise ExperimentError(f"function: {found}; allowed: what it defines there: {defined}")


_imported: set[str] = set()  # the modules that `_import_file` registered, and may replace


def _import_file(file: Path) -> ModuleType:
    """Import a file under its stem, as `python file.py` lets others import it, so that spawned workers can."""
    name = file.stem
    if (loaded := sys.modules.get(name)) is not None:
        other = getattr(loaded, "__file__", None)
        if other and os.path.exists(other) and os.path.samefile(other, file):
            return loaded
        if name not in _imported:
            problem = (
                f"but another module {name} is imported already ({other or 'built in'}); rename the file"
            )
            raise ExperimentError(f"function: found {file}, {problem}")
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    _imported.add(name)
    return module


def _import_module(source: FunctionSource) -> ModuleType:
    assert source.module is not None
    if source.path is not None:  # found beside the experiment, perhaps
        depth = source.module.count(".") + (source.path.name == "__init__.py")
        root = str(source.path.parents[depth])
        if root not in sys.path:
            sys.path.append(root)
    return importlib.import_module(source.module)
