"""The file of one rank: what plain ``torch.load(path, weights_only=True)`` opens, written once and hashed."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
import xxhash

from chainrun.checkpoint.state import nbytes
from chainrun.errors import CheckpointError

CHUNK = 16 << 20


class _Hashing:
    """A file that hashes what goes through it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash, self.size = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def digest(self) -> str:
        return str(self._hash.hexdigest())


def write(path: Path, tree: Any) -> tuple[int, str]:
    """Write a tree of tensors and plain data durably; return the file's size in bytes and its xxh3_128.

    Raises:
        CheckpointError: the file cannot be written: full disk, quota, permission, or a tensor that torch
            cannot save.
    """
    try:
        with open(path, "wb") as file:
            hashing = _Hashing(file)
            torch.save(tree, cast(BinaryIO, hashing))
            file.flush()
            os.fsync(file.fileno())
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink()  # what is free without it is what the message tells
        raise CheckpointError(
            f"{path} could not be written: {reason(error, path.parent, nbytes(tree))}"
        ) from error
    return hashing.size, hashing.digest


def reason(error: BaseException, folder: Path, needed: int = 0) -> str:
    """Torch's writers turn an error of the disk into one of their own; say what the disk said."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return _first_line(error) if cause is None else said(cause, folder, needed)


def said(error: OSError, folder: Path, needed: int = 0) -> str:
    """Return what the disk of a folder said, how much of it is free, and how much a file needed."""
    free = os.statvfs(folder)
    needs = f"{needed / 1e6:.1f} MB needed, " if needed else ""
    return f"{error.strerror} ({needs}{free.f_bavail * free.f_frsize / 1e6:.1f} MB free)"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__


def digest(path: Path) -> str:
    """Return the xxh3_128 of a file."""
    value = xxhash.xxh3_128()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            value.update(chunk)
    return str(value.hexdigest())


def read(path: Path) -> Any:
    """Return the tree of a file, on the CPU, copied: no memory map of a shared filesystem stays open.

    Raises:
        CheckpointError: torch cannot open it.
    """
    try:
        return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        raise CheckpointError(f"{path} cannot be opened: {_first_line(error)}") from error
