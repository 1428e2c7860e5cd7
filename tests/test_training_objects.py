"""Optimizers, schedulers, scalers, averages and modules of all kinds, cut at every step, are the plain program."""

from __future__ import annotations

import collections
import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import Segment, cut, cut_everywhere, digest, marks, plain, sweep
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from chainrun.errors import RestoreError

STEPS = 20


def small(inputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 1))


def training(make: Any, steps: int = STEPS, net: Any = small, batch: Any = lambda: torch.randn(4, 3)) -> Any:
    """Return a training of what `make(model)` returns: things to register, and a function of step and batch."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = net()
        things, step = make(model)
        run.register(model=model, **things)
        for n in run.steps(steps):
            x = batch()
            loss = step(n, x)
            run.step(loss=loss, **marks((x, lrs(things)), model, *things.values()))
        return digest(model.state_dict(), *(thing.state_dict() for thing in things.values()))

    return train


def lrs(things: dict[str, Any]) -> list[Any]:
    """Return what groups of parameters have besides parameters, learning rates above all."""
    groups = [g for thing in things.values() for g in getattr(thing, "param_groups", ())]
    return [{k: v for k, v in group.items() if k != "params"} for group in groups]


def updating(model: Any, optimizer: Any, after: Any = None) -> Any:
    def step(n: int, x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after is not None:
            after(n, loss)
        return loss

    return step


# ---- optimizers ----------------------------------------------------------------------------------------

optim = torch.optim
OPTIMIZERS: dict[str, Any] = {
    "Adadelta": optim.Adadelta,
    "Adafactor": lambda p: optim.Adafactor(p, lr=0.05),
    "Adagrad": lambda p: optim.Adagrad(p, lr_decay=0.1, initial_accumulator_value=0.1),
    "Adagrad fused": lambda p: optim.Adagrad(p, fused=True),
    "Adam": lambda p: optim.Adam(p, amsgrad=True, weight_decay=0.1),
    "Adam foreach": lambda p: optim.Adam(p, foreach=True),
    "Adam fused": lambda p: optim.Adam(p, fused=True, amsgrad=True),
    "Adam differentiable": lambda p: optim.Adam(p, differentiable=False, maximize=True),
    "Adam rate a tensor": lambda p: optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW": lambda p: optim.AdamW(p, lr=0.01, foreach=True, amsgrad=True),
    "Adamax": optim.Adamax,
    "ASGD": lambda p: optim.ASGD(p, t0=5),
    "NAdam": lambda p: optim.NAdam(p, decoupled_weight_decay=True),
    "RAdam": optim.RAdam,
    "RMSprop": lambda p: optim.RMSprop(p, centered=True, momentum=0.5, foreach=True),
    "Rprop": optim.Rprop,
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "SGD fused": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1, fused=True),
    "Muon": lambda p: optim.Muon([each for each in p if each.ndim == 2]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(name: str) -> None:
    """The state of every optimizer of torch goes on, whichever of its implementations is chosen."""

    def make(model: nn.Module) -> Any:
        optimizer = OPTIMIZERS[name](model.parameters())
        return {"optimizer": optimizer}, updating(model, optimizer)

    cut_everywhere(training(make), least=STEPS)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search: Any) -> None:
    """LBFGS keeps lists of tensors and the number of evaluations."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, history_size=3, line_search_fn=search)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            def again() -> torch.Tensor:
                optimizer.zero_grad()
                loss: torch.Tensor = model(x).square().mean()
                loss.backward()
                return loss

            return optimizer.step(again)

        return {"optimizer": optimizer}, step

    cut_everywhere(training(make), least=STEPS)


