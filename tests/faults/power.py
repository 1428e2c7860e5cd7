"""What a power cut may leave: the disk rebuilt from what a training did to it, call by call.

`read` takes the log that the shim disk.c wrote; `Disk` repeats it. Of a file, what it held at its last fsync is on
the platter; of what was written since, any part may be. Of a directory, the entries that it had at its own last
fsync are there; of the changes since, each may have come through or not, in whatever order. A rename is whole or
not at all. This is what POSIX promises, and less than any one filesystem does.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

HEAD = struct.Struct("<c7xQqqII")


@dataclass(frozen=True)
class Call:
    """One call that changed the disk: (O)pen, (W)rite, (T)runcate, (A)llocate, (S)ync, (R)ename, (U)nlink, (M)kdir."""

    kind: str
    inode: int
    a: int
    b: int
    path: str
    data: bytes


def read(log: Path) -> list[Call]:
    """Return the calls of a log, in order."""
    data, at, calls = log.read_bytes(), 0, []
    while at < len(data):
        kind, inode, a, b, first, second = HEAD.unpack_from(data, at)
        at += HEAD.size
        path, rest = data[at : at + first].decode(), data[at + first : at + first + second]
        at += first + second
        calls.append(Call(kind.decode(), inode, a, b, path, rest))
    return calls


@dataclass
class File:
    """A file: what is in it, what of that is on the platter, and what was done to it since."""

    now: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    since: list[Call] = field(default_factory=list)

    def do(self, call: Call) -> None:
        self.since.append(call)
        _apply(self.now, call)

    def sync(self) -> None:
        self.synced, self.since = bytes(self.now), []

    def after_cut(self, chance: random.Random) -> bytes:
        """Return what a power cut may leave of it."""
        how = chance.choice(("nothing", "all", "zeros", "some")) if self.since else "nothing"
        if how == "nothing":
            return self.synced
        if how == "all":
            return bytes(self.now)
        found = bytearray(self.synced)
        for call in self.since:
            if how == "zeros":  # its size came through, its blocks did not
                _apply(found, Call(call.kind, 0, call.a, call.b, "", bytes(len(call.data))))
            elif call.kind != "W":
                if chance.random() < 0.5:
                    _apply(found, call)
            else:  # block by block
                for start in range(0, len(call.data), 4096):
                    if chance.random() < 0.5:
                        block = call.data[start : start + 4096]
                        _apply(found, Call("W", 0, call.a + start, 0, "", block))
        return bytes(found)


def _apply(content: bytearray, call: Call) -> None:
    size = call.a if call.kind == "T" else call.a + (call.b if call.kind == "A" else len(call.data))
    if size > len(content):
        content.extend(bytes(size - len(content)))
    if call.kind == "T":
        del content[size:]
    elif call.kind == "W":
        content[call.a : size] = call.data


Change = tuple[str, "File | Folder", bool]
"""A name, what it stands for, and whether it does from now on, or no longer."""


@dataclass
class Folder:
    """A directory: its entries, those on the platter, and the changes since, each whole or not at all."""

    now: dict[str, File | Folder] = field(default_factory=dict)
    synced: dict[str, File | Folder] = field(default_factory=dict)
    since: list[list[Change]] = field(default_factory=list)

    def do(self, *changes: Change) -> None:
        self.since.append(list(changes))
        _enter(self.now, changes)

    def sync(self) -> None:
        self.synced, self.since = dict(self.now), []

    def after_cut(self, chance: random.Random) -> dict[str, File | Folder]:
        """Return the entries that a power cut may leave."""
        how = chance.choice(("nothing", "all", "some", "one")) if self.since else "nothing"
        if how == "nothing":
            return self.synced
        if how == "all":
            return self.now
        found = dict(self.synced)
        which = [chance.choice(self.since)] if how == "one" else self.since
        for changes in which:
            if how == "one" or chance.random() < 0.5:
                _enter(found, changes)
        return found


def _enter(entries: dict[str, File | Folder], changes: tuple[Change, ...] | list[Change]) -> None:
    for name, what, there in changes:
        if there:
            entries[name] = what
        elif entries.get(name) is what:
            del entries[name]


class Disk:
    """The disk below a folder that was empty when the log began."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.top = Folder()
        self._by_inode: dict[int, File | Folder] = {root.stat().st_ino: self.top}

    def _place(self, path: str) -> tuple[Folder, str]:
        *parents, name = Path(path).relative_to(self._root).parts
        folder: File | Folder = self.top
        for each in parents:
            assert isinstance(folder, Folder)
            folder = folder.now[each]
        assert isinstance(folder, Folder)
        return folder, name

    def do(self, call: Call) -> None:
        """Repeat one call."""
        if call.kind in "OMU":
            folder, name = self._place(call.path)
            if call.kind == "U":
                folder.do((name, folder.now[name], False))
            elif call.kind == "M":
                self._by_inode[call.inode] = made = Folder()
                folder.do((name, made, True))
            else:
                file = folder.now.get(name)
                if not isinstance(file, File):
                    self._by_inode[call.inode] = file = File()
                    folder.do((name, file, True))
                elif call.a and file.now:
                    file.do(Call("T", call.inode, 0, 0, "", b""))
        elif call.kind == "R":
            folder, name = self._place(call.path)
            target, new = self._place(call.data.decode())
            moved = folder.now[name]
            changes = ((name, moved, False), (new, moved, True))
            if folder is target:
                folder.do(*changes)
            else:
                folder.do(changes[0])
                target.do(changes[1])
        elif call.kind == "S":
            self._by_inode[call.inode].sync()
        else:
            file = self._by_inode[call.inode]
            assert isinstance(file, File)
            file.do(call)

    def after_cut(self, folder: Path, chance: random.Random) -> None:
        """Make a directory tree that a power cut at this moment may leave, below an empty folder."""
        _make(folder, self.top, lambda each: each.after_cut(chance), lambda each: each.after_cut(chance))

    def as_it_is(self, folder: Path) -> None:
        """Make the tree that every process sees now."""
        _make(folder, self.top, lambda each: each.now, lambda each: bytes(each.now))


def _make(
    where: Path,
    folder: Folder,
    entries: Callable[[Folder], dict[str, File | Folder]],
    content: Callable[[File], bytes],
) -> None:
    for name, what in entries(folder).items():
        if isinstance(what, File):
            (where / name).write_bytes(content(what))
        elif not (where / name).exists():
            (where / name).mkdir()
            _make(where / name, what, entries, content)


def lines(calls: list[Call], name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that were written to the files of a name, with the number of the call that wrote each."""
    inodes: set[int] = set()
    for number, call in enumerate(calls):
        if call.kind == "O" and Path(call.path).name == name:
            inodes.add(call.inode)
        elif call.kind == "W" and call.inode in inodes:
            for line in call.data.decode(errors="replace").splitlines():
                yield number, line
