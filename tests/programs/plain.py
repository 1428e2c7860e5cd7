"""The training of the SLURM tests as a plain PyTorch program: python plain.py TRACE EPOCHS [DDP]."""

from __future__ import annotations

import os
import random
import sys
from pathlib import Path

import fingerprint
import numpy as np
import parts
import torch


def main(trace: Path, epochs: int, ddp: bool) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    rank = 0
    if ddp:
        torch.distributed.init_process_group("gloo")
        rank = torch.distributed.get_rank()
        torch.manual_seed(rank)
    model = wrapped = parts.model()
    sampler = None
    data = parts.Noisy(48)
    if ddp:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sampler = torch.utils.data.DistributedSampler(data, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    loader = torch.utils.data.DataLoader(
        data, batch_size=4, shuffle=sampler is None, sampler=sampler, num_workers=2
    )
    step = 0
    for epoch in range(epochs):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in loader:
            loss = (wrapped(batch) - batch.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            fingerprint.trace(trace.with_suffix(f".{rank}"), step, batch, loss, model, optimizer)
        scheduler.step()
    if ddp:
        torch.distributed.destroy_process_group()
    assert "chainrun" not in sys.modules


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), "RANK" in os.environ)
