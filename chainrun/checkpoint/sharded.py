"""State that lies in shards on several ranks: the DTensors of `fully_shard` and of tensor parallelism.

In a rank's file an empty tensor on the device ``meta`` stands for each of them, and ``sharded`` says where it
is; the shards lie beside it in the folder ``sharded``, in the format of `torch.distributed.checkpoint`: a file a
rank, and ``.metadata``. No collective of torch.distributed takes part. Every rank plans and writes what is its
own, and rank 0 puts the plans together, which come with the ranks' reports: so a rank that cannot write is
reported like any other, and a function that has destroyed its process group can still be saved.
"""

from __future__ import annotations

import base64
import copy
import functools
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from chainrun.checkpoint import image
from chainrun.checkpoint.source import digest
from chainrun.errors import CheckpointError, RegisterError
from chainrun.rundir import fsync_dir

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Keys: TypeAlias = "tuple[Any, ...]"
Files: TypeAlias = "dict[str, dict[str, Any]]"  # by name: size and xxh3_128

FOLDER = "sharded"
_METADATA = ".metadata"  # as torch.distributed.checkpoint calls it
_WHERE = ("objects", "gradients")  # what is set when everything it depends on exists


def is_sharded(thing: Any) -> bool:
    """Whether it is a DTensor; torch's module for them is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(thing, module.DTensor)


def _is_any_sharded(tree: Any) -> bool:
    """Whether there is a DTensor in a tree; quick, for most have none, and many thousands of other tensors."""
    module = sys.modules.get("torch.distributed.tensor")
    if module is None:
        return False
    parts, kind, seen = [tree], module.DTensor, set()
    while parts:
        part = parts.pop()
        if id(part) in seen:  # it may contain itself, which is refused later
            continue
        seen.add(id(part))
        for value in part.values() if isinstance(part, dict) else part:
            if isinstance(value, (dict, list, tuple)):
                parts.append(value)
            elif isinstance(value, kind):
                return True
    return False


def map_tensors(tree: Any, keys: Keys, change: Callable[[Keys, torch.Tensor], Any]) -> Any:
    """Return the tree with its tensors changed; what holds none that do is the same object."""
    if isinstance(tree, torch.Tensor):
        return change(keys, tree)
    if not isinstance(tree, (dict, list, tuple)):
        return tree
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    changed = {key: new for key, old in items if (new := map_tensors(old, (*keys, key), change)) is not old}
    if not changed:
        return tree
    if isinstance(tree, tuple):
        return tuple(changed.get(index, old) for index, old in items)
    result = copy.copy(tree)  # a module's state_dict has attributes that loading it reads
    for key, value in changed.items():
        result[key] = value
    return result


def name_of(keys: Keys) -> str:
    """Return the name of a place in a rank's tree, by which its shards are found."""
    return ".".join(map(str, keys))


# ---- what is in this process -------------------------------------------------------------------


@functools.cache
def _first_rank(mesh: DeviceMesh) -> int:
    return int(mesh.mesh.min())


def note(module: torch.nn.Module) -> None:
    """Ask a module's device meshes what they tell only as long as there is a process group."""
    for parameter in module.parameters():
        if is_sharded(parameter):
            _first_rank(parameter.device_mesh)  # type: ignore[attr-defined]