def test_sparse_gradients() -> None:
    """SparseAdam beside AdamW, with gradients that are accumulated over the boundaries."""

    def make(model: Any) -> Any:
        sparse = optim.SparseAdam(list(model[0].parameters()), lr=0.1)
        dense = optim.AdamW(model[1].parameters())

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            loss = model(x).square().mean()
            loss.backward()
            if n % 3 == 2:
                for optimizer in (sparse, dense):
                    optimizer.step()
                    optimizer.zero_grad()
            return loss

        return {"sparse": sparse, "dense": dense}, step

    net = lambda: nn.Sequential(nn.Embedding(9, 4, sparse=True), nn.Linear(4, 1))  # noqa: E731
    sweep(training(make, net=net, batch=lambda: torch.randint(9, (4,))), STEPS)


def test_adversarial_training() -> None:
    """Two networks, two optimizers of different rhythm; one adds to the other's gradients in between."""

    def train(run: Any, DataLoader: Any) -> Any:
        generator, critic = small(2), small(1)
        makes = optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.9))
        judges = optim.RMSprop(critic.parameters(), lr=0.01)
        things = {"generator": generator, "critic": critic, "makes": makes, "judges": judges}
        run.register(**things)
        for n in run.steps(STEPS):
            made = generator(torch.randn(4, 2))
            judged = critic(made.detach()).mean() - critic(torch.randn(4, 1)).mean()
            judged.backward()
            if n % 2:
                judges.step()
                judges.zero_grad()
            if n % 3 == 1:
                critic(made).mean().neg().backward()  # leaves gradients in the critic
                makes.step()
                makes.zero_grad()
            run.step(loss=judged, **marks(made, *things.values()))
        return digest(*(thing.state_dict() for thing in things.values()))

    cut_everywhere(train, least=STEPS)


def test_gradients_that_are_never_zeroed() -> None:
    """They grow from step to step, used again and again."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.SGD(model.parameters(), lr=0.01)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return {"optimizer": optimizer}, step

    cut_everywhere(training(make), least=STEPS)


@pytest.mark.parametrize("to_none", [True, False])
def test_gradients_that_are_seldom_zeroed(to_none: bool) -> None:
    """They are used in every step and zeroed in every fourth."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.SGD(model.parameters(), lr=0.01)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            if n % 4 == 3:
                optimizer.zero_grad(set_to_none=to_none)
            loss = model(x).square().mean()
            loss.backward()
            optimizer.step()
            return loss

        return {"optimizer": optimizer}, step

    cut_everywhere(training(make), least=STEPS)


def resting(model: Any, optimizer: Any, at: int, to_none: bool = True) -> Any:
    """Return a step that zeroes gradients up to a step, and adds to them from there on."""

    def step(n: int, x: torch.Tensor) -> torch.Tensor:
        loss = model(x).square().mean()
        if n < at:
            optimizer.zero_grad(set_to_none=to_none)
        loss.backward()
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("kind", ["SGD", "Adam fused"])
def test_gradients_that_are_no_longer_zeroed(kind: str) -> None:
    """Exact at every cut but the one right before the first step that adds to used gradients, which is refused."""

    def make(model: nn.Module) -> Any:
        optimizer = OPTIMIZERS[kind](model.parameters())
        return {"optimizer": optimizer}, resting(model, optimizer, at=10)

    train = training(make)
    reference = plain(train)
    for step in range(1, STEPS):
        if step == 10:
            with pytest.raises(
                RestoreError, match=r"the gradient of parameter \d of the optimizer 'optimizer' is"
            ):
                cut(train, (step,))
        else:
            assert reference.difference(cut(train, (step,))) is None, step


