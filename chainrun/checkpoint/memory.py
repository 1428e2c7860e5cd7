"""How much memory this process can still take before the system ends it: Linux grants what it does not have."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def available(proc: Path = Path("/proc"), cgroups: Path = _CGROUPS) -> int | None:
    """Return the bytes that the machine has left, or the job where that is less; None where nobody tells."""
    found = [*_of_machine(proc), *_of_job(proc, cgroups)]
    return min(found, default=None)


def _of_machine(proc: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        yield 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))


def _of_job(proc: Path, cgroups: Path) -> Iterator[int]:
    """Yield what the limits of this process's control groups leave, of versions 1 and 2."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, kinds, path = line.split(":", 2)
        if kinds == "":
            root, names = cgroups, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root, names = (
                cgroups / "memory",
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        folder = root / path.lstrip("/")
        while folder.is_relative_to(root):  # a limit further up holds too
            yield from _left(folder, *names)
            folder = folder.parent


def _left(folder: Path, limit: str, used: str, cache: str) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
        most, taken = (int((folder / name).read_text()) for name in (limit, used))
        for line in (folder / "memory.stat").read_text().splitlines():
            if line.startswith(f"{cache} "):
                taken -= int(line.split()[1])  # the page cache goes when memory is asked for
        yield most - taken
