"""Why a run is not the same: what `chainrun verify` reads from the lines that its runs recorded.

See `chainrun.training.record` for what a line holds. A cause is a pair of what it is and what to do about it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

Line: TypeAlias = dict[str, Any]
Cause: TypeAlias = tuple[str, str]

_RUN = ("resumed", "segment", "restored_from", "time_left")
_UNSEEDED = ("getpid", "urandom", "uuid1", "uuid4", "token_bytes", "SystemRandom", "gethostname")
_ROUNDING = 1e-3  # relative: what another order of summation may do to a loss within a step or two


@dataclass(frozen=True)
class Evidence:
    """Two lines of the same step that differ, of the uninterrupted run and of the other, and what came before.

    `before` are the lines of the last place that both have come to alike: where the checkpoint was taken and
    where the resumed run arrived, or the end of the step before. `noise` names the variables that differ
    between two uninterrupted runs as well, `after` the lines of the step after.
    """

    differ: dict[str, list[str]]
    lines: tuple[Line, Line]
    before: tuple[Line, Line] | None
    after: tuple[Line, Line] | None
    noise: frozenset[str]
    asked: dict[str, str]
    seed: int | None


def differing(a: Line, b: Line) -> dict[str, list[str]]:
    """Return the components that differ, and which of their entries."""
    found = {}
    for component in {**a["parts"], **b["parts"]}:
        one, other = a["parts"].get(component, {}), b["parts"].get(component, {})
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        if names or (component in a["parts"]) != (component in b["parts"]):
            found[component] = names
    return found


def variables_that_differ(a: Line, b: Line) -> list[str]:
    """Return the variables that both lines have, and that hold something else."""
    return [name for name, held in a["held"].items() if name in b["held"] and b["held"][name][2] != held[2]]


def of_a_resume(evidence: Evidence) -> list[Cause]:
    """Return why a resumed run is not the uninterrupted one, the likeliest first."""
    return list(_of_a_resume(evidence)) or [_unknown(evidence)]


def _of_a_resume(evidence: Evidence) -> Iterator[Cause]:
    random = [part for part in evidence.differ if part.startswith("random state")]
    found = False
    if evidence.before is not None:
        place_a, place_b = evidence.before
        for component in differing(place_a, place_b):
            yield (
                f"'{component}' did not come back from the checkpoint as it was saved",
                "look at its state_dict and load_state_dict: what one gives the other must take",
            )
        suspects = [n for n in variables_that_differ(place_a, place_b) if n not in evidence.noise]
        objects = [name for name in suspects if place_a["held"][name][1]]
        values = [name for name in suspects if name not in objects]
        loader = list(_loader(place_a))
        first = "batch of an unregistered loader" in evidence.differ
        yield from loader if first else ()
        yield from (_object(name, place_a["held"][name][0]) for name in objects)
        yield from (_value(name, place_a["held"][name][2], place_b["held"][name][2]) for name in values)
        yield from _other(place_a) if not suspects else ()
        yield from loader if not first else ()
        found = bool(suspects) or first
    yield from _counts(evidence) if not found else ()
    for name in _RUN:
        if name in evidence.asked:
            yield (
                f"{evidence.asked[name]}() asks for run.{name}, which is another one in a resumed run",
                "do the same whether the run was resumed or not; draw no random numbers on account of it",
            )
    if set(evidence.differ) == set(random):
        yield (
            "something draws random numbers that the uninterrupted run does not draw there, or draws fewer",
            "draw outside of the training from a generator of its own",
        )
    elif not found and any(part.startswith("batch") for part in evidence.differ):
        yield (
            "the data set or the sampler depends on something that is not saved",
            "give it state_dict and load_state_dict, or make an item depend on its index and random numbers only",
        )


def _unknown(evidence: Evidence) -> Cause:
    return (
        "a value that the step depends on is not saved: one held by a closure, an iterator, a thread or a "
        "library, or the time of day",
        "register what holds it, or keep it in run.state",
    )


def _loader(place: Line) -> Iterator[Cause]:
    loaders = [name for name in place["unregistered"] if name.endswith("DataLoader")]
    if any(not name.startswith("chainrun.") for name in loaders):
        yield (
            "a torch.utils.data.DataLoader is used, which begins again at a resume",
            "build it as chainrun.DataLoader(...), and add it to run.register(...)",
        )
    elif loaders:
        yield "a chainrun.DataLoader is not registered", "add it to run.register(...)"


def _other(place: Line) -> Iterator[Cause]:
    for name in place["unregistered"]:
        if not name.endswith("DataLoader"):
            yield f"a {name.rpartition('.')[2]} is not registered", "add it to run.register(...)"


def _object(name: str, kind: str) -> Cause:
    path = name.partition(" in ")[0]
    word = re.sub(r"\W+", "_", path).strip("_").rpartition("self_")[2]
    return f"`{path}`{name[len(path) :]} ({kind}) is not registered", f"run.register({word}={path})"


def _value(name: str, uninterrupted: str, found: str) -> Cause:
    path, _, function = name.partition(" in ")
    one, other = shown(uninterrupted), shown(found)
    values = f": {one} uninterrupted, {other} resumed" if one and other else ""
    is_attribute = path.count(".") > (0 if function else 1)  # a global's name begins with its module's
    owner = (
        " or have its owner's state_dict and load_state_dict hold it, and register that"
        if is_attribute
        else ""
    )
    return (
        f"the variable `{path}`{name[len(path) :]} is not what it was when the run was cut{values}",
        f"keep it in run.state,{owner}" if owner else "keep it in run.state",
    )


def _counts(evidence: Evidence) -> Iterator[Cause]:
    a, b = evidence.lines
    for name in variables_that_differ(a, b):
        one, other = shown(a["held"][name][2]), shown(b["held"][name][2])
        if a["held"][name][0] == "int" and other in ("0", "1") and one and int(one) > int(other):
            yield (
                f"`{name.partition(' in ')[0]}` counts from {other} again (uninterrupted it is {one}), as "
                "what stands beside the loader in zip() does",
                "count with enumerate(loader) or run.global_step, or keep the count in run.state",
            )


def of_the_training(evidence: Evidence) -> list[Cause]:
    """Return why two uninterrupted runs are not the same, the likeliest first."""
    return list(_of_the_training(evidence))


def _of_the_training(evidence: Evidence) -> Iterator[Cause]:
    if os.environ.get("PYTHONHASHSEED", "0") == "random":
        yield (
            "PYTHONHASHSEED is 'random' here, so that sets of strings have another order in every process",
            "unset it (chainrun then sets 0), and sort what is taken from a set",
        )
    if evidence.seed is None:
        yield (
            "seed: null leaves Python's, NumPy's and torch's generators unseeded",
            "give the experiment a seed",
        )
        return
    suspects = variables_that_differ(*evidence.before) if evidence.before is not None else []
    a = evidence.lines[0]
    generators = [name for name in suspects if a["held"].get(name, ("", False))[0] in _GENERATORS]
    for name in generators:
        yield f"the generator `{name}` is not seeded alike in both runs", "give it a fixed seed"
    for asked in _UNSEEDED:
        if asked in evidence.asked:
            yield (
                f"{evidence.asked[asked]}() asks for {asked}, which no seed repeats",
                "draw it from a seeded generator",
            )
    components = list(evidence.differ)
    kernel = (
        "a kernel that is not deterministic: it adds up in another order every time (scatter, index_add, atomics)",
        "deterministic: true in the experiment; what has no deterministic form then says so",
    )
    if components and components[0].startswith("batch"):
        yield (
            "the data changes: the data set gives other items although all random numbers are the same (a file that "
            "is written while training, the time, the order of a set or of a directory's files)",
            "make an item depend on its index and random numbers only; sort lists of files",
        )
        return
    if evidence.lines[0]["at"] == "start":
        yield (
            f"'{components[0]}' does not begin alike in both runs: it is drawn or seeded without a fixed seed, or "
            "loaded from what changes",
            "make it after the experiment's seed is set, or seed it with run.seed",
        )
        return
    if "time_left" in evidence.asked:
        yield (
            f"{evidence.asked['time_left']}() asks for run.time_left()",
            "let nothing that is trained depend on it",
        )
    size = _relative(evidence)
    if size is not None and size < _ROUNDING:
        yield kernel
    clock = [
        n
        for n in ("time", "time_ns", "perf_counter", "monotonic", "now", "utcnow", "today")
        if n in evidence.asked
    ]
    for name in clock[:1]:
        yield (
            f"{evidence.asked[name]}() asks for the time ({name})",
            "let nothing but what is printed depend on it",
        )
    for name in [n for n in suspects if n not in generators][:3]:
        one, other = (shown(line["held"][name][2]) for line in evidence.before or ())
        yield f"`{name}` differs before the step ({one}, {other})", "make it the same in every run"
    if size is None or size >= _ROUNDING:
        yield kernel


_GENERATORS = ("Generator", "RandomState", "Random")


def _relative(evidence: Evidence) -> float | None:
    """Return by how much the first metric differs that does, None where none shows it."""
    for pair in (evidence.lines, evidence.after):
        if pair is None:
            continue
        for name, one in pair[0]["parts"].get("metrics", {}).items():
            other = pair[1]["parts"].get("metrics", {}).get(name)
            try:
                x, y = float(shown(one) or ""), float(shown(other or "") or "")
            except ValueError:
                continue
            if x != y:
                return abs(x - y) / max(abs(x), abs(y))
    return None


def shown(mark: str) -> str | None:
    """Return the value that a mark shows, None where it shows none."""
    return mark.partition(" ")[2] or None