def put_away(module: torch.nn.Module) -> None:
    """Give a module its sharded parameters back, where a forward has left the whole ones of `fully_shard` in place."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for each in module.modules() if fsdp else ():
        if fsdp and isinstance(each, fsdp.FSDPModule):
            each.reshard()


def unreduced(module: torch.nn.Module) -> bool:
    """Whether `fully_shard` holds gradients that are still to be reduced over the ranks.

    They stay where nobody can ask for them, after a backward under ``set_requires_gradient_sync(False)``, until
    the one that reduces them.
    """
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    for each in module.modules():
        state: Any = getattr(each, "_get_fsdp_state", lambda: None)()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            if getattr(group, "_partial_reduce_output", None) is not None:
                return True
            for one in getattr(group, "fsdp_params", ()):
                whole = getattr(one, "_unsharded_param", None)
                if one.unsharded_accumulated_grad is not None or getattr(whole, "grad", None) is not None:
                    return True
    return False


# ---- saving ------------------------------------------------------------------------------------


def split(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, DTensor]]:
    """Take the DTensors out of a rank's tree; return what goes into its file, and them by name.

    Raises:
        RegisterError: there is one where no restore could set it.
    """
    if not _is_any_sharded(tree):
        return tree, {}
    found: dict[str, DTensor] = {}
    places: dict[str, dict[str, Any]] = {}

    def take(keys: Keys, tensor: Any) -> Any:
        if not is_sharded(tensor):
            return tensor
        name = name_of(keys)
        if keys[0] not in _WHERE:
            raise RegisterError(
                f"{'run.' * (keys[0] == 'state')}{name} is a DTensor, which is saved only as part of a registered "
                "object; register what it belongs to, or keep tensor.full_tensor()"
            )
        if name in places:
            raise RegisterError(f"two DTensors would be saved as '{name}'; give one another name")
        mesh, first = tensor.device_mesh, _first_rank(tensor.device_mesh)
        # tensors on other ranks may have the name too, as the parts of a pipeline do
        key = f"{name}@{first}" if first else name
        here = mesh.get_coordinate() is not None  # else this rank holds nothing of it
        partial = here and any(one.is_partial() for one in tensor.placements)
        own = partial or (here and all(one.is_replicate() for one in tensor.placements))
        places[name] = {
            "key": key,
            "mesh": list(mesh.shape),
            "placements": spell(tensor),
            "own": own,  # in the rank's own file: a sum not made yet, or all of it as a plain tensor would be
            "partial": partial,
        }
        if own:
            return tensor.to_local().detach()
        found[key] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    return {**map_tensors(tree, (), take), "sharded": places}, found


def spell(tensor: DTensor) -> list[list[Any]]:
    """Return the placements as plain data: the class, and what it is made with."""
    names = ("reduce_op", "dim", "split_factor")
    return [
        [type(one).__name__, {name: getattr(one, name) for name in names if hasattr(one, name)}]
        for one in tensor.placements
    ]


def write(folder: Path, rank: int, tensors: dict[str, DTensor]) -> tuple[Files, str]:
    """Write this rank's shards durably; return the file by its name, and the plan for rank 0.

    Raises:
        CheckpointError: the file cannot be written.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.planner import SavePlan

    mine = {key: tensor for key, tensor in tensors.items() if _writes(tensor)}
    try:
        writer = FileSystemWriter(folder)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner(mine, is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0)
        plan = writer.prepare_local_plan(planner.create_local_plan())
        plan = writer.prepare_global_plan([*[SavePlan([])] * rank, plan])[rank]  # names the file by the rank
        results = writer.write_data(planner.finish_plan(plan), planner).wait() if mine else []
        files = {name: _stated(folder / name) for name in {one.storage_data.relative_path for one in results}}
    except Exception as error:
        size = sum(tensor.to_local().nbytes for tensor in mine.values())
        raise CheckpointError(
            f"{folder} could not be written: {image.reason(error, folder, size)}"
        ) from error
    return files, base64.b85encode(zlib.compress(pickle.dumps((plan, results)), 1)).decode()


def _writes(tensor: DTensor) -> bool:
    """Whether this rank writes a shard of it: of the ranks that hold the same one, the first does."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None or not tensor.to_local().numel():
        return False
    return not any(at and one.is_replicate() for at, one in zip(coordinate, tensor.placements, strict=True))


def finish(folder: Path, plans: list[str]) -> Files:
    """Write what says where every shard is, on rank 0, durably; return its file.

    Raises:
        CheckpointError: the ranks' shards do not make whole tensors, or it cannot be written.
    """
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    decoded = [pickle.loads(zlib.decompress(base64.b85decode(plan))) for plan in plans]
    try:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        planner.set_up_planner({}, is_coordinator=True)
        _, metadata = planner.create_global_plan([plan for plan, _ in decoded])
        FileSystemWriter(folder).finish(metadata, [results for _, results in decoded])
        fsync_dir(folder)
        return {_METADATA: _stated(folder / _METADATA)}
    except Exception as error:
        raise CheckpointError(f"{folder} could not be written: {image.reason(error, folder)}") from error


def _stated(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "xxh3_128": digest(path)}