def test_gradients_that_are_no_longer_zeroed_in_place() -> None:
    """Zeroed in place, gradients are the same tensors in every step: a checkpoint holds them, the change is exact."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        return {"optimizer": optimizer}, resting(model, optimizer, at=10, to_none=False)

    cut_everywhere(training(make), least=STEPS)


USES: dict[str, Any] = {
    "their norm": lambda model, optimizer: model[0].weight.grad.norm().item(),
    "clipping": lambda model, optimizer: nn.utils.clip_grad_norm_(model.parameters(), 0.1),
    "a copy by hand": lambda model, optimizer: model[0].weight.grad.data[0, 0].item(),
    "another step": lambda model, optimizer: optimizer.step(),
}


@pytest.mark.parametrize("use", USES)
def test_used_gradients_that_are_read_after_the_boundary_are_refused(use: str) -> None:
    """A checkpoint has not got them, and a resumed run does not go on as if there were none."""

    def make(model: nn.Module) -> Any:
        optimizer = optim.AdamW(model.parameters(), lr=0.01)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            if n == 7:
                USES[use](model, optimizer)
            return updating(model, optimizer)(n, x)

        return {"optimizer": optimizer}, step

    train = training(make)
    reference = plain(train)
    assert reference.difference(cut(train, (6, 8))) is None
    with pytest.raises(RestoreError, match="until then each step had found new gradients in place"):
        cut(train, (7,))


def test_what_needs_no_gradient_leaves_those_that_were_left_out() -> None:
    """Moved, asked for their shapes, passed over at a boundary, cut again: a backward replaces them all the same."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = small()
        optimizer = optim.AdamW(model.parameters(), lr=0.01)
        run.register(model=model, optimizer=optimizer)
        step = updating(model, optimizer)
        for n in run.steps(STEPS):
            run.poll()
            copy.deepcopy(model)
            model.to(torch.float64).to("cpu").to(torch.float32)
            shapes = [list(p.grad.shape) for p in model.parameters() if p.grad is not None]
            x = torch.randn(4, 3)
            run.step(loss=step(n, x), **marks((x, shapes), model, optimizer))

    reference = plain(train)
    for after in ((4, 1, 1, 1, 3), (1,) * STEPS):
        assert reference.difference(cut(train, after=after)) is None


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph")
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_used_gradients_that_a_backward_adds_to_before_they_are_zeroed(graph: bool, sparse: bool) -> None:
    """The generator's turn comes first; its backward leaves in the critic what nobody uses."""

    def critic() -> nn.Module:
        return nn.EmbeddingBag(5, 1, sparse=True, mode="sum") if sparse else small(1)

    def train(run: Any, DataLoader: Any) -> Any:
        generator, judge = small(2), critic()
        makes = optim.Adam(generator.parameters(), lr=0.01)
        judges = (optim.SparseAdam if sparse else optim.Adam)(judge.parameters(), lr=0.01)
        things = {"generator": generator, "judge": judge, "makes": makes, "judges": judges}
        run.register(**things)

        def judged(made: torch.Tensor) -> torch.Tensor:
            if sparse:
                return judge(torch.randint(5, (4, 2)), per_sample_weights=made.expand(4, 2)).mean()
            return judge(made).mean()

        for _ in run.steps(STEPS):
            makes.zero_grad()
            made = generator(torch.randn(4, 2))
            judged(made).neg().backward(create_graph=graph)
            makes.step()
            judges.zero_grad()
            loss = judged(made.detach()) - judged(torch.randn(4, 1))
            loss.backward()
            judges.step()
            run.step(loss=loss, **marks(made, *things.values()))
        return digest(*(thing.state_dict() for thing in things.values()))

    cut_everywhere(train, least=STEPS)


