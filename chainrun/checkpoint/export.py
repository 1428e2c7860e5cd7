"""The tensors of one registered object as a safetensors file, for programs that know neither chainrun nor pickle."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from chainrun.checkpoint import image
from chainrun.errors import CheckpointError, UsageError, nearest
from chainrun.rundir import fsync_dir


def require() -> None:
    """Check that safetensors is there, before anything is read.

    Raises:
        UsageError: it is not installed.
    """
    try:
        importlib.import_module("safetensors.torch")
    except ImportError:
        raise UsageError("exporting needs safetensors: pip install 'chainrun[export]'") from None


def choose(tree: dict[str, Any], name: str | None) -> str:
    """Return the name of the object to export: the one that was asked for, else the only module.

    Raises:
        UsageError: there is no such object, or not just one module.
    """
    modules = [each for each, extra in tree["extras"].items() if "buckets" in extra]
    known = ", ".join(tree["objects"]) or "nothing"
    if name is None and len(modules) == 1:
        return str(modules[0])
    if name is None:
        raise UsageError(
            f"the checkpoint holds {len(modules)} modules; say which object to export with --object (from Python: "
            f"object=). It holds {known}"
        )
    if name not in tree["objects"]:
        raise UsageError(
            f"the checkpoint has no object '{name}'{nearest(name, tree['objects'])}; it holds {known}"
        )
    return name


def write(path: Path, state: Any, name: str, about: dict[str, str]) -> list[str]:
    """Write the tensors of a state_dict durably; return the names of what is no tensor and was left out.

    Args:
        name: of the object, for errors.
        about: goes into the file's metadata.

    Raises:
        UsageError: the state holds no tensor or one that it cannot hold.
        CheckpointError: the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors, left_out = _sorted(state, name)
    if not tensors:
        raise UsageError(f"'{name}' holds no tensor that could be exported")
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary, metadata={"format": "pt", **about})
        fd = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except Exception as error:
        temporary.unlink(missing_ok=True)
        why = image.reason(error, path.parent) if path.parent.is_dir() else "its folder does not exist"
        raise CheckpointError(f"{path} could not be written: {why}") from error
    return left_out


def _sorted(state: Any, name: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of a state_dict by the keys that lead to them, and the names of all else."""
    tensors: dict[str, torch.Tensor] = {}
    left_out: list[str] = []
    written: set[int] = set()
    for at, value in _leaves(state, ""):
        if not isinstance(value, torch.Tensor):
            left_out.append(at)
            continue
        if value.layout != torch.strided or value.is_quantized:
            kind = "quantized" if value.is_quantized else str(value.layout)
            raise UsageError(f"'{name}': {at} is {kind}, which a safetensors file cannot hold")
        if at in tensors:
            raise UsageError(f"'{name}' has two tensors whose keys, joined by dots, are {at}")
        tensor = value.detach().contiguous()
        memory = tensor.untyped_storage().data_ptr()
        # a file of this format cannot say that two tensors share memory
        tensors[at] = tensor.clone() if memory in written else tensor
        written.add(memory)
    return tensors, left_out


def _leaves(tree: Any, at: str) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (dict, list, tuple)) and tree:
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from _leaves(value, f"{at}.{key}" if at else str(key))
    else:
        yield at, tree
