"""A grid of runs: one for each combination of values, in a group folder ``dir/NAME``.

In the experiment file, beside its other keys::

    sweep: {args.lr: [0.1, 0.01], seed: range(3)}    # a list of values or range(…) for each dotted key
    parallel: 4                                      # so many chains at once on SLURM; null: all

On the command line ``args.lr=0.1,0.01`` and ``seed=range(3)`` do the same for ``args.…`` and ``seed``, and
``sweep.KEY=[a, b]`` for any key. What stands in quotes or brackets is one value: ``args.text="'a,b'"`` is a text with a
comma, ``args.sizes=[1,2]`` one list, ``args.sizes=[1,2],[3,4]`` two lists. In keys other than ``args.…`` and ``seed`` a
comma belongs to the value, as in ``slurm.partition=gpu,cpu``. One value for a key that the file sweeps ends its sweep.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any

from chainrun import experiment, yamlfile
from chainrun.errors import ExperimentError, UsageError
from chainrun.experiment import Experiment
from chainrun.rundir import GroupDir, read_json, write_durably
from chainrun.yamlfile import At, Places, show

MOST = 1000  # chains, unless a person confirms that so many are meant
_LONGEST = 60  # characters of one value in a name
_RANGE = re.compile(r"range\(\s*(-?\d+)\s*(?:,\s*(-?\d+)\s*)?(?:,\s*(-?\d+)\s*)?\)")
_ALLOWED = "a list of values, [0.1, 0.01], or range(3)"


@dataclass(frozen=True)
class Point:
    """One run of a grid."""

    values: dict[str, Any]
    """What distinguishes it: dotted key -> value."""
    experiment: Experiment

    @property
    def name(self) -> str:
        return self.experiment.name


@dataclass(frozen=True)
class Sweep:
    """What an experiment file and the overrides ask for: one run, or a group of runs."""

    axes: dict[str, list[Any]]
    """Dotted key -> its values; empty where there is one run only."""
    points: list[Point]
    parallel: int | None
    folder: Path
    """Of the group, where there is one."""

    def text(self) -> str:
        """Return how many chains these are, and why."""
        grid = " x ".join(f"{key} ({len(values)})" for key, values in self.axes.items())
        at_once = f", {self.parallel} at once" if self.parallel and self.parallel < len(self.points) else ""
        return f"{len(self.points)} chain{'s' * (len(self.points) != 1)}: {grid}{at_once}, in {self.folder}"

    def write(self) -> GroupDir:
        """Write what the group is for whoever looks; points that it had before stay in it."""
        group = GroupDir(self.folder).create()
        before = read_json(group.sweep) or {"points": [], "axes": {}}
        names = {point.name for point in self.points}
        points = [one for one in before["points"] if one["name"] not in names]
        points += [{"name": point.name, "values": point.values} for point in self.points]
        axes = {
            key: [*before["axes"].get(key, []), *values]
            for key, values in {**before["axes"], **self.axes}.items()
        }
        data = {
            "name": self.folder.name,
            "axes": {key: _distinct(values) for key, values in axes.items()},
            "parallel": self.parallel,
            "points": points,
        }
        write_durably(group.sweep, json.dumps(data, indent=1).encode())
        return group


def load(path: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Read an experiment file and overrides, either of which may ask for a grid.

    Raises:
        ExperimentError: a mistake in the file, the overrides or the grid.
    """
    path = Path(path)
    data, places = yamlfile.load(path)
    if not isinstance(data, dict | NoneType):
        experiment.load(path, overrides)  # says what is wrong
    data = {"name": path.stem, **(data or {})}
    axes = _axes_of_file(data.pop("sweep", None), At(places, ("sweep",)))
    parallel = data.pop("parallel", None)
    at_parallel = At(places, ("parallel",))
    single: list[str] = []
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        values = _grid(key, value) if equals else None
        if key == "parallel" and equals:
            parallel, at_parallel = (
                yamlfile.read(value, f"override {text}")[0],
                At({("parallel",): f"override {text}"}, ("parallel",)),
            )
        elif values is not None:
            key = key.removeprefix("sweep.")
            axes[key] = _check(values, At({(key,): f"override {text}"}, (key,)))
            single = [one for one in single if one.partition("=")[0].strip() != key]
        else:
            axes.pop(key, None)
            single.append(text)
    if (
        not isinstance(parallel, int | NoneType)
        or isinstance(parallel, bool)
        or parallel == 0
        or (parallel or 1) < 1
    ):
        raise ExperimentError(
            f"{at_parallel}: found {show(parallel)}; allowed: a whole number, at least 1, or null"
        )
    plain = experiment.from_data(data, path.parent, [*single, *_first(axes)], dict(places))
    points = list(_points(data, path.parent, single, places, axes, plain)) if axes else [Point({}, plain)]
    return Sweep(axes, points, parallel, plain.run_dir)


