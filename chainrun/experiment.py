"""The experiment: what to run, how to chain it and where, checked in full before anything is submitted.

The dataclasses below are the one description of the file: their names are its keys, their types (with a
`_Rule` each) what is allowed, the text below a field what it means.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from chainrun import durations, yamlfile
from chainrun.errors import ExperimentError, nearest
from chainrun.yamlfile import At, Places, show


class Hours(float):
    """A number of hours that is used up, not a duration: 500 node hours."""


@dataclass(frozen=True)
class _Rule:
    """What one type of field allows, in words, and how it is read; a ValueError from there is the reason."""

    allowed: str
    read: Callable[[Any, At], Any] = lambda value, at: value
    test: Callable[[Any], object] = lambda value: True


def _choice(*choices: Any) -> _Rule:
    typed = [(type(choice), choice) for choice in choices]  # 1 is not true
    return _Rule(" | ".join(map(show, choices)), test=lambda value: (type(value), value) in typed)


def _whole(low: int, high: int | None = None) -> _Rule:
    allowed = f"a whole number, at least {low}" + (f" and at most {high}" if high else "")
    return _Rule(allowed, test=lambda value: type(value) is int and low <= value <= (high or value))


def _is_text(value: Any, pattern: str = r".*\S.*") -> bool:
    if isinstance(value, int | float):
        raise ValueError("which is text only in quotes")
    return type(value) is str and value.isprintable() and re.fullmatch(pattern, value) is not None


def _is_name(value: Any) -> bool:
    fits = _is_text(value, r"\w[\w.+=@,-]*")  # also safe in SLURM's file name patterns and in a shell
    if fits and len(os.fsencode(value)) > 200:
        raise ValueError("which is longer than 200 bytes")
    return fits


def _is_folder(value: Any) -> bool:
    return _is_text(str(value) if isinstance(value, Path) else value)


def _minutes(value: Any, at: At) -> float:
    if seconds := durations.read_duration(value) // 60 * 60:
        return seconds
    raise ValueError("which is shorter than SLURM's unit, 1min")


def _hours(value: Any, at: At) -> Hours:
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise ValueError
    return Hours(value)


def _lines(value: Any, at: At) -> tuple[str, ...]:
    if not isinstance(value, list | tuple | NoneType) or any(type(line) is not str for line in value or ()):
        raise ValueError
    return tuple(value or ())


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping | NoneType)


def _args(value: Any, at: At) -> Any:
    if any(type(key) is not str for key in value or ()):
        raise ValueError
    try:
        return yamlfile.copy(dict(value or {}), at)
    except RecursionError:
        raise ExperimentError(f"{at}: found a value that contains itself; allowed: {_ARGS}") from None


# Options that chainrun sets in every job, beside the fields of `Slurm`, and what to use in their place.
_SET_BY_CHAINRUN = {
    "job-name": "name",
    "wrap": "function",
    **dict.fromkeys(("output", "error", "open-mode"), "dir (the run directory holds the logs)"),
    "ntasks": "slurm.nodes and slurm.tasks_per_node",
    "ntasks-per-node": "slurm.tasks_per_node",
    "signal": "slurm.lead",
    **dict.fromkeys(("requeue", "no-requeue", "dependency"), "chain.handoff"),
    "array": "one submission per run, with overrides",
    **dict.fromkeys(("clusters", "cluster-constraint"), "the cluster that squeue asks (SLURM_CONF)"),
    **dict.fromkeys(("parsable", "quiet", "wait", "test-only"), "chainrun's own commands"),
}


def _extra(value: Any, at: At) -> Any:
    """Read sbatch options; their names come back as sbatch spells them, without the leading dashes."""
    owned = {one.name.replace("_", "-"): f"slurm.{one.name}" for one in fields(Slurm)} | _SET_BY_CHAINRUN
    options: dict[str, str | int | bool] = {}
    for key, setting in (value or {}).items():
        here, option = at / key, str(key).lstrip("-").replace("_", "-")
        if use := owned.get(option):
            raise ExperimentError(f"{here}: found --{option}, which chainrun sets itself; use {use}")
        if not re.fullmatch(r"[a-z][a-z0-9-]+", option):
            raise ExperimentError(f"{here}: found {show(key)}; allowed: a long option of sbatch")
        if option in options:
            raise ExperimentError(f"{here}: found --{option} a second time; allowed: once")
        if type(setting) not in (str, int, bool) or not str(setting).isprintable():
            allowed = "one line of text, a whole number, true or false (put other values in quotes)"
            raise ExperimentError(f"{here}: found {show(setting)}; allowed: {allowed}")
        options[option] = setting
    return options


_ARGS = "a mapping from argument names to plain YAML data"
_FUNCTION = "path.py:function or package.module:function"
_FUNCTION_PATTERN = r"(.*\S\.py|[^\W\d]\w*(\.[^\W\d]\w*)*):[^\W\d]\w*"
_NAME = "letters, digits and . _ - + = @ , (a letter, digit or _ first)"

Text = Annotated[str, _Rule("one line of text", test=_is_text)]
Name = Annotated[str, _Rule(_NAME, test=_is_name)]
Function = Annotated[str, _Rule(_FUNCTION, test=partial(_is_text, pattern=_FUNCTION_PATTERN))]
Folder = Annotated[Path, _Rule("a path", test=_is_folder)]
Flag = Annotated[bool, _choice(True, False)]
Count = Annotated[int, _whole(1)]
CountOrZero = Annotated[int, _whole(0)]
Seed = Annotated[int, _whole(0, 2**32 - 1)]  # NumPy's limit
Seconds = Annotated[float, _Rule(durations.ALLOWED, lambda value, at: durations.read_duration(value))]
Minutes = Annotated[float, _Rule(f"{durations.ALLOWED}, at least 1min", _minutes)]
HoursUsed = Annotated[Hours, _Rule("a number of hours above 0", _hours)]
Lines = Annotated[tuple[str, ...], _Rule("a list of shell lines", _lines)]
Args = Annotated[dict[str, Any], _Rule(_ARGS, _args, _is_mapping)]
Extra = Annotated[dict[str, Any], _Rule("a mapping from sbatch options to values", _extra, _is_mapping)]


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
    reshard: Flag = False
    """true: go on with another number of ranks; same weights and optimizer state, no longer bit for bit."""


@dataclass(frozen=True)
class ChainPolicy:
    """How segments follow each other, and when the chain gives up."""

    handoff: Literal["auto", "requeue", "resubmit", "ahead"] = "auto"
    """What makes the next segment happen; auto: whatever the cluster allows."""
    max_segments: Count = 100
    """The chain stops after this many segments; counted anew when a person lets it go on."""
    stop_after_idle_segments: Count = 2
    """The chain stops after this many segments in a row without one new committed step."""
    retry_errors: CountOrZero = 0
    """How many crashes of the function to retry from the last checkpoint."""
    max_node_hours: HoursUsed | None = None
    """SLURM: no further segment once all jobs together have used so many hours of nodes; null: no limit."""
    max_gpu_hours: HoursUsed | None = None
    """The same with hours of GPUs."""


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
    lead: Literal["auto"] | Seconds = "auto"
    """Seconds before the limit at which to stop; auto: learned from the steps and saves so far."""
    setup: Lines = ()
    """Shell lines that run in the job before Python: module load, source."""
    extra: Extra = field(default_factory=dict)
    """Any other option of sbatch by its long name; true is an option without a value."""


@dataclass(frozen=True)
class Local:
    """The same chain on this machine."""

    walltime: Seconds | None = None
    """Time limit of one segment in seconds; null: none."""
    tasks: Count = 1
    """Ranks."""
    lead: Literal["auto"] | Seconds = "auto"
    """Seconds before the limit at which to stop; auto: learned from the steps and saves so far."""


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
    notify: Text | None = None
    """Shell command that is run once when the chain ends, not at handoffs: when it has finished, failed, or stopped
    (cancelled, halted by a limit, nobody to carry it on). It has 30 s, and is told by its environment: CHAINRUN_EVENT
    (finished, failed or stopped), CHAINRUN_RUN (the directory), CHAINRUN_NAME, CHAINRUN_MESSAGE, CHAINRUN_STEP. What
    goes wrong in it is noted in journal and log and harms nothing. A crash that kills a SLURM job without a word, the
    chain's last one, cannot call it: slurm.extra with mail-type and mail-user lets SLURM itself write."""

    @property
    def run_dir(self) -> Path:
        """The absolute path of the run directory."""
        return Path(os.path.abspath(self.dir)) / self.name


