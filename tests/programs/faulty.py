"""Small trainings with one planted fault each, for `chainrun verify`; each is named after its fault."""

from __future__ import annotations

import itertools
import os
import sys
import time
import types
from pathlib import Path

import numpy as np
import torch

import chainrun

sys.path.insert(0, str(Path(__file__).parent))
import parts

CALLS = 0  # of `count`


def begin(run, unregistered="", dataset=None, kind=torch.optim.AdamW, **more):
    """Make and register what most of these need; `more` is registered too."""
    model = parts.model()
    optimizer = kind(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3)
    loader = chainrun.DataLoader(dataset or parts.Noisy(20), batch_size=4, shuffle=True)
    things = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader, **more}
    run.register(**{name: thing for name, thing in things.items() if name not in unregistered.split()})
    return model, optimizer, scheduler, loader


def update(model, optimizer, batch, factor=1.0, mean=torch.mean):
    """Take an optimization step; return the loss."""
    loss = mean(model(batch).square()) * factor
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def exact(run, unregistered="", steps=True):
    """No fault; or that one of its objects is not registered, or that it calls no step."""
    model, optimizer, scheduler, loader = begin(run, unregistered)
    for _ in run.epochs(3):
        for batch in loader:
            loss = update(model, optimizer, batch)
            scheduler.step()
            if steps:
                run.step(loss=loss)


def by_hand(run, own, register=False):
    """A loop of steps that takes batches from an iterator, of torch's loader or of our `own`."""
    kind = chainrun.DataLoader if own else torch.utils.data.DataLoader
    model = parts.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loader = kind(parts.Noisy(80), batch_size=4, shuffle=True)
    run.register(model=model, optimizer=optimizer, **({"loader": loader} if register else {}))
    batches = iter(loader)
    for _ in run.steps(12):
        run.step(loss=update(model, optimizer, next(batches)))


def local_in_metrics(run):
    model, optimizer, _, loader = begin(run)
    average = 0.0
    for _ in run.epochs(3):
        for batch in loader:
            average = 0.9 * average + 0.1 * update(model, optimizer, batch).item()
            run.step(average=average)


def local_in_weights(run):
    model, optimizer, _, loader = begin(run)
    previous, shown = torch.zeros(()), time.time()
    for _ in run.epochs(3):
        for batch in loader:
            previous = update(model, optimizer, batch, 1 + previous.item())
            if time.time() - shown > 1.0:  # differs between any two runs, and harms nobody
                shown = time.time()
            run.step(loss=previous)


def count():
    global CALLS  # noqa: PLW0603 as scripts do
    CALLS += 1
    return CALLS


def global_of_the_module(run):
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, count()))


def counted(run):
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        for number, batch in zip(map(int, range(20)), loader, strict=False):
            run.step(loss=update(model, optimizer, batch, 1 + number))


class Trainer:
    """Keeps in an attribute what the next step needs, and in a small class an average of the weights."""

    def __init__(self, model):
        self.model, self.scale = model, 1.0

    def fit(self, run, loader, optimizer):
        for _ in run.epochs(3):
            for batch in loader:
                self.scale += 0.5
                run.step(loss=update(self.model, optimizer, batch, self.scale))


def attribute(run):
    model, optimizer, _, loader = begin(run)
    trainer = Trainer(model)
    trainer.fit(run, loader, optimizer)


class Average:
    """An average of the weights, without state_dict."""

    def __init__(self, model):
        self.weights = [p.detach().clone() for p in model.parameters()]

    def update(self, model):
        for mine, its in zip(self.weights, model.parameters(), strict=True):
            mine.lerp_(its.detach(), 0.1)


def average_of_weights(run):
    model, optimizer, _, loader = begin(run)
    ema = Average(model)
    for _ in run.epochs(3):
        for batch in loader:
            loss = update(model, optimizer, batch, 1 + ema.weights[0].sum().item())
            ema.update(model)
            run.step(loss=loss)


def teacher(run):
    model, optimizer, _, loader = begin(run)
    slow = parts.model().requires_grad_(False)
    for _ in run.epochs(3):
        for batch in loader:
            loss = update(model, optimizer, batch, 1 + slow(batch).mean().item())
            for mine, its in zip(slow.parameters(), model.parameters(), strict=True):
                mine.lerp_(its.detach(), 0.1)
            run.step(loss=loss)


def torch_generator(run):
    model, optimizer, _, loader = begin(run)
    noise = torch.Generator().manual_seed(1)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, 1 + torch.rand((), generator=noise)))


def numpy_generator(run):
    model, optimizer, _, loader = begin(run)
    noise = np.random.default_rng(1)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, 1 + noise.random()))


