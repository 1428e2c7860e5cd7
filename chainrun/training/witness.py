"""The witness of a handoff: does the segment that goes on see what the segment that ended would have seen?

When a segment ends and its checkpoint is committed, its process could still train: each rank takes the batch
that would have come next and leaves, beside its file in the checkpoint, the fingerprints of that batch, of the
random streams and of the state. The next segment compares them with its own. Nothing depends on it: a witness
that is missing, torn or late changes no run, and the time it may take is bounded.

Beside it lies what the user's variables held (`lost`), which no checkpoint has.

A testimony is a dict from part (``state``, ``random streams``, ``next batch`` or ``end of the loop``) to the
fingerprints of the part's things by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from chainrun import journal
from chainrun.checkpoint import state
from chainrun.checkpoint.bits import fingerprint
from chainrun.checkpoint.store import seal, witness_file
from chainrun.rundir import RunDir, read_json
from chainrun.training.record import leaves
from chainrun.training.stop import kill

if TYPE_CHECKING:
    from chainrun.training.data import Chain
    from chainrun.training.lost import Told
    from chainrun.training.saving import Setting

Testimony: TypeAlias = dict[str, dict[str, str]]

MOST = 10.0  # seconds
MOST_TERMINATED = 1.0  # seconds: after a signal without a known end the process may be killed at any time
LEAST = 0.05  # seconds
RATE = 1e9  # bytes a second: fingerprints are at least so fast, copies from a device included
ENTRIES = 2000  # of one object; one that has more gets one fingerprint
LARGE = 1 << 20  # bytes of a tensor
THREADS = 4
RECORDED = 100  # differences in the journal


def seconds_for(time_left: float, reason: str) -> float:
    """Return how long a witness may take; three quarters of what is left stay for the handoff."""
    most = MOST_TERMINATED if reason in ("terminated", "signal") else MOST
    return min(most, time_left / 4)


def is_expected(reason: str) -> bool:
    """Whether a checkpoint taken for this reason was a segment's last, so that it should have a witness."""
    return reason not in ("periodic", "requested")


# ---- fingerprints by name


def streams_in(tree: dict[str, Any], generators: list[str]) -> dict[str, str]:
    """Return the fingerprints of the global streams and of the registered generators."""
    found = {f"random stream {name}": fingerprint(stream) for name, stream in tree["rng"].items()}
    return {**found, **{f"random stream '{n}'": fingerprint(tree["objects"][n]) for n in generators}}


def state_in(tree: dict[str, Any], generators: list[str]) -> dict[str, str]:
    """Return the fingerprints of all else in a state: registered objects, gradients, ``run.state``."""
    found: dict[str, str] = {}
    for name, content in tree["objects"].items():
        if name not in generators:
            found |= _of_object(name, content)
    for name, extra in tree["extras"].items():
        changed = extra.get("attributes", {}).get("values", {})
        found |= _of_object(name, {key.lstrip("."): value for key, value in changed.items()})
    for name, gradients in tree["gradients"].items():
        found |= _of_object(f"gradient of {name}", gradients)
    return {**found, **_of_object("run.state", tree["state"])}


def _of_object(name: str, content: Any) -> dict[str, str]:
    entries = dict(leaves(content, name))
    large = {path: leaf for path, leaf in entries.items() if state.nbytes(leaf) > LARGE}
    with ThreadPoolExecutor(THREADS) as threads:  # hashing a large one leaves the interpreter to others
        prints = dict(zip(large, threads.map(fingerprint, large.values()), strict=True))
    found = {path: prints.get(path) or fingerprint(leaf) for path, leaf in entries.items()}
    return found if len(found) <= ENTRIES else {name: fingerprint(sorted(found.items()))}


def _of_batch(loader: str, batch: Any) -> Testimony:
    return {"next batch": {f"next batch of '{loader}'": fingerprint(batch)}}


def _of_end(loader: str) -> Testimony:
    return {"end of the loop": {f"end of '{loader}'": "reached"}}


# ---- the segment that ends