def test_what_is_added_to_a_gradient_that_was_left_out_cannot_be_used() -> None:
    """Neither in the turn in which that happens, nor after another cut."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = small()
        optimizer = optim.SGD(model.parameters(), lr=0.01)
        run.register(model=model, optimizer=optimizer)
        for n in run.steps(STEPS):
            if n < 5:
                optimizer.zero_grad()
            loss = model(torch.randn(4, 3)).square().mean()
            loss.backward()
            if n != 5:
                optimizer.step()
            run.step(loss=loss)

    for cuts in ((5,), (5, 6)):
        with pytest.raises(
            RestoreError, match=r"the gradient of parameter \d of the optimizer 'optimizer' is"
        ):
            cut(train, cuts)


def test_used_gradients_that_are_replaced_are_not_saved(tmp_path: Path) -> None:
    """From the second step on a checkpoint holds weights and moments, no gradients."""
    model = small()
    optimizer = optim.Adam(model.parameters())
    step = updating(model, optimizer)
    with Segment(tmp_path) as run:
        run.register(model=model, optimizer=optimizer)
        sizes = []
        for n in range(3):
            step(n, torch.randn(4, 3))
            sizes.append(len(run._tree(None)["gradients"]["optimizer"]))
    assert sizes == [6, 0, 0]


@pytest.mark.parametrize("kind", ["SGD", "Adam fused"])
def test_scaled_losses_that_overflow(kind: str) -> None:
    """GradScaler skips infinite and NaN steps, with clipping after unscale_, accumulation and two optimizers."""

    def make(model: Any) -> Any:
        one = OPTIMIZERS[kind](model[:2].parameters())
        other = optim.AdamW(model[2:].parameters(), lr=0.01)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(x).square().mean()
            bad = {3: math.inf, 7: math.nan, 8: math.inf}.get(n, 1.0)
            scaler.scale(loss * bad).backward()
            if n % 2:
                scaler.unscale_(one)
                nn.utils.clip_grad_norm_(model[:2].parameters(), 0.1)
                for optimizer in (one, other):
                    scaler.step(optimizer)
                    optimizer.zero_grad()
                scaler.update()
            return loss

        return {"one": one, "other": other, "scaler": scaler}, step

    cut_everywhere(training(make), least=STEPS)


# ---- schedulers ----------------------------------------------------------------------------------------


class Warmup:
    """A callable with a memory."""

    def __init__(self, steps: int) -> None:
        self.steps, self.calls = steps, 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return min(1.0, (step + 1) / self.steps) / (1 + self.calls / 10)


class HandsOver(lr_scheduler.LRScheduler):
    """Hands over to another scheduler, which its ``__dict__``, and so its state_dict(), has in it."""

    def __init__(self, optimizer: torch.optim.Optimizer, after: lr_scheduler.LRScheduler) -> None:
        self.after: Any = after
        super().__init__(optimizer)

    def get_lr(self) -> list[Any]:
        if self.last_epoch > 3:
            return self.after.get_last_lr()
        return [rate * (1 + self.last_epoch) / 4 for rate in self.base_lrs]

    def step(self, epoch: int | None = None) -> None:
        if self.last_epoch > 3:
            self.after.step()
        super().step()


s = lr_scheduler
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: s.LambdaLR(o, [Warmup(4), lambda n: 0.9**n]),
    "MultiplicativeLR": lambda o: s.MultiplicativeLR(o, Warmup(4)),
    "StepLR": lambda o: s.StepLR(o, 3),
    "MultiStepLR": lambda o: s.MultiStepLR(o, [2, 4, 4, 8]),
    "ConstantLR": lambda o: s.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: s.LinearLR(o, 0.1, total_iters=7),
    "ExponentialLR": lambda o: s.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: s.PolynomialLR(o, 9, 2.0),
    "CosineAnnealingLR": lambda o: s.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: s.CosineAnnealingWarmRestarts(o, 3, 2),
    "OneCycleLR": lambda o: s.OneCycleLR(o, [0.1, 0.2], total_steps=21, three_phase=True),
    "CyclicLR": lambda o: s.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "CyclicLR own scale": lambda o: s.CyclicLR(o, 0.01, 0.1, 3, scale_fn=Warmup(3), scale_mode="iterations"),
    "ReduceLROnPlateau": lambda o: s.ReduceLROnPlateau(o, patience=0, cooldown=1),
    "SequentialLR": lambda o: s.SequentialLR(
        o, [s.LinearLR(o, 0.1, total_iters=3), s.LambdaLR(o, Warmup(3)), s.CosineAnnealingLR(o, 4)], [3, 6]
    ),
    "ChainedScheduler": lambda o: s.ChainedScheduler([s.ConstantLR(o, 0.1, 4), s.MultiStepLR(o, [3, 5])], o),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.001, anneal_epochs=4),
    "SWALR linear": lambda o: swa_utils.SWALR(o, 0.001, anneal_epochs=4, anneal_strategy="linear"),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name: str) -> None:
    """Rates and momenta of two groups follow the same curve, without a warning at a resume."""

    def make(model: Any) -> Any:
        groups = [{"params": model[:2].parameters(), "lr": 0.05}, {"params": model[2:].parameters()}]
        optimizer = optim.SGD(groups, lr=0.02, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)
        plateau = name == "ReduceLROnPlateau"
        turn = lambda n, loss: scheduler.step(loss.item()) if plateau else scheduler.step()  # noqa: E731
        return {"optimizer": optimizer, "scheduler": scheduler}, updating(model, optimizer, turn)

    cut_everywhere(training(make), least=STEPS)


def test_a_scheduler_that_holds_another_one() -> None:
    """It goes on with it, and is the same scheduler still."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = small()
        optimizer = optim.SGD(model.parameters(), lr=0.1)
        after = s.SequentialLR(optimizer, [s.ExponentialLR(optimizer, 0.9), s.StepLR(optimizer, 2)], [9])
        scheduler = HandsOver(optimizer, HandsOver(optimizer, after))
        run.register(model=model, optimizer=optimizer, scheduler=scheduler)
        step = updating(model, optimizer)
        for n in run.steps(STEPS):
            loss = step(n, torch.randn(4, 3))
            scheduler.step()
            run.step(loss=loss, rate=optimizer.param_groups[0]["lr"], after=after.last_epoch)
        assert scheduler.after.after is after
        return digest(model.state_dict())

    sweep(train, STEPS, quick=True)


