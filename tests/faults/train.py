"""The training of the fault tests: as chainrun runs it (`train`), and as a plain program without chainrun.

python train.py TRACE STEPS     trains without chainrun and writes the final state to TRACE.pt
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from pathlib import Path

import numpy as np
import torch

EPOCH = 20  # steps; no multiple of the distance of the saves


class Noisy(torch.utils.data.Dataset):
    """Items with a draw from each of the three generators, made where the item is made: in the worker."""

    def __len__(self):
        return EPOCH * 2

    def __getitem__(self, index):
        return torch.tensor([index / 40, random.random(), float(np.random.rand()), torch.rand(()).item()])


def parts(seed=None, width=16):
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
    torch.set_num_threads(1)
    layers = torch.nn.Linear(4, width), torch.nn.Dropout(0.2), torch.nn.ReLU(), torch.nn.Linear(width, 1)
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)


def learn(model, optimizer, batch):
    loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def fingerprint(model, optimizer):
    found = hashlib.sha256(repr(random.getstate()).encode())
    found.update(repr(np.random.get_state()[1:]).encode())
    found.update(torch.get_rng_state().numpy().tobytes())
    for value in model.parameters():
        found.update(value.detach().numpy().tobytes())
    for entry in optimizer.state_dict()["state"].values():
        for value in entry.values():
            found.update(value.numpy().tobytes())
    return found.hexdigest()[:16]


def note(trace, step, batch, loss, *parts):
    batch = hashlib.sha256(batch.numpy().tobytes()).hexdigest()[:16]
    line = {"step": step, "batch": batch, "loss": loss.item().hex(), "state": fingerprint(*parts)}
    with open(trace, "a") as file:
        file.write(json.dumps(line) + "\n")


def read(trace):
    """Return a trace's lines by step; a step done again after a crash must have come out the same."""
    lines = {}
    for text in Path(trace).read_text().splitlines():
        line = json.loads(text)
        assert lines.setdefault(line["step"], line) == line, f"step {line['step']} was repeated differently"
    return lines


def train(run, trace, steps, *, nap=0.0, hold=None, workers=2, ballast=0, ddp=False):
    """Train for so many steps, whole epochs.

    Args:
        trace: the file that takes a line for every step.
        nap: seconds that every step sleeps.
        hold: while this file exists, the last 60 steps take a second each.
        ballast: bytes of a buffer that make the checkpoint larger.
        ddp: every rank sees its share of the data, and the gradients' mean.
    """
    import chainrun

    model, optimizer, scheduler = parts()
    model.register_buffer("ballast", torch.zeros(ballast, dtype=torch.uint8), persistent=ballast > 0)
    wrapped, sampler = model, None
    if ddp:
        torch.distributed.init_process_group("gloo")
        torch.manual_seed(run.rank)
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        sampler = torch.utils.data.DistributedSampler(Noisy(), seed=0)
    loader = chainrun.DataLoader(
        Noisy(), batch_size=2, shuffle=sampler is None, sampler=sampler, num_workers=workers
    )
    run.register(model=model, optimizer=optimizer, scheduler=scheduler, loader=loader)
    path = f"{trace}.{run.rank}"
    for epoch in run.epochs(-(-steps // len(loader))):
        if sampler is not None:
            sampler.set_epoch(epoch)
        for batch in loader:
            loss = learn(wrapped, optimizer, batch)
            note(path, run.global_step + 1, batch, loss, model, optimizer)
            run.state["sum"] = run.state.get("sum", 0.0) + loss.item()
            if nap:
                time.sleep(nap)
            if hold and run.global_step > steps - 60 and Path(hold).exists():
                time.sleep(1.0)
            run.step(loss=loss)
        scheduler.step()
    if ddp:
        torch.distributed.destroy_process_group()
    return {"state": fingerprint(model, optimizer), "sum": run.state["sum"]}


def main(trace, steps):
    model, optimizer, scheduler = parts(seed=0)
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=2, shuffle=True, num_workers=2)
    step = 0
    for _ in range(-(-steps // EPOCH)):
        for batch in loader:
            step += 1
            note(f"{trace}.0", step, batch, learn(model, optimizer, batch), model, optimizer)
        scheduler.step()
    torch.save(model.state_dict(), f"{trace}.pt")
    assert "chainrun" not in sys.modules


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
