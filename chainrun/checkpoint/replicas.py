"""State that several ranks hold alike, written once: under DDP the weights and the optimizer's moments.

Rank 0 says what it holds by the hash of every tensor's name, kind and bits. Another rank leaves out of its file
what it holds too: an empty tensor on the device ``meta`` stands for it, and ``replicated`` names it. Nothing is
taken on trust: what differs by one bit, as the running mean of a batch norm does, is in the rank's own file.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash

from chainrun.checkpoint import device
from chainrun.checkpoint.sharded import Keys, map_tensors

_SIZE = 16  # bytes of a mark
_LEAST = 256  # bytes of a tensor that is worth its mark


def _marks(objects: Any) -> dict[str, bytes]:
    """Return by its place in the tree the hash of every tensor's name, kind and bits.

    Those that are small or of a rare kind are not among them: they are written as they are.
    """
    kinds: dict[str, bytes] = {}
    elsewhere: dict[str, torch.Tensor] = {}
    found: dict[str, bytes] = {}

    def look(keys: Keys, tensor: torch.Tensor) -> torch.Tensor:
        plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
        if plain and type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.nbytes >= _LEAST:
            name = repr(keys)
            kind = (name, type(tensor).__name__, tensor.device.type, str(tensor.dtype), tensor.stride())
            kinds[name] = repr((kind, tensor.requires_grad, tuple(tensor.shape))).encode()
            bits = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten().view(torch.uint8)
            if tensor.device.type == "cpu":
                digest = xxhash.xxh3_128(kinds[name])
                digest.update(bits.numpy().data)
                found[name] = digest.digest()
            else:
                elsewhere[name] = bits
        return tensor

    map_tensors(objects, (), look)
    by_device: dict[torch.device, list[str]] = {}
    for name, bits in elsewhere.items():
        by_device.setdefault(bits.device, []).append(name)
    for names in by_device.values():
        for name, digest in zip(names, device.digests([elsewhere[name] for name in names]), strict=True):
            found[name] = xxhash.xxh3_128_digest(kinds[name] + digest)
    return found


def marks(tree: dict[str, Any]) -> bytes:
    """Return the marks of a rank's registered objects, one after the other."""
    return b"".join(_marks(tree.get("objects", {})).values())


def split(tree: dict[str, Any], theirs: bytes) -> dict[str, Any]:
    """Return a rank's tree without what rank 0 holds too.

    Args:
        theirs: what `marks` returned of rank 0's.
    """
    known = {theirs[at : at + _SIZE] for at in range(0, len(theirs), _SIZE)}
    mine = _marks(tree.get("objects", {}))
    left_out: list[str] = []

    def take(keys: Keys, tensor: torch.Tensor) -> torch.Tensor:
        name = repr(keys)
        if mine.get(name) not in known:
            return tensor
        left_out.append(name)
        return torch.empty_like(tensor, device="meta")

    objects = map_tensors(tree.get("objects", {}), (), take)
    return {**tree, "objects": objects, "replicated": left_out} if left_out else tree


def join(tree: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """Return a rank's tree with what is in rank 0's only.

    Args:
        first: rank 0's tree.
    """
    names = set(tree["replicated"])
    theirs: dict[str, torch.Tensor] = {}

    def note(keys: Keys, tensor: torch.Tensor) -> torch.Tensor:
        theirs[repr(keys)] = tensor
        return tensor

    def put(keys: Keys, tensor: torch.Tensor) -> torch.Tensor:
        return theirs[repr(keys)] if repr(keys) in names else tensor

    map_tensors(first["objects"], (), note)
    return {**tree, "objects": map_tensors(tree["objects"], (), put)}
