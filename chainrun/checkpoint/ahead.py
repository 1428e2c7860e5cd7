"""The newest checkpoint's files, read and hashed while Python still imports torch."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from chainrun.checkpoint import source
from chainrun.checkpoint.store import Committed, Store, rank_file
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
        self._read: dict[Path, Future[source.Memory]] = {}
        newest = Store(run).latest()
        if newest is None:
            return
        with_others = ThreadPoolExecutor(1, thread_name_prefix="chainrun-ahead")
        for name in files_of(newest, rank % newest.manifest["world_size"]):
            stated = newest.manifest["files"][name]
            path = newest.path / name
            self._read[path] = with_others.submit(source.load, path, stated["size"], stated["xxh3_128"])
        with_others.shutdown(wait=False)

    def take(self, path: Path) -> source.Memory | None:
        """Return a file's verified content, None where it was not read ahead; once.

        Raises:
            CheckpointError: it cannot be read, or is not what the manifest states.
        """
        read = self._read.pop(path, None)
        return None if read is None else read.result()

    def close(self) -> None:
        """Give back what nobody took."""
        for path in list(self._read):
            read = self._read.pop(path)
            read.add_done_callback(lambda done: None if done.exception() else done.result().close())
