"""Chain SLURM jobs into one PyTorch training that goes on bit for bit.

The public names are below; they are imported when first used, so that commands which only look start
without importing torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chainrun.checkpoint.public import Checkpoint
    from chainrun.launch.chain import Chain, ChainFailed
    from chainrun.launch.chain import run_chain as run
    from chainrun.launch.chain import submit_chain as submit
    from chainrun.launch.verify import Verdict
    from chainrun.launch.verify import verify_function as verify
    from chainrun.training.data import DataLoader
    from chainrun.training.run import Run

__version__ = "0.1.0"

_HOME = {
    "Chain": ("chainrun.launch.chain", "Chain"),
    "ChainFailed": ("chainrun.launch.chain", "ChainFailed"),
    "Checkpoint": ("chainrun.checkpoint.public", "Checkpoint"),
    "DataLoader": ("chainrun.training.data", "DataLoader"),
    "Run": ("chainrun.training.run", "Run"),
    "run": ("chainrun.launch.chain", "run_chain"),
    "Verdict": ("chainrun.launch.verify", "Verdict"),
    "submit": ("chainrun.launch.chain", "submit_chain"),
    "verify": ("chainrun.launch.verify", "verify_function"),
}

__all__ = [
    "Chain",
    "ChainFailed",
    "Checkpoint",
    "DataLoader",
    "Run",
    "Verdict",
    "__version__",
    "run",
    "submit",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chainrun' has no attribute '{name}'; it has {', '.join(__all__)}")
    module, attribute = _HOME[name]
    return getattr(importlib.import_module(module), attribute)
