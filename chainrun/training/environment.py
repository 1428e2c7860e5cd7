"""What the bits of a training depend on besides its state: noted in every manifest, compared at a restore."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from chainrun.allocation import Allocation

_ELSEWHERE = ("host",)  # noted for the reader; another node of the same kind computes the same


def facts(allocation: Allocation, git: Mapping[str, str]) -> dict[str, Any]:
    """Return the facts by name, as plain data.

    Args:
        git: the commit and the local changes of the user's code.
    """
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "hash_seed": os.environ.get("PYTHONHASHSEED", "random"),
        "host": allocation.host,
        **git,
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
        found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
        found["gpu"] = torch.cuda.get_device_name(allocation.local_rank % torch.cuda.device_count())
        found["gpus"] = torch.cuda.device_count()
        found["cudnn_benchmark"] = torch.backends.cudnn.benchmark
        found["cudnn_deterministic"] = torch.backends.cudnn.deterministic
        with contextlib.suppress(RuntimeError):  # torch refuses to say where its newer switch was used
            found["tf32_matmul"] = torch.backends.cuda.matmul.allow_tf32
            found["tf32_cudnn"] = torch.backends.cudnn.allow_tf32
    return found


def drift(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return what has changed since a checkpoint, as ``name: then -> now``; empty where nothing has."""
    names = [name for name in {**then, **now} if name not in _ELSEWHERE]
    return [
        f"{name}: {then.get(name, 'not set')} -> {now.get(name, 'not set')}"
        for name in names
        if then.get(name) != now.get(name)
    ]
