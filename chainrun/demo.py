"""`chainrun demo`: a chain and an uninterrupted run of the same training, compared bit for bit."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from chainrun import experiment, journal
from chainrun.checkpoint.store import Committed, Store
from chainrun.errors import EXIT_DONE, EXIT_FAILED, UsageError
from chainrun.launch import local, submit
from chainrun.rundir import RunDir

WALLTIME, MOST = 8.0, 128.0  # seconds
OVERRIDES = [
    "chain.stop_after_idle_segments=10"  # a busy machine may need most of a walltime to import torch
]


def _example() -> Path:
    """The digits example, in an installed package or beside a source checkout."""
    here = Path(__file__).parent
    for folder in (here / "_examples", here.parent / "examples"):
        if (folder / "digits.yaml").exists():
            return folder / "digits.yaml"
    raise UsageError(
        "the digits example is not installed; run `chainrun run examples/digits.yaml` from a checkout"
    )


def demo(folder: Path | None) -> int:
    """Train the digits example in a chain and in one piece; compare all that each has in the end."""
    try:
        import sklearn  # noqa: F401 the example's data set comes with it
    except ImportError:
        raise UsageError(
            "the demo trains on scikit-learn's digits: pip install 'chainrun[examples]'"
        ) from None
    folder = folder or Path(tempfile.mkdtemp(prefix="chainrun-demo-"))
    print(f"1. The digits example as a chain, every job cut after {WALLTIME:.0f} s:", flush=True)
    walltime = WALLTIME
    chained, code = _train(folder, "chain", walltime)
    while code == EXIT_FAILED and not chained.failed.exists() and walltime < MOST:
        walltime *= 2  # killed before the first boundary: most of it went into importing torch
        print(f"   This machine is busy; every job from here on is cut after {walltime:.0f} s:", flush=True)
        chained, code = _train(folder, "chain", walltime)
    if code:
        return code
    print("2. The same training without an interruption:", flush=True)
    whole, code = _train(folder, "uninterrupted", None)
    if code:
        return code
    segments = sum(1 for _ in journal.events(chained, "segment"))
    print(f"3. Compared, after {segments} segments against 1:", flush=True)
    differ = 0
    for what, same, count in compare(_final(chained), _final(whole)):
        print(f"   {what:<24} {count:>4} tensors and values   {'identical' if same else 'DIFFERENT'}")
        differ += not same
    print(f"   the runs are in {folder}")
    if differ:
        print("   The chain is not the uninterrupted training.")
        return EXIT_FAILED
    print("   Weights, optimizer and all random state are equal bit for bit.")
    return EXIT_DONE


def _train(folder: Path, name: str, walltime: float | None) -> tuple[RunDir, int]:
    example = _example()
    described = experiment.load(example, [f"name={name}", f"dir={folder}", *OVERRIDES])
    run, how = submit.prepare(described, example.parent)
    return run, EXIT_DONE if how == "done" else local.run_chain(run, described, walltime=walltime)


def _final(run: RunDir) -> Committed:
    newest = Store(run).newest()
    assert newest is not None
    return newest


def compare(a: Committed, b: Committed) -> Iterator[tuple[str, bool, int]]:
    """Yield (what, whether identical, how many leaves) for each thing that two checkpoints hold."""
    from chainrun.checkpoint import image
    from chainrun.checkpoint.bits import fingerprint
    from chainrun.checkpoint.store import rank_file

    for rank in range(a.manifest["world_size"]):
        one, other = (image.read(c.path / rank_file(rank)) for c in (a, b))
        parts: list[tuple[str, Any, Any]] = [
            (name, one["objects"].get(name), other["objects"].get(name))
            for name in {**one["objects"], **other["objects"]}
        ]
        parts += [(f"random state: {n}", one["rng"].get(n), other["rng"].get(n)) for n in one["rng"]]
        parts += [(n, one[n], other[n]) for n in ("state", "global_step", "epoch")]
        for name, mine, its in parts:
            yield name, fingerprint(mine) == fingerprint(its), sum(1 for _ in _leaves(mine))


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        for value in tree:
            yield from _leaves(value)
    else:
        yield tree
