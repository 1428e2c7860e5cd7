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
import math
import pickle
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from chainrun.checkpoint import image
from chainrun.errors import CheckpointError, RegisterError, RestoreError
from chainrun.rundir import fsync_dir

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

Keys: TypeAlias = "tuple[Any, ...]"
Files: TypeAlias = "dict[str, dict[str, Any]]"  # by name: size and xxh3_128
Box: TypeAlias = (
    "tuple[torch.Tensor, ChunkStorageMetadata]"  # to read into; where it lies in the whole tensor
)

FOLDER = "sharded"
_METADATA = ".metadata"  # as torch.distributed.checkpoint calls it
_WHERE = ("objects", "gradients")  # what is set when everything it depends on exists


def is_sharded(thing: Any) -> bool:
    """Whether it is a DTensor; torch's module for them is not imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(thing, module.DTensor)


def _map(tree: Any, keys: Keys, change: Callable[[Keys, torch.Tensor], Any]) -> Any:
    """Return the tree with its tensors changed; what holds none that do is the same object."""
    if isinstance(tree, torch.Tensor):
        return change(keys, tree)
    if not isinstance(tree, (dict, list, tuple)):
        return tree
    items = list(tree.items() if isinstance(tree, dict) else enumerate(tree))
    changed = {key: new for key, old in items if (new := _map(old, (*keys, key), change)) is not old}
    if not changed:
        return tree
    if isinstance(tree, tuple):
        return tuple(changed.get(index, old) for index, old in items)
    result = copy.copy(tree)  # a module's state_dict has attributes that loading it reads
    for key, value in changed.items():
        result[key] = value
    return result


def _name(keys: Keys) -> str:
    return ".".join(map(str, keys))


# ---- what is in this process -------------------------------------------------------------------


def counterparts(thing: Any) -> Callable[[Keys], tuple[Any, bool]]:
    """Return what finds a registered object's own tensor for a saved one, as `Shards.fill` asks for it.

    An optimizer makes its state in its first step; before, the parameter shows how it will lie.
    """
    state: list[Any] = []

    def find(keys: Keys) -> tuple[Any, bool]:
        if not state:
            state.append(thing.state_dict())
        at = state[0]
        for key in keys[2:]:
            try:
                at = at[key]
            except (KeyError, IndexError, TypeError):
                at = None
                break
        if isinstance(at, torch.Tensor):
            return at, True
        if keys[2] == "state" and len(keys) > 4 and hasattr(thing, "parameters"):
            return thing.parameters[keys[3]], False
        return None, False

    return find


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
    found: dict[str, DTensor] = {}
    places: dict[str, dict[str, Any]] = {}

    def take(keys: Keys, tensor: Any) -> Any:
        if not is_sharded(tensor):
            return tensor
        name = _name(keys)
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
        partial = any(one.is_partial() for one in tensor.placements)
        own = partial or all(one.is_replicate() for one in tensor.placements)
        places[name] = {
            "key": key,
            "mesh": list(mesh.shape),
            "placements": _spell(tensor),
            "own": own,  # in the rank's own file: a sum not made yet, or all of it as a plain tensor would be
            "partial": partial,
        }
        if own:
            return tensor.to_local().detach()
        found[key] = tensor.detach()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    if "torch.distributed.tensor" not in sys.modules:
        return tree, {}
    split_tree = _map(tree, (), take)
    return ({**split_tree, "sharded": places} if places else tree), found


def _spell(tensor: DTensor) -> list[list[Any]]:
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
    return {"size": path.stat().st_size, "xxh3_128": image.digest(path)}


# ---- restoring ---------------------------------------------------------------------------------


class Shards:
    """The DTensors of a checkpoint, for the tree of one rank.

    Args:
        checkpoint: its directory.
        tree: a rank's tree.
        reshard: whether they may be laid out in another way than they were.
    """

    def __init__(self, checkpoint: Path, tree: dict[str, Any], *, reshard: bool = False) -> None:
        self._folder, self._reshard = checkpoint / FOLDER, reshard
        self._places: dict[str, dict[str, Any]] = tree.get("sharded", {})
        self._metadata: Metadata | None = None
        self._read: dict[str, torch.Tensor] = {}  # by key, on the CPU: a restore sets everything twice

    def full(self, keys: Keys, tree: Any) -> Any:
        """Return a part of the rank's tree with whole tensors, on the CPU.

        Raises:
            CheckpointError: a shard cannot be read.
        """
        boxes: dict[str, Box] = {}

        def take(keys: Keys, saved: torch.Tensor) -> Any:
            place = self._places.get(_name(keys))
            if place is None or place["own"]:
                return saved
            whole = torch.empty(saved.shape, dtype=saved.dtype)
            boxes[place["key"]] = whole, _all_of(whole)
            return whole

        tree = _map(tree, keys, take)
        self._fetch(boxes)
        return tree

    @torch.no_grad()
    def fill(self, keys: Keys, tree: Any, live: Callable[[Keys], tuple[Any, bool]]) -> Any:
        """Return a part of the rank's tree with DTensors where there were some.

        Args:
            live: gives, by its keys, the tensor of this process that a saved one is meant for and True, or one
                that is laid out like it and False.

        Raises:
            RestoreError: a tensor is laid out in another way, and `reshard` is not given.
            CheckpointError: a shard cannot be read.
        """
        boxes: dict[str, Box] = {}
        locals_: dict[str, torch.Tensor] = {}

        def take(keys: Keys, saved: torch.Tensor) -> Any:
            name = _name(keys)
            place = self._places.get(name)
            if place is None:
                return saved
            mine, exact = live(keys)
            target = self._target(name, place, saved, mine, exact)
            if place["partial"]:
                return target
            local = target.to_local() if is_sharded(target) else target
            (chunk,) = target.__create_chunk_list__() if is_sharded(target) else (_all_of(target),)
            if place["own"]:
                local.copy_(saved[_ranges(chunk.offsets, chunk.sizes)])
            elif local.numel():
                locals_[place["key"]] = local
                boxes[place["key"]] = torch.empty(local.shape, dtype=local.dtype), chunk
            return target

        if not self._places:
            return tree
        tree = _map(tree, keys, take)
        unread = {key: box for key, box in boxes.items() if key not in self._read}
        self._fetch(unread)
        self._read.update({key: read for key, (read, _) in unread.items()})
        for key, local in locals_.items():
            local.copy_(self._read[key])
        return tree

    def _target(self, name: str, place: dict[str, Any], saved: torch.Tensor, live: Any, exact: bool) -> Any:
        """Return a tensor to read into; of one whose values are each rank's own, a copy."""
        plain = isinstance(live, torch.Tensor) and not is_sharded(live)
        if plain and self._reshard and not place["partial"]:
            return torch.empty(saved.shape, dtype=saved.dtype, device=live.device)
        if not is_sharded(live):
            found = "a plain tensor" if plain else "not there"
            raise RestoreError(
                f"'{name}' was saved as a DTensor and is {found} in this process; call fully_shard, or what else "
                "distributes it, before run.register(...), as the run that was saved did"
            )
        mesh = list(live.device_mesh.shape)
        laid_out = mesh == place["mesh"] and (not exact or _spell(live) == place["placements"])
        if not laid_out and (place["partial"] or not self._reshard):
            raise RestoreError(
                f"'{name}' was saved on a device mesh of shape {tuple(place['mesh'])} as {_said(place['placements'])}, "
                f"in this process it lies on {tuple(mesh)} as {_said(_spell(live))}; "
                + ("it is a sum still to be made over the ranks, so " if place["partial"] else "")
                + "build it as it was"
                + ("" if place["partial"] else ", or set checkpoint.reshard: true to lay it out anew")
            )
        if place["partial"]:
            return _from_local(saved.to(live.to_local().device, copy=True), live, place)
        if saved.shape == live.shape and (
            exact or mesh != place["mesh"] or _spell(live) == place["placements"]
        ):
            return torch.empty_like(live, dtype=saved.dtype, requires_grad=False)
        if len(mesh) != len(place["mesh"]):
            raise RestoreError(
                f"'{name}' was saved on a device mesh of {len(place['mesh'])} dimensions, and how it would lie on "
                f"one of {len(mesh)} is not known; start as many ranks as before"
            )
        from torch.distributed.tensor import empty

        device_mesh, placements = live.device_mesh, list(_placements(place))
        return empty(*saved.shape, dtype=saved.dtype, device_mesh=device_mesh, placements=placements)

    def _fetch(self, boxes: dict[str, Box]) -> None:
        """Read boxes of tensors, by their keys, whichever files the parts are in.

        Raises:
            CheckpointError: the files do not hold all of it.
        """
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
        from torch.distributed.checkpoint.filesystem import FileSystemReader
        from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
        from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

        class Into(DefaultLoadPlanner):
            def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
                target, _ = boxes[read_item.dest_index.fqn]
                return target[_ranges(read_item.dest_offsets, read_item.lengths)]

            def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
                pass

        items = []
        try:
            reader = FileSystemReader(self._folder)
            if self._metadata is None:
                self._metadata = reader.read_metadata()
            reader.set_up_storage_reader(self._metadata, True)
            for key, (target, chunk) in boxes.items():
                if not target.numel():
                    continue
                described: Any = self._metadata.state_dict_metadata[key]
                parts = create_read_items_for_chunk_list(key, described, [chunk])
                if sum(math.prod(part.lengths) for part in parts) != target.numel():
                    raise ValueError(f"not all of {key} is there")
                items += parts
            reader.read_data(LoadPlan(items), Into()).wait()
        except Exception as error:
            why = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise CheckpointError(f"{self._folder} could not be read: {why}") from error


def _ranges(offsets: torch.Size, sizes: torch.Size) -> tuple[slice, ...]:
    return tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes, strict=True))


def _all_of(tensor: torch.Tensor) -> ChunkStorageMetadata:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(torch.Size([0] * tensor.dim()), tensor.shape)


def _said(placements: list[list[Any]]) -> str:
    return ", ".join(f"{kind}({', '.join(map(str, given.values()))})" for kind, given in placements)


def _placements(place: dict[str, Any]) -> Iterator[Any]:
    from torch.distributed.tensor import placement_types

    for kind, given in place["placements"]:
        yield getattr(placement_types, kind)(**given)


def _from_local(local: torch.Tensor, live: DTensor, place: dict[str, Any]) -> DTensor:
    from torch.distributed.tensor import DTensor

    mesh, placements = live.device_mesh, list(_placements(place))
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=live.shape, stride=live.stride()
    )
