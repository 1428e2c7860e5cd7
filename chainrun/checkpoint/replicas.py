"""State that several ranks hold alike, written once: under DDP the weights and the optimizer's moments.

Rank 0 says what it holds by the hash of every tensor's name, kind and bits. Another rank leaves out of its file
what it holds too: an empty tensor on the device ``meta`` stands for it, and ``replicated`` names it. Nothing is
taken on trust: what differs by one bit, as the running mean of a batch norm does, is in the rank's own file.
"""

from __future__ import annotations

from typing import Any

import torch
import xxhash

from chainrun.checkpoint.sharded import Keys, map_tensors

_SIZE = 16  # bytes of a mark
_LEAST = 256  # bytes of a tensor that is worth its mark


def _mark(name: str, tensor: torch.Tensor) -> bytes | None:
    """Return the hash of a tensor's name, kind and bits; None of one that is written as it is."""
    plain = tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)
    if not plain or type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.nbytes < _LEAST:
        return None
    kind = (name, type(tensor).__name__, str(tensor.dtype), tensor.stride(), tensor.requires_grad)
    digest = xxhash.xxh3_128(repr((kind, tuple(tensor.shape))).encode())
    bits = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    digest.update(bits.flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def marks(tree: dict[str, Any]) -> bytes:
    """Return the marks of a rank's registered objects, one after the other."""
    found: list[bytes] = []

    def look(keys: Keys, tensor: torch.Tensor) -> torch.Tensor:
        if mark := _mark(repr(keys), tensor):
            found.append(mark)
        return tensor

    map_tensors(tree.get("objects", {}), (), look)
    return b"".join(found)


def split(tree: dict[str, Any], theirs: bytes) -> dict[str, Any]:
    """Return a rank's tree without what rank 0 holds too.

    Args:
        theirs: what `marks` returned of rank 0's.
    """
    known = {theirs[at : at + _SIZE] for at in range(0, len(theirs), _SIZE)}
    left_out: list[str] = []

    def take(keys: Keys, tensor: torch.Tensor) -> torch.Tensor:
        if _mark(repr(keys), tensor) not in known:
            return tensor
        left_out.append(repr(keys))
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
