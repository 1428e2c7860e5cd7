"""The newest checkpoint's files, read and hashed while Python still imports torch.

A process of its own does it: a thread would wait for the interpreter's lock, which an import holds nearly all the
time, thrice for every part of a file.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import NoReturn

from chainrun.checkpoint import source
from chainrun.checkpoint.store import Committed, Store, rank_file
from chainrun.errors import CheckpointError
from chainrun.rundir import RunDir


def files_of(checkpoint: Committed, rank: int) -> list[str]:
    """Return the names of a rank's file and, where that leaves out what rank 0 holds too, of rank 0's."""
    own = rank_file(rank)
    return [own, *checkpoint.manifest["files"][own].get("with", [])]


class Ahead:
    """Reads what a rank will most likely go on from.

    Args:
        rank: the files of ``rank`` modulo the checkpoint's number of ranks are read.
    """

    def __init__(self, run: RunDir, rank: int) -> None:
        self._memories: dict[Path, source.Memory] = {}
        self._child = 0
        newest = Store(run).latest()
        if newest is None:
            return
        wanted: list[tuple[source.Memory, str]] = []
        try:
            for name in files_of(newest, rank % newest.manifest["world_size"]):
                stated = newest.manifest["files"][name]
                memory = source.Memory(newest.path / name, stated["size"])
                self._memories[memory.path] = memory
                wanted.append((memory, stated["xxh3_128"]))
            answers, question = os.pipe()
        except OSError:  # no memory, no descriptor to be had: who wants the files reads them
            self.close()
            return
        try:
            self._child = os.fork()
        except OSError:  # no process
            os.close(answers)
            os.close(question)
            self.close()
            return
        if not self._child:
            _read_and_leave(wanted, question)
        os.close(question)
        self._answers = os.fdopen(answers, encoding="utf-8")

    def take(self, path: Path) -> source.Memory | None:
        """Return a file's verified content, None where it was not read ahead; once.

        Raises:
            CheckpointError: it cannot be read, or is not what the manifest states.
        """
        memory = self._memories.pop(path, None)
        if memory is None:
            return None
        for line in self._answers:
            of, problem, memory.xxh3_128 = json.loads(line)
            if of == str(path):
                if problem is None:
                    return memory
                memory.close()
                raise CheckpointError(problem)
        memory.close()  # it was killed, for want of memory maybe
        return None

    def close(self) -> None:
        """Give back what nobody took."""
        for memory in self._memories.values():
            memory.close()
        self._memories = {}
        if self._child:
            self._answers.close()
            os.kill(self._child, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._child, 0)
            self._child = 0


def _read_and_leave(wanted: list[tuple[source.Memory, str]], question: int) -> NoReturn:
    """Fill each memory, say how that went, and end this process."""
    try:
        for memory, xxh3_128 in wanted:
            problem = None
            try:
                source.fill(memory, xxh3_128)
            except CheckpointError as error:
                problem = str(error)
            os.write(question, json.dumps([str(memory.path), problem, memory.xxh3_128]).encode() + b"\n")
    finally:
        os._exit(0)