def load(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file, with `k.e.y=value` overrides on top; every mistake is an ExperimentError."""
    path = Path(path)
    data, places = yamlfile.load(path)
    if isinstance(data, dict | NoneType):
        data = {"name": path.stem, **(data or {})}
    return _experiment(data, path.parent, overrides, places)


def from_data(data: Mapping[str, Any], base: Path, overrides: Sequence[str], places: Places) -> Experiment:
    """Check what was read from a file; `places` says where each key stands, and learns of the overrides."""
    return _experiment(data, base, overrides, places)


def from_dict(data: Mapping[str, Any], base: Path, overrides: Sequence[str] = ()) -> Experiment:
    """Check an experiment from Python; `base` is the folder where a relative `function` is looked up first."""
    return _experiment(data, base, overrides, {})


def to_yaml(experiment: Experiment) -> str:
    """Write the frozen form: every key, absolute paths; `load` reads an equal experiment from it."""
    return yamlfile.dump(_thaw(experiment), default_flow_style=False)


def diff(old: Experiment, new: Experiment) -> list[str]:
    """List what differs as lines like `args.lr: 0.01 -> 0.1`."""
    return list(yamlfile.differences(_thaw(old), _thaw(new)))


def _experiment(data: Any, base: Path, overrides: Sequence[str], places: Places) -> Experiment:
    """Check the data, and make the paths absolute that would mean another place elsewhere."""
    if isinstance(data, Mapping):
        data = dict(data)
        for override in overrides:
            yamlfile.override(data, override, places)
    made: Experiment = _convert(Experiment, data, At(places))
    _check_lead(made.slurm.lead, At(places, ("slurm", "lead")), "slurm.time", made.slurm.time)
    _check_lead(made.local.lead, At(places, ("local", "lead")), "local.walltime", made.local.walltime)
    where, _, name = made.function.rpartition(":")
    files = [os.path.abspath(os.path.join(folder, os.path.expanduser(where))) for folder in (base, "")]
    file = next((file for file in files if file.endswith(".py") and os.path.isfile(file)), where)
    folder = Path(os.path.abspath(os.path.expanduser(made.dir)))
    return replace(made, function=f"{file}:{name}", dir=folder)  # find_function complains about no file


def _check_lead(lead: str | float, at: At, key: str, limit: float | None) -> None:
    if limit is not None and isinstance(lead, float) and lead >= limit:
        found = f"{durations.format_duration(lead)}, with {key} {durations.format_duration(limit)}"
        raise ExperimentError(f"{at}: found {found}; allowed: auto or a duration shorter than {key}")


def _convert(hint: Any, value: Any, at: At) -> Any:
    """Read a value by the one of its field's types that takes it."""
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    rules, reason = [_rule(kind) for kind in kinds], ""
    for rule in reversed(rules):  # null stands last, and a section would take it too
        try:
            if rule.test(value):
                return rule.read(value, at)
        except ValueError as error:
            reason = f", {error}" if str(error) else reason
    allowed = ", or ".join(rule.allowed for rule in rules)
    near = nearest(value, re.split(r" \| |, or ", allowed)) if isinstance(value, str) else ""
    raise ExperimentError(f"{at}: found {show(value)}{near}{reason}; allowed: {allowed}")


def _rule(kind: Any) -> _Rule:
    if kind is NoneType:
        return _choice(None)
    if get_origin(kind) is Literal:
        return _choice(*get_args(kind))
    if is_dataclass(kind):
        keys = ", ".join(f"{one.name}: ..." for one in fields(kind))
        return _Rule(f"{{{keys}}}", partial(_build, kind), _is_mapping)
    rule: _Rule = get_args(kind)[-1]  # Annotated[type, rule]
    return rule


def _build(section: Any, value: Any, at: At) -> Any:
    """Read one mapping as the dataclass that describes it; `slurm:` with nothing below it is all defaults."""
    value, hints, given = value or {}, get_type_hints(section, include_extras=True), {}
    for key in value:
        if key in ("sweep", "parallel") and section is Experiment:
            raise ExperimentError(
                f"{at / key}: found a grid of runs; allowed here: one run, without this key"
            )
        if key not in hints:
            near, allowed = nearest(str(key), hints), ", ".join(hints)
            for free in {"args", "extra"} & set(hints):
                allowed += f"; any others go under {'.'.join((at / free).key)}"
            raise ExperimentError(f"{at / key}: unknown key{near}; allowed: {allowed}")
    for one in fields(section):
        if one.name in value:
            given[one.name] = _convert(hints[one.name], value[one.name], at / one.name)
        elif one.default is MISSING and one.default_factory is MISSING:
            raise ExperimentError(f"{at / one.name}: missing; allowed: {_rule(hints[one.name]).allowed}")
    return section(**given)


def _thaw(value: Any) -> Any:
    """Turn an experiment back into what stands in its file; a float outside of free mappings is a duration."""
    if is_dataclass(value):
        return {one.name: _thaw(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Hours):
        return float(value)
    if isinstance(value, float):
        return durations.format_duration(value)
    if isinstance(value, Path):
        return os.path.abspath(value)
    return list(value) if isinstance(value, tuple) else value
