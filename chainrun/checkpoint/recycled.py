"""A retired file that is written over instead of a new one: its blocks are laid out already, and none are given back.

Whoever still has it open or mapped, or has a hard link to it, would see it change: to him the file must stay as it
is, and a new one is made. The kernel knows who has it open on this machine, which is all machines only for the
filesystems named here.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
from pathlib import Path

_OF_ONE_MACHINE = {0xEF53: "ext4", 0x58465342: "xfs"}


def opened(path: Path) -> int | None:
    """Return a file, open past the page cache to be written over; None where there is none that may be."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_NOFOLLOW)
    except OSError:
        return None
    if os.fstat(file).st_nlink == 1 and _kind(file) in _OF_ONE_MACHINE and _is_ours_alone(file):
        return file
    os.close(file)
    return None


def is_possible(folder: Path) -> bool:
    """Whether files in a folder are written over at all, which depends on its filesystem."""
    try:
        file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        return _kind(file) in _OF_ONE_MACHINE
    finally:
        os.close(file)


def _is_ours_alone(file: int) -> bool:
    """Whether nobody else has a file open: only then the kernel grants a lease on it."""
    try:
        fcntl.fcntl(
            file, fcntl.F_SETSIG, signal.SIGURG
        )  # who opens it just now is told; unlike SIGIO it kills nobody
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    return True


def _kind(file: int) -> int:
    """Return the number by which Linux knows a file's filesystem, 0 where that cannot be asked."""
    about = (ctypes.c_long * 64)()  # struct statfs, which begins with it
    statfs = getattr(ctypes.CDLL(None, use_errno=True), "fstatfs", None)
    return int(about[0]) if statfs is not None and statfs(file, about) == 0 else 0
