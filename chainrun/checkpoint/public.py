"""`chainrun.Checkpoint`: a checkpoint without the launcher, in a notebook or an evaluation script."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from chainrun.checkpoint import export, reader
from chainrun.checkpoint.ahead import files_of
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
        self._verify([*self.manifest["files"]])

    def _verify(self, files: list[str]) -> None:
        why = flaw(self._committed, files)
        if why is not None:
            raise CheckpointError(f"the checkpoint {self.path} cannot be trusted: {why}")

    def load(self, rank: int = 0) -> dict[str, Any]:
        """Verify, then return the state_dicts of one rank by the names they were registered under.

        Tensors that were sharded over several ranks are put together; they come back whole from every rank. No
        class of the user's is imported: a named tuple is a list, a member of an enumeration its name, a dict of a class
        of one's own a dict.

        Raises:
            CheckpointError: the checkpoint cannot be trusted, or has no such rank.
        """
        tree = self._tree(rank)
        objects: dict[str, Any] = Shards(self.path, tree).full(("objects",), tree["objects"])
        return objects

    def export(self, path: str | os.PathLike[str], object: str | None = None) -> list[str]:
        """Verify, then write the tensors of one registered object as a safetensors file.

        A tensor's name is the keys that lead to it in the state_dict, joined by dots; of a module those are its
        own. Tensors that were sharded are put together, and of those that share memory each is written whole, so
        that ``load_state_dict(safetensors.torch.load_file(path))`` finds all of them.

        Args:
            path: the file; one that is there is replaced.
            object: the name it was registered under; None for the only module.

        Returns:
            The names of what is no tensor, and so was left out.

        Raises:
            UsageError: safetensors is not installed, the checkpoint has no such object, or more than one module
                and none was named, or a tensor is of a kind that such a file cannot hold.
            CheckpointError: the checkpoint cannot be trusted, or the file cannot be written.
        """
        export.require()
        tree = self._tree(0)
        name = export.choose(tree, object)
        state = Shards(self.path, tree).full(("objects", name), tree["objects"][name])
        about = {"run": str(self.manifest["run"]), "step": str(self.manifest["step"]), "object": name}
        return export.write(Path(path).absolute(), state, name, about)

    def _tree(self, rank: int) -> dict[str, Any]:
        files = self.manifest["files"]
        if rank_file(rank) not in files:
            raise CheckpointError(
                f"{self.path} has {self.manifest['world_size']} ranks, there is no rank {rank}"
            )
        needed = files_of(self._committed, rank)
        self._verify([name for name in files if name not in needed])
        try:
            return reader.read(self._committed, rank, classes=False)
        except CheckpointError as error:
            why = str(error).replace(f"{self.path}/", "")
            raise CheckpointError(f"the checkpoint {self.path} cannot be trusted: {why}") from error
