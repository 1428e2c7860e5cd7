"""One segment at a time writes to a run directory.

The lock is a file that its holder rewrites every few seconds; what the holder is doing (step, epoch)
travels in it, so that `chainrun status` sees a live run without asking anybody.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from chainrun.errors import ChainrunError
from chainrun.rundir import RunDir, read_json

BEAT = 5.0  # seconds between two heartbeats
STALE = 60.0  # seconds without one after which a holder on another machine counts as dead


class Locked(ChainrunError):
    """Another segment holds the run directory."""


def _born(pid: int) -> str | None:
    """The start time of a process, which tells it from a later one with the same pid; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]  # a zombie has ended, whether or not its parent looks


def _alive(holder: dict[str, Any]) -> bool:
    """Whether a holder on this machine still runs."""
    born = _born(holder["pid"])
    return born is not None and born == holder["born"]


class Lock:
    """The right to write to one run directory, held by rank 0 of a segment."""

    def __init__(self, run: RunDir, job: str, restart: int) -> None:
        self._path = run.lock
        self._me: dict[str, Any] = {
            "job": job,
            "restart": restart,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }

    def acquire(self, wait: float = 2 * STALE) -> str | None:
        """Take the lock; return why an older one was taken over, None where there was none.

        Args:
            wait: seconds to wait for a live holder to go.

        Raises:
            Locked: a live segment still holds it after that time.
        """
        until = time.monotonic() + wait
        while True:
            reason = None
            try:
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                holder = read_json(self._path)
                reason = self._dead(holder)
                taken = reason is not None and self._take_over(holder)
            else:
                with os.fdopen(fd, "wb") as file:
                    file.write(self._text())
                taken = True
            if taken:
                for left in self._path.parent.glob(".lock.*"):  # by beats that were killed
                    left.unlink(missing_ok=True)
                return reason
            if time.monotonic() >= until:
                holder = read_json(self._path) or {}
                raise Locked(
                    f"another segment is writing to {self._path.parent}: job {holder.get('job')} on "
                    f"{holder.get('host')}, pid {holder.get('pid')}; wait for its end or cancel it"
                )
            time.sleep(0.5)

    def _take_over(self, dead: dict[str, Any] | None) -> bool:
        """Replace a dead holder's lock; return False where another process was faster."""
        with suppress(FileNotFoundError), open(self._path, "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a filesystem that knows no flock: a race, then, shows at the next look at `held`
            same = os.path.samestat(os.fstat(file.fileno()), os.stat(self._path))
            if same and read_json(self._path) == dead:
                self._replace(self._text())
                return True
        return False

    def _replace(self, text: bytes) -> None:
        temporary = self._path.with_name(f".lock.{self._me['host']}.{self._me['pid']}")
        try:
            temporary.write_bytes(text)
            os.replace(temporary, self._path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise

    def _text(self, **progress: Any) -> bytes:
        return json.dumps({**self._me, "time": round(time.time(), 3), **progress}).encode()

    def _dead(self, holder: dict[str, Any] | None) -> str | None:
        if not holder:  # torn, or not yet written: judged by the file's age alone
            try:
                age = time.time() - self._path.stat().st_mtime
            except OSError:
                return None
            return "unreadable lock" if age > BEAT else None
        if holder["job"] == self._me["job"] and holder["restart"] < self._me["restart"]:
            return f"start {holder['restart']} of this job has ended"
        if holder["host"] == self._me["host"]:
            if not _alive(holder):
                return f"process {holder['pid']} has ended"
            return None
        age = time.time() - holder["time"]
        return f"no heartbeat for {age:.0f} s" if age > STALE else None

    def beat(self, **progress: Any) -> bool:
        """Say that the holder is alive and where it is; return False where the lock was lost."""
        if not self.held():
            return False
        with suppress(OSError):  # a full disk: the next beat may get through, the training goes on meanwhile
            self._replace(self._text(**progress))
        return True

    def held(self) -> bool:
        """Whether the lock is (still) this process's."""
        holder = read_json(self._path) or {}
        return all(holder.get(key) == value for key, value in self._me.items())

    def lost(self) -> bool:
        """Whether another start, of this job or of another one, has the lock; asked by any rank."""
        holder = read_json(self._path) or self._me
        return any(holder.get(key) != self._me[key] for key in ("job", "restart"))

    def release(self) -> None:
        if self.held():
            with suppress(OSError):  # a disk that is read-only by now: the process's end releases it too
                self._path.unlink()


def holder(run: RunDir) -> dict[str, Any] | None:
    """Return what the lock says, with ``alive``, or None where nobody holds it."""
    found = read_json(run.lock)
    if not isinstance(found, dict):
        return None
    if found["host"] == socket.gethostname():
        found["alive"] = _alive(found)
    else:
        found["alive"] = time.time() - found["time"] < STALE
    return found
