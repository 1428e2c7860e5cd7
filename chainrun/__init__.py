"""Chain SLURM jobs into one PyTorch training that goes on bit for bit.

The public names are below; they are imported when first used, so that commands which only look start
without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainrun.training.data import DataLoader
    from chainrun.training.run import Run

__version__ = "0.1.0"

_HOME = {
    "DataLoader": "chainrun.training.data",
    "Run": "chainrun.training.run",
}

__all__ = ["DataLoader", "Run", "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chainrun' has no attribute '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOME[name]), name)
