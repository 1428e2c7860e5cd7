"""What is equal bit for bit: a fingerprint of tensors of all kinds, and of plain data with tensors in it."""

from __future__ import annotations

import enum
import re
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import xxhash

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of an object; another one in every process


def fingerprint(tree: Any) -> str:
    """Return the xxh3_64 of a tree of tensors and plain data: of the bits, so that -0.0 is not 0.0."""
    digest = xxhash.xxh3_64()
    for part in _parts(tree, set()):
        digest.update(part)
    return str(digest.hexdigest())


def _parts(tree: Any, seen: set[int]) -> Iterator[bytes | memoryview]:
    if isinstance(tree, torch.Tensor):
        yield from _parts_of_tensor(tree)
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield repr(key).encode()
            yield from _parts(value, seen)
    elif isinstance(tree, (list, tuple, deque)):
        yield f"{len(tree)}".encode()
        for value in tree:
            yield from _parts(value, seen)
    elif isinstance(tree, (np.ndarray, np.generic)):
        yield f"{tree.dtype}{tree.shape}".encode() + tree.tobytes()
    elif isinstance(tree, (set, frozenset)):
        yield "".join(sorted(map(repr, tree))).encode()
    elif isinstance(tree, float):
        yield tree.hex().encode()
    elif content := _attributes(tree):
        yield type(tree).__qualname__.encode()
        if id(tree) not in seen:  # it may hold itself
            seen.add(id(tree))
            yield from _parts(content, seen)
    else:
        yield _ADDRESS.sub("", repr(tree)).encode()


def _parts_of_tensor(tensor: torch.Tensor) -> Iterator[bytes | memoryview]:
    tensor = tensor.detach()
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # of a DTensor this rank's shard
    # the shape of a nested one is not to be had, or has a number of its own in every process
    yield f"{tensor.dtype}{'nested' if tensor.is_nested else tuple(tensor.shape)}".encode()
    if tensor.is_meta:
        return
    if inner := _inside(tensor):
        for part in inner:
            if isinstance(part, torch.Tensor):
                yield from _parts_of_tensor(part)
            else:
                yield repr(part).encode()
    elif tensor.numel():
        plain = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        yield plain.flatten().view(torch.uint8).numpy().data


def _inside(tensor: torch.Tensor) -> list[Any]:
    """Return what a tensor without one memory of its own consists of; nothing for all others."""
    if tensor.layout == torch.sparse_coo:
        return ["coo", tensor.is_coalesced(), tensor._indices(), tensor._values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.layout, tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.layout, tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    if tensor.is_quantized and tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return [tensor.qscheme(), tensor.q_scale(), tensor.q_zero_point(), tensor.int_repr()]
    if tensor.is_quantized:
        scales, points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
        return [tensor.qscheme(), tensor.q_per_channel_axis(), scales, points, tensor.int_repr()]
    if tensor.is_nested:
        return list(tensor.unbind())
    return [tensor.to_dense()] if tensor.is_mkldnn else []


def _attributes(thing: Any) -> dict[str, Any] | None:
    """Return what an object of the user's holds, as a batch may be one; None of plain values and of code."""
    if isinstance(thing, (type, enum.Enum)) or callable(thing):
        return None
    return getattr(thing, "__dict__", None)
