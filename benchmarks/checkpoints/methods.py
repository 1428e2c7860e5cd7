"""What is measured: chainrun, its peers' own packages, and the limits of disk and memory.

A method saves a model and its AdamW optimizer into a folder of its own. `save` is what a training loop waits
for, as the package does it; `wait` returns when every byte is on the disk. chainrun is reached in one place,
`Chainrun`, through `chainrun.Run`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import mmap
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

import chainrun
from chainrun.training.saving import Setting

PERIOD = 1_000_000  # steps between two periodic saves of chainrun; the benchmark goes to the last one at once
CHUNK = 16 << 20


class State:
    """A model and its optimizer after one step.

    Args:
        kind: ``transformer``, layers of 7.09 M parameters, or ``small``, 6,667 parameters of 1024.
        size: bytes of weights and moments of the transformer, cut to whole layers of 85 MB.
    """

    def __init__(self, kind: str, size: float, device: str) -> None:
        torch.manual_seed(0)
        with torch.device(device):
            self.model = transformer(size) if kind == "transformer" else small()
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.device = device

    def tree(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by flat names."""
        tree = self.tree()
        moments = tree["optimizer"]["state"].items()
        found = {f"model.{name}": tensor for name, tensor in tree["model"].items()}
        return found | {f"optimizer.{n}.{key}": one for n, entry in moments for key, one in entry.items()}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())


def transformer(size: float) -> torch.nn.Module:
    layers = max(1, round(size / (3 * 4 * 7_087_872)))
    return torch.nn.Sequential(
        *(
            torch.nn.TransformerEncoderLayer(768, 12, 3072, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
    )


def small() -> torch.nn.Module:
    return torch.nn.ParameterList(torch.randn(1024) for _ in range(6667))


def sync(folder: Path) -> None:
    """Put every file of a folder, and the folder itself, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


class Method:
    """The base: whoever waits, waits for fsync."""

    package = "torch"

    def __init__(self, state: State, folder: Path) -> None:
        self.state, self.folder = state, folder
        folder.mkdir(parents=True)

    def save(self) -> None:
        raise NotImplementedError

    def wait(self) -> None:
        sync(self.folder)

    def is_done(self) -> bool:
        """Whether the save's own work is over; what does not come back from `save` before is not done then."""
        return True

    def prepare(self) -> None:
        """Remove what the save before has left, and let the disk settle; not timed."""
        shutil.rmtree(self.folder)
        self.folder.mkdir()
        sync(self.folder)  # else the next fsync, whoever calls it, waits until the freed blocks are discarded

    def close(self) -> None:
        shutil.rmtree(self.folder)


class Chainrun(Method):
    """A periodic save that is due at `run.step()`; on the disk when its manifest is."""

    package = "chainrun"

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        setting = Setting(keep=1, save_every_steps=PERIOD, background=True, say=lambda line: None)
        self.run = chainrun.Run(folder, setting=setting)
        self.run.register(model=state.model, optimizer=state.optimizer)
        self.run._start()
        self.run.step()

    def prepare(self) -> None:
        self.run._saving.settle()  # the retirement of the one before, which nobody waits for
        sync(self.folder)
        self.run.global_step += PERIOD - self.run.global_step % PERIOD - 1

    def save(self) -> None:
        self.run.step()

    def is_done(self) -> bool:
        return (self.folder / "checkpoints" / f"step-{self.run.global_step:08d}" / "manifest.json").exists()

    def wait(self) -> None:
        while not self.is_done():
            time.sleep(0.0005)

    def close(self) -> None:
        self.run._close()
        super().close()


class ChainrunLast(Chainrun):
    """The save with which a segment ends."""

    def save(self) -> None:
        self.run.global_step += 1
        self.run._finish(None)


class TorchSave(Method):
    def save(self) -> None:
        torch.save(self.state.tree(), self.folder / "state.pt")


class Safetensors(Method):
    package = "safetensors"

    def save(self) -> None:
        from safetensors.torch import save_file

        groups = self.state.optimizer.state_dict()["param_groups"]
        save_file(
            self.state.tensors(), self.folder / "state.safetensors", metadata={"groups": json.dumps(groups)}
        )


class Dcp(Method):
    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        dcp.save(self.state.tree(), checkpoint_id=self.folder / "dcp", no_dist=True)


class DcpAsync(Method):
    """`async_save` as it comes: a stager of its own for every save."""

    stager: Any = None

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._saved: Future[Any] = Future()

    def save(self) -> None:
        import torch.distributed.checkpoint as dcp

        response = dcp.async_save(
            self.state.tree(), checkpoint_id=self.folder / "dcp", no_dist=True, async_stager=self.stager
        )
        if isinstance(response, Future):
            self._saved = response
        else:  # the next optimizer step must wait for the copies
            response.staging_completion.result()
            self._saved = response.upload_completion

    def is_done(self) -> bool:
        return self._saved.done()

    def wait(self) -> None:
        self._saved.result()
        super().wait()


class DcpAsyncReused(DcpAsync):
    """`async_save` with one stager for all saves, in pinned memory and on a side stream where there is a GPU."""

    def __init__(self, state: State, folder: Path) -> None:
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        super().__init__(state, folder)
        gpu = state.device != "cpu"
        self.stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=gpu,
                use_shared_memory=False,
                use_async_staging=gpu,
                use_non_blocking_copy=gpu,
            )
        )

    def close(self) -> None:
        self.stager.close()
        super().close()


