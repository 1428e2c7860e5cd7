"""The shards of a checkpoint, put where they belong: into the DTensors of this process, or whole tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from chainrun.checkpoint.sharded import FOLDER, Keys, is_sharded, map_tensors, name_of, spell
from chainrun.errors import CheckpointError, RestoreError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata
    from torch.distributed.tensor import DTensor

# a tensor to read into, and where it lies in the whole one
Box: TypeAlias = "tuple[torch.Tensor, ChunkStorageMetadata]"


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
            place = self._places.get(name_of(keys))
            if place is None or place["own"]:
                return saved
            whole = torch.empty(saved.shape, dtype=saved.dtype)
            boxes[place["key"]] = whole, _all_of(whole)
            return whole

        tree = map_tensors(tree, keys, take)
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
            name = name_of(keys)
            place = self._places.get(name)
            if place is None:
                return saved
            mine, exact = live(keys)
            target = self._target(name, place, saved, mine, exact)
            if place["partial"]:
                return target
            local = target.to_local() if is_sharded(target) else target
            if not local.numel():
                return target
            (chunk,) = target.__create_chunk_list__() if is_sharded(target) else (_all_of(target),)
            if place["own"]:
                local.copy_(saved[_ranges(chunk.offsets, chunk.sizes)])
            else:
                locals_[place["key"]] = local
                boxes[place["key"]] = torch.empty(local.shape, dtype=local.dtype), chunk
            return target

        if not self._places:
            return tree
        tree = map_tensors(tree, keys, take)
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
        laid_out = mesh == place["mesh"] and (not exact or spell(live) == place["placements"])
        if not laid_out and (place["partial"] or not self._reshard):
            raise RestoreError(
                f"'{name}' was saved on a device mesh of shape {tuple(place['mesh'])} as {_said(place['placements'])}, "
                f"in this process it lies on {tuple(mesh)} as {_said(spell(live))}; "
                + ("it is a sum still to be made over the ranks, so " if place["partial"] else "")
                + "build it as it was"
                + ("" if place["partial"] else ", or set checkpoint.reshard: true to lay it out anew")
            )
        if place["partial"]:
            return _from_local(saved.to(live.to_local().device, copy=True), live, place)
        if saved.shape == live.shape and (
            exact or mesh != place["mesh"] or spell(live) == place["placements"]
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
        if not boxes:
            return
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
