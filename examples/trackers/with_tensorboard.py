"""TensorBoard over a chain: one curve, in which no step is there twice.

Every segment writes an event file of its own into one folder; `purge_step` tells TensorBoard to drop what was
logged after the checkpoint that this segment goes on from::

    chainrun run examples/trackers/with_tensorboard.yaml --interrupt-at 12
    tensorboard --logdir runs/with_tensorboard/tensorboard
"""

import torch
from torch.utils.tensorboard import SummaryWriter

import chainrun


def train(run: chainrun.Run, steps: int = 30) -> float:
    """Fit a line; return the last loss."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.register(model=model, optimizer=optimizer)
    # step k is logged after it was done, so a checkpoint at step k has it: what comes after is purged
    with SummaryWriter(run.dir / "tensorboard", purge_step=run.global_step + 1) as writer:
        for _ in run.steps(steps):
            x = torch.randn(16, 4)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
            if run.is_main:
                writer.add_scalar("loss", loss.item(), run.global_step)
    return loss.item()