# ---- groups ------------------------------------------------------------------------------------------------


def growing(where: str, loose: bool = False) -> Any:
    """Return a training of two phases; the second trains the whole model, in a group added where told."""

    def train(run: Any, DataLoader: Any) -> Any:
        model = small()
        extra = nn.Parameter(torch.ones(1))
        optimizer = optim.Adam(model[4:].parameters(), lr=0.01)
        scheduler = s.ExponentialLR(optimizer, 0.9)
        things = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
        run.register(**things)
        step = updating(model, optimizer)

        def add() -> None:
            parameters = [extra] if loose else [*model[:2].parameters()]
            optimizer.add_param_group({"params": parameters, "lr": 0.05, "betas": (0.5, 0.9)})
            scheduler.base_lrs.append(0.05)

        def turn(n: int) -> None:
            x = torch.randn(4, 3)
            run.step(loss=step(n, x), **marks((x, lrs(things)), *things.values()))
            if n % 4 == 3:
                scheduler.step()

        for n in run.steps(10):
            if where == "inside" and n == 5:
                add()
            turn(n)
        if where == "between":
            add()
        for n in run.steps(10):
            turn(n)

    return train


@pytest.mark.parametrize("where", ["inside", "between"])
def test_groups_that_are_added_later(where: str) -> None:
    """Added between two loops they are added again by the function, inside a loop by the restore."""
    cut_everywhere(growing(where), least=STEPS)


def test_an_added_group_of_unknown_parameters_is_refused() -> None:
    """A restore cannot know them: the message says what to do."""
    with pytest.raises(RestoreError, match=r"has 1 parameter groups, the checkpoint 2: add_param_group"):
        cut(growing("inside", loose=True), (7,))