def _points(
    data: dict[str, Any],
    base: Path,
    single: list[str],
    places: Places,
    axes: dict[str, list[Any]],
    plain: Experiment,
) -> Iterator[Point]:
    words = _short(list(axes))
    names: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        point = dict(zip(axes, values, strict=True))
        name = ",".join(f"{words[key]}={_safe(value)}" for key, value in point.items())
        if len(os.fsencode(name)) > 200 or name in names:
            name = f"{name[:100]}-{_digest(list(point.values()))}"
        names[name] = point
        made = experiment.from_data(
            data,
            base,
            [*single, *(f"{key}={yamlfile.flow(value)}" for key, value in point.items())],
            dict(places),
        )
        yield Point(point, replace(made, name=name, dir=plain.run_dir))


def _axes_of_file(found: Any, at: At) -> dict[str, list[Any]]:
    if not isinstance(found, Mapping | NoneType):
        allowed = f"a mapping from dotted keys to {_ALLOWED}: sweep: {{args.lr: [0.1, 0.01], seed: range(3)}}"
        raise ExperimentError(f"{at}: found {show(found)}; allowed: {allowed}")
    axes = {}
    for key, values in (found or {}).items():
        given = _range(values) if isinstance(values, str) else values
        axes[str(key)] = _check(given, at / key)
    return axes


def _check(values: Any, at: At) -> list[Any]:
    if at.key[-1] in ("name", "dir", "function", "sweep", "parallel"):
        raise ExperimentError(f"{at}: cannot be swept, each of the runs has its own; sweep args.… or seed")
    if not isinstance(values, list) or not values:
        raise ExperimentError(f"{at}: found {show(values)}; allowed: {_ALLOWED}")
    if len(_distinct(values)) < len(values):
        twice = next(
            value for value in values if [yamlfile.flow(v) for v in values].count(yamlfile.flow(value)) > 1
        )
        raise ExperimentError(f"{at}: found {show(twice)} twice; allowed: each value once")
    return values


def _grid(key: str, value: str) -> list[Any] | None:
    """Return the values of an override that asks for several, None for one that sets a value."""
    source = f"override {key}={value}"
    if key.startswith("sweep."):
        given = _range(value)
        return yamlfile.read(value, source)[0] if given is None else given
    if key != "seed" and not key.startswith("args."):
        return None
    given = _range(value)
    if given is not None:
        return given
    parts = _split(value)
    if len(parts) < 2:
        return None
    if not all(part.strip() for part in parts):
        raise ExperimentError(
            f"{source}: found an empty value; put a text with a comma in quotes: {key}=\"'{value}'\""
        )
    return [yamlfile.read(part, source)[0] for part in parts]


def _split(text: str) -> list[str]:
    """Split at the commas that are in no quotes and no brackets."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            parts.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and not parts[-1].strip(" [{,:"):
            quote = letter  # an apostrophe inside of a word opens nothing
        depth += 0 if quote else (letter in "[{") - (letter in "]}")
        parts[-1] += letter
    return parts


def _range(text: str) -> list[Any] | None:
    match = _RANGE.fullmatch(text.strip())
    try:
        return (
            list(range(*(int(number) for number in match.groups() if number is not None))) if match else None
        )
    except ValueError:  # a step of 0
        return []


def _first(axes: dict[str, list[Any]]) -> list[str]:
    return [f"{key}={yamlfile.flow(values[0])}" for key, values in axes.items()]


def _short(keys: list[str]) -> dict[str, str]:
    """Name each axis by the last part of its key, where that tells it from the others."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def _safe(value: Any) -> str:
    """Return a value as a part of a folder's name; different values have different names."""
    text = value if isinstance(value, str) else yamlfile.flow(value)
    plain = re.sub(r"[^\w.+-]+", "-", text)
    if plain == text and len(text) <= _LONGEST:
        return text
    return f"{plain[:_LONGEST].strip('-')}-{_digest(value)}"


def _digest(value: Any) -> str:
    return hashlib.sha256(yamlfile.flow(value).encode()).hexdigest()[:6]


def _distinct(values: list[Any]) -> list[Any]:
    return list({yamlfile.flow(value): value for value in values}.values())


def confirm(found: Sweep, *, confirmed: bool) -> None:
    """Refuse a grid that is larger than anybody means, unless it was confirmed.

    Raises:
        UsageError: it has more than `MOST` points.
    """
    if len(found.points) > MOST and not confirmed:
        raise UsageError(f"these are {found.text()}; more than {MOST} are submitted only with --yes")
