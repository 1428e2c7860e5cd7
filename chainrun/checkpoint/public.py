"""`chainrun.Checkpoint`: a checkpoint without the launcher, in a notebook or an evaluation script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from chainrun.checkpoint import image
from chainrun.checkpoint.shards import Shards
from chainrun.checkpoint.store import flaw, rank_file, read_committed
from chainrun.errors import CheckpointError


class Checkpoint:
    """One committed checkpoint.

    Args:
        path: its directory, ``runs/NAME/checkpoints/step-…``.

    Raises:
        CheckpointError: there is no committed checkpoint there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._committed = read_committed(Path(path).absolute())
        self.path = self._committed.path
        self.manifest = self._committed.manifest

    def verify(self) -> None:
        """Read every file and compare its size and hash with the manifest.

        Raises:
            CheckpointError: names the file that differs.
        """
        why = flaw(self._committed)
        if why is not None:
            raise CheckpointError(f"the checkpoint {self.path} cannot be trusted: {why}")

    def load(self, rank: int = 0) -> dict[str, Any]:
        """Verify, then return the state_dicts of one rank by the names they were registered under.

        Tensors that were sharded over several ranks are put together; they come back whole from every rank.

        Raises:
            CheckpointError: the checkpoint cannot be trusted, or has no such rank.
        """
        self.verify()
        if rank_file(rank) not in self.manifest["files"]:
            raise CheckpointError(
                f"{self.path} has {self.manifest['world_size']} ranks, there is no rank {rank}"
            )
        tree = image.read(self.path / rank_file(rank))
        objects: dict[str, Any] = Shards(self.path, tree).full(("objects",), tree["objects"])
        return objects
