"""A checkpoint's file, read once into memory and hashed on the way; needs no torch, which may be importing."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from pathlib import Path

import xxhash

from chainrun.errors import CheckpointError

CHUNK = 1 << 20  # stays in the processor's cache between being read, hashed and stored


class Memory:
    """The bytes of a file, in memory that a forked process shares; the file itself is closed.

    Attributes:
        path: the file they came from.
        size: in bytes.
        xxh3_128: of all bytes.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size, self.xxh3_128 = path, size, ""
        self._file, self._map = -1, None
        if hasattr(os, "memfd_create"):
            self._file = os.memfd_create(path.name)
        else:  # a Python that was built on a very old system
            self._map = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)

    def put(self, at: int, part: memoryview) -> None:
        """Store bytes."""
        if self._map is not None:
            self._map[at : at + len(part)] = part
            return
        while part:
            done = os.pwrite(self._file, part, at)
            part, at = part[done:], at + done

    @property
    def file(self) -> str | mmap.mmap:
        """The memory, as a file's name or as an open file."""
        return self._map or f"/proc/self/fd/{self._file}"

    def close(self) -> None:
        """Give the memory back; what was mapped from the file stays."""
        if self._map is not None:
            self._map.close()
        elif self._file >= 0:
            os.close(self._file)
            self._file = -1


def load(path: Path, size: int | None = None, xxh3_128: str | None = None) -> Memory:
    """Read a file into memory.

    Args:
        size: in bytes, as the manifest states it.
        xxh3_128: of the file, as the manifest states it.

    Raises:
        CheckpointError: it cannot be read, or is not what was stated.
    """
    memory = None
    try:
        memory = Memory(path, path.stat().st_size if size is None else size)
        fill(memory, xxh3_128)
    except BaseException as error:
        if memory is not None:
            memory.close()
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        raise
    return memory


def fill(memory: Memory, xxh3_128: str | None) -> None:
    """Read the file that a memory is for.

    Args:
        xxh3_128: of the file, as the manifest states it.

    Raises:
        CheckpointError: it cannot be read, or is not what was stated.
    """
    try:
        file = os.open(memory.path, os.O_RDONLY)
        try:
            found = os.fstat(file).st_size
            if found != memory.size:
                raise CheckpointError(f"{memory.path} has {found} bytes instead of {memory.size}")
            memory.xxh3_128 = _fill(memory, file)
        finally:
            os.close(file)
    except OSError as error:
        raise CheckpointError(f"{memory.path} cannot be read: {error.strerror}") from error
    if xxh3_128 is not None and memory.xxh3_128 != xxh3_128:
        raise CheckpointError(f"the content of {memory.path} has changed since it was written")


def _fill(memory: Memory, file: int) -> str:
    """Read a file into memory and return its xxh3_128."""
    value = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(CHUNK, memory.size)))
    at = 0
    while at < memory.size:
        got = os.preadv(file, [buffer[: memory.size - at]], at)
        if not got:
            raise CheckpointError(f"{memory.path} was cut to {at} bytes while it was read")
        value.update(buffer[:got])
        memory.put(at, buffer[:got])
        at += got
    return str(value.hexdigest())


def digest(path: Path, told: Callable[[int], object] = lambda count: None) -> str:
    """Return the xxh3_128 of a file; `told` hears how many bytes of it were read, again and again."""
    value = xxhash.xxh3_128()
    buffer = memoryview(bytearray(min(CHUNK, max(path.stat().st_size, 1))))
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            value.update(buffer[:got])
            told(got)
    return str(value.hexdigest())
