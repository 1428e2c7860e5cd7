"""`chainrun verify`: is this training, cut and resumed, the same training? Run it and see.

The function runs twice without interruption (a training that does not repeat itself cannot be resumed
exactly either) and once from each cut; the cut runs start from the first run's checkpoints. After every step
each rank records a mark of its batch, metrics, registered objects and random streams, and of the user's
variables, which are not compared but tell the cause (`causes`).
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from chainrun import experiment, function, journal
from chainrun.checkpoint.store import Store
from chainrun.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, ChainrunError, UsageError
from chainrun.experiment import Experiment
from chainrun.launch import causes, chain, local, submit
from chainrun.launch.causes import Cause, Evidence, Line
from chainrun.project import Project
from chainrun.rundir import RunDir, read_lines
from chainrun.shipped import Shipped

STEPS = 20  # compared by default
_LIMIT = 24 * 3600.0  # seconds that `Run.time_left` begins with, as in a job


@dataclass(frozen=True)
class Difference:
    """The first place at which two runs differ."""

    step: int
    """0 is before the first step."""
    rank: int
    parts: dict[str, list[str]]
    """The components that differ, and which of their entries: ``{"model": ["0.weight", "0.bias"]}``."""
    values: dict[str, tuple[str, str]] = field(default_factory=dict)
    """Of entries that are single numbers, what they are: uninterrupted, and in the other run."""

    def text(self) -> str:
        """Return the step, the rank and the components in words, a line each."""
        where = f"at step {self.step}" if self.step else "before the first step"
        return "\n".join([f"{where}, rank {self.rank}:", *map(self._component, self.parts)])

    def _component(self, name: str) -> str:
        entries = [entry for entry in self.parts[name] if entry]
        if not entries:
            return f"  {name}"
        values = self.values.get(f"{name}: {entries[0]}")
        instead = f" {values[1]} instead of {values[0]}" if values else ""
        more = f" and {len(entries) - 1} more" if len(entries) > 1 else ""
        return f"  {name}: {entries[0]}{instead}{more}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    steps: int
    cuts: list[int]
    cut: int | None = None
    """After which step the run was cut that differs; None where all are identical, or two whole runs differ."""
    difference: Difference | None = None
    failure: str | None = None
    """Why the cut run failed, where it did and the uninterrupted one did not."""
    causes: list[Cause] = field(default_factory=list)
    """What it may be and what to do about it, the likeliest first."""

    @property
    def exact(self) -> bool:
        return self.difference is None and self.failure is None

    def text(self) -> str:
        """Return the verdict in words."""
        if self.exact:
            cuts = f"{len(self.cuts)} cut{'s' * (len(self.cuts) != 1)}"
            return f"identical over {self.steps} steps, {cuts}"
        if self.failure is not None:
            run = "a second run" if self.cut is None else f"cut after step {self.cut}, the run"
            lines = [f"{run} fails: {self.failure}"]
        elif self.cut is None:
            lines = ["the training does not repeat itself: two uninterrupted runs differ first"]
        else:
            lines = [f"cut after step {self.cut}, the run differs first"]
        if self.difference is not None:
            lines[0] += f" {self.difference.text()}"
        for place, (what, remedy) in enumerate(self.causes[:3]):
            lines += [f"{'likely cause' if not place else 'or'}: {what}", f"  remedy: {remedy}"]
        return "\n".join(lines)


def verify(
    described: Experiment,
    base: Path,
    steps: int = STEPS,
    cuts: Sequence[int] | Literal["every"] | None = None,
    shipped: Shipped | None = None,
) -> Verdict:
    """Compare uninterrupted and cut runs of an experiment over its first steps.

    Args:
        steps: how many to compare, at least 2.
        cuts: after which steps to cut, or ``every``; by default a few, spread.
        shipped: the function itself, where it is in no file.

    Raises:
        ChainrunError: the function fails, or takes no step, or only one.
    """
    if steps < 2:
        raise UsageError(f"steps={steps}: at least 2 are needed, one before the cut and one after it")
    if shipped is not None:
        shipped.check_arguments(described.args)
    else:
        function.check_arguments(function.find_function(described, base), described.args)
    if cuts is None:
        cuts = sorted({1, steps // 3, 2 * steps // 3, steps - 1} - {0})
    cuts = list(range(1, steps)) if cuts == "every" else [cut for cut in cuts if 0 < cut < steps]
    folder = Path(tempfile.mkdtemp(prefix="chainrun-verify-"))
    try:
        with tqdm(
            total=2 + len(cuts), desc="verify: uncut", unit="run", disable=not sys.stderr.isatty()
        ) as bar:
            whole = _Piece(folder, "whole", described, steps, cuts, shipped).run()
            bar.update()
            last = max(step for step, _ in whole.steps)
            if last < 2:
                raise ChainrunError("the function took one step only: nothing can follow a cut")
            places = sorted({c.step for c in Store(whole.dir).committed() if c.step < last})
            cuts = sorted(
                {min(place for place in places if place >= c) for c in cuts if c <= max(places, default=0)}
            )
            again = _Piece(folder, "again", described, steps, cuts, shipped).run()
            bar.update()
            if again.failure:
                return Verdict(last, cuts, failure=again.failure)
            if difference := _first_difference(whole, again, 0):
                return Verdict(
                    last, cuts, None, difference, None, _why(whole, again, None, difference, again)
                )
            for cut in cuts:
                bar.set_description(f"verify: cut after step {cut}")
                piece = _Piece(folder, f"cut-{cut}", described, steps, (), shipped).run(whole, cut)
                bar.update()
                if piece.failure:
                    return Verdict(last, cuts, cut, None, piece.failure)
                if difference := _first_difference(whole, piece, cut):
                    return Verdict(
                        last, cuts, cut, difference, None, _why(whole, piece, cut, difference, again)
                    )
        return Verdict(last, cuts)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def verify_function(
    function: Callable[..., Any] | str,
    *,
    args: Mapping[str, Any] | None = None,
    name: str | None = None,
    steps: int = STEPS,
    cuts: Sequence[int] | Literal["every"] | None = None,
    **keys: Any,
) -> Verdict:
    """Compare uninterrupted and cut runs of a training function over its first steps, on this machine.

    Args:
        steps: how many to compare, at least 2.
        cuts: after which steps to cut, or ``every``; by default a few, spread.

    The other arguments are those of `chainrun.submit`.

    Raises:
        ChainrunError: the function fails, or takes no step, or only one.
    """
    described, base, shipped = chain.describe(function, args=args, name=name, **keys)
    return verify(described, base, steps, cuts, shipped)


class _Piece:
    """One run, or the rest of one, in a folder of its own."""

    def __init__(
        self,
        folder: Path,
        name: str,
        described: Experiment,
        steps: int,
        save_at: Sequence[int] = (),
        shipped: Shipped | None = None,
    ) -> None:
        self._shipped = shipped
        policy = experiment.Checkpoint(every=None, keep=1_000_000)
        once = replace(described.chain, retry_errors=0)  # an error is what is to be found
        self.described = replace(described, name=name, dir=folder, checkpoint=policy, chain=once)
        self._last, self._save_at = steps, save_at
        self._record = folder / f"{name}.jsonl"
        self.dir = RunDir(folder / name)
        self.failure: str | None = None
        self.steps: dict[tuple[int, int], Line] = {}  # by (step, rank), as the next two
        self.places: dict[tuple[int, int], Line] = {}
        self.starts: dict[tuple[int, int], Line] = {}

    def run(self, whole: _Piece | None = None, cut: int = 0) -> _Piece:
        """Run it from its beginning, or from a checkpoint of another one.

        Raises:
            ChainrunError: the function fails from its beginning, or takes no step.
        """
        # a file's function is run from where it is: nothing of the project is copied
        project = Project(self._shipped.source, Path.cwd()) if self._shipped else None
        submit.create(self.dir, self.described, project, self._shipped)
        if whole is not None:
            source = next(c for c in Store(whole.dir).committed() if c.step == cut)
            shutil.copytree(source.path, self.dir.checkpoint(cut), copy_function=os.link)
            journal.record(self.dir, "segment", segment=1)  # as in a chain, the resumed one is the second
        more = {"record": str(self._record), "save_at": list(self._save_at), "end": time.time() + _LIMIT}
        said = io.StringIO()
        with contextlib.redirect_stderr(said):  # it would name a folder that is deleted
            code = local.run_one(self.dir, self.described, [self._last], **more)
        if code == EXIT_STOPPED and (journal.last(self.dir, "stop") or {}).get("reason") != "interrupt":
            raise KeyboardInterrupt
        if code == EXIT_FAILED:
            failed = self.dir.failed
            self.failure = (failed.read_text() if failed.exists() else said.getvalue()).strip()
            if whole is None and self.dir.path.name == "whole":
                raise ChainrunError(f"the function failed, there is nothing to compare: {self.failure}")
        for line in read_lines(self._record):
            lines = {"start": self.starts, "place": self.places, "step": self.steps}[line["at"]]
            lines[line["step"], line["rank"]] = line
        if not self.steps and not self.failure:
            raise ChainrunError(
                "the function took no step: call run.step() after each optimization step, or use run.steps()"
            )
        return self


def _first_difference(whole: _Piece, other: _Piece, after: int) -> Difference | None:
    reference = {**({} if after else whole.starts), **whole.steps}
    found = {**({} if after else other.starts), **other.steps}
    for step, rank in sorted(reference):
        if step <= after and step:
            continue
        a, b = reference[step, rank], found.get((step, rank))
        if b is None:
            return Difference(step, rank, {"the step itself, which is missing": []})
        if parts := causes.differing(a, b):
            return Difference(step, rank, parts, _values(a, b, parts))
    extra = sorted(set(found) - set(reference))
    return Difference(*extra[0], {"the step itself, which is one too many": []}) if extra else None


def _values(a: Line, b: Line, parts: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    found = {}
    for component, names in parts.items():
        for name in names:
            marks = (line["parts"].get(component, {}).get(name, "") for line in (a, b))
            one, other = map(causes.shown, marks)
            if one and other:
                found[f"{component}: {name}"] = (one, other)
    return found


def _why(whole: _Piece, other: _Piece, cut: int | None, first: Difference, again: _Piece) -> list[Cause]:
    at = (first.step, first.rank)

    def pair(
        a: dict[tuple[int, int], Line], b: dict[tuple[int, int], Line], step: int
    ) -> tuple[Line, Line] | None:
        one, two = a.get((step, first.rank)), b.get((step, first.rank))
        return (one, two) if one and two else None

    if first.step == 0:
        lines = pair(whole.starts, other.starts, 0)
        before = None
    else:
        lines = pair(whole.steps, other.steps, first.step)
        if cut is not None:
            before = pair(whole.places, other.places, cut)
        else:
            before = pair(whole.steps, other.steps, first.step - 1) or pair(whole.starts, other.starts, 0)
    known = whole.steps.get(at) or other.steps.get(at)
    noise: set[str] = set()
    if cut is not None:
        for step in (cut, cut + 1):
            if twice := pair(whole.steps, again.steps, step):
                noise |= {*causes.variables_that_differ(*twice)}
    if lines is None:  # one has no such step
        assert known is not None
        lines = (known, known)
    asked = next(iter(whole.starts.values()), {}).get("asked", {})
    after = pair(whole.steps, other.steps, first.step + 1)
    seed = whole.described.seed
    evidence = Evidence(first.parts, lines, before, after, frozenset(noise), asked, seed)
    return causes.of_the_training(evidence) if cut is None else causes.of_a_resume(evidence)


def command(
    described: Experiment,
    base: Path,
    steps: int,
    cuts: Sequence[int] | Literal["every"] | None,
    *,
    as_json: bool,
) -> int:
    """Verify, print the verdict, return the exit code: 0 identical, 1 not."""
    verdict = verify(described, base, steps, cuts)
    if as_json:
        first = verdict.difference
        fields: dict[str, Any] = {"exact": verdict.exact, "steps": verdict.steps, "cuts": verdict.cuts}
        if not verdict.exact:
            fields |= {"cut": verdict.cut, "failure": verdict.failure}
            fields |= {"causes": [{"cause": cause, "remedy": remedy} for cause, remedy in verdict.causes]}
        if first is not None:
            fields |= {"step": first.step, "rank": first.rank, "parts": first.parts}
        print(json.dumps({**fields, "text": verdict.text()}))
    else:
        print(verdict.text())
    return EXIT_DONE if verdict.exact else EXIT_FAILED
