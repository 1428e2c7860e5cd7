"""The training of sharded.py as a plain PyTorch program: python sharded_plain.py TRACE KINDS EPOCHS."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import fingerprint
import numpy as np
import sharded_parts
import torch


def main(trace: Path, kinds: str, epochs: int) -> None:
    random.seed(0)
    np.random.seed(0)
    torch.distributed.init_process_group("gloo")
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    learners = sharded_parts.learners(kinds, ranks)
    torch.manual_seed(rank)
    data = sharded_parts.data()
    sampler = torch.utils.data.DistributedSampler(data, seed=0)
    loader = torch.utils.data.DataLoader(data, batch_size=4, sampler=sampler)
    step = 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for batch in loader:
            step += 1
            losses = [learner.learn(batch, step) for learner in learners.values()]
            parts = [sharded_parts.state_of(learner) for learner in learners.values()]
            fingerprint.trace_parts(trace.with_suffix(f".{rank}"), step, batch, losses, parts)
    torch.distributed.destroy_process_group()
    assert "chainrun" not in sys.modules


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
