"""An example under chainrun, watched from outside: it writes the same trace as the plain program of its name.

The example itself is not changed. `train` listens at the run that it hands on: what is registered, and when a
step is done; a hook on the registered model sees the batches.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(path: Path, name: str) -> Any:
    """Import a file under a name; the examples and the plain programs beside us share theirs."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


traces = load(Path(__file__).parent / "traces.py", "traces")


def train(run: Any, example: str, trace: str, **args: Any) -> Any:
    """Run an example's function; append to the trace in a folder at every step.

    Args:
        example: its name.
        trace: the folder.
        args: the example's own arguments.
    """
    writer = traces.Trace(trace)
    batch: list[torch.Tensor] = []  # what the model was given since the last step
    logged: dict[str, Any] = {}
    parts: dict[str, Any] = {}
    register, log, step = run.register, run.log, run.step

    def listen(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if model.training:
            batch.extend(inputs)

    def register_and_listen(**objects: Any) -> None:
        parts.update(objects)
        if "model" in objects:
            objects["model"].register_forward_pre_hook(listen)
        register(**objects)

    def log_and_note(**metrics: Any) -> None:
        logged.update(metrics)
        log(**metrics)

    def step_and_write(**metrics: Any) -> None:
        logged.update(metrics)
        before = run.global_step
        try:
            step(**metrics)
        finally:  # a step that ends the segment is done all the same
            if run.global_step > before:
                model, optimizer = parts["model"], parts["optimizer"]
                writer.step(
                    run.global_step, batch=batch, loss=logged["loss"], model=model, optimizer=optimizer
                )
            batch.clear()
            logged.clear()

    run.register, run.log, run.step = register_and_listen, log_and_note, step_and_write
    return load(EXAMPLES / f"{example}.py", f"example_{example}").train(run, **args)
