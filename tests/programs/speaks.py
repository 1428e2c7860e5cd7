"""A training that prints on both streams, in turn; FAIL_AT in its environment makes it fail there."""

import os
import sys

import torch

import chainrun


def train(run, steps=20, epochs=1):
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = chainrun.DataLoader(torch.ones(2 * steps, 2), batch_size=2)
    run.register(model=model, optimizer=optimizer, loader=loader)
    for _ in run.epochs(epochs):
        for batch in loader:
            loss = model(batch).square().mean()
            loss.backward()
            optimizer.step()
            step = run.global_step + 1
            print(f"step {step} on output")
            print(f"step {step} on errors", file=sys.stderr)
            if str(step) == os.environ.get("FAIL_AT"):
                raise ValueError(f"planted at step {step}")
            run.step(loss=loss)
