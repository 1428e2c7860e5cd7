"""One rank's part of a checkpoint, verified and put together."""

from __future__ import annotations

from typing import Any

from chainrun.checkpoint import image, kinds, replicas
from chainrun.checkpoint.ahead import Ahead, files_of
from chainrun.checkpoint.store import Committed


def read(
    checkpoint: Committed, rank: int, ahead: Ahead | None = None, *, classes: bool = True
) -> dict[str, Any]:
    """Return a rank's tree, with what only rank 0 has written; the files that it is in are verified.

    Args:
        ahead: what has been read already, or is being read.
        classes: whether to make values of classes of the user's, see `kinds.join`.

    Raises:
        CheckpointError: a file cannot be read, or is not what the manifest states.
    """
    trees = []
    for name in files_of(checkpoint, rank):
        stated = checkpoint.manifest["files"][name]
        memory = ahead.take(checkpoint.path / name) if ahead else None
        path = memory or checkpoint.path / name
        trees.append(image.read(path, stated["size"], stated["xxh3_128"]))
    tree, *first = trees
    return kinds.join(replicas.join(tree, *first) if first else tree, classes=classes)
