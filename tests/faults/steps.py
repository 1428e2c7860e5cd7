"""A training of a few steps that draws at random, for the tests of what its disk does."""

from __future__ import annotations

import torch


def parts():
    """Return what is trained; weights that depend on the seed."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def learn(model, optimizer):
    """Do one step; return its loss."""
    batch = torch.randn(16, 8)
    loss = (model(batch) - batch.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def train(run, steps):
    """Train for so many steps, each a line in the metrics; return the weights' sum."""
    torch.set_num_threads(1)
    model, optimizer = parts()
    run.register(model=model, optimizer=optimizer)
    for _ in run.steps(steps):
        run.log(loss=learn(model, optimizer))
        run.state["rank"] = run.rank  # the ranks' files differ
    return sum(float(parameter.detach().double().sum()) for parameter in model.parameters())
