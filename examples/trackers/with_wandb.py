"""Weights & Biases over a chain: one run.

chainrun exports WANDB_RUN_ID and WANDB_RESUME=allow on rank 0 of every segment, unless you have set them::

    chainrun run examples/trackers/with_wandb.yaml --interrupt-at 12

Online, W&B ignores steps that it has already: after a crash the steps since the last checkpoint come again, with
the same values, and change nothing. Offline, every segment has a folder of its own under the same id, for
`wandb sync`; after a crash those steps are in two of them.
"""

import torch
import wandb

import chainrun


def train(run: chainrun.Run, steps: int = 30) -> float:
    """Fit a line; return the last loss."""
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    run.register(model=model, optimizer=optimizer)
    with wandb.init(project="chainrun", dir=run.dir, mode=None if run.is_main else "disabled") as tracked:
        for _ in run.steps(steps):
            x = torch.randn(16, 4)
            loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step(loss=loss)
            tracked.log({"loss": loss.item()}, step=run.global_step)
    return loss.item()