class Forgetful:
    """Gives its state, and does not take it back."""

    scale = 1.0

    def state_dict(self):
        return {"scale": self.scale}

    def load_state_dict(self, state):
        pass


def forgetful(run):
    scaler = Forgetful()
    model, optimizer, _, loader = begin(run, scaler=scaler)
    for _ in run.epochs(3):
        for batch in loader:
            scaler.scale += 1
            run.step(loss=update(model, optimizer, batch, scaler.scale))


def draw_before_the_loop(run):
    """The draw moves the next epoch's permutation."""
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        if run.resumed:
            torch.rand(1)
        for batch in loader:
            run.step(loss=update(model, optimizer, batch))


def draw_after_the_restore(run):
    model, optimizer, _, loader = begin(run)
    look = run.resumed
    for _ in run.epochs(3):
        for batch in loader:
            loss = update(model, optimizer, batch)
            if look:
                torch.rand(1)
                look = False
            run.step(loss=loss)


def number_of_the_segment(run):
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, run.segment))


def time_left(run):
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, run.time_left()))


def clock(run):
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, 1 + time.time() % 1))


def process_id(run):
    model, optimizer, _, loader = begin(run)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, os.getpid()))


def unseeded_generator(run):
    model, optimizer, _, loader = begin(run)
    noise = np.random.default_rng()
    run.register(noise=noise)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, 1 + noise.random()))


def unseeded(run):
    """With ``seed: null`` in its experiment."""
    exact(run)


class RandomOrder(torch.autograd.Function):
    """A mean whose gradient is added up in another order every time, as atomics on a GPU do it."""

    @staticmethod
    def forward(ctx, values):
        ctx.save_for_backward(values)
        return values.mean()

    @staticmethod
    def backward(ctx, gradient):
        (values,) = ctx.saved_tensors
        terms = np.outer(values.numpy().ravel(), np.linspace(0, 1e-3, 1000)).astype(np.float32)
        terms = np.random.Generator(np.random.PCG64()).permuted(terms, axis=1)
        return gradient * torch.from_numpy(terms.cumsum(1)[:, -1:]).double()


def sgd(parameters, lr):
    return torch.optim.SGD(parameters, lr, momentum=0.9)


def kernel(run):
    model, optimizer, _, loader = begin(run, kind=sgd)  # AdamW's first step hardly sees a gradient's size
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch, mean=RandomOrder.apply))


class Growing(parts.Noisy):
    """Reads a file that the training writes to."""

    def __init__(self, length, file):
        super().__init__(length)
        self.file = file
        file.touch()

    def __getitem__(self, index):
        return super().__getitem__(index) + self.file.stat().st_size


def data_that_changes(run, file):
    dataset = Growing(20, Path(file))
    model, optimizer, _, loader = begin(run, dataset=dataset)
    for _ in run.epochs(3):
        for batch in loader:
            loss = update(model, optimizer, batch)
            dataset.file.write_text(dataset.file.read_text() + ".")
            run.step(loss=loss)


class Visited(parts.Noisy):
    """Counts how often an item was taken, in an attribute of a kind that is not restored."""

    def __init__(self, length):
        super().__init__(length)
        self.visits = itertools.count(1)

    def __getitem__(self, index):
        return super().__getitem__(index) * next(self.visits)


def data_set_with_a_count(run):
    dataset = Visited(20)
    model, optimizer, _, loader = begin(run, dataset=dataset)
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch))


class Words(parts.Noisy):
    """Its items depend on the order of a set of strings."""

    def __init__(self, length):
        super().__init__(length)
        self.words = [*{f"word {n}" for n in range(1000)}]

    def __getitem__(self, index):
        return super().__getitem__(index) + int(self.words[index].split()[1]) / 1000


def hash_seed(run):
    model, optimizer, _, loader = begin(run, dataset=Words(20))
    for _ in run.epochs(3):
        for batch in loader:
            run.step(loss=update(model, optimizer, batch))


def rank_one(run):
    """Two ranks, each for itself; on the second a local variable is carried over."""
    model, optimizer, _, loader = begin(run)
    scale = 1.0
    for _ in run.epochs(3):
        for batch in loader:
            scale += 0.1 * run.rank
            run.step(loss=update(model, optimizer, batch, scale))


def fails_when_resumed(run):
    if run.resumed:
        raise ValueError("this part was never run before")
    exact(run)


class Fitting:
    """Has its loss from the loop alone, and reads it behind that."""

    def fit(self, run):
        model, optimizer, _, loader = begin(run)
        for _ in range(3):
            for batch in loader:
                out = types.SimpleNamespace(loss=update(model, optimizer, batch))
                self.loss = out.loss
                run.step(loss=self.loss)
            run.log(last=self.loss)


def reads_what_a_loop_that_was_over_has_set(run):
    Fitting().fit(run)