def give(
    folder: Path,
    rank: int,
    tree: dict[str, Any],
    generators: list[str],
    chain: Chain | None,
    seconds: float,
    variables: Callable[[], Told],
) -> list[str]:
    """Leave a testimony in a committed checkpoint; return what is missing from it, and why.

    The process must not train on: with no workers the loader's next batch is made in it.

    Args:
        folder: the checkpoint.
        tree: this rank's state, as it was saved.
        generators: the names of the generators among its objects.
        chain: the loader at whose head the checkpoint was taken, None for another place.
        seconds: what it may take; it takes no more.
        variables: returns what the user's variables hold, which is left beside the testimony.
    """
    if seconds < LEAST:
        return ["no witness: no time is left for one"]
    testimony: Testimony = {}
    held: list[Told] = []
    missing: list[str] = []
    done: list[str] = []
    device = torch.accelerator.current_device_index() if torch.accelerator.is_available() else None

    def next_batch() -> None:
        assert chain is not None
        try:
            testimony.update(_of_batch(chain.name, chain.peek()))
        except StopIteration:
            testimony.update(_of_end(chain.name))

    parts: dict[str, Callable[[], None]] = {
        "random streams": lambda: testimony.update({"random streams": streams_in(tree, generators)}),
        "state": lambda: testimony.update(state=state_in(tree, generators)),
    }
    if (size := state.nbytes(tree["objects"])) > RATE * seconds / 2:
        del parts["state"]
        missing.append(f"no witness of the state: {size / 1e9:.1f} GB are too much for {seconds:.1f} s")
    parts["variables"] = lambda: held.append(variables())
    if chain is not None:
        parts["next batch"] = next_batch  # last: the data set may change what is registered

    def look() -> None:
        if device is not None:
            torch.accelerator.set_device_index(device)  # every thread has a current device of its own
        for part, take in parts.items():
            try:
                take()
            except BaseException as error:  # of the user's data set, whatever it raises
                said = str(error).partition("\n")[0]
                missing.append(f"no witness of the {part}: {type(error).__name__}: {said}")
            done.append(part)

    # a data set may hang for ever: a daemon thread does not keep the process from ending
    thread = threading.Thread(target=look, name="chainrun-witness", daemon=True)
    thread.start()
    thread.join(seconds)
    if late := [part for part in parts if part not in done]:
        missing.append(f"no witness of the {' and '.join(late)}: {seconds:.1f} s were not enough")
    told = dict(testimony)
    if chain is not None and not told.keys() - {"state", "random streams"}:
        kill(chain.processes)  # the thread, or the error's traceback, keeps the iterator that would end them
    path = folder / witness_file(rank)
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_bytes(
            seal({"testimony": told, "variables": held[0] if held else {}})
        )  # a torn one is none: not worth an fsync
        os.replace(temporary, path)
    except OSError as error:
        missing.append(f"no witness: {path}: {error.strerror}")
    return list(missing)


# ---- the segment that goes on


def read(folder: Path, rank: int) -> Testimony | None:
    """Return what was left in a checkpoint, None where there is nothing, or nothing whole."""
    content = _read(folder, rank)
    if not isinstance(content.get("testimony"), dict):
        return None
    told: Testimony = content["testimony"]
    return told


def variables(folder: Path, rank: int) -> Told:
    """Return what was left of the user's variables, nothing where nothing whole was left."""
    told: Told = _read(folder, rank).get("variables", {})
    return told


def _read(folder: Path, rank: int) -> dict[str, Any]:
    content = read_json(folder / witness_file(rank))
    if not isinstance(content, dict):
        return {}
    inside = {key: value for key, value in content.items() if key in ("testimony", "variables")}
    return inside if json.loads(seal(inside)) == content else {}


def hear(
    testimony: Testimony,
    tree: dict[str, Any],
    generators: list[str],
    chain: Chain | None,
    tell: Callable[[list[str], list[str]], None],
) -> None:
    """Compare a testimony with the restored state now, and with the loader's next batch when it comes.

    Args:
        testimony: what `read` returned.
        tree: this rank's state after the restore, in the form of the one given to `give`.
        generators, chain: as for `give`.
        tell: called once, with the parts compared and the names of the things that differ.
    """
    compared: list[str] = []
    differs: list[str] = []

    def compare(part: str, seen: dict[str, str]) -> None:
        told = testimony[part]
        compared.append(part)
        differs.extend(name for name in {**told, **seen} if told.get(name) != seen.get(name))

    if "state" in testimony:
        compare("state", state_in(tree, generators))
    if "random streams" in testimony:
        compare("random streams", streams_in(tree, generators))
    rest = testimony.keys() - {"state", "random streams"}
    if chain is None or not rest:
        tell(compared, differs)
        return
    (part,), loader = rest, chain.name

    def see(ended: bool, batch: Any) -> None:
        try:
            compare(part, (_of_end(loader) if ended else _of_batch(loader, batch)).get(part, {}))
            tell(compared, differs)
        except Exception as error:  # a diagnosis: the training is well without it
            print(f"chainrun: no witness of the {part}: {error}", file=sys.stderr)

    chain.see_next(see)


def report(run: RunDir, setting: Setting, step: int, compared: list[str], differs: list[str]) -> None:
    """Say and record what came out; of the other ranks only where something differs."""
    rank = setting.allocation.rank
    if rank and not differs:
        return
    event: dict[str, Any] = {"segment": setting.segment, "rank": rank, "step": step, "identical": not differs}
    event |= {"compared": compared, "differs": differs[:RECORDED]}
    line = journal.witnessed(event)
    if differs:
        line += (
            "; the training goes on, but not as it would have uncut. `chainrun verify` helps to find out why"
        )
    if rank == 0:
        setting.say(line)
    else:
        print(f"chainrun: rank {rank}: {line}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
        journal.record(run, "witness", **event)
