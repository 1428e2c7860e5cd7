"""The file of one rank: what plain ``torch.load(path, weights_only=True)`` opens, written durably and hashed.

A file goes to disk in chunks: while one is put together from the tensors, the one before it is hashed and others
are written, past the page cache where the filesystem allows it. The tensors are those of a tree, which must not
change until `write` returns, or their copies in a `Staging`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash

from chainrun.checkpoint import device, memory, recycled, source
from chainrun.checkpoint.layout import Content, Planner
from chainrun.checkpoint.source import digest
from chainrun.checkpoint.state import nbytes
from chainrun.errors import CheckpointError

__all__ = ["CHUNK", "RING", "Progress", "Staging", "digest", "digests", "read", "reason", "said", "write"]

CHUNK = 16 << 20
RING = 4
"""Chunks that are under way at a time; RING * CHUNK bytes is the memory that `write` takes for a tree."""
_PAGE = mmap.PAGESIZE
_HUGE = 2 << 20
_WRITERS = 2
_BIG = 256 << 10  # from this many bytes on, a copy is worth letting other threads run
# of a staging; torch's own threads wait for each other, long where others want the processors too
_COPIERS = 4

# a copy that keeps the interpreter: to give it away and get it back takes longer than to copy a few KB
_memmove = ctypes.PyDLL(None).memmove
_memmove.argtypes, _memmove.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), None


class Progress:
    """How far the writing of a file has come: told by the thread that writes, looked at by another one."""

    def __init__(self) -> None:
        self.abandoned = False
        """Set by whoever has no time for it: the writing ends at the next chunk, with an error."""
        self._began = time.perf_counter()
        self._share = 0.0

    def tell(self, share: float) -> None:
        """Say how much of the file is on the disk.

        Raises:
            CheckpointError: it is not wanted any more.
        """
        self._share = share
        if self.abandoned:
            raise CheckpointError("given up for the last checkpoint, for which there would have been no time")

    def left(self, whole: float = 0.0) -> float:
        """Return the seconds that the rest takes at the pace so far.

        Args:
            whole: what a save like this took before; it is what counts as long as nothing is on the disk.
        """
        taken = time.perf_counter() - self._began
        if self._share:
            return taken * (1 - self._share) / self._share
        return max(0.0, whole - taken) if whole else float("inf")


def write(
    path: Path, tree: Any, planner: Planner | None = None, progress: Progress | None = None
) -> tuple[int, str]:
    """Write a tree of tensors and plain data durably; return the file's size in bytes and its xxh3_128.

    Args:
        tree: or a `Staging`: what was staged last.
        planner: keeps what it found out about the tree for the next one like it.
        progress: is told how far it is.

    Raises:
        CheckpointError: the file cannot be written: full disk, quota, permission, or a tensor that torch
            cannot save.
    """
    needed = 0
    progress = progress or Progress()
    try:
        if isinstance(tree, Staging):
            with tree.lock:
                needed = tree.size
                if not needed:
                    raise ValueError("nothing is staged")
                tree.complete()
                return _write(path, needed, tree.chunk, progress)
        needed = nbytes(tree)
        content = (planner or Planner()).content(tree)
        needed = content.size
        return _write(path, needed, _Ring(content).chunk, progress)
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink()  # what is free without it is what the message tells
        raise CheckpointError(f"{path} could not be written: {reason(error, path.parent, needed)}") from error


def digests(tree: Any) -> list[str]:
    """Return the xxh3_128 of each distinct piece of memory of a tree's tensors, in the order of the tree.

    Two trees of the same structure have as many, and equal ones where the tensors' content is equal.
    """
    content = Planner().content(tree)
    found = []
    for index in range(1, len(content.where) - 1, 2):
        if index in content.elsewhere:
            array: Any = content.elsewhere[index].cpu().numpy()
        else:
            array = _bytes(int(content.addresses[index]), int(content.sizes[index]))
        found.append(str(xxhash.xxh3_128_hexdigest(array)))
    return found


# ---- from memory to disk -----------------------------------------------------------------------


def _write(
    path: Path, size: int, chunk: Callable[[int, int], memoryview], progress: Progress
) -> tuple[int, str]:
    """Write a file, a chunk at a time.

    Args:
        chunk: returns the memory that holds bytes `begin` to `end` of the file and goes on to a whole page; it
            is asked in order, and may use the memory of the RING-th chunk before again.
    """
    value = xxhash.xxh3_128()
    file = _open(path)
    try:
        if size <= CHUNK:
            pages = chunk(0, size)
            value.update(pages[:size])
            _pwrite(file, pages, 0)
        else:
            with ThreadPoolExecutor(1) as hasher, ThreadPoolExecutor(_WRITERS) as writers:
                under_way: deque[tuple[Future[None], Future[None]]] = deque()
                for begin in range(0, size, CHUNK):
                    if len(under_way) == RING:
                        _wait(under_way.popleft())
                    progress.tell(max(0, begin - RING * CHUNK) / size)
                    end = min(begin + CHUNK, size)
                    pages = chunk(begin, end)
                    under_way.append(
                        (
                            hasher.submit(value.update, pages[: end - begin]),
                            writers.submit(_pwrite, file, pages, begin),
                        )
                    )
                while under_way:
                    _wait(under_way.popleft())
        progress.tell(1.0)
        os.ftruncate(file, size)
        os.fsync(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)  # a process just forked may hold it for a moment: its room is free at once
        raise
    finally:
        os.close(file)
    return size, str(value.hexdigest())


def _wait(futures: tuple[Future[None], Future[None]]) -> None:
    for future in futures:
        future.result()


def _open(path: Path) -> int:
    """Open a file to be written; its content is written over where it may be."""
    again = recycled.opened(path)
    if again is not None:
        return again
    if path.exists():
        path.unlink()  # others have it open, or it bears another name too
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a filesystem that has its files in memory, or on another machine


def _pwrite(file: int, pages: memoryview, at: int) -> None:
    """Write all of it; without O_DIRECT where the filesystem turns out not to take it as it is."""
    while pages:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        try:
            done = os.pwrite(file, pages, at)
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            fcntl.fcntl(file, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        else:
            pages, at = pages[done:], at + done


# ---- from tensors to memory --------------------------------------------------------------------


class _Memory:
    """Zeroed memory of this process alone, on whole pages, large ones where the system has them."""

    def __init__(self, size: int) -> None:
        self.pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):
            self.pages.madvise(
                mmap.MADV_DONTFORK
            )  # or each page would be copied after the fork of a loader's worker
            if size >= _HUGE:
                self.pages.madvise(mmap.MADV_HUGEPAGE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.pages))
        self._pinned: bool | None = None

    def __len__(self) -> int:
        return len(self.pages)

    def pin(self) -> None:
        """Let devices copy into it directly; it is asked for once."""
        if self._pinned is None:
            self._pinned = device.pin(self.address, len(self))

    def __del__(self) -> None:
        if self._pinned:
            device.unpin(self.address)


def _bytes(address: int, size: int) -> Any:
    return (ctypes.c_ubyte * size).from_address(address)


def _gather(
    content: Content, begin: int, end: int, memory: _Memory, copies: device.Copies, pieces: Any = None
) -> None:
    """Copy bytes `begin` to `end` of a file to the beginning of some memory.

    Args:
        copies: makes those from a device, and has not finished them yet.
        pieces: for each piece of the content, whether it is to be copied; None for all.
    """
    first = int(np.searchsorted(content.where, begin, "right")) - 1
    last = int(np.searchsorted(content.where, end, "left"))
    where = content.where[first:last]
    low = np.maximum(where, begin)
    size = np.minimum(where + content.sizes[first:last], end) - low
    skipped = low - where
    source = content.addresses[first:last] + skipped
    target = low - begin + memory.address
    here = content.here[first:last]
    chosen = size > 0
    if pieces is not None:
        chosen &= pieces[first:last]
    if content.elsewhere:
        if any(tensor.is_cuda for tensor in content.elsewhere.values()):
            memory.pin()
        copies.begin(
            [
                (content.elsewhere[first + n][int(skipped[n]) : int(skipped[n] + size[n])], int(target[n]))
                for n in np.flatnonzero(chosen & ~here).tolist()
            ]
        )
    small = chosen & here & (size < _BIG)
    deque(map(_memmove, target[small].tolist(), source[small].tolist(), size[small].tolist()), maxlen=0)
    big = chosen & here & (size >= _BIG)
    moves = target[big].tolist(), source[big].tolist(), size[big].tolist()
    if end - begin <= CHUNK:
        deque(map(ctypes.memmove, *moves), maxlen=0)
    else:
        with ThreadPoolExecutor(_COPIERS) as copiers:
            deque(copiers.map(ctypes.memmove, *moves), maxlen=0)


class _Ring:
    """Chunks of a file that are put together in the same few pieces of memory."""

    def __init__(self, content: Content) -> None:
        self._content = content
        count = min(RING, -(-content.size // CHUNK))
        self._pieces = [_Memory(min(CHUNK, -(-content.size // _PAGE) * _PAGE)) for _ in range(count)]
        self._copies = device.Copies()
        self._turn = 0

    def chunk(self, begin: int, end: int) -> memoryview:
        piece = self._pieces[self._turn % len(self._pieces)]
        self._turn += 1
        _gather(self._content, begin, end, piece, self._copies)
        self._copies.finish()
        return memoryview(piece.pages)[: -(-(end - begin) // _PAGE) * _PAGE]


class Staging:
    """A file's bytes in memory that is allocated once, copied there quickly, so that the training can go on.

    It takes the size of the file, a 64th more, in whole pages of 2 MB; writing it takes no more. What comes from a
    device may still be on its way when `stage` returns: see `device`.
    """

    def __init__(self, planner: Planner | None = None) -> None:
        self.lock = threading.Lock()
        """Held while the memory is written to disk or filled; `stage` and `write` wait for each other."""
        self.size = 0
        """Bytes of the file that was staged last."""
        self._planner = planner or Planner()
        self._copies = device.Copies()
        self._memory: _Memory | None = None
        self._records: Any = None

    @property
    def nbytes(self) -> int:
        """The memory that it has taken, in bytes."""
        return 0 if self._memory is None else len(self._memory)

    def stage(self, tree: Any) -> int:
        """Copy all that a checkpoint of the tree holds; return the size of its file in bytes.

        Raises:
            CheckpointError: there is too little memory, or a tensor that torch cannot save.
        """
        with self.lock:
            self.size = 0
            try:
                content = self._planner.content(tree)
                self._reserve(content.size)
                self._fill(content)
            except Exception as error:
                raise CheckpointError(f"the state could not be copied: {_first_line(error)}") from error
            self.size = content.size
        return self.size

    def complete(self) -> None:
        """Wait for what is on its way from a device."""
        self._copies.finish()

    def chunk(self, begin: int, end: int) -> memoryview:
        """Return bytes of the file, to the end of the page."""
        assert self._memory is not None
        return memoryview(self._memory.pages)[begin : -(-end // _PAGE) * _PAGE]

    def _reserve(self, size: int) -> None:
        """Have memory for a file, a little more than it needs: texts and numbers may grow.

        Raises:
            MemoryError: it would be more than there is, which Linux says by ending the process.
        """
        if self._memory is not None and len(self._memory) >= size:
            return
        self._memory = self._records = None
        size = -(-(size + size // 64) // _HUGE) * _HUGE
        free = memory.available()
        if free is not None and size > free:
            raise MemoryError(f"{size / 1e6:.0f} MB of memory are needed and {free / 1e6:.0f} MB available")
        self._memory = _Memory(size)

    def _fill(self, content: Content) -> None:
        assert self._memory is not None
        pieces = None
        if content.records is self._records:  # what is between the tensors is there already
            pieces = np.arange(len(content.where)) % 2 == 1
            pieces[-1] = True
        self._records = None
        _gather(content, 0, content.size, self._memory, self._copies, pieces)
        self._records = content.records


# ---- from disk ---------------------------------------------------------------------------------


def read(path: Path | source.Memory, size: int | None = None, xxh3_128: str | None = None) -> Any:
    """Return the tree of a file, on the CPU, in memory of its own: nothing of the filesystem stays open.

    Args:
        path: or what `source.load` has read, which is given back.
        size: in bytes, as the manifest states it.
        xxh3_128: of the file, as the manifest states it; without it, nothing of the content is verified.

    Raises:
        CheckpointError: the file is not what was stated, or torch cannot open it.
    """
    memory = path if isinstance(path, source.Memory) else source.load(path, size, xxh3_128)
    try:
        file: Any = memory.file
        return torch.load(file, weights_only=True, map_location="cpu", mmap=isinstance(file, str))
    except Exception as error:
        raise CheckpointError(f"{memory.path} cannot be opened: {_first_line(error)}") from error
    finally:
        memory.close()


# ---- what a disk says --------------------------------------------------------------------------


def reason(error: BaseException, folder: Path, needed: int = 0) -> str:
    """Torch's writers turn an error of the disk into one of their own; say what the disk said."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return _first_line(error) if cause is None else said(cause, folder, needed)


def said(error: OSError, folder: Path, needed: int = 0) -> str:
    """Return what the disk of a folder said, how much of it is free, and how much a file needed."""
    try:
        free = os.statvfs(folder)
    except OSError:  # it is gone
        return str(error.strerror)
    needs = f"{needed / 1e6:.1f} MB needed, " if needed else ""
    return f"{error.strerror} ({needs}{free.f_bavail * free.f_frsize / 1e6:.1f} MB free)"


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
