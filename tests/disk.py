"""A disk that is watched, and that fails: the shim faults/disk.c, built and preloaded."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

FAULTS = Path(__file__).parent / "faults"


def shim(folder: Path) -> Path:
    """Build the shim; skip the test where there is no gcc."""
    if shutil.which("gcc") is None:
        pytest.skip("the shim that stands between a training and its disk needs gcc")
    built = folder / "disk.so"
    subprocess.run(
        [
            "gcc",
            "-Wall",
            "-Werror",
            "-O1",
            "-shared",
            "-fPIC",
            "-o",
            str(built),
            str(FAULTS / "disk.c"),
            "-ldl",
        ],
        check=True,
    )
    return built


def environment(shim: Path, root: Path, log: Path | None = None) -> dict[str, str]:
    """Return the environment of a process whose doings below `root` are watched."""
    found = {**os.environ, "LD_PRELOAD": str(shim), "DISK_ROOT": str(root)}
    return {**found, "DISK_LOG": str(log)} if log else found
