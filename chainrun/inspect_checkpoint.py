"""What a checkpoint holds, for people and as JSON, without torch; and its weights as a safetensors file."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chainrun.checkpoint import inside
from chainrun.checkpoint.store import Committed, flaw, rank_file, read_committed
from chainrun.errors import EXIT_DONE, EXIT_FAILED, UsageError
from chainrun.inspect_runs import size

LARGEST = 10  # tensors that are listed unless all are asked for
_ABOUT = ("run", "step", "epoch", "segment", "reason", "world_size")


def show(path: Path, *, rank: int, every: bool, verify: bool, as_json: bool) -> int:
    """Print what a checkpoint is and what one rank has in it.

    Only the sizes of its files are checked, unless `verify`: to read hundreds of gigabytes from a shared
    filesystem is no look. A restore verifies every byte anyway.
    """
    checkpoint = read_committed(path)
    why = _verified(checkpoint) if verify else flaw(checkpoint, hashes=False)
    held = _held(checkpoint, rank) if why is None else None
    if as_json:
        about = {"path": str(path), "size": checkpoint.size, "flaw": why, "verified": verify and why is None}
        print(json.dumps({**about, "manifest": checkpoint.manifest, "held": held}, indent=1))
        return EXIT_DONE if why is None else EXIT_FAILED
    _print_about(checkpoint, why, verify=verify)
    if held is None:
        return EXIT_FAILED
    _print_held(held, checkpoint.manifest["world_size"], every=every)
    return EXIT_DONE


def export(path: Path, output: Path, name: str | None) -> int:
    """Write the tensors of one registered object as a safetensors file."""
    from chainrun.checkpoint.public import Checkpoint

    left_out = Checkpoint(path).export(output, object=name)
    print(f"{output}: {size(output.stat().st_size)}")
    if left_out:
        shown = ", ".join(left_out[:5]) + f" and {len(left_out) - 5} more" * (len(left_out) > 5)
        print(f"left out, no tensors: {shown}")
    return EXIT_DONE


def _verified(checkpoint: Committed) -> str | None:
    """Read every byte; return why the checkpoint cannot be trusted."""
    bar = tqdm(total=checkpoint.size, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
    with bar:
        return flaw(checkpoint, read=bar.update)


def _held(checkpoint: Committed, rank: int) -> dict[str, Any]:
    """Return what one rank's file holds, as plain data."""
    name = rank_file(rank)
    if name not in checkpoint.manifest["files"]:
        ranks = checkpoint.manifest["world_size"]
        raise UsageError(
            f"{checkpoint.path} has {ranks} ranks, there is no rank {rank}; give 0 to {ranks - 1}"
        )
    tree = inside.read(checkpoint.path / name)
    seen: set[str] = set()
    parts: list[dict[str, Any]] = []

    def part(name: str, kind: str, tensors: int, *trees: Any) -> None:
        parts.append({"name": name, "kind": kind, "tensors": tensors, "bytes": inside.space(trees, seen)})

    listed: list[tuple[str, str, inside.Tensor]] = []  # the name shown, the one that shards have, the tensor
    for key, value in tree["objects"].items():
        kind = "generator" if isinstance(value, dict) and list(value) == ["generator"] else "object"
        unused = tree["gradients"].get(key)
        found = [(n, f"objects.{n}", tensor) for n, tensor in inside.tensors(value, key)]
        found += [(f"{n} (gradient)", f"gradients.{n}", tensor) for n, tensor in inside.tensors(unused, key)]
        part(key, kind, len(found), value, unused, tree["extras"].get(key))
        listed += found
    for key, value in tree["loaders"].items():
        found = [(n, f"loaders.{n}", tensor) for n, tensor in inside.tensors(value, key)]
        part(key, "loader", len(found), value)
        listed += found
    part("run.state", "state", sum(1 for _ in inside.tensors(tree["state"])), tree["state"])
    part("random state, place", "rest", 0, tree)  # all that was not counted above
    return {
        "rank": rank,
        "parts": [one for one in parts if one["bytes"] or one["kind"] not in ("state", "rest")],
        "tensors": _described(listed, tree.get("sharded", {})),
        "random": [*tree["rng"], *(one["name"] for one in parts if one["kind"] == "generator")],
        "state": [str(key) for key in tree["state"]],
    }


def _described(
    listed: list[tuple[str, str, inside.Tensor]], sharded: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return tensors as plain data; of those that lie in the same memory, all but the first name that one."""
    first: dict[str, str] = {}
    described = []
    for name, place, tensor in listed:
        owner = first.setdefault(tensor.storage, name) if tensor.storage else name
        described.append(
            {
                "name": name,
                "dtype": tensor.dtype,
                "shape": list(tensor.shape),
                "bytes": tensor.nbytes,
                "shares": owner if owner != name else None,
                "mesh": sharded[place]["mesh"] if place in sharded else None,
            }
        )
    return described


def _print_about(checkpoint: Committed, why: str | None, *, verify: bool) -> None:
    manifest = checkpoint.manifest
    written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(manifest["time"]))
    files = len(manifest["files"])
    if why is None and verify:
        verdict = "yes, every file has its stated size and hash"
    elif why is None:
        verdict = "sizes only; --verify reads and hashes all of it"
    else:
        verdict = f"no: {why}"
    rows = [
        *((key, manifest[key]) for key in _ABOUT),
        ("written", written),
        ("size", f"{size(checkpoint.size)} in {files} file{'s' * (files != 1)}"),
        ("verified", verdict),
        *manifest["environment"].items(),
    ]
    print(checkpoint.path)
    for key, value in rows:
        print(f"  {key:<12} {value}")


def _print_held(held: dict[str, Any], ranks: int, *, every: bool) -> None:
    print(f"  {'state':<12} {', '.join(held['state']) or '-'}")
    print(f"  {'random':<12} {', '.join(held['random'])}")
    total = sum(part["bytes"] for part in held["parts"]) or 1
    print(f"rank {held['rank']} of {ranks}: {size(total)}, of which")
    width = max(len(part["name"]) for part in held["parts"])
    for part in sorted(held["parts"], key=lambda part: -part["bytes"]):
        count = f"  {part['tensors']} tensor{'s' * (part['tensors'] != 1)}" if part["tensors"] else ""
        print(f"  {part['name']:<{width}}  {size(part['bytes']):>8} {part['bytes'] / total:>6.1%}{count}")
    tensors = held["tensors"]
    if not every and len(tensors) > LARGEST:
        tensors = sorted(tensors, key=lambda tensor: -tensor["bytes"])[:LARGEST]
        print(f"the largest {LARGEST} of {len(held['tensors'])} tensors (--all lists them in order)")
    else:
        print("tensors")
    width = max((len(tensor["name"]) for tensor in tensors), default=0)
    for tensor in tensors:
        notes = f"  in the memory of {tensor['shares']}" if tensor["shares"] else ""
        notes += f"  sharded over a mesh of {tuple(tensor['mesh'])}" if tensor["mesh"] else ""
        shape = "x".join(map(str, tensor["shape"])) or "scalar"
        print(f"  {tensor['name']:<{width}}  {size(tensor['bytes']):>8}  {tensor['dtype']:<8} {shape}{notes}")
