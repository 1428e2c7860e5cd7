"""One segment at a time writes to a run directory.

The lock is a file that its holder rewrites every few seconds; what the holder is doing (step, epoch)
travels in it, so that `chainrun status` sees a live run without asking anybody. Every holder has a file of its
own: who takes the lock over puts another one in its place, so the beats of one that does not know it yet go into
a file without a name, never over its successor's.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chainrun.errors import ChainrunError
from chainrun.rundir import RunDir, read_json

BEAT = 5.0  # seconds between two heartbeats
STALE = 60.0  # seconds without one after which a holder on another machine counts as dead
LOOK = 15.0  # seconds for which none may be seen before that is believed: clocks differ between machines


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


def _machine() -> str:
    """What tells apart where process ids mean something: two containers may have one host name, and a host two boots."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _is_here(holder: dict[str, Any]) -> bool:
    return (holder["host"], holder.get("machine", _machine())) == (socket.gethostname(), _machine())


def _alive(holder: dict[str, Any]) -> bool:
    """Whether a holder on this machine still runs."""
    born = _born(holder["pid"])
    return born is not None and born == holder["born"]


def _read(path: Path, tries: int = 3) -> dict[str, Any] | None:
    """Return what a lock says, None where there is none or it stays unreadable: a look may meet a half-written beat."""
    for _ in range(tries):
        found = read_json(path)
        if isinstance(found, dict):
            return found
        try:
            os.stat(path)
        except FileNotFoundError:
            return None
        except OSError:
            pass
        time.sleep(0.01)
    return None


class Lock:
    """The right to write to one run directory, held by rank 0 of a segment."""

    def __init__(self, run: RunDir, job: str, restart: int) -> None:
        self._path = run.lock
        self._me: dict[str, Any] = {
            "job": job,
            "restart": restart,
            "host": socket.gethostname(),
            "machine": _machine(),
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
        since = time.monotonic()
        until, last = since + wait, None
        while True:
            reason = None
            try:
                fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:
                holder = _read(self._path)
                if holder != last:
                    last, since = holder, time.monotonic()
                reason = self._dead(holder, time.monotonic() - since)
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
                holder = _read(self._path) or {}
                raise Locked(
                    f"another segment is writing to {self._path.parent}: job {holder.get('job')} on "
                    f"{holder.get('host')}, pid {holder.get('pid')}; wait for its end or cancel it"
                )
            time.sleep(0.5)

    def _take_over(self, dead: dict[str, Any] | None) -> bool:
        """Replace a dead holder's lock; return False where another process was faster."""
        with self._alone() as there:
            if there and _read(self._path) == dead:
                self._replace(self._text())
                return True
        return False

    @contextmanager
    def _alone(self) -> Iterator[bool]:
        """Keep others from putting another file in the lock's place, or removing it; whether it is there and that worked."""
        try:
            fd = os.open(self._path, os.O_RDWR)
        except FileNotFoundError:
            yield False
            return
        there = True
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                there = False
            except OSError:
                pass  # a filesystem that knows no flock: a race, then, shows at the next look at `held`
            try:
                there = there and os.path.samestat(os.fstat(fd), os.stat(self._path))
            except FileNotFoundError:
                there = False
            yield there
        finally:
            os.close(fd)

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

    def _dead(self, holder: dict[str, Any] | None, unchanged: float) -> str | None:
        """Return why a holder counts as dead, None while it may live.

        Args:
            unchanged: seconds for which we have seen no beat.
        """
        if not holder:  # torn, or not yet written: judged by the file's age alone
            try:
                age = time.time() - self._path.stat().st_mtime
            except OSError:
                return None
            return "unreadable lock" if age > BEAT else None
        if holder["job"] == self._me["job"] and holder["restart"] < self._me["restart"]:
            return f"start {holder['restart']} of this job has ended"
        if _is_here(holder):
            if not _alive(holder):
                return f"process {holder['pid']} has ended"
            return None
        age = time.time() - holder["time"]
        if unchanged > STALE or (age > STALE and unchanged >= LOOK):
            return f"no heartbeat for {max(age, unchanged):.0f} s"
        return None

    def beat(self, **progress: Any) -> bool:
        """Say that the holder is alive and where it is; return False where the lock was lost."""
        try:
            fd = os.open(self._path, os.O_RDWR)
            try:
                size = os.fstat(fd).st_size
                found = json.loads(os.pread(fd, size, 0))
                if not isinstance(found, dict):
                    raise ValueError("no lock")
                if not self._is_mine(found):
                    return False
                # into the file that was looked at; spaces over what a longer one before has left
                os.pwrite(fd, self._text(**progress).ljust(size), 0)
            finally:
                os.close(fd)  # now others see it on NFS
        except FileNotFoundError:
            return False
        except (OSError, ValueError):  # a disk that fails: the next beat may get through
            found = _read(self._path)
            return found is None or self._is_mine(found)
        return True

    def held(self) -> bool:
        """Whether the lock is (still) this process's."""
        return self._is_mine(_read(self._path, tries=50) or {})  # a training ends where it is not

    def _is_mine(self, holder: dict[str, Any]) -> bool:
        return all(holder.get(key) == value for key, value in self._me.items())

    def lost(self) -> bool:
        """Whether another start, of this job or of another one, has the lock; asked by any rank."""
        holder = _read(self._path) or self._me
        return any(holder.get(key) != self._me[key] for key in ("job", "restart"))

    def release(self) -> None:
        """Let others write; does nothing where the lock was lost."""
        # on a disk that is read-only by now the end of this process releases it
        with suppress(OSError), self._alone() as there:
            if there and self.held():
                self._path.unlink()


def holder(run: RunDir) -> dict[str, Any] | None:
    """Return what the lock says, with ``alive``, or None where nobody holds it."""
    found = _read(run.lock)
    if found is None:
        return None
    found["alive"] = _alive(found) if _is_here(found) else time.time() - found["time"] < STALE
    return found
