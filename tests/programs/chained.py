"""The training of plain.py as chainrun runs it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

import chainrun

sys.path.insert(0, str(Path(__file__).parent))
import fingerprint
import parts


def spoil(run: chainrun.Run, steps: int, how: str, after: int = 1, node: str | None = None) -> None:
    """Do something bad after so many steps of this segment, on one node only where it is named."""
    if steps == after and node in (None, os.environ.get("SLURMD_NODENAME")):
        if how == "raised":
            raise ValueError(f"planted after {steps} steps")
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "full":  # no room for a checkpoint
            disk = os.statvfs(run.dir)
            (run.dir / "filler").write_bytes(bytes(disk.f_bavail * disk.f_frsize - 8192))
        if how == "cancelled" and not run.resumed:
            subprocess.Popen(["scancel", os.environ["SLURM_JOB_ID"]])
        if how == "signals" and not run.resumed:
            for number in (signal.SIGUSR2, signal.SIGTERM) * 2:
                os.kill(os.getpid(), number)
        if how == "warned" and not run.resumed:
            os.kill(os.getpid(), signal.SIGUSR2)


def train(
    run: chainrun.Run,
    trace: str,
    epochs: int,
    nap: float = 0.0,
    fail_at: int = 0,
    slow_at: int = 0,
    trouble: dict | None = None,
):
    assert "OF_A_SEGMENT_BEFORE" not in os.environ  # as MASTER_ADDR and RANK are set by many a program
    os.environ["OF_A_SEGMENT_BEFORE"] = str(run.segment)
    steps = 0
    ddp = run.world_size > 1
    if ddp:
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(run.rank)
    model = wrapped = parts.model()
    sampler = None
    data = parts.Noisy(48)
    if ddp:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sampler = torch.utils.data.DistributedSampler(data, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = chainrun.DataLoader(data, batch_size=4, shuffle=sampler is None, sampler=sampler, num_workers=2)
    run.register(model=wrapped, optimizer=optimizer, scheduler=scheduler, loader=loader)
    for epoch in run.epochs(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in loader:
            loss = (wrapped(batch) - batch.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            path = Path(trace).with_suffix(f".{run.rank}")
            fingerprint.trace(path, run.global_step + 1, batch, loss, model, optimizer)
            time.sleep(nap)
            run.step(loss=loss)
            steps += 1
            if trouble:
                spoil(run, steps, **trouble)
            if fail_at and run.global_step == fail_at:
                raise ValueError(f"planted at step {fail_at}")
        scheduler.step()
    if ddp:
        torch.distributed.destroy_process_group()
    return {"weights": fingerprint.of_tensors(*model.state_dict().values())}
