"""What is done with the state where it is, on an accelerator: copied beside the training, and compared.

The training's thread only asks for copies into a file's image. Small tensors are put together on the device first, since a copy of a few
KB over the bus takes as long as one of a few hundred. What the device is given to do afterwards, the next optimizer
step above all, waits there for an event behind the copies, so that it cannot change what is still to be copied: not
from a captured graph either, nor through ``.data``, of which nobody on the CPU would hear.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import xxhash

Part: TypeAlias = "tuple[torch.Tensor, int]"
"""Memory of a device, as a tensor of bytes, and the address that it goes to."""

_SMALL = 1 << 20
"""Bytes from which on a tensor is copied by itself: 40 µs of a bus, several times what asking for it takes."""


def pin(address: int, size: int) -> bool:
    """Let devices copy to memory by themselves; return whether they may. Where not, copies are only slower."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    return int(runtime.cudaHostRegister(address, size, 1)) == 0  # 1: for every device


def unpin(address: int) -> None:
    """Take `pin` back, before the memory is given back."""
    runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    runtime.cudaHostUnregister(address)


class Stream:
    """A stream of copies from one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def begin(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Ask for copies of what the device has when it has done all that it was given so far.

        Args:
            copies: pairs of a target and a source.
        """
        now = torch.cuda.current_stream(self._device)
        self._side.wait_stream(now)
        with torch.cuda.stream(self._side):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            self._event.record(self._side)
        now.wait_event(self._event)

    def wait(self) -> None:
        """Come back when the copies have been made; other threads go on meanwhile."""
        self._event.synchronize()

    def room(self, size: int) -> torch.Tensor:
        """Return memory that the device can copy to."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)


class _Waiting:
    """What copies from a device of a kind that has no such streams here."""

    def __init__(self, device: torch.device) -> None:
        pass

    def begin(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, source in copies:
            target.copy_(source)

    def wait(self) -> None:
        pass

    def room(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8)


def _stream(device: torch.device) -> Any:
    return Stream(device) if device.type == "cuda" else _Waiting(device)


class Copies:
    """The copies of one state, from all devices that hold a part of it."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._rooms: dict[torch.device, torch.Tensor] = {}
        self._under_way: list[tuple[torch.device, list[Part], Any]] = []

    def begin(self, parts: Sequence[Part]) -> None:
        """Ask for the copies of a state; what it consists of may be changed from here on."""
        self._forget()
        by_device: dict[torch.device, list[Part]] = {}
        for part in parts:
            by_device.setdefault(part[0].device, []).append(part)
        for device, mine in by_device.items():
            if device not in self._streams:
                self._streams[device] = _stream(device)
            small = [part for part in mine if len(part[0]) < _SMALL]
            copies = [(_memory(to, len(source)), source) for source, to in mine if len(source) >= _SMALL]
            if small:
                together = torch.cat([source for source, _ in small])
                copies.append((self._room(device, len(together)), together))
            self._under_way.append((device, small, copies))  # which keeps the memory that is copied from
            self._streams[device].begin(copies)

    def finish(self) -> None:
        """Wait for the copies that were begun, and put the small tensors in their places; for any thread."""
        for device, small, _ in self._under_way:
            self._streams[device].wait()
            at = self._rooms[device].data_ptr() if small else 0
            for source, to in small:
                ctypes.memmove(to, at, len(source))
                at += len(source)
        self._under_way = []

    def _forget(self) -> None:
        """Wait for copies that nobody has asked for in the end."""
        for device, *_ in self._under_way:
            self._streams[device].wait()
        self._under_way = []

    def _room(self, device: torch.device, size: int) -> torch.Tensor:
        if device not in self._rooms or len(self._rooms[device]) < size:
            self._rooms[device] = self._streams[device].room(size + size // 64)
        return self._rooms[device][:size]


# ---- what is alike -----------------------------------------------------------------------------

_WORDS = 1 << 24
"""Words of 8 bytes that are hashed at a time: what the device has to have free is a few times that."""
_SEEDS = (-0x61C8864680B583EB, 0x2545F4914F6CDD1D)  # odd, with bits as random as any
_MIX = (-0x00AE502812AA7333, -0x3B314601E57A13AD)  # murmur3's


def digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    """Return a hash of 16 bytes of each tensor of bytes: what is alike in all bits has the same.

    Large ones are hashed where they are; of small ones the bits are fetched, all at once.
    """
    large = [tensor for tensor in tensors if len(tensor) >= _SMALL]
    sums = [_sum(tensor, seed) for tensor in large for seed in _SEEDS]
    hashes = iter(torch.stack(sums).cpu().view(-1, len(_SEEDS)).numpy() if sums else [])
    small = [tensor for tensor in tensors if len(tensor) < _SMALL]
    fetched, at, found = torch.cat(small).cpu().numpy() if small else None, 0, []
    for tensor in tensors:
        if len(tensor) >= _SMALL:
            found.append(next(hashes).tobytes())
        else:
            assert fetched is not None
            found.append(xxhash.xxh3_128_digest(fetched[at : at + len(tensor)].data))
            at += len(tensor)
    return found


def _sum(tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Return the sum of a hash of every word and its place; a sum of integers is the same in any order."""
    whole = len(tensor) // 8 * 8
    if tensor.storage_offset() % 8:
        tensor = tensor.clone()
    words, total = (
        tensor[:whole].view(torch.int64),
        torch.full((), len(tensor), dtype=torch.int64, device=tensor.device),
    )
    rest = torch.zeros(8, dtype=torch.uint8, device=tensor.device)
    rest[: len(tensor) - whole] = tensor[whole:]
    for begin, part in [
        *((n, words[n : n + _WORDS]) for n in range(0, len(words), _WORDS)),
        (-1, rest.view(torch.int64)),
    ]:
        mixed = torch.arange(begin + 2, begin + 2 + len(part), device=tensor.device).mul_(seed).add_(part)
        for factor in _MIX:
            mixed.bitwise_xor_((mixed >> 33).bitwise_and_(0x7FFFFFFF)).mul_(factor)
        total.add_(mixed.bitwise_xor_((mixed >> 33).bitwise_and_(0x7FFFFFFF)).sum())
    return total


def _memory(address: int, size: int) -> torch.Tensor:
    """Return memory of the CPU as a tensor of bytes."""
    return torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)
