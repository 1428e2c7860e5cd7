"""`chainrun verify`: is this training, cut and resumed, the same training? Run it and see.

The function runs twice without interruption (a training that does not repeat itself cannot be resumed
exactly either) and once from each cut; the cut runs start from the first run's checkpoints. After every step
each rank writes a fingerprint of its batch, metrics, registered objects and random streams.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from tqdm import tqdm

from chainrun import experiment, function
from chainrun.errors import EXIT_DONE, EXIT_FAILED, ChainrunError
from chainrun.experiment import Experiment
from chainrun.launch import local, submit
from chainrun.rundir import RunDir, read_lines

STEPS = 20  # compared by default

Lines: TypeAlias = dict[tuple[int, int], dict[str, Any]]  # by (step, rank)


@dataclass(frozen=True)
class Difference:
    """The first place at which two runs differ."""

    step: int
    rank: int
    parts: list[str]
    unregistered: list[str]


@dataclass(frozen=True)
class Verdict:
    """What `verify` found."""

    steps: int
    cuts: list[int]
    cut: int | None = None
    """After which step the run was cut that differs; None where all are identical, or two whole runs differ."""
    difference: Difference | None = None

    @property
    def exact(self) -> bool:
        return self.difference is None

    def text(self) -> str:
        """Return the verdict in words."""
        if self.difference is None:
            return f"identical over {self.steps} steps, {len(self.cuts)} cuts"
        first = self.difference
        where = f"step {first.step}, rank {first.rank}: {', '.join(first.parts)}"
        if self.cut is None:
            return (
                f"the training does not repeat itself: two uninterrupted runs differ first at {where}\n"
                "likely cause: something that is not seeded (seed: null, a generator made from the clock, the "
                "hash seed), a kernel that is not deterministic (try deterministic: true), or data that changes"
            )
        return f"cut after step {self.cut}, the run differs first at {where}\nlikely cause: {_cause(first)}"


def _cause(first: Difference) -> str:
    plain = [name for name in first.unregistered if "DataLoader" in name]
    others = [name for name in first.unregistered if "DataLoader" not in name]
    random = [part for part in first.parts if part.startswith("random state")]
    rest = [part for part in first.parts if part not in random]
    if others:
        return f"{others[0]} is not registered; add it to run.register(...)"
    if plain and "torch.utils.data" in plain[0]:
        return "a torch.utils.data.DataLoader is used; build it as chainrun.DataLoader(...) and register it"
    if plain:
        return "a chainrun.DataLoader is not registered; add it to run.register(...)"
    if rest == ["metrics"] and not random:
        return "a local variable that goes into the metrics is carried over the cut; keep it in run.state"
    if not rest:
        return "something draws random numbers between the restore and the loop, or fewer than it did"
    if rest[0].startswith("batch"):
        return "the data set or the sampler depends on something that is not saved; give it state_dict, or register it"
    return (
        "a value that the step depends on is not saved (a local variable carried over the cut, an object that "
        "is not registered, the time of day); register it, or keep it in run.state"
    )


def verify(
    described: Experiment, base: Path, steps: int = STEPS, cuts: Sequence[int] | None = None
) -> Verdict:
    """Compare uninterrupted and cut runs of an experiment over its first steps.

    Args:
        steps: how many to compare.
        cuts: after which steps to cut; by default a few, spread.

    Raises:
        ChainrunError: the function fails, or takes no step.
    """
    source = function.find_function(described, base)
    function.check_arguments(source, described.args)
    cuts = list(cuts) if cuts is not None else sorted({1, steps // 3, 2 * steps // 3, steps - 1} - {0})
    cuts = [cut for cut in cuts if 0 < cut < steps]
    folder = Path(tempfile.mkdtemp(prefix="chainrun-verify-"))
    try:
        whole = _Piece(folder, "whole", described, steps, save_at=cuts)
        pieces = 2 + len(cuts)
        with tqdm(total=pieces, desc="verify", unit="run", disable=not sys.stderr.isatty()) as bar:
            reference = whole.run()
            bar.update()
            last = max(step for step, _ in reference)
            again = _Piece(folder, "again", described, steps).run()
            bar.update()
            if found := _first_difference(reference, again, 0):
                return Verdict(last, cuts, None, found)
            for cut in cuts:
                if cut < last:
                    piece = _Piece(folder, f"cut-{cut}", described, steps)
                    if found := _first_difference(reference, piece.run(after=(whole, cut)), cut):
                        return Verdict(last, cuts, cut, found)
                bar.update()
        return Verdict(last, [cut for cut in cuts if cut < last])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Piece:
    """One run, or the rest of one, in a folder of its own."""

    def __init__(
        self, folder: Path, name: str, described: Experiment, steps: int, save_at: Sequence[int] = ()
    ) -> None:
        policy = experiment.Checkpoint(every=None, keep=1_000_000)
        self._described = replace(described, name=name, dir=folder, checkpoint=policy)
        self._steps, self._save_at = steps, save_at
        self._record = folder / f"{name}.jsonl"
        self.dir = RunDir(folder / name)

    def run(self, after: tuple[_Piece, int] | None = None) -> Lines:
        submit.create(self.dir, self._described)
        if after is not None:
            whole, cut = after
            shutil.copytree(whole.dir.checkpoint(cut), self.dir.checkpoint(cut), copy_function=os.link)
        more = {"record": str(self._record), "save_at": list(self._save_at)}
        code = local.run_one(self.dir, self._described, [self._steps], **more)
        if code == EXIT_FAILED:
            raise ChainrunError("the function failed, there is nothing to compare")
        lines = {(line["step"], line["rank"]): line for line in read_lines(self._record)}
        if not lines:
            raise ChainrunError(
                "the function took no step: call run.step() after each optimization step, or use run.steps()"
            )
        return lines


def _first_difference(reference: Lines, other: Lines, after: int) -> Difference | None:
    for step, rank in sorted(reference):
        if step <= after:
            continue
        a, b = reference[step, rank], other.get((step, rank))
        if b is None:
            return Difference(step, rank, ["the step itself, which is missing"], [])
        parts = list(_parts(a["parts"], b["parts"]))
        if parts:
            return Difference(step, rank, parts, b["unregistered"])
    extra = sorted(set(other) - set(reference))
    return Difference(*extra[0], ["the step itself, which is one too many"], []) if extra else None


def _parts(a: dict[str, str], b: dict[str, str]) -> Iterator[str]:
    for name in {**a, **b}:
        if a.get(name) != b.get(name):
            yield name


def command(
    described: Experiment, base: Path, steps: int, cuts: Sequence[int] | None, *, as_json: bool
) -> int:
    """Verify, print the verdict, return the exit code: 0 identical, 1 not."""
    verdict = verify(described, base, steps, cuts)
    if as_json:
        first = verdict.difference
        fields: dict[str, Any] = {"exact": verdict.exact, "steps": verdict.steps, "cuts": verdict.cuts}
        if first is not None:
            fields |= {"cut": verdict.cut, "step": first.step, "rank": first.rank, "parts": first.parts}
        print(json.dumps({**fields, "text": verdict.text()}))
    else:
        print(verdict.text())
    return EXIT_DONE if verdict.exact else EXIT_FAILED
