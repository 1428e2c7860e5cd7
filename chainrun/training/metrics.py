"""The user's metrics: one JSON line a call, none twice after a restore.

Device tensors are kept as they are and read when the file is written, now and then, so that logging a loss
costs no synchronization in the step. A checkpoint holds the file's size; a restore cuts the file there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from chainrun.rundir import append_lines, fsync_dir, fsync_file

FLUSH_LINES = 1000
FLUSH_SECONDS = 5.0


class Metrics:
    """Writer of ``metrics.jsonl``; does nothing on ranks other than 0.

    Args:
        may_write: whether the run directory is (still) this segment's.
    """

    def __init__(self, path: Path, *, active: bool, may_write: Callable[[], bool] = lambda: True) -> None:
        self._path, self._active, self._may_write = path, active, may_write
        self._lines: list[dict[str, Any]] = []
        self._flushed = time.monotonic()
        self._entered = False  # whether its directory durably has the file
        self.latest: dict[str, Any] = {}  # of the last flush, for progress displays

    def add(self, step: int, metrics: dict[str, Any]) -> None:
        """Note one line."""
        if not self._active:
            return
        line: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            # a copy: the user may go on adding to a running sum in place
            line[name] = value.detach().clone() if isinstance(value, torch.Tensor) else value
        self._lines.append(line)
        if len(self._lines) >= FLUSH_LINES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            with contextlib.suppress(OSError):  # a full disk: a save will say so, the training goes on
                self.flush()

    def flush(self) -> int:
        """Write what was noted; return the file's size in bytes.

        Raises:
            OSError: it was not written, and is kept for the next time.
        """
        lines = [{name: _plain(value) for name, value in line.items()} for line in self._lines]
        self._flushed = time.monotonic()
        if lines:
            if not self._may_write():
                raise OSError(errno.EBUSY, "another segment has taken the run directory over")
            append_lines(self._path, lines)  # where that fails the lines are kept for the next time
            self._lines = []
            for line in lines:
                self.latest.update(line)
        return self._path.stat().st_size if self._path.exists() else 0

    def sync(self) -> None:
        """Make durable what was written: a checkpoint relies on it."""
        with contextlib.suppress(FileNotFoundError):
            fsync_file(self._path)
            if not self._entered:
                fsync_dir(self._path.parent)
                self._entered = True

    def cut(self, size: int) -> None:
        """Drop the lines written after the checkpoint that said `size`."""
        if self._active and self._path.exists() and self._path.stat().st_size > size:
            os.truncate(self._path, size)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value.tolist()
    if hasattr(value, "tolist"):  # NumPy scalars and arrays
        return value.tolist()
    return value if isinstance(value, (bool, int, float, str, type(None), list, dict)) else str(value)
