"""Writes docs/api.md from the docstrings of chainrun's public names: python docs/api.py"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chainrun

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
# of Run, for chainrun's own segment, displays and verify
INTERNAL = {"passed_a_boundary", "walking", "registered", "things", "progress"}
ORDER = ["Run", "DataLoader", "run", "submit", "Chain", "ChainFailed", "verify", "Verdict", "Checkpoint"]


def text(docstring: str) -> str:
    """Return a docstring as Markdown: its sections as lists."""
    lines: list[str] = []
    section = False
    for line in inspect.cleandoc(docstring).splitlines():
        name = line.strip().rstrip(":")
        if line.strip().endswith(":") and name in SECTIONS and not line.startswith(" "):
            lines += [f"**{name}**", ""]
            section = True
        elif section and re.match(r"    [\w, *]+: ", line):
            term, _, rest = line.strip().partition(": ")
            lines.append(f"* `{term}`: {rest}")
        elif section and line.startswith("    "):
            lines.append("  " + line.strip())
        else:
            section = section and not line.strip()
            lines.append(line)
    return "\n".join(lines)


def signature(thing: Any) -> str:
    """Return the parameters, as they are written."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        return ""
    found = re.sub(r"""(: |-> )(["'])(.*?)\2""", r"\1\3", str(inspect.signature(thing)))
    return found.replace("(self, ", "(").replace("(self)", "()")


def members(one: type) -> Iterator[tuple[str, str]]:
    """Yield heading and docstring of what a class defines itself and says something about."""
    for name, member in vars(one).items():
        if name.startswith("_") or name in INTERNAL:
            continue
        if isinstance(member, property) and member.__doc__:
            yield f"`.{name}`", member.__doc__
        elif inspect.isfunction(member) and member.__doc__:
            yield f"`.{name}{signature(member)}`", member.__doc__


def render() -> str:
    """Return the whole page."""
    names = [name for name in chainrun.__all__ if not name.startswith("__")]
    assert sorted(names) == sorted(ORDER), "a public name has no place in docs/api.py"
    parts = ["# chainrun's Python names", "", "Made from the docstrings by `python docs/api.py`.", ""]
    for name in ORDER:
        thing = getattr(chainrun, name)
        parts += [f"## `chainrun.{name}`", "", "```", f"{name}{signature(thing)}", "```", ""]
        parts += [text(thing.__doc__), ""]
        for heading, docstring in members(thing) if inspect.isclass(thing) else ():
            parts += [f"### {heading}", "", text(docstring), ""]
    return "\n".join(parts).rstrip() + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("api.md").write_text(render())