class Lightning(Method):
    package = "lightning"

    def __init__(self, state: State, folder: Path) -> None:
        from lightning.fabric import Fabric

        super().__init__(state, folder)
        self.fabric = Fabric(accelerator="cpu" if state.device == "cpu" else "gpu", devices=1)

    def save(self) -> None:
        things = {"model": self.state.model, "optimizer": self.state.optimizer}
        self.fabric.save(self.folder / "state.ckpt", things)


class Accelerate(Method):
    package = "accelerate"

    def __init__(self, state: State, folder: Path) -> None:
        from accelerate import Accelerator

        super().__init__(state, folder)
        self.accelerator = Accelerator(cpu=state.device == "cpu")
        self.accelerator.prepare(state.model, state.optimizer)

    def save(self) -> None:
        self.accelerator.save_state(str(self.folder / "state"))


class DirectWrite(Method):
    """The limit of the disk: as many bytes from aligned memory, past the page cache, and fsync."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        self._buffer = mmap.mmap(-1, CHUNK)
        self._buffer.write(os.urandom(CHUNK))

    def save(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT
        fd = os.open(self.folder / "bytes", flags, 0o600)
        try:
            for _ in range(-(-self.state.nbytes // CHUNK)):
                os.write(fd, self._buffer)
        finally:
            os.close(fd)


class Copy(Method):
    """The limit of a copy in memory: every tensor into one that is there already, pinned where there is a GPU."""

    def __init__(self, state: State, folder: Path) -> None:
        super().__init__(state, folder)
        tensors = [tensor.detach() for tensor in state.tensors().values()]
        gpu = state.device != "cpu"
        self._pairs = [(torch.empty_like(one, device="cpu", pin_memory=gpu), one) for one in tensors]

    def save(self) -> None:
        for target, source in self._pairs:
            target.copy_(source, non_blocking=True)
        if self.state.device != "cpu":
            torch.cuda.synchronize()


METHODS: dict[str, type[Method]] = {
    "chainrun": Chainrun,
    "chainrun, last save": ChainrunLast,
    "torch.save": TorchSave,
    "safetensors": Safetensors,
    "dcp.save": Dcp,
    "dcp.async_save": DcpAsync,
    "dcp.async_save, reused stager": DcpAsyncReused,
    "lightning Fabric.save": Lightning,
    "accelerate save_state": Accelerate,
    "limit: O_DIRECT write": DirectWrite,
    "limit: copy in memory": Copy,
}


def version(name: str) -> str | None:
    """Return the version of a method's package, None where it is not installed."""
    try:
        return importlib.metadata.version(METHODS[name].package)
    except importlib.metadata.PackageNotFoundError:
        return None


@contextlib.contextmanager
def opened(names: list[str], state: State, folder: Path) -> Iterator[dict[str, Method]]:
    """Make methods on one state, each in a folder of its own."""
    made: dict[str, Method] = {}
    try:
        for number, name in enumerate(names):
            made[name] = METHODS[name](state, folder / f"{number}")
        yield made
    finally:
        for method in made.values():
            method.close()
