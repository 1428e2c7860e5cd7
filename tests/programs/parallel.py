"""A DDP training plainly and cut after many steps: python parallel.py FOLDER RANKS KIND WORKERS; exits 1 where they differ.

The ranks are forked before anything runs, train the plain program first (chainrun is not imported yet), then
the same function through chainrun, one chain for each cut and one cut everywhere, each segment with new process
groups and new wrappers.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import random
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
import fingerprint

KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "bare": {},
    "small buckets": {"bucket_cap_mb": 0.001},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
    "compressed": {"bucket_cap_mb": 0.001},
    "accumulated": {"gradient_as_bucket_view": True},
    "attacked": {},
}
WORKERS = int(sys.argv[4]) if len(sys.argv) > 4 else 2
EPOCHS = {"map": 2, "iterable": 2}  # kinds that go over a loader, and not over steps


STEPS = 6  # of the others


class Items(torch.utils.data.Dataset[torch.Tensor]):
    """Forty items with random draws of their worker."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(16) + index / 40 + random.random()


class Shards(torch.utils.data.IterableDataset[torch.Tensor]):
    """This rank's and worker's share of them, shuffled through a buffer."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[torch.Tensor]:
        info = torch.utils.data.get_worker_info()
        mine, workers = (info.id, info.num_workers) if info else (0, 1)
        held: list[torch.Tensor] = []
        for index in range(self.rank + 2 * mine, 40, 2 * workers):
            held.append(Items()[index])
            if len(held) > 3:
                yield held.pop(random.randrange(len(held)))
        yield from held


def train_epochs(run: Any, trace: Path, kind: str) -> None:
    """Train over a loader; each rank draws for itself."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 1))
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    random.seed(rank)
    loader_class: Any = torch.utils.data.DataLoader
    if run is not None:
        import chainrun

        loader_class = chainrun.DataLoader
    sampler = None
    if kind == "map":
        sampler = torch.utils.data.DistributedSampler(Items(), seed=1)
    data = Items() if sampler else Shards(rank)
    loader = loader_class(data, batch_size=2, sampler=sampler, num_workers=WORKERS)
    if run is not None:
        run.register(model=wrapped, optimizer=optimizer, loader=loader)
    step = 0
    for epoch in range(EPOCHS[kind]) if run is None else run.epochs(EPOCHS[kind]):
        if sampler:
            sampler.set_epoch(epoch)
        for batch in loader:
            loss = wrapped(batch).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step = step + 1 if run is None else run.global_step + 1
            fingerprint.trace(trace.with_suffix(f".{rank}"), step, batch, loss, model, optimizer)
            if run is not None:
                run.step()
    torch.distributed.destroy_process_group()


def train(run: Any, trace: Path, kind: str) -> None:
    """Train; `run` is chainrun's, or None in the plain program."""
    if kind in EPOCHS:
        train_epochs(run, trace, kind)
        return
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    layers = [m for _ in range(3) for m in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    wrapped = DistributedDataParallel(model, **KINDS[kind])
    if kind == "compressed":
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(rank)
    if run is not None:
        run.register(model=model if kind == "bare" else wrapped, optimizer=optimizer)
    for n in range(STEPS) if run is None else run.steps(STEPS):
        batch = torch.randn(8, 16)
        updates = kind != "accumulated" or n % 3 == 2
        if kind == "attacked":
            batch.requires_grad_()  # this backward adds to the weights' gradients of the last step
            wrapped(batch).square().mean().backward()
            batch = (batch + batch.grad.sign() / 8).detach()
            optimizer.zero_grad()
        with contextlib.nullcontext() if updates else wrapped.no_sync():
            loss = wrapped(batch).square().mean()
            loss.backward()
        if updates:
            optimizer.step()
            if kind != "attacked":
                optimizer.zero_grad()
        fingerprint.trace(trace.with_suffix(f".{rank}"), n + 1, batch, loss, model, optimizer)
    torch.distributed.destroy_process_group()


def chain(folder: Path, kind: str, rank: int, ranks: int, cuts: list[int], steps: int) -> None:
    """Carry the training through segments until it returns, after so many steps."""
    from chainrun.allocation import Allocation
    from chainrun.rundir import RunDir
    from chainrun.training import distributed
    from chainrun.training.run import Run
    from chainrun.training.saving import Setting
    from chainrun.training.stop import SegmentEnd

    place = {"rank": rank, "world_size": ranks, "local_rank": rank, "local_world_size": ranks}
    for restart in range(len(cuts) + 1):
        allocation = Allocation(**place, restart=restart, interrupt_at=frozenset(cuts))
        group = distributed.connect(allocation, RunDir(folder / "run").create())
        run = Run(folder / "run", setting=Setting(allocation=allocation, group=group, say=lambda line: None))
        try:
            train(run, folder / "trace", kind)
            assert run.global_step == steps
            run._finish(None)
            return  # a cut that had to wait fell together with the next one
        except SegmentEnd:
            torch.distributed.destroy_process_group()
        finally:
            run._close()
            group.leave()
            del run, group
            gc.collect()  # a forked loader worker that collects a closed process group crashes


def main(rank: int, ranks: int, port: int, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
    plain = folder / "plain"
    plain.mkdir(parents=True, exist_ok=True)
    train(None, plain / "trace", kind)
    assert "chainrun" not in sys.modules
    expected = fingerprint.read(plain / f"trace.{rank}")
    differences = []
    steps = len(expected)
    assert steps >= 20 or kind not in EPOCHS
    every = list(range(1, steps))
    chains = [[7], every[::2]] if kind in EPOCHS else [[1], [3], every]
    if "CHAINRUN_EXACT" in os.environ:
        chains = [[step] for step in every] + [every]
    for cuts in chains:
        there = folder / "-".join(map(str, cuts))
        there.mkdir(exist_ok=True)
        chain(there, kind, rank, ranks, cuts, steps)
        found = fingerprint.read(there / f"trace.{rank}")
        wrong = [step for step in expected if found.get(step) != expected[step]]
        if wrong:
            differences.append(f"{kind}, rank {rank}, cut after {cuts}: steps {wrong} differ\n")
    print("".join(differences), end="", flush=True)
    os._exit(bool(differences))  # threads of closed process groups are not waited for


if __name__ == "__main__":
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        free = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=main, args=(rank, int(sys.argv[2]), free, Path(sys.argv[1]), sys.argv[3]))
        for rank in range(int(sys.argv[2]))
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in processes))
