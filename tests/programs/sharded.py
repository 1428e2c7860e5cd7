"""The training of sharded_plain.py as chainrun runs it."""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter

import chainrun

sys.path.insert(0, str(Path(__file__).parent))
import fingerprint
import sharded_parts


def break_save(how: str) -> None:
    """Make the next save of this rank fail while it writes its shards: ``killed``, or ``full`` disk."""
    write_data = FileSystemWriter.write_data

    def broken(self, plan, planner):
        FileSystemWriter.write_data = write_data
        if how == "killed":
            write_data(self, plan, planner)
            os.kill(os.getpid(), signal.SIGKILL)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            return write_data(self, plan, planner)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))

    FileSystemWriter.write_data = broken


def train(run: chainrun.Run, folder: str, kinds: str, epochs: int, breaks: dict[str, str] | None = None):
    """Train; write a trace, and at the start what was restored.

    Args:
        breaks: how the next save fails on rank 1, by "segment.step".
    """
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
            how = (breaks or {}).get(f"{run.segment}.{step}")
            if how and run.rank == 1:
                break_save(how)
            run.step(loss=losses[0])
    torch.distributed.destroy_process_group()
