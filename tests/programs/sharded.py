"""The training of sharded_plain.py as chainrun runs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch

import chainrun

sys.path.insert(0, str(Path(__file__).parent))
import fingerprint
import sharded_parts


def train(run: chainrun.Run, folder: str, kinds: str, epochs: int, nap: float = 0.0):
    """Train; write a trace, and at the start what was restored."""
    torch.distributed.init_process_group("gloo")
    learners = sharded_parts.learners(kinds, run.world_size)
    torch.manual_seed(run.rank)
    data = sharded_parts.data()
    sampler = torch.utils.data.DistributedSampler(data, seed=0)
    loader = chainrun.DataLoader(data, batch_size=4, sampler=sampler)
    for kind, learner in learners.items():
        run.register(**{kind: learner.model, f"{kind}_optimizer": learner.optimizer})
    run.register(loader=loader)
    whole = {name: sharded_parts.whole(thing.state_dict()) for name, thing in run.registered()}
    torch.save(whole, Path(folder, f"restored-{run.segment}.{run.rank}"))
    for epoch in run.epochs(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            step = run.global_step + 1
            losses = [learner.learn(batch, step) for learner in learners.values()]
            parts = [sharded_parts.state_of(learner) for learner in learners.values()]
            fingerprint.trace_parts(Path(folder, f"trace.{run.rank}"), step, batch, losses, parts)
            time.sleep(nap)
            run.step(loss=losses[0])
    torch.distributed.destroy_process_group()
