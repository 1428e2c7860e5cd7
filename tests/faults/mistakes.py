"""Training functions with one typical mistake each."""

from __future__ import annotations

import time

import torch

import chainrun

DATA = [torch.tensor([float(i)]) for i in range(12)]


def train(run, lr: float = 0.1, steps: int = 6, width: int = 1):
    """No mistake."""
    model = torch.nn.Linear(1, width)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    run.register(model=model, optimizer=optimizer)
    for _ in run.steps(steps):
        pass


def no_boundary(run):
    for _ in range(3):
        pass


def plain_loader(run):
    run.register(model=torch.nn.Linear(1, 1), loader=torch.utils.data.DataLoader(DATA))


def out_of_order(run):
    chainrun.DataLoader(DATA, num_workers=2, in_order=False)


def forgot_everything(run):
    model = torch.nn.Linear(1, 1)
    for _ in run.steps(2):
        model(DATA[0])


def forgot_the_model(run):
    model = torch.nn.Linear(1, 1)
    run.register(optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    for _ in run.steps(2):
        pass


def a_list_of_modules(run):
    run.register(models=[torch.nn.Linear(1, 1)])


def unsaveable(run):
    run.register(model=torch.nn.Linear(1, 1))
    run.state["best"] = object()
    for _ in run.steps(2):
        pass


def outside(run):
    run.register(model=torch.nn.Linear(1, 1))
    for _ in range(4):
        run.step()


def nested(run):
    for _ in run.epochs(2):
        for _ in run.epochs(2):
            run.step()


def two_names(run):
    model = torch.nn.Linear(1, 1)
    run.register(model=model, ema=model)


def never(run):
    """Come to no boundary: a loop that forgot to call step."""
    run.register(model=torch.nn.Linear(1, 1))
    while True:
        time.sleep(0.1)
