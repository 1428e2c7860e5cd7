"""YAML as chainrun reads and writes it: text to data with the place of every key, and back."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from chainrun.errors import ExperimentError, nearest

Places = dict[tuple[str, ...], str]  # key -> where it was written: "digits.yaml:3", "override seed=1"


@dataclass(frozen=True)
class At:
    """A key, and the place where it was written, for error messages."""

    places: Places
    key: tuple[str, ...] = ()

    def __truediv__(self, name: object) -> At:
        return At(self.places, (*self.key, str(name)))

    def __str__(self) -> str:
        above = (self.key[:n] for n in range(len(self.key), -1, -1))
        place = next((self.places[key] for key in above if key in self.places), "")
        return ": ".join(filter(None, (place, ".".join(self.key)))) or "experiment"


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


def dump(value: Any, **style: Any) -> str:
    """Write a value as a file; `read` gives it back."""
    text: str = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, **style)
    return text


def flow(value: Any) -> str:
    """Write a value on one line, as it would stand in the file; two values that differ never look alike."""
    try:
        text = dump(value, default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()
    except (yaml.YAMLError, RecursionError):
        return repr(value)
    return repr(value) if "\n" in text else text  # bytes


def show(value: Any) -> str:
    """Write a value on one short line, for an error message."""
    text = flow(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load(path: Path) -> tuple[Any, Places]:
    """Return what a file says, and the place of every key in it."""
    try:
        return read(path.read_bytes().decode("utf-8-sig"), str(path))
    except OSError as error:
        names = [] if os.path.exists(path) else [file.name for file in path.parent.glob("*.y*ml")]
        near = nearest(path.name, names)
        raise ExperimentError(f"{path}: cannot be read: {error.strerror}{near}") from error
    except UnicodeDecodeError as error:
        raise ExperimentError(f"{path}: found bytes that are not UTF-8 text, at {error.start}") from None


def read(text: str, source: str) -> tuple[Any, Places]:
    """Return what one YAML text says, and the place of every key in it; `source` names it in errors."""
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
    if isinstance(node, yaml.SequenceNode):
        for n, item in enumerate(node.value):
            _find_keys(item, (*at, str(n)), places, seen)
        return
    lines: dict[tuple[str, str], int] = {}
    for key, value in node.value:
        path, line = (*at, str(key.value)), key.start_mark.line + 1
        places[path] = f"{places[()]}:{line}"
        if first := lines.get((key.tag, path[-1])):
            problem = f"found a second time (first in line {first}); allowed: once"
            raise ExperimentError(f"{At(places, path)}: {problem}")
        lines[key.tag, path[-1]] = line
        _find_keys(value, path, places, seen)


def override(data: dict[str, Any], text: str, places: Places) -> None:
    """Set one `k.e.y=value` in `data`, copying the mappings on its way."""
    dotted, equals, value = text.partition("=")
    path, source = tuple(dotted.strip().split(".")), f"override {text}"
    if not equals or not all(path):
        raise ExperimentError(f"{source}: found no key=value; allowed: a dotted key and a value: args.lr=0.1")
    for n, key in enumerate(path[:-1], 1):
        below, here = data.get(key), ".".join(path[:n])
        if not isinstance(below, Mapping | NoneType):
            problem = f"found {show(below)}, which has no keys below it; allowed: {here}=VALUE"
            raise ExperimentError(f"{source}: {here}: {problem}")
        data[key] = dict(below or {})
        data = data[key]
        places.setdefault(path[:n], source)
    data[path[-1]] = read(value, source)[0]
    places[path] = source


def copy(value: Any, at: At) -> Any:
    """Copy plain data; anything else would not come back equal from a file."""
    if type(value) is list:
        return [copy(item, at / n) for n, item in enumerate(value)]
    if type(value) is dict:
        return {copy(key, at): copy(item, at / key) for key, item in value.items()}
    if type(value) not in (str, int, float, bool, NoneType):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        allowed = "plain YAML data (str, int, float, bool, null, list, dict)"
        raise ExperimentError(f"{at}: found {show(value)}, a {kind}; allowed: {allowed}")
    return value


def differences(old: dict[Any, Any], new: dict[Any, Any], above: str = "") -> Iterator[str]:
    """Say what differs in lines like `args.lr: 0.01 -> 0.1`."""
    for key in old | new:
        if isinstance(old.get(key), dict) and isinstance(new.get(key), dict):
            yield from differences(old[key], new[key], f"{above}{key}.")
            continue
        left, right = (flow(side[key]) if key in side else None for side in (old, new))
        if left != right:
            yield f"{above}{key}: {left or 'not set'} -> {right or 'not set'}"