class TwoSteps(torch.optim.Optimizer):
    """Sharpness-aware minimization as it is usually written: state_dict() says nothing of the inner optimizer."""

    def __init__(self, parameters: Any, inner: Any, **settings: Any) -> None:
        super().__init__(parameters, settings)
        self.inner = inner(self.param_groups, **settings)
        self.param_groups = self.inner.param_groups

    @torch.no_grad()
    def climb(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["before"] = parameter.clone()
                parameter.add_(parameter.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.copy_(self.state[parameter]["before"])
        self.inner.step()
        self.zero_grad()


class Decaying(torch.optim.Optimizer):
    """Counts, and averages, in attributes: its state_dict() says nothing of them."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.count, self.average = 0, torch.zeros(1)
        self.listed = [*self.param_groups[0]["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.count += 1
        norm = sum(parameter.grad.norm() for parameter in self.listed)
        self.average = 0.9 * self.average + norm
        for parameter in self.listed:
            parameter.sub_(0.1 * parameter.grad / self.count / (1 + self.average))


class Lookahead(torch.optim.Optimizer):
    """Wraps another one, as some published do: it does not call torch's __init__, or has a state_dict() of its own form."""

    def __init__(self, inner: torch.optim.Optimizer, form: str) -> None:
        self.inner, self.form, self.turns = inner, form, 0
        if form == "own":
            super().__init__([p for group in inner.param_groups for p in group["params"]], {"lr": 0.1})
        else:
            self.param_groups, self.defaults, self.state = (
                inner.param_groups,
                inner.defaults,
                collections.defaultdict(dict),
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.turns += 1
        for parameter in self.param_groups[0]["params"]:
            slow = self.state[parameter].setdefault("slow", parameter.clone())
            if self.turns % 3 == 0:
                slow += 0.5 * (parameter - slow)
                parameter.copy_(slow)

    def state_dict(self) -> Any:
        return {"base": self.inner.state_dict()} if self.form == "own" else self.inner.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state["base"] if self.form == "own" else state)


class ByParameter(Lookahead):
    """Has the inner one's state for its own, and slow weights by parameter, which its state_dict() gives in a list."""

    def __init__(self, inner: torch.optim.Optimizer, form: str) -> None:
        super().__init__(inner, form)
        self.state = inner.state
        self.slow = {p: p.detach().clone() for group in inner.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.inner.step()
        self.turns += 1
        for parameter, slow in self.slow.items():
            slow.add_(parameter - slow, alpha=0.5)
            if self.turns % 3 == 0:
                parameter.copy_(slow)

    def state_dict(self) -> Any:
        return {"state": [*self.slow.values()], "param_groups": [], "base": self.inner.state_dict()}

    def load_state_dict(self, state: Any) -> None:
        self.inner.load_state_dict(state["base"])
        for slow, saved in zip(self.slow.values(), state["state"], strict=True):
            slow.copy_(saved)


@pytest.mark.parametrize("form", ["own", "inner", "by parameter"])
def test_an_optimizer_whose_state_dict_is_not_all_of_its_state(form: str) -> None:
    """Its form is another one, or it is the inner one's; nor has it called torch's __init__."""

    def make(model: nn.Module) -> Any:
        # a class each, whose step() torch changes where its __init__ is called
        kind = type("Wrapping", (ByParameter if form == "by parameter" else Lookahead,), {})
        optimizer = kind(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), form)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(x).square().mean()
            optimizer.inner.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return {"optimizer": optimizer}, step

    sweep(training(make), STEPS, quick=True)


def test_attributes_of_an_own_optimizer() -> None:
    """They come back with its state."""

    def make(model: nn.Module) -> Any:
        optimizer = Decaying(model.parameters())

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss

        return {"optimizer": optimizer}, step

    sweep(training(make), STEPS, quick=True)


def test_an_optimizer_inside_another_one() -> None:
    """Its momentum comes back, and a schedule of the outer one's groups goes on reaching it."""

    def make(model: nn.Module) -> Any:
        optimizer = TwoSteps(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        scheduler = lr_scheduler.ExponentialLR(optimizer, 0.9)

        def step(n: int, x: torch.Tensor) -> torch.Tensor:
            loss: torch.Tensor = model(x).square().mean()
            loss.backward()
            optimizer.climb()
            model(x).square().mean().backward()
            optimizer.step()
            scheduler.step()
            return loss

        return {"optimizer": optimizer, "scheduler": scheduler}, step

    sweep(training(make), STEPS, quick=True)
