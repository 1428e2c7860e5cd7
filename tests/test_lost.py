"""A resumed run tells which variables of the function it has to do without, and never of one that does not matter."""

from __future__ import annotations

import collections
import contextlib
import copy
import enum
import functools
import io
import itertools
import json
import logging
import os
import queue
import random
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from chain import cut, lost
from tqdm import tqdm

from chainrun.rundir import RunDir
from chainrun.training import liveness
from chainrun.training import lost as variables_lost

STEPS = 10
CALLS = 0
SUMS = {"loss": 0.0}
SETTINGS: dict[str, Any] = {"lr": 0.1}
CACHE: dict[int, float] = {}
TABLE: Any = None
WARNED = False


@pytest.fixture(autouse=True)
def _fresh_globals(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the functions below change in this module is as in a new process, for each test."""
    for name, value in (("CALLS", 0), ("AVERAGE", 0.0), ("TABLE", None), ("WARNED", False)):
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setitem(SUMS, "loss", 0.0)
    CACHE.clear()


def told(train: Callable[..., Any], cuts: Any = (3, 7)) -> list[str]:
    """Return what is said of variables when a training is cut."""
    after = {"CALLS": 0, "AVERAGE": 0.0, "TABLE": None, "WARNED": False}

    def anew(run: Any, DataLoader: Any) -> Any:
        globals().update(after)  # each segment is a process of its own
        SUMS["loss"] = 0.0
        CACHE.clear()
        return train(run, DataLoader)

    return lost(cut(anew, cuts))


def begin(run: Any, DataLoader: Any, **more: Any) -> tuple[Any, Any, Any]:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    loader = DataLoader(torch.randn(STEPS, 2), batch_size=2, shuffle=True)
    run.register(model=model, optimizer=optimizer, loader=loader, **more)
    return model, optimizer, loader


def update(model: Any, optimizer: Any, batch: Any) -> torch.Tensor:
    loss = model(batch).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


# ---- what is lost: the function, and what has to be named


def counter(run: Any, DataLoader: Any) -> int:
    model, optimizer, loader = begin(run, DataLoader)
    seen = 0
    for _ in run.epochs(2):
        for batch in loader:
            update(model, optimizer, batch)
            seen += len(batch)
            run.step()
    return seen


def running_average(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    average = None
    for _ in run.epochs(2):
        for batch in loader:
            loss = update(model, optimizer, batch).item()
            average = loss if average is None else 0.9 * average + 0.1 * loss
            run.step(average=average)


def sum_of_the_epoch(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    for _ in run.epochs(2):
        total = 0.0
        for batch in loader:
            total += update(model, optimizer, batch)
            run.step()
        run.log(total=total)


def best(run: Any, DataLoader: Any) -> float:
    model, optimizer, loader = begin(run, DataLoader)
    best_loss = float("inf")
    for _ in run.epochs(4):
        for batch in loader:
            loss = update(model, optimizer, batch)
            run.step()
        if loss < best_loss:
            best_loss = loss.item()
    return best_loss


def anchored(run: Any, DataLoader: Any) -> None:
    """To the weights before the training, which a resumed function does not see any more."""
    model, optimizer, loader = begin(run, DataLoader)
    anchor = [weight.detach().clone() for weight in model.parameters()]
    for _ in run.epochs(2):
        for batch in loader:
            near = sum((w - a).square().sum() for w, a in zip(model.parameters(), anchor, strict=True))
            loss = model(batch).square().mean() + near
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()


def best_weights(run: Any, DataLoader: Any) -> None:
    """No dict at first: there are no keys to compare in a resumed function."""
    model, optimizer, loader = begin(run, DataLoader)
    kept = None
    for _ in run.epochs(3):
        for batch in loader:
            update(model, optimizer, batch)
            run.step()
        if kept is None or model.weight.norm() < kept["weight"].norm():
            kept = copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)


class Turn(NamedTuple):
    state: torch.Tensor
    reward: float


def replayed(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    memory: collections.deque[Turn] = collections.deque(maxlen=200)
    for _ in run.steps(STEPS):
        memory.extend(Turn(torch.randn(2), random.random()) for _ in range(50))
        update(model, optimizer, torch.stack([one.state for one in random.sample(memory, 4)]))


def big_array(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    table = np.zeros((1 << 19, 4), np.float32)
    for _ in run.steps(STEPS):
        table += 1.0
        update(model, optimizer, torch.from_numpy(table[:2, :2]))


def rate_set_once(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    scale = 1.0
    for step in run.steps(STEPS):
        if step == 2:
            scale = 0.1
        update(model, optimizer, torch.randn(2, 2) * scale)


def history(run: Any, DataLoader: Any) -> float:
    model, optimizer, _ = begin(run, DataLoader)
    losses = []
    for _ in run.steps(STEPS):
        losses.append(update(model, optimizer, torch.randn(2, 2)).item())
    return sum(losses)


class Lookahead:
    """Slow weights that follow the optimizer's; it has state, and nobody registers it."""

    def __init__(self, optimizer: Any, every: int = 2) -> None:
        self.optimizer, self.every, self.count = optimizer, every, 0
        self.slow = [[p.detach().clone() for p in g["params"]] for g in optimizer.param_groups]

    def step(self) -> None:
        self.optimizer.step()
        self.count += 1
        if self.count % self.every == 0:
            for group, slow in zip(self.optimizer.param_groups, self.slow, strict=True):
                for fast, mine in zip(group["params"], slow, strict=True):
                    mine.add_(fast.detach() - mine, alpha=0.5)
                    fast.data.copy_(mine)


def lookahead(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    ahead = Lookahead(optimizer)
    for _ in run.epochs(2):
        for batch in loader:
            model(batch).sum().backward()
            ahead.step()
            optimizer.zero_grad()
            run.step()


class LookaheadOptimizer(torch.optim.Optimizer):
    """The same as a kind of optimizer, as packages have it."""

    def __init__(self, base: torch.optim.Optimizer) -> None:
        self.base = base
        super().__init__(base.param_groups, {})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    def step(self, closure: Any = None) -> None:
        self.base.step()
        for group in self.param_groups:
            for p in group["params"]:
                p.data.lerp_(self.state[p]["slow"].lerp_(p.detach(), 0.5), 0.5)


def lookahead_optimizer(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    ahead = LookaheadOptimizer(optimizer)
    for _ in run.steps(STEPS):
        update(model, ahead, torch.randn(2, 2))


def moving_average_module(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    slow = torch.nn.Linear(2, 1).requires_grad_(False)
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2) * slow(torch.ones(2)))
        for mine, its in zip(slow.parameters(), model.parameters(), strict=True):
            mine.lerp_(its.detach(), 0.1)


class Meter:
    """The examples' AverageMeter."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.val = self.avg = self.sum = self.count = 0

    def update(self, val: Any, n: int = 1) -> None:
        self.val = val
        self.sum += val * n
        self.count += n
        self.avg = self.sum / self.count


def meter(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    losses = Meter()
    for _ in run.epochs(2):
        losses.reset()
        for batch in loader:
            losses.update(update(model, optimizer, batch).item(), len(batch))
            run.step(loss=losses.avg)


def meters_by_name(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    meters: Any = collections.defaultdict(Meter)
    for _ in run.steps(STEPS):
        meters["loss"].update(update(model, optimizer, torch.randn(2, 2)).item())
        run.log(loss=meters["loss"].avg)


class Trainer:
    """A trainer class: the counts are its attributes."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer = model, optimizer
        self.patience, self.batch, self.loss = 0, None, 0.0

    def fit(self, run: Any, loader: Any) -> None:
        for _ in run.epochs(3):
            for self.batch in loader:
                self.one_step()
                run.step()

    def one_step(self) -> None:
        self.loss = update(self.model, self.optimizer, self.batch).item()
        if self.loss > 0.1:
            self.patience += 1


def attribute_of_a_trainer(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    Trainer(model, optimizer).fit(run, loader)


def count_call() -> int:
    global CALLS  # noqa: PLW0603 as scripts do
    CALLS += 1
    return CALLS


def module_global(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    for _ in run.epochs(2):
        for batch in loader:
            update(model, optimizer, batch * count_call())
            run.step()


def value_in_a_global_dict(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    for _ in run.steps(STEPS):
        SUMS["loss"] += update(model, optimizer, torch.randn(2, 2)).item()


def variable_of_an_outer_function(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    count = 0

    def one_step() -> None:
        nonlocal count
        count += 1
        update(model, optimizer, torch.randn(2, 2) * count)

    for _ in run.steps(STEPS):
        one_step()


def variable_of_a_running_outer_function(run: Any, DataLoader: Any) -> None:
    """Named once, as the variable of the function that has it."""
    model, optimizer, loader = begin(run, DataLoader)
    count = 0

    def turn() -> None:
        nonlocal count
        for x in loader:
            count += 1
            update(model, optimizer, x * count)
            run.step()

    for _ in run.epochs(2):
        turn()


def generator(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    noise = np.random.default_rng(1)
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.full((2, 2), noise.random()))


def hidden_state(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    hidden = torch.zeros(2, 1)
    for _ in run.steps(STEPS):
        hidden = model(torch.randn(2, 2)) + hidden.detach()
        hidden.sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@dataclass
class Stop:
    best: float = 9.0
    bad: int = 0
    seen: list[float] = field(default_factory=list)


def data_class(run: Any, DataLoader: Any) -> int:
    model, optimizer, _ = begin(run, DataLoader)
    stop = Stop()
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2))
        stop.bad += 1
        if stop.bad > 20:
            break
    return stop.bad


def smoothed(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    window: Any = collections.deque(maxlen=5)
    for _ in run.steps(STEPS):
        window.append(update(model, optimizer, torch.randn(2, 2)).item())
        run.log(smoothed=sum(window) / len(window))


def best_weights_of_an_object(run: Any, DataLoader: Any) -> None:
    """As early stopping does: None at first, and no function's variable."""
    model, optimizer, loader = begin(run, DataLoader)
    stopping = types.SimpleNamespace(best=None)
    for _ in run.epochs(3):
        for batch in loader:
            update(model, optimizer, batch)
            run.step()
        if stopping.best is None:
            stopping.best = copy.deepcopy(model.state_dict())
    model.load_state_dict(stopping.best)


def best_weights_in_a_dict(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    kept: dict[str, Any] = {}
    for epoch in run.epochs(3):
        for batch in loader:
            update(model, optimizer, batch)
            run.step()
        if not kept:
            kept = {"epoch": epoch, "model": copy.deepcopy(model.state_dict())}
    model.load_state_dict(kept["model"])


class Phase(enum.Enum):
    WARM = 1
    MAIN = 2


def phases(run: Any, DataLoader: Any) -> None:
    """What a variable holds is neither a number nor a tensor."""
    model, optimizer, loader = begin(run, DataLoader)
    slow = torch.optim.SGD(model.parameters(), lr=0.01)
    run.register(slow=slow)
    phase, criterion, dtype, loss_of, used = (
        Phase.WARM,
        torch.nn.MSELoss(),
        torch.float32,
        torch.sum,
        optimizer,
    )
    for _ in run.epochs(3):
        for batch in loader:
            out = model(batch.to(dtype).float())
            loss = criterion(out, torch.zeros_like(out)) + loss_of(out.square())
            used.zero_grad()
            (loss * phase.value).backward()
            used.step()
            run.step()
            if run.global_step == 2:
                phase, criterion, dtype = Phase.MAIN, torch.nn.HuberLoss(delta=2.0), torch.bfloat16
                loss_of, used = torch.mean, slow


@dataclass
class Moment:
    state: torch.Tensor
    reward: float


def replayed_objects(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    memory: list[Moment] = []
    for _ in run.steps(STEPS):
        memory += [Moment(torch.randn(2), random.random()) for _ in range(50)]
        update(model, optimizer, torch.stack([one.state for one in random.sample(memory, 4)]))


def rates_of_the_restored(run: Any, DataLoader: Any) -> None:
    """Read before the loop from what a resumed function has restored by then."""
    model, optimizer, _ = begin(run, DataLoader)
    rates = [group["lr"] for group in optimizer.param_groups]
    for step in run.steps(STEPS):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (step + 1) / STEPS
        update(model, optimizer, torch.randn(2, 2))


def loss_of_the_restored(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    first = model(torch.ones(2, 2)).square().mean().item()
    for _ in run.epochs(3):
        for batch in loader:
            loss = model(batch).square().mean() / first
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()


def rates() -> Iterator[float]:
    rate = 0.5
    while True:
        yield rate
        rate *= 0.8


def values_of_a_generator(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    schedule = rates()
    for _ in run.epochs(3):
        for batch in loader:
            optimizer.param_groups[0]["lr"] = next(schedule)
            update(model, optimizer, batch)
            run.step()


def scaled(loader: Any) -> Iterator[Any]:
    scale = 1.0
    while True:
        for batch in loader:
            yield batch * scale
        scale *= 0.5


def variable_of_a_generator_around_a_loader(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    source = scaled(loader)
    for _ in run.steps(STEPS):
        update(model, optimizer, next(source))


class Scaling:
    by = 1.0


def attribute_of_a_class(run: Any, DataLoader: Any) -> None:
    Scaling.by = 1.0
    model, optimizer, loader = begin(run, DataLoader)
    for _ in run.epochs(3):
        for batch in loader:
            update(model, optimizer, batch * Scaling.by)
            Scaling.by *= 0.9
            run.step()


def labels_of_the_model(run: Any, DataLoader: Any) -> None:
    """A resumed function asks it with the weights of the cut."""
    model, optimizer, _ = begin(run, DataLoader)
    inputs = torch.arange(16.0).view(8, 2)
    for _ in run.epochs(3):
        with torch.no_grad():
            labels = model(inputs) * 2
        for x, y in torch.utils.data.DataLoader(torch.utils.data.TensorDataset(inputs, labels), batch_size=2):
            loss = (model(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.step()


def hidden_state_that_is_saved_as_well(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    hidden = torch.zeros(2, 1)
    for _ in run.steps(STEPS):
        hidden = (model(torch.randn(2, 2)) + hidden).detach()
        run.state["hidden"] = hidden  # and never read back
        update(model, optimizer, hidden.expand(2, 2))


class Replay:
    """Is registered, and its last observation is in a variable too."""

    def __init__(self) -> None:
        self.seen: collections.deque[Any] = collections.deque(maxlen=9)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": [torch.tensor(one) for one in self.seen]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = collections.deque((one.numpy() for one in state["seen"]), maxlen=9)


def observation(run: Any, DataLoader: Any) -> None:
    replay = Replay()
    model, optimizer, _ = begin(run, DataLoader, replay=replay)
    seen = np.array([0.5, 1], np.float32)
    for _ in run.steps(STEPS):
        seen = seen * np.float32(0.9)
        replay.seen.append(seen)
        update(model, optimizer, torch.tensor(np.stack(replay.seen)))


class Steps:
    """Is called with all that a batch holds."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.baseline = model, optimizer, 0.0

    def training_step(self, x: torch.Tensor, scale: float = 1.0) -> None:
        loss = update(self.model, self.optimizer, x * scale + self.baseline)
        self.baseline = 0.9 * self.baseline + loss.item()


def called_with_a_star(run: Any, DataLoader: Any) -> None:
    one = Steps(*begin(run, DataLoader)[:2])
    for _ in run.steps(STEPS):
        one.training_step(*(torch.randn(2, 2), 0.5))


def called_with_two_stars(run: Any, DataLoader: Any) -> None:
    two = Steps(*begin(run, DataLoader)[:2])
    for _ in run.steps(STEPS):
        two.training_step(*(torch.randn(2, 2),), scale=0.5)


class ByName:
    """Called by no name of its methods."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.listed = model, optimizer, 0.0
        self.held = self.given = self.formed = 0.0

    def in_a_variable(self, x: torch.Tensor) -> None:
        self.held = 0.9 * self.held + update(self.model, self.optimizer, x + self.held).item()

    def after_the_batch(self, x: torch.Tensor) -> None:
        self.given = 0.9 * self.given + update(self.model, self.optimizer, x + self.given).item()

    def in_a_list(self, x: torch.Tensor) -> None:
        self.listed = 0.9 * self.listed + update(self.model, self.optimizer, x + self.listed).item()

    def when_training(self, x: torch.Tensor) -> None:
        self.formed = 0.9 * self.formed + update(self.model, self.optimizer, x + self.formed).item()

    def tell(self, event: str, x: torch.Tensor) -> None:
        getattr(self, event)(x)

    def when(self, what: str, x: torch.Tensor) -> None:
        getattr(self, f"when_{what}")(x)


def called_as_a_variable(run: Any, DataLoader: Any) -> None:
    three = ByName(*begin(run, DataLoader)[:2])
    step = three.in_a_variable
    for _ in run.steps(STEPS):
        step(torch.randn(2, 2))


def called_by_a_text(run: Any, DataLoader: Any) -> None:
    four = ByName(*begin(run, DataLoader)[:2])
    for _ in run.steps(STEPS):
        four.tell("after_the_batch", torch.randn(2, 2))


def called_by_a_text_of_parts(run: Any, DataLoader: Any) -> None:
    five = ByName(*begin(run, DataLoader)[:2])
    for _ in run.steps(STEPS):
        five.when("training", torch.randn(2, 2))


AVERAGE = 0.0


def averaged(model: Any, optimizer: Any, x: torch.Tensor) -> None:
    global AVERAGE  # noqa: PLW0603 as scripts do
    AVERAGE = 0.9 * AVERAGE + update(model, optimizer, x + AVERAGE).item()


def called_as_a_partial(run: Any, DataLoader: Any) -> None:
    step = functools.partial(averaged, *begin(run, DataLoader)[:2])
    for _ in run.steps(STEPS):
        step(torch.randn(2, 2))


def dict_of_two_names(run: Any, DataLoader: Any) -> None:
    """The variable that comes first is written before it is read; what holds it as well is not."""
    model, optimizer, _ = begin(run, DataLoader)
    fisher = {0: {name: torch.zeros_like(p) for name, p in model.named_parameters()}}
    for _ in run.steps(STEPS):
        penalty = torch.stack([(fisher[0][name] * p).sum() for name, p in model.named_parameters()]).sum()
        update(model, optimizer, torch.randn(2, 2) + penalty.item())
        squares = {name: fisher[0][name] + p.grad.square() for name, p in model.named_parameters()}
        fisher[0] = squares


def called_from_a_list(run: Any, DataLoader: Any) -> None:
    six = ByName(*begin(run, DataLoader)[:2])
    hooks = [six.in_a_list]
    for _ in run.steps(STEPS):
        x = torch.randn(2, 2)
        for hook in hooks:
            hook(x)


class Passed:
    """Of its methods one is called by torch alone."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.factor = model, optimizer, 1.0

    def scaled(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x) * self.factor

    def train(self, x: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss = torch.utils.checkpoint.checkpoint(self.scaled, x, use_reentrant=False).square().mean()
        loss.backward()
        self.optimizer.step()
        self.factor = loss.item()


def method_that_is_passed_on(run: Any, DataLoader: Any) -> None:
    seven = Passed(*begin(run, DataLoader)[:2])
    for _ in run.steps(STEPS):
        seven.train(torch.randn(2, 2))


class Controller:
    """Its calls always write what the loop has read before."""

    def __init__(self) -> None:
        self.beta = 1.0

    def __call__(self, loss: torch.Tensor) -> None:
        self.beta = loss.item() * 2


class Steered:
    """So does its method."""

    def __init__(self) -> None:
        self.beta = 1.0

    def steer(self, loss: torch.Tensor) -> None:
        self.beta = loss.item() * 2


def read_before_the_call_that_writes(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    control = Controller()
    for _ in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2) * control.beta)
        control(loss)


def read_in_the_call_that_writes(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    controller = Controller()
    for _ in run.steps(STEPS):
        controller(update(model, optimizer, torch.randn(2, 2) * controller.beta))


def read_in_a_condition_in_the_call_that_writes(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    steered = Steered()
    for _ in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2))
        steered.steer(loss * steered.beta if loss < 1e9 else loss)


def set_anew_by_each_epoch(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    for _ in run.epochs(2):
        hidden = None
        for batch in loader:
            hidden = update(model, optimizer, batch if hidden is None else batch * hidden)
            run.step()


class Swapped:
    """Puts its weights in the model's place, and those back."""

    def __init__(self, model: Any) -> None:
        self.model, self.backup = model, {}

    def apply(self) -> None:
        for name, p in self.model.named_parameters():
            self.backup[name] = p.detach().clone()
            p.data.mul_(0.5)

    def put_back(self) -> None:
        for name, p in self.model.named_parameters():
            p.data.copy_(self.backup.get(name, p.data))


class Registered(Swapped):
    """Saves what it has, but not what it has put aside."""

    def state_dict(self) -> dict[str, Any]:
        return {"model": "of its own"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["model"] == "of its own"


class InAList(Registered):
    def apply(self) -> None:
        self.aside = [p.detach().clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            p.data.mul_(0.5)

    def put_back(self) -> None:
        for p, kept in zip(self.model.parameters(), self.aside, strict=True):
            p.data.copy_(kept)


class Saved(InAList):
    """Saves that as well."""

    aside = ()

    def state_dict(self) -> dict[str, Any]:
        return {"aside": [*self.aside]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.aside = state["aside"]


def evaluated(run: Any, DataLoader: Any, kind: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    val = DataLoader(torch.ones(4, 2), batch_size=2)
    average = kind(model)
    run.register(val=val, **({"average": average} if kind is not Swapped else {}))
    for _ in run.epochs(3):
        for batch in loader:
            update(model, optimizer, batch)
            run.step()
        average.apply()
        for batch in val:
            run.log(loss=model(batch[0]).sum())
            run.step()
        average.put_back()


def weights_put_aside(run: Any, DataLoader: Any) -> None:
    evaluated(run, DataLoader, Swapped)


def weights_put_aside_by_a_registered_object(run: Any, DataLoader: Any) -> None:
    evaluated(run, DataLoader, Registered)


def weights_put_aside_in_a_list(run: Any, DataLoader: Any) -> None:
    evaluated(run, DataLoader, InAList)


@contextlib.contextmanager
def averaged_weights(model: torch.nn.Module, average: torch.nn.Module) -> Iterator[None]:
    kept = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter, mean in zip(model.parameters(), average.parameters(), strict=True):
        parameter.data.copy_(mean)
    yield
    for parameter, before in zip(model.parameters(), kept, strict=True):
        parameter.data.copy_(before)


def weights_put_aside_by_a_context_manager(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    val = DataLoader(torch.ones(4, 2), batch_size=2)
    average = torch.optim.swa_utils.AveragedModel(model)
    run.register(val=val, average=average)
    for _ in run.epochs(3):
        for batch in loader:
            update(model, optimizer, batch)
            average.update_parameters(model)
            run.step()
        with averaged_weights(model, average.module):
            for batch in val:
                run.log(loss=model(batch[0]).sum())
                run.step()


def weights_put_aside_and_saved(run: Any, DataLoader: Any) -> None:
    evaluated(run, DataLoader, Saved)


class Warmed:
    """A scheduler's lambda reads one attribute of it, and a loader calls its method."""

    def __init__(self) -> None:
        self.decay = self.ratio = 1.0

    def collate(self, items: Any) -> torch.Tensor:
        return torch.stack(items) * self.ratio


def read_by_a_scheduler(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    warmed = Warmed()
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmed.decay / (step + 1))
    run.register(scheduler=scheduler)
    for step in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2))
        scheduler.step()
        if step == 1:
            warmed.decay = 0.5


def read_by_a_loader(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    owner: Any = Warmed()
    owner.model = model  # a trainer: what it keeps is no data's
    batches = DataLoader(torch.randn(STEPS, 2), batch_size=2, collate_fn=owner.collate)
    run.register(batches=batches)
    for _ in run.epochs(2):
        for batch in batches:
            update(model, optimizer, batch)
            run.step()
        owner.ratio = 0.5


class Smallest:
    def __init__(self) -> None:
        self.smallest = 9.0

    def at_the_end(self, value: float) -> float:
        self.smallest = min(self.smallest, value)
        return self.smallest


def object_of_two_names(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    callback = Smallest()
    callbacks = [callback]
    for _ in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2)).item()
        run.log(smallest=sum(each.at_the_end(loss) for each in callbacks))


def closure(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)

    def counting() -> Callable[[], int]:
        count = 0

        def one_more() -> int:
            nonlocal count
            count += 1
            return count

        return one_more

    count = counting()
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.full((2, 2), float(count())))


class Config(dict):
    """Its keys are attributes too."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__  # type: ignore[assignment]


class History(list):
    def mean(self) -> float:
        return sum(self) / len(self) if self else 1.0


def dict_by_attributes(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    config = Config(scale=1.0)
    for _ in run.steps(STEPS):
        config.scale *= 0.5
        update(model, optimizer, torch.randn(2, 2) * config.scale)


def list_of_a_class(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    history = History()
    for _ in run.steps(STEPS):
        history.append(update(model, optimizer, torch.randn(2, 2) * history.mean()).item())


def default_of_an_argument(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)

    def smooth(value: float, seen: list[float] = []) -> float:  # noqa: B006
        seen.append(value)
        return sum(seen) / len(seen)

    for step in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2) * smooth(float(step)))


def default_of_a_method(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)

    class Smoother:
        def of(self, value: float, seen: list[float] = []) -> float:  # noqa: B006
            seen.append(value)
            return sum(seen) / len(seen)

    smoother = Smoother()
    for step in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2) * smoother.of(float(step)))


def dict_by_a_member_and_a_parameter(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    scales, sums = {Phase.WARM: 1.0, (0, 1): 1.0}, {model.weight: torch.zeros(1, 2)}
    for _ in run.steps(STEPS):
        scale = scales[Phase.WARM] * scales[0, 1] + sums[model.weight].sum()
        loss = update(model, optimizer, torch.randn(2, 2) * scale)
        scales[Phase.WARM] += loss.item()
        scales[0, 1] *= 0.5
        sums[model.weight] = sums[model.weight] + model.weight.detach()


def dict_of_many(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    weights = dict.fromkeys(range(100), 1.0)
    for step in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2) * weights[step % 2])
        weights[step % 2] += loss.item()


class Hyper:
    """Keeps what it is given in a dict, and works with operators."""

    def __init__(self, **values: float) -> None:
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> float:
        return self._values[name]  # type: ignore[no-any-return]

    def __setattr__(self, name: str, value: float) -> None:
        self._values[name] = value


class Scale:
    def __init__(self) -> None:
        self.by = 1.0

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.by


def attributes_by_a_method(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    hyper = Hyper(beta=1.0)
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2) * hyper.beta)
        hyper.beta = hyper.beta * 0.9


def operator(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    scale = Scale()
    for _ in run.steps(STEPS):
        update(model, optimizer, 1 / scale * torch.randn(2, 2))
        scale.by += 1.0


def losses_by_name(run: Any, DataLoader: Any) -> float:
    model, optimizer, _ = begin(run, DataLoader)
    losses = collections.defaultdict(list)
    for _ in run.steps(STEPS):
        losses["all"].append(update(model, optimizer, torch.randn(2, 2)).item())
    return sum(losses["all"])


def hardest_first(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    hardest: Any = queue.PriorityQueue()
    for step in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2) * (1 + hardest.qsize()))
        hardest.put((loss.item(), step))


LOST = [
    (counter, "`seen` in counter() was 6 when the run was cut and is 0 here: keep it in run.state"),
    (running_average, "`average` in running_average()"),
    (sum_of_the_epoch, "`total` in sum_of_the_epoch()"),
    (best, "`best_loss` in best()"),
    (anchored, "`anchor` in anchored()"),
    (best_weights, "`kept` in best_weights()"),
    (replayed, "`memory` in replayed() was 150 items when the run was cut and is [] here"),
    (big_array, "`table` in big_array()"),
    (rate_set_once, "`scale` in rate_set_once() was 0.1 when the run was cut and is 1.0 here"),
    (history, "`losses` in history()"),
    (lookahead, "`ahead.slow` in lookahead()"),
    (lookahead_optimizer, "`ahead` in lookahead_optimizer()"),
    (
        moving_average_module,
        "`slow` in moving_average_module() is not what it was when the run was cut: call run.register(slow=...)",
    ),
    (meter, "`losses.sum` in meter()"),
    (meters_by_name, "`meters['loss'].sum` in meters_by_name()"),
    (attribute_of_a_trainer, "`self.patience` in fit()"),
    (module_global, ".CALLS`"),
    (value_in_a_global_dict, ".SUMS['loss']`"),
    (variable_of_an_outer_function, "`count` in variable_of_an_outer_function()"),
    (
        variable_of_a_running_outer_function,
        "the variable `count` in variable_of_a_running_outer_function() was",
    ),
    (generator, "`noise` in generator()"),
    (hidden_state, "`hidden` in hidden_state()"),
    (hidden_state_that_is_saved_as_well, "`hidden` in hidden_state_that_is_saved_as_well()"),
    (observation, "`seen` in observation()"),
    (called_with_a_star, "`one.baseline` in called_with_a_star()"),
    (called_with_two_stars, "`two.baseline` in called_with_two_stars()"),
    (called_as_a_variable, "`step.__self__.held` in called_as_a_variable()"),
    (called_by_a_text, "`four.given` in called_by_a_text()"),
    (called_by_a_text_of_parts, "`five.formed` in called_by_a_text_of_parts()"),
    (called_as_a_partial, ".AVERAGE`"),
    (dict_of_two_names, "the variable `fisher[0]` in dict_of_two_names() is not"),
    (called_from_a_list, "`hooks[0].__self__.listed` in called_from_a_list()"),
    (method_that_is_passed_on, "`seven.factor` in method_that_is_passed_on()"),
    (read_before_the_call_that_writes, "`control.beta` in read_before_the_call_that_writes()"),
    (read_in_the_call_that_writes, "`controller.beta` in read_in_the_call_that_writes()"),
    (
        read_in_a_condition_in_the_call_that_writes,
        "`steered.beta` in read_in_a_condition_in_the_call_that_writes()",
    ),
    (weights_put_aside, "`average.backup` in evaluated()"),
    (weights_put_aside_by_a_registered_object, "`average.backup` in evaluated()"),
    (weights_put_aside_in_a_list, "`average.aside` in evaluated()"),
    (weights_put_aside_by_a_context_manager, "`kept` in averaged_weights()"),
    (read_by_a_scheduler, "`warmed.decay` in read_by_a_scheduler() was 0.5 when the run was cut and is 1.0"),
    (read_by_a_loader, "`owner.ratio` in read_by_a_loader() was 0.5 when the run was cut and is 1.0 here"),
    (object_of_two_names, "the variable `callbacks[0].smallest` in object_of_two_names() was"),
    (data_class, "`stop.bad` in data_class()"),
    (smoothed, "`window` in smoothed()"),
    (best_weights_of_an_object, "`stopping.best` in best_weights_of_an_object()"),
    (best_weights_in_a_dict, "`kept['model']` in best_weights_in_a_dict()"),
    *(
        (phases, f"`{name}` in phases() ({then} then, {now} here)")
        for name, then, now in (
            ("phase", "Phase.MAIN", "Phase.WARM"),
            ("criterion", "HuberLoss", "MSELoss"),
            ("dtype", "torch.bfloat16", "torch.float32"),
            ("loss_of", "_VariableFunctionsClass.mean", "_VariableFunctionsClass.sum"),
            ("used", "slow", "optimizer"),
        )
    ),
    (replayed_objects, "`memory` in replayed_objects() was 150 items when the run was cut and is [] here"),
    (rates_of_the_restored, "`rates` in rates_of_the_restored()"),
    (loss_of_the_restored, "`first` in loss_of_the_restored()"),
    (values_of_a_generator, "`schedule` in values_of_a_generator()"),
    (
        variable_of_a_generator_around_a_loader,
        "`scale` in scaled() was 0.5 when the run was cut and is 1.0 here",
    ),
    (attribute_of_a_class, "Scaling.by`"),
    (closure, "`count(count)` in closure() was 3 when the run was cut and is 0 here"),
    (
        dict_by_attributes,
        "`config['scale']` in dict_by_attributes() was 0.125 when the run was cut and is 1.0 here",
    ),
    (list_of_a_class, "`history` in list_of_a_class()"),
    (default_of_an_argument, "`smooth(seen)` in default_of_an_argument()"),
    (default_of_a_method, "`Smoother.of(seen)`"),
    (dict_by_a_member_and_a_parameter, "`scales[Phase.WARM]`"),
    (dict_by_a_member_and_a_parameter, "`scales[(0, 1)]`"),
    (dict_by_a_member_and_a_parameter, "`sums[key 0]`"),
    (dict_of_many, "`weights` in dict_of_many()"),
    (attributes_by_a_method, "`hyper._values['beta']`"),
    (operator, "`scale.by` in operator()"),
    (losses_by_name, "`losses['all']` in losses_by_name()"),
    (hardest_first, "`hardest` in hardest_first()"),
    (labels_of_the_model, "`labels` in labels_of_the_model()"),
]
LATE = {
    best,
    best_weights,
    best_weights_of_an_object,
    best_weights_in_a_dict,
    variable_of_a_generator_around_a_loader,
    weights_put_aside,
    weights_put_aside_by_a_registered_object,
    weights_put_aside_in_a_list,
    weights_put_aside_by_a_context_manager,
    read_by_a_loader,
}


@pytest.mark.parametrize(("train", "named"), LOST, ids=lambda value: getattr(value, "__name__", ""))
def test_a_variable_that_the_cut_loses_is_named(train: Any, named: str) -> None:
    """At every handoff, with its values where they are short."""
    line = told(train, (7,) if train in LATE else (3,))[0]
    assert line.startswith("warning: ")
    assert named in line


def test_a_segment_of_one_boundary_tells_as_well() -> None:
    """From where its loop began; None that has got a value since then may be a cache."""
    assert "`seen` in counter() was 2 when" in told(counter, (1,))[0]
    assert "`seen` in counter() was 2 when" in told(counter, (3, 4))[1]
    assert "`hidden` in set_anew_by_each_epoch() was 0." in told(set_anew_by_each_epoch, (1,))[0]
    assert "`losses['all']` in losses_by_name()" in told(losses_by_name, (1,))[0]


# ---- what is not


def sets_before_it_reads(run: Any, DataLoader: Any) -> None:
    """A closure that sets its variable before it reads it."""
    model, optimizer, _ = begin(run, DataLoader)

    def making() -> Callable[[float], float]:
        last = 0.0

        def twice(value: float) -> float:
            nonlocal last
            last = 2 * value
            return last

        return twice

    twice = making()
    for step in run.steps(STEPS):
        update(model, optimizer, torch.full((2, 2), twice(float(step))))


def loop_variables(run: Any, DataLoader: Any) -> float:
    """Bound before the loop, and written in each turn before they are read."""
    model, optimizer, loader = begin(run, DataLoader)
    batch, loss, step, factor = next(iter(loader)), None, -1, 1.0
    for epoch in run.epochs(2):
        for step, batch in enumerate(loader):
            factor = 1.0 if step % 2 else 0.5
            with torch.autograd.set_detect_anomaly(False):
                try:
                    loss = update(model, optimizer, batch * factor)
                finally:
                    del factor
            run.step(loss=loss, epoch=epoch)
    return float(loss)


class Profile:
    def __init__(self) -> None:
        self.laps: Any = collections.defaultdict(list)


def clocks(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    start, shown, spent, rate = time.time(), time.perf_counter(), 0.0, 0.0
    batch_time, data_time = Meter(), Meter()
    laps = []
    times, total, profile = {"step": 0.0}, {"step": 0.0}, Profile()
    end = time.monotonic()
    for _ in run.epochs(2):
        for batch in loader:
            data_time.update(time.monotonic() - end)
            update(model, optimizer, batch)
            if time.perf_counter() - shown > 1e-9:
                shown = time.perf_counter()
            spent += time.time() - start
            rate = 0.9 * rate + 0.1 / spent
            laps.append(spent)
            times["step"] = spent
            total["step"] += time.time() - start
            profile.laps["step"].append(time.time() - start)
            batch_time.update(time.monotonic() - end)
            end = time.monotonic()
            run.step(
                seconds=batch_time.avg, rate=rate, data=data_time.avg, times=times["step"] + total["step"]
            )
    print(len(laps), profile.laps["step"])


class Stopwatch:
    def __init__(self) -> None:
        self.began, self.laps = time.time(), 0.0

    def lap(self) -> float:
        now = time.time()
        self.laps += now - self.began
        self.began = now
        return self.laps


def stopwatch(run: Any, DataLoader: Any) -> None:
    model, optimizer, _ = begin(run, DataLoader)
    watch, slept = Stopwatch(), 0.0
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2))
        slept += watch.lap()


def bars_files_and_loggers(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    file, logger, log = io.StringIO(), logging.getLogger("x"), []
    bar = tqdm(total=20, file=io.StringIO())
    for epoch in run.epochs(2):
        for step, batch in enumerate(tqdm(loader, file=io.StringIO())):
            loss = update(model, optimizer, batch)
            bar.update(1)
            bar.set_postfix(loss=loss.item())
            file.write(f"{epoch} {step}")
            logger.debug("step %d", step)
            run.step()
    assert not log


def what_jobs_differ_in(run: Any, DataLoader: Any) -> None:
    """A number of the job, a folder of its own, flags of the resume: other ones here, but no state."""
    model, optimizer, _ = begin(run, DataLoader)
    segment, resumed, job = run.segment, run.resumed, random.Random().random()
    settings = {"segment": job, "dir": f"/tmp/{job}"}
    if run.resumed:
        first = run.global_step
    else:
        first = -1
    for _ in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2))
        if loss < 0:
            print(segment, resumed, settings, first)


def caches(run: Any, DataLoader: Any) -> None:
    """What is made again where it is wanted."""
    global TABLE, WARNED  # noqa: PLW0603 as scripts do
    model, optimizer, _ = begin(run, DataLoader)
    known: dict[int, float] = {}
    mask, asked = None, set()
    for step in run.steps(STEPS):
        if mask is None:
            mask = torch.ones(2, 2)
        if step % 5 not in known:
            known[step % 5] = 1.0 / (step % 5 + 1)
        CACHE.setdefault(step, 2.0)
        if TABLE is None:
            TABLE = [1.0, 2.0]
        if step > 1 and not WARNED:
            WARNED = True
        asked.add(step)
        update(model, optimizer, torch.randn(2, 2) * mask * known[step % 5] * CACHE[step] * TABLE[1])


def buffers(run: Any, DataLoader: Any) -> None:
    """Made once, and written anew in each turn before they are read."""
    model, optimizer, loader = begin(run, DataLoader)
    buffer, array, collected = torch.zeros(2, 2), np.zeros(2), [0.0]
    for _ in run.epochs(2):
        for batch in loader:
            buffer.copy_(batch)
            array[:] = batch[0].numpy()
            collected.clear()
            collected.append(update(model, optimizer, buffer).item() + array.sum())
            run.step(loss=collected[0])


class Callback:
    """Attributes that a turn writes before it reads them."""

    def __init__(self) -> None:
        self.loss, self.batch, self.outputs = 0.0, None, [0.0]

    def before(self, batch: Any) -> None:
        self.batch = batch
        self.outputs = [batch.sum().item()]

    def after(self, model: Any, optimizer: Any) -> float:
        self.loss = update(model, optimizer, self.batch).item()
        return self.loss + self.outputs[0]


class Criterion(torch.nn.Module):
    last = 0.0

    def forward(self, value: Any) -> Any:
        self.last = value.mean().item()
        return value.square().mean()


class Lucid:
    """Counts in the loop's own variable, an attribute that is called like many methods."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        self.model, self.optimizer, self.step = model, optimizer, 0

    def __call__(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def attribute_of_a_loop(run: Any, DataLoader: Any) -> None:
    one = Lucid(*begin(run, DataLoader)[:2])
    for one.step in run.steps(STEPS):
        one(one.model(torch.randn(2, 2) + one.step).square().mean())
        run.log(step=one.step)


def attributes_of_a_turn(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    callback, criterion = Callback(), Criterion()
    criterion.last = 1.0
    for _ in run.epochs(2):
        for batch in loader:
            callback.before(batch)
            callback.after(model, optimizer)
            criterion(batch)
            run.step(loss=callback.loss, last=criterion.last)


class Average:
    """Registered, with what its state_dict() leaves out."""

    def __init__(self) -> None:
        self.sum, self.calls = 0.0, [0]

    def add(self, value: float) -> None:
        self.sum += value
        self.calls[0] += 1

    def state_dict(self) -> dict[str, float]:
        return {"sum": self.sum}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.sum = state["sum"]


def what_checkpoints_hold(run: Any, DataLoader: Any) -> float:
    noise, average = torch.Generator().manual_seed(3), Average()
    model, optimizer, loader = begin(run, DataLoader, noise=noise, average=average)
    calls, weight, state = average.calls, model.weight, run.state
    state.setdefault("best", 9.0)
    sums = run.state.setdefault("sums", [0.0])
    parameters = list(model.parameters())
    best_loss = run.state["best"]
    step = run.global_step
    for _ in run.epochs(2):
        for batch in loader:
            loss = update(model, optimizer, batch + torch.rand(2, generator=noise)).item()
            average.add(loss)
            best_loss = min(best_loss, loss)
            state["best"] = best_loss
            sums[0] += loss
            step += 1
            run.step(best=best_loss, step=step, calls=calls[0], norm=weight.norm(), n=len(parameters))
    return best_loss


class Counted(torch.utils.data.Dataset[Any]):
    """Its attributes, and a generator, are the loader's to bring back."""

    def __init__(self) -> None:
        self.noise, self.visits, self.level = random.Random(3), 0, 0.0

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        self.visits += 1
        return torch.full((2,), self.noise.random() + self.level)


def data_set(run: Any, DataLoader: Any) -> None:
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    dataset = Counted()
    order = torch.Generator().manual_seed(5)
    loader = DataLoader(dataset, batch_size=2, shuffle=True, generator=order)
    run.register(model=model, optimizer=optimizer, loader=loader)
    for epoch in run.epochs(2):
        dataset.level = float(epoch)
        for batch in loader:
            update(model, optimizer, batch)
            run.step()


def activations(run: Any, DataLoader: Any) -> None:
    """What a hook keeps of a forward pass."""
    model, optimizer, _ = begin(run, DataLoader)
    kept: dict[str, Any] = {}
    model.register_forward_hook(lambda _, inputs, output: kept.update(out=output, into=inputs[0].detach()))
    for _ in run.steps(STEPS):
        update(model, optimizer, torch.randn(2, 2))
        run.log(norm=kept["out"].norm(), into=kept["into"].norm())


def read_in_no_code_that_follows(run: Any, DataLoader: Any) -> None:
    """A value of the part before, which nothing reads any more."""
    model, optimizer, _ = begin(run, DataLoader)
    warm = 0
    while warm < 3:
        warm += 1
    for _ in run.steps(STEPS):
        loss = update(model, optimizer, torch.randn(2, 2))
        last = loss.item()
        run.log(last=last)


def batches(loader: Any) -> Iterator[Any]:
    while True:
        yield from loader


def iterators(run: Any, DataLoader: Any) -> None:
    model, optimizer, loader = begin(run, DataLoader)
    endless, numbers, add = batches(loader), map(int, range(99)), functools.partial(sum, start=0)
    pairs = itertools.chain([1], [2])
    for _ in run.steps(STEPS):
        update(model, optimizer, next(endless))
    assert numbers and add and pairs and os.sep


QUIET = [
    loop_variables,
    sets_before_it_reads,
    clocks,
    stopwatch,
    bars_files_and_loggers,
    what_jobs_differ_in,
    caches,
    buffers,
    attributes_of_a_turn,
    attribute_of_a_loop,
    what_checkpoints_hold,
    data_set,
    activations,
    read_in_no_code_that_follows,
    iterators,
    weights_put_aside_and_saved,
]


@pytest.mark.parametrize("train", QUIET, ids=lambda train: train.__name__)
def test_a_variable_that_does_not_matter_is_not_named(train: Any) -> None:
    """Cut anywhere, also at an epoch's end and after every step."""
    for cuts in ((3, 7), (5,), range(1, STEPS)):
        assert told(train, cuts) == []


def by_epoch(run: Any, DataLoader: Any) -> float:
    model, optimizer, _ = begin(run, DataLoader)
    known: dict[int, float] = {}
    seen = set()
    for step in run.steps(STEPS):
        known[step] = update(model, optimizer, torch.randn(2, 2)).item()
        seen.add(step)
    return sum(known.values()) + len(seen)


def in_a_file_of_memory(run: Any, DataLoader: Any) -> None:
    """An object of Python's library: what it holds is its own."""
    model, optimizer, _ = begin(run, DataLoader)
    text = io.StringIO()
    for _ in run.steps(STEPS):
        text.write("a")
        update(model, optimizer, torch.full((2, 2), float(len(text.getvalue()))))


def optimizer_put_back(run: Any, DataLoader: Any) -> None:
    """What was copied after the optimizer was registered is a copy of the restored state in a resumed function."""
    model, optimizer, _ = begin(run, DataLoader)
    at_first = copy.deepcopy(optimizer.state_dict())
    for step in run.steps(STEPS):
        if step == 5:
            optimizer.load_state_dict(at_first)
        update(model, optimizer, torch.randn(2, 2))


def parts_that_change_places(run: Any, DataLoader: Any) -> None:
    """Weights are restored by their names, what an optimizer keeps of them by the order that it has them in."""
    model: Any = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    run.register(model=model, optimizer=optimizer)
    for step in run.steps(STEPS):
        update(lambda x: model[1](model[0](x)), optimizer, torch.randn(2, 2))
        if step == 1:
            model[0], model[1] = model[1], model[0]


@pytest.mark.parametrize(
    "train", [in_a_file_of_memory, by_epoch, optimizer_put_back, parts_that_change_places]
)
def test_what_no_handoff_tells_of(train: Any) -> None:
    """What cannot be told from a cache, or is what another package keeps to itself: the documentation says so."""
    assert told(train) == []


def test_the_warning_is_in_the_journal_too(tmp_path: Path) -> None:
    """Once for each handoff, where `chainrun status` and the report look; and the run goes on."""
    trained = cut(counter, (3, 7), dir=tmp_path)
    events = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    found = [event for event in events if event["event"] == "warning"]
    assert [f"warning: {event['reason']}" for event in found] == lost(trained)
    assert [event["step"] for event in found] == [3, 7]
    assert len(trained.lines) == 0
    assert trained.segments == 3


def test_every_rank_of_a_real_chain_tells_of_its_own(tmp_path: Path) -> None:
    """On the second rank alone a variable has changed: its log has the warning, the first one's has none."""
    described = {
        "name": "two",
        "function": f"{Path(__file__).parent / 'programs' / 'faulty.py'}:rank_one",
        "dir": str(tmp_path),
        "local": {"tasks": 2},
    }
    (tmp_path / "two.yaml").write_text(json.dumps(described))
    command = [sys.executable, "-m", "chainrun", "run", str(tmp_path / "two.yaml"), "--interrupt-at", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    first, second = (
        "".join(path.read_text() for path in RunDir(tmp_path / "two").logs(rank)) for rank in (0, 1)
    )
    assert "`scale`" not in first
    assert "rank 1: warning: the variable `scale` in rank_one() was 1.4" in second


def test_what_is_told_is_small_and_takes_little_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large values a sample is looked at; out of time, what was not looked at is not told."""

    def large(run: Any, DataLoader: Any) -> int:
        many, table = [float(n) for n in range(200_000)], torch.zeros(300_000)
        run.register(model=torch.nn.Linear(1, 1))
        for _ in run.steps(STEPS):
            many.append(1.0)
            table.add_(1.0)
        return len(many) + len(table)

    assert (
        "`many` in large() (200003 items then, 200000 items here), `table` in large()" in told(large, (3,))[0]
    )
    cut(large, (3,), dir=tmp_path)
    (file,) = tmp_path.glob("checkpoints/*/witness*")
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(variables_lost, "SECONDS", 0.0)
    assert told(large, (3,)) == []


def test_code_of_other_versions_of_python_is_read_by_its_names() -> None:
    """A loop's reads and writes, a name written whole by a method or a slice, a function called by its name."""

    def code(y: Any, z: Any, out: Any) -> Any:
        for x in out:
            y.clear()
            z[:] = x
            out = x + y
        return out

    def live(gives: bool | None) -> set[str]:
        keys = {("local", name) for name in ("x", "y", "z", "out")}
        (loop,) = (step for step in liveness.read(code.__code__) if step.name == "FOR_ITER")
        found = liveness.Code({}, keys).live(code.__code__, loop.at, gives=gives)
        return {name for _, name in found}

    assert live(False) == {"out"}
    assert live(True) == set()
    assert live(None) == {"out"}
